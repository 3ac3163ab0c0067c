"GIF: what its guide makes of latents, and runs with one."

import numpy as np
import pytest
import torch
from small_models import small_clip
from small_runs import GIVEN, few_birds

from diffii.base.embeddings import named_clip
from diffii.base.files import UserError
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import GuideSettings, SamplingSettings, Settings
from diffii.method.concepts import named_concepts
from diffii.method.imagination import (
    Guide,
    change,
    clip_look,
    directions,
    first_change,
    group_means,
    imagine,
    informativeness,
)
from diffii.method.inversion import InversionPool
from diffii.method.synthesis import make_batch, make_plan
from diffii.run import guides
from diffii.run.folders import RunFolder
from diffii.run.guides import check_guide
from diffii.run.review import remake, status
from diffii.run.runs import synthesize

LABELS = torch.tensor([0, 0, 1, 1])
GROUPS = torch.tensor([0, 0, 1, 1])


@pytest.fixture(scope='module')
def birds():
    return few_birds(2)


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny', batch_size=8)


@pytest.fixture(scope='module')
def guide():
    "Red or not: the category is what the first channel says."

    def look(x):
        features = torch.stack([x[:, c].mean((1, 2)) for c in range(3)], 1)
        return 20 * torch.stack([features[:, 0], features[:, 1]], 1), features

    return Guide(look, GuideSettings())


@pytest.fixture(scope='module')
def latents(pipe, birds):
    return pipe.encode_images([birds.open(i) for i in range(4)])


@pytest.fixture(scope='module')
def start(latents):
    draws = [first_change(generator(i), latents.shape[1]) for i in range(4)]
    return torch.stack(draws, 1)


# the terms and the change


def test_the_terms_are_probability_entropy_and_divergence():
    logits = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    features = torch.tensor([[1.0, 2.0], [3.0, 3.0]])
    means = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    own, entropy, divergence = informativeness(
        logits, features, torch.tensor([0, 1]), means
    )

    assert own.tolist() == pytest.approx([0.5, 0], abs=1e-6)
    assert entropy.tolist() == pytest.approx([np.log(2), 0], abs=1e-6)
    q = torch.tensor([3.0, 4.0]).softmax(0)
    assert divergence[0] == pytest.approx(0, abs=1e-6)
    assert divergence[1].item() == pytest.approx((0.5 * (0.5 / q).log()).sum().item())


def test_no_value_moves_farther_than_epsilon():
    x = torch.randn(2, 4, 3, 3, generator=generator(0))
    factor, shift = torch.ones(2, 4, 1, 1), torch.full((2, 4, 1, 1), 0.2)

    changed = change(x, factor, shift, 0.3)

    assert (changed - x).abs().max() <= 0.3 + 1e-6
    near = (x + 0.2).abs() < 0.29
    assert torch.allclose(changed[near], (2 * x + 0.2)[near])


def test_a_mean_is_that_of_the_group():
    features = torch.tensor([[1.0], [5.0], [3.0]])

    means = group_means(features, torch.tensor([1, 0, 1]))

    assert means.flatten().tolist() == [2, 5, 2]


def test_steps_make_what_the_guide_sees_more_informative(pipe, guide, latents, start):
    def total(steps):
        under = Guide(guide.look, GuideSettings(steps=steps, epsilon=9))
        with under.attached(pipe):
            x = imagine(pipe, latents, start, LABELS, GROUPS)
        pixels = [np.asarray(im) for im in pipe.decode_latents(x)]
        seen = guide.look(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2) / 255)
        terms = informativeness(*seen, LABELS, group_means(seen[1], GROUPS))
        return sum(terms).mean().item()

    assert total(8) > total(0) + 0.05


@pytest.mark.parametrize('vae_batch', [1, 3])
def test_the_parts_of_a_batch_do_not_matter(pipe, guide, latents, start, vae_batch):
    with guide.attached(pipe):
        whole = directions(pipe, latents, start, LABELS, GROUPS)
        pipe.vae_batch = vae_batch
        parts = directions(pipe, latents, start, LABELS, GROUPS)
    pipe.vae_batch = pipe.batch_size

    assert parts.equal(whole)
    assert set(whole.unique().tolist()) <= {-1, 0, 1}
    assert whole.abs().mean() > 0.9


def test_the_other_images_of_a_group_matter(pipe, latents, start):
    def look(x):
        features = 50 * torch.stack([x[:, c].mean((1, 2)) for c in range(3)], 1)
        return 0 * features, features

    guide = Guide(look, GuideSettings())
    with guide.attached(pipe):
        together = directions(pipe, latents, start, LABELS, torch.zeros(4).long())
        alone = directions(pipe, latents, start, LABELS, torch.arange(4))

    assert not together.equal(alone)


def test_clip_as_a_guide_compares_with_the_names(tmp_path):
    clip = named_clip(':'.join(map(str, small_clip(tmp_path, 'guide-clip'))))

    look = clip_look(clip, ['a red bird', 'a blue bird'])
    x = torch.rand(2, 3, 40, 40, generator=generator(0)).requires_grad_()
    logits, features = look(x)

    assert logits.shape == (2, 2)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.autograd.grad(logits[:, 0].sum(), x)[0].abs().sum() > 0


# batches


@pytest.fixture(scope='module')
def pool(birds):
    latents = [torch.randn(3, 4, 8, 8, generator=generator(k)) for k in range(2)]
    names = [[birds.names[i] for i in birds.of_class(k)] for k in range(2)]
    return InversionPool(birds.classes, latents, names)


@pytest.mark.parametrize('batch_size, batches', [(8, 3), (4, 6), (3, 12), (64, 1)])
def test_images_of_one_seed_are_made_together(pool, batch_size, batches):
    settings = SamplingSettings(method='gif', expansion=4)

    rows = make_plan(pool.classes, pool, [], settings, [3, 3], 'tiny', 0, batch_size)

    numbers = {}
    for row in rows:
        numbers.setdefault(row['sources'][0], set()).add(row['batch'])
    sizes = np.bincount([row['batch'] for row in rows])
    assert len(sizes) == batches and sizes.max() <= batch_size
    assert {len(found) for found in numbers.values()} == {-(-4 // batch_size)}


def test_without_a_guide_nothing_is_made(pipe, birds):
    concepts = named_concepts(pipe, birds)
    settings = SamplingSettings(method='gif', steps=2, expansion=1)
    latents = [pipe.encode_images([birds.open(i) for i in birds.of_class(0)])]
    names = [[birds.names[i] for i in birds.of_class(0)]]
    pool = InversionPool(birds.classes[:1], latents, names)
    rows = make_plan(pool.classes, pool, [], settings, [3], 'tiny', 0, 8)

    with pytest.raises(UserError, match='gif: needs a guide'):
        make_batch(pipe, concepts, pool, rows)


# runs


@pytest.fixture
def make(pipe, birds, tmp_path):
    "A short run of GIF in a folder."

    def _make(name='out', **guide):
        given = dict(GIVEN, sampling=dict(method='gif', expansion=2, steps=3))
        given['guide'] = dict(training=3) | guide
        settings = Settings.of(pipe, 'bird', **given)
        return synthesize(pipe, birds, tmp_path / name, settings, progress=False)

    return _make


def pixels(images):
    return np.stack(
        [np.asarray(images.open(i)).astype(int) for i in range(len(images))]
    )


def test_a_run_keeps_its_categories_and_moves_its_images(make, birds):
    chance, made = make('chance', steps=0, epsilon=1e-9), make()

    assert made.counts.tolist() == [6, 6]
    assert all(row['label'] == row['source_label'] for row in made.rows)
    assert np.abs(pixels(made) - pixels(chance)).mean() > 1
    assert RunFolder(made.folder).about()['guide']['training'] == 3


def test_images_are_made_again_without_the_training_images(make, pipe):
    made = make()

    again = remake(pipe, made.folder, made.names[7])

    assert np.array_equal(np.asarray(again), pixels(made)[7])
    assert pipe.guide is None


def test_a_lost_guide_comes_back_as_it_was(make):
    made = make()
    file = RunFolder(made.folder).guide
    before, images = file.read_bytes(), pixels(made)
    file.unlink()
    made.images[0].unlink()

    made = make()

    assert file.read_bytes() == before
    assert np.array_equal(pixels(made), images)


def test_a_damaged_guide_is_named_and_made_again(make):
    made = make()
    file = RunFolder(made.folder).guide
    before = file.read_bytes()
    file.write_bytes(before[:-50])
    assert any('guide' in name for name in status(made.folder)['damaged'])

    with pytest.warns(UserWarning, match='made again'):
        make()

    assert file.read_bytes() == before


def test_another_guide_is_another_run(make):
    make()
    with pytest.raises(UserError, match='guide'):
        make(epsilon=0.5)


def test_clip_guides_a_run(make, tmp_path):
    name = ':'.join(map(str, small_clip(tmp_path, 'guide-clip')))

    made = make(by='clip', clip=name)

    assert len(made) == 12
    assert not RunFolder(made.folder).guide.exists()


def test_a_clip_that_cannot_be_had_leaves_no_folder(make, tmp_path):
    with pytest.raises(UserError, match='--guide-clip ViT-B-32:.*is not a file'):
        make(by='clip', clip=f'ViT-B-32:{tmp_path / "missing.pt"}')
    assert not (tmp_path / 'out').exists()


def test_a_network_that_cannot_be_built_leaves_no_folder(make, tmp_path):
    with pytest.raises(UserError, match='--guide-arch resnet5000: neither'):
        make(arch='resnet5000')
    assert not (tmp_path / 'out').exists()


def test_a_guide_that_is_there_needs_no_published_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(guides, 'try_network', lambda *about: asked.append(about))
    settings = GuideSettings(arch='resnet10t')

    check_guide(settings, 2, there=True)
    check_guide(settings, 2)

    assert asked == [('resnet10t', 2, 224, True, '--guide-arch')]
