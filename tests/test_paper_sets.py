"The paper's data sets, read from small archives with the layout of the real ones."

import functools
import json
import tarfile
import threading
import urllib.error
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import paper_archives
import pytest
from PIL import Image

from diffii.base.files import UserError
from diffii.base.images import few_shot, halve
from diffii.data.paper_sets import DATASETS, _species, paper_dataset
from diffii.evaluation.tasks import few_shot_condition, paper_data


@pytest.fixture(scope='module')
def archives(tmp_path_factory):
    "A folder that holds all data sets."
    root = tmp_path_factory.mktemp('archives')
    for make in paper_archives.MAKERS.values():
        make(root)
    return root


@pytest.fixture(autouse=True)
def unsigned(monkeypatch):
    """torchvision compares some files with the sums of the official ones, which small
    ones cannot have."""
    from torchvision.datasets import CIFAR100, Flowers102

    for key, file in (('label', 'imagelabels.mat'), ('setid', 'setid.mat')):
        monkeypatch.setitem(Flowers102._file_dict, key, (file, None))
    monkeypatch.setattr(CIFAR100, 'train_list', [['train', None]])
    monkeypatch.setattr(CIFAR100, 'test_list', [['test', None]])
    monkeypatch.setitem(CIFAR100.meta, 'md5', None)


@pytest.fixture
def small(archives):
    "Read a split of one of the small data sets."
    return functools.partial(read, root=archives)


def read(name, split='train', *, root):
    return paper_dataset(name, root, split, check=False)


def message(call, *args, **kw):
    "The single line of the `UserError` that a call raises."
    with pytest.raises(UserError) as caught:
        call(*args, **kw)
    assert '\n' not in str(caught.value)
    return str(caught.value)


# what is known before reading


@pytest.fixture(scope='module')
def published():
    return json.loads((files('diffii') / 'published.json').read_text(encoding='utf-8'))


def test_every_published_suffix_list_belongs_to_a_data_set(published):
    known = {name for d in DATASETS.values() for name in d.suffixes}
    assert known == set(published['suffixes'])


def test_metaclasses_are_those_of_the_paper(published):
    names = ('cub', 'aircraft', 'car', 'pet', 'cub', 'flower')
    ours = [DATASETS[name].metaclass for name in names]
    assert ours == list(published['metaclasses'].values())


def test_cub_is_fetched_from_an_address_that_fastai_knows():
    fastai = Path(find_spec('fastai').origin).parent
    assert DATASETS['cub'].url in (fastai / 'data' / 'download_checks.py').read_text()


@pytest.mark.parametrize(
    'name, wanted, lists',
    [
        ('cub', dict(shots=10), ('10-shot CUB',)),
        ('flower', dict(imbalance=20.0), ('Flower-LT/IF=20',)),
        ('pet', dict(shots=3), ('5-shot Pet', '10-shot Pet')),
        ('car', dict(imbalance=100), ('5-shot Car', '10-shot Car')),
    ],
)
def test_suffix_lists_are_those_of_the_setting_or_all(name, wanted, lists):
    assert DATASETS[name].suffix_lists(**wanted) == lists


def test_cub_has_lists_for_few_shot_and_for_long_tailed_sets():
    every_other = DATASETS['cub'].suffixes[::2]
    assert every_other == ('5-shot CUB', 'CUB-LT/IF=100', 'CUB-LT/IF=10')


# reading each of them


def test_a_species_folder_has_a_number_and_a_name():
    assert _species('001.Black_footed_Albatross') == (1, 'Black footed Albatross')
    assert 'not a species folder' in message(_species, 'images')


def test_cub_is_read_from_its_lists(small):
    train, test = small('cub'), small('cub', 'test')
    assert train.classes == (
        'Black footed Albatross',
        'Laysan Albatross',
        'Sooty Albatross',
    )
    assert train.counts.tolist() == [2, 2, 2]
    assert (train.metaclass, train.groups) == ('bird', None)
    assert train.names[:3] == tuple(paper_archives.BIRD_FILES[i] for i in (0, 1, 4))
    assert test.labels == (0, 0, 1, 1, 2, 2)
    assert not set(train.names) & set(test.names)
    assert train.open(0).size == (12, 10)
    assert small('cub', 'all').counts.tolist() == [4, 4, 4]


def test_waterbirds_have_four_groups_and_the_labels_of_cub(small):
    birds, cub = small('waterbirds', 'test'), small('cub', 'test')
    assert birds.classes == cub.classes
    assert (birds.labels, birds.names) == (cub.labels, cub.names)
    of_the_land = ('land_land', 'land_water')
    assert birds.groups == ('water_land', 'water_water') * 2 + of_the_land


def test_waterbirds_have_three_splits(small):
    assert small('waterbirds').groups == ('water_water',) * 2 + ('land_land',)
    assert small('waterbirds', 'val').counts.tolist() == [1, 1, 1]


def test_aircraft_variants_may_have_slashes(small):
    train = small('aircraft')
    assert train.classes == paper_archives.VARIANTS
    assert (train.labels, train.metaclass) == ((0, 1, 2), 'aircraft')
    assert train.names[1] == 'data/images/0134309.jpg'
    assert train.open(2).size == (12, 10)


def test_aircraft_has_trainval_and_all(small):
    assert small('aircraft', 'trainval').counts.tolist() == [2, 2, 2]
    assert len(small('aircraft', 'all')) == 9


def test_pets_are_named_by_breed(small):
    train = small('pet')
    assert train.classes == ('Abyssinian', 'American Bulldog', 'Yorkshire Terrier')
    assert train.counts.tolist() == [2, 2, 2]
    assert train.names[2] == 'images/american_bulldog_1.jpg'
    assert train.metaclass == 'animal'
    assert small('pet', 'test').labels == (0, 1, 2)


def test_pets_have_no_validation_split(small):
    assert "no split 'val'" in message(small, 'pet', 'val')


def test_cars_are_read_from_matlab_files(small):
    train = small('car')
    assert train.classes == paper_archives.MAKES
    assert (train.labels, train.metaclass) == ((0, 1, 2, 0, 1, 2), 'car')
    assert train.names[0] == 'cars_train/00001.jpg'
    assert small('car', 'test').names[0] == 'cars_test/00001.jpg'
    assert len(set(small('car', 'all').names)) == 9


def test_flowers_have_the_names_that_torchvision_knows(small):
    train, test = small('flower'), small('flower', 'test')
    assert (len(train.classes), train.classes[0]) == (102, 'pink primrose')
    assert (train.labels, train.metaclass) == ((0, 1, 2), 'flower')
    assert (test.labels, test.names[0]) == ((2, 1, 0), 'jpg/image_00009.jpg')


def test_caltech_has_no_backgrounds_and_no_test_images(small, archives):
    train = small('caltech101')

    assert train.classes == paper_archives.THINGS
    assert train.labels == (0, 0, 1, 1, 2, 2)
    assert train.names[3] == 'chair/image_0002.jpg'
    assert train.open(3).size == (12, 10)
    assert not DATASETS['caltech101'].tested
    assert "no split 'test'" in message(paper_dataset, 'caltech101', archives, 'test')


def test_cifar_images_are_read_from_one_file(small):
    train, test = small('cifar100'), small('cifar100', 'test')

    assert train.classes == test.classes == paper_archives.THINGS
    assert (train.labels, test.labels) == ((0, 1, 2, 0, 1, 2), (0, 1, 2))
    assert (train.names[4], test.names[2]) == ('train/00004', 'test/00002')
    assert train.open(4).size == (32, 32)
    assert train.digest(4) != train.digest(1)


def test_an_experiment_on_a_set_without_test_images_tests_on_the_rest(
    archives, monkeypatch
):
    info = replace(DATASETS['caltech101'], classes=3, images=dict(train=6))
    monkeypatch.setitem(DATASETS, 'caltech101', info)

    data = paper_data('caltech101', str(archives))

    train, test = few_shot_condition(data, 1, [], 0).sample(0)
    assert (len(train), len(test)) == (3, 3)
    assert data.suffixes


def test_all_flowers_can_be_halved(small):
    flowers = small('flower', 'all')
    assert flowers.counts[:4].tolist() == [3, 3, 3, 0]
    assert [len(half) for half in halve(flowers.subset(range(6)))] == [3, 3]


def test_few_shot_samples_from_a_paper_set(small):
    few, _ = few_shot(small('cub'), 1)
    assert few.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize('name', DATASETS)
def test_reading_opens_no_image(small, archives, monkeypatch, name):
    def refuse(*args, **kw):
        raise AssertionError('a picture was opened')

    with monkeypatch.context() as patch:
        patch.setattr(Image, 'open', refuse)
        images = small(name)
    kind = Image.Image if name == 'cifar100' else Path  # from one file of numbers
    assert all(isinstance(image, kind) for image in images.images)
    assert not any(str(archives) in n for n in images.names)
    assert images.metaclass == DATASETS[name].metaclass
    assert images.open(0).mode == 'RGB'


def test_an_archive_with_one_more_folder_inside_is_seen_through(small, tmp_path):
    folder = DATASETS['cub'].folder
    paper_archives.make_cub(tmp_path / folder)
    assert read('cub', root=tmp_path).names == small('cub').names


# what goes wrong


@pytest.mark.parametrize('name', DATASETS)
def test_a_missing_folder_is_named_with_its_remedy(tmp_path, name):
    text, info = message(paper_dataset, name, tmp_path), DATASETS[name]
    assert text.startswith(f'{tmp_path / info.folder}: no such folder; ')
    assert info.holds in text
    assert ('site is gone' in text) == info.gone
    assert ('pass download=True' in text) == (not info.gone)
    assert info.gone or info.home in text


def test_an_unknown_name_is_answered_with_the_known(archives):
    text = message(paper_dataset, 'food', archives)
    assert text == (
        'food: not one of the data sets, which are '
        'cub, aircraft, car, pet, flower, waterbirds, caltech101, cifar100'
    )


@pytest.mark.parametrize('name', DATASETS)
def test_an_incomplete_data_set_is_refused(archives, name):
    text = message(paper_dataset, name, archives)
    assert f'where {DATASETS[name].title} has' in text
    assert 'check=False' in text


def test_numbers_are_compared_with_the_published(archives, monkeypatch):
    expected = replace(DATASETS['pet'], classes=3, images=dict(train=6, test=4))
    monkeypatch.setitem(DATASETS, 'pet', expected)
    assert len(paper_dataset('pet', archives)) == 6
    text = message(paper_dataset, 'pet', archives, 'test')
    assert '3 images in the split test where Oxford-IIIT Pet has 4' in text


def test_flowers_with_other_lists_than_the_official_are_refused(small, monkeypatch):
    from torchvision.datasets import Flowers102

    monkeypatch.setitem(Flowers102._file_dict, 'label', ('imagelabels.mat', '0' * 32))
    assert 'flowers-102: not laid out as published' in message(small, 'flower')


@pytest.mark.parametrize(
    'name, split, file, content, expected',
    [
        ('cub', 'train', f'images/{paper_archives.BIRD_FILES[0]}', None, 'not there'),
        ('cub', 'train', 'classes.txt', None, 'classes.txt: no such file'),
        ('cub', 'train', 'classes.txt', 'one\n', 'classes.txt: not a list'),
        ('cub', 'train', 'train_test_split.txt', '1 1\n', 'not about the same images'),
        ('waterbirds', 'train', 'metadata.csv', None, 'not laid out as published'),
        (
            'waterbirds',
            'train',
            'metadata.csv',
            'img_filename,y\na,0\n',
            'no column place, split',
        ),
        ('car', 'train', 'devkit/cars_meta.mat', 'x', 'not laid out as published'),
        ('aircraft', 'train', 'data/variants.txt', 'x\n', 'not laid out as published'),
        ('pet', 'test', 'annotations/test.txt', None, 'not laid out as published'),
    ],
)
def test_a_broken_archive_is_reported(tmp_path, name, split, file, content, expected):
    folder = paper_archives.MAKERS[name](tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    text = message(read, name, split, root=tmp_path)
    assert text.startswith(str(folder))
    assert expected in text


def test_missing_pictures_are_counted(tmp_path):
    folder = paper_archives.make_cub(tmp_path)
    first = folder / 'images' / paper_archives.BIRD_FILES[0]
    first.unlink()
    text = message(read, 'cub', root=tmp_path)
    assert text.startswith(
        f'{first}: listed but not there (1 of 6 pictures are missing)'
    )
    assert DATASETS['cub'].home in text


# downloads, from a server on this machine


class Recorder(SimpleHTTPRequestHandler):
    "A handler that remembers what was asked for and prints nothing."

    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


def pack(folder, archive):
    with tarfile.open(archive, 'w:gz') as tar:
        tar.add(folder, arcname=folder.name)


@pytest.fixture(scope='module')
def site(archives, tmp_path_factory):
    "A server that has three archives whole and one broken off."
    folder = tmp_path_factory.mktemp('site')
    for name in ('cub', 'waterbirds', 'aircraft'):
        pack(archives / DATASETS[name].folder, folder / f'{name}.tar.gz')
    whole = (folder / 'cub.tar.gz').read_bytes()
    (folder / 'torn.tar.gz').write_bytes(whole[: len(whole) // 2])
    handler = functools.partial(Recorder, directory=folder)
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.asked = []
    server.address = f'http://127.0.0.1:{server.server_port}'
    serve = functools.partial(server.serve_forever, poll_interval=0.05)
    threading.Thread(target=serve, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(site, tmp_path, monkeypatch):
    "Download a data set from a file of the local server into an empty folder."

    def _fetch(name, file):
        info = replace(DATASETS[name], url=f'{site.address}/{file}')
        monkeypatch.setitem(DATASETS, name, info)
        return paper_dataset(name, tmp_path, download=True, check=False)

    return _fetch


def test_a_missing_data_set_is_downloaded(fetch, small):
    assert fetch('cub', 'cub.tar.gz').names == small('cub').names
    birds = fetch('waterbirds', 'waterbirds.tar.gz')
    assert birds.groups == small('waterbirds').groups


def test_what_is_there_is_not_downloaded_again(fetch, site):
    fetch('cub', 'cub.tar.gz')
    n = len(site.asked)
    assert fetch('cub', 'cub.tar.gz').counts.tolist() == [2, 2, 2]
    assert len(site.asked) == n


def test_torchvision_downloads_what_it_knows(site, tmp_path, monkeypatch):
    from torchvision.datasets import FGVCAircraft

    monkeypatch.setattr(FGVCAircraft, '_URL', f'{site.address}/aircraft.tar.gz')
    planes = paper_dataset('aircraft', tmp_path, download=True, check=False)
    assert planes.classes == paper_archives.VARIANTS


@pytest.mark.parametrize(
    'file, reason', [('none.tar.gz', 'HTTP Error 404'), ('torn.tar.gz', 'EOFError')]
)
@pytest.mark.filterwarnings('ignore')
def test_a_failed_download_is_one_line(fetch, tmp_path, file, reason):
    text = message(fetch, 'cub', file)
    assert text.startswith(f'{tmp_path}/CUB_200_2011: CUB-200-2011 could not be')
    assert reason in text and DATASETS['cub'].home in text


@pytest.mark.parametrize('name', ['waterbirds', 'aircraft', 'pet', 'flower'])
def test_a_network_that_is_down_is_one_line(tmp_path, monkeypatch, name):
    def refuse(*args, **kw):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr('urllib.request.urlopen', refuse)
    text = message(paper_dataset, name, tmp_path, download=True)
    info = DATASETS[name]
    assert text.startswith(f'{tmp_path / info.folder}: {info.title} could not be')
    assert 'no network' in text and info.home in text


def test_cars_cannot_be_downloaded(tmp_path):
    text = message(paper_dataset, 'car', tmp_path, download=True)
    assert 'Stanford Cars cannot be downloaded: its site is gone' in text
