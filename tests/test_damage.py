"""Any one file of a run is damaged, in ways that hypothesis thinks of: each command then
works and ends with the right files, or says in one line what is wrong."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_stages import fake_stages
from folder_files import contents, link_to_keep
from hypothesis import given
from hypothesis import strategies as st
from oddities import ODD, changed, property_of
from PIL import Image

from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import Settings
from diffii.data.aviary import VALIDATION, aviary_set
from diffii.method.concepts import Concepts
from diffii.run.review import load_concepts, remake, status
from diffii.run.runs import load_synthetic, synthesize

OUT = Path('out')
ASIDE = ('README.md', 'lock')  # a card may be edited; a lock is empty


@pytest.fixture(scope='module')
def fakes():
    with fake_stages():
        yield


class Maker:
    "Makes runs of two categories, twelve images in batches of four."

    def __init__(self, pipe, birds, concepts):
        self.pipe, self.birds, self.concepts = pipe, birds, concepts

    def settings(self, **run):
        groups = dict(sampling=dict(expansion=3, steps=2))
        groups |= dict(inversion=dict(per_image=1, forward_steps=0))
        return Settings.of(self.pipe, 'bird', **groups, run=run)

    def __call__(self, out=OUT, progress=lambda *now: None, **run):
        wanted = self.settings(verify=True, **run)
        parts = [' in the snow.', 'on a\u2028branch.'], self.concepts
        return synthesize(self.pipe, self.birds, out, wanted, *parts, None, progress)


@pytest.fixture(scope='module')
def make(fakes):
    "A maker with concepts of its own, of one token and a LoRA."
    from diffii.base.settings import ConceptSettings

    pipe = load_pipeline('tiny', batch_size=4)
    birds = few_shot(aviary_set(list(VALIDATION)[:2], n=4), 2, seed=0)[0]
    gen = generator(0, 'concepts')
    about = ConceptSettings(n_tokens=1, rank=1, steps=0)
    lora = {
        f'mid.to_q.lora_{end}.weight': torch.randn(shape, generator=gen)
        for end, shape in dict(A=(1, 4), B=(4, 1)).items()
    }
    tokens = [torch.randn((2, 4), generator=gen)]
    base = 'abcdef01-3c00'
    return Maker(
        pipe, birds, Concepts(birds.classes, 'bird', about, base, tokens, lora)
    )


class Stop(Exception):
    "What stands in for a kill."


def stop_in_the_middle(stage, done, total):
    if stage == 'images' and done == 8:
        raise Stop


class Runs:
    "Folders that the cases are copies of."

    def __init__(self, home):
        self.whole, self.half = home / 'whole', home / 'half'
        self.other = home / 'other'  # the whole run of another seed
        self.files = contents(self.whole / OUT, ASIDE)


@pytest.fixture(scope='module')
def finished(make, tmp_path_factory):
    home = tmp_path_factory.mktemp('runs')
    for name in ('whole', 'half', 'other'):
        (home / name).mkdir()
    with at(home / 'whole'):
        make()
    with at(home / 'half'), pytest.raises(Stop):
        make(progress=stop_in_the_middle)
    with at(home / 'other'):
        make(seed=1)
    return Runs(home)


@contextmanager
def at(folder):
    "A block in another working folder, so that no path differs between runs."
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# ---- ways to damage a file

# values for a key, of which some are names that lead out of the folder
ODD_HERE = (*ODD, '../../outside/keep.txt', '/etc/hostname', 'a\0b', '\u2028', '.')
ODD_HERE += ({'a': None},)


def cut(data, file, runs):
    return data.draw(st.binary(max_size=0)) + file.read_bytes()[: data.draw(SIZE)]


SIZE = st.integers(0, 4000)


def emptied(data, file, runs):
    return b''


def flipped(data, file, runs):
    held = bytearray(file.read_bytes())
    if held:
        place = data.draw(st.integers(0, len(held) - 1))
        held[place] ^= 1 << data.draw(st.integers(0, 7))
    return bytes(held)


def doubled(data, file, runs):
    lines = file.read_bytes().split(b'\n')
    place = data.draw(st.integers(0, len(lines) - 1))
    return b'\n'.join([*lines[: place + 1], *lines[place:]])


def grown(data, file, runs):
    return file.read_bytes() + data.draw(st.binary(min_size=1, max_size=20))


def swapped(data, file, runs):
    "The same file of another run, or another file of this one."
    elsewhere = runs.other / file
    others = [p for p in sorted(OUT.rglob('*')) if p.is_file() and p != file]
    if elsewhere.is_file() and data.draw(st.booleans()):
        return elsewhere.read_bytes()
    return data.draw(st.sampled_from(others)).read_bytes()


def edited(data, file, runs):
    "A key is gone, or has another value: in JSON, or in one line of it."
    try:
        parts = [json.loads(file.read_bytes())]
    except ValueError:
        lines = file.read_bytes().split(b'\n')
        place = data.draw(st.integers(0, len(lines) - 1))
        try:
            parts = [json.loads(lines[place])]
        except ValueError:
            return flipped(data, file, runs)
        lines[place] = json.dumps(changed(data, parts[0], ODD_HERE)).encode()
        return b'\n'.join(lines)
    return json.dumps(changed(data, parts[0], ODD_HERE)).encode()


WAYS = (
    cut,
    emptied,
    flipped,
    doubled,
    grown,
    swapped,
    edited,
    'gone',
    'folder',
    'link',
)


def damage(data, runs):
    "Damage one file of the run in the working folder."
    files = [p for p in sorted(OUT.rglob('*')) if p.is_file()]
    files = [p for p in files if p.name != 'lock']
    file, way = data.draw(st.sampled_from(files)), data.draw(st.sampled_from(WAYS))
    if callable(way):
        file.write_bytes(way(data, file, runs))
        return
    file.unlink()
    if way == 'folder':
        file.mkdir()
    if way == 'link':
        link_to_keep(file)


# ---- what each command may do


def works(action):
    "Does it work? A `UserError` of one line is the only other thing allowed."
    try:
        action()
    except UserError as e:
        assert str(e).splitlines() == [str(e)]
        return False
    except OSError as e:
        assert e.strerror, e  # the command says it in one line
        return False
    return True


def assert_right(runs):
    "All files are those of the run that nobody touched; of JSON, what it says."
    now = contents(OUT, ASIDE)
    differ = [name for name, held in runs.files.items() if now.get(name) != held]
    records = [name for name in differ if name.endswith('.json') and name in now]
    same = [n for n in records if json.loads(now[n]) == json.loads(runs.files[n])]
    assert [name for name in differ if name not in same] == []
    assert sorted(set(now) - set(runs.files)) == []


@given(data=st.data())
@property_of(150)
def test_a_damaged_file_is_named_or_made_again(make, finished, tmp_path_factory, data):
    case = tmp_path_factory.mktemp('case')
    half = data.draw(st.booleans(), label='half finished')
    shutil.copytree((finished.half if half else finished.whole) / OUT, case / OUT)
    (case / 'outside').mkdir()
    (case / 'outside' / 'keep.txt').write_text('mine')

    with at(case):
        damage(data, finished)
        row = json.loads(finished.files['metadata.jsonl'].split(b'\n')[0])
        works(lambda: status(OUT))
        works(lambda: status(OUT, verify=True))
        loaded = works(lambda: load_synthetic(OUT))
        works(lambda: load_concepts(OUT))
        works(lambda: remake(make.pipe, OUT, row['file_name']))
        again = works(lambda: make())
        if again:
            assert_right(finished)
            assert status(OUT, verify=True)['damaged'] == {}
        elif loaded and not half:
            made = np.asarray(Image.open(OUT / row['file_name']))
            assert made.shape == (8, 8, 3)

    assert [p.name for p in (case / 'outside').iterdir()] == ['keep.txt']
    assert (case / 'outside' / 'keep.txt').read_text() == 'mine'
    shutil.rmtree(case)
