"Digests: what is noted of files, what is found damaged, and equal files for equal runs."

import json

import pytest
import torch
from garden import a_row
from PIL import Image
from safetensors.torch import save_file

from diffii.base.files import (
    DamagedFile,
    UserError,
    load_tensors,
    save_tensors,
    sort_notes,
)
from diffii.run.digests import UNKNOWN, Digests, read_notes
from diffii.run.folders import RunFolder


@pytest.fixture
def digests(tmp_path):
    return Digests(tmp_path / 'out')


def write(digests, name, held):
    "Write a file of text through its digests."
    with digests.writing(digests.path / name) as unfinished:
        unfinished.write_text(held)
    return digests.path / name


# ---- notes


def test_a_written_file_is_whole(digests):
    file = write(digests, 'train/oak/1.png', 'leaf')

    assert digests.damage(file) == ''
    assert Digests(digests.path).damage(file) == ''


@pytest.mark.parametrize(
    'held, verify, found',
    [
        ('lea', False, '3 bytes, not 4'),
        ('', True, '0 bytes, not 4'),
        ('loaf', False, ''),
        ('loaf', True, 'its sha256 is another'),
    ],
)
def test_sizes_are_compared_always_and_digests_when_asked(digests, held, verify, found):
    file = write(digests, 'a.txt', 'leaf')

    file.write_text(held)

    assert digests.damage(file, verify) == found


def test_a_file_that_nobody_noted_is_unknown(digests):
    file = write(digests, 'a.txt', 'leaf')

    file.with_name('b.txt').write_text('leaf')

    assert digests.damage(file.with_name('b.txt')) == UNKNOWN
    assert digests.damage(file.with_name('c.txt')) == 'missing'
    digests.check(file.with_name('b.txt'), 'make it again')


def test_a_file_that_something_is_built_on_must_be_whole(digests):
    file = write(digests, 'a.txt', 'leaf')
    file.write_text('loaf')

    with pytest.raises(UserError, match='damaged or changed .*; make it again'):
        digests.check(file, 'make it again')


def test_a_run_killed_between_note_and_file_leaves_the_old_file_whole(digests):
    file = write(digests, 'a.txt', 'leaf')

    with pytest.raises(KeyboardInterrupt), digests.writing(file) as unfinished:
        unfinished.write_text('tree')
        digests.note(file, unfinished)
        raise KeyboardInterrupt

    assert file.read_text() == 'leaf'
    assert Digests(digests.path).damage(file) == ''


def test_a_torn_line_is_as_if_it_were_not_there(digests):
    one = write(digests, 'a.txt', 'leaf')
    journal = digests.journals / '0.jsonl'
    journal.write_bytes(journal.read_bytes()[:-9])

    two = write(Digests(digests.path), 'b.txt', 'tree')

    again = Digests(digests.path)
    assert again.damage(one) == UNKNOWN
    assert again.damage(two) == ''


def test_notes_of_several_processes_come_into_one_sorted_list(digests):
    for name in ('b.txt', 'a.txt'):
        write(digests, name, name)
    (digests.journals / '0.jsonl').rename(digests.journals / '1.jsonl')
    write(Digests(digests.path), 'c.txt', 'c')

    digests.settle()

    notes = list(read_notes(digests.file))
    assert [note['file'] for note in notes] == ['a.txt', 'b.txt', 'c.txt']
    assert not digests.journals.exists()


def test_the_list_keeps_what_is_planned_and_forgets_what_is_gone(digests):
    for name in ('train/oak/1.png', 'a.txt', 'b.txt'):
        write(digests, name, name).unlink()
    write(digests, 'b.txt', 'now')

    digests.settle(['train/oak/1.png'])

    notes = {note['file']: note['size'] for note in read_notes(digests.file)}
    assert notes == {'b.txt': 3, 'train/oak/1.png': 15}


def test_no_note_goes_through_a_link(digests, tmp_path):
    (tmp_path / 'mine.txt').write_text('mine')
    digests.journals.mkdir(parents=True)
    (digests.journals / '0.jsonl').symlink_to(tmp_path / 'mine.txt')

    with pytest.raises(UserError, match='outside'):
        write(digests, 'a.txt', 'leaf')

    assert (tmp_path / 'mine.txt').read_text() == 'mine'


# ---- lists of a run


@pytest.fixture
def folder(tmp_path):
    "A folder with a plan and an image."
    folder = RunFolder(tmp_path / 'run')
    row = a_row('train/oak/0.png')
    folder.write_rows(folder.plan, [row])
    folder.write_redrawn(0, [row | dict(attempt=1)])
    folder.save_image(folder.file(row), Image.new('RGB', (4, 4)))
    return folder


def test_a_changed_plan_is_refused(folder):
    folder.check_lists()
    folder.plan.write_text(
        folder.plan.read_text().replace('"strength": 0.4', '"strength": 0.5')
    )

    with pytest.raises(UserError, match='plan.jsonl: was damaged or changed'):
        RunFolder(folder.path).check_lists()


def test_a_damaged_list_of_attempts_is_taken_away_with_a_warning(folder):
    (folder.redrawn / '0.jsonl').write_text('')

    with pytest.warns(UserWarning, match='its batch is made again'):
        folder.mend_lists()

    assert not folder.knows_redrawn(0)
    folder.write_redrawn(0, [])
    assert folder.knows_redrawn(0)


def test_a_batch_that_never_failed_has_no_list(folder):
    folder.write_redrawn(1, [])

    assert folder.knows_redrawn(1)
    assert not (folder.redrawn / '1.jsonl').exists()


# ---- tensors

TENSORS = dict(
    a=torch.arange(6.0).reshape(2, 3),
    b=torch.tensor(3),
    c=torch.zeros(0, 2),
    d=torch.ones(2, dtype=torch.bfloat16),
)


def test_tensors_of_every_kind_come_back(tmp_path):
    save_tensors(tmp_path / 'a.safetensors', TENSORS, dict(names=('x', 'y')))

    tensors, notes = load_tensors(tmp_path / 'a.safetensors')

    assert notes == dict(names=['x', 'y'])
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_any_flipped_bit_is_noticed(tmp_path):
    file = tmp_path / 'a.safetensors'
    save_tensors(file, TENSORS, dict(step=3))
    held = file.read_bytes()

    unnoticed = []
    for place in range(0, len(held)):
        file.write_bytes(held[:place] + bytes([held[place] ^ 4]) + held[place + 1 :])
        try:
            tensors, notes = load_tensors(file, sealed=True)
        except DamagedFile:
            continue
        same = notes == dict(step=3) and set(tensors) == set(TENSORS)
        if not same or any(not torch.equal(tensors[k], TENSORS[k]) for k in TENSORS):
            unnoticed.append(place)

    assert unnoticed == []


def test_tensors_of_an_older_version_have_no_digest(tmp_path):
    save_file(TENSORS, tmp_path / 'a.safetensors', metadata={'json': '{"step": 3}'})

    assert load_tensors(tmp_path / 'a.safetensors')[1] == dict(step=3)


def test_notes_of_other_libraries_are_put_in_order(tmp_path):
    files = [tmp_path / f'{i}.safetensors' for i in range(12)]
    for file in files:
        save_file(TENSORS, file, metadata={name: 'œ"\n' for name in 'abcdef'})
        sort_notes(file)

    assert len({file.read_bytes() for file in files}) == 1
    header = files[0].read_bytes()[8:]
    assert header.startswith(b'{"__metadata__":{"a":')
    assert set(load_tensors(files[0])[0]) == set(TENSORS)


def test_a_note_is_a_line_of_json(digests):
    write(digests, 'œ\u2028.txt', 'leaf')

    text = (digests.journals / '0.jsonl').read_bytes()

    assert [json.loads(x)['file'] for x in text.split(b'\n') if x] == ['œ\u2028.txt']
