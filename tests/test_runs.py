"""A run's folder: what it holds, how it goes on after an interruption, what is refused,
and how single images are made again."""

import math
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from garden import a_record
from small_runs import GIVEN, MAKING, SUFFIXES, few_birds, hardly_learned

from diffii.base.files import UserError, read_json, write_json
from diffii.base.pipeline import load_pipeline
from diffii.base.records import write_record
from diffii.base.settings import ConceptSettings, Settings
from diffii.run import review, runs
from diffii.run.dropping import drop
from diffii.run.folders import RECORD, STATE, RunFolder
from diffii.run.folders import claim, holds_run, tentative
from diffii.run.pools import load_pool
from diffii.run.review import load_concepts, per_minute, remake, status
from diffii.run.runs import load_synthetic, synthesize


@pytest.fixture(scope='session')
def birds():
    "Three categories of species that the model has not seen, three images of each."
    return few_birds(3)


@pytest.fixture(scope='session')
def pipe():
    "The shipped model, for batches of eight."
    return load_pipeline('tiny', batch_size=8)


@pytest.fixture(scope='session')
def concepts(pipe, birds):
    "Concepts of the birds, hardly learned."
    return hardly_learned(pipe, birds)


@pytest.fixture(scope='session')
def make(pipe, birds, concepts):
    "Make a folder of synthetic birds with few steps; settings are given by group."

    def _make(
        out,
        images=birds,
        suffixes=SUFFIXES,
        concepts=concepts,
        pool=None,
        progress=lambda *now: None,
        **groups,
    ):
        given = {k: {**GIVEN.get(k, {}), **groups.get(k, {})} for k in GIVEN}
        settings = Settings.of(pipe, images.metaclass, **given)
        used = None if settings.learned == 'none' else concepts
        return synthesize(pipe, images, out, settings, suffixes, used, pool, progress)

    return _make


@pytest.fixture(scope='session')
def straight(make, tmp_path_factory):
    "A run that was never interrupted: 18 images in batches of 8, 8 and 2."
    return make(tmp_path_factory.mktemp('runs') / 'straight')


def pixels(image):
    return np.asarray(image).astype(int)


def assert_same_images(a, b):
    "The files of two folders are the same to the bit."
    assert a.names == b.names
    for one, other in zip(a.images, b.images):
        assert one.read_bytes() == other.read_bytes()


class Stop(Exception):
    "What stands in for Ctrl-C."


def stop_after_a_batch(stage, done, total):
    if stage == 'images' and done > 0:
        raise Stop


# ---- what a run makes


def test_two_folders_are_added_with_their_rows(straight, birds):
    both = straight + straight

    assert (len(both), len(both.rows)) == (36, 36)
    assert both.targets.shape == (36, 3)
    with pytest.raises(UserError, match='SyntheticSet: add another one'):
        straight + birds


def test_every_stage_reports_its_progress(make, tmp_path):
    seen = []
    make(tmp_path / 'out', concepts=None, progress=lambda *now: seen.append(now))
    assert {stage for stage, *_ in seen} == {'concepts', 'inversion', 'images'}
    assert seen[-1] == ('images', 18, 18)


def test_the_folder_holds_images_a_card_and_metadata(straight, birds):
    shown = sorted(p.name for p in straight.folder.iterdir() if p.name[0] != '.')
    assert shown == ['README.md', 'metadata.jsonl', 'train']
    shown = sorted(p.name for p in RunFolder(straight.folder).images.iterdir())
    assert shown == sorted(birds.classes)
    assert straight.counts.tolist() == [6, 6, 6]


def test_the_record_keeps_the_settings_by_group(straight, birds):
    record = read_json(straight.folder / STATE / 'run.json')
    assert record['format'] == 3
    assert record['sampling']['expansion'] == 2
    assert record['concepts']['steps'] == 2
    assert record['inversion']['steps'] == 3
    assert set(record['images']) == set(birds.names)


@pytest.mark.parametrize('method', MAKING)
def test_every_method_makes_its_images(make, tmp_path, method):
    got = make(tmp_path / 'out', concepts=None, sampling=dict(method=method))
    assert len(got) == 18
    assert len(list(got.folder.glob('train/*/*.png'))) == 18


def test_the_original_set_alone_gets_no_images(make, tmp_path):
    got = make(tmp_path / 'out', sampling=dict(method='original'))
    assert len(got) == 0


def test_labels_between_two_categories_are_soft(make, tmp_path):
    mix = make(tmp_path / 'out', sampling=dict(method='diff-mix'))
    assert np.allclose(mix.targets.sum(1), 1)
    assert 0 < mix.targets.max() < 1
    assert all(a != b for a, b in zip(mix.labels, mix.source_labels))
    assert (mix.subset([3, 5]).targets == mix.targets[[3, 5]]).all()


def test_a_method_learns_no_more_than_it_needs(make, tmp_path):
    alone = dict(concepts=None)
    named = make(tmp_path / 'named', **alone, sampling=dict(method='real-guidance'))
    tokens = make(tmp_path / 'tokens', **alone, sampling=dict(method='da-fusion'))
    assert not list((named.folder / STATE).glob('concepts*'))
    assert load_concepts(tokens.folder).lora == {}
    assert tokens.source_labels == tokens.labels


def test_a_filter_drops_half_and_going_on_changes_nothing(make, tmp_path):
    given = dict(sampling=dict(method='real-filter'))
    got = make(tmp_path / 'out', **given)
    assert len(read_json(got.folder / STATE / 'dropped.json')) == 18

    again = make(tmp_path / 'out', **given)
    assert again.names == got.names


# ---- one image again


@pytest.mark.parametrize('method', ['real-filter', 'real-mix', 'diff-aug', 'diff-ii'])
def test_remake_equals_the_file(make, pipe, tmp_path, method):
    got = make(tmp_path / 'out', sampling=dict(method=method))
    for i in (0, 7):
        assert (
            pixels(remake(pipe, got.folder, got.names[i])) == pixels(got.open(i))
        ).all()


def test_remake_refuses_unknown_names_and_other_models(straight, pipe, monkeypatch):
    with pytest.raises(UserError, match='x/00000.png: no such image'):
        remake(pipe, straight.folder, 'x/00000.png')
    monkeypatch.setattr(review, 'same_model', lambda a, b: False)
    with pytest.raises(UserError, match='--model tiny: the images were made with'):
        remake(pipe, straight.folder, straight.names[0])


def test_an_image_that_cannot_be_made_again_says_why(straight, pipe, monkeypatch):
    monkeypatch.setattr(review, 'make_batch', lambda *job: [None] * len(job[-1]))

    with pytest.raises(UserError, match='00000.png: came out .* --dtype float32, as'):
        remake(pipe, straight.folder, straight.names[0])


@pytest.fixture
def fail_in(monkeypatch):
    "Let the second image of every category fail in its first attempts."
    make_batch = runs.make_batch

    def fail_first(attempts):
        def failing(pipe, concepts, pool, rows):
            images = make_batch(pipe, concepts, pool, rows)
            fails = [r['attempt'] < attempts and r['index'] == 1 for r in rows]
            return [None if f else image for f, image in zip(fails, images)]

        monkeypatch.setattr(runs, 'make_batch', failing)

    yield fail_first
    monkeypatch.undo()


def test_an_image_that_fails_is_made_from_another_seed(
    make, pipe, tmp_path, fail_in, monkeypatch
):
    fail_in(2)
    got = make(tmp_path / 'out', sampling=dict(method='random-noise'))
    assert [r['attempt'] for r in got.rows] == [2 * (r['index'] == 1) for r in got.rows]
    assert '3 failed at first' in (got.folder / 'README.md').read_text()
    assert status(got.folder)['redrawn'] == 3

    monkeypatch.undo()
    for i in (0, 1):
        assert (
            pixels(remake(pipe, got.folder, got.names[i])) == pixels(got.open(i))
        ).all()


def test_an_image_that_always_fails_stops_the_run(make, tmp_path, fail_in):
    fail_in(3)
    with pytest.raises(UserError, match='from 3 seeds'):
        make(tmp_path / 'out', sampling=dict(method='random-noise'))


def test_a_run_goes_on_without_images_that_always_fail(make, pipe, tmp_path, fail_in):
    fail_in(3)
    out, given = tmp_path / 'out', dict(sampling=dict(method='random-noise'))
    named = set()
    for _ in range(3):
        with pytest.raises(UserError) as error:
            make(out, **given)
        words = re.search(r'\((diffii drop .*?)\)', str(error.value))[1].split()
        assert words[2] == str(out)
        named |= set(words[3:])
        drop(out, words[3:])
        if len(named) == 3:
            break

    made = make(out, **given)

    assert len(made) == 15
    assert sorted(named) == sorted(name for name in named if '00001.png' in name)
    assert (pixels(remake(pipe, out, made.names[0])) == pixels(made.open(0))).all()


# ---- going on


def test_an_interrupted_run_ends_with_the_same_files(make, tmp_path):
    straight = make(tmp_path / 'straight', concepts=None)
    with pytest.raises(Stop):
        make(tmp_path / 'out', concepts=None, progress=stop_after_a_batch)
    made = list(tmp_path.glob('out/train/*/*.png'))
    stamps = [file.stat().st_mtime_ns for file in made]
    assert len(made) == 8
    lines = (tmp_path / 'out' / 'metadata.jsonl').read_text().splitlines()
    assert len(lines) == 8
    now = status(tmp_path / 'out')
    assert (now['done'], sum(now['missing'].values())) == (8, 10)
    with pytest.warns(UserWarning, match='10 planned images are not made yet; run the'):
        assert len(load_synthetic(tmp_path / 'out')) == 8

    resumed = make(tmp_path / 'out', concepts=None)

    assert [file.stat().st_mtime_ns for file in made] == stamps
    assert_same_images(resumed, straight)
    metadata = resumed.folder / 'metadata.jsonl'
    assert metadata.read_bytes() == (straight.folder / 'metadata.jsonl').read_bytes()


def test_half_written_files_of_a_killed_run_go(make, tmp_path):
    got = make(tmp_path / 'out')
    half = got.images[0].with_name('.00000.png.123.tmp')
    half.touch()
    make(tmp_path / 'out')
    assert not half.exists()


def test_only_what_is_missing_is_made_again(make, tmp_path):
    got = make(tmp_path / 'out')
    before = got.images[9].read_bytes()
    got.images[9].unlink()
    with pytest.raises(UserError, match='missing; run the command that made it again'):
        load_synthetic(got.folder)
    assert make(tmp_path / 'out').images[9].read_bytes() == before


def test_a_shared_pool_gives_the_same_images(make, straight, tmp_path):
    pool = load_pool(straight.folder / STATE / 'pool', straight.classes)
    got = make(tmp_path / 'out', pool=pool)
    assert_same_images(got, straight)

    with pytest.raises(UserError, match='other settings'):
        make(tmp_path / 'other', pool=pool, sampling=dict(steps=5))


def test_what_is_watched_and_logged_is_no_part_of_a_run(make, tmp_path):
    make(tmp_path / 'out', run=dict(log='a.jsonl', sample_every=7))
    again = make(tmp_path / 'out', run=dict(log='b.jsonl', sample_every=9))
    assert len(again) == 18


# ---- a full memory


@contextmanager
def crowded(pipe, memory):
    "The U-Net runs out of memory above `memory.images` images."
    forward = pipe.unet.forward

    def limited(x, *args, **kwargs):
        if len(x) > memory.images:
            raise torch.cuda.OutOfMemoryError()
        return forward(x, *args, **kwargs)

    pipe.unet.forward = limited
    try:
        yield
    finally:
        pipe.unet.forward = forward
        pipe.micro_batch = pipe.batch_size


@pytest.fixture
def in_parts(make, pipe, tmp_path):
    "A run that from its second batch on has memory for four images."
    memory = SimpleNamespace(images=math.inf)

    def then_fill(stage, done, total):
        if stage == 'images' and done == 8:
            memory.images = 4

    with crowded(pipe, memory), pytest.warns(UserWarning, match='memory ran out'):
        got = make(tmp_path / 'crowded', progress=then_fill)
    yield got
    pipe.micro_batch = pipe.batch_size


def test_a_run_without_memory_goes_on_in_parts(in_parts, straight, pipe):
    assert [r['micro_batch'] for r in in_parts.rows] == [None] * 8 + [4] * 10
    for i in range(len(straight)):
        apart = np.abs(pixels(in_parts.open(i)) - pixels(straight.open(i)))
        assert apart.mean() < 1
    for i in (0, 7, 8, 17):
        again = remake(pipe, in_parts.folder, in_parts.names[i])
        assert (pixels(again) == pixels(in_parts.open(i))).all()


def test_a_lost_image_is_made_in_the_parts_it_was_made_in(in_parts, make, tmp_path):
    before = in_parts.images[12].read_bytes()
    in_parts.images[12].unlink()
    again = make(tmp_path / 'crowded')
    assert again.images[12].read_bytes() == before
    assert [r['micro_batch'] for r in again.rows] == [
        r['micro_batch'] for r in in_parts.rows
    ]


def test_memory_for_less_than_an_image_stops_until_there_is_more(
    in_parts, make, pipe, tmp_path
):
    before = in_parts.images[12].read_bytes()
    for i in range(8, 16):
        in_parts.images[i].unlink()
    none = SimpleNamespace(images=0)
    with crowded(pipe, none), pytest.raises(UserError, match='--dtype float16'):
        make(tmp_path / 'crowded')
    assert status(tmp_path / 'crowded')['done'] == 10
    again = make(tmp_path / 'crowded')
    assert again.images[12].read_bytes() == before


# ---- what is refused


def test_a_folder_goes_on_with_its_own_settings_alone(make, straight):
    with pytest.raises(UserError, match='sampling: expansion: 2 then, 3 now'):
        make(straight.folder, sampling=dict(expansion=3))


def test_a_folder_of_other_files_is_left_alone(make, tmp_path):
    (tmp_path / 'thesis.tex').write_text('...')
    with pytest.raises(UserError, match='thesis.tex'):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_a_folder_of_version_0_1_is_refused_in_one_line(make, straight, tmp_path):
    record = read_json(straight.folder / STATE / 'run.json')
    for key in ('format', 'diffii'):
        record.pop(key)
    write_json(tmp_path / 'old' / STATE / 'run.json', record)
    for ask in (make, status, lambda out: remake(None, out, 'x')):
        with pytest.raises(UserError) as error:
            ask(tmp_path / 'old')
        text = str(error.value)
        assert str(tmp_path / 'old') in text and 'give another folder' in text
        assert '\n' not in text


@pytest.mark.parametrize(
    'wrong, named',
    [
        (dict(sampling=dict(steps=2000)), '--steps 2000'),
        (dict(sampling=dict(steps=0)), '--steps 0'),
        (dict(run=dict(tracker='paper')), '--tracker paper'),
        (dict(suffixes=[]), '--suffixes'),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    make, tmp_path, wrong, named
):
    with pytest.raises(UserError, match=named):
        make(tmp_path / 'out', **wrong)
    assert not (tmp_path / 'out').exists()


def test_categories_that_differ_in_capitals_alone_are_refused(make, birds, tmp_path):
    alike = replace(birds, classes=('oak', 'Oak', 'elm'))
    with pytest.raises(UserError, match="categories 'oak', 'Oak': one folder on"):
        make(tmp_path / 'out', images=alike, concepts=None)
    assert not (tmp_path / 'out').exists()


def test_wrong_settings_of_concepts_are_refused_too(pipe, birds, tmp_path):
    settings = Settings.of(pipe, 'bird', **{**GIVEN, 'concepts': dict(n_tokens=0)})
    with pytest.raises(UserError, match='--tokens 0'):
        synthesize(pipe, birds, tmp_path / 'out', settings, SUFFIXES)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'change, named',
    [
        (dict(base='0' * 16), 'another model'),
        (dict(classes=('a', 'b', 'c')), 'other categories'),
        (dict(metaclass='animal'), '--metaclass bird: .* give --metaclass animal'),
    ],
)
def test_concepts_of_others_are_refused(make, concepts, tmp_path, change, named):
    with pytest.raises(UserError, match=named):
        make(tmp_path / 'out', concepts=replace(concepts, **change))
    assert not (tmp_path / 'out').exists()


@pytest.fixture
def of_a_folder(pipe, birds, concepts, tmp_path):
    "A run with a model of a folder on this machine."
    here = replace(pipe, model=str(tmp_path / 'secret' / 'sd15'))
    settings = Settings.of(here, 'bird', **GIVEN)

    def run():
        out = tmp_path / 'out'
        return synthesize(
            here, birds, out, settings, SUFFIXES, concepts, progress=False
        )

    return run


def test_the_metadata_does_not_tell_where_a_model_lies(of_a_folder, pipe):
    made = of_a_folder()

    assert {row['model'] for row in made.rows} == {'sd15'}
    for file in (made.folder / 'metadata.jsonl', made.folder / 'README.md'):
        assert 'secret' not in file.read_text()
    assert 'secret' in RunFolder(made.folder).about()['model']
    assert (
        pixels(remake(pipe, made.folder, made.names[0])) == pixels(made.open(0))
    ).all()


def test_a_run_with_a_model_of_a_folder_goes_on(of_a_folder):
    made = of_a_folder()
    before = made.images[0].read_bytes()
    made.images[0].unlink()

    again = of_a_folder()

    assert again.images[0].read_bytes() == before
    assert again.rows == made.rows


def test_a_compiled_network_stands_in_the_record(pipe, birds, concepts, tmp_path):
    compiled = replace(pipe, compiled=pipe.unet)
    settings = Settings.of(pipe, 'bird', **GIVEN)
    common = dict(concepts=concepts, progress=False)
    out = tmp_path / 'out'
    synthesize(compiled, birds, out, settings, SUFFIXES, **common)

    assert RunFolder(out).about()['compile']
    with pytest.raises(UserError, match='compile: true then'):
        synthesize(pipe, birds, out, settings, SUFFIXES, **common)


def test_a_split_ratio_of_less_than_a_step_is_told(make, tmp_path):
    with pytest.warns(UserWarning, match='--split-ratio 0.1: of 3 steps none is under'):
        make(tmp_path / 'out', sampling=dict(split_ratio=0.1))


def test_prompts_that_are_too_long_are_refused_beforehand(pipe, birds, tmp_path):
    long = replace(birds, words=('red crowned ' * 20,) * 3)
    settings = Settings.of(pipe, 'bird', **GIVEN | dict(concepts=dict(learn='none')))

    with pytest.raises(UserError, match='tiny reads 38 tokens, and its prompt has'):
        synthesize(pipe, long, tmp_path / 'out', settings, SUFFIXES)
    assert not (tmp_path / 'out').exists()


def test_checkpoints_may_be_written_more_often_when_a_run_goes_on(tmp_path):
    then, now = dict(steps=3, save_every=500), dict(steps=3)
    claim(tmp_path / 'out', a_record(concepts=then), RECORD)

    claim(tmp_path / 'out', a_record(concepts=now), RECORD)

    assert 'save_every' not in ConceptSettings(save_every=50).deciding()
    with pytest.raises(UserError, match='concepts: steps: 3 then, 4 now'):
        claim(tmp_path / 'out', a_record(concepts=now | dict(steps=4)), RECORD)


def test_a_method_of_tokens_alone_refuses_a_lora(make, concepts, tmp_path):
    with pytest.raises(UserError, match='learns tokens alone'):
        make(tmp_path / 'out', concepts=concepts, sampling=dict(method='da-fusion'))


def test_a_lone_image_makes_no_pair_without_views(make, birds, tmp_path):
    lone = birds.subset([0, *range(3, len(birds))])
    assert lone.counts.min() == 1
    with pytest.raises(UserError, match='one image makes no pair'):
        make(tmp_path / 'out', images=lone, inversion=dict(views=False))
    assert not (tmp_path / 'out').exists()


def test_two_runs_do_not_write_into_one_folder(make, straight):
    with FileLock(straight.folder / STATE / 'lock'):
        with pytest.raises(UserError, match='another run is writing there'):
            make(straight.folder)


def test_class_names_are_only_names(make, birds, tmp_path):
    odd = replace(birds, classes=('../../up', '<c0> (best:1.5)', '花 oak'))
    got = make(tmp_path / 'odd', odd, concepts=None, sampling=dict(expansion=1))
    assert {r['label'] for r in got.rows} == set(odd.classes)
    assert all((tmp_path / 'odd') in p.resolve().parents for p in got.images)
    assert not (tmp_path / 'up').exists() and not (tmp_path.parent / 'up').exists()


# ---- status


def test_images_per_minute_are_counted_from_the_end_of_the_first_batch(tmp_path):
    plan = [dict(file_name=f'{i}.png', batch=i // 2) for i in range(6)]
    for i in range(4):
        (tmp_path / f'{i}.png').touch()
        os.utime(tmp_path / f'{i}.png', (0, 100 + 30 * (i // 2)))
    assert per_minute(plan, RunFolder(tmp_path)) == 4.0
    assert per_minute(plan[:2], RunFolder(tmp_path)) is None


def test_status_of_a_finished_run(straight):
    now = status(straight.folder)
    assert (now['planned'], now['done'], now['missing']) == (18, 18, {})
    assert (now['concepts'], now['inverted']) == ('done', '3 of 3 categories')


def test_status_refuses_other_folders(tmp_path):
    with pytest.raises(UserError, match='not a folder of synthetic images'):
        status(tmp_path)


# ---- folders that belong to one run


def test_a_claimed_folder_takes_the_same_run_again(tmp_path):
    about = dict(seed=0, names=('a', 'b'))
    claim(tmp_path / 'out', about, '.state/run.json')
    claim(tmp_path / 'out', about, '.state/run.json')
    with pytest.raises(UserError, match='seed: 0 then, 1 now'):
        claim(tmp_path / 'out', {**about, 'seed': 1}, '.state/run.json')


def test_a_run_whose_record_was_replaced_before_it_held_the_folder_stops(
    make, tmp_path, monkeypatch
):
    """Two runs begin at once, and the other one writes its record in between."""
    hold = runs.held

    def late(folder, number):
        about = read_json(folder.record)
        about.pop('seal')
        write_record(folder.record, about | dict(seed=about['seed'] + 1))
        return hold(folder, number)

    monkeypatch.setattr(runs, 'held', late)

    with pytest.raises(UserError, match='seed: 2 then, 1 now'):
        make(tmp_path / 'out')
    assert not list(tmp_path.glob('out/train/*/*.png'))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='is a file'):
        claim(tmp_path / 'file', {}, 'run.json')


def test_what_file_managers_leave_behind_does_not_count(tmp_path):
    (tmp_path / '.DS_Store').touch()
    claim(tmp_path, {}, 'run.json')
    assert (tmp_path / 'run.json').is_file()


def test_looking_at_a_folder_writes_nothing(tmp_path):
    assert not holds_run(tmp_path / 'new', '.state/run.json')
    assert list(tmp_path.iterdir()) == []
    (tmp_path / 'thesis.tex').touch()
    with pytest.raises(UserError, match='thesis.tex'):
        holds_run(tmp_path, 'run.json')


def keep_then_fail(out, *files):
    "Write files of a run that ends with an error."
    with tentative(out / STATE / 'kept.json', out / STATE / 'run.json'):
        for name in files:
            write_json(out / STATE / name, {})
        raise UserError('later')


def test_what_was_kept_for_a_refused_run_goes_again(tmp_path):
    with pytest.raises(UserError, match='later'):
        keep_then_fail(tmp_path / 'a' / 'b', 'kept.json')
    assert list(tmp_path.iterdir()) == []


def test_what_was_kept_stays_once_the_run_has_its_folder(tmp_path):
    with pytest.raises(UserError, match='later'):
        keep_then_fail(tmp_path, 'kept.json', 'run.json')
    assert len(list(tmp_path.rglob('*.json'))) == 2


def test_what_was_there_before_a_refused_run_stays(tmp_path):
    write_json(tmp_path / STATE / 'kept.json', 1)
    with pytest.raises(UserError, match='later'):
        keep_then_fail(tmp_path)
    assert read_json(tmp_path / STATE / 'kept.json') == 1
