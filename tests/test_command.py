"The `diffii` command on a user's folder: what it makes, and how it takes mistakes."

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from garden import MADE, QUICK, files_of, images_of, photo, plant, start
from PIL import Image

import diffii


@pytest.fixture
def garden(tmp_path):
    return plant(tmp_path / 'my garden')


@pytest.fixture
def augment(say, garden):
    "`diffii augment` on the garden, quickly."

    def run(*args):
        return say('augment', garden, '--metaclass', 'flower', *QUICK, *args)

    return run


def rows_of(out):
    lines = (out / 'metadata.jsonl').read_text(encoding='utf-8').split('\n')
    return [json.loads(line) for line in lines if line]


def made(answer):
    assert answer.code == 0, answer.err
    return f'{MADE} synthetic images' in answer.out


def pixels(path):
    return np.asarray(Image.open(path))


# what it makes


def test_a_users_folder_becomes_a_folder_of_synthetic_images(augment, tmp_path):
    out = tmp_path / 'out'
    answer = augment('--out', out)
    assert made(answer)
    assert 'rehearsal' in answer.out  # says plainly what the shipped model is
    rows = rows_of(out)
    assert len(rows) == MADE
    assert {r['label'] for r in rows} == {
        'bird of paradise',
        'œillet (red:1.2)',
        'lonely',
    }
    assert all(Image.open(out / r['file_name']).size == (32, 32) for r in rows)
    assert not [p for p in out.rglob('*') if p.suffix == '.tmp']


def test_words_for_the_categories_go_into_the_prompts(augment, say, tmp_path):
    out, file = tmp_path / 'out', tmp_path / 'words.yaml'
    names = 'bird of paradise', 'œillet (red:1.2)', 'lonely'
    words = {name: f'flower {i}, <red>' for i, name in enumerate(names)}
    file.write_text(yaml.safe_dump(words, allow_unicode=True), encoding='utf-8')

    assert made(augment('--out', out, '--words', file))
    kept = json.loads((out / '.diffii' / 'concepts' / 'concepts.json').read_text())
    assert kept['words'] == [words[name] for name in kept['classes']]
    assert made(augment('--out', out, '--words', file))

    answer = augment('--out', out)
    assert answer.code == 2
    assert 'holds a run with other settings (words: ' in answer.err
    del words['lonely']
    file.write_text(yaml.safe_dump(words, allow_unicode=True), encoding='utf-8')
    answer = augment('--out', tmp_path / 'other', '--words', file)
    assert answer.code == 2
    assert 'no words for lonely' in answer.err
    assert not (tmp_path / 'other').exists()


def test_an_image_of_a_named_category_is_made_again_with_its_words(
    augment, say, garden, tmp_path
):
    out, file = tmp_path / 'out', tmp_path / 'words.yaml'
    names = [folder.name for folder in garden.iterdir() if folder.is_dir()]
    words = {name: f'green crowned {i}' for i, name in enumerate(names)}
    file.write_text(yaml.safe_dump(words, allow_unicode=True), encoding='utf-8')
    assert made(augment('--out', out, '--method', 'real-gen', '--words', file))

    name = rows_of(out)[-1]['file_name']
    answer = say('remake', out, name, '--to', tmp_path / 'again.png')
    assert answer.code == 0, answer.err
    assert np.array_equal(pixels(tmp_path / 'again.png'), pixels(out / name))


def test_a_page_to_look_at_the_images_ends_it(augment, tmp_path):
    out = tmp_path / 'out'
    answer = augment('--out', out, '--review')
    assert f'look at them: {out / "review.html"}' in answer.out
    page = (out / 'review.html').read_text(encoding='utf-8')
    assert 'LPIPS diversity' in page
    assert 'not at hand' not in page


def test_the_page_is_written_again_when_the_images_have_moved(
    augment, say, garden, tmp_path
):
    out, page = tmp_path / 'out', tmp_path / 'out' / 'review.html'
    augment('--out', out, '--review')
    before = page.read_bytes()
    page.unlink()
    garden.rename(tmp_path / 'moved')
    answer = say('review', out)
    assert (answer.code, answer.out.strip()) == (0, str(page))
    assert page.read_bytes() == before


def test_without_a_page_real_images_are_named_for_a_later_one(
    augment, say, garden, tmp_path
):
    out = tmp_path / 'out'
    augment('--out', out)
    assert not (out / 'review.html').exists()
    garden.rename(tmp_path / 'moved')
    assert say('review', out, '--images', tmp_path / 'moved').code == 0
    assert 'not at hand' not in (out / 'review.html').read_text(encoding='utf-8')


def test_a_lonely_image_gets_views_and_the_metadata_says_so(augment, tmp_path):
    augment('--out', tmp_path / 'out')
    lonely = [r for r in rows_of(tmp_path / 'out') if r['label'] == 'lonely']
    assert any('#' in source for r in lonely for source in r['sources'])


def test_the_same_command_again_has_nothing_to_do(augment, tmp_path):
    out = tmp_path / 'out'
    augment('--out', out)
    before = files_of(out)
    assert made(augment('--out', out))
    assert files_of(out) == before


def test_remake_makes_an_image_again(augment, say, tmp_path):
    out, to = tmp_path / 'out', tmp_path / 'again.png'
    augment('--out', out)
    name = rows_of(out)[5]['file_name']
    assert say('remake', out, name, '--to', to).code == 0
    assert (pixels(to) == pixels(out / name)).all()


def test_remake_writes_over_nothing(augment, say, tmp_path):
    out, to = tmp_path / 'out', tmp_path / 'again.png'
    augment('--out', out)
    to.write_bytes(b'mine')
    answer = say('remake', out, rows_of(out)[6]['file_name'], '--to', to)
    assert 'again.png: is there already' in answer.line
    assert to.read_bytes() == b'mine'


def test_remake_finds_a_model_that_moved(augment, say, tmp_path):
    before, after, out = (tmp_path / name for name in ('before', 'after', 'out'))
    shutil.copytree(Path(diffii.__file__).parent / 'tiny', before)
    augment('--out', out, '--model', before)
    before.rename(after)
    name, to = 'train/lonely/00001.png', tmp_path / 'a.png'
    assert str(before) in say('remake', out, name, '--to', to).line
    assert say('remake', out, name, '--to', to, '--model', after).code == 0
    assert (pixels(to) == pixels(out / name)).all()


MIX = ('--method', 'diff-mix', '--strengths', '0.5,1')


def test_another_method_has_labels_and_weights_of_its_own(augment, tmp_path):
    out = tmp_path / 'mix'
    assert made(augment('--out', out, *MIX))
    for row in rows_of(out):
        assert row['method'] == 'diff-mix'
        assert row['label'] != row['source_label']
        assert row['strength'] in (0.5, 1.0)
        assert row['label_weight'] == row['strength'] ** 0.8


def test_a_log_has_lines_of_every_stage(augment, tmp_path):
    log = tmp_path / 'log.jsonl'
    augment('--out', tmp_path / 'mix', '--log', log, *MIX)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line['step'] for line in lines} == {'concepts', 'encoding', 'images'}
    assert lines[-1]['done'] == lines[-1]['total'] == MADE


def test_status_names_what_is_missing_until_it_is_made_again(augment, say, tmp_path):
    out = tmp_path / 'mix'
    augment('--out', out, *MIX)
    row = rows_of(out)[3]
    (out / row['file_name']).unlink()
    answer = say('status', out)
    seen = dict(line.split(None, 1) for line in answer.out.splitlines())
    assert (seen['method'], seen['planned'], seen['done']) == ('diff-mix', '12', '11')
    assert seen['concepts'] == 'done'
    assert row['label'] in seen['missing']
    augment('--out', out, *MIX)
    assert 'nothing' in say('status', out).out


def test_other_settings_do_not_go_on_in_a_folder(augment, tmp_path):
    out = tmp_path / 'mix'
    augment('--out', out, *MIX)
    line = augment('--out', out, '--method', 'real-mix').line
    assert 'method: "diff-mix" then, "real-mix" now' in line


def test_every_kind_of_image_file_goes_through(say, tmp_path):
    folder = tmp_path / 'kinds' / 'oak'
    folder.mkdir(parents=True)
    image = photo(4)
    image.convert('P').save(folder / 'palette.png')
    image.convert('CMYK').save(folder / 'cmyk.jpg')
    image.save(folder / 'moving.gif', save_all=True, append_images=[photo(5)])
    deep = np.asarray(image.convert('L')).astype('uint16') * 257
    Image.fromarray(deep).save(folder / 'deep.png')
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / 'turned.jpg', exif=exif)
    common = ('augment', folder.parent, '--metaclass', 'tree', *QUICK)
    answer = say(*common, '--out', tmp_path / 'out')
    assert '10 synthetic images' in answer.out


def test_large_birds_are_a_rehearsal_too(say, tmp_path):
    folder = tmp_path / 'birds' / 'robin'
    folder.mkdir(parents=True)
    for i in range(2):
        photo(i, (120, 90)).save(folder / f'{i}.jpg')
    common = ('augment', folder.parent, '--metaclass', 'bird', *QUICK)
    answer = say(*common, '--out', tmp_path / 'out')
    assert 'rehearsal' in answer.out
    assert '4 synthetic images' in answer.out


# settings from files


def test_a_printed_configuration_gives_the_same_run(augment, say, garden, tmp_path):
    first, second, file = tmp_path / 'a', tmp_path / 'b', tmp_path / 'run.yaml'
    file.write_text(augment('--out', first, '--print-config').out, encoding='utf-8')
    assert not first.exists()
    augment('--out', first)
    assert made(say('augment', '--config', file, '--out', second))
    assert files_of(first) == files_of(second)


def test_a_run_keeps_the_settings_that_go_on_with_it(augment, say, tmp_path):
    out = tmp_path / 'out'
    augment('--out', out)
    kept = out / '.diffii' / 'settings.yaml'
    assert yaml.safe_load(kept.read_text(encoding='utf-8'))['sampling']['steps'] == 3
    (out / rows_of(out)[0]['file_name']).unlink()
    assert made(say('augment', '--config', kept, '--out', out))


def test_the_line_goes_before_the_file(say, tmp_path):
    file = tmp_path / 'run.yaml'
    file.write_text('sampling: {steps: 7, expansion: 3}\nconcepts: {lr: 2e-4}')
    answer = say('augment', '--config', file, '--steps', 9, '--print-config')
    found = yaml.safe_load(answer.out)
    assert found['sampling']['steps'] == 9
    assert found['sampling']['expansion'] == 3
    assert float(found['concepts']['lr']) == 2e-4


@pytest.mark.parametrize(
    'before, line',
    [
        (('--method', 'da-fusion'), ('--method', 'diff-ii')),
        (('--method', 'diff-mix'), ('--method', 'real-guidance')),
        (('--metaclass', 'bird'), ('--method', 'da-fusion')),
        (('--metaclass', 'bird'), ('--few-step', 'none')),
        (('--metaclass', 'bird'), ('--guidance', 4)),
        (('--metaclass', 'bird'), ('--metaclass', 'digit')),
        (('--steps', 50), ('--steps', 10)),
        (('--no-flip',), ('--flip',)),
    ],
)
def test_what_follows_from_the_file_gives_way_to_the_line(say, tmp_path, before, line):
    file = tmp_path / 'run.yaml'
    file.write_text(say('augment', *before, '--print-config').out)
    kept = before if before[0] == '--metaclass' != line[0] else ()
    alone = say('augment', *kept, *line, '--print-config').out
    assert say('augment', '--config', file, *line, '--print-config').out == alone


def test_what_a_file_chose_stays_under_another_method(say, tmp_path):
    file = tmp_path / 'run.yaml'
    chosen = '--method', 'diff-mix', '--strengths', 0.4, '--candidates', 3
    file.write_text(say('augment', *chosen, '--print-config').out)
    answer = say(
        'augment', '--config', file, '--method', 'real-guidance', '--print-config'
    )
    found = yaml.safe_load(answer.out)['sampling']
    assert found['strengths'] == [0.4]
    assert found['candidates'] == 3


@pytest.mark.parametrize(
    'options, text',
    [
        (('--method', 'da-fusion', '--rank', 8), '--rank 8: has no effect here'),
        (('--method', 'real-gen', '--split-ratio', 0.5), '--split-ratio 0.5: has no'),
        (('--few-step', 'x.safetensors', '--guidance', 3), '--guidance 3: has no'),
    ],
)
def test_an_option_without_effect_is_refused(say, options, text):
    assert text in say('augment', *options, '--print-config').line


@pytest.mark.parametrize(
    'text, word',
    [
        ('sampling: {step: 7}', 'step: no such setting'),
        ('sampling: {steps: seven}', '--steps seven: give a whole number'),
        ('colours: {}', 'colours: no such group'),
        ('- 1', 'give groups of settings'),
        ('sampling: {', 'not valid YAML'),
    ],
)
def test_a_wrong_file_of_settings_is_one_line(say, tmp_path, text, word):
    file = tmp_path / 'run.yaml'
    file.write_text(text)
    line = say('augment', '--config', file, '--print-config').line
    assert word in line
    assert 'run.yaml' in line


# concepts, trackers, tables


def test_concepts_in_published_formats_give_the_same_images(augment, tmp_path):
    from diffii.method.concepts import Concepts
    from diffii.run.concept_files import export_concepts

    learned = tmp_path / 'learned'
    augment('--out', learned, '--tokens', 1)
    concepts = Concepts.load(learned / '.diffii' / 'concepts')
    assert concepts.lora
    for form in ('diff-mix', 'a1111'):
        folder, out = tmp_path / form, tmp_path / f'out-{form}'
        export_concepts(concepts, folder, form)
        assert made(augment('--concepts', folder, '--out', out))
        images = {p: b for p, b in files_of(learned).items() if p.endswith('.png')}
        again = files_of(out)
        assert {p: again[p] for p in images} == images


def test_concepts_without_names_are_refused(augment, tmp_path):
    from diffii.method.concepts import Concepts
    from diffii.run.concept_files import export_concepts

    augment('--out', tmp_path / 'learned', '--tokens', 1)
    concepts = Concepts.load(tmp_path / 'learned' / '.diffii' / 'concepts')
    export_concepts(concepts, tmp_path / 'unnamed', 'diffusers')
    (tmp_path / 'unnamed' / 'concepts.json').unlink()
    answer = augment('--concepts', tmp_path / 'unnamed', '--out', tmp_path / 'x')
    assert 'no token for' in answer.line
    assert not (tmp_path / 'x').exists()


def test_a_tracker_follows_and_changes_nothing(augment, tmp_path):
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain, out = tmp_path / 'plain', tmp_path / 'out'
    augment('--out', plain, '--concept-steps', 5)
    tracked = ('--tracker', 'tensorboard', '--sample-every', 2)
    augment('--out', out, '--concept-steps', 5, *tracked)
    log = out / '.diffii' / 'concepts' / 'log' / 'concepts'
    events = EventAccumulator(str(log)).Reload()
    loss, samples = events.Scalars('loss'), events.Images('samples')
    kept = json.loads((out / '.diffii' / 'concepts' / 'concepts.json').read_text())
    assert [s.step for s in loss] == [1, 2, 3, 4, 5]
    assert np.allclose([s.value for s in loss], kept['log'], rtol=1e-6)
    # three categories, side by side
    sizes = [(s.step, s.width, s.height) for s in samples]
    # every second step, and the last
    assert sizes == [(2, 96, 32), (4, 96, 32), (5, 96, 32)]
    assert files_of(out) == files_of(plain)
    # and it is no part of the settings
    assert made(augment('--out', out, '--concept-steps', 5))


def test_a_table_may_have_columns_of_its_own(say, garden, tmp_path):
    table = tmp_path / 't.csv'
    lines = [f'{p},"{p.parent.name}"' for p in images_of(garden)]
    table.write_text('\n'.join(['path,kind', *lines, '']), encoding='utf-8')
    common = (
        'augment',
        table,
        '--metaclass',
        'flower',
        *QUICK,
        '--out',
        tmp_path / 'o',
    )
    assert 't.csv' in say(*common).line  # the default columns are not there
    assert made(say(*common, '--image-column', 'path', '--label-column', 'kind'))


def test_skip_bad_goes_on_without_a_file(garden, tmp_path):
    (garden / 'œillet (red:1.2)' / 'cut.png').write_bytes(b'\x89PNG')
    common = ('augment', garden, '--metaclass', 'flower', *QUICK)
    done = start(*common, '--out', tmp_path / 'out', '--skip-bad')
    assert 'cut.png' in done.stderr
    assert f'{MADE} synthetic images' in done.stdout


def test_skip_bad_goes_on_without_a_row_of_a_table(say, garden, tmp_path):
    (garden / 'lonely' / 'cut.png').write_bytes(b'\x89PNG')
    files = [*images_of(garden), garden / 'lonely' / 'cut.png']
    lines = [f'{p},"{p.parent.name}"' for p in files]
    table = tmp_path / 'T.CSV'
    table.write_text('\n'.join(['file_name,label', *lines, '']), encoding='utf-8')
    common = (
        'augment',
        table,
        '--metaclass',
        'flower',
        *QUICK,
        '--out',
        tmp_path / 'o',
    )
    line = say(*common).line
    assert 'cut.png' in line
    assert '--skip-bad' in line
    done = start(*common, '--skip-bad')
    assert 'cut.png' in done.stderr
    assert f'{MADE} synthetic images' in done.stdout


# mistakes


def png_bytes():
    data = io.BytesIO()
    photo(2).save(data, 'PNG')
    return data.getvalue()


@pytest.mark.parametrize(
    'name, data',
    [('cut.png', png_bytes()[:60]), ('zero.jpg', b''), ('text.jpg', b'hello')],
)
def test_an_unreadable_image_is_named_in_one_line(say, tmp_path, name, data):
    folder, out = tmp_path / 'spoilt' / 'oak', tmp_path / 'out'
    folder.mkdir(parents=True)
    (folder / name).write_bytes(data)
    photo(1).save(folder / 'good.png')
    line = say('augment', folder.parent, '--metaclass', 'tree', '--out', out).line
    assert name in line
    assert not out.exists()


@pytest.mark.parametrize(
    'options, word',
    [
        (('--expansion', 0), '--expansion 0'),
        (('--split-ratio', 1.5), '--split-ratio 1.5'),
        (('--guided', '0.5,0.2'), '--guided'),
        (('--model', 'nobody/nothing'), '--model nobody/nothing'),
        (('--suffixes', '5-shot Dodos'), '5-shot Dodos'),
        (('--shots', 3), '--shots 3'),
        (('--tracker', 'paper'), '--tracker paper: one of'),
        (('--metaclass', ''), '--metaclass'),
        (('--colour', 'red'), '--colour'),
        (('--method', 'original'), '--method original: makes no images'),
        (('--device', 'cuda:77'), '--device cuda:77: cannot be used here'),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(
    augment, tmp_path, options, word
):
    before = sorted(tmp_path.rglob('*'))
    assert word in augment('--out', tmp_path / 'out', *options).line
    assert sorted(tmp_path.rglob('*')) == before


def test_a_folder_without_concepts_is_refused(augment, tmp_path):
    (tmp_path / 'empty').mkdir()
    answer = augment('--out', tmp_path / 'out', '--concepts', tmp_path / 'empty')
    assert 'no file of embeddings' in answer.line
    assert not (tmp_path / 'out').exists()


def test_a_used_folder_is_left_as_it_is(augment, tmp_path):
    used = tmp_path / 'used'
    used.mkdir()
    (used / 'thesis.tex').touch()
    assert 'thesis.tex' in augment('--out', used).line
    assert [p.name for p in used.iterdir()] == ['thesis.tex']


def test_an_output_folder_among_the_categories_is_refused(augment, garden):
    "Or the same command would take it for a category the next time."
    before = sorted(garden.rglob('*'))

    assert 'lies in the folder of the images' in augment('--out', garden / 'out').line
    assert sorted(garden.rglob('*')) == before


def test_a_wrong_model_is_told_before_captions_are_made(augment, tmp_path, monkeypatch):
    def caption(*args, **kwargs):
        raise AssertionError('captions were made')

    monkeypatch.setattr('diffii.run.runs.choose_suffixes', caption)
    options = '--captioner', 'measure', '--model', 'tinny', '--out', tmp_path / 'out'

    assert '--model tinny: neither a folder' in augment(*options).line


def test_a_single_file_is_no_model(augment, tmp_path):
    (tmp_path / 'tuned.safetensors').write_bytes(b'weights')
    options = '--model', tmp_path / 'tuned.safetensors', '--out', tmp_path / 'out'

    assert "a single file; load it with diffusers' from_single_file" in (
        augment(*options).line
    )


def test_an_output_folder_that_is_a_file_is_refused(augment, tmp_path):
    (tmp_path / 'file').touch()
    assert 'file: is a file' in augment('--out', tmp_path / 'file').line


@pytest.mark.parametrize('kind', ['missing', 'empty', 'a class without images'])
def test_a_folder_that_holds_no_images_is_refused(say, tmp_path, kind):
    folder, out = tmp_path / 'images', tmp_path / 'out'
    if kind != 'missing':
        folder.mkdir()
    if kind == 'a class without images':
        (folder / 'oak').mkdir()
        photo(3).save(folder / 'oak' / '1.png')
        (folder / 'elm').mkdir()
    line = say('augment', folder, '--metaclass', 'tree', '--out', out).line
    assert ('elm' if kind == 'a class without images' else 'images') in line
    assert not out.exists()


@pytest.mark.parametrize('missing', ['IMAGES', '--out', '--metaclass'])
def test_what_has_no_default_is_asked_for(say, garden, tmp_path, missing):
    given = {'IMAGES': (garden,), '--out': ('--out', tmp_path / 'out')}
    given['--metaclass'] = ('--metaclass', 'flower')
    args = [x for name, words in given.items() if name != missing for x in words]
    assert missing in say('augment', *args).line


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux alone')
@pytest.mark.parametrize('more', [(), ('--skip-bad',)])
def test_a_name_in_another_encoding_is_one_line(augment, garden, tmp_path, more):
    photo(1).save(os.fsdecode(os.fsencode(garden / 'lonely') + b'/\x9cillet.jpg'))
    line = augment('--out', tmp_path / 'out', *more).line
    assert r"'\udc9cillet.jpg'" in line
    assert 'rename' in line
    assert not (tmp_path / 'out').exists()


# help


def test_help_lists_the_commands(say):
    answer = say('--help')
    for name in ('demo', 'augment', 'remake', 'review', 'status', 'benchmark', 'speed'):
        assert name in answer.out


def test_help_groups_its_options_and_says_the_defaults_in_force(say, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    text = say('augment', '--help').out
    for title in (
        'Most needed',
        'Images',
        'Model',
        'Concepts',
        'Inversion',
        'Contexts',
    ):
        assert f' {title} ' in text
    assert 'default: 35000; shipped model: 400' in text


def test_every_setting_has_a_help_and_an_option_of_its_own():
    from diffii.base.settings import BenchmarkSettings, Settings, group_kinds, specs

    for groups in (Settings, BenchmarkSettings):
        found = [s for kind in group_kinds(groups).values() for s in specs(kind)]
        assert all(spec.doc for spec in found), [s.name for s in found if not s.doc]
        options = [spec.option for spec in found if spec.option]
        assert len(options) == len(set(options))


def test_the_command_loads_nothing_heavy():
    heavy = ('torch', 'diffusers', 'transformers', 'fastai', 'matplotlib', 'sklearn')
    code = (
        f'import sys, diffii.app.cli; print([m for m in {heavy} if m in sys.modules])'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr


# experiments


def test_a_benchmark_goes_on_where_it_stopped(say, tmp_path):
    out = tmp_path / 'b'
    common = ('benchmark', 'few-shot', '--shots', 2, '--trials', 1, '--quick')
    answer = say(*common, '--out', out, '--methods', 'original,random-noise')
    assert 'random-noise' in answer.out
    cell = out / 'cells' / '2-shot--original--0.json'
    before = cell.stat().st_mtime_ns
    answer = say(*common, '--out', out, '--methods', 'original,random-noise,diff-ii')
    assert 'one trial' in answer.out
    assert cell.stat().st_mtime_ns == before
    written = {p.name for p in out.iterdir()}
    assert {'table.csv', 'table.json', 'plot.png'} <= written


@pytest.mark.parametrize(
    'args, word',
    [
        (('few-shoot',), 'few-shoot'),
        (('ood',), 'digits'),
        (('few-shot', '--methods', 'gan'), 'gan'),
        (('few-shot', '--shots', 'five'), '--shots five'),
        (('few-shot', '--dataset', 'cub'), '--root'),
        (('few-shot', '--lr-schedule', 'fast'), '--lr-schedule fast'),
        (('strength', '--tokens', 0), '--tokens 0'),
    ],
)
def test_a_wrong_benchmark_is_one_line_and_leaves_nothing(say, tmp_path, args, word):
    assert word in say('benchmark', *args, '--out', tmp_path / 'x').line
    assert not (tmp_path / 'x').exists()
