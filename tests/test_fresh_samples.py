"What an experiment learns from, is chosen on, judged by and reported on is kept apart."

import numpy as np
import pytest

from diffii.base.files import UserError
from diffii.base.settings import TrialSettings
from diffii.data import aviary
from diffii.data.sets import deal, shipped_set
from diffii.evaluation.tasks import conditions

TASKS = [('few-shot', 'digits'), ('few-shot', 'aviary'), ('long-tail', 'digits')]
TASKS += [('long-tail', 'aviary'), ('ood', 'aviary')]


def digests(images):
    return {images.digest(i) for i in range(len(images))}


def samples(task, data, trials=1):
    "Training and test sets of some trials."
    options = {} if task == 'long-tail' else dict(shots=3)
    grid = conditions(task, data, TrialSettings(methods='original', **options))
    return [grid[0].sample(trial) for trial in range(trials)]


@pytest.mark.parametrize('task, name', TASKS)
def test_tuning_oracle_and_test_share_no_image(task, name):
    reported, tuning = (shipped_set(name, tuning) for tuning in (False, True))
    sets = {True: samples(task, tuning), False: samples(task, reported)}

    tested, chosen_on = (
        set().union(*(digests(test) for _, test in sets[is_tuning]))
        for is_tuning in (False, True)
    )
    judged_by = set()
    for is_tuning, view in ((False, reported), (True, tuning)):
        for _, test in sets[is_tuning]:
            judged_by |= digests(view.plenty(test.classes, 5))

    assert not tested & chosen_on
    assert not tested & judged_by
    assert not chosen_on & judged_by


@pytest.mark.parametrize('task, name', TASKS)
def test_no_training_image_is_tested_on(task, name):
    for tuning in (False, True):
        for train, test in samples(task, shipped_set(name, tuning)):
            assert not digests(train) & digests(test)


@pytest.mark.parametrize('task', ['few-shot', 'long-tail', 'ood'])
def test_birds_that_settings_are_chosen_on_are_not_reported_on(task):
    of = {
        tuning: set(samples(task, shipped_set('aviary', tuning))[0][0].classes)
        for tuning in (False, True)
    }
    looked_at = {f'species_{n}' for n in (*aviary.UNSEEN, *aviary.VALIDATION)}

    assert len(of[False]) == len(of[True]) == 12
    assert not of[False] & of[True]
    assert not (of[False] | of[True]) & looked_at


def recipe(number):
    bird = aviary.species(number)
    return tuple(getattr(bird, part) for part in aviary.PARTS)


def test_no_trial_has_a_recipe_that_the_model_or_another_trial_has():
    known = [recipe(n) for n in aviary.BASE]
    known += [
        recipe(n) for n in (*aviary.UNSEEN, *aviary.VALIDATION, *aviary.WATERBIRDS)
    ]
    purposes = ('reported', 'shifted', 'tuning', 'shifted_tuning')

    fresh = [
        recipe(n)
        for purpose in purposes
        for trial in range(10)
        for n in aviary.fresh_species(trial, purpose)
    ]

    assert len(set(fresh)) == len(fresh) == 4 * 10 * 12
    assert not set(fresh) & set(known)


@pytest.mark.parametrize('trial', [-1, 60])
def test_a_trial_without_species_is_an_error(trial):
    with pytest.raises(UserError, match='no dozen of species'):
        aviary.fresh_species(trial)


def test_hands_of_one_deck_do_not_overlap():
    pool = shipped_set('digits').pool
    hands = [set(deal(pool, 5, trial)[0].names) for trial in range(4)]

    assert len(set().union(*hands)) == 4 * 50
    assert all(len(hand) == 50 for hand in hands)


def test_a_deck_is_shuffled_anew_where_it_does_not_hold_another_hand():
    pool = shipped_set('digits').pool
    shots = int(pool.counts.min()) // 2 + 1  # one hand of the rarest digit

    first, second = (deal(pool, shots, trial)[0] for trial in (0, 1))

    assert (first.counts == shots).all() and (second.counts == shots).all()
    assert first.names != second.names


def test_other_categories_are_rare_in_another_trial():
    rare = []
    for train, _ in samples('long-tail', shipped_set('digits'), trials=6):
        rare.append(int(np.argmin(train.counts)))
        assert train.counts.min() >= 1
    assert len(set(rare)) > 2
