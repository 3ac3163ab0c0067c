"The stages of a run without a model: files are written and read as ever."

from contextlib import contextmanager, nullcontext

import pytest
import torch
from PIL import Image

from diffii.base.seeds import generator
from diffii.method.concepts import Concepts
from diffii.run import pools, runs


def fake_batch(pipe, concepts, pool, rows):
    "An image of noise for each row, from everything that the row and the pool say."
    images = []
    for row in rows:
        k = pool.classes.index(row['source_label'])
        at = [pool.names[k].index(name) for name in row['sources']]
        value = float(pool.latents[k][at].double().sum())
        parts = row['label'], row['index'], row['strength'], row['suffix'], value
        gen = generator(row['seed'], *map(str, parts), row['attempt'])
        pixels = torch.randint(0, 256, (8, 8, 3), generator=gen, dtype=torch.uint8)
        images.append(Image.fromarray(pixels.numpy()))
    return images


def fake_inversions(pipe, concepts, todo, groups, settings, progress):
    "Noise in the place of inversions."
    for k in (k for group in groups for k in group):
        gen = generator(0, *todo[k].names)
        yield k, torch.randn((len(todo[k]), *pipe.latent_shape), generator=gen)


@contextmanager
def fake_stages(learning=False):
    "A block in which inversions and images cost nothing, and concepts are not learned."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, 'make_batch', fake_batch)
        patch.setattr('diffii.run.review.make_batch', fake_batch)
        patch.setattr(pools, 'invert_groups', fake_inversions)
        if not learning:
            patch.setattr(Concepts, 'attached', lambda self, pipe: nullcontext())
        for module in ('run.runs', 'run.review', 'method.concepts', 'method.learning'):
            patch.setattr(f'diffii.{module}.model_digest', lambda pipe: 'abcdef01-3c00')
        yield patch
