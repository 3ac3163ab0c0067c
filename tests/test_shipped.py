"What the package ships: the model, the halves of the digits, the demo and its report."

import json
import sys
import numpy as np


def test_the_halves_of_the_digits_are_disjoint_and_written():
    from diffii.data.digits import load_halves, digits_set, SPLIT_SEED

    h = load_halves()
    base, held = set(h['base']['index']), set(h['held_out']['index'])
    assert not base & held and len(base | held) == 1797
    assert {tuple(s.ravel()) for s in h['base']['images']}.isdisjoint(
        tuple(s.ravel()) for s in h['held_out']['images']
    )  # nor the same scan twice
    assert SPLIT_SEED == 20260101 and sorted(base)[:5] == [
        int(i)
        for i in sorted(np.random.default_rng(SPLIT_SEED).permutation(1797)[:898])[:5]
    ]
    parts = [set(digits_set(p).names) for p in ('pool', 'validation', 'test')]
    assert sum(map(len, parts)) == len(held) == len(set.union(*parts))


def test_the_shipped_model_is_a_stable_diffusion_pipeline(root):
    from diffusers import StableDiffusionPipeline

    p = StableDiffusionPipeline.from_pretrained(root / 'diffii' / 'tiny')
    im = p(
        'a photo of a bird flying over water.', num_inference_steps=3, output_type='np'
    ).images
    assert im.shape == (1, 32, 32, 3) and np.isfinite(im).all() and im.std() > 0.01
    weights = list((root / 'diffii' / 'tiny').rglob('*.safetensors'))
    assert sum(w.stat().st_size for w in weights) <= 16 * 2**20 and not list(
        (root / 'diffii' / 'tiny').rglob('*.bin')
    )
    assert p.scheduler.config.beta_schedule == 'scaled_linear' and (
        p.scheduler.config.beta_start,
        p.scheduler.config.beta_end,
    ) == (0.00085, 0.012)


def test_demo_writes_what_it_says(run, tmp_path, open_page):
    out = tmp_path / 'demo'
    r = run(
        sys.executable,
        '-m',
        'diffii',
        'demo',
        '--quick',
        '--shots',
        '2',
        '--trials',
        '2',
        '--out',
        out,
        timeout=600,
    )
    got = json.loads((out / 'results.json').read_text())
    assert (
        got['real'] == 20
        and got['synthetic'] == 40
        and len(list((out / 'synthetic-1').glob('*/*.png'))) == 40
    )
    sources = [
        {
            s.split('@')[0]
            for l in (out / f'synthetic-{t}' / 'metadata.jsonl')
            .read_text()
            .splitlines()
            for s in json.loads(l)['sources']
        }
        for t in range(2)
    ]
    assert sources[0] != sources[1]  # every trial draws its own real images
    assert {k: len(v['trials']) for k, v in got['accuracy'].items()} == {
        'original': 2,
        'original + synthetic': 2,
    }
    assert (
        f'{got["accuracy"]["original"]["mean"]:.1f} %' in r.stdout
        and 'concepts' in r.stderr
    )
    messages, pictures, broken = open_page(out / 'report.html')
    assert not messages and pictures == 3 and not broken
    assert 'http' not in (out / 'report.html').read_text().replace(
        'http-equiv', ''
    )  # nothing is fetched
