"Long tails: the profile, groups of categories, and the callbacks CMO and DRW."

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import CutMix

from diffii.base.batches import Pixels, Prepare, one_hot
from diffii.base.files import UserError
from diffii.base.images import ImageSet
from diffii.base.settings import ClassifierSettings
from diffii.data.digits import digits_set
from diffii.evaluation.long_tail import CMO, DRW, LONG_TAIL, Foregrounds
from diffii.evaluation.long_tail import class_balanced_weights, cut_box
from diffii.evaluation.long_tail import group_accuracy, idle_batches, long_tail
from diffii.evaluation.long_tail import long_tail_callbacks, long_tail_counts, paste
from diffii.evaluation.long_tail import shot_groups, weighted_loss
from diffii.method.classifier import Scores, TrainingStream, score, train_classifier

DOT = Image.new('RGB', (4, 4))


def images_of(*counts):
    "A set with so many images of each category."
    labels = tuple(k for k, n in enumerate(counts) for _ in range(n))
    return ImageSet((DOT,) * len(labels), labels, tuple('abcdefghij'[: len(counts)]))


# the profile


@pytest.mark.parametrize(
    'counts, imbalance, keep, expected',
    [
        ([10] * 5, 10, None, [10, 4, 2, 1, 1]),  # 10, 4.6, 2.2, 1, 0.46
        ([4, 9, 9, 1], 10, None, [1, 5, 1, 1]),  # by size, then by position
        ([3, 3, 2], 1, 8, [3, 3, 2]),  # never more than there are
        ([6, 6], 3, None, [6, 2]),
        ([6], 100, None, [6]),
    ],
)
def test_the_profile(counts, imbalance, keep, expected):
    assert long_tail_counts(counts, imbalance, keep).tolist() == expected


def test_a_long_tail_and_the_rest_are_the_set():
    images = images_of(10, 10)

    tail, rest = long_tail(images, 5, seed=1)

    assert tail.counts.tolist() == [10, 2]
    assert len(rest) == 8
    assert set(tail.names) | set(rest.names) == set(images.names)
    assert not set(tail.names) & set(rest.names)


def test_a_steeper_tail_is_a_part_of_a_flatter_one():
    images = images_of(10, 10)

    flat, steep, other = (
        set(long_tail(images, imbalance, seed)[0].names)
        for imbalance, seed in ((5, 1), (10, 1), (5, 2))
    )

    assert steep < flat
    assert other != flat


def test_what_makes_no_long_tail_is_refused():
    with pytest.raises(UserError, match='--imbalance 0.5'):
        long_tail(images_of(10, 10), 0.5)
    with pytest.raises(UserError, match='no images of b'):
        long_tail(images_of(9, 0), 10)


# groups of categories


@pytest.mark.parametrize(
    'thresholds, expected',
    [
        ((100, 20), dict(many=[2], medium=[0, 4], few=[1, 3])),
        ((19, 3), dict(many=[0, 2, 4], medium=[1, 3], few=[])),
        (None, dict(many=[0, 2], medium=[1, 4], few=[3])),
    ],
)
def test_groups_by_number_of_training_images(thresholds, expected):
    assert shot_groups(images_of(20, 19, 101, 3, 20), thresholds) == expected


def test_fewer_categories_than_groups_leave_the_last_one_empty():
    groups = shot_groups(images_of(10, 2), thresholds=None)
    assert groups == dict(many=[0], medium=[1], few=[])


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(UserError, match='thresholds'):
        shot_groups(images_of(1, 1), (20, 100))


@pytest.fixture
def scores():
    "Of a three of four images are right, of b one of two, of c the only one, d has none."
    test = SimpleNamespace(labels=(0, 0, 0, 0, 1, 1, 2), classes=tuple('abcd'))
    return score(np.eye(4)[[0, 0, 0, 1, 1, 2, 2]], test)


def test_each_category_counts_the_same_in_its_group(scores):
    groups = {'many': [0], 'few': (1, 2, 3), 'none': [3]}
    assert group_accuracy(scores, groups) == {'many': 0.75, 'few': 0.75}


def test_groups_of_unknown_categories_and_missing_scores_are_refused(scores):
    with pytest.raises(UserError, match='0 to 3'):
        group_accuracy(scores, {'few': [4]})
    with pytest.raises(UserError, match='test set'):
        group_accuracy(Scores(), {})


# pasting


@pytest.fixture(scope='module')
def boxes():
    rng = np.random.default_rng(0)
    return [cut_box(32, 48, rng) for _ in range(1000)]


def test_a_box_stays_inside_the_image(boxes):
    for top, bottom, left, right in boxes:
        assert 0 <= top <= bottom <= 32
        assert 0 <= left <= right <= 48


def test_targets_are_mixed_by_the_share_that_is_pasted(boxes):
    black, white = torch.zeros(2, 3, 32, 48), torch.ones(2, 3, 32, 48)
    targets = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0]])
    rare = torch.tensor([[0.0, 0, 1]] * 2)
    for box in (*boxes[:20], (0, 32, 0, 48), (5, 5, 0, 9)):
        mixed, mixed_targets = paste(black, targets, white, rare, box)

        share = mixed.mean().item()
        half = 0.5 - share / 2
        expected = torch.tensor([[1 - share, 0, share], [half, half, share]])
        assert torch.allclose(mixed_targets, expected, atol=1e-5)
    assert black.sum() == 0  # the background itself is left as it was


def test_the_mean_share_is_that_of_torchvisions_cutmix():
    rng = np.random.default_rng(0)
    found = np.array([cut_box(320, 480, rng) for _ in range(4000)])
    share = (found[:, 1] - found[:, 0]) * (found[:, 3] - found[:, 2]) / (320 * 480)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        cutmix, image = CutMix(num_classes=3), torch.zeros(1, 320, 480)
        kept = [cutmix.make_params([image])['lam_adjusted'] for _ in range(4000)]

    assert share.mean() == pytest.approx(1 - np.mean(kept), abs=0.03)


@pytest.fixture(scope='module')
def tail():
    "Digits: 24 images of category 0, down to two of category 9."
    pool = digits_set('pool')
    sizes = [round(24 * 12 ** (-k / 9)) for k in range(10)]
    return pool.subset([i for k, n in enumerate(sizes) for i in pool.of_class(k)[:n]])


@pytest.fixture(scope='module')
def stream(tail):
    return TrainingStream(Pixels(tail, 32), seed=1)


def prepare(**settings):
    return Prepare(32, [0.5] * 3, [0.5] * 3, **settings)


def test_foregrounds_are_of_all_categories_equally(stream):
    picked = Foregrounds(stream, prepare()).pick(0, 20000)

    shares = np.bincount(stream.labels[picked], minlength=10) / 20000
    assert np.allclose(shares, 0.1, atol=0.01)


def test_foregrounds_with_power_zero_are_as_the_set_has_them(stream, tail):
    weights = Foregrounds(stream, prepare(), power=0).weights
    assert np.allclose(weights, 1 / len(tail), atol=1e-9)


def test_foregrounds_of_a_batch_depend_on_its_number_alone(stream):
    foregrounds = Foregrounds(stream, prepare(train=True))

    images, targets = foregrounds(5, 8)
    foregrounds(6, 8)

    assert torch.equal(foregrounds(5, 8)[0], images)
    assert np.array_equal(targets.argmax(1), stream.labels[foregrounds.pick(5, 8)])
    assert images.shape == (8, 3, 32, 32)


def test_foregrounds_are_augmented_otherwise_than_the_batch(stream):
    foregrounds = Foregrounds(stream, prepare(train=True))
    raw = torch.stack([stream.real[i] for i in foregrounds.pick(0, 8)])

    assert not torch.equal(prepare(train=True)((raw,))[0], foregrounds(0, 8)[0])


@pytest.mark.parametrize(
    'total, n_real, expected',
    [(2000, 1000, 30), (2000, 1001, 31), (30, 1000, 10), (2, 1000, 0)],
)
def test_batches_left_alone_at_either_end(total, n_real, expected):
    assert idle_batches(total, n_real, batch_size=100, off=3) == expected


# weights


def test_class_balanced_weights():
    w = class_balanced_weights([1000, 10, 1, 0])

    assert w.sum() == pytest.approx(4, abs=1e-5)
    assert w[2] == w[3]  # an empty category counts as one image
    ratio = (1 - 0.9999**1000) / (1 - 0.9999**10)
    assert w[1] / w[0] == pytest.approx(ratio, rel=1e-3)
    assert np.allclose(class_balanced_weights([7] * 5), 1, atol=1e-6)


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
def test_the_weighted_loss_is_torchs_on_labels(smoothing):
    logits = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3])
    w = torch.from_numpy(class_balanced_weights([1000, 10, 1, 0]))

    ours = weighted_loss(logits, F.one_hot(labels, 4).float(), w, smoothing)

    theirs = F.cross_entropy(logits, labels, w, label_smoothing=smoothing)
    assert ours == pytest.approx(theirs.item(), abs=1e-5)


# the callbacks


def test_callbacks_by_name():
    names = [[str(c) for c in long_tail_callbacks(m)] for m in (None, *LONG_TAIL)]
    assert names == [[], [], ['CMO'], ['CMO', 'DRW']]
    with pytest.raises(UserError, match='CE, CMO, CMO\\+DRW'):
        long_tail_callbacks('cmo')


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match='from 0 to 1'):
        CMO(probability=2)
    with pytest.raises(UserError, match='below 1'):
        DRW(beta=1)


class Keep(Callback):
    "Everything about each step of training."

    order = 90

    def before_fit(self):
        self.learn.kept = []

    def after_batch(self):
        if self.training:
            pred, loss = self.pred.detach().clone(), self.loss.item()
            step = dict(x=self.x.clone(), y=self.y.clone(), pred=pred, loss=loss)
            self.learn.kept.append(SimpleNamespace(**step))


def trained(images, callbacks, synthetic=None, **settings):
    settings = ClassifierSettings(**{**dict(steps=12, batch_size=16), **settings})
    return train_classifier(
        images, None, synthetic, settings, callbacks=[*callbacks, Keep()]
    )


@pytest.fixture(scope='module')
def runs(tail):
    "Twelve batches by each method, of which a third at either end is left alone."
    return {m: trained(tail, long_tail_callbacks(m)) for m in (None, *LONG_TAIL)}


def test_cmo_pastes_on_batches_in_the_middle_of_the_run(runs):
    plain, cmo = (runs[m].learner.kept for m in (None, 'CMO'))

    pasted = [i for i in range(12) if not torch.equal(plain[i].x, cmo[i].x)]

    assert pasted and set(pasted) <= set(range(4, 8))
    for i, (a, b) in enumerate(zip(plain, cmo)):
        assert torch.allclose(b.y.sum(1), torch.ones(16), atol=1e-5)
        assert torch.equal(a.y, b.y) == (i not in pasted)


def test_drw_weights_the_loss_of_the_last_fifth(runs, tail):
    weights = torch.from_numpy(class_balanced_weights(tail.counts))
    plain = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

    for i, step in enumerate(runs['CMO+DRW'].learner.kept):
        expected = plain(step.pred, step.y)
        if i >= 10:
            expected = weighted_loss(step.pred, step.y, weights, 0.1)
        assert step.loss == pytest.approx(expected.item(), abs=1e-5)


def test_drw_changes_nothing_before_its_first_weighted_step(runs):
    cmo, drw = (runs[m].learner.kept for m in ('CMO', 'CMO+DRW'))

    for a, b in zip(cmo[:11], drw):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.pred, b.pred)
    assert not torch.equal(cmo[11].pred, drw[11].pred)


def test_the_learner_is_left_as_it_was(runs):
    for run in runs.values():
        assert run.learner.loss_func.weight is None
        assert not {str(c) for c in run.learner.cbs} & {'CMO', 'DRW'}


def same(one, two):
    "Are the weights of two runs the same to the bit?"
    states = (r.learner.model.state_dict().values() for r in (one, two))
    return all(torch.equal(a, b) for a, b in zip(*states))


def test_runs_are_repeatable(runs, tail):
    assert same(runs[None], runs['CE'])
    assert same(runs['CMO'], trained(tail, long_tail_callbacks('CMO')))
    assert not same(runs['CMO'], runs[None])


class Soft:
    "An image set with target vectors."

    def __init__(self, images, targets):
        self.images, self.labels, self.targets = images, images.labels, targets
        self.classes, self.open = images.classes, images.open

    def __len__(self):
        return len(self.images)


def test_pasting_goes_with_soft_targets(tail):
    blend = Soft(tail, 0.9 * one_hot(tail.labels, 10) + 0.01)

    run = trained(
        tail,
        [CMO(probability=1, off=0)],
        blend,
        replacement_probability=1,
        steps=3,
    )

    for step in run.learner.kept:
        least = step.y.min(1).values
        assert torch.allclose(step.y.sum(1), torch.ones(16), atol=1e-5)
        assert torch.allclose(least, least[0], atol=1e-6)  # one share per batch


def test_drw_multiplies_class_weights_that_are_there(tail):
    settings = ClassifierSettings(steps=2, batch_size=16)
    given = np.arange(1.0, 11)
    run = train_classifier(
        tail,
        settings=settings,
        class_weights=given,
        callbacks=[DRW(start=0), Keep()],
    )

    weights = torch.from_numpy(class_balanced_weights(tail.counts) * given).float()
    for step in run.learner.kept:
        expected = weighted_loss(step.pred, step.y, weights, 0.1).item()
        assert step.loss == pytest.approx(expected, abs=1e-5)
