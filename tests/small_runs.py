"Runs on a few drawn birds with hardly learned concepts and few steps."

from diffii.base.images import few_shot
from diffii.base.methods import METHODS
from diffii.base.settings import ConceptSettings
from diffii.data.aviary import VALIDATION, aviary_set
from diffii.method.learning import learn_concepts

# methods that make images with the shipped model
MAKING = [m for m, about in METHODS.items() if about.start not in ('nothing', 'edit')]
SUFFIXES = ['flying over water.', 'on a branch.', 'in the snow.']
GIVEN = dict(
    run=dict(seed=1),
    sampling=dict(expansion=2, steps=3),
    concepts=dict(steps=2, batch_size=6),
    inversion=dict(per_image=1, forward_steps=0, fixed_point_iters=0),
)


def few_birds(categories):
    "Three images of each category, of species that the model has not seen."
    return few_shot(aviary_set(list(VALIDATION)[:categories], n=8), 3, seed=0)[0]


def hardly_learned(pipe, birds):
    "Concepts of the birds after two steps."
    settings = ConceptSettings.of(pipe, 'bird', **GIVEN['concepts'])
    return learn_concepts(pipe, birds, settings, seed=1)
