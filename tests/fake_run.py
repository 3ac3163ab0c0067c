"A finished run as its folder has it, without any model."

from pathlib import Path

import numpy as np
from garden import a_record, a_row
from PIL import Image

from diffii.base.files import IMAGES, folder_name, write_json
from diffii.base.images import ImageSet
from diffii.run.folders import FORMAT, RunFolder, write_rows


def colours(seed, size=(32, 32)):
    "A smooth picture."
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype='uint8')
    return Image.fromarray(pixels).resize(size, Image.BICUBIC)


def real_set(classes, shots=2, size=(40, 30)) -> ImageSet:
    "`shots` real images of each category."
    return ImageSet(
        images=tuple(colours(i, size) for i in range(shots * len(classes))),
        labels=tuple(k for k in range(len(classes)) for _ in range(shots)),
        classes=tuple(classes),
        metaclass='tree',
        names=tuple(f'{c}/{i}.png' for c in classes for i in range(shots)),
    )


def made_row(category, number, **more) -> dict:
    "The metadata of an image made from the first two real ones of its category."
    name = f'{IMAGES}/{folder_name(category)}/{number:05d}.png'
    of_category = dict(label=category, source_label=category, index=number)
    sources = [f'{category}/0.png', f'{category}/1.png']
    return a_row(name, sources=sources, **of_category) | more


def write_run(out, real: ImageSet, rows: list, size=(32, 32)) -> Path:
    "Write a finished run into a folder."
    folder = RunFolder(out)
    digests = {name: real.digest(i) for i, name in enumerate(real.names)}
    about = a_record(metaclass=real.metaclass, classes=real.classes, images=digests)
    about['sampling'] = dict(method='diff-ii')
    write_json(folder.record, dict(format=FORMAT, diffii='0') | about)
    for i, row in enumerate(rows):
        file = folder.file(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        colours(1000 + i, size).save(file)
    write_rows(folder.metadata, rows)
    return folder.path
