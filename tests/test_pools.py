"The inversion pool on disk: read again, gone on with, refused, shared by processes."

from dataclasses import replace
from types import SimpleNamespace

import pytest

from diffii.base.files import UserError
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import ConceptSettings, InversionSettings
from diffii.data.aviary import UNSEEN, aviary_set
from diffii.method.concepts import named_concepts
from diffii.method.learning import learn_concepts
from diffii.method.inversion import invert_images
from diffii.run import pools
from diffii.run.pools import build_pool, load_pool, save_pool

import torch

SETTINGS = InversionSettings(steps=3, forward_steps=1)
pytestmark = pytest.mark.filterwarnings('ignore:the inversions')


class Stop(Exception):
    "What stands in for Ctrl-C."


@pytest.fixture(scope='module')
def pipe():
    "The shipped model; four categories of three images make two batches."
    return load_pipeline('tiny', device='cpu', batch_size=6)


@pytest.fixture(scope='module')
def birds():
    return aviary_set(UNSEEN[:4], n=3)


@pytest.fixture(scope='module')
def concepts(pipe, birds):
    return named_concepts(pipe, birds)


@pytest.fixture
def build(pipe, birds, concepts, tmp_path):
    "Build the pool of the birds in this test's folder."

    def _build(folder=tmp_path, images=birds, settings=SETTINGS, progress=None):
        with concepts.attached(pipe):
            return build_pool(pipe, images, concepts, folder, settings, progress)

    return _build


@pytest.fixture(scope='module')
def in_memory(pipe, birds, concepts):
    with concepts.attached(pipe):
        return invert_images(pipe, birds, concepts, SETTINGS)


def assert_same(one, other):
    "Two pools are the same to the bit."
    assert (one.classes, one.names) == (other.classes, other.names)
    assert one.settings == other.settings
    assert all(torch.equal(a, b) for a, b in zip(one.latents, other.latents))


def files_of(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def test_a_pool_on_disk_is_that_in_memory(build, in_memory):
    assert_same(build(), in_memory)


def test_a_category_has_a_file(build, birds, tmp_path):
    build()

    assert sorted(files_of(tmp_path)) == [f'{c}.safetensors' for c in birds.classes]


def test_what_is_there_is_read(build, tmp_path):
    first, seen = build(), []
    times = {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}

    again = build(progress=lambda *now: seen.append(now))

    assert_same(first, again)
    assert seen == [(12, 12)]
    assert times == {f: f.stat().st_mtime_ns for f in tmp_path.iterdir()}


def test_a_missing_category_is_made_again_with_its_batch(build, birds, tmp_path):
    first, seen = build(), []
    (tmp_path / f'{birds.classes[1]}.safetensors').unlink()

    again = build(progress=lambda *now: seen.append(now))

    assert_same(first, again)
    assert seen == [(6, 12), (12, 12)]


def test_an_interrupted_pool_goes_on(build, in_memory, tmp_path):
    def stop(done, every):
        if done:
            raise Stop

    with pytest.raises(Stop):
        build(progress=stop)
    assert len(files_of(tmp_path)) == 2

    seen = []
    assert_same(build(progress=lambda *now: seen.append(now)), in_memory)
    assert seen == [(6, 12), (12, 12)]


def change_picture(images):
    changed = (images.images[0].rotate(90), *images.images[1:])
    return replace(images, images=changed)


def change_name(images):
    return replace(images, names=('other', *images.names[1:]))


@pytest.mark.parametrize(
    'change, named',
    [(change_picture, 'pixels'), (change_name, 'names')],
)
def test_other_images_are_noticed(build, birds, change, named):
    build()

    with pytest.raises(
        UserError, match=f'{birds.classes[0]}.*other {named}; delete it'
    ):
        build(images=change(birds))


def test_other_settings_are_noticed(build):
    build()

    with pytest.raises(UserError, match='other settings; delete it'):
        build(settings=replace(SETTINGS, steps=4))


def test_other_concepts_are_noticed(build, pipe, birds, tmp_path):
    build()
    settings = ConceptSettings.of(pipe, 'bird', steps=1, batch_size=2)
    other = learn_concepts(pipe, birds, settings)

    with pytest.raises(UserError, match='other concepts'), other.attached(pipe):
        build_pool(pipe, birds, other, tmp_path, SETTINGS)


def test_a_category_without_a_pair_is_refused_before_anything_is_written(
    build, birds, tmp_path
):
    lonely = birds.subset([0, 1, 2, 3, 6, 7, 9, 10])

    with pytest.raises(UserError, match='one image makes no pair'):
        build(tmp_path / 'new', lonely, replace(SETTINGS, views=False))
    assert not (tmp_path / 'new').exists()


def test_a_saved_pool_has_the_files_of_a_built_one(
    build, in_memory, birds, concepts, tmp_path
):
    build(tmp_path / 'built')

    save_pool(in_memory, tmp_path / 'saved', birds, concepts)

    assert files_of(tmp_path / 'saved') == files_of(tmp_path / 'built')


def test_a_pool_is_loaded_with_all_it_had(build, in_memory, birds, tmp_path):
    build()

    assert_same(load_pool(tmp_path, birds.classes), in_memory)


def test_names_of_categories_become_safe_file_names(pipe, birds, build, tmp_path):
    names = ('../../up', '<c0> (best:1.5)', '花 oak', 'COM1')
    odd = replace(birds, classes=names)

    pool = build(tmp_path / 'odd', odd)

    assert len(files_of(tmp_path / 'odd')) == 4
    assert [p.name for p in tmp_path.iterdir()] == ['odd']
    assert_same(load_pool(tmp_path / 'odd', names), pool)


def test_processes_share_the_batches(build, in_memory, monkeypatch, tmp_path):
    def process(index, wait):
        about = dict(process_index=index, num_processes=2, wait_for_everyone=wait)
        monkeypatch.setattr(pools, 'processes', lambda: SimpleNamespace(**about))

    def stop():
        raise Stop

    # the first process makes its share and waits; there the second one comes in
    process(0, wait=stop)
    with pytest.raises(Stop):
        build()
    assert len(files_of(tmp_path)) == 2

    process(1, wait=lambda: None)
    assert_same(build(), in_memory)
