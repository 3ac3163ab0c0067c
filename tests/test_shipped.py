"What the package ships: the model, and the halves of the digits."

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
