"A plan of any length takes no more memory than a short one, and is the same plan."

import tracemalloc
from collections import Counter
from types import SimpleNamespace

import pytest

import diffii  # noqa: F401  before torch
import torch
from diffii.base.settings import SamplingSettings
from diffii.method.interpolation import MANY, draw_pairs, iter_pairs
from diffii.method.synthesis import Planner, iter_plan, kind_of
from diffii.base.seeds import generator
from diffii.run.cards import columns, summary_of
from diffii.run.folders import RunFolder, read_rows
from diffii.run.runs import by_batch

CLASSES = ('oak', 'ash')
SHORT, LONG = 500, 2500  # images
ENOUGH = 300_000  # bytes; as many rows as lie between the two take twenty times that


def planner(**given):
    "A plan of two categories with three inversions each."
    settings = SamplingSettings(**dict(split_ratio=0.0) | given)
    latents = [torch.randn((3, 1, 2, 2), generator=generator(k)) for k in (0, 1)]
    names = [[f'{name}{i}' for i in range(3)] for name in CLASSES]
    pool = SimpleNamespace(names=names, latents=latents)
    return Planner(CLASSES, pool, [], settings, 'tiny', 0)


def write_plan(folder, images, **given):
    "Write a plan of so many images, in batches of eight."
    rows = iter_plan(planner(expansion=images // 2, **given), (1, 1), 8)
    folder.write_rows(folder.plan, rows)


def walk(folder, images):
    assert sum(map(len, by_batch(folder.planned_rows()))) == images


def settle(folder, images):
    folder.settle()


def read_last(folder, images):
    assert summary_of(folder.final_rows()).n == images


@pytest.mark.parametrize(
    'step', (walk, settle, read_last, None), ids=('walk', 'settle', 'rows', 'plan')
)
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, step):
    peaks = []
    for images in (20, SHORT, LONG):  # the first loads what is loaded once
        folder = RunFolder(tmp_path / str(images))
        if step:
            write_plan(folder, images)
        tracemalloc.start()
        step(folder, images) if step else write_plan(folder, images)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[2] < peaks[1] + ENOUGH


def test_rows_held_in_a_list_would_be_seen(tmp_path):
    folder = RunFolder(tmp_path)
    write_plan(folder, LONG)

    tracemalloc.start()
    rows = read_rows(folder.plan)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()

    assert held * (LONG - SHORT) / len(rows) > 10 * ENOUGH


MIXED = (
    dict(),
    dict(noise_share=0.4),
    dict(method='da-fusion', strengths=(0.2, 0.5, 0.9)),
)


@pytest.mark.parametrize('given', MIXED, ids=('circle', 'some noise', 'strengths'))
def test_batches_are_of_one_kind_and_numbered_kind_by_kind(given):
    rows = list(iter_plan(planner(expansion=20, **given), (2, 1), 8))
    batches = sorted(by_batch(rows), key=lambda batch: batch[0]['batch'])

    assert [b[0]['batch'] for b in batches] == list(range(len(batches)))
    kinds = [{kind_of(row) for row in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    assert kinds == sorted(kinds, key=list)
    not_full = [k for k, batch in zip(kinds, batches) if len(batch) < 8]
    assert max(Counter(map(tuple, not_full)).values(), default=0) <= 1


@pytest.mark.parametrize('images', (1, 5))
def test_batches_of_spread_rows_are_whole(images):
    "Under a guide the rows of one training image share batches, not those side by side."
    rows = list(iter_plan(planner(expansion=7, method='gif'), (images, images + 1), 4))
    grouped = {}
    for row in rows:
        grouped.setdefault(row['batch'], []).append(row)

    found = {batch[0]['batch']: batch for batch in by_batch(rows)}

    assert [row['index'] for row in rows[: 7 * images]] == list(range(7 * images))
    assert any(a['batch'] != b['batch'] for a, b in zip(rows, rows[1:4]))
    assert found == grouped


def test_batches_come_as_soon_as_they_are_whole():
    rows = iter_plan(planner(expansion=100), (1, 1), 8)

    first = next(by_batch(rows))

    assert len(first) == 8
    assert len(list(rows)) == 200 - 9


def test_a_batch_that_was_made_again_later_is_a_batch_of_its_own():
    rows = list(iter_plan(planner(expansion=3), (1, 1), 4))
    later = [{**rows[1], 'attempt': 3, 'batch': 2}]

    sizes = [len(batch) for batch in by_batch(rows + later)]

    assert sizes == [4, 2, 1]


@pytest.mark.parametrize('count', (1, 6, 7, 40))
def test_pairs_come_one_after_the_other_as_in_a_list(count):
    one_by_one = iter_pairs(3, count, generator(0))

    assert list(one_by_one) == draw_pairs(3, count, generator(0))


def test_more_pairs_than_there_are_of_many_inversions_come_to_an_end(monkeypatch):
    "Beyond `MANY` pairs are tried; with few pairs left that would take for ever."
    monkeypatch.setattr('diffii.method.interpolation.MANY', 10)

    pairs = draw_pairs(5, 100, generator(0))

    assert MANY > 10
    assert len(pairs) == 100
    assert all(a != b for a, b in pairs)
    assert len(set(pairs[:10])) == 10
    assert len(set(pairs)) == 20


def test_few_rows_have_the_columns_of_all():
    rows = [dict(attempt=0, a=value) for value in (1, None, 2, 3.5, 4)]
    rows += [dict(attempt=1, file_name='x.png', b=[1, 2]), dict(attempt=0, b=[])]

    found = summary_of(rows * 3)

    assert columns(found.rows, ('oak',)) == columns(rows, ('oak',))
    assert (found.n, len(found.rows), found.again) == (21, 5, {'x.png'})
