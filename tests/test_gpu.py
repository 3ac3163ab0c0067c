"""What needs a CUDA device. Models at their true size, and the table of images per second,
are in tools/gpu_check.py."""

import numpy as np
import pytest
import small_models as models
from small_models import TREES

from diffii.base.checkpoints import best_precision
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import seeded
from diffii.base.settings import SamplingSettings
from diffii.method.learning import learn_concepts
from diffii.method.denoising import two_stage_denoise

import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here'),
]


def on_gpu(kind='sd1', **settings):
    return load_pipeline(str(models.checkpoint(kind)), device='cuda', **settings)


def sampled(pipe, n=4):
    "Images of pure noise under one prompt."
    settings = SamplingSettings(split_ratio=0.0, steps=5)
    plain = pipe.encode_prompts(['a tree'] * n)
    made = two_stage_denoise(pipe, models.noise(n), plain, settings=settings)
    return [np.asarray(image) for image in pipe.decode_latents(made)]


def test_the_default_precision_is_the_devices():
    assert on_gpu().dtype_name == best_precision('cuda')


@pytest.mark.parametrize('kind', models.KINDS)
def test_concepts_are_learned_in_half_precision(kind):
    pipe = on_gpu(kind, dtype='float16')

    got = learn_concepts(pipe, TREES, models.short_learning())

    assert all(np.isfinite(got.log))


def test_only_the_unet_stays_on_the_device():
    pipe = on_gpu()

    parts = [pipe.pipe.text_encoder, pipe.vae, pipe.unet]
    places = [next(p.parameters()).device.type for p in parts]

    assert places == ['cpu', 'cpu', 'cuda']


def test_the_same_batch_comes_out_the_same_twice():
    pipe = on_gpu()

    for first, second in zip(sampled(pipe), sampled(pipe)):
        assert np.array_equal(first, second)


def test_in_32_bits_the_images_are_those_of_the_cpu():
    here = sampled(models.load(models.checkpoint('sd1')))
    there = sampled(on_gpu(dtype='float32'))

    for a, b in zip(here, there):
        assert np.abs(a.astype(int) - b).max() <= 3


def test_a_block_leaves_the_generators_of_the_device_as_they_were():
    before = torch.cuda.get_rng_state()

    with seeded(7, 'cuda'):
        first = torch.rand(3, device='cuda')
    with seeded(7, 'cuda'):
        second = torch.rand(3, device='cuda')

    assert torch.equal(first, second)
    assert torch.equal(before, torch.cuda.get_rng_state())


def test_learning_saves_memory_by_itself_where_the_device_is_full():
    pipe = on_gpu(dtype='float16')
    forward, images = pipe.unet.forward, []

    def limited(x, *args, **kwargs):
        images.append(len(x))
        if len(images) == 1:
            torch.empty(2**50, device='cuda')  # what CUDA itself says
        return forward(x, *args, **kwargs)

    pipe.unet.forward = limited
    with pytest.warns(UserWarning, match='memory ran out in concept learning'):
        learn_concepts(pipe, TREES, models.short_learning())

    assert len(images) > 1
