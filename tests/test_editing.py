"DiffuseMix: halves, fractals, and runs with a small InstructPix2Pix model."

import numpy as np
import pytest
from PIL import Image, ImageChops
from small_models import EDITS, TREES, checkpoint, load, loaded

from diffii.base.files import UserError
from diffii.base.seeds import generator
from diffii.base.settings import BenchmarkSettings, EditSettings, Settings
from diffii.evaluation.experiments import benchmark
from diffii.method.learning import check_learning
from diffii.method.editing import SIDES, fractal, join, mix
from diffii.run.dropping import drop, refill
from diffii.run.folders import RunFolder
from diffii.run.planning import plan_run, unet_calls
from diffii.run.review import remake
from diffii.run.runs import load_synthetic, run_suffixes, synthesize

BLACK, WHITE = (Image.new('RGB', (24, 16), colour) for colour in ('black', 'white'))
NEAR = dict(left=(0, 8), right=(23, 8), top=(12, 0), bottom=(12, 15))


@pytest.fixture(scope='module')
def pipe():
    return load(checkpoint(EDITS), batch_size=3)


@pytest.fixture
def make(pipe, tmp_path):
    "A short run of DiffuseMix in a folder."

    def _make(name='out', pipe=pipe, method='diffuse-mix', **edit):
        groups = dict(
            edit=edit,
            run=dict(seed=1),
            sampling=dict(method=method, expansion=2, steps=2, guidance_scale=4),
        )
        settings = Settings.of(pipe, 'tree', **groups)
        out = tmp_path / name
        return synthesize(pipe, TREES, out, settings, ['x'], progress=False)

    return _make


def pixels(image):
    return np.asarray(image).astype(int)


# the parts


@pytest.mark.parametrize('side', SIDES)
def test_the_kept_half_is_the_original(side):
    joined = join(BLACK, WHITE, side)

    assert joined.getpixel(NEAR[side]) == (0, 0, 0)
    opposite = dict(zip(SIDES, ('right', 'left', 'bottom', 'top')))[side]
    assert joined.getpixel(NEAR[opposite]) == (255, 255, 255)
    assert pixels(joined).mean() == pytest.approx(127.5, abs=1)


def test_a_seam_of_nothing_is_a_cut():
    assert set(np.unique(pixels(join(BLACK, WHITE, 'left', seam=0)))) <= {0, 255}


@pytest.mark.parametrize('number', range(8))
def test_fractals_are_pictures_of_their_seed(number):
    first, again = (fractal(generator(number), (32, 24)) for _ in range(2))

    assert first.size == (32, 24)
    assert not ImageChops.difference(first, again).getbbox()
    assert len(np.unique(pixels(first).reshape(-1, 3), axis=0)) > 3


def test_without_a_fractal_a_mixture_is_the_two_halves():
    mixed = mix(BLACK, WHITE, generator(3), EditSettings(fractal=0))

    assert any(mixed.tobytes() == join(BLACK, WHITE, s).tobytes() for s in SIDES)


# runs


def test_a_run_keeps_its_categories_and_moves_its_images(make, pipe):
    made = make(styles=('snowy', 'mosaic'))

    assert len(made) == 8
    assert made.counts.tolist() == [4, 4]
    assert all(row['label'] == row['source_label'] for row in made.rows)
    assert {row['suffix'] for row in made.rows} == {'snowy', 'mosaic'}
    assert RunFolder(made.folder).about()['edit']['fractal'] == 0.2
    for i, row in enumerate(made.rows):
        original = pipe.fit(TREES.open(TREES.names.index(row['sources'][0])))
        assert np.abs(pixels(made.open(i)) - pixels(original)).mean() > 5


def test_half_of_an_image_is_the_training_image(make, pipe):
    made = make(fractal=0)

    latents = pipe.encode_images([TREES.open(0)])
    original = pixels(pipe.decode_latents(latents)[0])
    row = next(i for i, r in enumerate(made.rows) if r['sources'] == [TREES.names[0]])
    same = (pixels(made.open(row)) == original).all(2)
    assert 0.35 < same.mean() < 0.9


def test_images_are_made_again(make, pipe):
    made = make()

    again = remake(pipe, made.folder, made.names[3])

    assert np.array_equal(pixels(again), pixels(made.open(3)))
    assert pipe.editing is None


def test_dropped_images_are_replaced_by_others(make, pipe):
    made = make()
    name, before = made.names[2], made.images[2].read_bytes()

    drop(made.folder, [name])
    refill(pipe, made.folder)

    found = load_synthetic(made.folder)
    assert found.images[2].read_bytes() != before
    again = remake(pipe, made.folder, name)
    assert np.array_equal(pixels(again), pixels(found.open(2)))


def test_styles_take_the_place_of_suffixes(tmp_path):
    edit, contexts = dict(styles=('snowy', 'mosaic')), dict(suffixes=['in snow.'])
    sampling = dict(method='diffuse-mix')
    settings = Settings.of(
        metaclass='tree', edit=edit, contexts=contexts, sampling=sampling
    )

    found = [
        run_suffixes(settings, TREES, tmp_path, given=given)
        for given in (None, ['at dusk.'])
    ]

    assert found == [(('snowy', 'mosaic'), 'styles of the edits')] * 2


def test_other_edits_are_another_run(make):
    make()
    with pytest.raises(UserError, match='edit'):
        make(fractal=0.5)


def test_a_plan_counts_three_calls_a_step(pipe):
    sampling = dict(method='diffuse-mix', steps=4)
    settings = Settings.of(pipe, 'tree', sampling=sampling)

    assert unet_calls(pipe, settings.sampling) == 12
    assert 'sampling' in str(plan_run(pipe, TREES, settings))


@pytest.mark.parametrize(
    'given, option',
    [
        (dict(few_step='own'), '--few-step'),
        (dict(solver='dpm++'), '--solver'),
        (dict(stride=3), '--stride'),
        (dict(guided=(0, 0.6)), '--guided'),
    ],
)
def test_sampling_that_does_not_apply_is_refused(given, option):
    with pytest.raises(UserError, match=f'{option}: does not apply to .*leave it out'):
        Settings.of(sampling=dict(method='diffuse-mix') | given)


def test_sampling_that_a_model_recommends_does_not_apply_to_edits():
    advice = dict(few_step='own', expansion=20, solver='dpm++', stride=3, steps=9)
    given = dict(method='diffuse-mix')

    found = Settings.of(dict(sampling=advice), 'tree', sampling=given).sampling

    assert (found.few_step, found.solver, found.stride) == (None, 'ddim', 1)
    assert (found.expansion, found.steps) == (5, 9)


# the right model


def test_another_kind_of_model_is_refused_with_the_remedy(make, tmp_path):
    with pytest.raises(UserError, match='--method diffuse-mix: .*instruct-pix2pix'):
        make(pipe=loaded('sd1'))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('method', ['diff-ii', 'real-gen', 'gif'])
def test_a_model_that_edits_serves_no_other_method(make, tmp_path, method):
    with pytest.raises(UserError, match='serves --method diffuse-mix alone'):
        make(method=method)
    assert not (tmp_path / 'out').exists()


def test_a_model_that_edits_learns_no_concepts(pipe):
    settings = Settings.of(pipe, 'tree')
    with pytest.raises(UserError, match='learns no concepts'):
        check_learning(pipe, TREES, settings.concepts)


def test_a_benchmark_says_so_before_it_begins(tmp_path):
    trials = dict(methods='original,diffuse-mix', shots=2, trials=1, quick=True)
    with pytest.raises(UserError, match='instruct-pix2pix'):
        benchmark(
            'few-shot', 'digits', tmp_path / 'x', BenchmarkSettings.of(trials=trials)
        )
    assert not (tmp_path / 'x').exists()


def test_no_styles_are_refused():
    with pytest.raises(UserError, match='--styles'):
        EditSettings(styles=())
