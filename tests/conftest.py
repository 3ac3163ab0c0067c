"What several test files use: the checkout, its notebooks, subprocesses, a browser."

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import diffii  # noqa: F401  before torch: it tells OpenMP's threads how to wait

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing here may need a hub
# test files run side by side, a core for each
os.environ.setdefault('OMP_NUM_THREADS', '1')
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))

from browser import QUIET  # noqa: E402  of the tools

PROBE = """<script>addEventListener('load', () => {
const images = [...document.images], meta = document.createElement('meta');
const broken = images.filter(image => !image.complete || !image.naturalWidth);
meta.name = 'probe'; meta.content = [images.length, broken.length].join(' ');
document.head.append(meta); })</script>"""

BROWSER_OPTIONS = (
    *QUIET,
    '--enable-logging=stderr',
    '--virtual-time-budget=10000',
    '--dump-dom',
)


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def notebooks():
    "Every notebook of the checkout: path relative to `nbs/` -> its cells."
    folder = ROOT / 'nbs'
    found = sorted(p.relative_to(folder) for p in folder.rglob('*.ipynb'))
    found = [p for p in found if not any(part[0] in '._' for part in p.parts)]
    read = {p: json.loads((folder / p).read_text(encoding='utf-8')) for p in found}
    return {p.as_posix(): nb['cells'] for p, nb in read.items()}


def clean_environment():
    "This process's environment without what is said to Python."
    return {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}


@pytest.fixture(scope='session')
def run():
    "Run a command in a clean environment; a failure shows what it printed."

    def _run(*command, timeout=300, **kwargs):
        command = [str(c) for c in command]
        done = subprocess.run(
            command,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            **kwargs,
        )
        printed = f'{done.stdout[-4000:]}\n{done.stderr[-4000:]}'
        assert done.returncode == 0, f'{command}\nexited {done.returncode}\n{printed}'
        return done

    return _run


@dataclass
class Answer:
    "What the command printed, and the code that it ended with."

    code: int
    out: str
    err: str

    @property
    def line(self):
        "The one line of an error."
        lines = self.err.strip().splitlines()
        assert self.code == 2, self.err
        assert len(lines) == 1, self.err
        assert lines[0].startswith('diffii: ')
        return lines[0]


@pytest.fixture
def say(monkeypatch, capsys):
    "Run the command in this process, which spares the seconds of its imports."

    from diffii.app.cli import main

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['diffii', *map(str, args)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        return Answer(code, *capsys.readouterr())

    return run


@pytest.fixture(scope='session')
def open_page(run, tmp_path_factory):
    "Open an HTML file in Chromium: (console messages, pictures, pictures not loaded)."
    names = ('chromium', 'chromium-browser', 'google-chrome')
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip('no Chromium on this machine: apt-get install chromium')

    def _open(page):
        # a copy, in a folder of its own: the page must need no other file
        folder = tmp_path_factory.mktemp('page')
        text = Path(page).read_text(encoding='utf-8')
        copy = folder / 'page.html'
        copy.write_text(text + PROBE, encoding='utf-8')
        profile = f'--user-data-dir={folder / "profile"}'
        done = run(browser, *BROWSER_OPTIONS, profile, copy.as_uri(), timeout=300)
        found = re.search(r'<meta name="probe" content="(\d+) (\d+)"', done.stdout)
        assert found, f'{page}: the page did not finish loading\n{done.stderr[-2000:]}'
        messages = re.findall(r'CONSOLE.*', done.stderr)
        return messages, int(found[1]), int(found[2])

    return _open
