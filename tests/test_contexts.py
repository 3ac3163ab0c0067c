"Contexts from a language model: chosen once for a run, whoever asks and however often."

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from folder_files import contents
from garden import MADE, QUICK, environment, plant, start

CAPTIONED = (
    '--metaclass',
    'bird',
    '--captioner',
    'measure',
    '--summariser',
    'openai:m',
)


class Moody(BaseHTTPRequestHandler):
    "A language model that gives another answer each time."

    def do_POST(self):
        self.rfile.read(int(self.headers['Content-Length']))
        self.server.asked.append(f'in mood {len(self.server.asked)}.')
        content = f'- {self.server.asked[-1]}\n- in the snow.'
        answer = dict(choices=[dict(message=dict(content=content))])
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def moody():
    "The server; `asked` holds its answers, `env` is an environment that names it."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Moody)
    server.asked = []
    address = f'http://127.0.0.1:{server.server_port}/v1'
    server.env = environment(OPENAI_BASE_URL=address)
    server.env.pop('OPENAI_API_KEY', None)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def garden(tmp_path):
    return plant(tmp_path / 'my garden')


@pytest.fixture
def augment(garden, moody):
    def run(*args, env=None):
        return start('augment', garden, *CAPTIONED, *QUICK, *args, env=env or moody.env)

    return run


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def nameless(env):
    "An environment that says neither where a language model is nor a key."
    return {k: v for k, v in env.items() if not k.startswith('OPENAI')}


def test_a_run_keeps_the_contexts_that_it_began_with(augment, moody, tmp_path):
    out = tmp_path / 'out'
    done = augment('--out', out)
    assert f'{MADE} synthetic images' in done.stdout, done.stderr
    assert 'captions' in done.stderr  # captioning has a bar
    kept = read(out / '.diffii' / 'suffixes.json')['suffixes']
    assert kept == ['in mood 0.', 'in the snow.']
    assert read(out / '.diffii' / 'run.json')['suffixes'] == kept
    (out / 'train' / 'lonely' / '00001.png').unlink()
    assert f'{MADE} synthetic images' in augment('--out', out).stdout
    assert len(moody.asked) == 1


def test_other_settings_leave_a_folder_as_it_is(augment, moody, tmp_path):
    out = tmp_path / 'out'
    augment('--out', out)
    before = contents(out)
    done = augment('--out', out, '--seed', 1)
    assert 'seed: 0 then, 1 now' in done.stderr
    assert contents(out) == before


def test_a_model_that_cannot_be_had_leaves_no_folder(augment, moody, tmp_path):
    done = augment('--out', tmp_path / 'out', '--model', 'nobody/nothing')
    assert 'nobody/nothing' in done.stderr
    assert not (tmp_path / 'out').exists()


def test_a_used_folder_is_told_before_anybody_is_asked(augment, moody, tmp_path):
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'thesis.tex').touch()
    assert 'thesis.tex' in augment('--out', used).stderr
    assert not moody.asked
    assert [p.name for p in used.iterdir()] == ['thesis.tex']


def test_a_missing_key_is_told_before_captioning(augment, moody, tmp_path):
    done = augment('--out', tmp_path / 'out', env=nameless(moody.env))
    assert len(done.stderr.strip().splitlines()) == 1
    assert 'OPENAI_API_KEY: not set' in done.stderr
    assert not (tmp_path / 'out').exists()


TWO = ('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2')


@pytest.fixture
def two_processes(garden):
    def run(out, env):
        options = (*CAPTIONED, *QUICK, '--concept-batch', 2, '--out', out)
        line = [sys.executable, *TWO, '-m', 'diffii', 'augment', garden, *options]
        line = [str(word) for word in line]
        return subprocess.run(
            line, capture_output=True, text=True, timeout=600, env=env
        )

    return run


def test_of_two_processes_one_asks_and_both_follow(two_processes, moody, tmp_path):
    out = tmp_path / 'out'
    done = two_processes(out, moody.env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f'{MADE} synthetic images') == 1
    assert len(moody.asked) == 1
    assert read(out / '.diffii' / 'run.json')['suffixes'][0] == 'in mood 0.'


def test_two_processes_fail_together(two_processes, moody, tmp_path):
    done = two_processes(tmp_path / 'x', nameless(moody.env))
    assert done.returncode
    assert 'OPENAI_API_KEY: not set' in done.stderr
    assert not (tmp_path / 'x').exists()
