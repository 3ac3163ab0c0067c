"Scores of synthetic images, and which ones they leave out."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffii.base.files import UserError
from diffii.base.images import ImageSet
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import SCORES, FilterSettings
from diffii.method.concepts import named_concepts
from diffii.run import filters
from diffii.run.filters import (
    SCORERS,
    Scoring,
    classifier_scores,
    clip_scores,
    denoising_errors,
    denoising_scores,
    features_scores,
    folds_of,
    scores_of,
    worst,
)
from diffii.run.runs import SyntheticSet


def plain(count, classes=('oak', 'elm')):
    "So many images of each category, of one colour each."
    labels = tuple(k for k in range(len(classes)) for _ in range(count))
    images = tuple(
        Image.new('RGB', (32, 32), (9 * i, 0, 0)) for i in range(len(labels))
    )
    names = tuple(f'{classes[k]}/{i}.png' for i, k in enumerate(labels))
    return ImageSet(images, labels, tuple(classes), 'tree', names)


def children(real, pairs, weights=None):
    "A synthetic image of each pair of positions in `real`, which may be empty."
    weights = weights or [1.0] * len(pairs)
    labels = tuple(real.labels[own[0]] if own else 0 for own in pairs)
    rows = tuple(
        dict(
            sources=[f'{real.names[p]}@{j + 1}' for j, p in enumerate(own)],
            label_weight=w,
            source_label=real.classes[1],
        )
        for own, w in zip(pairs, weights)
    )
    images = (Image.new('RGB', (32, 32)),) * len(pairs)
    names = tuple(map(str, range(len(pairs))))
    about = images, labels, real.classes, real.metaclass, names
    return SyntheticSet(*about, rows=rows)


@pytest.fixture
def trained(monkeypatch):
    "A classifier that answers evenly, and a list of (training names, scored set)."
    calls = []

    def train(real, made, settings, seed, progress):
        assert progress is False  # there is a bar for the scores
        calls.append((real.names, made))
        return SimpleNamespace(probabilities=np.full((len(made), 2), 0.25))

    monkeypatch.setattr(filters, 'train_classifier', train)
    return calls


def test_the_settings_name_every_scorer():
    assert SCORES == tuple(SCORERS)


# ---- by a classifier


def test_folds_share_every_category():
    fold = folds_of(plain(5), 5, seed=0)
    assert sorted(fold[:5]) == sorted(fold[5:]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize('count', [3, 5, 7])
def test_no_image_is_scored_by_a_classifier_of_its_parents(trained, count):
    real = plain(count)
    pairs = [
        (a, b) for k in (0, count) for a in range(k, k + count) for b in (k, k + 1)
    ]
    made = children(real, pairs)
    scores = classifier_scores(Scoring(real, made))
    assert scores == pytest.approx(0.25)
    for names, scored in trained:
        for row in scored.rows:
            assert not {s.partition('@')[0] for s in row['sources']} & set(names)


def test_a_view_leads_back_to_the_image_it_is_of():
    real = plain(1)
    made = children(real, [(0, 0)])
    made.rows[0]['sources'] = ['oak/0.png#mirror@1', 'oak/0.png']
    assert Scoring(real, made).parents == [(0, 0)]


def test_an_image_without_parents_is_scored_by_all(trained):
    real = plain(3)
    classifier_scores(Scoring(real, children(real, [()])))
    assert len(trained) == 3


def test_a_category_that_cannot_be_learned_has_no_score(trained):
    real = plain(3).subset([0, 1, 2, 3, 4])  # two of the second category
    made = children(real, [(0, 1), (3, 4)])
    assert scores_of(Scoring(real, made), 'classifier') == [0.25, None]


def test_a_mixed_image_counts_for_both_categories(monkeypatch):
    real = plain(3)
    made = children(real, [(0, 1)], weights=[0.75])
    answer = SimpleNamespace(probabilities=np.array([[0.9, 0.1]]))
    monkeypatch.setattr(filters, 'train_classifier', lambda *a, **k: answer)
    found = classifier_scores(Scoring(real, made))
    assert found == pytest.approx([0.75 * 0.9 + 0.25 * 0.1])


# ---- by the diffusion model


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny', batch_size=4)


def test_all_prompts_get_the_same_noises(pipe):
    latents = torch.randn(2, *pipe.latent_shape, generator=torch.manual_seed(0))
    errors = denoising_errors(pipe, latents, ['a bird', 'a digit', 'a bird'], 2)
    assert torch.equal(errors[:, 0], errors[:, 2])
    assert not torch.equal(errors[:, 0], errors[:, 1])


def test_the_error_is_that_of_the_predicted_noise(pipe):
    latents = torch.randn(1, *pipe.latent_shape, generator=torch.manual_seed(0))
    abar = pipe.abar()
    t = len(abar) // 2
    found = denoising_errors(pipe, latents, ['a bird'], noises=1, seed=3)

    gen = filters.generator(3, 'denoising score')
    noise = torch.randn((1, *pipe.latent_shape), generator=gen)
    x = abar[t] ** 0.5 * latents + (1 - abar[t]) ** 0.5 * noise
    with torch.no_grad():
        eps = pipe.predict_eps(x.float(), t, pipe.encode_prompts(['a bird']))
    assert found.item() == pytest.approx(((eps - noise) ** 2).mean().item(), rel=1e-4)


def test_the_own_prompt_is_compared_with_so_many_rivals(pipe, monkeypatch):
    real, seen = plain(1, classes=[f'tree {k}' for k in range(6)]), []

    def errors(pipe, latents, prompts, noises, seed):
        seen.append(prompts)
        return torch.tensor([[0.5, 0.75, 0.625]] * len(latents))

    monkeypatch.setattr(filters, 'denoising_errors', errors)
    settings = FilterSettings(rivals=2)
    concepts = named_concepts(pipe, real)
    found = denoising_scores(Scoring(real, real, settings, pipe, concepts))
    assert found == pytest.approx(0.125)
    assert [prompts[0] for prompts in seen] == [concepts.prompt(k) for k in range(6)]
    assert all(len(set(prompts)) == 3 for prompts in seen)


# ---- by networks that others trained


def test_parents_do_not_count_as_neighbours(monkeypatch):
    real = plain(3)
    made = children(real, [(0, 1), (0, 2)])
    directions = dict(enumerate(np.eye(3, dtype='float32')[[0, 1, 2, 0, 0, 0]]))

    def vectors(model, about, images, size, device):
        if images is real:
            return np.stack([directions[i] for i in range(6)])
        return np.array([[0, 0, 2], [0, 3, 0]], dtype='float32')

    monkeypatch.setattr(filters, 'run_network', vectors)
    settings = FilterSettings(features='torchvision/resnet18')
    monkeypatch.setattr(filters, 'build_model', lambda *a, **k: (None, {}))
    assert features_scores(Scoring(real, made, settings)) == pytest.approx([1, 1])


def test_clip_says_how_likely_the_own_name_is(monkeypatch):
    real, asked = plain(1), []
    scale = torch.tensor(2.0).log()
    monkeypatch.setattr(
        filters, 'named_clip', lambda *a, **k: (SimpleNamespace(logit_scale=scale),)
    )

    def vectors(clip, images, prompts):
        asked.extend(prompts)
        return torch.eye(2), torch.eye(2)

    monkeypatch.setattr(filters, 'clip_vectors', vectors)
    found = clip_scores(Scoring(real, real))
    assert asked == ['a photo of a oak tree', 'a photo of a elm tree']
    assert found == pytest.approx([np.exp(2) / (np.exp(2) + 1)] * 2)


def test_a_folder_with_underscores_is_words_for_clip(monkeypatch):
    clip = (SimpleNamespace(logit_scale=torch.tensor(0.0)),)
    monkeypatch.setattr(filters, 'named_clip', lambda *a, **k: clip)
    asked = []

    def vectors(clip, images, prompts):
        asked.extend(prompts)
        return torch.eye(2), torch.eye(2)

    monkeypatch.setattr(filters, 'clip_vectors', vectors)
    real = plain(1, classes=['Red_Kite', 'Rook'])
    clip_scores(Scoring(real, real))
    assert asked == ['a photo of a Red Kite tree', 'a photo of a Rook tree']


class OnDevice(Exception):
    "Stops a scorer where it says on which device its network runs."


@pytest.mark.parametrize(
    'by, maker',
    [
        ('classifier', 'train_classifier'),
        ('clip', 'named_clip'),
        ('lpips', 'lpips_model'),
        ('features', 'run_network'),
    ],
)
def test_a_scorer_runs_on_the_device_that_is_asked_for(by, maker, monkeypatch):
    def stop(*args, settings=None, device=None, **kwargs):
        raise OnDevice(device or getattr(settings, 'device', None) or args[1])

    monkeypatch.setattr(filters, maker, stop)
    monkeypatch.setattr(filters, 'build_model', lambda *a, **k: (None, {}))
    real = plain(3)
    with pytest.raises(OnDevice, match='cuda:7'):
        SCORERS[by].scores(Scoring(real, real, device='cuda:7'))


def test_images_are_opened_as_they_are_measured(monkeypatch):
    real, opened = plain(3), []

    def far(near, made, net):
        assert isinstance(near, list) and not opened
        opened.extend(made)
        return torch.zeros(3)

    monkeypatch.setattr(filters, 'lpips_model', lambda *a: None)
    monkeypatch.setattr(filters, 'distances', far)
    filters.lpips_scores(Scoring(real.subset(range(3)), real.subset(range(3))))
    assert len(opened) == 3


@pytest.mark.parametrize(
    'given, said',
    [
        (dict(by='classifier', arch='resnet5000'), '--filter-arch resnet5000: neither'),
        (dict(by='classifier', arch='timm/resnet10t'), 'give --filter-arch effic'),
        (dict(by='features', features='small'), '--filter-features small: has no pub'),
        (dict(by='clip', clip='ViT-B-32'), '--filter-clip ViT-B-32: give a model'),
        (dict(by='clip', clip='ViT-B-32:opnai'), '--filter-clip .*: opnai is not a'),
    ],
)
def test_a_network_that_cannot_be_had_is_told_at_once(given, said, monkeypatch):
    def no_network(*args, **kwargs):
        raise ConnectionError('no route to host')

    monkeypatch.setattr('timm.models._builder.load_pretrained', no_network)
    with pytest.raises(UserError, match=said):
        filters.check_filter(None, plain(3), FilterSettings(**given))


def test_clip_weights_that_cannot_be_had_are_told_of(tmp_path):
    (tmp_path / 'bad.pt').write_text('no weights')
    settings = FilterSettings(by='clip', clip=f'ViT-B-32:{tmp_path / "bad.pt"}')
    with pytest.raises(UserError, match='CLIP ViT-B-32.*--filter-clip ViT-B-32:FILE'):
        filters.check_filter(None, plain(3), settings)


# ---- which ones go


@pytest.mark.parametrize(
    'scores, given, gone',
    [
        ([3, 1, 2, 9, 8, 7], dict(share=1 / 3), [1, 5]),
        ([3, 1, 2, 9, 8, 7], dict(share=1.0), [0, 1, 2, 3, 4, 5]),
        ([3, 1, 2, 9, 8, 7], dict(share=0.1), []),
        ([3, 1, 2, 9, 8, 7], dict(below=3), [1, 2]),
        ([None, 1, 2, None, None, None], dict(share=0.5), [1]),
        ([None, 1, 2, 9, 8, 7], dict(below=100), [1, 2, 3, 4, 5]),
        ([1, 1, 1, 1, 1, 1], dict(share=1 / 3), [0, 3]),
    ],
)
def test_the_worst_of_two_categories(scores, given, gone):
    assert worst(scores, [0, 0, 0, 1, 1, 1], **given) == gone


def test_an_unknown_score_is_told_of():
    with pytest.raises(UserError, match='score magic: one of classifier'):
        scores_of(Scoring(plain(1), plain(1)), 'magic')


def test_an_empty_set_has_no_scores():
    real = plain(1)
    empty = replace(real, images=(), labels=(), names=())
    assert scores_of(Scoring(real, empty), 'lpips') == []


def test_several_processes_cannot_train_the_filter(monkeypatch):
    monkeypatch.setattr(filters, 'processes', lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match='needs one process'):
        filters.check_filter(None, plain(3), FilterSettings(by='classifier'))


@pytest.mark.parametrize(
    'edits, classes, said',
    [(True, 2, 'a model of prompts alone'), (False, 1, 'two categories')],
)
def test_losses_under_prompts_need_prompts_that_differ(edits, classes, said):
    pipe = SimpleNamespace(edits=edits)
    real = plain(3)
    if classes == 1:
        real = replace(real.subset(real.of_class(0)), classes=real.classes[:1])

    with pytest.raises(UserError, match=f'--filter denoising: needs {said}'):
        filters.check_filter(pipe, real, FilterSettings(by='denoising'))
