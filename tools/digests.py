"""Digests of small runs of everything that computes, to tell whether a change of the code
left the arithmetic as it was.

    python tools/digests.py before.json              # on the old commit
    python tools/digests.py --compare before.json    # on the new one

Both data sets, concepts, inversions, the circle, two solvers, every method, classifiers
and LPIPS; about three minutes on one core. Digests are the same on one machine only.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np

import diffii  # noqa: F401  before torch
import torch
from diffii.base.images import few_shot
from diffii.base.methods import METHODS
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import (
    FAST,
    ClassifierSettings,
    ConceptSettings,
    InversionSettings,
    SamplingSettings,
    Settings,
)
from diffii.data.sets import shipped_set
from diffii.evaluation.long_tail import LONG_TAIL, long_tail_callbacks
from diffii.evaluation.metrics import lpips_diversity
from diffii.method.classifier import train_classifier
from diffii.method.learning import learn_concepts
from diffii.method.denoising import two_stage_denoise
from diffii.method.interpolation import slerp
from diffii.method.inversion import invert_images
from diffii.run.runs import synthesize

CATEGORIES, SHOTS, TEST_IMAGES = 4, 3, 80


def digest(*arrays) -> str:
    "A digest of the bytes of arrays."
    found = hashlib.sha256()
    for array in arrays:
        found.update(np.ascontiguousarray(np.asarray(array)).tobytes())
    return found.hexdigest()[:16]


def first_categories(images, most=None):
    "The images of the first categories alone."
    keep = [i for i, label in enumerate(images.labels) if label < CATEGORIES][:most]
    few = images.subset(keep)
    first = dict(classes=few.classes[:CATEGORIES], words=few.words[:CATEGORIES])
    return replace(few, **first)


def learned(concepts):
    "What concepts consist of, as arrays."
    lora = [concepts.lora[k] for k in sorted(concepts.lora)]
    return *concepts.embeddings, *lora, np.array(concepts.log)


def concept_digests(pipe, few):
    "Tokens with LoRA and tokens alone: yields (name, digest, concepts)."
    both = ConceptSettings.of(pipe, few.metaclass, steps=12, batch_size=8, flip=False)
    concepts = learn_concepts(pipe, few, both, seed=3)
    yield 'concepts', digest(*learned(concepts)), concepts
    given = dict(steps=12, batch_size=8, rank=0, lr_schedule='linear', balanced=True)
    tokens = ConceptSettings.of(pipe, few.metaclass, **given)
    concepts = learn_concepts(pipe, few, tokens, seed=3)
    yield 'tokens', digest(*learned(concepts)), concepts


def inversion_digests(pipe, few, concepts):
    "Three ways to invert; yields (name, digest, pool)."
    plain = dict(forward_steps=0, fixed_point_iters=0, per_image=1)
    for name, given in (
        ('plain', plain),
        ('seven', dict(steps=7)),
        ('recommended', {}),
    ):
        settings = InversionSettings.of(pipe, few.metaclass, **given)
        pool = invert_images(pipe, few, concepts, settings)
        yield f'inversion-{name}', digest(*pool.latents), pool


def circle_digests(pipe, concepts, pool, suffixes):
    "Interpolation and denoising; yields (name, digest)."
    a = torch.stack([z[0] for z in pool.latents])
    b = torch.stack([z[1] for z in pool.latents])
    yield 'circle', digest(slerp(a, b, torch.tensor([0.3, 1.2, 2.5, 3.3])))
    yield 'inward', digest(slerp(a, b, 0.4, 'inward', True))
    noises, numbers = slerp(a, b, 1.7), range(CATEGORIES)
    plain = pipe.encode_prompts([concepts.prompt(k) for k in numbers])
    suffixed = pipe.encode_prompts([concepts.prompt(k, suffixes[k]) for k in numbers])
    for name, given in dict(ddim={}, dpm=dict(solver='dpm++'), fast=FAST).items():
        settings = SamplingSettings(split_ratio=0.3, guidance_scale=2.0, **given)
        latents = two_stage_denoise(pipe, noises, plain, suffixed, settings)
        yield f'denoised-{name}', digest(latents)
    yield 'decoded', digest(*pipe.decode_latents(latents))


def method_digests(pipe, few, given, suffixes):
    "The images of every method; yields (name, digest, images)."
    for method in METHODS:
        if METHODS[method].start in ('nothing', 'edit'):  # edits need another model
            continue
        sampling = dict(method=method, expansion=2, steps=8)
        settings = Settings.of(
            pipe, few.metaclass, sampling=sampling, run=dict(seed=11)
        )
        with tempfile.TemporaryDirectory() as folder:
            out, concepts = Path(folder) / 'x', given[METHODS[method].learn]
            made = synthesize(pipe, few, out, settings, suffixes, concepts)
            pictures = [made.open(i) for i in range(len(made))]
            made = replace(made, images=tuple(pictures))
        names = hashlib.sha256('|'.join(made.names).encode()).hexdigest()[:8]
        found = digest(*pictures, np.asarray(made.targets))
        yield f'method-{method}', f'{found} {names}', made


def set_digests(name):
    "All digests of one data set; yields (name, digest)."
    data = shipped_set(name, tuning=True)
    few = first_categories(few_shot(data.pool, SHOTS, 5)[0])
    test = first_categories(data.test, TEST_IMAGES)
    pipe = load_pipeline('tiny', device='cpu')
    pictures = [few.open(i) for i in range(len(few))]
    yield 'encoded', digest(pipe.encode_images(pictures))
    given = dict(none=None)
    for kind, (label, found, concepts) in zip(
        ('tokens+lora', 'tokens'), concept_digests(pipe, few)
    ):
        given[kind] = concepts
        yield label, found
    concepts = given['tokens+lora']
    with concepts.attached(pipe):
        for label, found, pool in inversion_digests(pipe, few, concepts):
            yield label, found
        yield from circle_digests(pipe, concepts, pool, data.suffixes)
    for label, found, made in method_digests(pipe, few, given, data.suffixes):
        yield label, found
        if label in ('method-diff-ii', 'method-diff-mix'):
            settings = ClassifierSettings(steps=20, flip=data.flip)
            result = train_classifier(few, test, made, settings, seed=2)
            yield label.replace('method', 'classifier'), digest(result.probabilities)
    for label in LONG_TAIL:
        callbacks = long_tail_callbacks(label, seed=2)
        settings = ClassifierSettings(steps=20)
        result = train_classifier(
            few, test, None, settings, seed=2, callbacks=callbacks
        )
        yield f'classifier-{label}', digest(result.probabilities)
    yield 'lpips', digest(np.float64(lpips_diversity(few)[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('file', type=Path)
    parser.add_argument('--compare', action='store_true', help='with this file')
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    before = json.loads(args.file.read_text()) if args.compare else {}
    found, other = {}, []
    for name in ('digits', 'aviary'):
        for label, value in set_digests(name):
            found[f'{name}/{label}'] = value
            same = before.get(f'{name}/{label}') == value
            other += [f'{name}/{label}'] if args.compare and not same else []
            print(f'{name}/{label}', value, '' if same or not before else 'DIFFERENT')
    if not args.compare:
        args.file.write_text(json.dumps(found, indent=1) + '\n')
        return
    other += sorted(set(before) - set(found))
    print(f'{len(found)} compared, {len(other)} differ')
    sys.exit(f'different: {", ".join(other)}' if other else 0)


if __name__ == '__main__':
    main()
