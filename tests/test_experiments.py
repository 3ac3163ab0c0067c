"Experiments as a user meets them: folders of results that are there already, mistakes, and the settings that reach the classifier."

import json, subprocess, sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch
import matplotlib

matplotlib.use('Agg')
import pytest
from PIL import Image
from diffii.base.files import UserError, read_json
from diffii.run.folders import differences
from diffii.evaluation.experiments import (
    about_run,
    benchmark,
    read_cells,
    show_results,
    version_of,
)

RESULTS = sorted(
    (Path(__file__).parent.parent / 'nbs' / 'experiments' / 'results').glob(
        '*/experiment.json'
    )
)


def cli(*args):
    return subprocess.run(
        [sys.executable, '-m', 'diffii', 'benchmark', *map(str, args)],
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize('file', RESULTS, ids=lambda f: f.parent.name)
def test_finished_experiments_are_read_and_gone_on_with(file, capsys):
    then = read_json(file)
    own = {k: then[k] for k in ('tuning', 'concepts') if k in then}
    old = then.get('version', 1) != version_of('tiny')
    now = about_run(
        None,
        *(
            then[k]
            for k in (
                'model',
                'task',
                'dataset',
                'arch',
                'size',
                'training',
                'metaclass',
                'seed',
                'quick',
            )
        ),
        **{**own, 'dtype': 'float32'},
    )
    told = differences(then, json.loads(json.dumps(now)))
    assert then['model'] != 'tiny' or (
        told == [] if not old else len(told) == 1 and 'version' in told[0]
    )
    if (file.parent / 'table.json').is_file():
        assert len(show_results(file.parent)) == len(
            read_json(file.parent / 'table.json')
        )
        assert ('made with version' in capsys.readouterr().out) == old


def test_what_decides_the_numbers_is_recorded(tmp_path):
    common = ('tiny', 'few-shot', 'x', 'small', 32, {}, 'object', 0, False)
    assert about_run(
        None, *common, test=None, clip=None, flip=True, batch_size=64
    ) == about_run(None, *common)
    more = about_run(
        None,
        *common,
        test=tmp_path,
        clip=('a', 'b'),
        flip=False,
        dtype='float16',
        batch_size=8,
        suffixes=['in snow.'],
        root=tmp_path,
    )
    assert {k: more[k] for k in list(more)[9:]} == dict(
        test=str(tmp_path),
        clip='a:b',
        flip=False,
        dtype='float16',
        batch_size=8,
        suffixes=['in snow.'],
        version=version_of('tiny'),
    )
    assert about_run(None, *common[:2], 'cub', *common[3:], root=tmp_path)[
        'root'
    ] == str(tmp_path)
    with patch('diffii.concepts.model_digest', return_value='abc'):
        assert about_run(None, 'other', *common[1:])['model_digest'] == 'abc'


@pytest.mark.parametrize(
    'args,word',
    [
        ('few-shot --shots 500', '--shots 500'),
        ('long-tail --imbalance .5', '--imbalance 0.5'),
        ('few-shot --arch nonet', 'nonet'),
        ('split --values 2', '--split-ratio 2'),
        ('few-shot --values 1', '--values'),
        ('long-tail --shots 5', '--shots'),
        ('few-shot --clip ViT-B-32', '--clip ViT-B-32'),
        ('few-shot --clip ViT-B-32:openai', 'ViT-B-32'),
        ('few-shot --preset resnet50', '--preset'),
        ('few-shot --steps 0', 'steps 0'),
    ],
)
def test_mistakes_leave_no_folder(args, word, tmp_path):
    r = cli(*args.split(), '--out', tmp_path / 'x')
    assert (
        r.returncode == 2
        and word in r.stderr
        and len(r.stderr.strip().splitlines()) == 1
        and not (tmp_path / 'x').exists()
    )


def test_clip_and_the_judge_together(tmp_path):
    import open_clip, torch

    (tmp_path / 'small-clip.json').write_text(
        json.dumps(
            dict(
                embed_dim=16,
                vision_cfg=dict(
                    image_size=32, layers=1, width=32, head_width=16, patch_size=8
                ),
                text_cfg=dict(
                    context_length=77, vocab_size=49408, width=16, heads=2, layers=1
                ),
            )
        )
    )
    open_clip.add_model_config(tmp_path / 'small-clip.json')
    torch.manual_seed(0)
    torch.save(open_clip.create_model('small-clip').state_dict(), tmp_path / 'w.pt')
    t = benchmark(
        'few-shot',
        'aviary',
        tmp_path / 'x',
        (2,),
        methods=('original', 'random-noise'),
        trials=2,
        quick=True,
        clip=f'small-clip:{tmp_path / "w.pt"}',
        flip=False,
    )
    assert {
        'clip',
        'clip sd',
        'faithfulness',
        'faithfulness sd',
        'precision sd',
    } <= set(t)
    cell = read_cells(tmp_path / 'x')[-1]
    assert (
        cell['clip_model'] == f'small-clip:{tmp_path / "w.pt"}'
        and cell['judge']['images'] == 20
        and read_json(tmp_path / 'x' / 'experiment.json')['flip'] is False
    )


def flowers(root):
    from scipy.io import savemat

    f = root / 'flowers-102'
    (f / 'jpg').mkdir(parents=True)
    n = 4 * 102
    for i in range(n):
        Image.new('RGB', (12, 12), (i % 256, i // 2, 90)).save(
            f / 'jpg' / f'image_{i + 1:05d}.jpg'
        )
    savemat(f / 'imagelabels.mat', dict(labels=[[i % 102 + 1 for i in range(n)]]))
    savemat(
        f / 'setid.mat',
        {
            k: [list(range(1 + 102 * a, 1 + 102 * b))]
            for k, a, b in (('trnid', 0, 1), ('valid', 1, 2), ('tstid', 2, 4))
        },
    )


def test_the_papers_settings_reach_the_classifier(tmp_path):
    from torchvision import datasets as tv
    from diffii.base.backbones import small_net, HALF
    from diffii.method.classifier import Result
    from diffii.data.paper_sets import DATASETS

    flowers(tmp_path)
    seen = []

    def train(train, test, synthetic, **kw):
        seen.append((train, test, kw))
        return Result(accuracy=0.5, per_class={}, classes=train.classes)

    with (
        patch.dict(
            tv.Flowers102._file_dict,
            label=('imagelabels.mat', None),
            setid=('setid.mat', None),
        ),
        patch.dict(
            DATASETS,
            flower=replace(
                DATASETS['flower'], images=dict(train=102, val=102, test=204)
            ),
        ),
        patch('diffii.classifier.train_classifier', train),
        patch(
            'diffii.classifier.build_model', lambda arch, K, *a: (small_net(K), HALF)
        ),
    ):
        run = lambda out, **kw: benchmark(
            'long-tail',
            'flower',
            tmp_path / out,
            imbalance=(100,),
            methods=('CE',),
            trials=1,
            root=tmp_path,
            preset='resnet50-lt',
            **kw,
        )
        run('a')
        run('b', training=dict(lr=0.1, steps=7), size=128, flip=False, device='cpu')
    (train, test, a), (_, _, b) = seen
    assert (
        len(train) == 103
        and len(test) == 204
        and not set(train.names) & set(test.names)
    )
    assert {
        k: a[k]
        for k in (
            'arch',
            'size',
            'resize',
            'epochs',
            'batch_size',
            'lr',
            'pretrained',
            'flip',
        )
    } == dict(
        arch='torchvision/resnet50',
        size=224,
        resize=256,
        epochs=200,
        batch_size=128,
        lr=0.005,
        pretrained=True,
        flip=True,
    )
    assert (
        (b['lr'], b['steps'], b['size'], b['flip'], b['device'])
        == (0.1, 7, 128, False, 'cpu')
        and 'epochs' not in b
        and 'resize' not in b
    )
    assert read_json(tmp_path / 'a' / 'experiment.json')['training'][
        'epochs'
    ] == 200 and read_json(tmp_path / 'a' / 'experiment.json')['root'] == str(tmp_path)
    with pytest.raises(UserError, match='Stanford Cars'):
        benchmark(
            'few-shot', 'car', tmp_path / 'c', root=tmp_path, preset='resnet50-lt'
        )
    assert not (tmp_path / 'c').exists()
