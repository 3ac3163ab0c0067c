"The demo: its folder, its trials, its verdict and its report."

import json
import re
import shutil
import sys

import pytest
from PIL import Image
from small_models import checkpoint

from diffii.base.files import UserError
from diffii.base.records import write_record
from diffii.method.few_step import own_weights
from diffii.start.demo import (
    Demo,
    Job,
    demo,
    open_demo,
    over_trials,
    run_job,
    work_on,
    write_report,
)

RESULTS = dict(
    data='digits',
    shots=1,
    real=1,
    classes=['a'],
    metaclass='<b>bird',
    synthetic=1,
    model='tiny',
    seed=0,
    test=1,
    trials=1,
    verdict='undecided',
    lpips={},
    lpips_note='<i>none',
    accuracy={'<u>original': dict(mean=50.0, sd=0.0, trials=[50.0])},
    seconds={'concepts': 1.0},
    settings={'a<': 1},
)


def trials_of(before, after):
    "Accuracies by kind, for some trials."
    pairs = zip(before, after)
    return [{'original': a, 'original + synthetic': b} for a, b in pairs]


# ---- the verdict


@pytest.mark.parametrize(
    'after, ending',
    [
        ([82.0, 83.2, 84.1], 'higher in 3 of 3 trials): better.'),
        ([79.0, 82.0, 82.0], 'higher in 1 of 3 trials): undecided.'),
        ([79.0, 82.0, 83.0], 'higher in 2 of 3 trials): undecided.'),
        ([70.0, 71.0, 72.1], 'higher in 0 of 3 trials): worse.'),
    ],
)
def test_the_verdict_follows_from_the_interval_of_the_difference(after, ending):
    found = over_trials(trials_of([80.0, 81.0, 82.0], after))
    assert found['verdict'].endswith(ending)


def test_one_trial_has_no_spread_and_no_verdict():
    found = over_trials(trials_of([80.0], [84.0]))
    assert found['verdict'].endswith('20% of the error in one trial.')
    assert found['accuracy']['original']['sd'] is None


def test_accuracies_are_kept_for_each_trial():
    found = over_trials(trials_of([80.0, 82.0], [84.0, 83.0]))['accuracy']
    assert found['original']['mean'] == 81.0
    assert found['original + synthetic']['trials'] == [84.0, 83.0]


# ---- the report


def test_names_in_the_report_are_escaped(tmp_path):
    picture = ('<h1>title', Image.new('RGB', (4, 4)), '<c>')
    write_report(tmp_path / 'report.html', RESULTS, [picture])
    html = (tmp_path / 'report.html').read_text()
    for text in ('<b>bird', '<u>original', '<i>none', 'a<<', '<c>', '<h1>title'):
        assert text not in html
    assert '&lt;b&gt;bird' in html


# ---- the demo


@pytest.mark.parametrize(
    'wrong, named',
    [
        (dict(data='cifar'), '--data cifar'),
        (dict(shots=500), '--shots 500'),
        (dict(trials=0), '--trials 0'),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, wrong, named):
    with pytest.raises(UserError, match=named):
        demo(tmp_path / 'out', quick=True, **wrong)
    assert not (tmp_path / 'out').exists()


def test_few_step_weights_of_another_model_are_refused_first(tmp_path):
    model = shutil.copytree(checkpoint('sd1'), tmp_path / 'model')
    shutil.copy(own_weights('tiny'), own_weights(str(model)))

    with pytest.raises(UserError, match='--few-step own: .*another model'):
        demo(tmp_path / 'out', model=str(model))

    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'model, asked, used',
    [('tiny', True, 'own'), ('tiny', False, None), ('sd1', True, None)],
)
def test_few_step_weights_are_taken_where_there_are_any(model, asked, used, tmp_path):
    model = model if model == 'tiny' else str(checkpoint(model))
    about = dict(data='digits', shots=2, quick=True, seed=0, model=model)

    opened = open_demo(tmp_path, about | dict(few_step=asked), 1, None)

    assert opened.settings(0).sampling.few_step == used


def test_a_folder_of_other_files_is_left_alone(tmp_path):
    (tmp_path / 'x.txt').touch()
    with pytest.raises(UserError, match='x.txt'):
        demo(tmp_path, quick=True)


@pytest.fixture(scope='module')
def finished(run, tmp_path_factory):
    "The command in its short form, with two trials: its folder and what it printed."
    out = tmp_path_factory.mktemp('demo') / 'out'
    short = ('demo', '--quick', '--shots', 2, '--trials', 2, '--out', out)
    return out, run(sys.executable, '-m', 'diffii', *short, timeout=900)


def test_a_demo_of_other_recommendations_is_not_gone_on_with(finished, monkeypatch):
    "Its images would be of two kinds."
    advice = dict(sampling=dict(expansion=20))
    monkeypatch.setattr('diffii.start.demo.recommendations', lambda *about: advice)

    with pytest.raises(UserError, match='holds a run with other settings'):
        demo(finished[0], quick=True, shots=2, trials=2)


@pytest.fixture
def results(finished):
    return json.loads((finished[0] / 'results.json').read_text())


def test_the_folder_holds_results_report_and_images(finished, results):
    out, _ = finished
    names = ['.demo', '.demo.json', 'report.html', 'results.json']
    names += ['synthetic-0', 'synthetic-1']
    assert sorted(p.name for p in out.iterdir()) == names
    assert (results['real'], results['synthetic']) == (20, 40)
    assert len(list((out / 'synthetic-1').glob('train/*/*.png'))) == 40
    assert (out / 'synthetic-1' / 'review.html').is_file()


def test_every_trial_samples_its_own_real_images(finished, results):
    def sources(trial):
        lines = (finished[0] / f'synthetic-{trial}' / 'metadata.jsonl').read_text()
        rows = [json.loads(line) for line in lines.splitlines()]
        return {name.split('@')[0] for row in rows for name in row['sources']}

    assert sources(0) != sources(1)
    trials = {name: len(a['trials']) for name, a in results['accuracy'].items()}
    assert trials == {'original': 2, 'original + synthetic': 2}


def test_the_command_prints_what_came_out(finished, results):
    _, done = finished
    assert f'{results["accuracy"]["original"]["mean"]:.1f} %' in done.stdout
    assert results['verdict'] in done.stdout
    assert 'concepts' in done.stderr


def test_the_report_opens_in_a_browser_and_fetches_nothing(finished, open_page):
    page = finished[0] / 'report.html'
    messages, pictures, broken = open_page(page)
    assert not messages
    assert (pictures, broken) == (3, 0)
    named = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page.read_text())
    assert all(link.startswith('data:') for link in named)
    assert 'url(' not in re.sub(r'base64,[^"]*', '', page.read_text())


def test_a_finished_demo_trains_nothing_again(finished, results, monkeypatch):
    monkeypatch.setattr('diffii.start.demo.run_job', None)  # would be called

    again = demo(finished[0], quick=True, shots=2, trials=2)

    for name in ('accuracy', 'lpips', 'inversions', 'verdict'):
        assert again[name] == results[name]


def test_an_image_that_was_lost_is_made_again(finished, results):
    out, _ = finished
    lost = sorted((out / 'synthetic-1').glob('train/*/*.png'))[3]
    before = lost.read_bytes()
    lost.unlink()

    again = demo(out, quick=True, shots=2, trials=2)

    assert lost.read_bytes() == before
    assert again['accuracy'] == results['accuracy']


# ---- its jobs


@pytest.fixture
def begun(tmp_path, monkeypatch):
    "A demo of two trials whose jobs only leave their record, and the jobs done."
    done = []

    def note(demo, job):
        done.append(job)
        write_record(demo.record(job), {})

    monkeypatch.setattr('diffii.start.demo._do', note)
    about = dict(quick=False, seed=0)
    return Demo(tmp_path, about, 2, None, None, None, None), done


def test_images_come_before_classifiers_that_see_them_and_others_last(begun):
    demo, done = begun

    list(work_on(demo))

    kinds = [(job.kind.split()[-1], job.trial) for job in done]
    own = [('images', 0), ('synthetic', 0), ('synthetic', 0)]
    assert kinds[:3] == own
    assert kinds[6:] == [('original', 0)] * 2 + [('original', 1)] * 2
    assert len(set(done)) == len(done) == 10


def test_a_classifier_makes_the_images_that_a_lost_worker_did_not(begun):
    demo, done = begun
    job = Job('original + synthetic', 1, 1)

    run_job(demo, job)
    run_job(demo, Job('original + synthetic', 1, 0))

    assert done[:2] == [Job('images', 1), job]
    assert len(done) == 3


def test_two_workers_do_every_job_once(begun):
    demo, done = begun
    one, other = work_on(demo), work_on(demo)

    for turn in (one, other) * 6:
        next(turn, None)

    assert sorted(job.name for job in done) == sorted(j.name for j in demo.jobs())
    assert [job.trial for job in done[:4]] == [0, 1, 0, 1]


def test_birds_whose_words_call_them_have_no_settings_of_learning(tmp_path):
    found = demo(tmp_path / 'out', data='aviary', shots=2, quick=True)

    assert not [name for name in found['settings'] if name.startswith('concepts')]
    assert found['settings']['sampling: few_step'] == 'own'
