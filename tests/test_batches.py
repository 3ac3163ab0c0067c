"Batches: images in memory or read when needed, augmented by the seed of their batch."

import numpy as np
import pytest
import torch

from diffii.base.augmentation import augment_batch
from diffii.base.batches import Pixels, Prepare, Views, mirror, one_hot, shift
from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.settings import AUGMENTS
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


# ordinary augmentation


def prepared(kept, augment, batches=2):
    "Images and targets of the last of some batches."
    prepare = Prepare(32, HALF, HALF, train=True, seed=3, augment=augment)
    items = kept.cache[:8], torch.eye(8)
    return [prepare(items) for _ in range(batches)][-1]


@pytest.mark.parametrize('augment', AUGMENTS)
def test_ordinary_augmentation_is_that_of_the_seed(kept, augment):
    x, targets = prepared(kept, augment)

    torch.manual_seed(99)
    again = prepared(kept, augment)

    assert x.equal(again[0]) and targets.equal(again[1])
    assert x.shape == (8, 3, 32, 32)
    assert x.equal(prepared(kept, 'none')[0]) == (augment == 'none')


@pytest.mark.parametrize('augment', ['trivial', 'rand'])
def test_an_image_changed_alone_keeps_its_target_and_its_range(kept, augment):
    x, targets = prepared(kept, augment)

    assert targets.equal(torch.eye(8))
    assert x.min() >= -1 and x.max() <= 1


@pytest.mark.parametrize('augment', ['cutmix', 'mixup'])
def test_a_pair_shares_its_target_as_it_shares_its_pixels(augment):
    images = torch.linspace(0, 255, 4).to(torch.uint8)[:, None, None, None]
    items = images.repeat(1, 3, 32, 32), torch.eye(4)
    prepare = Prepare(32, [0] * 3, [1] * 3, train=True, seed=1, augment=augment)

    x, targets = prepare(items)

    value = items[0][:, 0, 0, 0].float() / 255  # each image is of one grey
    assert torch.allclose(x.mean((1, 2, 3)), targets @ value, atol=1e-5)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert ((targets > 0).sum(1) == 2).all()


def test_soft_targets_are_mixed_like_others():
    soft = torch.tensor([[0.3, 0.7, 0], [0, 0.5, 0.5]])
    x = torch.zeros(2, 3, 32, 32)

    _, (mixed,) = augment_batch(x, [soft], 'mixup')

    assert torch.allclose(mixed.sum(0), soft.sum(0))
    assert not mixed.equal(soft)


@pytest.mark.parametrize('augment', AUGMENTS)
def test_test_images_are_never_augmented(kept, augment):
    x = kept.cache[:2]
    plain, _ = Prepare(32, HALF, HALF)((x, torch.eye(2)))

    changed, targets = Prepare(32, HALF, HALF, augment=augment)((x, torch.eye(2)))

    assert changed.equal(plain) and targets.equal(torch.eye(2))
