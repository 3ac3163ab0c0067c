"Where the images of a set lie: readers take them as they are, former folders follow."

import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from diffii.base.files import UserError, read_json, write_json
from diffii.run.folders import BEFORE, FORMAT, RunFolder, claim, read_rows, write_rows

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
        dict(file_name=f'{name}/{i:05d}.png', label=name, attempt=0)
        for name in CLASSES
        for i in range(3)
    ]
    for number, row in enumerate(rows[:-1]):
        path = folder.path / row['file_name']
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    write_rows(folder.plan, rows)
    write_rows(folder.redrawn / '0.jsonl', [{**rows[1], 'attempt': 1}])
    write_rows(folder.metadata, rows[:-1])
    write_json(folder.dropped, [rows[-1]['file_name']])
    write_json(folder.record, dict(format=BEFORE, diffii='0.2.0', seed=0))
    return folder


def assert_brought_up(folder):
    "Images and lists are where they belong, and nothing is left of the old places."
    rows = folder.final_rows()
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
    claim(before.path, dict(seed=0), '.diffii/run.json')
    assert_brought_up(before)


def test_another_run_does_not_take_a_folder_of_the_format_before(before):
    with pytest.raises(UserError, match='seed: 0 then, 1 now'):
        claim(before.path, dict(seed=1), '.diffii/run.json')


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
    with pytest.raises(UserError, match='install diffii==0.1.0'):
        RunFolder(tmp_path).about()
