"Images of every mode, sets of them, and the folders and tables they are read from."

import os
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffii.base.files import UserError
from diffii.base.images import (
    check_classes,
    ImageSet,
    few_shot,
    halve,
    image_folder,
    image_table,
    read_image,
    read_words,
)

PIXELS = np.random.default_rng(0).integers(0, 255, (24, 16, 3), dtype='uint8')
RGB = Image.fromarray(PIXELS)


@pytest.fixture
def toy():
    "Twelve oaks and eight elms."
    images = tuple(Image.new('RGB', (8, 8), (i * 9, 0, 0)) for i in range(20))
    return ImageSet(images, (0,) * 12 + (1,) * 8, ('oak', 'elm'), 'tree')


@pytest.fixture
def flowers(tmp_path):
    "A folder with two images of one flower and one of another."
    for name in ('bird of paradise/0.png', 'bird of paradise/1.png', 'œillet/0.png'):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        RGB.save(file)
    return tmp_path


def break_off(file):
    "An image that ends too early."
    RGB.save(file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


# ---- one image


@pytest.mark.parametrize(
    'mode, ending',
    [('P', 'png'), ('CMYK', 'jpg'), ('RGBA', 'png'), ('L', 'png'), ('LA', 'png')],
)
def test_every_mode_is_read_as_rgb(tmp_path, mode, ending):
    file = tmp_path / f'x.{ending}'
    RGB.convert(mode).save(file)

    image = read_image(file)

    assert (image.mode, image.size) == ('RGB', RGB.size)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    deep = np.linspace(0, 65535, 64).reshape(8, 8).astype('uint16')
    Image.fromarray(deep).save(tmp_path / 'deep.png')

    pixels = np.asarray(read_image(tmp_path / 'deep.png'))

    assert (pixels.min(), pixels.max()) == (0, 255)


def test_an_image_on_its_side_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    RGB.save(tmp_path / 'rotated.jpg', exif=exif)

    assert read_image(tmp_path / 'rotated.jpg').size == (24, 16)  # it was 16 x 24


def test_clear_pixels_are_white(tmp_path):
    Image.new('RGBA', (2, 2), (0, 0, 0, 0)).save(tmp_path / 'clear.png')

    assert read_image(tmp_path / 'clear.png').getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize('data', (b'', b'I am not an image'))
def test_what_is_no_image_is_named(tmp_path, data):
    (tmp_path / 'x.png').write_bytes(data)

    with pytest.raises(UserError, match=r'x\.png'):
        read_image(tmp_path / 'x.png')


def test_an_image_that_breaks_off_is_named(tmp_path):
    break_off(tmp_path / 'cut.png')

    with pytest.raises(UserError, match=r'cut\.png'):
        read_image(tmp_path / 'cut.png')


def test_an_animation_gives_its_first_frame_with_a_warning(tmp_path):
    file = tmp_path / 'moving.gif'
    RGB.save(file, save_all=True, append_images=[RGB.rotate(90)])

    with pytest.warns(UserWarning, match=r'moving\.gif: animated'):
        read_image(file)


# ---- the set


def test_a_sum_has_the_images_of_both(toy):
    few, rest = few_shot(toy, 3, seed=1)

    assert few.counts.tolist() == [3, 3]
    assert len(rest) == 14
    assert not set(few.names) & set(rest.names)
    assert set((few + rest).names) == set(toy.names)
    assert (few + rest).counts.tolist() == toy.counts.tolist()


def test_the_seed_chooses_the_shots(toy):
    once, again, other = (few_shot(toy, 3, seed=s)[0] for s in (1, 1, 2))

    assert once.names == again.names
    assert once.names != other.names


@pytest.mark.parametrize('shots, text', [(9, 'elm has 8'), (0, '--shots 0')])
def test_impossible_shots_are_refused(toy, shots, text):
    with pytest.raises(UserError, match=text):
        few_shot(toy, shots)


def test_halves_of_odd_numbers(toy):
    one, other = halve(toy.subset(range(19)), seed=1)

    assert one.counts.tolist() == [6, 3]
    assert other.counts.tolist() == [6, 4]
    assert not set(one.names) & set(other.names)


def test_a_digest_depends_on_pixels_alone(toy):
    few, rest = few_shot(toy, 3, seed=1)
    same = toy.subset([toy.names.index(name) for name in few.names])

    assert toy.digest(3) == toy.digest(3)
    assert toy.digest(0) != toy.digest(1)
    assert few.digest() != rest.digest()
    assert few.digest() == same.digest()


@pytest.mark.parametrize(
    'labels, classes, text',
    [((0,), ('oak',), 'differ in number'), ((0, 2), ('oak',), 'no class name')],
)
def test_a_set_that_does_not_fit_together_is_refused(labels, classes, text):
    with pytest.raises(UserError, match=text):
        ImageSet((RGB, RGB), labels, classes)


# ---- folders


def test_a_folder_is_read_in_order(flowers):
    s = image_folder(flowers, 'flower')

    assert s.classes == ('bird of paradise', 'œillet')
    assert s.counts.tolist() == [2, 1]
    assert s.names[0] == 'bird of paradise/0.png'
    assert s.open(0).size == (16, 24)


def test_a_broken_file_stops_a_folder_or_is_skipped(flowers):
    break_off(flowers / 'œillet' / 'cut.png')

    with pytest.raises(UserError, match=r'cut\.png'):
        image_folder(flowers)
    with pytest.warns(UserWarning, match=r'cut\.png.*left out'):
        assert len(image_folder(flowers, skip_bad=True)) == 3


def test_a_category_without_images_is_named(flowers):
    (flowers / 'nothing').mkdir()
    (flowers / 'nothing' / 'notes.txt').write_text('hi')

    with pytest.raises(UserError, match='nothing: no readable image'):
        image_folder(flowers, skip_bad=True)


def test_a_folder_of_folders_is_no_category(flowers):
    "The remedy is another folder, not to remove one's test images."
    (flowers / 'test' / 'rose').mkdir(parents=True)

    with pytest.raises(
        UserError, match='test: has folders and no images; give the'
    ) as e:
        image_folder(flowers)
    assert str(e.value).endswith(f'as {flowers / "test"}')


@pytest.mark.parametrize(
    'classes, how',
    [
        (('a', 'b', 'c'), 'it lacks c'),
        (('a',), 'it has b'),
        (('a', 'x'), 'it lacks x and has b'),
        (('b', 'a'), 'it has them in another order'),
        (tuple('abcdefg'), 'it lacks c, d, e and 2 more'),
    ],
)
def test_sets_of_other_categories_are_told_apart(classes, how):
    found = ImageSet((), (), ('a', 'b'))
    check_classes(found, ('a', 'b'), '--test')

    text = f'--test: its categories differ from those of the training set: {how};'
    with pytest.raises(UserError, match=text):
        check_classes(found, classes, '--test')


def test_a_folder_without_categories_is_refused(flowers):
    with pytest.raises(UserError, match='no such folder'):
        image_folder(flowers / 'none')
    with pytest.raises(UserError, match='no sub-folders'):
        image_folder(flowers / 'œillet')


@pytest.mark.skipif(sys.platform != 'linux', reason='names are text elsewhere')
@pytest.mark.parametrize('name', (b'\x9cillet/0.png', b'o/\xff.png'))
def test_a_name_in_another_encoding_is_not_guessed_at(tmp_path, name):
    file = os.fsdecode(os.fsencode(tmp_path) + b'/odd/' + name)
    os.makedirs(os.path.dirname(file))
    RGB.save(file)

    with pytest.raises(UserError, match=r"'\\udc[a-z0-9]+.*' in it is not valid UTF-8"):
        image_folder(tmp_path / 'odd', skip_bad=True)


# ---- tables

BIRD = 'bird of paradise/0.png,strelitzia\n'


def write_table(folder, text, encoding='utf-8'):
    (folder / 't.csv').write_text(text, encoding=encoding)
    return folder / 't.csv'


def test_a_table_with_groups(flowers):
    text = 'file_name,label,place\n'
    text += 'bird of paradise/0.png,strelitzia,land\nœillet/0.png,carnation,water\n'

    s = image_table(write_table(flowers, text), group='place', metaclass='flower')

    assert s.classes == ('carnation', 'strelitzia')
    assert s.labels == (1, 0)
    assert s.groups == ('land', 'water')


def test_a_missing_column_is_named(flowers):
    table = write_table(flowers, 'file_name,label\n' + BIRD)

    with pytest.raises(UserError, match="no column 'kind'"):
        image_table(table, label='kind')


REFUSED = {
    'more fields': (
        BIRD + '\n' + BIRD + 'œillet/0.png,carnation,red\n',
        'line 5: more',
    ),
    'an open quotation': (BIRD + 'œillet/0.png,"carnation\n', 'not valid CSV'),
    'a quotation in a field': ('"x"y,"z"\n', 'line 2: not valid CSV'),
    'a field too long': ('"' + 'x' * 200_000 + '",z\n', 'not valid CSV'),
    'two categories': (
        BIRD + './bird of paradise/0.png,rose\n',
        "'strelitzia' in line 2 and 'rose' in line 3",
    ),
    'no such image': ('nope.png,x\n', 'line 2'),
    'a broken image': (BIRD + 'œillet/cut.png,carnation\n', 'line 3'),
    'a missing field': ('œillet/0.png\n', 'line 2: no label'),
    'no rows': ('', 'no rows'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_row_that_cannot_be_meant_is_named(flowers, case):
    text, message = REFUSED[case]
    break_off(flowers / 'œillet' / 'cut.png')

    with pytest.raises(UserError, match=message):
        image_table(write_table(flowers, 'file_name,label\n' + text))


def test_a_table_with_the_mark_of_excel(flowers):
    table = write_table(flowers, 'file_name,label\n' + BIRD, 'utf-8-sig')

    assert image_table(table).classes == ('strelitzia',)


def test_a_table_in_another_encoding_is_refused(flowers):
    table = write_table(flowers, 'file_name,label\nœillet/0.png,x\n', 'cp1252')

    with pytest.raises(UserError, match='not UTF-8'):
        image_table(table)


def test_an_image_that_is_listed_twice_is_taken_once(flowers):
    other = BIRD.replace('bird of', './bird of')
    table = write_table(flowers, 'file_name,label\n' + BIRD + other)

    with pytest.warns(UserWarning, match='line 3: .* is in line 2 already'):
        s = image_table(table)

    assert s.names == ('bird of paradise/0.png',)


def test_bad_rows_are_skipped_with_their_line(flowers):
    break_off(flowers / 'œillet' / 'cut.png')
    text = BIRD + 'œillet/cut.png,strelitzia\nbird of paradise/1.png,rose\n'
    table = write_table(flowers, 'file_name,label\n' + text)

    with pytest.warns(UserWarning, match=r'line 3: .*cut\.png'):
        s = image_table(table, skip_bad=True)

    assert s.counts.tolist() == [1, 1]
    assert s.names == ('bird of paradise/0.png', 'bird of paradise/1.png')


@pytest.mark.filterwarnings('ignore')
def test_a_category_whose_images_were_all_skipped_is_named(flowers):
    break_off(flowers / 'œillet' / 'cut.png')
    text = BIRD + 'œillet/cut.png,carnation\n'

    with pytest.raises(UserError, match='no readable image of carnation'):
        image_table(write_table(flowers, 'file_name,label\n' + text), skip_bad=True)


# words


BOTH = ('Red Kite', 'œillet')


def test_words_are_read_in_the_order_of_the_categories(tmp_path):
    file = tmp_path / 'words.yaml'
    file.write_text('œillet: pink, ruffled\n"Red Kite": with a forked tail \n', 'utf-8')
    assert read_words(file, BOTH) == ('with a forked tail', 'pink, ruffled')


@pytest.mark.parametrize(
    'text, told',
    [
        ('Red Kite: brown', 'no words for œillet; give a line for each category'),
        ('Red Kite: brown\nœillet:', 'no words for œillet'),
        ('Red Kite: brown\nœillet: pink\noak: green', 'oak: no such category'),
        ('- brown\n- pink', 'give a line for each category, as Red Kite:'),
        ('Red Kite: [brown', 'not valid YAML; mend it there'),
        ('', 'no words for Red Kite, œillet'),
    ],
)
def test_words_that_cannot_be_read_are_told(tmp_path, text, told):
    file = tmp_path / 'words.yaml'
    file.write_text(text, 'utf-8')
    with pytest.raises(UserError) as e:
        read_words(file, BOTH)
    assert f'--words {file}' in str(e.value)
    assert told in str(e.value)


def test_names_that_yaml_reads_as_something_else_are_told(tmp_path):
    file = tmp_path / 'words.yaml'
    file.write_text('001: green\non: red\n')
    with pytest.raises(UserError, match="for 001, on; .*'001' or 'on' in quotation"):
        read_words(file, ('001', 'on'))
    file.write_text('"001": green\n"on": red\n')
    assert read_words(file, ('001', 'on')) == ('green', 'red')


def test_a_missing_file_of_words_is_told(tmp_path):
    with pytest.raises(UserError, match='cannot be read .No such file'):
        read_words(tmp_path / 'none.yaml', BOTH)


def test_words_of_some_categories_alone_are_refused(toy):
    with pytest.raises(UserError, match='words: 1 for 2 categories; give each its own'):
        replace(toy, words=('green',))
