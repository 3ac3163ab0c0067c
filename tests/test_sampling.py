"Sampling: grids of timesteps, solver steps, interpolation, and two-stage denoising."

import math

import pytest

from diffii.base.files import UserError
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import FAST, SamplingSettings
from diffii.method.denoising import denoising_steps, n_suffixed, two_stage_denoise
from diffii.method.diffusion import ddim_grid, ddim_step, dpm_step, first_step, noised
from diffii.method.interpolation import angle, draw_pairs, draw_strength, slerp

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

SPACINGS = ('leading', 'trailing', 'linspace')


@pytest.fixture(scope='module')
def model():
    "The shipped model, loaded once."
    return load_pipeline('tiny', device='cpu')


@pytest.fixture
def pipe(model):
    "The shipped model; what a test changes in its scheduler or its U-Net is put back."
    scheduler, forward = model.pipe.scheduler, model.unet.forward
    yield model
    model.pipe.scheduler, model.unet.forward = scheduler, forward
    model.micro_batch = model.batch_size


def with_scheduler(pipe, kind=DDIMScheduler, **config):
    "The pipeline with a scheduler of another kind or configuration."
    pipe.pipe.scheduler = kind.from_config({**pipe.pipe.scheduler.config, **config})
    return pipe


def normal(*keys, n=2, dtype=torch.float32):
    "Standard normal latents that depend on the keys."
    return torch.randn(n, 4, 8, 8, generator=generator('sampling', *keys)).to(dtype)


# grids


@pytest.mark.parametrize('steps', (10, 25, 50))
@pytest.mark.parametrize('spacing', SPACINGS)
@pytest.mark.parametrize('kind', (DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler))
def test_a_grid_has_the_timesteps_of_diffusers(pipe, kind, spacing, steps):
    with_scheduler(pipe, kind, timestep_spacing=spacing)

    grid = ddim_grid(pipe, steps)

    theirs = DDIMScheduler.from_config(pipe.pipe.scheduler.config)
    theirs.set_timesteps(steps)
    assert list(grid.timesteps) == theirs.timesteps.tolist()
    levels = theirs.alphas_cumprod[theirs.timesteps]
    assert torch.equal(torch.tensor(grid.abar[:-1]), levels)
    assert len(grid.abar) == steps + 1
    assert list(grid.abar) == sorted(grid.abar)


def test_the_default_grid_goes_from_961_to_1(pipe):
    grid = ddim_grid(pipe, 25)

    assert len(grid.timesteps) == 25
    assert (grid.timesteps[0], grid.timesteps[-1]) == (961, 1)


@pytest.mark.parametrize(
    'config, steps, message',
    [
        (dict(timestep_spacing='log'), 25, "timestep_spacing 'log'"),
        (dict(timestep_spacing='trailing'), 61, '--steps 61'),
        (dict(timestep_spacing='linspace'), 1, '--steps 1:'),
        (dict(timestep_spacing='leading'), 1000, '--steps 1000'),
        (dict(timestep_spacing='leading'), 0, '--steps 0'),
        (dict(timestep_spacing='leading'), 1001, '--steps 1001'),
        (
            dict(timestep_spacing='trailing', rescale_betas_zero_snr=True),
            25,
            'pure noise',
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused(pipe, config, steps, message):
    with_scheduler(pipe, **config)

    with pytest.raises(UserError, match=message):
        ddim_grid(pipe, steps)


# steps


@pytest.mark.parametrize('spacing', ('leading', 'trailing'))
def test_ten_steps_down_are_those_of_diffusers(pipe, spacing):
    with_scheduler(pipe, timestep_spacing=spacing)
    scheduler = pipe.pipe.scheduler
    scheduler.set_timesteps(10)
    grid = ddim_grid(pipe, 10)

    ours = theirs = normal('start')
    for i, t in enumerate(grid.timesteps):
        eps = normal('down', i)
        ours = ddim_step(ours, eps, grid.abar[i], grid.abar[i + 1])
        theirs = scheduler.step(eps, t, theirs).prev_sample

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('spacing', ('leading', 'trailing'))
def test_ten_steps_up_are_those_of_diffusers(pipe, spacing):
    with_scheduler(pipe, timestep_spacing=spacing)
    scheduler = DDIMInverseScheduler.from_config(pipe.pipe.scheduler.config)
    scheduler.set_timesteps(10)
    grid = ddim_grid(pipe, 10)
    assert list(grid.timesteps)[::-1] == scheduler.timesteps.tolist()

    ours = theirs = normal('start')
    for i in reversed(range(10)):
        eps = normal('up', i)
        ours = ddim_step(ours, eps, grid.abar[i + 1], grid.abar[i])
        theirs = scheduler.step(eps, grid.timesteps[i], theirs).prev_sample

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize('to', (0.3, 1.0))
def test_a_dpm_step_without_memory_is_a_ddim_step(to):
    x, eps = normal('x'), normal('eps')

    ours, _ = dpm_step(x, eps, 0.1, to)

    torch.testing.assert_close(ours, ddim_step(x, eps, 0.1, to), atol=1e-5, rtol=1e-5)


def test_a_dpm_step_to_the_very_end_leaves_no_memory():
    assert dpm_step(normal('x'), normal('eps'), 0.1, 1.0)[1] is None


def test_a_dpm_step_uses_its_memory():
    x, eps = normal('x'), normal('eps')
    middle, memory = dpm_step(x, eps, 0.1, 0.3)

    same, _ = dpm_step(middle, eps, 0.3, 0.6, memory)
    other, _ = dpm_step(middle, normal('other'), 0.3, 0.6, memory)

    plain, _ = dpm_step(middle, normal('other'), 0.3, 0.6)
    assert not torch.equal(other, plain)
    torch.testing.assert_close(same, ddim_step(x, eps, 0.1, 0.6), atol=1e-4, rtol=1e-4)


def test_dpm_steps_are_those_of_diffusers():
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type='dpmsolver++',
        solver_order=2,
        beta_schedule='scaled_linear',
        beta_start=0.00085,
        beta_end=0.012,
        final_sigmas_type='sigma_min',
    )
    scheduler.set_timesteps(10)
    levels = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps]

    ours, theirs, memory = normal('x'), normal('x'), None
    for i, t in enumerate(scheduler.timesteps[:-1]):
        eps = normal('dpm', i)
        ours, memory = dpm_step(ours, eps, levels[i], levels[i + 1], memory)
        theirs = scheduler.step(eps, t, theirs).prev_sample

    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    'strength, steps, first',
    [(1.0, 25, 0), (0.5, 25, 13), (0.1, 25, 23), (0.01, 25, 24), (0.7, 1, 0)],
)
def test_sampling_begins_so_that_the_strength_is_left(strength, steps, first):
    assert first_step(strength, steps) == first


def test_noising_keeps_the_variance():
    x, eps = normal('x', n=64), normal('eps', n=64)

    for abar in (0.0, 0.2, 0.7, 1.0):
        assert abs(noised(x, eps, abar).std() - 1) < 0.02
    assert torch.equal(noised(x, eps, 1.0), x)


# interpolation


@pytest.mark.parametrize('strength', (0.0, 0.7, 3.0))
def test_a_pair_that_holds_one_latent_twice_stays_where_it_is(strength):
    a = normal('a')

    assert torch.equal(slerp(a, a, strength), a)


def test_nearly_equal_latents_give_finite_values():
    a = normal('a')

    assert slerp(a, a + 1e-5 * normal('b'), 3.0).isfinite().all()


def test_half_precision_is_computed_in_double_and_given_back():
    a, b = normal('a'), normal('b')

    got = slerp(a.half(), b.half(), 0.5)

    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), slerp(a, b, 0.5), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(mode='straight'), '--interpolation straight'),
        (dict(opposite=True), 'opposite'),
    ],
)
def test_an_interpolation_that_cannot_be_is_refused(options, message):
    a = normal('a')
    b = -a if options.pop('opposite', False) else normal('b')

    with pytest.raises(UserError, match=message):
        slerp(a, b, 0.5, **options)


@pytest.mark.parametrize('alpha', (0.01, 0.3, 1.0, 1.57, 2.5, 3.1))
@pytest.mark.parametrize('strength', (0, 0.3, 1.7, 5.0))
@pytest.mark.parametrize(
    'ratio, equal_norms, norm', [(1.0, False, 1.0), (1.3, True, 1.15)]
)
def test_equal_norms_stay_on_the_whole_circle(
    alpha, strength, ratio, equal_norms, norm
):
    a = torch.tensor([[1.0, 0.0]])
    b = ratio * torch.tensor([[math.cos(alpha), math.sin(alpha)]])

    got = slerp(a, b, strength, equal_norms=equal_norms)

    assert abs(got.norm().item() - norm) < 1e-4


def test_ends_of_arc_and_circle_are_the_latents():
    a, b = normal('a'), normal('b')
    turn = 2 * math.pi / angle(a, b)

    for got, want in [
        (slerp(a, b, 0.0, 'inward'), a),
        (slerp(a, b, 1.0, 'inward'), b),
        (slerp(a, b, 0.0), a),
        (slerp(a, b, turn), a),
        (slerp(a, b, turn - 1), b),
    ]:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_pairs_come_once_before_one_comes_again():
    pairs = draw_pairs(4, 30, generator(0))

    assert len(pairs) == 30
    assert all(a != b and 0 <= a < 4 and 0 <= b < 4 for a, b in pairs)
    assert len(set(pairs[:12])) == len(set(pairs[12:24])) == 12


def test_pairs_depend_on_the_generator_alone():
    assert draw_pairs(4, 30, generator(0)) == draw_pairs(4, 30, generator(0))
    assert draw_pairs(4, 30, generator(0)) != draw_pairs(4, 30, generator(1))


def test_pairs_are_of_two_images():
    got = set(draw_pairs(4, 30, generator(0), ['x', 'x', 'y', 'y']))

    assert got == {(a, b) for a in range(4) for b in range(4) if (a < 2) != (b < 2)}


def test_inversions_of_a_single_image_make_pairs_with_each_other():
    assert len(set(draw_pairs(3, 9, generator(0), ['x'] * 3))) == 6


def test_a_large_category_has_different_pairs_of_two_images():
    images = [i // 4 for i in range(3000)]

    pairs = draw_pairs(3000, 500, generator(0), images)

    assert len(set(pairs)) == 500
    assert all(images[a] != images[b] for a, b in pairs)


def test_one_inversion_has_no_pair():
    with pytest.raises(UserError, match='two inversions'):
        draw_pairs(1, 3, generator(0))


@pytest.mark.parametrize('mode, most', [('circle', 2 * math.pi / 1.5), ('inward', 1.0)])
def test_strengths_are_even_over_their_range(mode, most):
    got = torch.tensor([draw_strength(1.5, generator(i), mode) for i in range(2000)])

    assert 0 <= got.min() and most * 0.99 < got.max() <= most
    assert abs(got.mean() - most / 2) < 0.03 * most


# denoising in two stages

PROMPT = 'a photo of a bird'
SUFFIXES = (
    'flying over water.',
    'standing on a tree branch.',
    'swimming in the water.',
)


@pytest.fixture
def denoise(pipe):
    "Denoise three noises under three suffixes, in ten steps; options are settings."
    plain = pipe.encode_prompts([PROMPT] * 3)
    suffixed = pipe.encode_prompts([f'{PROMPT} {suffix}' for suffix in SUFFIXES])

    def _denoise(images=slice(0, 3), plain=plain, suffixed=suffixed, **options):
        options = {'split_ratio': 0.3, 'guidance_scale': 3.0, 'steps': 10, **options}
        noises = normal('denoise', n=3)[images]
        rows = plain[images], suffixed and suffixed[images]
        return two_stage_denoise(pipe, noises, *rows, SamplingSettings(**options))

    _denoise.plain, _denoise.suffixed = plain, suffixed
    return _denoise


@pytest.fixture
def calls(pipe):
    "The number of latents in each call of the U-Net so far."
    sizes, forward = [], pipe.unet.forward

    def counted(x, *args, **options):
        sizes.append(len(x))
        return forward(x, *args, **options)

    pipe.unet.forward = counted
    return sizes


@pytest.mark.parametrize(
    'ratio, steps, count', [(0, 25, 0), (0.1, 25, 2), (0.3, 25, 8), (1, 25, 25)]
)
def test_the_first_stage_has_its_part_of_the_steps(ratio, steps, count):
    assert n_suffixed(ratio, steps) == count


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(split_ratio=1.5), '--split-ratio 1.5'),
        (dict(guided=(0.5, 0.2)), '--guided'),
        (dict(solver='euler'), '--solver euler'),
        (dict(suffixed=None), 'needs suffixed'),
    ],
)
def test_denoising_that_cannot_be_is_refused(denoise, options, message):
    with pytest.raises(UserError, match=message):
        denoise(**options)


def test_one_prompt_gives_the_latents_of_diffusers(pipe, denoise):
    ours = denoise(suffixed=None, split_ratio=0, guidance_scale=5.0)

    with_scheduler(pipe)
    options = dict(guidance_scale=5.0, num_inference_steps=10, output_type='latent')
    theirs = pipe.pipe([PROMPT] * 3, latents=normal('denoise', n=3), **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_without_a_first_stage_the_suffix_has_no_effect(denoise):
    assert torch.equal(denoise(split_ratio=0), denoise(split_ratio=0, suffixed=None))


def test_without_a_second_stage_the_plain_prompt_has_no_effect(denoise):
    whole = denoise(split_ratio=1)

    alone = denoise(plain=denoise.suffixed, suffixed=None, split_ratio=0)

    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


def test_an_image_does_not_depend_on_the_prompts_of_its_neighbours(denoise):
    torch.testing.assert_close(
        denoise()[1:2], denoise(images=slice(1, 2)), atol=1e-3, rtol=0
    )


def test_no_latents_give_no_latents(denoise):
    assert denoise(images=slice(0, 0)).shape == (0, 4, 8, 8)


def test_guidance_on_the_whole_trajectory_is_the_default(denoise):
    assert torch.equal(denoise(), denoise(guided=(0.0, 1.0)))


@pytest.mark.parametrize(
    'options, count',
    [
        (dict(), 50),
        (dict(guidance_scale=1.0), 25),
        (dict(guided=(0.0, 0.6)), 25 + 15),
        (dict(stride=2), 2 * 13),
        (dict(stride=2, solver='dpm++'), 2 * 13),
        (FAST, 14),
    ],
)
def test_settings_save_calls_of_the_network(denoise, calls, options, count):
    denoise(steps=25, **options)

    assert sum(calls) == 3 * count


def test_the_trajectory_ends_with_the_clean_latents(pipe, denoise):
    settings = SamplingSettings(split_ratio=0.3, guidance_scale=3, steps=10, stride=3)
    empty = pipe.encode_prompts([''] * 3)
    rows = denoise.plain, denoise.suffixed, empty
    with torch.inference_mode():
        film = list(denoising_steps(pipe, normal('denoise', n=3), *rows, settings))

    assert [step for step, _ in film] == [0, 3, 6, 9, 10]
    torch.testing.assert_close(film[-1][1], denoise(stride=3), atol=1e-5, rtol=0)


@pytest.mark.parametrize('most, tried', [(4, [6, 2]), (2, [6, 2]), (1, [6, 2, 1])])
def test_a_small_memory_changes_the_size_of_the_calls_alone(pipe, denoise, most, tried):
    want = denoise()
    sizes, forward = [], pipe.unet.forward

    def small(x, *args, **options):
        sizes.append(len(x))
        if len(x) > most:
            raise torch.cuda.OutOfMemoryError()
        return forward(x, *args, **options)

    pipe.unet.forward = small
    with pytest.warns(UserWarning, match='memory ran out') as warned:
        got = denoise()

    torch.testing.assert_close(got, want, atol=1e-3, rtol=0)
    assert list(dict.fromkeys(sizes)) == tried
    assert len(warned) == 1


def test_a_memory_too_small_for_one_image_is_an_error(pipe, denoise):
    def full(*args, **options):
        raise torch.cuda.OutOfMemoryError()

    pipe.unet.forward = full
    with pytest.raises(UserError, match='--dtype float16'):
        denoise()
