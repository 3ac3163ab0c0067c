"What the package ships: the halves of the digits and the model."

import numpy as np
import pytest

# the digits


def test_the_halves_of_the_digits_are_disjoint_and_complete():
    from diffii.data.digits import load_halves

    halves = load_halves()
    base, held_out = (set(halves[h]['index']) for h in ('base', 'held_out'))
    assert not base & held_out
    assert len(base | held_out) == 1797


def test_no_scan_is_in_both_halves_under_two_numbers():
    from diffii.data.digits import load_halves

    halves = load_halves()
    base, held_out = (
        {tuple(scan.ravel()) for scan in halves[h]['images']}
        for h in ('base', 'held_out')
    )
    assert base.isdisjoint(held_out)


def test_the_cut_between_the_halves_is_the_one_the_model_was_trained_with():
    from diffii.data.digits import SPLIT_SEED, load_halves

    assert SPLIT_SEED == 20260101
    order = np.random.default_rng(20260101).permutation(1797)
    assert sorted(load_halves()['base']['index']) == sorted(order[:898])


def test_pool_validation_and_test_are_all_of_the_held_out_half():
    from diffii.data.digits import digits_set, load_halves

    parts = [set(digits_set(part).names) for part in ('pool', 'validation', 'test')]
    held_out = load_halves()['held_out']['index']
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(held_out)


# the model


@pytest.fixture(scope='module')
def checkpoint(root):
    return root / 'diffii' / 'tiny'


@pytest.fixture(scope='module')
def stable_diffusion(checkpoint):
    "The shipped model as diffusers loads it."
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(checkpoint)


def test_the_shipped_model_is_a_stable_diffusion_pipeline(stable_diffusion):
    prompt = 'a photo of a bird flying over water.'
    made = stable_diffusion(prompt, num_inference_steps=3, output_type='np').images
    assert made.shape == (1, 32, 32, 3)
    assert np.isfinite(made).all()
    assert made.std() > 0.01


def test_the_shipped_model_has_the_schedule_of_stable_diffusion(stable_diffusion):
    config = stable_diffusion.scheduler.config
    assert config.beta_schedule == 'scaled_linear'
    assert (config.beta_start, config.beta_end) == (0.00085, 0.012)


def test_the_shipped_weights_are_small_and_safe(checkpoint):
    weights = list(checkpoint.rglob('*.safetensors'))
    assert sum(file.stat().st_size for file in weights) <= 16 * 2**20
    assert not list(checkpoint.rglob('*.bin'))


def test_the_shipped_few_step_weights_belong_to_the_shipped_model(checkpoint):
    from diffii.base.pipeline import load_pipeline
    from diffii.method.few_step import open_few_step

    found = open_few_step(load_pipeline('tiny', device='cpu'), 'own')

    assert all(weight.isfinite().all() for weight in found.lora.values())
    assert (checkpoint / 'few_step.safetensors').stat().st_size <= 2 * 10**6
