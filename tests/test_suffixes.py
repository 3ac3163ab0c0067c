"Suffixes: their one form, lists of them, captions by measuring, and clusters of captions."

import warnings

import pytest
from PIL import Image

from diffii.base.files import UserError
from diffii.data import aviary, digits
from diffii.method.suffixes import (
    ClusterSummariser,
    MeasuringCaptioner,
    captions_of,
    make_suffixes,
    published,
    published_suffixes,
    read_suffixes,
    setting_of,
    suffix_key,
    tidy_suffix,
)

TIDY = {
    'Standing on a rock': 'standing on a rock.',
    ', that is standing on a rock.': 'standing on a rock.',
    ' is standing on a rock!  The light is low.': 'standing on a rock.',
    '**standing on a rock**': 'standing on a rock.',
    ' -- .': '',
    "in a dog's bed...": "in a dog's bed.",
    'UFOs above': 'UFOs above.',
}


@pytest.mark.parametrize('text, suffix', TIDY.items())
def test_a_suffix_has_one_form(text, suffix):
    assert tidy_suffix(text) == suffix


def test_capitals_and_punctuation_make_no_other_suffix():
    assert suffix_key('In the Snow.') == suffix_key('in the snow')


# published lists


def test_published_suffixes_are_as_printed_and_have_the_one_form():
    first = published_suffixes('5-shot CUB')[:2]
    assert first == ['standing on a tree branch.', 'flying around flowers.']
    every = [s for n in published()['suffixes'] for s in published_suffixes(n)]
    assert [tidy_suffix(s) for s in every] == every


def test_one_published_list_names_a_suffix_twice():
    printed = published_suffixes('CUB-LT/IF=100')
    assert len(printed) == len(set(printed)) + 1


def test_a_run_takes_each_suffix_of_a_published_list_once():
    taken = read_suffixes('CUB-LT/IF=100')
    assert taken == list(dict.fromkeys(published_suffixes('CUB-LT/IF=100')))


def test_capitals_of_a_lists_name_do_not_matter():
    assert published_suffixes('5-SHOT cub') == published_suffixes('5-shot CUB')


def test_an_unknown_list_is_refused_with_the_names_of_all():
    with pytest.raises(UserError, match='10-shot Aircraft'):
        published_suffixes('3-shot CUB')


# suffixes as the user gives them


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'mine.txt'


def test_a_file_is_read_without_comments_repetitions_and_tokens(file):
    lines = '# places\nin the snow\n\nAt dusk.\nIn the Snow.\n<|endoftext|> by a lake\n'
    file.write_text(lines, encoding='utf-8')
    expected = ['in the snow.', 'at dusk.', 'endoftext by a lake.']
    assert read_suffixes(file) == expected
    assert read_suffixes(str(file)) == expected


def test_a_list_keeps_its_order():
    assert read_suffixes(['b', 'a', 'b.']) == ['b.', 'a.']


def test_a_published_list_is_read_by_its_name():
    assert read_suffixes('5-shot Pet') == published_suffixes('5-shot Pet')


def test_a_file_with_the_name_of_a_published_list_goes_before_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / '5-shot Pet').write_text('in a basket\n', encoding='utf-8')
    assert read_suffixes('5-shot Pet') == ['in a basket.']


WRONG_FILES = {
    'nothing in it': (b'# nothing\n', 'mine.txt'),
    'not UTF-8': (b'\xff\xfe\x00', 'UTF-8'),
}


@pytest.mark.parametrize('data, said', WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_a_file_without_suffixes_is_refused(file, data, said):
    file.write_bytes(data)
    with pytest.raises(UserError, match=said):
        read_suffixes(file)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match='none.txt'):
        read_suffixes(tmp_path / 'none.txt')


# captions by measuring


@pytest.fixture(scope='module')
def birds():
    return [im for im, *_ in aviary.draw_birds(aviary.UNSEEN[:1], 11, seed=3)]


def test_a_caption_does_not_depend_on_the_other_images(birds):
    captioner = MeasuringCaptioner('bird')
    assert captioner.caption(birds[::-1])[::-1] == captioner.caption(birds)


def test_a_caption_of_a_bird_has_a_phrase_of_its_context(birds):
    phrases = [p for c in aviary.CONTEXTS.values() for p in c.phrases]
    for caption in MeasuringCaptioner('bird').caption(birds):
        assert caption.removeprefix('a photo of a bird ') in phrases


def test_no_images_have_no_captions():
    assert MeasuringCaptioner('bird').caption([]) == []


def test_an_empty_scan_is_a_digit_and_nothing_else():
    empty = Image.new('RGB', (32, 32))
    assert MeasuringCaptioner('digit').caption([empty]) == ['a photo of a digit']


def test_measuring_is_for_digits_and_drawn_birds_only():
    with pytest.raises(UserError, match='--captioner measure'):
        MeasuringCaptioner('car')


def test_measuring_a_photograph_warns():
    photograph = Image.new('RGB', (200, 100), 'blue')
    with pytest.warns(UserWarning, match='photographs'):
        MeasuringCaptioner('bird').caption([photograph])


def test_measuring_a_drawn_bird_does_not_warn(birds):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        MeasuringCaptioner('bird').caption(birds[:1])


def test_captions_are_made_in_batches_and_come_in_order(birds):
    class Sizes:
        def caption(self, images):
            return [f'{len(images)} at once' for _ in images]

    found = list(captions_of(birds[:5], Sizes(), batch_size=2))
    assert found == ['2 at once'] * 4 + ['1 at once']


# settings and clusters

SETTINGS = {
    ('there is a bird that is sitting on a branch', 'bird'): 'sitting on a branch.',
    ('two dogs playing in the grass', 'animal'): 'playing in the grass.',
    ('a bird', 'bird'): '',
    ('birdhouse', 'bird'): '',
    ('a photo of a c++ [book] on a desk', 'c++ [book]'): 'on a desk.',
}


@pytest.mark.parametrize('caption, setting', SETTINGS.items())
def test_a_setting_is_what_stands_behind_the_metaclass(caption, setting):
    assert setting_of(*caption) == setting


@pytest.mark.parametrize(
    'captions, said', [(['a bird'] * 5, 'fewer than two settings'), ([], '0 captions')]
)
def test_captions_without_settings_are_refused(captions, said):
    with pytest.raises(UserError, match=said):
        ClusterSummariser().summarise(captions, 'bird')


@pytest.mark.parametrize('seed', [-1, 2**33])
def test_any_seed_clusters_captions(seed):
    captions = ['a bird on a branch', 'a bird in the snow', 'a bird over water'] * 2
    found = ClusterSummariser().summarise(captions, 'bird', 3, seed)
    assert sorted(found) == ['in the snow.', 'on a branch.', 'over water.']


def test_every_style_of_the_digits_is_found():
    images = digits.digits_set('pool')
    parts = MeasuringCaptioner('digit'), ClusterSummariser()
    assert set(make_suffixes(images, 'digit', *parts)) == set(digits.digit_suffixes())


def test_progress_is_told_after_every_caption():
    few = aviary.aviary_set(n=5, seed=1).subset(range(40))
    parts = MeasuringCaptioner('bird'), ClusterSummariser()
    calls = []
    make_suffixes(few, 'bird', *parts, progress=lambda *call: calls.append(call))
    assert calls == [('captions', i, 40) for i in range(1, 41)]


def test_a_summariser_that_cannot_work_is_asked_before_images_are_captioned():
    class Unable:
        def check(self):
            raise UserError('no key')

    class Never:
        def caption(self, images):
            raise AssertionError('captioned in vain')

    with pytest.raises(UserError, match='no key'):
        make_suffixes([Image.new('RGB', (8, 8))], 'bird', Never(), Unable())
