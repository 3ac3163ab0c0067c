"Rows of the tables: contexts added, contexts from captions, categories drawn, names read."

from types import SimpleNamespace

import numpy as np
import pytest

from diffii.base.batches import Pixels
from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.settings import BenchmarkSettings, ConceptSettings, Settings
from diffii.base.settings import TrialSettings
from diffii.data.digits import digits_set
from diffii.data.sets import shipped_set
from diffii.evaluation.experiments import (
    Experiment,
    _scores,
    cell_settings,
    classifier_settings,
    learned_as,
    trial_suffixes,
)
from diffii.evaluation.tasks import conditions, configuration, configurations
from diffii.method.classifier import TrainingStream
from diffii.method.concepts import Concepts


@pytest.mark.parametrize(
    'name, sampling, classifier, images',
    [
        ('random-noise + suffix', 'random-noise-suffix', {}, ''),
        ('diff-aug + suffix', 'diff-aug-suffix', {}, ''),
        ('diff-ii + own', 'diff-ii', dict(category='own'), 'diff-ii'),
        (
            'diff-mix + inverse + cutmix',
            'diff-mix',
            dict(category='inverse', augment='cutmix'),
            'diff-mix',
        ),
    ],
)
def test_what_is_added_to_a_method(name, sampling, classifier, images):
    found = configuration(name)
    assert found.name == name
    assert found.sampling == dict(method=sampling)
    assert (found.classifier, found.images) == (classifier, images)


def test_a_row_may_have_settings_of_its_own():
    found = configuration('diff-ii + expansion=10 + inversions=2 + forward-steps=1')
    assert found.sampling == dict(method='diff-ii', expansion=10)
    assert found.inversion == dict(forward_steps=1, fixed_point_iters=0, per_image=2)
    assert found.images == ''  # its own


def test_a_suffix_leaves_the_settings_of_a_row_as_they_are():
    found = configuration('random-noise + expansion=10 + suffix')

    assert found.sampling == dict(method='random-noise-suffix', expansion=10)


def test_rows_that_differ_in_the_classifier_share_their_images():
    found = configuration('diffii + trivial-augment + replacement=0.7')
    expected = dict(augment='trivial', replacement_probability=0.7)
    assert found.classifier == expected
    assert (found.sampling, found.images) == ({}, 'diffii')
    assert configuration('original + label-smoothing=0').images == ''


@pytest.mark.parametrize(
    'name, reason',
    [
        ('diffii + colour=red', 'colour is no setting'),
        ('diffii + expansion=many', '--expansion many: give a whole number'),
        ('diffii + expansion=0', '--expansion 0'),
        ('original + expansion=2', 'makes no images'),
        ('diffii + suffixes=contexts.txt', 'is no setting of images'),
    ],
)
def test_a_setting_that_a_row_cannot_have_is_named(name, reason):
    with pytest.raises(UserError, match=reason):
        configuration(name)


@pytest.mark.parametrize(
    'name', ['original + suffix', 'CE + own', 'da-fusion + suffix']
)
def test_what_cannot_be_added_is_named(name):
    with pytest.raises(UserError, match='--method'):
        configuration(name)


def test_suffixes_of_a_method_without_two_stages_have_a_split_ratio():
    from diffii.base.settings import SamplingSettings

    for method, ratio in (('diff-aug', 0), ('diff-aug-suffix', 0.3)):
        assert SamplingSettings(method=method).split_ratio == ratio


def experiment(task, tmp_path, data):
    return Experiment(task, tmp_path, data, None, BenchmarkSettings.of(), {})


@pytest.mark.parametrize(
    'name, category',
    [('diff-ii', 'inverse'), ('real-gen', 'inverse'), ('diff-ii + own', 'own')],
)
def test_on_long_tails_every_generative_method_draws_rare_categories_more(
    tmp_path, name, category
):
    data = shipped_set('digits')
    [condition] = conditions(
        'long-tail', data, TrialSettings(imbalance=10, methods=name)
    )
    e = experiment('long-tail', tmp_path, data)

    found = classifier_settings(e, condition, condition.configurations[0])

    assert found.category == category


def test_what_has_no_option_may_stand_in_a_file_of_settings(tmp_path):
    data = shipped_set('digits')
    [condition] = conditions('few-shot', data, TrialSettings(methods='original'))
    e = experiment('few-shot', tmp_path, data)
    e.classifier = dict(flip=True, device='cpu')

    found = classifier_settings(e, condition, condition.configurations[0])

    assert (found.flip, found.device) == (True, 'cpu')


NOTES = dict(
    inversion=dict(forward_steps=2, fixed_point_iters=1),
    sampling=dict(guidance_scale=2.0, expansion=7, split_ratio=0.2, noise_share=0.5),
    classifier=dict(by_metaclass=dict(digit=dict(replacement_probability=0.7))),
)
NOTES['sampling']['few_step'] = 'own'


@pytest.mark.parametrize('task, split', [('few-shot', 0.1), ('long-tail', 1.0)])
def test_the_recipe_is_what_the_model_recommends_and_other_rows_are_the_papers(
    tmp_path, task, split
):
    data = shipped_set('digits')
    given = dict(shots=10) if task == 'few-shot' else dict(imbalance=10)
    asked = TrialSettings(methods='diffii,diff-ii,da-fusion', **given)
    [condition] = conditions(task, data, asked)
    e = experiment(task, tmp_path, data)
    e.pipe = SimpleNamespace(recommended=NOTES)

    recipe, paper, other = (
        cell_settings(e, condition, c, 0) for c in condition.configurations
    )

    no_flip = dict(images=dict(flip=data.flip))
    said_nothing = Settings.of(e.pipe, 'digit', **no_flip)
    assert recipe.sampling == said_nothing.sampling
    assert recipe.inversion == said_nothing.inversion
    assert paper.inversion == Settings.of(None, **no_flip).inversion
    assert (paper.sampling.split_ratio, paper.sampling.noise_share) == (split, 0)
    assert paper.sampling.expansion == other.sampling.expansion == 5
    assert {s.sampling.guidance_scale for s in (recipe, paper, other)} == {2.0}
    assert recipe.sampling.few_step == 'own'
    assert paper.sampling.few_step is other.sampling.few_step is None


def test_the_classifier_of_the_recipe_is_what_the_model_recommends(tmp_path):
    data = shipped_set('digits')
    names = 'diffii,diffii + replacement=0.4,diff-ii'
    [condition] = conditions('few-shot', data, TrialSettings(methods=names))
    e = experiment('few-shot', tmp_path, data)
    e.pipe = SimpleNamespace(recommended=NOTES)

    shares = [
        classifier_settings(e, condition, row).replacement_probability
        for row in condition.configurations
    ]
    e.classifier = dict(replacement_probability=0.1)
    given = classifier_settings(e, condition, condition.configurations[0])

    assert shares == [0.7, 0.4, 0.5]
    assert given.replacement_probability == 0.1


def test_a_category_of_n_images_is_drawn_with_a_weight_of_one_over_n_plus_one():
    images = few_shot(digits_set('pool'), 9, seed=0)[0]
    kept = [i for k in range(10) for i in images.of_class(k)[: 9 if k else 1]]
    tail = images.subset(kept)
    stream = TrainingStream(
        Pixels(tail, 32),
        Pixels(images, 32),
        1.0,
        seed=0,
        length=4000,
        category='inverse',
    )

    drawn = np.bincount([images.labels[stream.pick(j)[1]] for j in range(4000)])

    expected = np.array([1 / 2] + [1 / 10] * 9)
    assert drawn / 4000 == pytest.approx(expected / expected.sum(), abs=0.03)


def test_a_named_category_is_prompted_by_its_words():
    none = ConceptSettings(n_tokens=0, rank=0, steps=0)
    named = ('species_1200',), 'bird', none, 'model', [], {}

    assert '1200' in Concepts(*named).prompt(0)
    assert (
        Concepts(*named, words=('red crowned',)).prompt(0)
        == 'a photo of a red crowned bird'
    )


def test_birds_have_words_and_keep_them_in_a_sample():
    data = shipped_set('aviary', tuning=True)
    [condition] = conditions('few-shot', data, TrialSettings(methods='real-gen'))

    train, _ = condition.sample(0)

    assert len(train.words) == len(train.classes) == 12
    assert all('crowned' in words and 'billed' in words for words in train.words)


def test_the_accuracy_before_shifted_backgrounds_is_the_mean_of_the_groups():
    groups = dict(land_land=0.9, land_water=0.1)  # of however many images
    result = SimpleNamespace(accuracy=0.8, top5=None, per_class={}, per_group=groups)

    assert _scores('ood', result, None)['accuracy'] == pytest.approx(50)


def test_contexts_can_come_from_captions_of_the_training_images(tmp_path):
    data = shipped_set('digits')
    trials = TrialSettings(shots=3, methods='diff-ii + captions,diff-ii')
    [condition] = conditions('few-shot', data, trials)
    e, train = experiment('few-shot', tmp_path, data), condition.sample(0)[0]
    captions, usual = condition.configurations

    found = trial_suffixes(e, condition, captions, 0, train)

    assert trial_suffixes(e, condition, usual, 0, train) == data.suffixes
    assert 1 <= len(found) <= 10
    assert trial_suffixes(e, condition, captions, 0, train) == found
    assert (tmp_path / 'work' / '3-shot--0' / 'suffixes.json').is_file()


def test_words_stand_in_the_recipe_and_where_they_are_asked_for(tmp_path):
    data = shipped_set('aviary', tuning=True)
    rows = (
        'random-noise + suffix,random-noise + suffix + words,diff-ii,diffii,da-fusion'
    )
    [condition] = conditions('few-shot', data, TrialSettings(methods=rows))
    train, _ = condition.sample(0)
    e = experiment('few-shot', tmp_path, data)
    e.pipe = SimpleNamespace(recommended=NOTES)

    found = {}
    for row in condition.configurations:
        settings = cell_settings(e, condition, row, 0)
        found[row.name] = learned_as(train, settings)

    assert found['diff-ii'] == found['random-noise + suffix']
    # what else decides them stands behind a dash, as a number
    assert {name: kind.rpartition('-')[0] for name, kind in found.items()} == {
        'random-noise + suffix': 'tokens+lora',
        'random-noise + suffix + words': 'tokens+lora+words',
        'diff-ii': 'tokens+lora',
        'diffii': 'tokens+lora+words',
        'da-fusion': 'tokens',
    }


def test_a_setting_of_several_numbers_keeps_its_commas():
    methods = 'original,diff-ii + guided=0,0.6 + expansion=2,diffii + strengths=0.5,0.7'
    trials = TrialSettings(methods=methods)

    first, second, third = configurations('few-shot', trials)

    assert first.name == 'original'
    assert second.name == 'diff-ii + guided=0,0.6 + expansion=2'
    assert second.sampling['guided'] == (0.0, 0.6)
    assert third.sampling['strengths'] == (0.5, 0.7)
