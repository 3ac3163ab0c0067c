"Several classifiers of a cell, and several processes on one experiment."

import subprocess
import sys
import time

import pytest

from diffii.base.files import read_json
from diffii.base.settings import BenchmarkSettings
from diffii.evaluation.experiments import benchmark
from diffii.evaluation.workers import (
    Share,
    at_work,
    helpers,
    share_of_cores,
    spare_workers,
    taken,
    while_parent_lives,
    workers,
)
from conftest import clean_environment

# locks


def test_a_lock_is_held_by_one_and_free_after_it(tmp_path):
    first = taken(tmp_path, 'x')
    assert taken(tmp_path, 'x') is None
    first.release()
    again = taken(tmp_path, 'x')
    assert again is not None
    again.release()


def test_workers_are_counted_while_they_are_at_work(tmp_path):
    with at_work(tmp_path), at_work(tmp_path):
        assert workers(tmp_path) == 2
    assert workers(tmp_path) == 0


JOBS = [('a', 'a0'), ('a', 'a1'), ('b', 'b0'), ('b', 'b1')]


@pytest.fixture
def two(tmp_path):
    "Two workers on the same jobs, and what is finished of them."
    finished = set()
    shares = [Share(tmp_path, JOBS, finished.__contains__) for _ in range(2)]
    return (*shares, finished)


def test_each_worker_stays_in_a_group_of_its_own(two):
    one, other, finished = two

    first, second = one.next(), other.next()
    finished.add(first[0])
    first[1].release()
    third = one.next()

    assert [JOBS[i][1] for i, _ in (first, second, third)] == ['a0', 'b0', 'a1']


def test_at_the_end_a_worker_helps_in_anothers_group(two):
    one, other, finished = two
    finished |= {2, 3}

    first, second = one.next(), other.next()

    assert {JOBS[i][1] for i, _ in (first, second)} == {'a0', 'a1'}
    assert Share(one.folder, JOBS, finished.__contains__).next() == (None, None)


def test_a_job_that_was_finished_meanwhile_is_passed_over(tmp_path):
    asked = []

    def done(i):
        asked.append(i)
        return asked.count(0) > 2  # another worker ends job 0 before its lock is ours

    assert Share(tmp_path, [('a', 'a0')], done).next() == (None, None)
    assert taken(tmp_path, 'job a0') is not None


# several classifiers


class Seeds(list):
    "Seeds of classifiers; at the one of that number training is stopped."

    stop_at = None


@pytest.fixture
def trained(monkeypatch):
    "Seeds of classifiers that were asked for, none of which is trained."
    from diffii.method.classifier import Result

    seeds = Seeds()

    def train(train, test=None, synthetic=None, settings=None, seed=0, **kwargs):
        seeds.append(seed)
        if len(seeds) == seeds.stop_at:
            raise KeyboardInterrupt
        accuracy = len(seeds) / 100
        return Result(
            accuracy=accuracy, per_class={'0': accuracy}, classes=train.classes
        )

    monkeypatch.setattr('diffii.method.classifier.train_classifier', train)
    return seeds


def run(folder, **trials):
    usual = dict(methods='original', shots=2, trials=1)
    return benchmark(
        'few-shot', 'digits', folder, BenchmarkSettings.of(trials=usual | trials)
    )


def test_a_cell_has_each_classifier_and_their_mean(tmp_path, trained):
    table = run(tmp_path / 'x', classifiers=3)

    cell = read_json(tmp_path / 'x' / 'cells' / '2-shot--original--0.json')
    assert [c['accuracy'] for c in cell['classifiers']] == [1, 2, 3]
    assert cell['accuracy'] == table.accuracy[0] == pytest.approx(2)
    assert cell['per_class'] == {'0': pytest.approx(2)}
    assert len({c['seed'] for c in cell['classifiers']}) == 3


def test_one_classifier_has_the_seed_of_its_trial(tmp_path, trained):
    run(tmp_path / 'x', trials=2)
    assert trained == [0, 1]


def test_more_classifiers_are_added_to_those_that_are_there(tmp_path, trained):
    run(tmp_path / 'x', classifiers=2)
    run(tmp_path / 'x', classifiers=3)
    run(tmp_path / 'x', classifiers=1)
    assert len(trained) == len(set(trained)) == 3


def test_a_stopped_cell_goes_on_with_its_next_classifier(tmp_path, trained):
    trained.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'x', classifiers=4)

    trained.stop_at = None
    run(tmp_path / 'x', classifiers=4)

    cell = read_json(tmp_path / 'x' / 'cells' / '2-shot--original--0.json')
    assert [c['seed'] for c in cell['classifiers']] == trained[:2] + trained[3:]
    assert trained[2] == trained[3]


# several processes


def test_two_processes_share_an_experiment(tmp_path):
    line = [sys.executable, '-m', 'diffii', 'benchmark', 'few-shot', '--out', 'x']
    line += '--quick --shots 2 --trials 2 --methods original,random-noise'.split()
    env = clean_environment() | dict(HF_HUB_OFFLINE='1')

    both = [
        subprocess.Popen(line, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in both]

    assert [process.returncode for process in both] == [0, 0], errors
    out = tmp_path / 'x'
    cells = sorted(file.stem for file in (out / 'cells').glob('*.json'))
    names = ('original', 'random-noise')
    assert cells == [f'2-shot--{name}--{trial}' for name in names for trial in (0, 1)]
    assert workers(out / 'work' / 'locks') == 0
    assert (out / 'table.csv').is_file()


# helpers


def test_helpers_have_ended_after_the_block(tmp_path):
    with helpers(1, 'os:mkdir', str(tmp_path / 'made')):
        pass

    assert (tmp_path / 'made').is_dir()


def test_a_helper_that_fails_is_no_error(tmp_path):
    with helpers(1, 'os:mkdir', str(tmp_path / 'no' / 'such')):
        pass


def test_an_error_in_the_block_ends_the_helpers(tmp_path):
    began = time.monotonic()

    with pytest.raises(RuntimeError, match='mine'):
        with helpers(1, 'time:sleep', 300):
            raise RuntimeError('mine')

    assert time.monotonic() - began < 100


@pytest.mark.parametrize(
    'threads, most, expected', [(1, 3, 0), (2, 3, 1), (8, 3, 2), (8, 0, 0)]
)
def test_there_are_no_more_workers_than_threads_or_jobs(
    monkeypatch, threads, most, expected
):
    monkeypatch.setattr('torch.get_num_threads', lambda: threads)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)

    assert spare_workers(most) == expected


def test_threads_are_shared_with_workers_that_have_not_begun(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr('torch.get_num_threads', lambda: 6)
    monkeypatch.setattr('torch.set_num_threads', given.append)

    with share_of_cores(tmp_path, least=3) as share:
        share()

    assert given == [2, 6]  # and all of them again at the end


def test_a_helper_left_alone_takes_no_further_job(monkeypatch):
    parents = iter([7, 7, 7, 1])
    monkeypatch.setattr('os.getppid', lambda: next(parents))

    assert list(while_parent_lives(iter('abcd'))) == ['a', 'b']
