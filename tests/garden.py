"A user's folder with odd names and odd files, and small runs of the command on it."

import subprocess
import sys

import numpy as np
from conftest import clean_environment
from folder_files import contents
from PIL import Image

CLASSES = {'bird of paradise': 2, 'œillet (red:1.2)': 3, 'lonely': 1}
QUICK = ('--concept-steps', 2, '--steps', 3, '--expansion', 2, '--no-review')
MADE = 12  # images: two for each of six


def photo(seed, size=(40, 30)):
    "Smooth blobs of colour, unlike anything that the shipped model has seen."
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype='uint8')
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def plant(folder):
    "Write the images of `CLASSES`, and files that are none, into a folder."
    for name, count in CLASSES.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            photo(len(name) * 10 + i).save(folder / name / f'{i}.jpg')
    (folder / 'notes.txt').write_text('not a category')
    (folder / 'lonely' / '.hidden.jpg').write_text('x')
    return folder


def images_of(folder):
    "The images of `plant`, sorted."
    return [p for p in sorted(folder.glob('*/*.jpg')) if p.name[0] != '.']


def command(*args):
    "The command in a process of its own, as a list."
    return [sys.executable, '-m', 'diffii', *map(str, args)]


def start(*args, **kwargs):
    "Run the command in a process of its own."
    kwargs = dict(capture_output=True, text=True, env=environment()) | kwargs
    return subprocess.run(command(*args), timeout=600, **kwargs)


def environment(**more):
    return clean_environment() | dict(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1') | more


def files_of(folder):
    "What a run leaves for its user: name -> bytes."
    found = contents(folder, ['README.md'])
    return {name: data for name, data in found.items() if '.diffii/' not in name}


def a_row(file_name, **more):
    "A line of a plan, of whatever image."
    row = dict(file_name=file_name, label='oak', label_weight=1.0, method='diff-ii')
    row |= dict(model='tiny', seed=0, index=0, attempt=0, micro_batch=None, suffix='')
    row |= dict(source_label='oak', sources=['a', 'b'], strength=0.4, alpha=1.5)
    row |= dict(split_ratio=0.3, guidance_scale=7.5, steps=25, start='circle')
    row |= dict(interpolation='circle', equal_norms=False, guided=[0.0, 1.0])
    return row | dict(solver='ddim', stride=1, batch=0) | more


def a_record(**more):
    "What a run.json says, but for its number and version."
    record = dict(model='tiny', base='0' * 8 + '-', size=32, dtype='float32', seed=0)
    record |= dict(batch_size=8, metaclass='tree', classes=['oak'], images={})
    return record | dict(suffixes=[], concepts=None, inversion={}, sampling={}) | more
