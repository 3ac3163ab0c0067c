"Each part of the model has its own room in memory, and waits where it is not in the way."

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import small_models as models
from small_models import TREES

from diffii.base.files import UserError
from diffii.base.pipeline import SEPARATE_MEMORY, Pipeline, load_pipeline
from diffii.base.settings import SamplingSettings
from diffii.method.concepts import named_concepts
from diffii.method.learning import learn_concepts
from diffii.method.synthesis import make_plan
from diffii.run.runs import make_or_redraw

import torch


@pytest.fixture
def pipe():
    "A small model of the kind of SD 1.x."
    return models.load(models.checkpoint('sd1'), batch_size=8)


def allow(monkeypatch, network, method, images):
    "Let a method of a network take this many images at once; returns what was tried."
    original, tried = getattr(network, method), []

    def limited(x, *args, **kwargs):
        tried.append(len(x))
        if len(x) > images:
            raise torch.cuda.OutOfMemoryError
        return original(x, *args, **kwargs)

    monkeypatch.setattr(network, method, limited)
    return tried


# ---- room


@pytest.mark.filterwarnings('ignore:memory ran out')
def test_an_autoencoder_that_runs_out_leaves_the_unet_its_batch(pipe, monkeypatch):
    tried = allow(monkeypatch, pipe.vae, 'decode', 2)

    images = pipe.decode_latents(models.noise(8))

    assert (len(images), tried) == (8, [8, 4, 2, 2, 2, 2])
    assert (pipe.micro_batch, pipe.vae_batch) == (8, 2)
    assert pipe.smaller_parts() == dict(vae_batch=2)


@pytest.mark.filterwarnings('ignore:memory ran out')
def test_a_unet_that_runs_out_leaves_the_autoencoder_its_batch(pipe, monkeypatch):
    tried = allow(monkeypatch, pipe.vae, 'encode', 8)

    with pytest.raises(UserError, match='one image at a time'):
        pipe.in_parts(out_of_memory, 8)
    pipe.encode_images(list(TREES.images) * 2)

    assert tried == [8]


def out_of_memory(part):
    raise torch.cuda.OutOfMemoryError


def test_an_autoencoder_without_room_says_what_helps_it(pipe, monkeypatch):
    allow(monkeypatch, pipe.vae, 'decode', 0)

    with pytest.raises(UserError, match='autoencoder.*--vae-tiling'):
        pipe.decode_latents(models.noise(1))


def test_the_batch_of_the_autoencoder_is_a_setting(monkeypatch):
    pipe = models.load(models.checkpoint('sd1'), batch_size=8, vae_batch=3)
    tried = allow(monkeypatch, pipe.vae, 'decode', 8)

    pipe.decode_latents(models.noise(8))

    assert (pipe.micro_batch, tried) == (8, [3, 3, 2])


def planned(pipe, n):
    "Rows of `n` images of one batch, from pure noise."
    settings = SamplingSettings(
        interpolation='none', split_ratio=0.0, steps=2, expansion=n // 2
    )
    return make_plan(TREES.classes, None, [], settings, (1, 1), pipe.model, 0, 8)


def made(pipe, rows):
    "The images of rows and the rows that are not as planned."
    concepts = named_concepts(pipe, TREES)
    return make_or_redraw(pipe, concepts, None, rows, redraw=None)


@pytest.mark.filterwarnings('ignore:memory ran out')
def test_rows_remember_the_parts_of_the_autoencoder(pipe, monkeypatch):
    rows = planned(pipe, 8)
    with monkeypatch.context() as patch:
        allow(patch, pipe.vae, 'decode', 2)
        images, unplanned = made(pipe, rows)
    again = models.load(models.checkpoint('sd1'), batch_size=8)
    tried = allow(monkeypatch, again.vae, 'decode', 8)

    same, _ = made(again, unplanned)

    assert [row['vae_batch'] for row in unplanned] == [2] * 8
    assert [row['micro_batch'] for row in unplanned] == [None] * 8
    assert tried == [2, 2, 2, 2]
    assert [im.tobytes() for im in same] == [im.tobytes() for im in images]


# ---- tiles


def test_the_autoencoder_works_in_tiles_where_it_is_asked_to():
    tiled = models.load(models.checkpoint('sd1'), vae_tiling=True)

    assert tiled.vae.use_tiling
    assert not models.loaded('sd1').vae.use_tiling


# ---- what waits


class Network:
    "A network that knows where it is."

    def __init__(self):
        self.place, self.moves = 'gpu', []

    def to(self, place):
        self.place = place
        self.moves.append(place)


@pytest.fixture
def on_gpu(monkeypatch):
    "A pipeline of parts that only say where they are."
    names = ('vae', 'text_encoder', 'text_encoder_2')
    parts = SimpleNamespace(**{name: Network() for name in names}, unet=Network())
    monkeypatch.setattr(Pipeline, 'device', 'gpu')
    pipe = Pipeline(parts, 'none', 32, offload=True)
    pipe.rest()
    return pipe


def places(pipe):
    return {name: network.place for name, network in vars(pipe.pipe).items()}


def test_all_but_the_unet_waits_on_the_cpu(on_gpu):
    waiting = places(on_gpu)

    assert waiting.pop('unet') == 'gpu'
    assert set(waiting.values()) == {'cpu'}


def test_a_part_is_on_the_device_while_it_works(on_gpu):
    with on_gpu.at_work('text'):
        working = places(on_gpu)

    assert (working['text_encoder'], working['text_encoder_2']) == ('gpu', 'gpu')
    assert working['vae'] == 'cpu'
    assert places(on_gpu)['text_encoder'] == 'cpu'


def test_a_block_within_a_block_does_not_send_a_part_away(on_gpu):
    with on_gpu.at_work('text'):
        with on_gpu.at_work('text'):
            pass
        inner = places(on_gpu)['text_encoder']

    assert inner == 'gpu'
    assert places(on_gpu)['text_encoder'] == 'cpu'


def test_an_error_sends_a_part_away(on_gpu):
    with pytest.raises(ZeroDivisionError), on_gpu.at_work('vae'):
        raise ZeroDivisionError

    assert places(on_gpu)['vae'] == 'cpu'


def test_nothing_moves_where_nothing_is_offloaded(on_gpu):
    on_gpu.offload = False
    before = len(on_gpu.pipe.vae.moves)

    with on_gpu.at_work('vae'):
        pass

    assert len(on_gpu.pipe.vae.moves) == before


def test_the_cpu_offloads_nothing():
    pipe = load_pipeline('tiny', device='cpu', offload=True)

    assert not pipe.offload
    assert 'cpu' not in SEPARATE_MEMORY


@contextmanager
def watched(monkeypatch, when):
    "A dict of what was at work when each of some methods was called."
    seen = {}
    for name, (owner, method, pipe) in when.items():
        original = getattr(owner, method)

        def call(*args, _name=name, _original=original, _pipe=pipe, **kwargs):
            working = {part for part, count in _pipe.working.items() if count}
            seen.setdefault(_name, []).append(working)
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, method, call)
    yield seen


def calls_of(pipe, of_vae):
    "The calls of the parts of a model; of the autoencoder those of one method."
    return dict(
        unet=(pipe.unet, 'forward', pipe),
        text=(pipe.pipe.text_encoder, 'forward', pipe),
        vae=(pipe.vae, of_vae, pipe),
    )


def test_in_learning_text_encoders_work_and_the_autoencoder_rests(pipe, monkeypatch):
    with watched(monkeypatch, calls_of(pipe, 'encode')) as seen:
        learn_concepts(pipe, TREES, models.short_learning())

    assert all(working == {'text'} for working in seen['unet'] + seen['text'])
    assert seen['vae'] and all(working == {'vae'} for working in seen['vae'])


def test_in_sampling_the_unet_works_alone(pipe, monkeypatch):
    with watched(monkeypatch, calls_of(pipe, 'decode')) as seen:
        made(pipe, planned(pipe, 8))

    for part in ('unet', 'text', 'vae'):
        assert seen[part] and all(working == {part} for working in seen[part])
