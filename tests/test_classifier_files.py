"A trained classifier as two files, and what it says of other images."

import csv
import io
import json

import numpy as np
import pytest
from garden import photo

from diffii.base.files import UserError
from diffii.base.images import ImageSet, loose_images
from diffii.base.settings import ClassifierSettings
from diffii.evaluation.classifier_files import (
    NOTES,
    WEIGHTS,
    load_classifier,
    prediction_text,
    predictions,
    save_classifier,
)
from diffii.method.classifier import evaluate, train_classifier

CLASSES = ('a, "b"', '../up')


@pytest.fixture(scope='module')
def images():
    pictures = tuple(photo(i) for i in range(6))
    return ImageSet(pictures, (0, 0, 0, 1, 1, 1), CLASSES)


def trained(images, arch='small', size=16):
    settings = ClassifierSettings(arch=arch, size=size, steps=2, batch_size=4)
    return train_classifier(images, settings=settings, progress=False)


@pytest.fixture(scope='module')
def small(images):
    return trained(images)


@pytest.fixture()
def folder(small, tmp_path):
    save_classifier(small, tmp_path / 'classifier')
    return tmp_path / 'classifier'


@pytest.mark.parametrize(
    'arch, size',
    [
        ('timm/resnet10t', 32),
        ('torchvision/squeezenet1_1', 64),
        ('efficientnet_lite0-imagenet', 32),
    ],
)
def test_any_network_is_the_same_when_read_again(arch, size, images, tmp_path):
    result = trained(images, arch, size)
    save_classifier(result, tmp_path)
    again = load_classifier(tmp_path, 'cpu')
    wanted = evaluate(result, images).probabilities
    np.testing.assert_allclose(again.probabilities(images), wanted, atol=1e-6)


def test_no_file_of_it_is_a_pickle(folder):
    assert sorted(p.name for p in folder.iterdir()) == [NOTES, WEIGHTS]
    json.loads((folder / NOTES).read_text())
    assert b'PK' != (folder / WEIGHTS).read_bytes()[:2]


def test_the_folder_above_is_enough(folder, small):
    assert load_classifier(folder.parent).classes == CLASSES


def test_a_category_may_be_renamed_in_the_notes(folder):
    notes = json.loads((folder / NOTES).read_text())
    notes['classes'][1] = 'down'
    (folder / NOTES).write_text(json.dumps(notes))
    assert load_classifier(folder).classes == (CLASSES[0], 'down')


@pytest.mark.parametrize(
    'change, text',
    [
        (dict(format=2), 'format 2, where this version'),
        (dict(classes=['one']), 'does not fit small'),
        (dict(mean=[0.5]), 'mean, std or classes cannot be'),
        (dict(arch='timm/none'), 'neither timm nor torchvision'),
        (dict(size='16'), 'size'),
        (dict(size=10**9, resize=10**9), 'from 8 to 4096'),
        (dict(mean=[float('nan')] * 3), 'mean'),
        (dict(classes=['one', 'one']), 'named once'),
    ],
)
def test_notes_that_cannot_be_are_named(change, text, folder):
    notes = json.loads((folder / NOTES).read_text())
    (folder / NOTES).write_text(json.dumps({**notes, **change}))
    with pytest.raises(UserError, match=text) as e:
        load_classifier(folder)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', [NOTES, WEIGHTS])
def test_a_file_cut_short_is_named(name, folder):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=name):
        load_classifier(folder)


def test_predictions_survive_odd_names(folder, tmp_path):
    # given
    path = tmp_path / 'a, "quoted"\u2028œ.png'
    photo(3).convert('L').save(path)
    rows = predictions(load_classifier(folder), [path])

    # when, then
    table = list(csv.DictReader(io.StringIO(prediction_text(rows), newline='')))
    assert table[0]['file_name'] == str(path) and table[0]['class'] in CLASSES
    line = json.loads(prediction_text(rows, 'jsonl'))
    assert line == rows[0]
    assert 0.5 <= line['probability'] <= 1


def test_images_are_found_to_the_bottom_once(tmp_path):
    # given
    for name in ('x/y/1.png', 'x/2.PNG', 'x/.hidden/3.png', 'x/notes.txt'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        photo(0).save(tmp_path / name, 'PNG')

    # when
    found = loose_images([tmp_path, tmp_path / 'x' / '2.PNG'])

    # then
    names = [p.relative_to(tmp_path).as_posix() for p in found]
    assert names == ['x/2.PNG', 'x/y/1.png']


def test_what_is_no_image_is_told_or_left_out(tmp_path):
    photo(0).save(tmp_path / '1.png')
    (tmp_path / '2.png').write_text('no image')
    with pytest.raises(UserError, match='2.png'):
        loose_images([tmp_path])
    with pytest.warns(UserWarning, match='2.png'):
        assert len(loose_images([tmp_path], skip_bad=True)) == 1
    with pytest.raises(UserError, match='no such file'):
        loose_images([tmp_path / '3.png'])
