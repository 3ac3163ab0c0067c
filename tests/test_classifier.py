"Training a classifier: the stream of examples, the loop, the scores, what is refused."

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback

from diffii.base.batches import Pixels, one_hot
from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.settings import AUGMENTS, ClassifierSettings
from diffii.data.digits import digits_set
from diffii.method.classifier import TrainingStream, evaluate, lr_schedule, score
from diffii.method.classifier import sgd, train_classifier


@pytest.fixture(scope='module')
def pool():
    return digits_set('pool')


@pytest.fixture(scope='module')
def few(pool):
    return few_shot(pool, 3, seed=0)[0]


@pytest.fixture(scope='module')
def real(few):
    return Pixels(few, 32)


@pytest.fixture(scope='module')
def other(pool):
    "A hundred more images, none of them of category 9, in place of synthetic ones."
    positions = [i for i in range(len(pool)) if pool.labels[i] != 9]
    return pool.subset(positions[:100])


class Soft:
    "An image set with target vectors; each image has a source and a target category."

    def __init__(self, images, labels, targets):
        self.images, self.labels, self.targets = images, labels, targets
        self.source_labels, self.classes = images.labels, images.classes
        self.open = images.open

    def __len__(self):
        return len(self.images)


# the stream


def picks(stream, n):
    return [stream.pick(j) for j in range(n)]


def test_a_replaced_example_keeps_its_category(few, real, other):
    stream = TrainingStream(real, Pixels(other, 32), 0.5, seed=1, length=3000)

    chosen = picks(stream, 3000)

    expected = [few.labels[stream.order(j // 30)[j % 30]] for j in range(3000)]
    found = [(other if synthetic else few).labels[i] for synthetic, i in chosen]
    assert found == expected


def test_half_of_the_examples_are_replaced_where_there_are_synthetic_images(
    few, real, other
):
    stream = TrainingStream(real, Pixels(other, 32), 0.5, seed=1, length=3000)

    replaced = np.array([synthetic for synthetic, _ in picks(stream, 3000)])

    labels = np.array([few.labels[stream.order(j // 30)[j % 30]] for j in range(3000)])
    assert abs(replaced[labels != 9].mean() - 0.5) < 0.03
    assert not replaced[labels == 9].any()


def test_with_probability_zero_the_stream_is_that_of_the_original_set(real, other):
    with_synthetic = TrainingStream(real, Pixels(other, 32), 0, seed=1)
    without = TrainingStream(real, None, 0.5, seed=1)

    assert picks(with_synthetic, 90) == picks(without, 90)


def test_one_pass_sees_every_real_image_once(real):
    assert sorted(i for _, i in picks(TrainingStream(real), 30)) == list(range(30))


def test_an_example_does_not_depend_on_those_before_it(real, other):
    whole = TrainingStream(real, Pixels(other, 32), 0.5, seed=1)
    later = TrainingStream(real, Pixels(other, 32), 0.5, seed=1)
    later.start = 1000

    assert picks(later, 64) == picks(whole, 1064)[1000:]


def test_two_processes_share_the_stream_of_one(real, other):
    make = partial(TrainingStream, real, Pixels(other, 32), 0.5, seed=1, length=300)
    one, halves = make(), [make(rank=r, n_processes=2) for r in range(2)]

    joined = [x for j in range(150) for x in (half.pick(j) for half in halves)]

    assert len(halves[0]) == 150
    assert joined == picks(one, 300)


def test_even_gives_all_categories_the_same_share_of_synthetic_images(few, other):
    tail = [i for i in range(30) if few.labels[i] != 0 or i == few.of_class(0)[0]]
    rare = {1: other.of_class(1)[0], 2: other.of_class(2)[0]}
    extra = other.subset([i for i, k in enumerate(other.labels) if rare.get(k, i) == i])
    stream = TrainingStream(
        Pixels(few.subset(tail), 32), Pixels(extra, 32), 0.5, seed=1, category='even'
    )

    chosen = [extra.labels[i] for synthetic, i in picks(stream, 3000) if synthetic]

    counts = np.bincount(chosen, minlength=10)
    assert counts[9] == 0  # it has no synthetic images
    assert counts[:9].min() > 0.7 * counts[:9].max()
    assert abs(counts.sum() / 3000 - 0.5) < 0.03


def test_a_mixed_image_stands_in_for_its_source_and_brings_its_soft_target(few, real):
    targets = 0.3 * one_hot(few.labels, 10) + 0.7 * one_hot([1] * 30, 10)
    mixed = Soft(few, [1] * 30, targets)
    stream = TrainingStream(real, Pixels(mixed, 32), 1, length=30)

    for j in range(30):
        synthetic, i = stream.pick(j)
        _, target = stream[j]
        source = few.labels[i]

        assert synthetic and source == few.labels[stream.order(0)[j]]
        share = 1.0 if source == 1 else 0.3
        assert target[source].item() == pytest.approx(share, abs=1e-6)
        assert target.sum().item() == pytest.approx(1, abs=1e-6)


def test_targets_of_a_wrong_shape_are_refused(few, real):
    mixed = Soft(few, few.labels, np.ones((30, 9)))
    with pytest.raises(UserError, match=r'give \(30, 10\)'):
        TrainingStream(real, Pixels(mixed, 32))


# scores


@pytest.fixture
def toy():
    labels, groups = (0, 0, 1, 1), ('x', 'y', 'x', 'y')
    return SimpleNamespace(labels=labels, classes=('a', 'b', 'c'), groups=groups)


def test_scores_of_probabilities(toy):
    p = [[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.2, 0.7]]

    scores = score(p, toy)

    assert scores.accuracy == 0.5
    assert scores.per_class == {'a': 0.5, 'b': 0.5}
    assert scores.per_group == {'x': 1.0, 'y': 0.0}
    assert scores.predictions.tolist() == [0, 1, 1, 2]
    assert scores.top5 is None
    assert scores.classes == ('a', 'b', 'c')


def test_top_five_is_given_for_more_than_five_categories():
    test = SimpleNamespace(labels=(1, 3), classes='abcdefg')

    # among equal probabilities the first categories of the list come first
    assert score(np.eye(7)[[1, 2]], test).top5 == 1.0


def test_a_set_without_groups_has_no_scores_by_group(toy):
    toy.groups = None
    assert score(np.eye(3)[[0, 0, 1, 1]], toy).per_group == {}


# the loop


def test_the_learning_rate_rises_and_falls():
    schedule = lr_schedule(np.array([0.01, 0.1]))

    rates = np.array([schedule(share) for share in np.linspace(0, 1, 101)])

    assert np.allclose(rates[0], [0.01 / 25, 0.1 / 25])
    assert np.allclose(rates[10], [0.01, 0.1], atol=1e-3)
    assert np.allclose(rates[55, 1], 0.05, atol=1e-3)
    assert np.allclose(rates[-1], 0, atol=1e-6)


def test_without_warm_up_the_learning_rate_only_falls():
    schedule = lr_schedule(np.array([0.1]), warmup=0)
    assert schedule(0)[0] == pytest.approx(0.1)
    assert schedule(1)[0] == pytest.approx(0)


def test_the_optimizer_is_torchs_sgd():
    ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    one = sgd([ours], 0.1)
    one.set_hypers(wd=0.01)
    two = torch.optim.SGD([theirs], 0.1, momentum=0.9, weight_decay=0.01)

    for k in range(5):
        for w, optimizer in ((ours, one), (theirs, two)):
            ((w - k) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert torch.allclose(ours, theirs, atol=1e-6)


# one call, on four categories and a few steps


def four(images):
    "The first four categories of a set."
    images = images.subset([i for i, k in enumerate(images.labels) if k < 4])
    return replace(images, classes=images.classes[:4])


@pytest.fixture(scope='module')
def train(few):
    return four(few)


@pytest.fixture(scope='module')
def test_set():
    return four(digits_set('validation'))


@pytest.fixture(scope='module')
def spare(pool):
    return four(pool)


@pytest.fixture(scope='module')
def short(train, test_set):
    "Twelve steps; settings by name, all else as `train_classifier` has it."

    def _short(synthetic=None, seed=0, **settings):
        settings = ClassifierSettings(**{**dict(steps=12, batch_size=16), **settings})
        return train_classifier(train, test_set, synthetic, settings, seed=seed)

    return _short


@pytest.fixture(scope='module')
def plain(short):
    return short()


def test_the_same_seed_gives_the_same_classifier(short, plain, test_set):
    assert np.array_equal(short().probabilities, plain.probabilities)
    assert not np.array_equal(short(seed=1).probabilities, plain.probabilities)
    assert plain.probabilities.shape == (len(test_set), 4)


def test_synthetic_images_change_it_unless_their_probability_is_zero(
    short, plain, spare
):
    changed = short(spare)
    unchanged = short(spare, replacement_probability=0)

    assert not np.array_equal(changed.probabilities, plain.probabilities)
    assert np.array_equal(unchanged.probabilities, plain.probabilities)


@pytest.mark.parametrize('augment', AUGMENTS[1:])
def test_ordinary_augmentation_changes_the_classifier_and_is_of_its_seed(
    short, plain, spare, augment
):
    first, again = (short(spare, augment=augment).probabilities for _ in range(2))

    assert np.array_equal(first, again)
    assert not np.array_equal(first, short(spare).probabilities)
    assert not np.array_equal(first, short(augment=augment).probabilities)


def test_an_unknown_ordinary_augmentation_is_refused_with_those_there_are():
    with pytest.raises(UserError, match='augment.*trivial, rand, cutmix, mixup'):
        ClassifierSettings(augment='blur')


def test_an_empty_synthetic_set_changes_nothing_to_the_bit(short, plain, spare):
    empty = short(spare.subset([]))

    assert np.array_equal(empty.probabilities, plain.probabilities)
    assert empty.n_synthetic == 0
    weights = (r.learner.model.parameters() for r in (plain, empty))
    assert all(torch.equal(a, b) for a, b in zip(*weights))


def test_a_result_is_evaluated_again_by_itself_or_by_its_learner(plain, test_set):
    by_learner = evaluate(plain.learner, test_set).predictions
    assert np.array_equal(by_learner, plain.predictions)
    assert evaluate(plain, test_set).accuracy == plain.accuracy


def test_a_result_says_what_was_in_force(plain, train):
    assert plain.settings.steps == 12
    assert plain.settings.lr == 0.1
    assert plain.settings.resize == 32
    assert plain.n_train == len(train)
    assert plain.top5 is None
    assert set(plain.per_class) == set('0123')
    assert not plain.per_group


def test_progress_is_reported_and_the_best_of_ten_moments_kept(train, test_set):
    seen = []
    result = train_classifier(
        train,
        settings=ClassifierSettings(steps=20, batch_size=8),
        valid=test_set,
        progress=lambda done, steps: seen.append((done, steps)),
    )

    track = [values[-1] for values in result.learner.recorder.values]
    assert seen == [(i + 1, 20) for i in range(20)]
    assert result.accuracy is None
    assert len(track) == 10
    assert evaluate(result, test_set).accuracy == pytest.approx(max(track), abs=1e-6)


class Peek(Callback):
    "Learning rates and targets of each step."

    order = 90

    def before_fit(self):
        self.learn.seen = []

    def after_batch(self):
        if self.training:
            rates = [h['lr'] for h in self.opt.hypers]
            self.learn.seen.append((*rates, self.y.clone()))


def test_soft_targets_epochs_body_rate_and_class_weights_arrive(train):
    blend = Soft(train, train.labels, 0.5 * one_hot(train.labels, 4) + 0.125)

    result = train_classifier(
        train,
        synthetic=blend,
        settings=ClassifierSettings(
            replacement_probability=1, epochs=4, batch_size=12, body_lr=0.1
        ),
        class_weights=[1, 2, 3, 4],
        callbacks=[Peek()],
    )

    assert result.settings.steps == 4
    assert len(result.learner.seen) == 4
    assert result.learner.loss_func.weight.tolist() == [1, 2, 3, 4]
    for body, head, targets in result.learner.seen:
        assert body == pytest.approx(head / 10, abs=1e-9)
        assert torch.allclose(targets.max(1).values, torch.full((12,), 0.625))


def test_callbacks_are_there_for_the_time_of_training(train):
    settings = ClassifierSettings(steps=1, batch_size=4)
    result = train_classifier(train, settings=settings, callbacks=[Peek()])

    assert 'Peek' not in {str(c) for c in result.learner.cbs}


def test_images_that_do_not_fit_into_memory_are_read_by_workers(short, plain):
    result = short(cache_gb=0, n_workers=1)
    assert np.array_equal(result.probabilities, plain.probabilities)


def test_a_network_of_timm_trains_by_the_same_call(short, test_set):
    result = short(arch='timm/resnet10t', steps=2, batch_size=4)
    assert result.probabilities.shape == (len(test_set), 4)
    assert result.settings.lr == 0.01


def test_training_leaves_the_global_generator_alone(train):
    torch.manual_seed(5)
    expected = torch.rand(1)

    torch.manual_seed(5)
    train_classifier(train, settings=ClassifierSettings(steps=1))

    assert torch.equal(torch.rand(1), expected)


# what cannot be


def test_sets_of_other_categories_are_refused(train, pool):
    one = ClassifierSettings(steps=1)
    with pytest.raises(UserError, match='synthetic set: its categories differ'):
        train_classifier(train, synthetic=pool, settings=one)
    with pytest.raises(UserError, match='test set'):
        train_classifier(train, pool, settings=one)


def test_an_empty_training_set_is_refused(train):
    with pytest.raises(UserError, match='training set: no images'):
        train_classifier(train.subset([]))


def test_a_probability_above_one_is_refused(short):
    with pytest.raises(UserError, match='1.5'):
        short(replacement_probability=1.5)


def test_a_batch_that_processes_cannot_share_is_named(monkeypatch, short):
    of_two = SimpleNamespace(num_processes=2, process_index=0, device='cpu')
    monkeypatch.setattr('diffii.method.classifier.processes', lambda: of_two)
    with pytest.raises(UserError, match='--classifier-batch 3: .* multiple of 2'):
        short(batch_size=3)


def test_a_loss_that_is_not_finite_stops_training(short):
    with pytest.raises(UserError, match='lower the learning rate, --classifier-lr'):
        short(lr=1e20)


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(size=32, resize=24), '--resize 24: .* 32, or more'),
        (dict(crop_scale=(0.5,)), '--crop-scale'),
        (dict(crop_scale=(1.0, 0.25)), '--crop-scale'),
    ],
)
def test_crops_that_cannot_be_cut_are_refused(given, said):
    with pytest.raises(UserError, match=said):
        ClassifierSettings(**given)
