"Sets and concepts on the hub: what is sent, what is refused, and in which words."

import shutil

import pytest
import torch
from garden import a_record, a_row, environment, start
from huggingface_hub import DatasetCard, ModelCard, constants
from hub import TOKEN, serving
from PIL import Image

from diffii.base.files import UserError
from diffii.base.settings import ConceptSettings, PushSettings
from diffii.method.concepts import Concepts
from diffii.run.folders import RECORD, RunFolder, claim, read_rows
from diffii.run.sharing import concept_card, push

CLASSES = ('oak', 'ash')
pytestmark = pytest.mark.filterwarnings(
    'ignore:.*is not filled in', 'ignore:Use .content'
)


@pytest.fixture
def online(monkeypatch):
    "A hub on this machine, a token for it, and the plain protocol for large files."
    with serving() as (hub, address):
        hub.address = address
        monkeypatch.setattr(constants, 'ENDPOINT', address)
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True)
        monkeypatch.setenv('HF_TOKEN', TOKEN)
        yield hub


def learned(lora=False):
    "Concepts of two categories, as they could be."
    settings = ConceptSettings(n_tokens=2, rank=4 if lora else 0, steps=3)
    vectors = [torch.arange(4.0 * 8).reshape(4, 8)]
    weights = {}
    if lora:
        layer = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
        down, up = torch.ones(4, 8), torch.ones(8, 4)
        weights = {f'{layer}.lora_A.weight': down, f'{layer}.lora_B.weight': up}
    return Concepts(CLASSES, 'tree', settings, 'digest', vectors, weights)


@pytest.fixture
def trees(tmp_path):
    "A finished folder: two images of each of two categories, concepts, and clutter."
    folder = RunFolder(tmp_path / 'more_trees')
    settings = dict(n_tokens=2, rank=0, steps=3)
    about = dict(classes=CLASSES, concepts=settings, sampling=dict(method='diff-ii'))
    claim(folder.path, a_record(**about), RECORD)
    rows = [
        a_row(f'train/{name}/{i:05d}.png', label=name)
        for name in CLASSES
        for i in range(2)
    ]
    for number, row in enumerate(rows):
        folder.file(row).parent.mkdir(parents=True, exist_ok=True)
        folder.save_image(folder.file(row), Image.new('RGB', (4, 4), (number, 0, 0)))
    folder.write_rows(folder.plan, rows)
    folder.write_rows(folder.metadata, rows)
    learned().save(folder.concepts)
    (folder.images / 'oak' / '.DS_Store').touch()
    (folder.state / 'lock').touch()
    return folder


IMAGES = [f'train/{name}/{i:05d}.png' for name in CLASSES for i in range(2)]
SET = sorted(['README.md', 'metadata.jsonl', *IMAGES])


# ---- a set


def test_a_set_is_pushed_with_its_card_and_without_its_state(online, trees):
    url = push(trees.path, 'me/trees')
    assert url == f'{online.address}/datasets/me/trees'
    files = online.files['dataset', 'me/trees']
    assert sorted(files) == SET
    for name in IMAGES:
        assert files[name] == (trees.path / name).read_bytes()
    card = DatasetCard(files['README.md'].decode())
    assert 'synthetic' in card.data.tags


def test_a_new_repository_is_private_unless_asked_otherwise(online, trees):
    push(trees.path, 'me/trees')
    push(trees.path, 'me/others', PushSettings(private=False))
    assert online.private == {
        ('dataset', 'me/trees'): True,
        ('dataset', 'me/others'): False,
    }


def test_a_set_is_not_pushed_to_a_public_place_by_mistake(online, trees):
    online.repo('dataset', 'me/trees', private=False)['notes.txt'] = b'before'
    with pytest.raises(UserError, match='is there already and public; give --no-priv'):
        push(trees.path, 'me/trees')
    assert list(online.files['dataset', 'me/trees']) == ['notes.txt']


def test_what_was_dropped_since_goes_and_what_is_of_others_stays(online, trees):
    push(trees.path, 'me/trees')
    files = online.files['dataset', 'me/trees']
    files |= {'train/oak/00009.png': b'dropped since', 'notes.txt': b'of others'}
    push(trees.path, 'me/trees')
    assert sorted(files) == sorted([*SET, 'notes.txt'])


def test_a_set_of_others_is_left_alone(online, trees):
    files = online.repo('dataset', 'me/trees')
    files |= {'train/oak/photo.png': b'of a camera', 'README.md': b'# Photos'}
    before = dict(files)
    with pytest.raises(UserError, match='holds something else .README.md, train/oak'):
        push(trees.path, 'me/trees')
    assert files == before


def test_large_files_that_the_hub_has_are_not_sent_again(online, trees):
    push(trees.path, 'me/trees')
    sent = dict(online.objects)
    push(trees.path, 'me/others')
    assert online.objects == sent
    assert sorted(online.files['dataset', 'me/others']) == SET


def test_places_on_this_machine_are_not_pushed(online, trees):
    rows = list(read_rows(trees.plan))
    rows = [row | dict(model='/home/me/sd15', few_step='/home/me/lcm') for row in rows]
    trees.write_rows(trees.plan, rows)
    trees.write_rows(trees.metadata, rows)  # as an earlier version did

    push(trees.path, 'me/trees')

    sent = [row['model'] for row in read_rows(trees.metadata)]
    assert sent == ['sd15'] * 4
    assert '/home/me' not in trees.metadata.read_text() + trees.card.read_text()
    assert 'names of real images' in trees.card.read_text()


def test_the_state_goes_along_when_it_is_asked_for(online, trees):
    for name in ('real', 'review'):  # pictures of the training images
        (trees.state / name).mkdir()
        Image.new('RGB', (4, 4)).save(trees.state / name / '0.png')
    push(trees.path, 'me/trees', PushSettings(state=True))
    names = set(online.files['dataset', 'me/trees']) - set(SET)
    assert {'.diffii/run.json', '.diffii/plan.jsonl'} < names
    assert '.diffii/concepts/learned_embeds.safetensors' in names
    assert not any(
        '.diffii/' + x in name for name in names for x in ('lock', 'real', 'review')
    )


def test_a_name_without_an_owner_is_the_users(online, trees):
    push(trees.path, 'trees')
    assert list(online.files) == [('dataset', 'me/trees')]


def test_a_license_that_is_not_filled_in_is_asked_for(online, trees):
    with pytest.warns(UserWarning, match='the license is not filled in'):
        push(trees.path, 'me/trees')


def test_a_license_that_is_filled_in_is_pushed(online, trees):
    push(trees.path, 'me/trees')
    text = trees.card.read_text().replace('license: unknown', 'license: cc0-1.0')
    trees.card.write_text(text)
    push(trees.path, 'me/trees')
    card = online.files['dataset', 'me/trees']['README.md'].decode()
    assert DatasetCard(card).data.license == 'cc0-1.0'


# ---- what is refused


def test_an_unfinished_set_is_refused(online, trees):
    (trees.path / IMAGES[3]).unlink()
    with pytest.raises(UserError, match='1 of 4 images are missing or damaged; run'):
        push(trees.path, 'me/trees')
    assert online.files == {}


def test_a_damaged_set_is_refused(online, trees):
    Image.new('RGB', (4, 4), 'white').save(trees.path / IMAGES[3])
    with pytest.raises(UserError, match='1 of 4 images are missing or damaged; run'):
        push(trees.path, 'me/trees')


def test_a_run_before_its_first_image_is_refused(online, trees):
    for file in (trees.plan, trees.metadata, trees.digests.file):
        file.unlink(missing_ok=True)
    shutil.rmtree(trees.digests.journals, ignore_errors=True)
    with pytest.raises(UserError, match='there are no images in it'):
        push(trees.path, 'me/trees')


def test_another_folder_is_refused(online, tmp_path):
    with pytest.raises(UserError, match='not a folder of synthetic images'):
        push(tmp_path, 'me/trees')


NAMES = ('me/more trees', 'a/b/c', '', 'me/-trees', 'me/' + 'x' * 100)


@pytest.mark.parametrize('name', NAMES)
def test_a_name_that_cannot_be_is_refused(online, trees, name):
    with pytest.raises(UserError, match='cannot be the name of a repository'):
        push(trees.path, name)


def test_without_a_token_nothing_is_asked(online, trees, monkeypatch, tmp_path):
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    with pytest.raises(UserError, match='no token .* run `hf auth login`'):
        push(trees.path, 'me/trees')


def test_a_token_that_the_hub_does_not_know_is_one_line(online, trees, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_of_yesterday')
    with pytest.raises(UserError, match='check that the token may write') as caught:
        push(trees.path, 'me/trees')
    assert '\n' not in str(caught.value)


def test_a_card_that_the_hub_does_not_take_is_one_line(online, trees):
    push(trees.path, 'me/trees')
    text = trees.card.read_text().replace('license: unknown', 'license: mine')
    trees.card.write_text(text)
    text = 'Invalid metadata in README.md. - "license" must be .*; mend that'
    with pytest.raises(UserError, match=text):
        push(trees.path, 'me/trees')


def test_what_the_hub_says_is_told(online, trees):
    online.refused = (403, 'You do not have the rights to create a dataset here.')
    with pytest.raises(UserError, match='You do not have the rights') as caught:
        push(trees.path, 'them/trees')
    assert '\n' not in str(caught.value)


def test_no_network_is_one_line(online, trees, monkeypatch):
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    with pytest.raises(UserError, match='check the network') as caught:
        push(trees.path, 'me/trees')
    assert '\n' not in str(caught.value)


def test_a_hub_that_is_switched_off_is_one_line(online, trees, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(UserError, match='offline mode'):
        push(trees.path, 'me/trees')


# ---- concepts


@pytest.mark.parametrize('lora', [False, True])
def test_concepts_come_back_from_the_hub(online, tmp_path, lora):
    concepts = learned(lora)
    url = concepts.push_to_hub('me/two-trees', 'some/model')
    assert url == f'{online.address}/me/two-trees'
    for name, data in online.files['model', 'me/two-trees'].items():
        (tmp_path / name).write_bytes(data)
    assert Concepts.load(tmp_path).digest() == concepts.digest()


def test_the_concepts_of_a_run_are_pushed(online, trees):
    push(trees.path, 'me/two-trees', PushSettings(concepts=True))
    files = online.files['model', 'me/two-trees']
    assert set(files) == {'README.md', 'concepts.json', 'learned_embeds.safetensors'}
    assert online.private['model', 'me/two-trees']


def test_concepts_that_are_not_learned_yet_are_refused(online, trees):
    (trees.concepts / 'concepts.json').unlink()
    with pytest.raises(UserError, match='no learned concepts in it yet'):
        push(trees.path, 'me/two-trees', PushSettings(concepts=True))


def test_a_method_without_concepts_has_none_to_push(online, tmp_path):
    claim(tmp_path / 'out', a_record(concepts=None), RECORD)
    with pytest.raises(UserError, match='its method learns none'):
        push(tmp_path / 'out', 'me/two-trees', PushSettings(concepts=True))


def test_categories_called_by_their_names_are_refused(online):
    settings = ConceptSettings(n_tokens=0, rank=0, steps=0)
    named = Concepts(CLASSES, 'tree', settings, 'digest', [], {})
    with pytest.raises(UserError, match='nothing is learned'):
        named.push_to_hub('me/two-trees', 'some/model')


def test_the_state_does_not_go_with_concepts(online, trees):
    with pytest.raises(UserError, match='--state: belongs to a set'):
        push(trees.path, 'me/x', PushSettings(concepts=True, state=True))


def test_the_card_of_concepts_says_what_they_belong_to():
    card = ModelCard(concept_card(learned(lora=True), 'me/two-trees', 'some/model'))
    assert card.data.base_model == 'some/model'
    assert 'lora' in card.data.tags
    assert '| ash | `a photo of a <c1> <c1>_1 tree` |' in card.text


def test_the_card_of_concepts_tells_no_place_on_this_machine(tmp_path):
    card = concept_card(learned(), 'me/two-trees', str(tmp_path / 'my_model'))
    (tmp_path / 'my_model').mkdir()
    card = concept_card(learned(), 'me/two-trees', str(tmp_path / 'my_model'))
    assert str(tmp_path) not in card
    assert ModelCard(card).data.base_model is None
    assert '`my_model`' in card


# ---- the command


def pushed(*words, **more):
    "Run `diffii push` in a process of its own."
    plain = dict(HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_TOKEN=TOKEN)
    return start('push', *words, env=environment(**plain, **more))


def test_the_command_prints_where_the_set_is(online, trees):
    done = pushed(trees.path, 'me/trees', '--no-private', HF_ENDPOINT=online.address)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(f'{online.address}/datasets/me/trees')
    assert sorted(online.files['dataset', 'me/trees']) == SET
    assert not online.private['dataset', 'me/trees']


def test_the_command_refuses_in_one_line(trees):
    (trees.path / IMAGES[0]).unlink()
    done = pushed(trees.path, 'me/trees', HF_ENDPOINT='http://127.0.0.1:9')
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert [line for line in lines if line.startswith('diffii:')] == lines[-1:]
    assert '1 of 4 images are missing' in lines[-1]
