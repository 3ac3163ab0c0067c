"A search for settings on held-out parts of the training images."

import json
from dataclasses import replace

import numpy as np
import pytest
from garden import photo

from diffii.base.files import UserError, read_json
from diffii.base.images import ImageSet
from diffii.base.settings import Settings, TuneSettings, read_config
from diffii.evaluation import tuning
from diffii.evaluation.tuning import ORIGINAL, Choice, honest_gain, search, tune

VALUES = dict(
    method=('diff-ii', 'real-guidance'),
    split_ratio=(0.3, 0.0),
    noise_share=(0.0, 0.5),
    replacement=(0.5, 0.9),
)


def images(counts=(2, 2)):
    labels = tuple(k for k, n in enumerate(counts) for _ in range(n))
    pictures = tuple(photo(i) for i in range(len(labels)))
    names = tuple(f'{i}.png' for i in range(len(labels)))
    return ImageSet(pictures, labels, ('a', 'b'), 'plant', names)


def quick(out, **more):
    about = dict(out=str(out), folds=2, seeds=1, methods='real-guidance,diff-ii')
    about |= dict(split_ratios='0.3', noise_shares='0', replacements='0.5,0.9')
    return TuneSettings.of(
        tuning={**about, **more},
        concepts=dict(steps=1),
        sampling=dict(steps=2, expansion=1),
        classifier=dict(steps=2, size=16),
    )


def test_settings_that_a_method_lacks_are_not_searched():
    tried = search(VALUES, 99, lambda c: float(c.method == 'real-guidance'))
    best = [c for c in tried if c.method == 'real-guidance']
    assert {(c.split_ratio, c.noise_share) for c in best} == {(0.0, 0.0)}
    assert len(tried) == 3  # both methods, and the other replacement


def test_a_first_method_without_contexts_leaves_the_others_their_values():
    values = VALUES | dict(method=('diff-mix', 'diff-ii'), noise_share=(0.4, 0.0))

    tried = list(search(values, 99, lambda c: float(c.method == 'diff-ii')))

    assert tried[0] == Choice('diff-mix', 0.0, 0.0, 0.5)
    assert tried[1] == Choice('diff-ii', 0.3, 0.4, 0.5)


def test_the_best_value_of_each_setting_stays():
    best = Choice('diff-ii', 0.0, 0.5, 0.9)

    def accuracy(choice):
        pairs = zip(vars(choice).values(), vars(best).values())
        return sum(a == b for a, b in pairs)

    tried = search(VALUES, 99, accuracy)
    assert max(tried, key=tried.get) == best


@pytest.mark.parametrize('budget', [1, 2, 4])
def test_the_budget_is_kept(budget):
    assert len(search(VALUES, budget, lambda c: c.replacement)) == budget


def test_the_gain_of_choosing_is_measured_where_nothing_was_chosen():
    # given: two choices, each of which is better on one part by chance
    class Parts:
        images, n_folds, folds = range(4), 2, np.array([0, 0, 1, 1])

    first, second = Choice(**{k: v[0] for k, v in VALUES.items()}), None
    second = Choice('diff-ii', 0.3, 0.0, 0.9)
    right = {
        None: np.array([50.0] * 4),
        first: np.array([100.0, 100.0, 0.0, 0.0]),
        second: np.array([0.0, 0.0, 100.0, 100.0]),
    }

    # when, then: what won on the other part loses on this one
    assert honest_gain(Parts, right) == -50


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp('tune') / 'out'
    return out, tune(images(), quick(out), progress=False)


def test_a_search_tells_what_it_tried(finished):
    out, results = finished
    names = [line['name'] for line in results['tried']]
    assert names[0] == ORIGINAL and len(names) == 4
    assert results['winner'] in results['tried'][1:]
    assert json.loads((out / 'results.json').read_text()) == results


def test_the_choice_is_read_by_augment(finished):
    out, results = finished
    settings = Settings.of(**read_config(out / 'augment.yaml'))
    assert settings.sampling.method == results['winner']['method']
    assert settings.images.metaclass == 'plant'
    assert settings.concepts.steps == 1


def test_the_contexts_of_a_search_are_those_of_the_choice(tmp_path):
    suffixes = tmp_path / 'contexts.txt'
    suffixes.write_text('by night.\n')
    out = tmp_path / 'out'

    tune(images(), quick(out, budget=1, suffixes=str(suffixes)), progress=False)

    chosen = Settings.of(**read_config(out / 'augment.yaml'))
    assert chosen.contexts.suffixes == str(suffixes)


def test_a_finished_search_trains_nothing(finished, monkeypatch):
    out, results = finished
    monkeypatch.setattr(tuning, 'make_synthetic', None)
    assert tune(images(), quick(out), progress=False) == results


def test_other_images_are_refused_in_the_same_folder(finished):
    with pytest.raises(UserError, match='holds a run with other settings'):
        tune(images((3, 2)), quick(finished[0]), progress=False)


@pytest.mark.parametrize(
    'counts, text', [((1, 3), 'a: one image, which'), ((4, 0), 'b: ')]
)
def test_images_that_cannot_be_held_out_are_refused(counts, text, tmp_path):
    with pytest.raises(UserError, match=text):
        tune(images(counts), quick(tmp_path / 'out'), progress=False)
    assert not (tmp_path / 'out').exists()


def test_a_search_has_the_words_that_augment_will_have(tmp_path):
    words = 'green crowned', 'red crowned'
    described = replace(images(), words=words)
    given = quick(tmp_path / 'out', budget=1, methods='diff-ii')
    given.images.words = 'words.yaml'
    tune(described, given, progress=False)

    learned = list((tmp_path / 'out').rglob('concepts.json'))
    assert learned
    for file in learned:
        assert tuple(read_json(file)['words']) == words
    chosen = read_config(tmp_path / 'out' / 'augment.yaml', Settings)
    assert chosen['images']['words'] == 'words.yaml'
    with pytest.raises(UserError, match='words'):
        tune(images(), given, progress=False)
