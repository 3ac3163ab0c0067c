"The methods that are compared: each plans images as its row of the table says."

import math

import pytest
import torch

from diffii.base.files import UserError
from diffii.base.methods import METHODS, get_method
from diffii.base.seeds import generator
from diffii.base.settings import InversionSettings, SamplingSettings
from diffii.method.inversion import InversionPool
from diffii.method.synthesis import begins_at, make_plan, soft_targets

SUFFIXES = ['in snow.', 'at dusk.']
MAKING = [name for name, method in METHODS.items() if method.start != 'nothing']


@pytest.fixture(scope='module')
def pool():
    "Two categories with three latents each."
    latents = [torch.randn(3, 4, 8, 8, generator=generator(k)) for k in range(2)]
    names = [['a', 'b', 'c'], ['d', 'e', 'f']]
    return InversionPool(('oak', 'elm'), latents, names, InversionSettings())


@pytest.fixture(scope='module')
def planned(pool):
    "The plan of a method."

    def _planned(method):
        settings = SamplingSettings(method=method, expansion=4)
        return make_plan(pool.classes, pool, SUFFIXES, settings, [3, 3], 'tiny', 0, 10)

    return _planned


def test_the_original_set_has_no_synthetic_images(planned):
    assert planned('original') == []


@pytest.mark.parametrize('method', MAKING)
def test_a_filtering_method_plans_twice_as_many_images(planned, method):
    assert len(planned(method)) == (48 if METHODS[method].filtered else 24)


@pytest.mark.parametrize('method', MAKING)
def test_sources_are_none_one_image_or_a_pair(planned, method):
    number = {'noise': 0, 'image': 1, 'edit': 1, 'circle': 2}[METHODS[method].start]
    for row in planned(method):
        assert len(set(row['sources'])) == number


@pytest.mark.parametrize('method', MAKING)
def test_strengths_are_the_methods_own_or_on_the_circle(planned, method):
    about, rows = METHODS[method], planned(method)
    strengths = {row['strength'] for row in rows}
    if about.start == 'image':
        assert strengths == set(about.strengths)
        for row in rows:
            assert begins_at(row) == 25 - max(1, round(25 * row['strength']))
    elif about.start == 'circle':
        assert all(0 <= row['strength'] <= 2 * math.pi / row['alpha'] for row in rows)
    else:
        assert strengths == {None}


@pytest.mark.parametrize('method', MAKING)
def test_whose_prompt_is_followed(planned, method):
    mixed = METHODS[method].target == 'other'
    for row in planned(method):
        assert (row['label'] != row['source_label']) == mixed
        weight = row['strength'] ** 0.8 if mixed else 1
        assert row['label_weight'] == weight


@pytest.mark.parametrize('method', MAKING)
def test_contexts_belong_to_two_stage_methods_and_styles_to_edits(planned, method):
    suffixes = {row['suffix'] for row in planned(method)}
    known = METHODS[method].two_stage or METHODS[method].start == 'edit'  # styles
    assert suffixes == (set(SUFFIXES) if known else {''})


def test_soft_targets_share_the_label_between_two_categories():
    targets = soft_targets([0, 1], [2, 1], [0.5**0.8, 0.3], 3)

    expected = [[1 - 0.5**0.8, 0, 0.5**0.8], [0, 1, 0]]
    assert targets == pytest.approx(torch.tensor(expected).numpy(), abs=1e-6)
    assert soft_targets([], [], [], 3).shape == (0, 3)


def test_an_unknown_method_is_refused_with_all_names():
    with pytest.raises(UserError, match='diff-ii'):
        get_method('gan')
