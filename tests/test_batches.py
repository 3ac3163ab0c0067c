"Batches: images in memory or read when needed, augmented by the seed of their batch."

import numpy as np
import pytest
import torch

from diffii.base.batches import Pixels, Prepare, Views, mirror, one_hot, shift
from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.data.digits import digits_set

HALF = [0.5] * 3


@pytest.fixture(scope='module')
def few():
    return few_shot(digits_set('pool'), 3, seed=0)[0]


@pytest.fixture(scope='module')
def kept(few):
    return Pixels(few, 32)


@pytest.mark.parametrize('settings', [dict(memory=0), dict(n_workers=2)])
def test_images_are_the_same_in_memory_or_not(few, kept, settings):
    pixels = Pixels(few, 32, **settings)

    assert kept.cache.shape == (30, 3, 32, 32)
    assert (pixels.cache is None) == ('memory' in settings)
    assert torch.equal(pixels[7], kept[7])


def test_an_empty_set_is_kept_as_nothing(few):
    assert Pixels(few.subset([]), 32).cache is None


def test_one_hot():
    assert one_hot([2, 0], 3).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert one_hot([], 3).shape == (0, 3)


def test_augmentation_depends_on_seed_and_number_of_the_batch_alone(kept):
    x = kept.cache[:10]
    one, two = (Prepare(32, HALF, HALF, train=True, seed=3) for _ in range(2))

    (first,), (second,) = one((x,)), one((x,))
    two.batch = 1
    torch.manual_seed(99)
    (again,) = two((x,))

    assert torch.equal(second, again)
    assert not torch.equal(first, second)
    assert two.batch == 2


def test_augmentation_leaves_the_global_generator_alone(kept):
    torch.manual_seed(4)
    expected = torch.rand(1)

    torch.manual_seed(4)
    Prepare(32, HALF, HALF, train=True, flip=True)((kept.cache[:2],))

    assert torch.equal(torch.rand(1), expected)


def test_test_images_are_only_normalised(kept):
    x = kept.cache[:10]

    y, target = Prepare(32, HALF, HALF)((x, 'target'))

    assert torch.allclose(y, x / 127.5 - 1, atol=1e-5)
    assert target == 'target'
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('train', [True, False])
def test_large_images_are_cropped_to_the_networks_size(train):
    x = torch.randint(0, 255, (2, 3, 146, 146), dtype=torch.uint8)

    (y,) = Prepare(128, HALF, HALF, train=train, flip=True)((x,))

    assert y.shape == (2, 3, 128, 128)


def test_a_test_image_is_cut_in_its_middle():
    x = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).repeat(1, 3, 1, 1)

    (y,) = Prepare(4, (0.0,) * 3, (1.0,) * 3)((x,))

    assert torch.allclose(y * 255, x[..., 1:5, 1:5].float())


def test_a_shifted_image_is_moved_and_its_edge_repeated():
    torch.manual_seed(0)
    x = torch.arange(16.0).reshape(1, 1, 4, 4).repeat(20, 3, 1, 1)

    shifted = shift(x, size=4, pad=1)

    padded = torch.nn.functional.pad(x[:1], [1] * 4, mode='replicate')[0]
    places = [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    assert shifted.shape == x.shape
    assert all(any(torch.equal(im, p) for p in places) for im in shifted)


def test_about_half_of_the_images_are_mirrored():
    torch.manual_seed(0)
    x = torch.arange(4.0).expand(400, 3, 4, 4)

    mirrored = mirror(x)[:, 0, 0, 0] == 3

    assert 150 < mirrored.sum() < 250


@pytest.fixture
def views(few):
    return Views(few.classes, 32, 32, HALF, HALF)


def test_memory_is_used_up_by_the_sets_that_are_kept(few, views):
    views.memory = 30 * 3 * 32 * 32 + 5

    first, second = views.pixels(few, 'one'), views.pixels(few, 'two')

    assert first.cache is not None
    assert second.cache is None
    assert views.memory == 5


def test_sets_of_other_categories_and_empty_sets_are_refused(few, views):
    views.classes = ('oak', 'elm')
    with pytest.raises(UserError, match='extra set: its categories differ'):
        views.pixels(few, 'extra set')
    views.classes = few.classes
    with pytest.raises(UserError, match='test set: no images'):
        views.test_loader(few.subset([]))


def test_a_loader_gives_prepared_batches_with_their_targets(few, kept, views):
    x, y = next(iter(views.test_loader(few, batch_size=8)))

    assert torch.allclose(x, kept.cache[:8] / 127.5 - 1, atol=1e-5)
    assert np.array_equal(y.argmax(1), few.labels[:8])
