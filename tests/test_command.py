"The `diffii` command as a user meets it: in a subprocess, on a folder of one's own, with every kind of mistake."

import json, os, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from PIL import Image


def photo(
    seed, size=(40, 30)
):  # smooth colour blobs, unlike anything the model has seen
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype='uint8')
    ).resize(size, Image.BICUBIC)


@pytest.fixture
def cli(run):
    def _cli(*args, ok=True, cwd=None):
        env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')} | {
            'HF_HUB_OFFLINE': '1'
        }
        r = subprocess.run(
            [sys.executable, '-m', 'diffii', *map(str, args)],
            capture_output=True,
            text=True,
            timeout=600,
            env=env,
            cwd=cwd,
        )
        assert (r.returncode == 0) == ok, r.stdout[-2000:] + r.stderr[-3000:]
        return r

    return _cli


@pytest.fixture
def garden(tmp_path):
    "A user's folder: odd names, odd files, one category with a single image."
    root = tmp_path / 'my garden'
    for c, n in (('bird of paradise', 2), ('œillet (red:1.2)', 3), ('lonely', 1)):
        (root / c).mkdir(parents=True)
        for i in range(n):
            photo(len(c) * 10 + i).save(root / c / f'{i}.jpg')
    (root / 'notes.txt').write_text('not a category')
    (root / 'lonely' / '.hidden.jpg').write_text('x')
    return root


QUICK = ('--concept-steps', 2, '--steps', 3, '--expansion', 2)


def test_augment_a_users_folder(cli, garden, tmp_path):
    out = tmp_path / 'out'
    r = cli('augment', garden, '--metaclass', 'flower', '--out', out, *QUICK)
    assert (
        'rehearsal' in r.stdout and '12 synthetic images' in r.stdout
    )  # says plainly what the shipped model is
    rows = [
        json.loads(l)
        for l in (out / 'metadata.jsonl').read_text(encoding='utf-8').splitlines()
    ]
    assert len(rows) == 12 and {r['label'] for r in rows} == {
        'bird of paradise',
        'œillet (red:1.2)',
        'lonely',
    }
    assert all(Image.open(out / r['file_name']).size == (32, 32) for r in rows)
    assert any(
        '#' in s for r in rows if r['label'] == 'lonely' for s in r['sources']
    )  # views of the one image, and said so
    assert not any(p.suffix == '.tmp' for p in out.rglob('*'))
    cli('remake', out, rows[5]['file_name'], '--to', tmp_path / 'again.png')
    assert (
        np.asarray(Image.open(tmp_path / 'again.png'))
        == np.asarray(Image.open(out / rows[5]['file_name']))
    ).all()
    again = (tmp_path / 'again.png').read_bytes()
    r = cli(
        'remake', out, rows[6]['file_name'], '--to', tmp_path / 'again.png', ok=False
    )
    assert (
        'again.png: is there already' in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
        and (tmp_path / 'again.png').read_bytes() == again
    )
    assert (
        '12 synthetic images'
        in cli('augment', garden, '--metaclass', 'flower', '--out', out, *QUICK).stdout
    )  # the same again: nothing to do


def test_another_method_is_watched_and_made_again(cli, garden, tmp_path):
    out, log = tmp_path / 'mix', tmp_path / 'log.jsonl'
    cli(
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--out',
        out,
        '--method',
        'diff-mix',
        '--strengths',
        '0.5,1',
        '--log',
        log,
        *QUICK,
    )
    rows = [
        json.loads(l)
        for l in (out / 'metadata.jsonl').read_text(encoding='utf-8').splitlines()
    ]
    assert len(rows) == 12 and all(
        r['method'] == 'diff-mix'
        and r['label'] != r['source_label']
        and r['strength'] in (0.5, 1.0)
        and r['label_weight'] == r['strength'] ** 0.8
        for r in rows
    )
    lines = [json.loads(l) for l in log.read_text().splitlines()]
    assert {l['step'] for l in lines} == {'concepts', 'encoding', 'images'} and lines[
        -1
    ]['done'] == lines[-1]['total'] == 12
    (out / rows[3]['file_name']).unlink()
    seen = dict(l.split(None, 1) for l in cli('status', out).stdout.splitlines())
    assert (
        seen['method'] == 'diff-mix'
        and seen['planned'] == '12'
        and seen['done'] == '11'
        and seen['concepts'] == 'done'
        and rows[3]['label'] in seen['missing']
    )
    cli(
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--out',
        out,
        '--method',
        'diff-mix',
        '--strengths',
        '0.5,1',
        *QUICK,
    )
    assert 'nothing' in cli('status', out).stdout
    r = cli(
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--out',
        out,
        '--method',
        'real-mix',
        *QUICK,
        ok=False,
    )
    assert 'synthesis: method: "diff-mix" then, "real-mix" now' in r.stderr


def test_concepts_in_published_formats(cli, garden, tmp_path):
    "What one run learned, in the files of other programs, gives the next run the same pictures."
    from diffii.method.concepts import Concepts
    from diffii.run.concept_files import FORMATS, export_concepts

    common = ('augment', garden, '--metaclass', 'flower', *QUICK)
    cli(*common, '--tokens', 1, '--out', tmp_path / 'learned')
    got = Concepts.load(tmp_path / 'learned' / '.diffii' / 'concepts')
    assert got.lora
    for form in FORMATS:
        export_concepts(got, tmp_path / form, form)
        (tmp_path / form / 'concepts.json').unlink(missing_ok=True)
        if form == 'diffusers':
            continue  # without our list of names nothing says which category <c0> is
        assert (
            '12 synthetic images'
            in cli(
                *common,
                '--concepts',
                tmp_path / form,
                '--out',
                tmp_path / f'out-{form}',
            ).stdout
        )
        for f in (tmp_path / 'learned').glob('*/*.png'):
            assert (
                f.read_bytes()
                == (
                    tmp_path / f'out-{form}' / f.relative_to(tmp_path / 'learned')
                ).read_bytes()
            )
    assert (
        'no token for'
        in (
            r := cli(
                *common,
                '--concepts',
                tmp_path / 'diffusers',
                '--out',
                tmp_path / 'x',
                ok=False,
            )
        ).stderr
        and len(r.stderr.strip().splitlines()) == 1
        and not (tmp_path / 'x').exists()
    )


def test_a_tracker_follows_concept_learning(cli, garden, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = (
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--steps',
        3,
        '--expansion',
        2,
        '--concept-steps',
        5,
    )
    cli(*common, '--out', tmp_path / 'plain')
    cli(
        *common,
        '--out',
        tmp_path / 'out',
        '--tracker',
        'tensorboard',
        '--sample-every',
        2,
    )
    log = tmp_path / 'out' / '.diffii' / 'concepts' / 'log' / 'concepts'
    events = EventAccumulator(str(log)).Reload()
    kept = json.loads(
        (tmp_path / 'out' / '.diffii' / 'concepts' / 'concepts.json').read_text()
    )
    assert [s.step for s in events.Scalars('loss')] == [1, 2, 3, 4, 5] and np.allclose(
        [s.value for s in events.Scalars('loss')], kept['log'], rtol=1e-6
    )
    assert [(s.step, s.width, s.height) for s in events.Images('samples')] == [
        (2, 96, 32),
        (4, 96, 32),
    ]  # three categories, side by side
    assert files_of(tmp_path / 'out') == files_of(
        tmp_path / 'plain'
    )  # it changed nothing
    assert (
        '12 synthetic images' in cli(*common, '--out', tmp_path / 'out').stdout
    )  # and is no part of the settings
    r = cli(*common, '--out', tmp_path / 'x', '--tracker', 'paper', ok=False)
    assert (
        '--tracker paper: one of' in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
        and not (tmp_path / 'x').exists()
    )


def test_a_table_with_columns_of_its_own(cli, garden, tmp_path):
    files = [
        (p, p.parent.name) for p in sorted(garden.glob('*/*.jpg')) if p.name[0] != '.'
    ]
    (tmp_path / 't.csv').write_text(
        'path,kind\n' + ''.join(f'{p},"{k}"\n' for p, k in files), encoding='utf-8'
    )
    common = (
        'augment',
        tmp_path / 't.csv',
        '--metaclass',
        'flower',
        '--out',
        tmp_path / 'o',
        *QUICK,
    )
    assert (
        '12 synthetic images'
        in cli(*common, '--image-column', 'path', '--label-column', 'kind').stdout
    )
    assert 't.csv' in cli(*common, ok=False).stderr  # the default columns are not there


def test_a_benchmark_goes_on_where_it_stopped(cli, tmp_path):
    common = (
        'benchmark',
        'few-shot',
        '--shots',
        2,
        '--trials',
        1,
        '--quick',
        '--out',
        tmp_path / 'b',
    )
    r = cli(*common, '--methods', 'original,random-noise')
    assert 'random-noise' in r.stdout and 'original' in r.stdout
    cell = tmp_path / 'b' / 'cells' / '2-shot--original--0.json'
    before = cell.stat().st_mtime_ns
    r = cli(*common, '--methods', 'original,random-noise,diff-ii')
    assert (
        ' original: ' in r.stdout
        and '(one trial)' in r.stdout
        and cell.stat().st_mtime_ns == before
    )
    assert {'table.csv', 'table.json', 'plot.png'} <= {
        p.name for p in (tmp_path / 'b').iterdir()
    }
    for args, word in (
        (('benchmark', 'few-shoot', '--out', tmp_path / 'x'), 'few-shoot'),
        (('benchmark', 'ood', '--out', tmp_path / 'x'), 'digits'),
        (('benchmark', 'few-shot', '--methods', 'gan', '--out', tmp_path / 'x'), 'gan'),
        (
            ('benchmark', 'few-shot', '--shots', 'five', '--out', tmp_path / 'x'),
            '--shots five',
        ),
        (
            ('benchmark', 'few-shot', '--dataset', 'cub', '--out', tmp_path / 'x'),
            '--root',
        ),
        (
            ('benchmark', 'few-shot', '--lr-schedule', 'fast', '--out', tmp_path / 'x'),
            '--lr-schedule fast',
        ),
        (
            ('benchmark', 'strength', '--tokens', 0, '--out', tmp_path / 'x'),
            '--tokens 0',
        ),
    ):
        r = cli(*args, ok=False)
        assert (
            word in r.stderr
            and len(r.stderr.strip().splitlines()) == 1
            and not (tmp_path / 'x').exists()
        )


def mistakes(garden, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'thesis.tex').touch()
    (tmp_path / 'file').touch()

    def spoilt(name, data):
        d = tmp_path / f'spoilt-{name}' / 'oak'
        d.mkdir(parents=True)
        (d / name).write_bytes(data)
        photo(1).save(d / 'good.png')
        return d.parent

    import io

    b = io.BytesIO()
    photo(2).save(b, 'PNG')
    png = b.getvalue()
    bad_class = tmp_path / 'bad class'
    (bad_class / 'oak').mkdir(parents=True)
    (bad_class / 'elm').mkdir()
    photo(3).save(bad_class / 'oak' / '1.png')
    return {
        'empty folder': ((tmp_path / 'empty',), 'empty'),
        'no folder': ((tmp_path / 'nowhere',), 'nowhere'),
        'class without images': ((bad_class,), 'elm'),
        'truncated': ((spoilt('cut.png', png[:60]),), 'cut.png'),
        'zero bytes': ((spoilt('zero.jpg', b''),), 'zero.jpg'),
        'text as jpg': ((spoilt('text.jpg', b'hello'),), 'text.jpg'),
        'expansion 0': ((garden, '--expansion', 0), '--expansion 0'),
        'split ratio 1.5': ((garden, '--split-ratio', 1.5), '--split-ratio 1.5'),
        'unknown model': (
            (garden, '--model', 'nobody/nothing'),
            '--model nobody/nothing',
        ),
        'used folder': ((garden, '--out', tmp_path / 'used'), 'thesis.tex'),
        'out is a file': ((garden, '--out', tmp_path / 'file'), 'file'),
        'no suffix list': ((garden, '--suffixes', '5-shot Dodos'), '5-shot Dodos'),
        'shots': ((garden, '--shots', 3), '--shots 3'),
        'no concepts': (
            (garden, '--concepts', tmp_path / 'empty'),
            'no file of embeddings',
        ),
    }


@pytest.mark.parametrize(
    'case',
    [
        'empty folder',
        'no folder',
        'class without images',
        'truncated',
        'zero bytes',
        'text as jpg',
        'expansion 0',
        'split ratio 1.5',
        'unknown model',
        'used folder',
        'out is a file',
        'no suffix list',
        'shots',
        'no concepts',
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cli, garden, tmp_path, case):
    args, names = mistakes(garden, tmp_path)[case]
    out = tmp_path / 'out'
    before = sorted(tmp_path.rglob('*'))
    r = cli(
        'augment',
        *args,
        '--metaclass',
        'flower',
        *(() if '--out' in args else ('--out', out)),
        ok=False,
    )
    lines = [l for l in r.stderr.strip().splitlines()]
    assert (
        r.returncode == 2
        and len(lines) == 1
        and lines[0].startswith('diffii: ')
        and names in lines[0]
    ), r.stderr
    assert sorted(tmp_path.rglob('*')) == before


def test_skip_bad_goes_on_without(cli, garden, tmp_path):
    (garden / 'œillet (red:1.2)' / 'cut.png').write_bytes(b'\x89PNG')
    r = cli(
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--out',
        tmp_path / 'out',
        '--skip-bad',
        *QUICK,
    )
    assert 'cut.png' in r.stderr and '12 synthetic images' in r.stdout


def test_a_full_disk_is_one_line_and_the_run_goes_on(garden, tmp_path):
    "A limit on the size of files stands in for the disk: first the concepts do not fit, then all does."
    import resource

    cmd = augment_small(garden, tmp_path / 'out')
    env = os.environ | {'HF_HUB_OFFLINE': '1'}
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    r = subprocess.run(cmd, capture_output=True, text=True, env=env, preexec_fn=small)
    last = r.stderr.strip().splitlines()[-1]
    assert (
        r.returncode == 2
        and last.startswith('diffii: ')
        and 'make room' in last
        and 'Traceback' not in r.stderr
    ), r.stderr
    subprocess.run(cmd, check=True, capture_output=True, env=env)
    assert len(files_of(tmp_path / 'out')) == 37


def test_ctrl_c_says_how_to_go_on(garden, tmp_path):
    "An interrupt while concepts are learned: one line, exit code 130, and what is there is kept."
    p = subprocess.Popen(
        augment_small(garden, tmp_path / 'out'),
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {'HF_HUB_OFFLINE': '1'},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while p.poll() is None and not list((tmp_path / 'out').glob('.diffii/run.json')):
        time.sleep(0.1)
    time.sleep(0.5)
    p.send_signal(signal.SIGINT)
    said = p.stderr.read()
    assert (
        p.wait() == 130
        and said.strip().splitlines()[-1]
        == 'diffii: stopped; the same command goes on from here'
        and 'Traceback' not in said
    ), said
    assert (tmp_path / 'out/.diffii/run.json').is_file()


def test_every_kind_of_image_file_goes_through(cli, tmp_path):
    d = tmp_path / 'kinds' / 'oak'
    d.mkdir(parents=True)
    im = photo(4)
    im.convert('P').save(d / 'palette.png')
    im.convert('CMYK').save(d / 'cmyk.jpg')
    im.save(d / 'moving.gif', save_all=True, append_images=[photo(5)])
    Image.fromarray((np.asarray(im.convert('L')).astype('uint16') * 257)).save(
        d / 'deep.png'
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(d / 'turned.jpg', exif=exif)
    r = cli(
        'augment',
        tmp_path / 'kinds',
        '--metaclass',
        'tree',
        '--out',
        tmp_path / 'out',
        *QUICK,
    )
    assert '10 synthetic images' in r.stdout


def test_help_is_quick_and_light(cli):
    r = cli('--help')
    assert all(c in r.stdout for c in ('demo', 'augment', 'remake'))
    probe = "import sys, diffii, diffii.cli; print([m for m in ('torch','diffusers','transformers','fastai','matplotlib','sklearn') if m in sys.modules])"
    import subprocess

    assert (
        subprocess.run(
            [sys.executable, '-c', probe], capture_output=True, text=True
        ).stdout.strip()
        == '[]'
    )


def augment_small(garden, out):  # a run of about ten seconds, most of them imports
    return [
        sys.executable,
        '-m',
        'diffii',
        'augment',
        str(garden),
        '--metaclass',
        'flower',
        '--out',
        str(out),
        '--concept-steps',
        '30',
        '--steps',
        '8',
        '--expansion',
        '6',
        '--batch-size',
        '8',
    ]


def files_of(d):
    return {
        p.relative_to(d): p.read_bytes()
        for p in d.rglob('*')
        if p.is_file() and '.diffii' not in p.parts and p.name != 'README.md'
    }


def kill_when(cmd, env, reached) -> bool:  # was it killed before it ended?
    p = subprocess.Popen(
        cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    while p.poll() is None and not reached():
        time.sleep(0.02)
    running = p.poll() is None
    if running:
        p.send_signal(signal.SIGKILL)
    p.wait()
    return running


def test_a_killed_run_goes_on_and_ends_the_same(garden, tmp_path):
    "kill -9 in every stage, and at random moments: the same command again ends with the files of an uninterrupted run, to the bit. DIFFII_KILLS=20 kills more often."
    env = os.environ | {'HF_HUB_OFFLINE': '1'}
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    state = broken / '.diffii'
    began = time.time()
    subprocess.run(
        augment_small(garden, whole), check=True, capture_output=True, env=env
    )
    seconds = time.time() - began
    count = lambda pattern, folder=broken: len(list(folder.glob(pattern)))
    moments = [
        lambda: count('*', state / 'concepts') >= 1,
        lambda: count('*', state / 'pool') >= 1,
        lambda: count('*/*.png') >= 5,
        lambda: count('*/*.png') >= 20,
    ]
    kills = sum([kill_when(augment_small(garden, broken), env, m) for m in moments])
    rng = np.random.default_rng(0)
    for i in range(int(os.environ.get('DIFFII_KILLS', 0))):
        again = tmp_path / f'again{i}'
        until = time.time() + rng.uniform(0.2, 1) * seconds
        kills += kill_when(
            augment_small(garden, again), env, lambda: time.time() > until
        )
        subprocess.run(
            augment_small(garden, again), check=True, capture_output=True, env=env
        )
        assert files_of(again) == files_of(whole)
    assert kills >= 2
    subprocess.run(
        augment_small(garden, broken), check=True, capture_output=True, env=env
    )
    assert files_of(whole) == files_of(broken) and len(files_of(whole)) == 37
    assert not list(
        broken.rglob('*.tmp')
    )  # what a killed run left half-written is swept away


@pytest.fixture
def moody(monkeypatch):
    "A language model that gives another answer each time; `asked` holds its answers."
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers['Content-Length']))
            self.server.asked.append(f'in mood {len(self.server.asked)}.')
            data = json.dumps(
                dict(
                    choices=[
                        dict(
                            message=dict(
                                content=f'- {self.server.asked[-1]}\n- in the snow.'
                            )
                        )
                    ]
                )
            ).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('OPENAI_BASE_URL', f'http://127.0.0.1:{server.server_port}/v1')
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    yield server
    server.shutdown()
    server.server_close()


CAPTIONED = (
    '--metaclass',
    'bird',
    '--captioner',
    'measure',
    '--summariser',
    'openai:m',
)


def test_suffixes_are_chosen_once(cli, garden, tmp_path, moody):
    out = tmp_path / 'out'
    kept = out / '.diffii' / 'suffixes.json'
    common = ('augment', garden, *CAPTIONED, *QUICK)
    r = cli(*common, '--out', out, '--model', 'nobody/nothing', ok=False)
    assert 'nobody/nothing' in r.stderr and not out.exists() and len(moody.asked) == 1
    r = cli(*common, '--out', out)
    assert (
        '12 synthetic images' in r.stdout
        and 'captions' in r.stderr
        and len(moody.asked) == 2
    )  # captioning has a bar
    said = json.loads(kept.read_text(encoding='utf-8'))
    assert (
        said['suffixes']
        == json.loads((out / '.diffii/run.json').read_text(encoding='utf-8'))[
            'suffixes'
        ]
        == ['in mood 1.', 'in the snow.']
    )
    (out / 'lonely' / '00001.png').unlink()
    assert (
        '12 synthetic images' in cli(*common, '--out', out).stdout
        and len(moody.asked) == 2
    )
    before = {p: p.read_bytes() for p in out.rglob('*') if p.is_file()}
    r = cli(*common, '--out', out, '--seed', 1, ok=False)
    assert 'seed: 0 then, 1 now' in r.stderr and before == {
        p: p.read_bytes() for p in out.rglob('*') if p.is_file()
    }
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'thesis.tex').touch()
    n = len(moody.asked)
    assert (
        'thesis.tex' in cli(*common, '--out', tmp_path / 'used', ok=False).stderr
        and len(moody.asked) == n
        and [p.name for p in (tmp_path / 'used').iterdir()] == ['thesis.tex']
    )


def test_a_missing_key_is_told_before_captioning(cli, garden, tmp_path, monkeypatch):
    monkeypatch.delenv('OPENAI_BASE_URL', raising=False)
    monkeypatch.delenv('OPENAI_API_KEY', raising=False)
    r = cli('augment', garden, *CAPTIONED, '--out', tmp_path / 'out', ok=False)
    assert (
        len(r.stderr.strip().splitlines()) == 1
        and 'OPENAI_API_KEY: not set' in r.stderr
        and not (tmp_path / 'out').exists()
    )


def test_processes_ask_once(garden, tmp_path, moody):
    "Two processes: one asks, and both make images of one plan; what it cannot do is told and leaves nothing."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONHASHSEED'} | {
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
    }
    start = [
        sys.executable,
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        '2',
        '-m',
        'diffii',
        'augment',
        str(garden),
        *CAPTIONED,
        *map(str, QUICK),
        '--concept-batch',
        '2',
    ]
    r = subprocess.run(
        [*start, '--out', str(tmp_path / 'out')],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
    )
    assert r.returncode == 0, r.stderr[-3000:]
    assert (
        r.stdout.count('12 synthetic images') == 1
        and len(moody.asked) == 1
        and json.loads((tmp_path / 'out/.diffii/run.json').read_text(encoding='utf-8'))[
            'suffixes'
        ][0]
        == 'in mood 0.'
    )
    r = subprocess.run(
        [*start, '--out', str(tmp_path / 'x')],
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in env.items() if k != 'OPENAI_BASE_URL'},
    )
    assert (
        r.returncode
        and 'OPENAI_API_KEY: not set' in r.stderr
        and not (tmp_path / 'x').exists()
    )


def test_large_birds_are_a_rehearsal_too(cli, tmp_path):
    (tmp_path / 'birds' / 'robin').mkdir(parents=True)
    for i in range(2):
        photo(i, (120, 90)).save(tmp_path / 'birds' / 'robin' / f'{i}.jpg')
    r = cli(
        'augment',
        tmp_path / 'birds',
        '--metaclass',
        'bird',
        '--out',
        tmp_path / 'out',
        *QUICK,
    )
    assert 'rehearsal' in r.stdout and '4 synthetic images' in r.stdout


def test_a_table_goes_on_without_bad_rows(cli, garden, tmp_path):
    (garden / 'lonely' / 'cut.png').write_bytes(b'\x89PNG')
    files = [p for p in sorted(garden.glob('*/*.*')) if p.name[0] != '.']
    (tmp_path / 'T.CSV').write_text(
        'file_name,label\n' + ''.join(f'{p},"{p.parent.name}"\n' for p in files),
        encoding='utf-8',
    )
    common = (
        'augment',
        tmp_path / 'T.CSV',
        '--metaclass',
        'flower',
        '--out',
        tmp_path / 'o',
        *QUICK,
    )
    r = cli(*common, ok=False)
    assert (
        'cut.png' in r.stderr
        and '--skip-bad' in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
    )
    r = cli(*common, '--skip-bad')
    assert 'cut.png' in r.stderr and '12 synthetic images' in r.stdout


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux alone')
def test_a_name_in_another_encoding_is_one_line(cli, garden, tmp_path):
    photo(1).save(os.fsdecode(os.fsencode(garden / 'lonely') + b'/\x9cillet.jpg'))
    out = tmp_path / 'out'
    for more in ((), ('--skip-bad',)):
        r = cli(
            'augment', garden, '--metaclass', 'flower', '--out', out, *more, ok=False
        )
        assert (
            r.returncode == 2
            and len(r.stderr.strip().splitlines()) == 1
            and r"'\udc9cillet.jpg'" in r.stderr
            and 'rename' in r.stderr
            and not out.exists()
        )


def test_remake_finds_a_model_that_moved(cli, garden, tmp_path):
    import diffii, shutil

    shutil.copytree(Path(diffii.__file__).parent / 'tiny', tmp_path / 'before')
    out = tmp_path / 'out'
    cli(
        'augment',
        garden,
        '--metaclass',
        'flower',
        '--out',
        out,
        '--model',
        tmp_path / 'before',
        *QUICK,
    )
    (tmp_path / 'before').rename(tmp_path / 'after')
    name = 'lonely/00001.png'
    r = cli('remake', out, name, '--to', tmp_path / 'a.png', ok=False)
    assert (
        str(tmp_path / 'before') in r.stderr and len(r.stderr.strip().splitlines()) == 1
    )
    cli('remake', out, name, '--to', tmp_path / 'a.png', '--model', tmp_path / 'after')
    assert (
        np.asarray(Image.open(tmp_path / 'a.png')) == np.asarray(Image.open(out / name))
    ).all()
