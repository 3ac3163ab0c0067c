"""Small stand-ins for the archives of the public data sets.

Each has a few pictures of noise in the same folders, with the same lists in the same
formats, as the real archive."""

import pickle
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

BIRDS = ('001.Black_footed_Albatross', '002.Laysan_Albatross', '003.Sooty_Albatross')
BIRD_FILES = tuple(
    f'{bird}/{bird[4:]}_{i:04d}_{796111 + i}.jpg' for bird in BIRDS for i in range(4)
)
BIRD_IS_OF_WATER = (1, 1, 0)  # the third plays a bird of the land

VARIANTS = ('707-320', 'F-16A/B', 'Spitfire')  # a name may have slashes
THINGS = ('accordion', 'chair', 'lotus')
BREEDS = ('Abyssinian', 'american_bulldog', 'yorkshire_terrier')
MAKES = (
    'AM General Hummer SUV 2000',
    'Acura RL Sedan 2012',
    'Ram C/V Cargo Van Minivan 2012',
)


def picture(path: Path):
    "Write a picture of noise, 12 pixels wide and 10 high."
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(zlib.crc32(path.name.encode()))
    Image.fromarray(rng.integers(0, 255, (10, 12, 3), dtype='uint8')).save(path)


def lines(path: Path, rows):
    "Write a text file with a line for each of `rows`."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{row}\n' for row in rows), encoding='utf-8')


def make_cub(root):
    "Three species of four images, the first two of each for training."
    folder = root / 'CUB_200_2011'
    for file in BIRD_FILES:
        picture(folder / 'images' / file)
    lines(folder / 'images.txt', [f'{i} {f}' for i, f in enumerate(BIRD_FILES, 1)])
    lines(folder / 'classes.txt', [f'{i} {b}' for i, b in enumerate(BIRDS, 1)])
    labels = [f'{i + 1} {i // 4 + 1}' for i in range(12)]
    lines(folder / 'image_class_labels.txt', labels)
    training = [f'{i + 1} {int(i % 4 < 2)}' for i in range(12)]
    lines(folder / 'train_test_split.txt', training)
    return folder


def make_waterbirds(root):
    """The same birds: of each species one image for training in front of its own
    background, one for validation on land, and two for testing, on land and water."""
    folder = root / 'waterbird_complete95_forest2water2'
    rows = ['img_id,img_filename,y,split,place,place_filename']
    for i, file in enumerate(BIRD_FILES):
        picture(folder / file)
        kind = BIRD_IS_OF_WATER[i // 4]
        split, place = [(0, kind), (1, 0), (2, 0), (2, 1)][i % 4]
        rows.append(f'{i},{file},{kind},{split},{place},/x/{i}.jpg')
    lines(folder / 'metadata.csv', rows)
    return folder


def make_aircraft(root):
    "Three variants with one image in each split."
    folder = root / 'fgvc-aircraft-2013b'
    data = folder / 'data'
    lines(data / 'variants.txt', VARIANTS)
    rows = {}
    for j, split in enumerate(('train', 'val', 'test')):
        rows[split] = [f'{j}{k}34309 {v}' for k, v in enumerate(VARIANTS)]
        for row in rows[split]:
            picture(data / 'images' / f'{row.split()[0]}.jpg')
    for split, own in {**rows, 'trainval': rows['train'] + rows['val']}.items():
        lines(data / f'images_variant_{split}.txt', own)
    return folder


def make_pet(root):
    "Three breeds with two images for training and one for testing."
    folder = root / 'oxford-iiit-pet'
    for split, numbers in (('trainval', (1, 2)), ('test', (100,))):
        names = [(f'{b}_{i}', k) for k, b in enumerate(BREEDS, 1) for i in numbers]
        for name, _ in names:
            picture(folder / 'images' / f'{name}.jpg')
        rows = [f'{name} {k} {1 + (k > 1)} 1' for name, k in names]
        lines(folder / 'annotations' / f'{split}.txt', rows)
    return folder


def make_car(root):
    "Three models with two images for training and one for testing."
    folder = root / 'stanford_cars'
    (folder / 'devkit').mkdir(parents=True)
    names = np.array(MAKES, dtype=object)
    savemat(folder / 'devkit' / 'cars_meta.mat', dict(class_names=names))
    columns = ('bbox_x1', 'bbox_y1', 'bbox_x2', 'bbox_y2', 'class', 'fname')
    for images, table, n in (
        ('cars_train', 'devkit/cars_train_annos.mat', 6),
        ('cars_test', 'cars_test_annos_withlabels.mat', 3),
    ):
        files = [f'{i + 1:05d}.jpg' for i in range(n)]
        for file in files:
            picture(folder / images / file)
        rows = [(1, 1, 9, 9, i % 3 + 1, file) for i, file in enumerate(files)]
        annotations = np.array(rows, dtype=[(c, object) for c in columns])
        savemat(folder / table, dict(annotations=annotations))
    return folder


def make_flower(root):
    "Three flowers with one image in each split."
    folder = root / 'flowers-102'
    for i in range(1, 10):
        picture(folder / 'jpg' / f'image_{i:05d}.jpg')
    savemat(folder / 'imagelabels.mat', dict(labels=np.array([[1, 2, 3] * 3])))
    splits = dict(trnid=[[1, 2, 3]], valid=[[4, 5, 6]], tstid=[[9, 8, 7]])
    savemat(folder / 'setid.mat', splits)
    return folder


def make_caltech101(root):
    "Three categories of two images, and backgrounds, which are none."
    folder = root / 'caltech101'
    for category in ('BACKGROUND_Google', *THINGS):
        for i in (1, 2):
            place = folder / '101_ObjectCategories' / category
            picture(place / f'image_{i:04d}.jpg')
    return folder


def make_cifar100(root):
    "Three categories with two images for training and one for testing."
    folder = root / 'cifar-100-python'
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, n in (('train', 6), ('test', 3)):
        data = rng.integers(0, 255, (n, 3 * 32 * 32), dtype='uint8')
        labels = dict(fine_labels=[i % 3 for i in range(n)], coarse_labels=[0] * n)
        (folder / split).write_bytes(pickle.dumps(dict(data=data, **labels)))
    names = dict(fine_label_names=list(THINGS), coarse_label_names=['things'])
    (folder / 'meta').write_bytes(pickle.dumps(names))
    return folder


MAKERS = dict(
    cub=make_cub,
    aircraft=make_aircraft,
    car=make_car,
    pet=make_pet,
    flower=make_flower,
    waterbirds=make_waterbirds,
    caltech101=make_caltech101,
    cifar100=make_cifar100,
)
