"Synthesis: what a plan decides, where sampling starts, and batches that fail."

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from diffii.base.images import ImageSet
from diffii.base.methods import METHODS
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import InversionSettings, SamplingSettings
from diffii.method import synthesis
from diffii.method.concepts import named_concepts
from diffii.method.diffusion import ddim_grid, noised
from diffii.method.interpolation import angle, slerp
from diffii.method.inversion import InversionPool, image_of
from diffii.method.synthesis import (
    Planner,
    another_row,
    begins_at,
    circle_strip,
    make_batch,
    make_plan,
    settings_of,
    soft_targets,
    start_latents,
)

import torch
from PIL import Image

CLASSES = ('oak', 'elm')
NAMES = [['a', 'b', 'c'], ['d', 'e', 'f']]
SUFFIXES = ['in snow.', 'at dusk.']


def normal(*keys, n=3):
    return torch.randn(n, 4, 8, 8, generator=generator('synthesis', *keys))


@pytest.fixture(scope='module')
def pool():
    "Three made-up inversions of each of two categories."
    return InversionPool(CLASSES, [normal(k) for k in CLASSES], NAMES)


@pytest.fixture(scope='module')
def model():
    return load_pipeline('tiny', device='cpu')


@pytest.fixture
def pipe(model):
    "The shipped model; what a test changes is put back."
    yield model
    model.micro_batch, model.pipe.safety_checker = model.batch_size, None


@pytest.fixture(scope='module')
def concepts(model):
    return named_concepts(model, ImageSet((), (), CLASSES, 'tree'))


@pytest.fixture
def planned(pool):
    "Plan images of both categories."

    def _planned(
        suffixes=SUFFIXES, batch_size=10, seed=0, pool=pool, counts=(3, 3), **given
    ):
        settings = SamplingSettings(**{'expansion': 4, **given})
        about = CLASSES, pool, suffixes, settings, counts
        return make_plan(*about, 'tiny', seed, batch_size)

    return _planned


# plans


@pytest.mark.parametrize(
    'method, images',
    [(m, {'original': 0, 'real-filter': 48}.get(m, 24)) for m in METHODS],
)
def test_a_plan_has_so_many_images_for_each_real_one(planned, method, images):
    assert len(planned(method=method)) == images


def test_a_plan_follows_the_sizes_of_the_categories(planned):
    rows = planned(counts=(1, 5))

    assert [sum(r['label'] == c for r in rows) for c in CLASSES] == [4, 20]


def test_images_are_spread_evenly_where_that_is_asked_for(planned):
    rows = planned(counts=(1, 6), expansion=3, spread='even')

    assert [sum(r['label'] == c for r in rows) for c in CLASSES] == [11, 10]


def test_every_image_that_is_kept_has_as_many_candidates(planned):
    some = dict(method='real-filter', spread='even', candidates=2, expansion=1)
    rows = planned(counts=(2, 3), **some)

    assert [sum(r['label'] == c for r in rows) for c in CLASSES] == [6, 4]


def test_of_equal_categories_the_spread_changes_nothing(planned):
    assert planned(counts=(3, 3), spread='even') == planned(counts=(3, 3))


def test_pairs_are_of_different_images_and_strengths_on_the_circle(planned):
    for row in planned():
        assert len(set(row['sources'])) == 2
        assert 0 <= row['strength'] <= 2 * math.pi / row['alpha']


def test_strengths_of_the_arc_are_between_0_and_1(planned):
    assert all(0 <= r['strength'] <= 1 for r in planned(interpolation='inward'))


def test_the_angle_is_that_of_the_pair(planned, pool):
    row = planned()[13]
    a, b = (pool.latents[1][NAMES[1].index(s)][None] for s in row['sources'])

    assert row['alpha'] == angle(a, b).item()


def test_pairs_never_join_two_inversions_of_one_image(planned):
    names = [['a', 'b', 'a@1', 'b@1'], ['d', 'd#mirror', 'd@1', 'd#mirror@1']]
    pool = InversionPool(CLASSES, [normal(k, n=4) for k in CLASSES], names)

    for row in planned(pool=pool, expansion=6):
        first, second = map(image_of, row['sources'])
        assert first != second


def test_all_suffixes_are_used(planned):
    assert {r['suffix'] for r in planned()} == set(SUFFIXES)


@pytest.mark.parametrize(
    'given', [dict(split_ratio=0.0), dict(split_ratio=0.01), dict(method='diff-mix')]
)
def test_without_a_first_stage_there_is_no_suffix(planned, given):
    assert {r['suffix'] for r in planned(**given)} == {''}


def test_the_place_on_the_circle_does_not_depend_on_suffixes(planned):
    with_suffixes, without = planned(), planned(suffixes=[], split_ratio=0.0)

    assert [r['strength'] for r in with_suffixes] == [r['strength'] for r in without]


def test_a_row_does_not_depend_on_other_categories(planned, pool):
    both = planned()
    alone = InversionPool(CLASSES[1:], pool.latents[1:], pool.names[1:])
    settings = SamplingSettings(expansion=4)

    rows = make_plan(CLASSES[1:], alone, SUFFIXES, settings, (3,), 'tiny', 0, 10)

    assert [{**r, 'batch': 0} for r in rows] == [{**r, 'batch': 0} for r in both[12:]]


def test_another_seed_plans_other_images(planned):
    one, other = planned(), planned(seed=1)

    assert planned() == one
    assert all(a['strength'] != b['strength'] for a, b in zip(one, other))


@pytest.mark.parametrize('method', ('diff-ii', 'diff-mix', 'random-noise'))
def test_a_row_can_be_written_as_json(planned, method):
    row = planned(method=method)[5]

    assert json.loads(json.dumps(row)) == row
    assert settings_of(row) == replace(
        settings_of(row), method=method, guidance_scale=7.5, steps=25
    )


def test_file_names_are_unique_and_safe(planned):
    for method in ('diff-ii', 'diff-mix'):
        names = [r['file_name'] for r in planned(method=method)]
        assert len(set(names)) == 24
        assert all(name.count('/') == 2 for name in names)


def test_images_of_a_category_are_started_from_in_turn(planned):
    rows = planned(method='da-fusion')

    assert [r['sources'] for r in rows[:4]] == [['a'], ['b'], ['c'], ['a']]
    assert {r['strength'] for r in rows} == {0.25, 0.5, 0.75, 1.0}


def test_mixing_methods_follow_another_category_with_a_soft_label(planned):
    for row in planned(method='diff-mix'):
        assert row['label'] != row['source_label']
        assert row['label_weight'] == row['strength'] ** 0.8
        assert row['file_name'].startswith(f'train/{row["label"]}/')


def test_with_one_category_a_mixing_method_stays_in_it(pool):
    alone = InversionPool(CLASSES[:1], pool.latents[:1], pool.names[:1])
    settings = SamplingSettings(method='diff-mix', expansion=2)

    rows = make_plan(CLASSES[:1], alone, [], settings, (3,), 'tiny', 0, 10)

    assert {(r['label'], r['label_weight']) for r in rows} == {('oak', 1.0)}


def test_a_start_from_noise_needs_no_pool(planned):
    rows = planned(method='random-noise', pool=None)

    assert all(r['sources'] == [] and r['strength'] is None for r in rows)


# batches of a plan


def test_batches_are_filled_in_order(planned):
    assert [r['batch'] for r in planned()] == [0] * 10 + [1] * 10 + [2] * 4


def test_the_images_of_a_batch_begin_at_one_step(planned):
    rows = planned(method='diff-mix', batch_size=5)

    for batch in {r['batch'] for r in rows}:
        own = [r for r in rows if r['batch'] == batch]
        assert len({begins_at(r) for r in own}) == 1
        assert len(own) <= 5
    assert len({begins_at(r) for r in rows}) == 3


# further attempts


def test_another_attempt_keeps_the_pair_and_moves_on_the_circle(planned, pool):
    row = planned()[17]
    plan = Planner(CLASSES, pool, SUFFIXES, SamplingSettings(expansion=4), 'tiny', 0)

    again, later = (another_row(plan, row, attempt) for attempt in (0, 1))

    assert again == {k: v for k, v in row.items() if k != 'batch'}
    assert (later['sources'], later['file_name']) == (row['sources'], row['file_name'])
    assert (later['attempt'], later['alpha']) == (1, row['alpha'])
    assert later['strength'] != row['strength']


def test_another_attempt_keeps_target_and_strength_of_an_edit(planned, pool):
    settings = SamplingSettings(method='diff-mix', expansion=4)
    row = planned(method='diff-mix')[8]

    later = another_row(Planner(CLASSES, pool, [], settings, 'tiny', 0), row, 1)

    kept = ('label', 'label_weight', 'strength', 'sources', 'file_name')
    assert [later[k] for k in kept] == [row[k] for k in kept]


# starts


def test_a_start_on_the_circle_is_slerp(planned, pool, pipe):
    rows = [planned(equal_norms=True)[i] for i in (2, 15)]

    start = start_latents(rows, pool, pipe)

    for row, z in zip(rows, start):
        k = CLASSES.index(row['source_label'])
        a, b = (pool.latents[k][NAMES[k].index(s)][None] for s in row['sources'])
        expected = slerp(a, b, row['strength'], 'circle', True)[0]
        assert torch.allclose(z, expected, atol=1e-6)


def test_a_start_from_an_image_is_the_image_under_its_own_noise(planned, pool, pipe):
    row = planned(method='real-guidance')[7]

    start = start_latents([row], pool, pipe)

    noise = torch.randn(4, 8, 8, generator=generator(0, 'noise', 'oak', 7))
    image = pool.latents[0][NAMES[0].index(row['sources'][0])]
    abar = ddim_grid(pipe, 25).abar[begins_at(row)]
    assert torch.equal(start[0], noised(image, noise, abar))


def test_noise_is_an_images_own_and_new_in_a_further_attempt(planned, pipe):
    row = planned(method='random-noise')[7]

    one, other = (
        start_latents([{**row, 'attempt': attempt}], None, pipe) for attempt in (0, 1)
    )

    expected = torch.randn(4, 8, 8, generator=generator(0, 'noise', 'oak', 7))
    assert torch.equal(one[0], expected)
    assert not torch.allclose(one, other, atol=0.1)


# making a batch


@pytest.fixture
def make(pipe, concepts, pool):
    def _make(rows):
        with concepts.attached(pipe):
            return make_batch(pipe, concepts, pool, rows)

    return _make


def pixels(images):
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_a_batch_made_again_is_the_same(planned, make):
    rows = planned(steps=3, guidance_scale=2.0)[:5]

    assert np.array_equal(pixels(make(rows)), pixels(make(rows)))


def test_suffixes_are_in_the_prompts_of_the_first_stage(planned, make):
    rows = planned(steps=3, guidance_scale=2.0, split_ratio=1.0)[:2]
    other = [{**r, 'suffix': 'flying over water.'} for r in rows]

    assert not np.array_equal(pixels(make(rows)), pixels(make(other)))


def test_what_is_not_finite_fails_alone(planned, make, monkeypatch):
    def denoise(pipe, latents, *args, **kwargs):
        latents = latents.clone()
        latents[1, 0, 0, 0] = math.nan
        return latents

    monkeypatch.setattr(synthesis, 'two_stage_denoise', denoise)
    images = make(planned()[:3])

    assert [image is None for image in images] == [False, True, False]


def test_an_image_of_one_colour_fails(planned, make, pipe, monkeypatch):
    blank, good = Image.new('RGB', (32, 32), 'grey'), Image.new('RGB', (32, 32))
    good.putpixel((3, 3), (255, 0, 0))
    monkeypatch.setattr(synthesis, 'two_stage_denoise', lambda pipe, z, *_, **kw: z)
    monkeypatch.setattr(type(pipe), 'decode_latents', lambda self, z: [blank, good])

    assert make(planned()[:2]) == [None, good]


def test_an_image_that_the_checker_flags_fails(planned, make, pipe, monkeypatch):
    monkeypatch.setattr(synthesis, 'two_stage_denoise', lambda pipe, z, *_, **kw: z)
    monkeypatch.setattr(type(pipe), 'flagged', lambda self, images: [True, False])
    pipe.pipe.register_modules(safety_checker=None)
    pipe.pipe.safety_checker = object()

    images = make(planned()[:2])

    assert [image is None for image in images] == [True, False]


def test_a_batch_is_made_in_the_parts_that_its_row_says(planned, make, pipe):
    rows = [{**r, 'micro_batch': 4} for r in planned(steps=3)[:6]]

    make(rows)

    assert pipe.micro_batch == 4


def test_where_memory_runs_out_all_of_the_batch_is_made_in_smaller_parts(
    planned, make, pipe, monkeypatch
):
    sizes, denoise = [], synthesis.two_stage_denoise

    def crowded(pipe, latents, *args, **kwargs):
        sizes.append(pipe.micro_batch)
        if len(sizes) == 1:
            pipe.micro_batch = 2  # as `in_parts` does where memory runs out
        return denoise(pipe, latents, *args, **kwargs)

    monkeypatch.setattr(synthesis, 'two_stage_denoise', crowded)
    images = make(planned(steps=3)[:5])

    assert sizes == [64, 2]
    assert (len(images), pipe.micro_batch) == (5, 2)


# labels, and the circle


def test_soft_labels_share_between_source_and_target():
    targets = soft_targets([0, 1], [2, 1], [0.5**0.8, 0.3], 3)

    expected = [[1 - 0.5**0.8, 0, 0.5**0.8], [0, 1, 0]]
    assert np.allclose(targets, expected, atol=1e-6)
    assert targets.dtype == np.float32


def test_no_images_have_no_labels():
    assert soft_targets([], [], [], 3).shape == (0, 3)


def test_a_strip_goes_around_the_circle_and_ends_where_it_began(pipe, concepts, pool):
    short = replace_settings(pool, InversionSettings(steps=3))

    strip = circle_strip(pipe, concepts, short, 0, n=5, guidance_scale=1.5)

    apart = np.abs(pixels(strip[:1]) - pixels(strip[-1:]))
    assert len(strip) == 5
    assert apart.max() <= 2


def test_a_strip_of_two_equal_images_stays_where_it_is(pipe, concepts, pool):
    latents = [z[[0] * len(z)] for z in pool.latents]
    equal = InversionPool(pool.classes, latents, pool.names, InversionSettings(steps=3))

    strip = circle_strip(pipe, concepts, equal, 0, n=3)
    assert len(circle_strip(pipe, concepts, equal, 0, n=1)) == 1

    assert np.abs(pixels(strip) - pixels(strip[:1])).max() <= 2


def test_a_strip_shows_another_pair_for_another_seed(pipe, concepts, pool):
    short = replace_settings(pool, InversionSettings(steps=3))

    strips = [circle_strip(pipe, concepts, short, 0, n=3, seed=s) for s in range(4)]

    assert len({pixels(strip).tobytes() for strip in strips}) > 1


def replace_settings(pool, settings):
    return InversionPool(pool.classes, pool.latents, pool.names, settings)
