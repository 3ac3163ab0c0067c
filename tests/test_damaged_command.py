"""Files of a run are damaged by hand, and the command is asked about the folder: it ends
well with the right files, or with exit code 2 and one line."""

import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from fake_stages import fake_stages
from folder_files import contents, link_to_keep
from safetensors.torch import save_file
from small_runs import few_birds

from diffii.app import cli
from diffii.base.pipeline import load_pipeline

OUT = Path('out')
STATE = OUT / '.diffii'
RUN, PLAN, METADATA = STATE / 'run.json', STATE / 'plan.jsonl', OUT / 'metadata.jsonl'
DIGESTS, CHOICES = STATE / 'digests.jsonl', STATE / 'choices.json'
CONCEPTS = STATE / 'concepts'
ASIDE = ('README.md', 'lock')  # a card may be edited; a lock is empty
NAME, OTHER = 'train/{}/00000.png', 'train/{}/00001.png'

QUICK = ('--concept-steps', 1, '--steps', 2, '--expansion', 3, '--inversions', 1)
QUICK += ('--forward-steps', 0, '--batch-size', 4, '--no-review', '--verify')
AUGMENT = ('augment', 'birds', '--metaclass', 'bird', *QUICK, '--out', 'out')
LOOKING = (
    ('status', OUT),
    ('status', OUT, '--verify'),
    ('remake', OUT, NAME, '--to', 'remade.png'),
    ('push', OUT, 'me/birds'),
    ('push', OUT, 'me/birds', '--concepts'),
)
CHANGING = (
    ('review', OUT, '--no-diversity'),
    ('drop', OUT, NAME),
    ('drop', OUT, '--keep'),
    ('score', OUT, 'lpips'),
    ('drop', OUT, '--worst', '50%'),
    ('drop', OUT, OTHER, '--refill'),
    ('status', OUT),
)


def command(*words):  # -> (exit code, lines of errors)
    "The command in this process, which has loaded the model already."
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setattr(sys, 'argv', ['diffii', *map(str, words)])
        with redirect_stderr(err):
            try:
                cli.main()
                code = 0
            except SystemExit as e:
                code = e.code
    said = [x for x in err.getvalue().splitlines() if x.startswith('diffii: ')]
    return code, [x for x in said if not x.startswith('diffii: warning: ')]


def assert_told(words):  # -> did it work?
    "The command works, or says in one line why not."
    code, errors = command(*words)
    assert code in (0, 2), (words, code, errors)
    assert len(errors) == (1 if code else 0), (words, errors)
    return code == 0


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A folder with images and a finished run, both of the command."
    home = tmp_path_factory.mktemp('home')
    birds = few_birds(2)
    for i, label in enumerate(birds.labels):
        file = home / 'birds' / birds.classes[label] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        birds.open(i).save(file)
    pipe = load_pipeline('tiny', batch_size=4)
    with fake_stages(learning=True) as patch:
        patch.setattr('diffii.base.pipeline.load_pipeline', lambda *a, **k: pipe)
        patch.chdir(home)
        assert command(*AUGMENT) == (0, [])
        yield home


@pytest.fixture
def case(home, tmp_path, monkeypatch):
    "A copy of it all, with a file of somebody else beside it."
    shutil.copytree(home, tmp_path / 'case')
    monkeypatch.chdir(tmp_path / 'case')
    Path('outside').mkdir()
    Path('outside', 'keep.txt').write_text('mine')
    return tmp_path / 'case'


@pytest.fixture(scope='module')
def names(home):
    "Names of two images of the run, as in its metadata."
    category = sorted(p.name for p in (home / 'birds').iterdir())[0]
    return {name: name.format(category) for name in (NAME, OTHER)}


# ---- ways to damage a run


def written(file, content):
    "The file has another content."
    data = content if isinstance(content, bytes) else content.encode()
    return lambda: file.write_bytes(data)


def cut(pattern):
    "The first file of a pattern is half as long."

    def damage():
        file = sorted(OUT.glob(pattern))[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    return damage


def flipped(pattern):
    "A bit at the end of the first file of a pattern is another."

    def damage():
        file = sorted(OUT.glob(pattern))[0]
        held = bytearray(file.read_bytes())
        held[-20] ^= 1
        file.write_bytes(bytes(held))

    return damage


def swapped():
    "An image has the place of another."
    one, other = sorted(OUT.glob('train/*/*.png'))[:2]
    shutil.copyfile(one, other)


def pool_notes(text):
    "A file of inversions has other notes, and nobody noted how it was."

    def damage():
        DIGESTS.unlink()
        file = sorted((STATE / 'pool').glob('*.safetensors'))[0]
        save_file({'latents': torch.ones(3, 4, 8, 8)}, file, metadata=dict(json=text))

    return damage


def checkpoint_notes(text):
    "Learning was stopped, and its checkpoint has other notes."

    def damage():
        (CONCEPTS / 'concepts.json').unlink()
        file = CONCEPTS / 'checkpoint.safetensors'
        save_file({'a': torch.ones(2)}, file, metadata=dict(json=text))

    return damage


def gone(file):
    return lambda: file.unlink()


def a_folder(pattern):
    "A folder has the place of the first file of a pattern."

    def damage():
        file = sorted(OUT.glob(pattern))[0]
        file.unlink()
        file.mkdir()

    return damage


def linked(pattern):
    "A link to somebody's file has the place of the first file of a pattern, or of none."
    return lambda: link_to_keep([*sorted(OUT.glob(pattern)), OUT / pattern][0])


def linked_folder(folder):
    "A link to somebody's folder has the place of a folder."

    def damage():
        shutil.rmtree(folder, ignore_errors=True)
        folder.symlink_to(Path('outside').resolve())

    return damage


def record(file, **changes):
    "A record says something else; None takes a key away."

    def damage():
        found = json.loads(file.read_bytes()) | changes
        kept = {k: v for k, v in found.items() if v is not None and k != 'seal'}
        file.write_text(json.dumps(kept))

    return damage


def first_row(file, **changes):
    "The first row of a list says something else, and nobody noted how it was."

    def damage():
        DIGESTS.unlink()
        first, _, rest = file.read_bytes().partition(b'\n')
        first = json.dumps(json.loads(first) | changes).encode()
        file.write_bytes(first + b'\n' + rest)

    return damage


def redrawn(text):
    "A list of further attempts that nobody noted."

    def damage():
        file = STATE / 'redrawn' / '0.jsonl'
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)

    return damage


def choices(**changes):
    "Images were chosen by hand."
    none = dict(dropped={}, refilled=[], filtered=[])
    return written(CHOICES, json.dumps(none | changes))


KEEP = '../outside/keep.txt'
DAMAGE = dict(
    run_list=written(RUN, '[]'),
    run_null=written(RUN, 'null'),
    run_bytes=written(RUN, b'\xff\xfe'),
    run_before=written(RUN, '{"format": 2}'),
    run_lacks_a_key=record(RUN, classes=None),
    run_other_type=record(RUN, classes=[1]),
    run_other_seed=record(RUN, seed=7),
    run_a_folder=a_folder('.diffii/run.json'),
    plan_cut=cut('.diffii/plan.jsonl'),
    plan_empty=written(PLAN, ''),
    plan_null=written(PLAN, 'null\n'),
    plan_gone=gone(PLAN),
    plan_outside=first_row(PLAN, file_name=KEEP),
    plan_other_batch=first_row(PLAN, batch=2),
    plan_other_sources=first_row(PLAN, sources=['x', 'y']),
    metadata_cut=cut('metadata.jsonl'),
    metadata_outside=first_row(METADATA, file_name=KEEP),
    metadata_other_label=first_row(METADATA, label='x', source_label='x'),
    metadata_other_sources=first_row(METADATA, sources=['x', 'y']),
    metadata_linked=linked('metadata.jsonl'),
    metadata_a_folder=a_folder('metadata.jsonl'),
    redrawn_null=redrawn('null\n'),
    redrawn_cut=redrawn('{"file_name": "tr'),
    dropped_outside=written(STATE / 'dropped.json', json.dumps([KEEP])),
    dropped_null=written(STATE / 'dropped.json', 'null'),
    choices_outside=choices(dropped={KEEP: 'by hand'}),
    choices_list=written(CHOICES, '[]'),
    scores_null=written(STATE / 'scores.json', 'null'),
    digests_bytes=written(DIGESTS, b'\xff\xfe\n\n[]\n{"file": 3}\n'),
    digests_gone=gone(DIGESTS),
    digests_a_folder=a_folder('.diffii/digests.jsonl'),
    settings_bytes=written(STATE / 'settings.yaml', b'\xff\xfe'),
    settings_a_list=written(STATE / 'settings.yaml', '- 1'),
    advice_null=written(STATE / 'advice.json', 'null'),
    advice_gone=gone(STATE / 'advice.json'),
    concepts_null=written(CONCEPTS / 'concepts.json', 'null'),
    concepts_cut=cut('.diffii/concepts/*.safetensors'),
    lora_flipped=flipped('.diffii/concepts/*lora*.safetensors'),
    pool_cut=cut('.diffii/pool/*.safetensors'),
    pool_flipped=flipped('.diffii/pool/*.safetensors'),
    pool_notes_no_json=pool_notes('{'),
    pool_notes_a_list=pool_notes('[]'),
    checkpoint_no_json=checkpoint_notes('{'),
    checkpoint_lacks_all=checkpoint_notes('{}'),
    pool_a_folder=a_folder('.diffii/pool/*.safetensors'),
    image_cut=cut('train/*/*.png'),
    image_flipped=flipped('train/*/*.png'),
    image_swapped=swapped,
    image_a_folder=a_folder('train/*/*.png'),
    image_linked=linked('train/*/*.png'),
    images_elsewhere=linked_folder(OUT / 'train'),
    state_elsewhere=linked_folder(STATE),
    pool_elsewhere=linked_folder(STATE / 'pool'),
    concepts_elsewhere=linked_folder(CONCEPTS),
    aside_elsewhere=linked_folder(STATE / 'aside'),
    redrawn_elsewhere=linked_folder(STATE / 'redrawn'),
    real_elsewhere=linked_folder(STATE / 'real'),
    journal_elsewhere=linked('.diffii/digests/0.jsonl'),
    lock_elsewhere=linked('.diffii/lock'),
    record_elsewhere=linked('.diffii/run.json'),
    card_bytes=written(OUT / 'README.md', b'\xff\xfe'),
)


def assert_nothing_outside(case, home):
    "Somebody's file and the training images are as they were."
    assert contents(case / 'outside') == {'keep.txt': b'mine'}
    assert contents(case / 'birds') == contents(home / 'birds')


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_told_or_made_whole(case, home, names, damage):
    damage()

    for words in LOOKING:
        assert_told([names.get(word, word) for word in words])
    works = assert_told(AUGMENT)

    assert_nothing_outside(case, home)
    if works:
        now, right = contents(OUT, ASIDE), contents(home / OUT, ASIDE)
        assert {name: now.get(name) for name in right} == right
        assert command('status', OUT, '--verify') == (0, [])


@pytest.mark.parametrize('damage', DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_can_be_looked_through_or_says_why_not(case, home, names, damage):
    damage()

    for words in CHANGING:
        assert_told([names.get(word, word) for word in words])

    assert_nothing_outside(case, home)
