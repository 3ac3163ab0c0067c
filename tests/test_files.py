"Errors of one line, files that are whole or not there, and names that are safe."

import pytest
import torch

from diffii.base.files import (
    UserError,
    atomic,
    folder_name,
    load_optimizer_tensors,
    load_tensors,
    optimizer_tensors,
    read_json,
    remove_unfinished,
    save_tensors,
    shown_error,
    write_json,
)
from diffii.base.prompts import clean_text, prefix, prompt_of


def test_shown_error_prints_the_message(capsys):
    with shown_error():
        raise UserError('--steps 0: give 1 or more')

    assert capsys.readouterr().out == '--steps 0: give 1 or more\n'


def test_shown_error_wants_an_error():
    with pytest.raises(AssertionError, match='no UserError'):
        with shown_error():
            pass


# ---- whole files


def test_json_comes_back(tmp_path):
    write_json(tmp_path / 'new' / 'x.json', {'é': 1})

    assert read_json(tmp_path / 'new' / 'x.json') == {'é': 1}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / 'x.json'
    write_json(file, 'old')

    with pytest.raises(RuntimeError, match='power cut'):
        with atomic(file) as tmp:
            tmp.write_text('half')
            raise RuntimeError('power cut')

    assert read_json(file) == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['x.json']


def test_a_refused_write_names_the_file(tmp_path):
    (tmp_path / 'file').write_text('')

    with pytest.raises(UserError, match=r'y\.json: could not be written \('):
        write_json(tmp_path / 'file' / 'y.json', 1)


def test_refused_tensors_name_the_file(tmp_path):
    (tmp_path / 'file').write_text('')

    with pytest.raises(UserError, match=r'y\.safetensors: could not be written \('):
        save_tensors(tmp_path / 'file' / 'y.safetensors', {'x': torch.ones(1)})


@pytest.mark.parametrize('broken', (b'{', b'', b'"\xff"'))
def test_broken_json_names_the_file(tmp_path, broken):
    (tmp_path / 'x.json').write_bytes(broken)

    with pytest.raises(UserError, match=r'x\.json: not valid JSON'):
        read_json(tmp_path / 'x.json')


def test_broken_tensors_name_the_file(tmp_path):
    (tmp_path / 'bad.safetensors').write_bytes(b'123')

    with pytest.raises(UserError, match=r'bad\.safetensors: not a readable'):
        load_tensors(tmp_path / 'bad.safetensors')


def test_the_state_of_an_optimizer_comes_back(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    adam = torch.optim.AdamW([weight], lr=0.1)
    for gradient in ([1.0, 2.0], [0.5, -1.0], [0.0, 3.0]):
        weight.grad = torch.tensor(gradient)
        adam.step()
    file = tmp_path / 's.safetensors'

    save_tensors(file, {'w': weight, **optimizer_tensors(adam)}, {'step': 3})
    tensors, meta = load_tensors(file)
    other = torch.optim.AdamW([weight], lr=0.1)
    load_optimizer_tensors(other, tensors)

    assert meta == {'step': 3}
    assert torch.equal(tensors['w'], weight)
    for name, value in adam.state[weight].items():
        assert torch.equal(other.state[weight][name], value)


# ---- names of folders


@pytest.mark.parametrize('name', ('Black footed Albatross', 'çiçek 花', '花' * 60))
def test_a_safe_name_is_kept(name):
    assert folder_name(name) == name


UNSAFE = ('../../etc', 'a/b', '..', '.git', '', 'x' * 300, 'a\nb')
OWN_FILES = ('metadata.jsonl', 'README.md', 'readme.MD')


@pytest.mark.parametrize('name', UNSAFE + OWN_FILES)
def test_an_unsafe_name_is_changed(name):
    folder = folder_name(name)

    assert folder and folder != name
    assert '/' not in folder and '\n' not in folder
    assert not folder.startswith('.')
    assert len(folder) < 100


def test_names_that_clean_to_the_same_stay_apart():
    assert folder_name('a/b') != folder_name('a:b')


LONG = ('花' * 80, '😀' * 80, 'é' * 90, '花' * 81, 'x' * 80)


def test_long_names_stay_apart():
    assert len({folder_name(name) for name in LONG}) == len(LONG)


@pytest.mark.parametrize('name', LONG)
def test_a_long_name_leaves_room_for_endings(tmp_path, name):
    folder = folder_name(name)

    write_json(tmp_path / folder / f'{folder}.safetensors', {})

    assert len(f'.{folder}.safetensors.4194304.tmp'.encode()) < 255


# ---- text in prompts


CLEANED = {
    ' a\tbird\n<|endoftext|> in {a} (cage:1.5) \u200b\x00 ': (
        'a bird endoftext in {a} (cage:1.5)'
    ),
    '<c3>_1': 'c3 _1',
    '花 œillet': '花 œillet',
}


@pytest.mark.parametrize('text', CLEANED)
def test_text_is_cleaned(text):
    assert clean_text(text) == CLEANED[text]


def test_a_prompt_is_prefix_tokens_metaclass_suffix():
    plain = prompt_of(['<c3>', '<c3>_1'], 'bird')

    assert plain == 'a photo of a <c3> <c3>_1 bird'
    assert prompt_of(['<c3>', '<c3>_1'], 'bird', 'by night.') == plain + ' by night.'
    assert prompt_of([], 'bird') == prefix('bird')


def test_a_suffix_cannot_name_a_token():
    assert prompt_of(['<c3>'], 'bird', 'beside <c4>.').count('<c') == 1


def test_an_empty_metaclass_is_refused():
    with pytest.raises(UserError, match='--metaclass'):
        prompt_of(['<c0>'], ' <> ')


def test_what_a_killed_process_left_of_a_file_is_removed_and_no_more(tmp_path):
    "A name may have characters that mean something to a pattern."
    for name in ('.a[1].csv.77.tmp', '.a1.csv.77.tmp', 'a[1].csv', 'a.tmp'):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path / 'a[1].csv')
    left = ['.a1.csv.77.tmp', 'a.tmp', 'a[1].csv']
    assert sorted(p.name for p in tmp_path.iterdir()) == left
    remove_unfinished(tmp_path / 'elsewhere' / 'a.csv')  # where there is no folder


def test_what_killed_processes_left_in_a_folder_is_removed(tmp_path):
    (tmp_path / 'b').mkdir()
    for name in ('.a.json.7.tmp', 'a.json', 'b/.c.png.8.tmp', 'b/c.tmp'):
        (tmp_path / name).touch()
    remove_unfinished(tmp_path)
    left = sorted(p.name for p in tmp_path.rglob('*') if p.is_file())
    assert left == ['a.json', 'c.tmp']
