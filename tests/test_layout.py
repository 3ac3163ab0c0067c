"Where the images of a set lie: readers take them as they are, former folders follow."

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from garden import a_record, a_row
from PIL import Image

from diffii.base.files import UserError, read_json, write_json
from diffii.base.records import write_record
from diffii.run.cards import write_card
from diffii.run.folders import (
    BEFORE,
    FORMAT,
    RECORD,
    RunFolder,
    claim,
    read_rows,
    write_rows,
)

CLASSES = ('oak', 'ash', 'train')  # one has the name of the folder of all images


def picture(number):
    "A small image of one colour."
    return Image.fromarray(np.full((4, 4, 3), number, 'uint8'))


# ---- folders of the format before


@pytest.fixture
def before(tmp_path):
    "A folder of format 2: categories beside the metadata, one image dropped."
    folder = RunFolder(tmp_path / 'before')
    rows = [
        a_row(f'{name}/{i:05d}.png', label=name) for name in CLASSES for i in range(3)
    ]
    for number, row in enumerate(rows[:-1]):
        path = folder.path / row['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    write_rows(folder.plan, rows)
    write_rows(folder.redrawn / '0.jsonl', [{**rows[1], 'attempt': 1}])
    write_rows(folder.metadata, rows[:-1])
    write_json(folder.dropped, [rows[-1]['file_name']])
    head = dict(format=BEFORE, diffii='0.2.0')
    write_json(folder.record, head | a_record())
    return folder


def assert_brought_up(folder):
    "Images and lists are where they belong, and nothing is left of the old places."
    rows = list(folder.final_rows())
    assert len(rows) == 8
    assert sum(row['attempt'] for row in rows) == 1
    for number, row in enumerate(rows):
        assert row['file_name'].startswith(f'train/{row["label"]}/')
        assert Image.open(folder.file(row)).getpixel((0, 0))[0] == number
    names = [row['file_name'] for row in rows]
    assert [row['file_name'] for row in read_rows(folder.metadata)] == names
    assert folder.dropped_names() == {'train/train/00002.png'}
    assert read_json(folder.record)['format'] == FORMAT
    shown = {p.name for p in folder.path.iterdir()}
    assert shown == {'.diffii', 'metadata.jsonl', 'train'}


def test_a_folder_of_the_format_before_is_brought_up_when_it_is_read(before):
    assert before.about()['seed'] == 0
    assert_brought_up(before)


def test_a_run_in_a_folder_of_the_format_before_goes_on(before):
    claim(before.path, a_record(), '.diffii/run.json')
    assert_brought_up(before)


def test_another_run_does_not_take_a_folder_of_the_format_before(before):
    with pytest.raises(UserError, match='seed: 0 then, 1 now'):
        claim(before.path, a_record(seed=1), '.diffii/run.json')


STEPS = ('mkdir', 'replace', 'rmdir')  # what moves images, and puts lists in place


@pytest.mark.parametrize('moment', range(1, 24))
def test_whoever_is_stopped_finishes_at_the_next_reading(before, monkeypatch, moment):
    "Stopped at the n-th call that changes a folder, whichever it is."
    calls = iter(range(1, 1000))

    def stopping(function):
        def call(*args, **kwargs):
            if next(calls) == moment:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(Path, name, stopping(getattr(Path, name)))
        patch.setattr(os, 'replace', stopping(os.replace))
        try:
            before.about()
        except KeyboardInterrupt:
            pass

    before.about()
    assert_brought_up(before)


def test_a_folder_in_use_is_not_moved(before, monkeypatch):
    monkeypatch.setattr('diffii.run.folders.PATIENCE', 0)
    with FileLock(before.state / 'lock'):
        with pytest.raises(UserError, match='an earlier version is writing there'):
            before.about()
    assert (before.path / 'oak' / '00000.png').is_file()


def test_a_record_of_something_else_gets_the_new_number_alone(tmp_path):
    write_json(tmp_path / 'experiment.json', dict(format=BEFORE, task='few-shot'))
    claim(tmp_path, dict(task='few-shot'), 'experiment.json')
    assert read_json(tmp_path / 'experiment.json')['format'] == FORMAT


def test_a_folder_of_version_0_1_is_refused(tmp_path):
    write_json(tmp_path / '.diffii' / 'run.json', dict(seed=0))
    with pytest.raises(UserError, match='a run of diffii 0.1.0.*; give another folder'):
        RunFolder(tmp_path).about()


# ---- readers of a finished set

TREES = ('Zelkova', 'ash', 'c10', 'c2')  # as text, and as people would not sort them


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A folder as a run leaves it: three images of each of four categories."
    folder = RunFolder(tmp_path_factory.mktemp('layout') / 'trees')
    about = a_record(classes=TREES, sampling=dict(method='diff-ii'))
    claim(folder.path, about, RECORD)
    rows = [
        a_row(f'train/{name}/{i:05d}.png', label=name)
        for i in range(3)
        for name in TREES
    ]
    for number, row in enumerate(rows):
        row['strength'] = number / 20
        folder.file(row).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder.file(row))
    write_rows(folder.metadata, rows)
    folder.pool.mkdir(parents=True)
    picture(0).save(folder.state / 'no image of the set.png')
    write_card(folder)
    return folder


def by_torchvision(folder, tmp_path):
    from torchvision.datasets import ImageFolder

    found = ImageFolder(folder.images)
    return found.classes, [(number_of(image), k) for image, k in found]


def by_fastai(folder, tmp_path):
    from fastai.vision.all import ImageDataLoaders

    found = ImageDataLoaders.from_folder(folder.path, valid_pct=0, num_workers=0)
    items = found.train_ds
    return list(found.vocab), [(number_of(image), int(k)) for image, k in items]


def by_timm(folder, tmp_path):
    from timm.data import create_dataset

    order = {name: k for k, name in enumerate(TREES)}
    found = create_dataset('', root=folder.path, split='train', class_map=order)
    return list(found.reader.class_to_idx), [(number_of(im), k) for im, k in found]


def by_imagefolder(folder, tmp_path):
    return by_datasets('imagefolder', tmp_path, data_dir=str(folder.path))


def by_its_card(folder, tmp_path):
    return by_datasets(str(folder.path), tmp_path)


def by_datasets(place, cache, **options):
    import datasets

    datasets.disable_progress_bars()
    found = datasets.load_dataset(place, cache_dir=str(cache), **options)
    assert list(found) == ['train']
    items = [(number_of(row['image']), row['label']) for row in found['train']]
    return found['train'].features['label'].names, items


def number_of(image):
    "The number that `picture` was given."
    return np.asarray(image)[0, 0, 0]


READERS = (by_torchvision, by_fastai, by_timm, by_imagefolder, by_its_card)


@pytest.mark.parametrize('read', READERS)
def test_every_reader_finds_the_same_images_labels_and_classes(
    read, finished, tmp_path
):
    classes, items = read(finished, tmp_path)
    assert list(classes) == list(TREES)
    assert sorted(items) == [(number, number % 4) for number in range(12)]


def test_the_card_gives_datasets_the_columns_of_the_metadata(finished, tmp_path):
    import datasets

    place = str(finished.path)
    found = datasets.load_dataset(place, cache_dir=str(tmp_path))['train']
    assert found['strength'][5] == 0.25
    assert found['sources'][5] == ['a', 'b']
    assert found['micro_batch'][5] is None


def test_the_order_of_the_set_is_kept_where_it_is_another(finished, tmp_path):
    copy = RunFolder(tmp_path / 'copy')
    shutil.copytree(finished.path, copy.path)
    write_record(copy.record, {**copy.about(), 'classes': TREES[::-1]})
    write_card(copy)
    classes, items = by_its_card(copy, tmp_path / 'cache')
    assert list(classes) == list(TREES[::-1])
    assert sorted(items) == [(number, 3 - number % 4) for number in range(12)]
