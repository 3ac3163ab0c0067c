"What is learned of the categories: what the method learns, or what a setting says."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from small_runs import GIVEN, SUFFIXES, few_birds, hardly_learned

from diffii.base.files import UserError
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import SamplingSettings, Settings
from diffii.evaluation.tasks import configuration
from diffii.method.concepts import named_concepts
from diffii.run.folders import RunFolder
from diffii.run.planning import plan_run
from diffii.run.pools import build_pool, load_pool
from diffii.run.review import load_concepts, remake
from diffii.run.runs import load_synthetic, synthesize

WORDS = 'red crowned blue backed', 'green crowned white backed'
NAMED = GIVEN | dict(concepts=dict(learn='none'))


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny', batch_size=8)


@pytest.fixture(scope='module')
def birds():
    return replace(few_birds(2), words=WORDS)


@pytest.fixture(scope='module')
def made(tmp_path_factory, pipe, birds):
    "A run of Diff-II that learns nothing."
    out = tmp_path_factory.mktemp('named') / 'out'
    settings = Settings.of(pipe, 'bird', **NAMED)
    return synthesize(pipe, birds, out, settings, SUFFIXES, progress=False)


@pytest.mark.parametrize(
    'method, learn, learned, rank',
    [
        ('diff-ii', None, 'tokens+lora', 10),
        ('diff-ii', 'tokens', 'tokens', 0),
        ('diff-ii', 'none', 'none', 10),
        ('da-fusion', None, 'tokens', 0),
        ('da-fusion', 'tokens+lora', 'tokens+lora', 10),
        ('real-gen', None, 'none', 10),
    ],
)
def test_a_method_learns_what_it_does_unless_a_setting_says_otherwise(
    method, learn, learned, rank
):
    given = dict(sampling=dict(method=method), concepts=dict(learn=learn))
    found = Settings.of(**given)
    assert (found.learned, found.concepts.rank) == (learned, rank)


def test_what_cannot_be_learned_is_named():
    with pytest.raises(UserError, match='--learn all: one of none, tokens, tokens'):
        Settings.of(concepts=dict(learn='all'))


def test_a_run_that_learns_nothing_calls_categories_by_their_words(made, pipe, birds):
    assert len(made) == 12
    assert not RunFolder(made.folder).concepts.exists()
    about = RunFolder(made.folder).about()
    assert about['concepts'] is None
    assert about['words'] == list(WORDS)
    prompt = load_concepts(made.folder).prompt(0, SUFFIXES[0])
    assert prompt == named_concepts(pipe, birds).prompt(0, SUFFIXES[0])
    assert WORDS[0] in prompt


def test_its_images_lie_on_the_circles_of_inversions_under_these_words(
    made, pipe, birds, tmp_path
):
    settings = Settings.of(pipe, 'bird', **NAMED).inversion
    by_hand = build_pool(pipe, birds, named_concepts(pipe, birds), tmp_path, settings)
    pool = load_pool(RunFolder(made.folder).pool, birds.classes)
    assert pool.names == by_hand.names
    for own, other in zip(pool.latents, by_hand.latents):
        assert (own - other).abs().max() < 1e-4
    assert {row['start'] for row in made.rows} == {'circle'}


def test_any_image_of_it_can_be_made_again(made, pipe):
    name = made.names[3]
    before = (made.folder / name).read_bytes()
    again = remake(pipe, made.folder, name)
    assert again.tobytes() == made.open(3).tobytes()
    assert (made.folder / name).read_bytes() == before


def test_a_run_that_learned_nothing_is_not_gone_on_with_by_one_that_learns(
    made, pipe, birds
):
    learning = dict(concepts=GIVEN['concepts'] | dict(learn='tokens+lora'))
    settings = Settings.of(pipe, 'bird', **GIVEN | learning)
    with pytest.raises(UserError, match=r'other settings \(concepts: null then'):
        synthesize(pipe, birds, made.folder, settings, SUFFIXES, progress=False)


def test_a_row_may_learn_something_else():
    found = configuration('diffii + learn=none + concept-steps=50')
    assert found.concepts == dict(learn='none', steps=50)
    assert found.recipe and found.words


def images_of(*counts, words=True):
    "What settings ask of images: how many there are of each category, and words."
    said = tuple(f'words {k}' for k in range(len(counts))) if words else ()
    return SimpleNamespace(counts=np.array(counts), words=said)


@pytest.mark.parametrize(
    'images, concepts, learned',
    [
        (images_of(5, 9), {}, 'tokens+lora'),
        (images_of(4, 9), {}, 'none'),
        (images_of(4, 9, words=False), {}, 'tokens+lora'),
        (images_of(4, 9), dict(with_words=False), 'tokens+lora'),
        (images_of(4, 9), dict(learn='tokens'), 'tokens'),
        (images_of(4, 9), dict(learn_from=4), 'tokens+lora'),
    ],
)
def test_categories_of_few_images_are_called_by_their_words(images, concepts, learned):
    given = dict(learn_from=5) | concepts
    assert Settings.of(concepts=given).for_images(images).learned == learned


def test_given_concepts_are_used_however_few_the_images_are():
    given = dict(concepts=dict(learn_from=5), run=dict(concepts='learned'))
    found = Settings.of(**given).for_images(images_of(1, 9))
    assert found.learned == 'tokens+lora'


@pytest.mark.parametrize(
    'metaclass, method, learned',
    [
        ('bird', 'diff-ii', 'none'),
        ('bird', 'diff-mix', 'tokens+lora'),  # its own way
        ('digit', 'diff-ii', 'tokens+lora'),
    ],
)
def test_the_shipped_model_recommends_words_for_rare_birds(
    pipe, metaclass, method, learned
):
    settings = Settings.of(pipe, metaclass, sampling=dict(method=method))
    assert settings.for_images(images_of(1, 40)).learned == learned


def test_a_plan_of_words_alone_has_no_learning(pipe, birds):
    seconds = dict(step=0.01, call=0.01, decoding=0.01, looks=0.01)
    plans = {}
    for n in (3, 4):
        given = GIVEN | dict(concepts=dict(learn_from=n))
        settings = Settings.of(pipe, 'bird', **given)
        plans[n] = {w['stage'] for w in plan_run(pipe, birds, settings, seconds).work}
    assert plans[3] - plans[4] == {'learning'}


def test_the_command_says_that_words_call_the_categories(tmp_path, say):
    for category in ('crow', 'gull'):
        (tmp_path / 'birds' / category).mkdir(parents=True)
        image = Image.new('RGB', (32, 32), 'white')
        image.save(tmp_path / 'birds' / category / '0.png')
    words = tmp_path / 'words.yaml'
    words.write_text('crow: black crowned\ngull: white crowned\n')
    out, few = tmp_path / 'more', '--metaclass bird --steps 4 --expansion 1 --no-review'
    given = [*few.split(), '--words', words, '--out', out]
    found = say('augment', tmp_path / 'birds', *given)
    assert found.code == 0
    assert 'crow has fewer than 11 images: words call the categories' in found.out
    assert len(load_synthetic(out)) == 2


def test_birds_are_spread_evenly_and_other_methods_spread_their_own_way(pipe):
    assert SamplingSettings.of(pipe, 'bird').spread == 'even'
    assert SamplingSettings.of(pipe, 'bird', method='diff-ii').spread == 'even'
    assert SamplingSettings.of(pipe, 'bird', guidance_scale=3).spread == 'even'
    assert SamplingSettings.of(pipe, 'bird', method='diff-mix').spread == 'own'
    assert SamplingSettings.of(pipe, 'digit').spread == 'own'


@pytest.mark.parametrize(
    'named, why',
    [
        (NAMED, '--learn none'),
        (GIVEN | dict(sampling=dict(method='real-gen')), '--method real-gen'),
    ],
)
def test_given_concepts_and_nothing_to_learn_are_not_both(
    named, why, tmp_path, pipe, birds
):
    learned = hardly_learned(pipe, birds)
    settings = Settings.of(pipe, 'bird', **named)
    with pytest.raises(UserError, match=f'--concepts: with {why}'):
        synthesize(pipe, birds, tmp_path / 'out', settings, SUFFIXES, learned)
    assert not (tmp_path / 'out').exists()
