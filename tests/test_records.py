"Records: their shapes, their seals, their lines, and the names of files in them."

import json
from dataclasses import dataclass

import pytest

from diffii.base.files import UserError, write_json
from diffii.base.records import (
    digest_of,
    inside,
    iter_lines,
    read_lines,
    read_record,
    write_lines,
    write_record,
)

ODD_ENDS = ('\u2028', '\u2029', '\x85', '\x0b', '\x0c', '\x1c', '\r')


@dataclass
class Trip:
    seed: int
    places: list[str]
    length: float = 1.0


GOOD = dict(seed=3, places=['oak', 'elm'], length=2)


# ---- one record


def test_a_record_comes_back_as_it_was(tmp_path):
    write_record(tmp_path / 'a.json', GOOD | dict(later='kept'))

    assert read_record(tmp_path / 'a.json', Trip) == GOOD | dict(later='kept')


@pytest.mark.parametrize(
    'text, found',
    [
        (b'', 'not valid JSON'),
        (b'{"seed": 3', 'not valid JSON'),
        (b'[' * 100_000, 'not valid JSON'),
        (b'{"seed": 3, "places": [], "length": ' + b'9' * 5000 + b'}', 'JSON|length'),
        (b'\xff\xfe', 'not UTF-8'),
        (b'null', 'the record should be an object, found None'),
        (b'[1]', 'the record should be an object'),
        (b'{"seed": 3}', 'places is missing'),
        (b'{"seed": "3", "places": []}', "seed should be a valid integer, found '3'"),
        (b'{"seed": true, "places": []}', 'seed should be a valid integer'),
        (b'{"seed": 3, "places": "oak"}', 'places should be a valid array'),
        (b'{"seed": 3, "places": ["a", 1]}', 'places.1 should be a valid string'),
    ],
)
def test_what_has_another_shape_is_one_line(tmp_path, text, found):
    file = tmp_path / 'a.json'
    file.write_bytes(text)

    with pytest.raises(UserError, match=found) as e:
        read_record(file, Trip, 'make it again')

    assert str(e.value).startswith(f'{file}: ')
    assert str(e.value).endswith('; make it again')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('place', ('missing.json', '.'))
def test_what_is_no_file_is_one_line(tmp_path, place):
    with pytest.raises(UserError, match='No such file|directory'):
        read_record(tmp_path / place, Trip)


def test_odd_characters_in_a_record_do_not_reach_the_terminal(tmp_path):
    write_json(tmp_path / 'a.json', dict(seed='\x1b[31m\n\u2028', places=[]))

    with pytest.raises(UserError) as e:
        read_record(tmp_path / 'a.json', Trip)

    assert str(e.value).isprintable()


# ---- seals


@pytest.mark.parametrize('change', (dict(seed=4), dict(places=['elm']), dict(new=1)))
def test_a_changed_record_is_noticed(tmp_path, change):
    file = tmp_path / 'a.json'
    write_record(file, GOOD)

    write_json(file, {**json.loads(file.read_text()), **change})

    with pytest.raises(UserError, match='was changed since it was written'):
        read_record(file, Trip)


def test_order_and_blanks_are_no_change(tmp_path):
    file = tmp_path / 'a.json'
    write_record(file, GOOD)

    turned = dict(reversed(json.loads(file.read_text()).items()))
    file.write_text(json.dumps(turned))

    assert read_record(file, Trip) == GOOD


def test_a_record_of_another_program_has_no_seal(tmp_path):
    write_json(tmp_path / 'a.json', GOOD)

    assert read_record(tmp_path / 'a.json', Trip) == GOOD


def test_numbers_are_sealed_as_they_are_read():
    record = dict(x=0.1 + 0.2, y=1e300, classes=('a', 'b'))

    again = json.loads(json.dumps(record))

    assert digest_of(again) == digest_of(record)


# ---- lines


@pytest.mark.parametrize('odd', ODD_ENDS)
def test_a_line_ends_at_a_line_feed_alone(tmp_path, odd):
    rows = [dict(seed=1, places=[f'oak{odd}hill']), dict(seed=2, places=[odd])]
    write_lines(tmp_path / 'a.jsonl', iter(rows))

    assert read_lines(tmp_path / 'a.jsonl', Trip) == rows


def test_the_line_of_an_error_is_named(tmp_path):
    write_lines(tmp_path / 'a.jsonl', [GOOD, dict(seed=1)])

    with pytest.raises(UserError, match='a.jsonl, line 2: places is missing'):
        read_lines(tmp_path / 'a.jsonl', Trip)


def test_lines_are_read_one_at_a_time(tmp_path):
    write_lines(tmp_path / 'a.jsonl', [GOOD, dict(seed=1)])

    assert next(iter_lines(tmp_path / 'a.jsonl', Trip)) == GOOD


def test_a_missing_table_has_no_lines(tmp_path):
    assert read_lines(tmp_path / 'a.jsonl', Trip) == []


def test_a_failed_row_leaves_the_old_table(tmp_path):
    file = tmp_path / 'a.jsonl'
    write_lines(file, [GOOD])

    with pytest.raises(TypeError):
        write_lines(file, [GOOD, object()])

    assert read_lines(file, Trip) == [GOOD]
    assert [p.name for p in tmp_path.iterdir()] == ['a.jsonl']


# ---- names of files


@pytest.mark.parametrize('name', ('a.png', 'oak/a.png', 'oak/../elm/a.png', '..a/b'))
def test_a_name_inside_is_a_path(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize(
    'name', ('', '.', '..', '../a', '/etc/passwd', 'oak/../../a', 'a\0b', 'x/..')
)
def test_a_name_outside_is_refused(tmp_path, name):
    with pytest.raises(UserError, match='would be a file outside'):
        inside(tmp_path, name)


@pytest.mark.parametrize('name', ('link/a.png', 'file.png'))
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = tmp_path / 'out'
    folder.mkdir()
    (folder / 'link').symlink_to(tmp_path)
    (folder / 'file.png').symlink_to(tmp_path / 'other.png')

    with pytest.raises(UserError, match='would be a file outside'):
        inside(folder, name)


def test_the_folder_itself_may_be_a_link(tmp_path):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'out').symlink_to(tmp_path / 'disk')

    assert inside(tmp_path / 'out', 'oak/a.png') == tmp_path / 'out' / 'oak' / 'a.png'
