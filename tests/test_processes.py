"Several processes: each does its share, and together they make what one would have made."

import json
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import clean_environment
from PIL import Image

from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.processes import (
    LAUNCHER,
    Progress,
    check_tracker,
    first_makes,
    pick_device,
    processes,
)
from diffii.data.digits import digits_set


def test_what_is_not_told_where_to_run_has_the_device_of_the_process(monkeypatch):
    of_process = SimpleNamespace(device='mps')
    monkeypatch.setattr('diffii.base.processes.processes', lambda: of_process)

    assert pick_device() == 'mps'
    assert pick_device('cuda:1') == 'cuda:1'


def launch(n, *args, cwd, what=('-m', 'diffii'), ok=True):
    """Run `diffii`, or a script, in n processes on the CPU. torch's launcher starts them;
    accelerate's starts several for GPUs only."""
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
    env |= {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    several = [
        '-m',
        'torch.distributed.run',
        '--standalone',
        '--nproc_per_node',
        str(n),
    ]
    start = [*several, *what] if n > 1 else what
    command = [sys.executable, *start, *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=env, cwd=cwd
    )
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done


# ---- one process


def test_a_process_alone_is_the_first_of_one():
    me = processes()

    assert (me.process_index, me.num_processes, me.is_main_process) == (0, 1, True)
    assert first_makes(lambda: ['made']) == ['made']


def test_what_cannot_be_made_is_an_error():
    def fail():
        raise UserError('--out x: no')

    with pytest.raises(UserError, match='--out x: no'):
        first_makes(fail)


def test_an_unknown_tracker_is_refused():
    check_tracker(None)
    with pytest.raises(UserError, match='--tracker paper: one of aim'):
        check_tracker('paper')


@pytest.mark.parametrize('tracker', ('comet_ml', [None, 'comet_ml']))
def test_a_tracker_that_is_not_installed_is_named(monkeypatch, tracker):
    monkeypatch.setattr('accelerate.tracking.get_available_trackers', lambda: [])

    with pytest.raises(UserError, match='pip install comet-ml'):
        check_tracker(tracker)


def test_progress_remembers_each_step_once_it_ends():
    progress = Progress(quiet=True)

    for i in range(3):
        progress('counting', i + 1, 3)
    progress('stopped in the middle', 1, 5)
    progress('next', 1, 1)

    assert list(progress.seconds) == ['counting', 'stopped in the middle', 'next']


BAR = """
import time
from diffii.base.processes import Progress
progress = Progress()
for i in range(50):
    time.sleep(0.01)
    progress('counting', i + 1, 50)
"""


def drawn(**given):
    "What a bar of half a second writes where the standard error is no screen."
    own = {k: v for k, v in clean_environment().items() if not k.startswith('TQDM')}
    found = subprocess.run(
        [sys.executable, '-c', BAR],
        env={**own, **given},
        capture_output=True,
        check=True,
    )
    return found.stderr.decode()


def test_a_bar_in_a_file_moves_seldom():
    text = drawn()

    assert '50/50' in text
    assert text.count('counting') <= 4


def test_the_environment_says_how_often_a_bar_moves():
    assert drawn(TQDM_MININTERVAL='0.02').count('counting') > 10


def test_a_log_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / 'file').touch()
    for log in (tmp_path, tmp_path / 'file' / 'log.jsonl'):
        with pytest.raises(UserError, match=f'--log {log}: cannot be written'):
            Progress(quiet=True, log=log)


def test_the_folder_of_a_log_is_made(tmp_path):
    Progress(quiet=True, log=tmp_path / 'new' / 'log.jsonl')('fast', 1, 1)
    assert (tmp_path / 'new' / 'log.jsonl').is_file()


def test_the_log_has_few_lines_and_the_last(tmp_path):
    progress = Progress(quiet=True, log=tmp_path / 'log.jsonl')

    for i in range(50):
        progress('fast', i + 1, 50)

    lines = (tmp_path / 'log.jsonl').read_text().splitlines()
    last = json.loads(lines[-1])
    assert 2 <= len(lines) < 50
    assert (last['step'], last['done'], last['total']) == ('fast', 50, 50)


@pytest.mark.parametrize(
    'given, found',
    [
        (dict(WORLD_SIZE='abc'), "WORLD_SIZE='abc': no number"),
        (dict(WORLD_SIZE='0'), "WORLD_SIZE='0': no number"),
        (dict(WORLD_SIZE='2'), 'without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
        (dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0'), 'without MASTER_ADDR'),
    ],
)
def test_half_a_launch_is_one_line(monkeypatch, given, found):
    for name in ('WORLD_SIZE', *LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError, match=found):
        processes()


# ---- synthesis in two processes

SMALL_RUN = (
    '--metaclass digit --concept-steps 4 --concept-batch 4 --steps 4 --expansion 2 '
    '--batch-size 8 --no-flip'
).split()


def save_digits(folder):
    "Two digits of each kind in folders."
    few, _ = few_shot(digits_set('pool'), 2, seed=0)
    for i in range(len(few)):
        file = folder / few.classes[few.labels[i]] / f'{few.names[i]}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        few.open(i).save(file)


def read_run(folder):
    "The lines of metadata, the images and the losses of a run."
    text = (folder / 'metadata.jsonl').read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    images = [np.asarray(Image.open(folder / row['file_name'])) for row in rows]
    record = json.loads((folder / '.diffii/concepts/concepts.json').read_text())
    return SimpleNamespace(
        rows=rows, images=np.stack(images).astype(int), losses=record['log']
    )


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "The same run in one process and in two."
    folder = tmp_path_factory.mktemp('runs')
    save_digits(folder / 'digits')

    def augment(n, out, *more, ok=True):
        args = 'augment', 'digits', '--out', out, *SMALL_RUN, *more
        return launch(n, *args, cwd=folder, ok=ok)

    augment(1, 'one')
    said = augment(2, 'two').stdout
    return SimpleNamespace(
        one=read_run(folder / 'one'),
        two=read_run(folder / 'two'),
        said=said,
        augment=augment,
    )


def test_only_the_first_process_speaks(runs):
    assert runs.said.count('40 synthetic images') == 1


def test_two_processes_share_the_batch(runs):
    refused = runs.augment(2, 'odd', '--concept-batch', 3, ok=False)

    assert '--concept-batch 3: give a multiple of the 2 processes' in refused.stderr


def test_two_processes_make_the_plan_of_one(runs):
    def without_angles(row):
        return {k: v for k, v in row.items() if k not in ('alpha', 'strength')}

    plans = [list(map(without_angles, run.rows)) for run in (runs.one, runs.two)]
    strengths = [[row['strength'] for row in run.rows] for run in (runs.one, runs.two)]

    assert plans[0] == plans[1]
    assert np.allclose(*strengths, rtol=1e-3)  # angles differ in their last digits


def test_two_halves_of_a_batch_are_the_batch(runs):
    assert len(runs.one.losses) == 4
    assert np.allclose(runs.one.losses, runs.two.losses, rtol=1e-3)


def test_two_processes_make_the_images_of_one(runs):
    "Sums run in another order: pixels differ by less than 2 of 255 on average."
    assert np.abs(runs.one.images - runs.two.images).mean() < 2


# ---- a classifier in two processes

TRAIN = """
import hashlib
import json
import sys

from diffii.base.images import few_shot
from diffii.base.processes import processes
from diffii.base.settings import ClassifierSettings
from diffii.data.digits import digits_set
from diffii.evaluation.long_tail import long_tail_callbacks
from diffii.method.classifier import train_classifier

seen = []
few, _ = few_shot(digits_set('pool'), 3, seed=0)
test, spare = digits_set('validation'), digits_set('pool')


def described(result):
    state = result.learner.model.state_dict()
    weights = b''.join(v.numpy().tobytes() for v in state.values())
    return dict(
        accuracy=result.accuracy,
        weights=hashlib.sha256(weights).hexdigest(),
        keys=sorted(state)[:2],
        predictions=hashlib.sha256(result.probabilities.tobytes()).hexdigest(),
        n=len(result.probabilities),
        batch=result.learner.dls.train.bs,
        callbacks=sorted(str(c) for c in result.learner.cbs),
    )


plain = train_classifier(
    few,
    test,
    spare,
    ClassifierSettings(steps=60, lr=0.05),
    progress=lambda done, total: seen.append((done, total)),
)
long_tail = train_classifier(
    few,
    test,
    settings=ClassifierSettings(steps=20, batch_size=16),
    valid=spare.subset(range(50)),
    callbacks=long_tail_callbacks('CMO+DRW'),
)
results = [described(plain) | dict(steps=seen[-1]), described(long_tail)]
with open(f'{sys.argv[1]}-{processes().process_index}.json', 'w') as f:
    json.dump(results, f)
"""


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Two classifiers, plain and long-tailed, as each process describes them."
    folder = tmp_path_factory.mktemp('train')
    (folder / 'train.py').write_text(TRAIN)
    launch(1, 'one', cwd=folder, what=('train.py',))
    launch(2, 'two', cwd=folder, what=('train.py',))
    names = dict(alone='one-0', first='two-0', second='two-1')
    return SimpleNamespace(
        **{k: json.loads((folder / f'{v}.json').read_text()) for k, v in names.items()}
    )


def test_both_processes_have_one_network(trained):
    "Weights, statistics and scores, to the bit."
    assert trained.first == trained.second


def test_two_processes_share_the_batch_of_a_classifier(trained):
    for alone, together in zip(trained.alone, trained.first):
        assert together['batch'] == alone['batch'] // 2
        assert together['weights'] != alone['weights']
        for key in ('keys', 'n', 'callbacks'):
            assert together[key] == alone[key]


def test_two_processes_take_the_steps_of_one_and_learn_as_much(trained):
    alone, together = trained.alone[0], trained.first[0]

    assert together['steps'] == alone['steps'] == [60, 60]
    assert alone['accuracy'] > 0.4
    assert abs(together['accuracy'] - alone['accuracy']) < 0.12


# ---- the end of a process

LAST_WORD = """
import sys

import torch

from diffii.base.processes import processes

processes()
sys.setswitchinterval(1000)  # a thread that wants the lock must wait to be offered it
network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
for _ in range(20):
    network(torch.ones(2, 4)).sum().backward()
"""


def test_processes_may_end_right_after_their_last_word(tmp_path):
    "Without the pause about one process in three aborts; there are six."
    (tmp_path / 'last_word.py').write_text(LAST_WORD)

    launch(6, cwd=tmp_path, what=('last_word.py',))


# ---- an experiment in two processes


def test_a_benchmark_in_two_processes(tmp_path):
    options = '--shots 2 --trials 1 --quick --methods original,random-noise'.split()

    done = launch(2, 'benchmark', 'few-shot', *options, '--out', 'b', cwd=tmp_path)

    files = {p.name for p in (tmp_path / 'b').iterdir()}
    assert done.stdout.count('see ') == 1
    assert {'table.csv', 'table.json', 'plot.png'} <= files
    assert len(list((tmp_path / 'b' / 'cells').glob('*.json'))) == 2


# ---- one of two is killed


def pair(folder):
    "The same run in two processes, started by hand as a launcher does."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    env = clean_environment() | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1')
    env |= dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    line = [sys.executable, '-m', 'diffii', 'augment', 'digits', '--out', 'pair']
    return [
        subprocess.Popen(
            [*line, *SMALL_RUN],
            env=env | dict(RANK=str(i), LOCAL_RANK=str(i)),
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def test_when_one_of_two_is_killed_the_other_ends_and_the_run_goes_on(tmp_path):
    save_digits(tmp_path / 'digits')
    first, second = pair(tmp_path)
    try:
        while not (tmp_path / 'pair/.diffii/run.json').is_file():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)

        second.kill()

        said = first.communicate(timeout=60)[1]
        assert first.returncode == 2, said
        last = said.strip().splitlines()[-1]
        assert last.startswith('diffii: another process of this run has ended')
        assert 'Traceback' not in said
    finally:
        first.kill()
        second.kill()

    again = pair(tmp_path)
    said = [process.communicate(timeout=300)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
