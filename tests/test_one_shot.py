"One training image of each category: what every method makes of it."

import pytest
from small_models import EDITS, checkpoint, load
from small_runs import GIVEN, MAKING, SUFFIXES, few_birds, hardly_learned

from diffii.base.images import few_shot
from diffii.base.methods import METHODS
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import Settings
from diffii.method.inversion import image_of
from diffii.run.runs import synthesize


@pytest.fixture(scope='module')
def birds():
    "Two categories with one image each."
    return few_shot(few_birds(2), 1, seed=0)[0]


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny', batch_size=8)


@pytest.fixture(scope='module')
def concepts(pipe, birds):
    return hardly_learned(pipe, birds)


@pytest.mark.parametrize('method', MAKING)
def test_every_method_makes_images_of_one(tmp_path, pipe, birds, concepts, method):
    sampling = dict(method=method, expansion=3, steps=2)
    settings = Settings.of(pipe, 'bird', **GIVEN | dict(sampling=sampling))
    given = concepts if METHODS[method].learn == 'tokens+lora' else None

    made = synthesize(
        pipe, birds, tmp_path / 'out', settings, SUFFIXES, given, progress=False
    )

    assert len(made) == 6
    for row in made.rows:
        own = birds.names[birds.classes.index(row['source_label'])]
        views = {name.split('#')[0] for name in map(image_of, row['sources'])}
        assert views == ({own} if METHODS[method].start != 'noise' else set())
        assert len(set(row['sources'])) == len(row['sources'])  # two views, for a pair


def test_edits_are_made_of_one(tmp_path, birds):
    pipe = load(checkpoint(EDITS), batch_size=3)
    sampling = dict(method='diffuse-mix', expansion=3, steps=2)
    settings = Settings.of(pipe, 'bird', sampling=sampling)

    made = synthesize(pipe, birds, tmp_path / 'out', settings, progress=False)

    assert made.counts.tolist() == [3, 3]
