"What several test files use: the checkout, its notebooks, a clean environment for subprocesses, and a browser."

import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here may need a hub
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

PROBE = """<script>addEventListener('load', () => { const i = [...document.images], m = document.createElement('meta');
m.name = 'probe'; m.content = [i.length, i.filter(x => !x.complete || !x.naturalWidth).length].join(' '); document.head.append(m); })</script>"""


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def notebooks():
    "Every notebook of the checkout: path relative to `nbs/` -> its cells."
    found = sorted(p.relative_to(ROOT / 'nbs') for p in (ROOT / 'nbs').rglob('*.ipynb'))
    return {
        p.as_posix(): json.loads((ROOT / 'nbs' / p).read_text(encoding='utf-8'))[
            'cells'
        ]
        for p in found
        if not any(x[0] in '._' for x in p.parts)
    }


@pytest.fixture(scope='session')
def run():
    "Run a command with no PYTHONPATH; a failure shows what it printed."

    def _run(*cmd, timeout=300, **kw):
        env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
        r = subprocess.run(
            [str(c) for c in cmd],
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
            **kw,
        )
        assert r.returncode == 0, (
            f'{" ".join(map(str, cmd))}\nexited {r.returncode}\n{r.stdout[-4000:]}\n{r.stderr[-4000:]}'
        )
        return r

    return _run


@pytest.fixture(scope='session')
def open_page(run, tmp_path_factory):
    "Open an HTML file in headless Chromium: (console messages, number of pictures, number that did not load)."
    browser = (
        shutil.which('chromium')
        or shutil.which('chromium-browser')
        or shutil.which('google-chrome')
    )
    if not browser:
        pytest.skip('no Chromium on this machine: apt-get install chromium')

    def _open(page):
        d = tmp_path_factory.mktemp('page')
        text = Path(page).read_text(encoding='utf-8')
        (d / 'page.html').write_text(
            text + PROBE, encoding='utf-8'
        )  # a copy, in a folder of its own: the page must need no other file
        r = run(
            browser,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            '--disable-quic',
            '--no-first-run',
            '--disable-background-networking',
            '--disable-component-update',
            '--disable-sync',
            '--enable-logging=stderr',
            '--virtual-time-budget=10000',
            f'--user-data-dir={d / "profile"}',
            '--dump-dom',
            (d / 'page.html').as_uri(),
            timeout=300,
        )
        probe = re.search(r'<meta name="probe" content="(\d+) (\d+)"', r.stdout)
        assert probe, f'{page}: the page did not finish loading\n{r.stderr[-2000:]}'
        return re.findall(r'CONSOLE.*', r.stderr), *map(int, probe.groups())

    return _open
