"""Images that are thrown out: they stay out, come back, or are made from another seed."""

import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import yaml
from small_runs import GIVEN, MAKING, SUFFIXES, few_birds, hardly_learned

from diffii.app.dropping import pipe_of
from diffii.base.files import UserError, write_json
from diffii.base.methods import METHODS
from diffii.base.pipeline import Pipeline, load_pipeline
from diffii.base.settings import Settings
from diffii.run import dropping, filters, runs
from diffii.run.dropping import drop, drop_worst, keep, read_names, refill, score
from diffii.run.folders import RunFolder, held
from diffii.run.review import remake, status
from diffii.run.runs import load_synthetic, synthesize

FILTERED = {**GIVEN, 'filter': {}}


@pytest.fixture(scope='session')
def birds():
    "Two categories of species that the model has not seen, three images of each."
    few = few_birds(2)
    names = [f'{few.classes[k]}/{i}.png' for i, k in enumerate(few.labels)]
    return replace(few, names=tuple(names))


@pytest.fixture(scope='session')
def pipe():
    "The shipped model, for batches of eight."
    return load_pipeline('tiny', batch_size=8)


@pytest.fixture(scope='session')
def concepts(pipe, birds):
    "Concepts of the birds, hardly learned."
    return hardly_learned(pipe, birds)


@pytest.fixture(scope='session')
def make_in(pipe, birds, concepts):
    "Make twelve synthetic birds in a folder with few steps, in batches of 8 and 4."

    def _make(out, concepts=concepts, pipe=pipe, **groups):
        given = {k: {**FILTERED[k], **groups.get(k, {})} for k in FILTERED}
        settings = Settings.of(pipe, 'bird', **given)
        return synthesize(pipe, birds, out, settings, SUFFIXES, concepts)

    return _make


@pytest.fixture
def make(make_in, tmp_path):
    "The same, in the folder of the test."
    return partial(make_in, tmp_path / 'out')


@pytest.fixture(scope='session')
def finished(make_in, tmp_path_factory):
    "A finished run, of which each test has a copy."
    return make_in(tmp_path_factory.mktemp('dropping') / 'out').folder


@pytest.fixture
def made(finished, tmp_path):
    "A copy of a finished run."
    shutil.copytree(finished, tmp_path / 'out')
    return load_synthetic(tmp_path / 'out')


def bytes_of(images):
    "The files of a set by name."
    return {n: f.read_bytes() for n, f in zip(images.names, images.images)}


def same_pixels(image, file):
    from PIL import Image

    return image.tobytes() == Image.open(file).convert('RGB').tobytes()


class Stop(Exception):
    "What stands in for Ctrl-C."


# ---- dropped, kept, deleted


def test_a_dropped_image_stays_out_of_loading_status_and_resume(made, make):
    gone, file = made.names[1], made.images[1]
    assert drop(made.folder, [gone]) == [gone]
    again = make()

    assert gone not in load_synthetic(made.folder).names
    assert not file.exists()
    assert again.names == (made.names[0], *made.names[2:])
    now = status(made.folder)
    assert (now['planned'], now['done'], now['dropped']) == (11, 11, 1)


def test_a_dropped_image_comes_back_to_the_bit(made):
    before = bytes_of(made)
    drop(made.folder, made.names[:3])
    assert keep(made.folder, made.names[1:2]) == [made.names[1]]
    assert keep(made.folder) == [made.names[0], made.names[2]]
    back = load_synthetic(made.folder)
    assert bytes_of(back) == before
    assert back.rows == made.rows


def test_dropping_twice_and_keeping_twice_is_nothing_new(made):
    drop(made.folder, made.names[:1])
    assert drop(made.folder, made.names[:1]) == []
    keep(made.folder)
    assert keep(made.folder, made.names[:1]) == []
    assert len(load_synthetic(made.folder)) == len(made)


def test_a_deleted_image_is_told_of_and_made_again(made, make):
    before = bytes_of(made)
    made.images[0].unlink()
    with pytest.raises(UserError, match='or leave it out with: diffii drop') as told:
        load_synthetic(made.folder)
    assert made.names[0] in str(told.value)
    assert bytes_of(make()) == before


def test_a_deleted_sibling_does_not_bring_a_dropped_image_back(made, make):
    before = bytes_of(made)
    drop(made.folder, made.names[:1])
    made.images[1].unlink()
    again = make()
    assert not made.images[0].exists()
    assert bytes_of(again) == {n: before[n] for n in made.names[1:]}


def test_the_card_counts_what_was_dropped(made):
    drop(made.folder, made.names[:2])
    text = RunFolder(made.folder).card.read_text()
    assert 'These 10 images' in text
    assert '2 more were dropped.' in text


# ---- names


def test_an_image_has_a_name_and_paths(made, monkeypatch):
    name, file = made.names[0], made.images[0]
    monkeypatch.chdir(made.folder)
    paths = (
        str(file),
        str(file.resolve()),
        f'./{name}',
        str(file.parent / '.' / file.name),
    )
    for form in (name, name.partition('/')[2], *paths):
        assert dropping.known_names(RunFolder(made.folder), [form]) == [name]


@pytest.mark.parametrize(
    'name', ['../../notes.txt', '/etc/passwd', 'oak/99999.png', '', '.', 'a\nb']
)
def test_an_unknown_name_changes_nothing(made, name):
    with pytest.raises(UserError, match='no image of') as told:
        drop(made.folder, [made.names[0], name])
    assert '\n' not in str(told.value)
    assert not RunFolder(made.folder).choices.exists()
    assert load_synthetic(made.folder).names == made.names


def test_names_are_read_from_lines(tmp_path):
    file = tmp_path / 'rejected.txt'
    file.write_bytes('\ufefföak/1.png\r\n\r\n  oak/2.png \n'.encode())
    assert read_names(file) == ['öak/1.png', 'oak/2.png']


def test_a_name_ends_at_the_end_of_a_line_alone(tmp_path):
    "A line separator of Unicode may be in a category's name."
    file = tmp_path / 'rejected.txt'
    file.write_bytes('on\u2028two/1.png\r\nb\x85c/2.png\n'.encode())
    assert read_names(file) == ['on\u2028two/1.png', 'b\x85c/2.png']


def test_a_file_of_names_that_is_none_is_told_of(tmp_path):
    (tmp_path / 'bytes').write_bytes(b'\xff\xfe\x00')
    for file in (tmp_path / 'bytes', tmp_path / 'none', tmp_path):
        with pytest.raises(UserError, match='--file .*cannot be read'):
            read_names(file)


def test_a_folder_that_is_in_use_is_left_alone(made):
    with held(RunFolder(made.folder)):
        with pytest.raises(UserError, match='another run is writing there'):
            drop(made.folder, made.names[:1])
    assert load_synthetic(made.folder).names == made.names


# ---- stopped in between


def test_a_drop_that_was_stopped_counts_and_is_finished(made, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, 'settle', stop)
        with pytest.raises(Stop):
            drop(made.folder, made.names[:1])
    assert made.images[0].exists()
    assert made.names[0] not in load_synthetic(made.folder).names

    drop(made.folder, made.names[:1])
    assert not made.images[0].exists()
    keep(made.folder)
    assert bytes_of(load_synthetic(made.folder)) == bytes_of(made)


def test_a_keep_that_was_stopped_is_finished_by_the_run(made, make, monkeypatch):
    before = bytes_of(made)
    drop(made.folder, made.names[:1])
    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, 'settle', stop)
        with pytest.raises(Stop):
            keep(made.folder)
    assert bytes_of(make()) == before


def stop(*args, **kwargs):
    raise Stop


# ---- refilled


def test_a_refill_is_another_image_of_the_same_parents(made, pipe):
    drop(made.folder, made.names[:1])
    assert refill(pipe, made.folder) == [made.names[0]]
    after = load_synthetic(made.folder)
    row, old = after.rows[0], made.rows[0]
    assert after.names == made.names
    assert (
        bytes_of(after)[made.names[0]]
        != RunFolder(made.folder).aside_file(old).read_bytes()
    )
    assert row['sources'] == old['sources'] and row['attempt'] >= runs.ATTEMPTS
    assert status(made.folder)['dropped'] == 0


def test_status_counts_refills_apart_from_images_that_failed(made, pipe):
    drop(made.folder, made.names[:2])
    refill(pipe, made.folder)
    now = status(made.folder)
    assert (now['refilled'], now['redrawn'], now['done']) == (2, 0, len(made))


def test_a_refill_stays_when_the_run_goes_on(made, make, pipe):
    drop(made.folder, made.names[:1])
    refill(pipe, made.folder)
    after = bytes_of(load_synthetic(made.folder))
    made.images[1].unlink()  # of the batch that the first version was made in
    assert bytes_of(make()) == after


def test_a_refill_is_made_again_to_the_bit(made, make, pipe):
    drop(made.folder, made.names[:2])
    refill(pipe, made.folder)
    after = bytes_of(load_synthetic(made.folder))
    assert same_pixels(remake(pipe, made.folder, made.names[1]), made.images[1])
    made.images[0].unlink()
    assert bytes_of(make()) == after


def test_only_named_images_are_refilled(made, pipe):
    drop(made.folder, made.names[:2])
    assert refill(pipe, made.folder, made.names[:1]) == [made.names[0]]
    assert status(made.folder)['dropped'] == 1


def test_a_second_refill_is_a_third_image(made, pipe):
    versions = {made.images[0].read_bytes()}
    for _ in range(2):
        drop(made.folder, made.names[:1])
        refill(pipe, made.folder)
        versions.add(made.images[0].read_bytes())
    assert len(versions) == 3


def test_a_dropped_refill_comes_back(made, pipe):
    drop(made.folder, made.names[:1])
    refill(pipe, made.folder)
    second = made.images[0].read_bytes()
    drop(made.folder, made.names[:1])
    keep(made.folder)
    assert made.images[0].read_bytes() == second


def test_a_refill_that_was_stopped_goes_on(made, pipe, monkeypatch):
    drop(made.folder, made.names[:2])
    with monkeypatch.context() as patched:
        patched.setattr(runs, 'make_batch', stop)
        with pytest.raises(Stop):
            refill(pipe, made.folder)
    assert len(load_synthetic(made.folder)) == 10
    refill(pipe, made.folder)
    after = load_synthetic(made.folder)
    assert after.names == made.names
    assert all(row['attempt'] >= runs.ATTEMPTS for row in after.rows[:2])


def test_a_refill_that_fails_is_drawn_again(made, pipe, monkeypatch):
    drop(made.folder, made.names[:1])
    original, calls = runs.make_batch, []

    def fail_once(pipe, concepts, pool, rows):
        calls.append(rows[0]['attempt'])
        images = original(pipe, concepts, pool, rows)
        return [None] * len(images) if len(calls) == 1 else images

    with monkeypatch.context() as patched:
        patched.setattr(runs, 'make_batch', fail_once)
        refill(pipe, made.folder)
    assert calls == [3, 4]
    assert load_synthetic(made.folder).rows[0]['attempt'] == 4
    assert same_pixels(remake(pipe, made.folder, made.names[0]), made.images[0])


def test_another_model_is_refused_for_refills(made, pipe):
    drop(made.folder, made.names[:1])
    other = load_pipeline('tiny', batch_size=8)
    other.unet.conv_in.weight.data += 1
    with pytest.raises(UserError, match='made with another model'):
        refill(other, made.folder)


@pytest.mark.parametrize('method', MAKING)
def test_every_method_drops_and_refills(method, make, pipe, concepts):
    given = concepts if METHODS[method].learn == 'tokens+lora' else None
    made = make(sampling=dict(method=method), concepts=given)
    name, before = made.names[2], made.images[2].read_bytes()
    drop(made.folder, [name])
    refill(pipe, made.folder)
    after = make(sampling=dict(method=method), concepts=given)
    assert after.names == made.names
    assert made.images[2].read_bytes() != before
    assert same_pixels(remake(pipe, made.folder, name), made.images[2])


# ---- scores and filters


@pytest.fixture
def numbered(monkeypatch):
    "A score that is the number of the image; a list of how many were scored at once."
    calls = []

    def scores(job):
        calls.append(len(job.made))
        return [float(row['index']) for row in job.made.rows]

    scorer = filters.Scorer(scores, 'the number of the image')
    monkeypatch.setitem(filters.SCORERS, 'lpips', scorer)
    return calls


def test_scores_stand_in_the_metadata(made, birds, numbered):
    score(made.folder, ['lpips'], birds)
    rows = load_synthetic(made.folder).rows
    assert [row['scores'] for row in rows] == [dict(lpips=row['index']) for row in rows]


def test_an_image_is_scored_once(made, birds, pipe, numbered):
    score(made.folder, ['lpips'], birds)
    drop(made.folder, made.names[:1])
    refill(pipe, made.folder)
    assert 'scores' not in load_synthetic(made.folder).rows[0]
    score(made.folder, ['lpips'], birds)
    assert numbered == [12, 1]


def test_the_worst_share_of_each_category_goes_and_no_more(made, birds, numbered):
    score(made.folder, ['lpips'], birds)
    gone = drop_worst(made.folder, 'lpips', share=1 / 3)
    assert len(gone) == 4
    left = load_synthetic(made.folder)
    assert left.counts.tolist() == [4, 4]
    assert {row['index'] for row in left.rows} == {2, 3, 4, 5}
    assert drop_worst(made.folder, share=1 / 3) == []


def test_what_is_below_a_threshold_goes(made, birds, numbered):
    score(made.folder, ['lpips'], birds)
    drop_worst(made.folder, 'lpips', below=4.5)
    assert {row['index'] for row in load_synthetic(made.folder).rows} == {5}


def test_scorers_are_told_the_device(make, birds, say, folder_of_birds, monkeypatch):
    asked = []

    def scores(job):
        asked.append(job.device)
        return [0.0] * len(job.made)

    monkeypatch.setitem(filters.SCORERS, 'lpips', filters.Scorer(scores, 'nothing'))
    made = make(filter=dict(by='lpips', keep=1.0))  # on the device of the model
    assert asked == ['cpu']
    where = '--images', folder_of_birds, '--filter-lpips', 'vgg', '--device', 'cuda:7'
    assert say('score', made.folder, 'lpips', *where).code == 0
    assert asked == ['cpu', 'cuda:7']


def test_without_scores_the_remedy_is_told(made):
    with pytest.raises(UserError, match='run first: diffii score .* lpips'):
        drop_worst(made.folder, 'lpips')


def test_of_several_scores_one_must_be_named(made, birds, numbered):
    score(made.folder, ['lpips'], birds)
    folder = RunFolder(made.folder)
    kept = folder.image_scores()
    write_json(folder.scores, kept | dict(clip=kept['lpips']))
    with pytest.raises(UserError, match='which score. --by lpips or --by clip'):
        drop_worst(made.folder)
    with pytest.raises(UserError, match='no such scores; give --by lpips or --by clip'):
        drop_worst(made.folder, 'features')


def test_an_unscored_image_is_told_of(made, birds, pipe, numbered):
    score(made.folder, ['lpips'], birds)
    drop(made.folder, made.names[:1])
    refill(pipe, made.folder)
    with pytest.raises(UserError, match='1 images have no score'):
        drop_worst(made.folder, 'lpips')


def test_other_real_images_are_refused(made, birds):
    with pytest.raises(UserError, match='made from other images'):
        score(made.folder, ['lpips'], birds.subset(range(5)))


def test_a_run_filters_and_a_kept_image_stays_kept(make, numbered):
    some = dict(filter=dict(by='lpips', keep=0.5))
    made = make(**some)
    assert made.counts.tolist() == [3, 3]
    assert made.rows[0]['scores'] == dict(lpips=3)
    assert status(made.folder)['dropped'] == 6

    keep(made.folder)
    assert make(**some).counts.tolist() == [6, 6]
    assert make(filter=dict(by='lpips', keep=0.8)).counts.tolist() == [5, 5]


def test_a_filter_that_was_stopped_is_applied_when_the_run_goes_on(make, numbered):
    some = dict(filter=dict(by='lpips', keep=0.5))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(RunFolder, 'choose', stop)
        with pytest.raises(Stop):
            make(**some)
    assert make(**some).counts.tolist() == [3, 3]


def test_real_filter_keeps_its_choice_beside_what_is_dropped(make, pipe):
    made = make(sampling=dict(method='real-filter'), concepts=None)
    drop(made.folder, made.names[:1])
    again = make(sampling=dict(method='real-filter'), concepts=None)
    assert again.names == made.names[1:]
    keep(made.folder)
    assert bytes_of(load_synthetic(made.folder)).keys() == set(made.names)


@pytest.mark.parametrize('by', ['classifier', 'denoising'])
def test_a_filter_that_cannot_work_is_refused_before_anything_is_written(
    by, pipe, birds, tmp_path
):
    images = birds.subset([0, 1, 3])  # two images at the most
    if by == 'denoising':
        images = replace(birds.subset([0, 1, 2]), classes=birds.classes[:1])
    settings = Settings.of(pipe, 'bird', **{**FILTERED, 'filter': dict(by=by)})
    with pytest.raises(UserError, match=f'--filter {by}: needs'):
        synthesize(pipe, images, tmp_path / 'out', settings, SUFFIXES)
    assert not (tmp_path / 'out').exists()


# ---- the commands


@pytest.fixture
def folder_of_birds(birds, tmp_path):
    "The real birds as files with the names that the run knows."
    for i, name in enumerate(birds.names):
        file = tmp_path / 'birds' / name
        file.parent.mkdir(parents=True, exist_ok=True)
        birds.open(i).save(file)
    return tmp_path / 'birds'


def test_the_command_drops_by_name_and_by_file(made, say, tmp_path):
    (tmp_path / 'rejected.txt').write_text('\n'.join(made.names[1:3]))
    one = say('drop', made.folder, made.names[0])
    more = say('drop', made.folder, '--file', tmp_path / 'rejected.txt')
    assert one.out.startswith('1 image dropped;')
    assert more.out == f'2 images dropped; {made.folder} has 9; undo with --keep\n'
    assert 'dropped     3' in say('status', made.folder).out


def test_the_command_brings_back(made, say):
    say('drop', made.folder, *made.names[:3])
    assert say('drop', made.folder, made.names[0], '--keep').out.startswith(
        '1 image is'
    )
    assert say('drop', made.folder, '--keep').out.startswith('2 images are back;')
    assert load_synthetic(made.folder).names == made.names


def test_the_command_drops_and_refills(made, say):
    say('drop', made.folder, made.names[5])
    answer = say('drop', made.folder, made.names[0], '--refill')
    assert answer.code == 0, answer.err
    assert '1 image was replaced' in answer.out
    rows = load_synthetic(made.folder).rows
    assert len(rows) == 11 and rows[0]['attempt'] >= runs.ATTEMPTS


@pytest.mark.parametrize('given, tiling', [({}, True), (dict(vae_tiling=False), False)])
def test_a_run_gets_its_model_back_as_it_was(make_in, tmp_path, given, tiling):
    tiled = load_pipeline('tiny', batch_size=8, vae_tiling=True)
    made = make_in(tmp_path / 'tiled', pipe=tiled)

    found = pipe_of(made.folder, given)

    assert (found.pipe.vae.use_tiling, found.batch_size) == (tiling, 8)


def test_a_run_that_was_checked_is_checked_again(make_in, tmp_path, monkeypatch):
    guarded = load_pipeline('tiny', batch_size=8)
    guarded.pipe.register_modules(safety_checker=None)
    guarded.pipe.safety_checker = object()
    monkeypatch.setattr(Pipeline, 'flagged', lambda self, ims: [False] * len(ims))
    made = make_in(tmp_path / 'guarded', pipe=guarded)
    asked = []
    monkeypatch.setattr('diffii.base.pipeline.load_pipeline', asked.append)

    pipe_of(made.folder, {})

    assert RunFolder(made.folder).about()['safety_checker']
    assert asked[0].safety_checker


def test_real_images_that_have_moved_are_asked_for(made, say, folder_of_birds):
    about = dict(images=dict(folder=str(folder_of_birds)))
    RunFolder(made.folder).settings.write_text(yaml.safe_dump(about))
    folder_of_birds.rename(folder_of_birds.with_name('moved'))

    told = say('score', made.folder, 'lpips').line

    assert f'{folder_of_birds}, as seen from here; give their folder' in told


def test_words_that_have_moved_are_not_asked_for(made, say, folder_of_birds, numbered):
    about = dict(images=dict(folder=str(folder_of_birds), words='gone.yaml'))
    RunFolder(made.folder).settings.write_text(yaml.safe_dump(about))

    assert say('score', made.folder, 'lpips').code == 0


def test_the_command_scores_and_drops_the_worst(made, say, folder_of_birds, numbered):
    answer = say('score', made.folder, 'lpips', '--images', folder_of_birds)
    assert answer.code == 0, answer.err
    assert answer.out.startswith('lpips      12 images, 0 to 5, half of them below 3')
    say('drop', made.folder, '--worst', '50%')
    assert load_synthetic(made.folder).counts.tolist() == [3, 3]


@pytest.mark.parametrize(
    'words, line',
    [
        ([], 'give names, --file REJECTED, --worst 10% or --below'),
        (['a.png', '--worst', '10%'], 'one of them'),
        (['--keep', '--refill'], '--keep: not together with --refill'),
        (['--keep', '--worst', '10%'], 'leave --worst and --below out'),
        (['--worst', '110%'], '--worst 110%: give a share above 0'),
        (['--worst', 'ten'], '--worst ten: give a share above 0'),
        (['--worst', '10%'], 'have no scores; run first: diffii score'),
        (['../x.png'], "'../x.png': no image of"),
        (['--file', 'nowhere.txt'], '--file nowhere.txt: cannot be read'),
    ],
)
def test_a_mistake_is_one_line_and_drops_nothing(made, say, words, line):
    answer = say('drop', made.folder, *words)
    assert re.search(line, answer.line), answer.line
    assert load_synthetic(made.folder).names == made.names


def test_the_real_images_must_be_known(made, say):
    assert '--images: give the folder' in say('score', made.folder, 'lpips').line
    assert 'magic: no score; one of' in say('score', made.folder, 'magic').line


def test_a_folder_of_no_run_is_refused(tmp_path, say):
    assert 'not a folder of synthetic images' in say('drop', tmp_path, 'a.png').line
