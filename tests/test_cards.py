"The card of a folder: what the hub reads in it, and what its owner wrote is kept."

import shlex

import pytest
from garden import a_record, a_row
from huggingface_hub import DatasetCard

from diffii.run.cards import YOURS, columns, size_category, write_card
from diffii.run.folders import RECORD, RunFolder, claim, write_rows

CLASSES = ('oak', 'yes', '12', '../../up', '花: "x" # y')  # YAML has to quote most


@pytest.fixture
def folder(tmp_path):
    "A folder with metadata of five images, and no images."
    folder = RunFolder(tmp_path / 'more trees')
    about = dict(images={'oak/1.jpg': 'x'}, sampling=dict(method='diff-ii'))
    claim(folder.path, a_record(classes=CLASSES, **about), RECORD)
    rows = [
        a_row(f'train/{k}/0.png', label=name, attempt=int(k == 2))
        for k, name in enumerate(CLASSES)
    ]
    write_rows(folder.metadata, rows)
    return folder


def card_of(folder):
    return DatasetCard.load(folder.card)


# ---- what is written


def test_the_hub_reads_what_the_set_is(folder):
    write_card(folder)
    data = card_of(folder).data
    assert data.license == 'unknown'
    assert data.task_categories == ['image-classification']
    assert 'synthetic' in data.tags
    assert data.size_categories == ['n<1K']
    assert data.pretty_name == 'more trees'


def test_commands_and_code_of_the_card_can_be_pasted(tmp_path):
    folder = RunFolder(tmp_path / "bob's trees")
    claim(folder.path, a_record(sampling=dict(method='diff-ii')), RECORD)
    write_rows(folder.metadata, [a_row('train/oak/0.png', label='oak')])
    write_card(folder)
    text = folder.card.read_text()
    code = text.partition('```python\n')[2].partition('```')[0]

    assert 'load_dataset("bob\'s trees")' in code
    compile(code, 'card', 'exec')
    command = text.partition('`diffii remake ')[2].partition(' FILE_NAME')[0]
    assert shlex.split(command) == ["bob's trees"]


def test_the_names_of_the_categories_come_through_yaml(folder):
    write_card(folder)
    (config,) = card_of(folder).data.configs
    (label,) = [c for c in config['features'] if c['name'] == 'label']
    names = label['dtype']['class_label']['names']
    assert [names[str(k)] for k in range(5)] == list(CLASSES)


def test_people_are_told_where_the_images_come_from(folder):
    write_card(folder)
    text = ' '.join(card_of(folder).text.split())
    assert 'These 5 images were made by a diffusion model' in text
    assert 'from 1 real images of 5 categories (tree), seed 0' in text
    assert '1 failed at first' in text


def test_a_model_in_a_folder_is_named_without_its_place(folder, tmp_path, monkeypatch):
    about = {**folder.about(), 'model': str(tmp_path)}
    monkeypatch.setattr(RunFolder, 'about', lambda self: about)
    write_card(folder)
    assert f'model `{tmp_path.name}`' in folder.card.read_text()
    assert str(tmp_path.parent) not in folder.card.read_text()


SIZES = {0: 'n<1K', 999: 'n<1K', 1000: '1K<n<10K', 99_999: '10K<n<100K'}


@pytest.mark.parametrize('count, words', SIZES.items())
def test_sizes_are_in_the_words_of_the_hub(count, words):
    assert size_category(count) == words


TYPES = {
    'int64': [1, None],
    'float64': [1, 0.5],
    'bool': [None, True],
    'string': [None, None],
}


@pytest.mark.parametrize('kind, values', TYPES.items())
def test_the_type_of_a_column_follows_from_its_values(kind, values):
    found = columns([dict(x=value) for value in values], ('oak',))
    assert dict(name='x', dtype=kind) in found


def test_a_column_of_dicts_is_a_struct():
    found = columns([dict(scores=dict(a=1.0)), dict(scores=dict(a=2.0))], ('oak',))
    assert dict(name='scores', struct=[dict(name='a', dtype='float64')]) in found


def test_a_key_of_some_rows_is_a_column():
    found = columns([dict(a=1), dict(b=2)], ('oak',))
    assert [column['name'] for column in found] == ['image', 'a', 'b', 'label']


# ---- written again


def edit(file, old, new):
    text = file.read_text(encoding='utf-8')
    assert old in text
    file.write_text(text.replace(old, new), encoding='utf-8')


def test_what_the_owner_wrote_is_kept(folder):
    write_card(folder)
    edit(folder.card, 'license: unknown', 'license: cc-by-4.0\nlanguage: en')
    edit(folder.card, '- diffii\n', '- trees\n')
    edit(folder.card, YOURS, YOURS + '\nFrom our garden.\n')
    write_card(folder)
    card = card_of(folder)
    assert (card.data.license, card.data.language) == ('cc-by-4.0', 'en')
    assert card.data.tags == ['synthetic', 'trees']
    assert card.text.endswith(YOURS + '\nFrom our garden.\n')


def test_what_follows_from_the_images_is_new(folder):
    write_card(folder)
    row = a_row('train/oak/0.png', start='noise', sources=[], strength=None)
    write_rows(folder.metadata, [row] * 1000)
    write_card(folder)
    card = card_of(folder)
    assert card.data.size_categories == ['1K<n<10K']
    columns = card.data.configs[0]['features']
    assert dict(name='strength', dtype='string') in columns
    assert 'These 1000 images' in card.text


def test_a_card_that_did_not_change_is_written_the_same(folder):
    write_card(folder)
    before = folder.card.read_bytes()
    write_card(folder)
    assert folder.card.read_bytes() == before


def test_a_card_without_a_header_gets_one(folder):
    folder.card.write_text('# Synthetic images\n')
    write_card(folder)
    assert card_of(folder).data.license == 'unknown'


def test_a_broken_header_is_left_alone(folder):
    folder.card.write_text('---\nlicense: [\n---\nmine\n')
    with pytest.warns(UserWarning, match='left as it is'):
        write_card(folder)
    assert folder.card.read_text().endswith('mine\n')
