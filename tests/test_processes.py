"Several processes: each does its share, and together they make what one would have made."

import json, os, subprocess, sys
import numpy as np, pytest
from PIL import Image
from diffii.data.digits import digits_set
from diffii.base.images import few_shot


def launch(n, *args, cwd, what=('-m', 'diffii'), ok=True):
    "Run `diffii`, or a script, in n processes on the CPU, by torch's launcher; accelerate's starts several for GPUs only."
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')} | {
        'HF_HUB_OFFLINE': '1',
        'OMP_NUM_THREADS': '1',
    }
    start = (
        [
            '-m',
            'torch.distributed.run',
            '--standalone',
            '--nproc_per_node',
            str(n),
            *what,
        ]
        if n > 1
        else what
    )
    r = subprocess.run(
        [sys.executable, *start, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
        env=env,
        cwd=cwd,
    )
    assert (r.returncode == 0) == ok, r.stdout[-2000:] + r.stderr[-4000:]
    return r


def test_two_processes_make_the_images_of_one(tmp_path):
    few, _ = few_shot(digits_set('pool'), 2, seed=0)
    for i in range(len(few)):
        f = tmp_path / 'digits' / few.classes[few.labels[i]] / f'{few.names[i]}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        few.open(i).save(f)
    args = lambda out: (
        'augment',
        tmp_path / 'digits',
        '--metaclass',
        'digit',
        '--out',
        tmp_path / out,
        '--concept-steps',
        4,
        '--concept-batch',
        4,
        '--steps',
        4,
        '--expansion',
        2,
        '--batch-size',
        8,
        '--no-flip',
    )
    launch(1, *args('one'), cwd=tmp_path)
    r = launch(2, *args('two'), cwd=tmp_path)
    assert r.stdout.count('40 synthetic images') == 1  # one process speaks
    assert (
        '--concept-batch 3: give a multiple of the 2 processes'
        in launch(2, *args('odd'), '--concept-batch', 3, cwd=tmp_path, ok=False).stderr
    )  # and there are two
    rows = {
        out: [
            json.loads(l)
            for l in (tmp_path / out / 'metadata.jsonl').read_text().splitlines()
        ]
        for out in ('one', 'two')
    }
    strip = lambda r: {k: v for k, v in r.items() if k not in ('alpha', 'strength')}
    assert list(map(strip, rows['one'])) == list(
        map(strip, rows['two'])
    )  # the same plan, but for the last digits of angles
    assert np.allclose(
        [r['strength'] for r in rows['one']],
        [r['strength'] for r in rows['two']],
        rtol=1e-3,
    )
    losses = [
        json.loads(
            (tmp_path / o / '.diffii' / 'concepts' / 'concepts.json').read_text()
        )['log']
        for o in ('one', 'two')
    ]
    assert (
        np.allclose(*losses, rtol=1e-3) and len(losses[0]) == 4
    )  # two halves of a batch are the batch
    ims = [
        np.stack(
            [np.asarray(Image.open(tmp_path / o / r['file_name'])) for r in rows[o]]
        ).astype(int)
        for o in ('one', 'two')
    ]
    assert (
        np.abs(ims[0] - ims[1]).mean() < 2
    )  # sums in another order: the pictures differ by less than 2 of 255 on average


TRAIN = """
import hashlib, json, sys, numpy as np, torch
from diffii.core import processes
from diffii.base.settings import ClassifierSettings
from diffii.method.classifier import train_classifier
from diffii.evaluation.long_tail import long_tail_callbacks
from diffii.data import few_shot
from diffii.digits import digits_set
seen = []; few,_ = few_shot(digits_set('pool'), 3, seed=0); valid = digits_set('validation'); spare = digits_set('pool')
def told(r): return dict(accuracy=r.accuracy, weights=hashlib.sha256(b''.join(v.numpy().tobytes() for v in r.learner.model.state_dict().values())).hexdigest(), keys=sorted(r.learner.model.state_dict())[:2],
    predictions=hashlib.sha256(r.probabilities.tobytes()).hexdigest(), n=len(r.probabilities), batch=r.learner.dls.train.bs, callbacks=sorted(str(c) for c in r.learner.cbs))
a = train_classifier(few, valid, spare, ClassifierSettings(steps=60, lr=.05), progress=lambda i,n: seen.append((i,n)))
b = train_classifier(few, valid, settings=ClassifierSettings(steps=20, batch_size=16), valid=spare.subset(range(50)), callbacks=long_tail_callbacks('CMO+DRW'))
with open(f'{sys.argv[1]}-{processes().process_index}.json','w') as f: json.dump([told(a)|dict(steps=seen[-1]), told(b)], f)
"""


def test_a_classifier_is_trained_together(tmp_path):
    "Data-parallel training: the steps and the batch of one process, the same network in all of them."
    (tmp_path / 'train.py').write_text(TRAIN)
    launch(1, 'one', cwd=tmp_path, what=('train.py',))
    launch(2, 'two', cwd=tmp_path, what=('train.py',))
    one, first, second = (
        json.loads((tmp_path / f).read_text())
        for f in ('one-0.json', 'two-0.json', 'two-1.json')
    )
    assert first == second  # weights, statistics and scores, to the bit
    for a, b in zip(one, first):
        assert (
            b['batch'] == a['batch'] // 2
            and [a[k] for k in ('keys', 'n', 'callbacks')]
            == [b[k] for k in ('keys', 'n', 'callbacks')]
            and a['weights'] != b['weights']
        )
    assert (
        first[0]['steps'] == one[0]['steps'] == [60, 60]
        and one[0]['accuracy'] > 0.4
        and abs(first[0]['accuracy'] - one[0]['accuracy']) < 0.12
    ), (one, first)


def test_a_benchmark_in_two_processes(tmp_path):
    args = (
        'benchmark',
        'few-shot',
        '--shots',
        2,
        '--trials',
        1,
        '--quick',
        '--methods',
        'original,random-noise',
        '--out',
        tmp_path / 'b',
    )
    r = launch(2, *args, cwd=tmp_path)
    assert (
        r.stdout.count('see ') == 1
        and {'table.csv', 'table.json', 'plot.png'}
        <= {p.name for p in (tmp_path / 'b').iterdir()}
        and len(list((tmp_path / 'b' / 'cells').glob('*.json'))) == 2
    )
