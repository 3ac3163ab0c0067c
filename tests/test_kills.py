"kill -9 at every write of every command: the same command goes on and ends the same."

import os
import shutil
from itertools import count

import pytest
from garden import photo
from kills import KILLED, assert_same, done, forked

from diffii.base import pipeline
from diffii.evaluation import gallery, training, tuning  # noqa: F401  loaded once
from diffii.run.review import status
from diffii.run.runs import load_synthetic

pytest.importorskip('resource')  # POSIX alone

AUGMENT = ('augment', 'images', '--metaclass', 'flower', '--out', 'out', '--no-review')
AUGMENT += ('--concept-steps', 2, '--steps', 3, '--expansion', 2)
SMALL = ('--arch', 'small', '--classifier-size', 16, '--classifier-steps', 2)
TRAIN = ('train', 'images', '--synthetic', 'out', '--seeds', 1, '--folds', 2, *SMALL)
TUNE = ('tune', 'images', '--metaclass', 'flower', '--out', 'tuned', '--folds', 2)
TUNE += ('--seeds', 1, '--methods', 'real-guidance', '--replacements', '0.5,0.9')
TUNE += ('--budget', 2, '--concept-steps', 1, '--steps', 2, '--expansion', 1, *SMALL)

CASES = {
    'drop by name': ('drop', 'out', 'a/00000.png', 'b/00001.png'),
    'drop by file': ('drop', 'out', '--file', 'rejected.txt'),
    'drop the worst': ('drop', 'out', '--worst', '50%'),
    'keep': ('drop', 'out', '--keep'),
    'refill all': ('drop', 'out', '--refill'),
    'refill by name': ('drop', 'out', 'a/00000.png', 'a/00005.png', '--refill'),
    'refill the worst': ('drop', 'out', '--worst', '50%', '--refill'),
    'score': ('score', 'out', 'denoising', 'lpips'),
    'review': ('review', 'out'),
    'review beside': ('review', 'out', '--inside', 0, '--no-diversity'),
    'predict': ('predict', 'trained', 'images', '--to', 'kinds.csv'),
    'train': (*TRAIN, '--out', 'again'),
    'train with a test set': (*TRAIN, '--test', 'test', '--out', 'again'),
    'tune': TUNE,
}
LIGHT = ('drop by name', 'drop by file', 'drop the worst', 'keep', 'predict')


def moments_of(case):
    "When a command is killed: at every write, or where it takes long at ever fewer."
    everywhere = case in LIGHT or 'DIFFII_KILLS' in os.environ
    return count() if everywhere else (n * n for n in count(1))


def plant(folder, seed):
    "Three images of each of two categories."
    for k, name in enumerate('ab'):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            photo(seed + 10 * k + i).save(folder / name / f'{i}.png')


@pytest.fixture(scope='module')
def pipe():
    "The model, which forked processes need not load again."
    loaded = pipeline.load_pipeline('tiny')
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, 'load_pipeline', lambda *a, **k: loaded)
        yield loaded


@pytest.fixture(scope='module')
def prepared(pipe, tmp_path_factory):
    "A folder with a run that has scores and dropped images, and a classifier."
    place = tmp_path_factory.mktemp('prepared')
    plant(place / 'images', 0)
    plant(place / 'test', 100)
    (place / 'rejected.txt').write_text('train/a/00001.png\ntrain/b/00004.png\n')
    done(AUGMENT, place)
    done(('score', 'out', 'lpips'), place)
    done(('drop', 'out', 'a/00005.png', 'b/00000.png'), place)
    done((*TRAIN, '--test', 'test', '--out', 'trained'), place)
    return place


@pytest.fixture
def copied(prepared, tmp_path):
    "A function that copies what is prepared."
    return lambda name: shutil.copytree(prepared, tmp_path / name)


@pytest.mark.parametrize('case', CASES)
def test_a_command_that_is_killed_again_and_again_ends_the_same(case, copied):
    # given: the folder that an uninterrupted command leaves
    words, whole, broken = CASES[case], copied('whole'), copied('broken')
    done(words, whole)

    # when: the command is killed before a write, or after it, and begun again
    for moment in moments_of(case):
        code, printed = forked(words, broken, moment)
        if code != KILLED:
            break
        load_synthetic(broken / 'out')
        status(broken / 'out')

    # then: the last one ends by itself, and all is as if there had been one
    assert code == 0, printed
    assert moment > 1
    assert_same(broken, whole)
