"Experiments: what decides their numbers, mistakes, the paper's settings, old results."

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from small_models import checkpoint, small_clip

from diffii.base.files import UserError, read_json
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import BenchmarkSettings
from diffii.data.sets import shipped_set
from diffii.evaluation.experiments import (
    Experiment,
    about_run,
    benchmark,
    classifier_settings,
    given_classifier,
)
from diffii.evaluation.tables import finished, read_cells
from diffii.evaluation.tasks import conditions, configuration
from diffii.evaluation.verdicts import notes, summary_lines

RESULTS = Path(__file__).parent.parent / 'nbs' / 'results' / 'cells'
FINISHED = sorted(file.parent for file in RESULTS.glob('*/table.json'))


@pytest.mark.parametrize('folder', FINISHED, ids=lambda folder: folder.name)
def test_the_table_of_a_finished_experiment_follows_from_its_cells(folder):
    record, cells, table = finished(folder)
    kept = read_json(folder / 'table.json')
    assert len(table) == len(kept)
    assert table.accuracy.tolist() == pytest.approx([line['accuracy'] for line in kept])
    version, protocol = record.get('version', 1), record.get('protocol', 1)
    by = '0.1.0' if protocol == 1 else '0.2.0'
    made = f'version {version} of the model tiny by diffii {by}, protocol {protocol}'
    assert made in notes(cells, record)[0]
    assert summary_lines(folder)


def test_measures_of_older_results_have_the_names_of_today():
    folder = RESULTS / 'expansion-digits'
    kept = [line['faithfulness'] for line in read_json(folder / 'table.json')]

    record, cells, table = finished(folder)

    assert not {'faithfulness', 'judge'} & {*table, *cells[-1]}
    assert table.class_consistency.dropna().tolist() == pytest.approx(
        [value for value in kept if value is not None]
    )
    assert any(
        'an oracle classifier trained on' in line for line in notes(cells, record)
    )


def test_results_of_version_0_1_are_shown_but_not_gone_on_with(tmp_path):
    old = RESULTS / 'expansion-digits' / 'experiment.json'
    out = tmp_path / 'x'
    out.mkdir()
    (out / 'experiment.json').write_bytes(old.read_bytes())
    settings = BenchmarkSettings.of(trials=dict(shots=3, trials=1))
    with pytest.raises(UserError, match='a run of diffii 0.1.0.*another folder'):
        benchmark('expansion', 'digits', out, settings)
    assert [p.name for p in out.iterdir()] == ['experiment.json']


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline()


def experiment(pipe, **groups):
    settings = BenchmarkSettings.of(**groups)
    classifier = given_classifier('digits', settings)
    data = shipped_set('digits')
    return Experiment('few-shot', Path('x'), data, pipe, settings, classifier)


@pytest.mark.parametrize(
    'groups, same',
    [
        (dict(trials=dict(trials=9, methods='original', shots=2)), True),
        (dict(model=dict(device='cpu', compile=True)), True),
        (dict(data=dict(root='/somewhere')), True),  # digits have no root
        (dict(trials=dict(seed=1)), False),
        (dict(trials=dict(quick=True)), False),
        (dict(model=dict(dtype='float32')), True),  # as on every CPU
        (dict(model=dict(vae_batch=2, offload=False)), True),
        (dict(model=dict(dtype='float16')), False),
        (dict(model=dict(batch_size=8)), False),
        (dict(data=dict(flip=False)), False),
        (dict(data=dict(test='/somewhere')), False),
        (dict(concepts=dict(steps=7)), False),
        (dict(classifier=dict(lr=0.5)), False),
    ],
)
def test_what_decides_the_numbers_is_recorded_and_no_more(pipe, groups, same):
    usual = about_run(experiment(pipe), 'digits')
    other = about_run(experiment(pipe, **groups), 'digits')
    assert (usual == other) == same
    json.dumps(other)


@pytest.mark.parametrize('metaclass, same', [('bird', True), ('digit', False)])
def test_recommendations_for_other_categories_decide_nothing(pipe, metaclass, same):
    notes = deepcopy(pipe.recommended)
    changed = deepcopy(notes)
    changed['inversion']['by_metaclass'][metaclass] = dict(forward_steps=5)
    pipes = (SimpleNamespace(recommended=n, dtype_name='') for n in (notes, changed))
    usual, other = (about_run(experiment(p), 'digits') for p in pipes)
    assert (usual == other) == same


def test_another_model_is_known_by_its_weights(pipe):
    about = about_run(experiment(pipe, model=dict(model='elsewhere')), 'digits')
    assert 'version' not in about
    assert about['model_digest']


@pytest.mark.parametrize('notes', ({}, dict(sampling=dict(few_step='none'))))
def test_a_model_that_recommends_no_few_step_weights_has_none_on_record(pipe, notes):
    e = experiment(pipe, model=dict(model='elsewhere'))
    e = replace(e, pipe=replace(e.pipe, recommended=notes))

    about = about_run(e, 'digits')

    assert about['recommended'] == notes
    assert 'few_step' not in about


def test_weights_of_a_row_are_looked_for_first(pipe, tmp_path):
    row = 'diff-ii + few-step=own'
    settings = BenchmarkSettings.of(
        trials=dict(methods=row), model=dict(model=str(checkpoint('sd1')))
    )
    with pytest.raises(UserError, match='--few-step own: no few_step.safetensors'):
        benchmark('few-shot', 'digits', tmp_path / 'x', settings)
    assert not (tmp_path / 'x').exists()


def test_steps_of_a_row_come_before_the_epochs_of_the_command(pipe):
    row = configuration('diff-ii + classifier-steps=50')
    e = experiment(pipe, classifier=dict(epochs=100))

    condition, *_ = conditions('few-shot', e.data, e.settings.trials)
    found = classifier_settings(e, condition, row)

    assert (found.steps, found.epochs) == (50, None)


@pytest.mark.parametrize(
    'task, groups, word',
    [
        ('few-shot', dict(trials=dict(shots=500)), '--shots 500'),
        ('long-tail', dict(trials=dict(imbalance=0.5)), '--imbalance 0.5'),
        ('few-shot', dict(classifier=dict(arch='nonet')), 'nonet'),
        ('split', dict(trials=dict(values=2)), '--split-ratio 2'),
        ('few-shot', dict(trials=dict(values=1)), '--values'),
        ('long-tail', dict(trials=dict(shots=5)), '--shots'),
        ('few-shot', dict(trials=dict(clip='ViT-B-32')), '--clip ViT-B-32'),
        ('few-shot', dict(trials=dict(clip='ViT-B-32:openai')), 'ViT-B-32'),
        ('few-shot', dict(trials=dict(preset='resnet50')), '--preset'),
        ('few-shot', dict(classifier=dict(steps=0)), '--classifier-steps 0'),
    ],
)
def test_a_mistake_leaves_no_folder(tmp_path, task, groups, word):
    with pytest.raises(UserError) as error:
        benchmark(task, 'digits', tmp_path / 'x', BenchmarkSettings.of(**groups))
    assert word in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / 'x').exists()


SHORT = dict(shots=2, trials=1, quick=True)


@pytest.mark.parametrize(
    'task, dataset, trials, rows',
    [
        ('ood', 'aviary', dict(methods='original,diff-ii'), 2),
        ('few-shot', 'digits', dict(methods='original,diff-ii,diffii'), 3),
        ('long-tail', 'digits', dict(methods='CE,diff-ii', imbalance=20, shots=()), 2),
        (
            'few-shot',
            'digits',
            dict(methods='mixup,diff-ii + rand-augment', shots=1),
            2,
        ),
        ('ablation', 'digits', {}, 6),
        ('split', 'digits', dict(values='0,1'), 3),
        ('remedies', 'aviary', {}, 6),
        ('inversions', 'digits', dict(values='1,2'), 3),
    ],
)
def test_every_kind_of_task_runs(tmp_path, task, dataset, trials, rows):
    settings = BenchmarkSettings.of(trials=SHORT | trials)
    table = benchmark(task, dataset, tmp_path / 'x', settings)
    assert len(table) == rows
    assert table.accuracy.between(0, 100).all()
    assert summary_lines(tmp_path / 'x')


@pytest.mark.parametrize(
    'name, method, augment, images',
    [
        ('cutmix', None, 'cutmix', ''),
        ('original + rand-augment', None, 'rand', ''),
        ('diff-ii + trivial-augment', 'diff-ii', 'trivial', 'diff-ii'),
        ('diff-ii + even + mixup', 'diff-ii', 'mixup', 'diff-ii'),
    ],
)
def test_ordinary_augmentation_stands_alone_or_is_added(name, method, augment, images):
    found = configuration(name)

    assert found.name == name
    assert (found.sampling or {}).get('method') == method
    assert found.classifier['augment'] == augment
    assert (found.classifier.get('category') == 'even') == ('even' in name)
    assert found.images == images


def test_the_task_strength_draws_circles(tmp_path):
    settings = BenchmarkSettings.of(trials=SHORT)
    assert benchmark('strength', 'digits', tmp_path / 'x', settings) is None
    picture = Image.open(tmp_path / 'x' / '2-shot.png')
    assert picture.size == (13 * 66 - 2, 4 * 66 - 2)


@pytest.fixture
def named_clip(tmp_path):
    "A CLIP of open_clip's kind with random weights, as the option names it."
    return ':'.join(map(str, small_clip(tmp_path)))


def test_a_clip_without_weights_is_told_at_once(tmp_path):
    settings = BenchmarkSettings.of(trials=SHORT | dict(clip='ViT-B-32'))
    with pytest.raises(UserError, match='--clip ViT-B-32: .*as ViT-B-32:openai'):
        benchmark('few-shot', 'digits', tmp_path / 'x', settings)
    assert not (tmp_path / 'x').exists()


def test_the_clip_score_and_the_oracle_go_together(tmp_path, named_clip):
    trials = SHORT | dict(trials=2, methods='original,random-noise', clip=named_clip)
    settings = BenchmarkSettings.of(trials=trials, data=dict(flip=False))
    table = benchmark('few-shot', 'aviary', tmp_path / 'x', settings)
    measured = {'clip', 'class_consistency', 'precision'}
    assert measured | {f'{name} sd' for name in measured} <= set(table)
    cell = read_cells(tmp_path / 'x')[-1]
    assert cell['clip_model'] == named_clip
    assert cell['oracle']['images'] == 20
    assert read_json(tmp_path / 'x' / 'experiment.json')['data']['flip'] is False


PER_SPLIT = 102  # images: one of each category


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    "Flowers-102 in miniature, in the layout that its archives unpack to."
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    from diffii.data.paper_sets import DATASETS

    folder, count = tmp_path / 'flowers-102', 4 * PER_SPLIT
    (folder / 'jpg').mkdir(parents=True)
    for i in range(count):
        image = Image.new('RGB', (12, 12), (i % 256, i // 2, 90))
        image.save(folder / 'jpg' / f'image_{i + 1:05d}.jpg')
    labels = [i % PER_SPLIT + 1 for i in range(count)]
    savemat(folder / 'imagelabels.mat', dict(labels=[labels]))
    parts = dict(trnid=(0, 1), valid=(1, 2), tstid=(2, 4))
    ids = {
        name: [list(range(1 + PER_SPLIT * first, 1 + PER_SPLIT * last))]
        for name, (first, last) in parts.items()
    }
    savemat(folder / 'setid.mat', ids)
    # the archives' own digests are not those of the miniature
    monkeypatch.setitem(Flowers102._file_dict, 'label', ('imagelabels.mat', None))
    monkeypatch.setitem(Flowers102._file_dict, 'setid', ('setid.mat', None))
    sizes = dict(train=102, val=102, test=204)
    monkeypatch.setitem(DATASETS, 'flower', replace(DATASETS['flower'], images=sizes))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    "What classifiers were asked for, none of which is trained."
    from diffii.base.backbones import HALF, small_net
    from diffii.method.classifier import Result

    asked = []

    def train(train, test=None, synthetic=None, settings=None, **kwargs):
        asked.append((train, test, settings))
        return Result(accuracy=0.5, per_class={}, classes=train.classes)

    def build(arch, n_classes, *args, **kwargs):
        return small_net(n_classes), HALF

    monkeypatch.setattr('diffii.method.classifier.train_classifier', train)
    monkeypatch.setattr('diffii.base.backbones.build_model', build)
    return asked


PRESET = dict(imbalance=100, methods='CE', trials=1, preset='resnet50-lt')


def test_the_papers_settings_reach_the_classifier(flowers, trained):
    settings = BenchmarkSettings.of(trials=PRESET, data=dict(root=str(flowers)))
    benchmark('long-tail', 'flower', flowers / 'a', settings)
    train, test, used = trained[0]
    assert (len(train), len(test)) == (103, 204)
    assert not set(train.names) & set(test.names)
    assert (used.arch, used.size, used.resize) == ('torchvision/resnet50', 224, 256)
    assert (used.epochs, used.batch_size, used.lr) == (200, 128, 0.005)
    assert used.pretrained
    assert used.flip


def test_given_settings_go_before_the_papers(flowers, trained):
    settings = BenchmarkSettings.of(
        trials=PRESET,
        data=dict(root=str(flowers), flip=False),
        classifier=dict(lr=0.1, steps=7, size=128),
        model=dict(device='cpu'),
    )
    benchmark('long-tail', 'flower', flowers / 'b', settings)
    used = trained[0][2]
    assert (used.lr, used.steps, used.epochs) == (0.1, 7, None)
    assert (used.size, used.resize) == (128, None)
    assert (used.flip, used.device) == (False, 'cpu')


def test_the_papers_ablation_stands_beside_ours():
    from diffii.evaluation.tables import published_ablation

    table, row = ('few_shot', 'aircraft_5'), 'circle yes, two-stage yes'
    assert published_ablation(table, row, 'torchvision/resnet50')['gain, paper'] == 5.52
    assert published_ablation(table, row, 'small') == {}
