"Inversion: steps that undo sampling, what a pool holds, and what is refused."

from dataclasses import replace

import numpy as np
import pytest

from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.pipeline import Pipeline, load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import InversionSettings, SamplingSettings
from diffii.data.aviary import UNSEEN, aviary_set
from diffii.data.digits import digits_set
from diffii.method.concepts import named_concepts
from diffii.method.denoising import two_stage_denoise
from diffii.method.diffusion import ddim_grid, ddim_step
from diffii.method.inversion import (
    InversionPool,
    check_pairs,
    ddim_invert,
    extra_views,
    image_of,
    images_to_invert,
    in_groups,
    invert_images,
    latent_stats,
)

import torch
from diffusers import DDIMInverseScheduler

PLAIN = InversionSettings(steps=4)
FORWARD = InversionSettings(steps=4, forward_steps=1)


@pytest.fixture(scope='module')
def model():
    "The shipped model, loaded once."
    return load_pipeline('tiny', device='cpu')


@pytest.fixture
def pipe(model):
    "The shipped model; what a test changes in its scheduler or micro-batch is put back."
    scheduler = model.pipe.scheduler
    yield model
    model.pipe.scheduler = scheduler
    model.micro_batch = model.batch_size


@pytest.fixture(scope='module')
def birds():
    "Three images of one species, and a single one of another."
    return aviary_set(UNSEEN[:2], n=3).subset(range(4))


@pytest.fixture(scope='module')
def concepts(model, birds):
    return named_concepts(model, birds)


def with_spacing(pipe, spacing):
    scheduler = pipe.pipe.scheduler
    config = {**scheduler.config, 'timestep_spacing': spacing}
    pipe.pipe.scheduler = scheduler.from_config(config)
    return pipe


def normal(*keys, n=2):
    return torch.randn(n, 4, 8, 8, generator=generator('test', *keys))


class MadeUp(Pipeline):
    "A pipeline whose prediction depends on the timestep alone."

    def predict_eps(self, x, t, cond):
        self.asked = [*getattr(self, 'asked', []), t]
        return normal('made up', t, n=len(x))


# one batch


@pytest.mark.parametrize('spacing', ('leading', 'trailing', 'linspace'))
def test_sampling_leads_back_where_the_prediction_stays_the_same(pipe, spacing):
    made_up = MadeUp(with_spacing(pipe, spacing).pipe, 'made up', 32)
    grid, x = ddim_grid(pipe, 25), normal('image')

    back = ddim_invert(made_up, x, [None] * 2)
    asked = made_up.asked
    for j, t in enumerate(grid.timesteps):
        eps = made_up.predict_eps(back, t, None)
        back = ddim_step(back, eps, grid.abar[j], grid.abar[j + 1])

    assert torch.allclose(back, x, atol=1e-3)
    assert asked == list(grid.timesteps)[::-1]


@pytest.mark.parametrize('spacing', ('leading', 'trailing'))
def test_inversion_is_that_of_diffusers(pipe, spacing):
    with_spacing(pipe, spacing)
    x, cond = normal('image'), pipe.encode_prompts(['a photo of a bird'] * 2)
    theirs = DDIMInverseScheduler.from_config(pipe.pipe.scheduler.config)
    theirs.set_timesteps(10)

    ours = ddim_invert(pipe, x, cond, InversionSettings(steps=10))

    timesteps = ddim_grid(pipe, 10).timesteps
    assert int(theirs.timesteps[0]) == timesteps[-1]
    assert int(theirs.timesteps[-1]) == timesteps[0]
    with torch.inference_mode():
        for t in theirs.timesteps:
            x = theirs.step(pipe.predict_eps(x, t, cond), t, x).prev_sample
    assert torch.allclose(ours, x, atol=1e-3)


def test_the_recommended_inversion_is_gaussian_and_leads_back(pipe):
    digits, birds = digits_set('pool'), aviary_set(n=3)
    images = [digits.open(i) for i in range(6)]
    images += [birds.open(i) for i in range(0, 36, 6)]
    prompts = ['a photo of a digit'] * 6 + ['a photo of a bird'] * 6
    x, cond = pipe.encode_images(images), pipe.encode_prompts(prompts)
    settings = InversionSettings.of(pipe)

    z = ddim_invert(pipe, x, cond, settings, normal('forward', n=12))

    sampling = SamplingSettings(split_ratio=0, guidance_scale=1)
    back = two_stage_denoise(pipe, z, cond, settings=sampling)
    error = (back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)
    assert abs(latent_stats(z)['std'].mean() - 1) < 0.1
    assert error.mean() < 0.15


def test_an_image_does_not_depend_on_its_batch_but_for_last_bits(pipe):
    x, noise = normal('image', n=3), normal('forward', n=3)
    cond = pipe.encode_prompts(['a bird', 'a digit', 'a bird on a branch.'])

    together = ddim_invert(pipe, x, cond, FORWARD, noise)
    alone = ddim_invert(pipe, x[1:2], cond[1:2], FORWARD, noise[1:2])
    pipe.micro_batch = 1
    one_by_one = ddim_invert(pipe, x, cond, FORWARD, noise)

    assert torch.allclose(together[1:2], alone, atol=1e-3)
    assert torch.allclose(together, one_by_one, atol=1e-3)


def test_guidance_warns_since_it_does_not_lead_back(pipe):
    x, cond = normal('image'), pipe.encode_prompts(['a bird'] * 2)
    empty = pipe.encode_prompts([''] * 2)

    with pytest.warns(UserWarning, match='guidance 2.0 does not lead back'):
        ddim_invert(pipe, x, cond, replace(PLAIN, guidance_scale=2), negative=empty)


@pytest.mark.parametrize(
    'settings, message',
    [
        (FORWARD, 'forward_steps needs noise'),
        (replace(PLAIN, guidance_scale=2), 'guidance needs the unconditional prompt'),
    ],
)
def test_missing_inputs_are_named(pipe, settings, message):
    cond = pipe.encode_prompts(['a bird'] * 2)

    with pytest.raises(UserError, match=message):
        ddim_invert(pipe, normal('image'), cond, settings)


def test_not_all_steps_can_be_forward_steps():
    with pytest.raises(UserError, match='--forward-steps 25: give 0 to 24'):
        InversionSettings(forward_steps=25)


# how Gaussian it is


def test_statistics_of_gaussian_noise():
    found = latent_stats(normal('statistics', n=200))

    assert found['norm'].shape == (200,)
    assert abs(found['norm'].mean() - 1) < 0.02
    assert abs(found['std'].mean() - 1) < 0.02
    assert abs(found['kurtosis'].mean() - 3) < 0.1
    assert abs(found['neighbour'].mean()) < 0.05


def test_smooth_latents_have_correlated_neighbours():
    smooth = torch.nn.functional.avg_pool2d(normal('smooth', n=50), 3, 1, 1)

    assert latent_stats(smooth)['neighbour'].mean() > 0.4


@pytest.mark.parametrize(
    'settings, advice',
    [
        (InversionSettings(), 'Try --forward-steps 2 --fixed-point-iters 2'),
        (InversionSettings(forward_steps=2), 'Try --forward-steps 2'),
        (
            InversionSettings(forward_steps=2, fixed_point_iters=2),
            'another --model',
        ),
    ],
)
def test_a_pool_unlike_noise_warns_with_advice(settings, advice):
    pool = InversionPool(('a',), [3 * normal('wide')], [['x', 'y']], settings)

    with pytest.warns(UserWarning, match=f'standard deviation of .*{advice}'):
        pool.check()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(
    'latents, settings',
    [(normal('noise'), PLAIN), (3 * normal('image'), InversionSettings(steps=0))],
)
def test_noise_and_latents_of_images_do_not_warn(latents, settings):
    InversionPool(('a',), [latents], [['x', 'y']], settings).check()


# what is inverted


@pytest.mark.parametrize(
    'name, image',
    [
        ('x', 'x'),
        ('x@1', 'x'),
        ('x@12', 'x'),
        ('12', '12'),
        ('me@home', 'me@home'),
        ('me@home@2', 'me@home'),
        ('x#mirror', 'x#mirror'),
        ('x#mirror@1', 'x#mirror'),
    ],
)
def test_the_image_behind_a_name(name, image):
    assert image_of(name) == image


@pytest.mark.parametrize('flip, names', [(True, 3), (False, 2)])
def test_views_have_the_size_of_the_image(birds, flip, names):
    image = birds.open(0)

    views = extra_views(image, flip)

    assert len(views) == names
    assert {view.size for view in views.values()} == {image.size}
    assert all(np.any(np.asarray(v) != np.asarray(image)) for v in views.values())


def test_a_single_image_gets_views_and_others_do_not(model, birds):
    names = [images_to_invert(birds, k, PLAIN, model.fit).names for k in (0, 1)]

    assert names[0] == list(birds.names[:3])
    views = ['', '#crop_top_left', '#crop_bottom_right', '#mirror']
    assert names[1] == [birds.names[3] + view for view in views]


def test_a_single_image_has_no_mirror_where_mirroring_changes_the_category(
    model, birds
):
    settings = replace(PLAIN, flip=False)

    assert len(images_to_invert(birds, 1, settings, model.fit)) == 3


def test_latents_of_images_need_no_views(model, birds):
    settings = InversionSettings(steps=0)

    assert len(images_to_invert(birds, 1, settings, model.fit)) == 1


def test_names_and_images_are_repeated_together(model, birds):
    settings = replace(FORWARD, per_image=3)

    found = images_to_invert(birds, 0, settings, model.fit)

    own = list(birds.names[:3])
    assert found.names == own + [n + '@1' for n in own] + [n + '@2' for n in own]
    fitted = found.fitted()
    assert fitted == fitted[:3] * 3
    assert found.digests == [birds.digest(i) for i in range(3)] * 3


def test_a_category_without_a_pair_is_refused(birds):
    with pytest.raises(UserError, match=f'{birds.classes[1]}: one image makes no pair'):
        check_pairs(birds, replace(PLAIN, views=False))


@pytest.mark.parametrize(
    'settings', (PLAIN, InversionSettings(steps=0, views=False), InversionSettings())
)
def test_views_or_no_steps_need_no_pair(birds, settings):
    check_pairs(birds, settings)


@pytest.mark.parametrize(
    'sizes, batch_size, groups',
    [
        ([], 8, []),
        ([3, 4, 2, 6, 1], 8, [[0, 1], [2, 3], [4]]),
        ([20, 1, 1], 8, [[0], [1, 2]]),
        ([1, 20, 1], 8, [[0], [1], [2]]),
        ([0, 8, 1], 8, [[0, 1], [2]]),
    ],
)
def test_categories_are_gathered_into_batches(sizes, batch_size, groups):
    assert in_groups(sizes, batch_size) == groups


# pools


def invert(pipe, images, concepts, settings, progress=None):
    with concepts.attached(pipe):
        return invert_images(pipe, images, concepts, settings, progress)


@pytest.mark.filterwarnings('ignore:the inversions')
def test_a_pool_holds_every_category(pipe, birds, concepts):
    pool = invert(pipe, birds, concepts, FORWARD)

    assert pool.classes == birds.classes
    assert [z.shape for z in pool.latents] == [(3, 4, 8, 8), (4, 4, 8, 8)]
    assert [len(n) for n in pool.names] == [3, 4]
    assert (len(pool), pool.settings) == (7, FORWARD)


@pytest.mark.filterwarnings('ignore:the inversions')
def test_a_pool_is_inverted_under_the_prompts_and_noises_of_its_names(
    pipe, birds, concepts
):
    pool = invert(pipe, birds, concepts, FORWARD)

    prompts = [concepts.prompt(0)] * 3
    shape = pipe.latent_shape
    noise = [
        torch.randn(shape, generator=generator(0, 'invert', n)) for n in birds.names
    ]
    with concepts.attached(pipe):
        cond = pipe.encode_prompts(prompts)
        x = pipe.encode_images([birds.open(i) for i in range(3)])
        by_hand = ddim_invert(pipe, x, cond, FORWARD, torch.stack(noise[:3]))
    assert torch.allclose(pool.latents[0], by_hand, atol=1e-3)


@pytest.mark.filterwarnings('ignore:the inversions')
def test_several_inversions_differ_and_the_first_is_the_only_one(pipe, birds, concepts):
    one = invert(pipe, birds, concepts, FORWARD)
    three = invert(pipe, birds, concepts, replace(FORWARD, per_image=3))

    assert [len(n) for n in three.names] == [9, 12]
    assert {image_of(n) for n in three.names[0]} == set(one.names[0])
    assert torch.allclose(three.latents[0][:3], one.latents[0], atol=1e-3)
    assert not torch.allclose(three.latents[0][3:6], one.latents[0], atol=0.1)


@pytest.mark.filterwarnings('ignore:the inversions')
def test_another_seed_gives_other_inversions(pipe, birds, concepts):
    one = invert(pipe, birds, concepts, FORWARD)
    other = invert(pipe, birds, concepts, replace(FORWARD, noise_seed=1))

    assert not torch.allclose(one.latents[0], other.latents[0], atol=0.1)


def test_several_inversions_need_forward_steps():
    with pytest.raises(UserError, match='--inversions 2'):
        InversionSettings(per_image=2)


def test_no_steps_keep_the_latents_of_the_images(pipe, concepts, birds):
    pool = invert(pipe, birds, concepts, InversionSettings(steps=0))

    x = pipe.encode_images([birds.open(i) for i in range(4)])
    assert [len(n) for n in pool.names] == [3, 1]
    assert torch.allclose(torch.cat(pool.latents), x, atol=1e-4)


@pytest.mark.filterwarnings('ignore:the inversions')
def test_progress_counts_images_group_by_group(birds, concepts):
    small, seen = load_pipeline('tiny', device='cpu', batch_size=4), []

    invert(small, birds, concepts, FORWARD, lambda *now: seen.append(now))

    assert seen == [(0, 7), (3, 7), (7, 7)]


def test_by_default_the_model_recommends(pipe, birds, concepts):
    pair = birds.subset([0, 1])
    pair = replace(pair, classes=birds.classes[:1])
    with concepts.attached(pipe):
        pool = invert_images(pipe, pair, concepts)

    assert pool.settings == InversionSettings.of(pipe, 'bird')
    assert len(pool) == 2 * pool.settings.per_image


@pytest.mark.parametrize('steps, forward', [(25, 2), (50, 4), (5, 1), (1, 0)])
def test_recommended_forward_steps_keep_their_share(pipe, steps, forward):
    settings = InversionSettings.of(pipe, steps=steps)

    assert settings.forward_steps == forward
    assert settings.per_image == (4 if forward else 1)


def test_what_is_given_counts_as_it_is(pipe):
    assert InversionSettings.of(pipe, steps=10, forward_steps=3).forward_steps == 3


def test_digits_with_one_image_of_a_category_have_pairs_everywhere(pipe):
    few = few_shot(digits_set('pool'), 2, seed=0)[0]
    few = few.subset(range(1, len(few)))
    todo = [images_to_invert(few, k, PLAIN, pipe.fit) for k in range(10)]

    assert [len(t) for t in todo] == [4 if n == 1 else n for n in few.counts]
