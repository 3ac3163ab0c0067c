"Classifiers with and without synthetic images: what is compared, refused, kept."

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from garden import photo
from matplotlib.figure import Figure

from diffii.base.files import UserError
from diffii.base.images import ImageSet, image_folder
from diffii.base.pages import figure_data
from diffii.base.pipeline import load_pipeline
from diffii.base.records import write_record
from diffii.base.settings import Settings, TrainSettings
from diffii.evaluation import training
from diffii.evaluation.classifier_files import load_classifier
from diffii.evaluation.statistics import verdict_of
from diffii.evaluation.training import (
    KINDS,
    TrainingComparison,
    check_comparison,
    compare_training,
    crossed_interval,
    fold_interval,
    fold_numbers,
    recommended_with,
    suited_classifier,
    without_sources,
)
from diffii.run.folders import RunFolder
from diffii.run.runs import load_synthetic, synthesize

CLASSES = ('<b>bold</b>', 'œillet (red:1.2)')
COUNTS = (3, 4)


def plant(folder, counts=COUNTS, seed=0, mode='RGB'):
    "Images of two categories with odd names in a folder."
    for k, (name, count) in enumerate(zip(('a', 'b'), counts)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            image = photo(seed + 10 * k + i).convert(mode)
            image.save(folder / name / f'{i}.png')
    found = image_folder(folder, 'plant')
    return ImageSet(found.images, found.labels, CLASSES, 'plant', found.names)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return plant(tmp_path_factory.mktemp('real') / 'images')


@pytest.fixture(scope='module')
def unseen(tmp_path_factory):
    return plant(tmp_path_factory.mktemp('test') / 'images', (5, 5), seed=100)


@pytest.fixture(scope='module')
def synthetic(images, tmp_path_factory):
    pipe = load_pipeline('tiny')
    quick = dict(concepts=dict(steps=1), sampling=dict(steps=2, expansion=2))
    settings = Settings.of(pipe, 'plant', **quick)
    out = tmp_path_factory.mktemp('synthetic') / 'out'
    return synthesize(pipe, images, out, settings, ['by night.'])


def settings_for(out, seeds=2, folds=2, **classifier):
    about = dict(out=str(out), seeds=seeds, folds=folds)
    classifier = dict(steps=4, size=16, arch='small') | classifier
    return TrainSettings.of(comparison=about, classifier=classifier)


@pytest.fixture
def advising(synthetic, tmp_path):
    "The synthetic images in a folder in which the model recommends something."

    def with_advice(advice):
        shutil.copytree(synthetic.folder, tmp_path / 'advising')
        found = load_synthetic(tmp_path / 'advising')
        write_record(RunFolder(found.folder).advice, advice)
        return found

    return with_advice


def test_what_the_images_model_recommends_comes_before_the_default(
    images, advising, unseen, tmp_path
):
    advice = dict(replacement_probability=0.7, batch_size=3)
    synthetic, out = advising(dict(classifier=advice)), tmp_path / 'out'

    results = compare_training(
        images, synthetic, unseen, settings_for(out, seeds=1, batch_size=2)
    )

    record = json.loads((out / 'comparison.json').read_text())
    assert record['classifier']['replacement_probability'] == 0.7
    assert record['classifier']['batch_size'] == 2
    said = '--replacement 0.7: as the model recommends with these images'
    assert said in results['notes']


def test_a_run_keeps_what_its_model_recommends_with_its_images(images, tmp_path):
    "So `train` knows it where the model is not at hand."
    advice = dict(replacement_probability=0.7)
    notes = dict(classifier=dict(by_metaclass=dict(plant=advice)))
    pipe = replace(load_pipeline('tiny'), recommended=notes)
    quick = dict(concepts=dict(steps=1), sampling=dict(steps=2, expansion=1))
    settings = Settings.of(pipe, 'plant', **quick)

    found = synthesize(pipe, images, tmp_path / 'out', settings, ['by night.'])

    assert recommended_with(found) == advice


def test_images_of_an_older_version_recommend_nothing(advising):
    synthetic = advising(dict(classifier={}))
    RunFolder(synthetic.folder).advice.unlink()

    assert recommended_with(synthetic) == {}


@pytest.mark.parametrize(
    'advice, said',
    [
        (dict(classifier=[0.7]), 'classifier should be'),
        (dict(classifier=dict(replacement_probability='often')), 'often'),
        (dict(classifier=dict(colour=1)), 'colour: no such setting'),
    ],
)
def test_advice_that_no_classifier_can_have_is_told(advising, advice, said):
    with pytest.raises(UserError, match=said) as e:
        recommended_with(advising(advice))

    assert 'advice.json' in str(e.value) and 'delete it' in str(e.value)


def comparison(images, synthetic, test, out='unused'):
    about = settings_for(out)
    return TrainingComparison(images, synthetic, test, about.comparison, None)


def test_every_part_has_images_of_a_category_that_has_two(images):
    labels = np.array([0] * 2 + [1] * 9)
    two = images.subset([0] * 2 + [3] * 9)
    for seed in range(5):
        parts = fold_numbers(two, 5, seed)
        for part in range(5):
            assert set(labels[parts != part]) == {0, 1}


def test_a_held_out_image_takes_its_synthetic_images_with_it(images, synthetic):
    left = without_sources(synthetic, {'a/0.png'})
    assert 0 < len(left) < len(synthetic)
    assert not any('a/0.png' in str(row['sources']) for row in left.rows)
    gone = set(synthetic.names) - set(left.names)
    rows = {row['file_name']: row for row in synthetic.rows}
    assert all('a/0.png' in str(rows[name]['sources']) for name in gone)


def test_equal_differences_of_a_few_images_are_no_certainty():
    folds = np.tile([0, 1, 0, 1], (3, 1))
    found = (
        crossed_interval(np.full((3, 5), 2.0)),
        fold_interval(np.full((3, 4), 2.0), folds),
    )

    for mean, half in found:
        assert mean == 2.0 and np.isnan(half)
        assert verdict_of(mean, half) == 'undecided'


def test_one_seed_on_a_test_set_has_no_interval():
    mean, half = crossed_interval(np.array([[0.0, 1.0]]))
    assert (mean, np.isnan(half)) == (0.5, True)


def test_the_interval_of_folds_is_that_of_nadeau_and_bengio():
    from scipy import stats

    values = np.array([[0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    folds = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    means = [0.5, 1.0, 0.5, 0.0]
    half = stats.t.ppf(0.975, 3) * np.sqrt((1 / 4 + 1) * np.var(means, ddof=1))
    assert fold_interval(values, folds) == pytest.approx((0.5, half))


def test_with_a_test_set_one_image_of_a_category_is_enough(images, synthetic, unseen):
    check_comparison(comparison(images.subset([0, 3, 4]), synthetic, unseen))


CASES = {
    'one image': (lambda i, s, u: (i.subset([0, 3, 4]), s, None), 'one image, which'),
    'a test image among the training images': (
        lambda i, s, u: (i, s, u + i.subset([0])),
        'a/0.png is also the training image a/0.png',
    ),
    'an image that the synthetic ones were made from as a test image': (
        lambda i, s, u: (i.subset([1, 2, 3, 4]), s, u + i.subset([0])),
        'a/0.png is also the training image a/0.png',
    ),
    'images that are missing': (
        lambda i, s, u: (i.subset([0, 1, 3, 4]), s, None),
        'which IMAGES does not have',
    ),
    'other images of the same names': (
        lambda i, s, u: (
            ImageSet(u.images, u.labels, CLASSES, 'plant', u.names),
            s,
            None,
        ),
        'which IMAGES has in another form',
    ),
    'no synthetic image': (lambda i, s, u: (i, s.subset([]), None), 'no images; make'),
    'other categories': (
        lambda i, s, u: (ImageSet(i.images, i.labels, ('x', 'y')), s, None),
        'its categories differ from those of IMAGES',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_what_cannot_be_compared_is_refused(case, images, synthetic, unseen, tmp_path):
    make, text = CASES[case]
    real, made, test = make(images, synthetic, unseen)
    out = tmp_path / 'out'
    with pytest.raises(UserError, match=text):
        compare_training(real, made, test, settings_for(out))
    assert not out.exists()


def test_cross_validation_predicts_every_image_once_a_seed(images, synthetic, tmp_path):
    settings = settings_for(tmp_path / 'out')
    results = compare_training(images, synthetic, None, settings)
    for kind in KINDS:
        counts = np.array(results['confusion'][kind]).sum(1)
        assert counts.tolist() == [2 * n for n in COUNTS]
        assert len(results['accuracy'][kind]['seeds']) == 2
    assert 'the concepts were learned from all images' in results['notes'][-1]
    assert json.loads((tmp_path / 'out' / 'results.json').read_text()) == results


def test_the_classifier_of_the_first_seed_is_kept(images, synthetic, unseen, tmp_path):
    results = compare_training(
        images, synthetic, unseen, settings_for(tmp_path / 'out')
    )
    kept = load_classifier(tmp_path / 'out')
    assert kept.classes == CLASSES
    assert kept.notes['trained']['kind'] == results['kept']
    right = kept.probabilities(unseen).argmax(1) == np.array(unseen.labels)
    first = results['accuracy'][results['kept']]['seeds'][0]
    assert 100 * right.mean() == pytest.approx(first)


def test_the_same_call_goes_on_where_it_was_stopped(
    images, synthetic, unseen, tmp_path, monkeypatch
):
    # given: a comparison that stops in the third of four trainings
    settings, done = settings_for(tmp_path / 'out'), []
    train_one = training.train_one

    def stopping(c, *job):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job[:3])
        return train_one(c, *job)

    monkeypatch.setattr(training, 'train_one', stopping)
    with pytest.raises(KeyboardInterrupt):
        compare_training(images, synthetic, unseen, settings)

    # when: it goes on
    again = []

    def counting(c, *job):
        again.append(job[:3])
        return train_one(c, *job)

    monkeypatch.setattr(training, 'train_one', counting)
    results = compare_training(images, synthetic, unseen, settings)

    # then: only the others are trained, and all is as without the stop
    assert len(again) == 2 and not set(again) & set(done)
    whole = compare_training(
        images, synthetic, unseen, settings_for(tmp_path / 'whole')
    )
    assert results == whole


def test_more_seeds_add_to_what_is_there(
    images, synthetic, unseen, tmp_path, monkeypatch
):
    settings = settings_for(tmp_path / 'out', seeds=1)
    one = compare_training(images, synthetic, unseen, settings)
    assert one['gain']['verdict'] == 'undecided' and one['gain']['interval'] is None
    two = compare_training(images, synthetic, unseen, settings_for(tmp_path / 'out'))
    for kind in KINDS:
        assert two['accuracy'][kind]['seeds'][:1] == one['accuracy'][kind]['seeds']


def test_other_settings_are_refused_in_the_same_folder(
    images, synthetic, unseen, tmp_path
):
    compare_training(images, synthetic, unseen, settings_for(tmp_path / 'out', seeds=1))
    other = settings_for(tmp_path / 'out', seeds=1, replacement_probability=0.9)
    with pytest.raises(UserError, match='replacement_probability: 0.5 then, 0.9 now'):
        compare_training(images, synthetic, unseen, other)


def test_a_broken_cell_is_named(images, synthetic, unseen, tmp_path):
    settings = settings_for(tmp_path / 'out', seeds=1)
    compare_training(images, synthetic, unseen, settings)
    cell = tmp_path / 'out' / 'cells' / 'original--0--0.json'
    cell.write_text(cell.read_text().replace('[', '[1, ', 1))
    with pytest.raises(UserError, match='original--0--0.json: '):
        compare_training(images, synthetic, unseen, settings)


def test_gray_images_and_those_turned_by_exif_are_trained_on(tmp_path, synthetic):
    gray = plant(tmp_path / 'gray', mode='L')
    turned = photo(5)
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    turned.save(tmp_path / 'gray' / 'a' / '0.png', exif=exif)
    test = plant(tmp_path / 'test', (2, 2), seed=50, mode='L')
    settings = settings_for(tmp_path / 'out', seeds=1)
    results = compare_training(gray, synthetic, test, settings)
    assert results['counts']['real'] == 7


@pytest.mark.parametrize(
    'given, expected',
    [
        ({}, ('small', 30, False)),
        (dict(size=16), ('small', 16, False)),
        (dict(arch='timm/resnet10t', pretrained=False), ('timm/resnet10t', 224, False)),
    ],
)
def test_small_images_have_the_small_network(images, given, expected):
    found, line = suited_classifier(images, given)
    assert (found.arch, found.size, found.pretrained) == expected
    assert not line


def test_letters_that_the_font_lacks_are_no_matter_for_a_warning():
    figure = Figure()
    figure.suptitle('roof 🏯')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert figure_data(figure).startswith('data:image/png;base64,')


def test_weights_that_cannot_be_had_are_one_line(images):
    found, line = suited_classifier(images, dict(arch='timm/resnet10t', size=32))
    assert not found.pretrained
    assert line.startswith('timm/resnet10t: no published weights')
    assert line.endswith('it trains from scratch') and '\n' not in line


def test_weights_that_are_asked_for_must_be_there(images):
    with pytest.raises(UserError, match='pretrained weights cannot be loaded'):
        suited_classifier(images, dict(arch='timm/resnet10t', pretrained=True))


def test_another_network_does_not_ask_for_the_weights_of_the_one_before(images):
    before = dict(arch='timm/resnet10t', pretrained=True)
    found, _ = suited_classifier(images, dict(arch='small'), before)
    assert not found.pretrained


def test_an_unknown_network_is_refused(images):
    with pytest.raises(UserError, match='neither timm nor torchvision'):
        suited_classifier(images, dict(arch='timm/resnet5000'))
