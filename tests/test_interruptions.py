"Runs that are killed, interrupted or refused by the disk go on and end the same."

import os
import signal
import subprocess
import time

import numpy as np
import pytest
from folder_files import assert_same_files, contents
from garden import command, environment, files_of, plant

resource = pytest.importorskip('resource')  # POSIX alone

SMALL = ('--concept-steps', 30, '--steps', 8, '--expansion', 6, '--batch-size', 8)
FILES = 38  # 36 images, their metadata and the page to look through them


@pytest.fixture
def garden(tmp_path):
    return plant(tmp_path / 'my garden')


@pytest.fixture
def augment(garden):
    "The command line of a run of about ten seconds, most of them imports."

    common = ('augment', garden, '--metaclass', 'flower', *SMALL)
    return command(*common, '--out', 'out')


def run(line, place, **kwargs):
    "The command in a folder of its own, so that no path in a run's files differs."
    place.mkdir(exist_ok=True)
    # a limit on the size of files must not cut Python's own caches short
    env = environment(PYTHONDONTWRITEBYTECODE='1')
    parts = dict(capture_output=True, text=True, env=env, cwd=place)
    return subprocess.run(line, timeout=600, **parts, **kwargs)


def kill_when(line, place, reached) -> bool:
    "Kill a run as soon as `reached()`; was it still running?"
    place.mkdir(exist_ok=True)
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(line, env=environment(), cwd=place, **quiet)
    while process.poll() is None and not reached():
        time.sleep(0.02)
    running = process.poll() is None
    if running:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return running


def assert_same_runs(a, b):
    "Two runs left the same files with the same bytes, their state and cards too."
    assert_same_files(contents(a / 'out'), contents(b / 'out'))


def test_a_killed_run_goes_on_and_ends_the_same(augment, tmp_path):
    "kill -9 in every stage: the files of an uninterrupted run, to the bit."
    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    assert run(augment, whole).returncode == 0

    def holds(pattern, count):
        return lambda: len(list((broken / 'out').glob(pattern))) >= count

    moments = [
        holds('.diffii/concepts/*', 1),
        holds('.diffii/pool/*', 1),
        holds('train/*/*.png', 5),
        holds('train/*/*.png', 20),
    ]
    kills = sum(kill_when(augment, broken, moment) for moment in moments)
    assert kills >= 2
    assert run(augment, broken).returncode == 0
    assert_same_runs(broken, whole)
    assert len(files_of(whole / 'out')) == FILES


@pytest.mark.skipif('DIFFII_KILLS' not in os.environ, reason='DIFFII_KILLS=20 runs it')
def test_runs_killed_at_random_moments_end_the_same(augment, tmp_path):
    whole, began = tmp_path / 'whole', time.time()
    assert run(augment, whole).returncode == 0
    seconds = time.time() - began
    rng = np.random.default_rng(0)
    for i in range(int(os.environ['DIFFII_KILLS'])):
        place = tmp_path / f'again{i}'
        until = time.time() + rng.uniform(0.2, 1) * seconds
        kill_when(augment, place, lambda: time.time() > until)
        assert run(augment, place).returncode == 0
        assert_same_runs(place, whole)


def test_a_full_disk_is_one_line_and_the_run_goes_on(augment, tmp_path):
    "A limit on the size of files stands in for the disk."

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = run(augment, tmp_path / 'full', preexec_fn=small_files)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert last.startswith('diffii: ')
    assert 'make room' in last
    assert 'Traceback' not in done.stderr
    assert run(augment, tmp_path / 'full').returncode == 0
    assert len(files_of(tmp_path / 'full' / 'out')) == FILES


def test_ctrl_c_says_how_to_go_on(augment, tmp_path):
    "An interrupt while concepts are learned: one line, exit code 130, nothing is lost."
    record = tmp_path / 'out' / '.diffii' / 'run.json'
    process = subprocess.Popen(
        augment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not record.is_file():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed = process.stderr.read()
    assert process.wait() == 130, printed
    last = printed.strip().splitlines()[-1]
    assert last == 'diffii: stopped; the same command goes on from here'
    assert 'Traceback' not in printed
    assert record.is_file()
