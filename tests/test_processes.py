"Several processes: each does its share, and together they make what one would have made."
import json, os, subprocess, sys
import numpy as np, pytest
from PIL import Image
from diffii.digits import digits_set
from diffii.data import few_shot

def launch(n, *args, cwd):
    "Run `diffii` in n processes on the CPU, by accelerate's launcher."
    env = {k: v for k,v in os.environ.items() if not k.startswith('PYTHON')} | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
    start = ['-m','accelerate.commands.launch','--cpu','--num_processes',str(n),'--num_machines','1','--mixed_precision','no','--dynamo_backend','no','-m','diffii'] if n>1 else ['-m','diffii']
    r = subprocess.run([sys.executable, *start, *map(str,args)], capture_output=True, text=True, timeout=600, env=env, cwd=cwd)
    assert r.returncode==0, r.stdout[-2000:]+r.stderr[-4000:]
    return r

def test_two_processes_make_the_images_of_one(tmp_path):
    few,_ = few_shot(digits_set('pool'), 2, seed=0)
    for i in range(len(few)):
        f = tmp_path/'digits'/few.classes[few.labels[i]]/f'{few.names[i]}.png'; f.parent.mkdir(parents=True, exist_ok=True); few.open(i).save(f)
    args = lambda out: ('augment', tmp_path/'digits', '--metaclass', 'digit', '--out', tmp_path/out, '--concept-steps', 4, '--concept-batch', 4, '--steps', 4, '--expansion', 2, '--batch-size', 8, '--no-flip')
    launch(1, *args('one'), cwd=tmp_path); r = launch(2, *args('two'), cwd=tmp_path)
    assert r.stdout.count('40 synthetic images')==1  # one process speaks
    rows = {out: [json.loads(l) for l in (tmp_path/out/'metadata.jsonl').read_text().splitlines()] for out in ('one','two')}
    strip = lambda r: {k: v for k,v in r.items() if k not in ('alpha','strength')}
    assert list(map(strip,rows['one']))==list(map(strip,rows['two']))  # the same plan, but for the last digits of angles
    assert np.allclose([r['strength'] for r in rows['one']], [r['strength'] for r in rows['two']], rtol=1e-3)
    losses = [json.loads((tmp_path/o/'.diffii'/'concepts'/'concepts.json').read_text())['log'] for o in ('one','two')]
    assert np.allclose(*losses, rtol=1e-3) and len(losses[0])==4  # two halves of a batch are the batch
    ims = [np.stack([np.asarray(Image.open(tmp_path/o/r['file_name'])) for r in rows[o]]).astype(int) for o in ('one','two')]
    assert np.abs(ims[0]-ims[1]).mean() < 2  # sums in another order: the pictures differ by less than 2 of 255 on average
