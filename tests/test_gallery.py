"The page to look through synthetic images: what it is told, and its clicks."

import json
import math
import os
import re
from html.parser import HTMLParser

import pytest
from browser import Browser, chromium
from fake_run import colours, made_row, real_set, write_run
from PIL import Image

from diffii.base.files import UserError, folder_name
from diffii.evaluation.gallery import (
    SIDE,
    consistency_of,
    position,
    score_names,
    thumbnail,
    write_review,
)
from diffii.method.inversion import source_of
from diffii.run.filters import SCORERS
from diffii.run.folders import RunFolder

ODD = '</script><script>alert(1)</script>&amp;\u2028'
CLASSES = ('oak', 'ash', ODD)
SUFFIXES = ('on <b>snow</b>.', 'in\u2028rain.')


def made_rows():
    "Six images of each category, with scores that fall within a category."
    rows = []
    for k, category in enumerate(CLASSES):
        for i in range(6):
            scores = dict(classifier=(9 - i) / 10 - k / 100, clip=float(i % 3))
            more = dict(suffix=SUFFIXES[i % 2], scores=scores)
            rows.append(made_row(category, i, **more))
    del rows[0]['scores']
    return rows


@pytest.fixture
def run(tmp_path):
    "A finished run, and its real images."
    real = real_set(CLASSES)
    return write_run(tmp_path / 'out', real, made_rows()), real


def data_of(page):
    "What a page was told."
    text = page.read_text(encoding='utf-8')
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found[1])


def review(out, images=None, **options):
    return write_review(out, images, diversity=False, **options)


# ---- what the page is told


@pytest.mark.parametrize(
    'size, ending, small',
    [
        ((32, 32), 'png', (32, 32)),
        ((768, 512), 'jpg', (SIDE * 3 // 2, SIDE)),
        ((100, 80), 'jpg', (100, 80)),
        ((4000, 100), 'jpg', (2 * SIDE, 10)),
    ],
)
def test_a_small_copy_keeps_the_shape_of_its_image(size, ending, small, tmp_path):
    found, content = thumbnail(colours(0, size))
    file = tmp_path / f'a.{found}'
    file.write_bytes(content)
    assert found == ending
    with Image.open(file) as image:
        assert image.size == small


@pytest.mark.parametrize(
    'row, degrees',
    [
        (dict(strength=0.0, alpha=1.0, interpolation='circle'), 0),
        (dict(strength=1.0, alpha=math.pi / 2, interpolation='circle'), 270),
        (dict(strength=3.0, alpha=math.pi / 2, interpolation='circle'), 90),
        (dict(strength=1.0, alpha=math.pi / 2, interpolation='inward'), 90),
    ],
)
def test_the_position_is_the_angle_from_the_first_parent(row, degrees):
    assert math.degrees(position(row)) == pytest.approx(degrees)


def test_an_image_of_no_pair_has_no_position():
    assert position(dict(strength=0.7, alpha=None, interpolation='circle')) is None


@pytest.mark.parametrize(
    'name, expected',
    [
        ('oak/0.png', ('oak/0.png', '')),
        ('oak/0.png@2', ('oak/0.png', '')),
        ('oak/0.png#mirror@1', ('oak/0.png', 'mirror')),
        ('oak/#1.png@1', ('oak/#1.png', '')),
        ('oak/a@7', ('oak/a@7', '')),
        ('ash/9.png@1', ('ash/9.png', '')),  # of an image that is not known
    ],
)
def test_an_inversion_leads_back_to_its_image(name, expected):
    assert source_of(name, ['oak/0.png', 'oak/#1.png', 'oak/a@7']) == expected


def test_scores_are_columns_that_may_be_missing(run):
    out, real = run
    data = data_of(review(out, real))
    assert data['scores'] == ['classifier', 'clip']
    assert data['images'][0]['scores'] == [None, None]
    assert data['images'][7]['scores'] == [0.79, 1.0]


def test_means_are_of_the_images_that_have_a_score(run):
    out, real = run
    means = data_of(review(out, real))['means']
    assert means['clip'] == pytest.approx((6 * 3 * 1.0 - 0) / 17)
    assert means['classifier'] == pytest.approx((3 * 3.9 - 0.06 - 0.12 - 0.9) / 17)


@pytest.mark.parametrize(
    'name, values, share',
    [
        ('denoising', [0.1, 0.0, -0.2, None], 1 / 3),
        ('classifier', [0.9, 0.5, 0.2, 0.6], 0.5),
        ('lpips', [-0.1, -0.2], None),
        ('clip', [None], None),
    ],
)
def test_a_score_that_can_tell_gives_the_class_consistency(name, values, share):
    rows = [dict(scores={name: value}) for value in values]
    assert consistency_of(rows) == ({} if share is None else {name: share})


def test_every_score_is_explained(run):
    out, real = run
    data = data_of(review(out, real))
    assert data['meanings'] == {n: SCORERS[n].meaning for n in ('classifier', 'clip')}
    assert data['consistency'] == {
        'classifier': pytest.approx(11 / 17),
        'clip': pytest.approx(12 / 17),
    }


def test_without_scores_there_are_none():
    assert score_names([made_row('oak', 0), made_row('oak', 1, scores=None)]) == []


def test_images_point_to_both_parents(run):
    out, real = run
    data = data_of(review(out, real))
    for image in data['images']:
        names = [data['real'][i]['name'] for i in image['parents']]
        category = data['classes'][image['label']]
        assert names == [f'{category}/0.png', f'{category}/1.png']


def test_a_view_is_drawn_as_the_inversion_saw_it(tmp_path):
    real = real_set(['oak'], shots=1)
    sources = ['oak/0.png', 'oak/0.png#mirror']
    out = write_run(tmp_path / 'out', real, [made_row('oak', 0, sources=sources)])
    image, mirrored = data_of(review(out, real))['real']
    assert mirrored['name'] == 'oak/0.png (mirror)'
    assert mirrored['src'] != image['src']


def test_an_image_from_noise_has_no_parents(tmp_path):
    real, from_noise = real_set(['oak']), dict(sources=[], strength=None, alpha=None)
    row = made_row('oak', 0, start='noise', **from_noise)
    out = write_run(tmp_path / 'out', real, [row])
    image = data_of(review(out, real))['images'][0]
    assert (image['parents'], image['position']) == ([], None)


# ---- where the real images come from


def all_pictured(page):
    return all(real['src'] for real in data_of(page)['real'])


def test_real_images_are_kept_for_the_next_time(run):
    out, real = run
    first = data_of(review(out, real))
    assert data_of(review(out))['real'] == first['real']
    assert all(entry['src'] for entry in first['real'])


def test_real_images_are_found_where_the_run_says(run, tmp_path):
    out, real = run
    plain = real.subset([i for i, k in enumerate(real.labels) if k < 2])
    for name, image in zip(plain.names, plain.images):
        (tmp_path / 'real' / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'real' / name)
    out = write_run(tmp_path / 'two', plain, made_rows()[:12])
    settings = f'images:\n  folder: {tmp_path / "real"}\n'
    RunFolder(out).settings.write_text(settings)
    assert all_pictured(review(out))


def test_without_real_images_the_page_says_so(run):
    page = review(run[0])
    data = data_of(page)
    assert data['notes'] == [
        '6 of 6 real images are not at hand; give their folder with --images.'
    ]
    assert not any(real['src'] for real in data['real'])


def test_other_images_are_refused(run, tmp_path):
    out, real = run
    (tmp_path / 'real' / 'oak').mkdir(parents=True)
    colours(77).save(tmp_path / 'real' / 'oak' / '0.png')
    with pytest.raises(UserError, match='oak/0.png is another image'):
        review(out, tmp_path / 'real')
    (tmp_path / 'real' / 'oak' / '0.png').unlink()
    with pytest.raises(UserError, match='--images .*real: has no oak/0.png; give'):
        review(out, tmp_path / 'real')
    with pytest.raises(UserError, match='--images .*nowhere: no such folder'):
        review(out, tmp_path / 'nowhere')
    with pytest.raises(UserError, match='oak/0.png is not among them'):
        review(out, real.subset([1, 2, 3]))
    assert not (out / 'review.html').exists()


# ---- files


def test_pictures_of_a_small_set_are_inside_the_page(run):
    out, real = run
    data = data_of(review(out, real))
    every = data['images'] + data['real']
    assert all(entry['src'].startswith('data:image/') for entry in every)
    assert not (out / '.diffii' / 'review').exists()


def test_pictures_of_a_large_set_are_files_beside_it(run):
    out, real = run
    data = data_of(review(out, real, inside=17))
    every = data['images'] + data['real']
    assert all((out / entry['src']).is_file() for entry in every)
    assert len({entry['src'] for entry in every}) == 18 + 6


def test_a_picture_is_made_again_when_its_image_is_another(run):
    out, real = run
    first = data_of(review(out, real, inside=0))['images'][0]
    small, file = out / first['src'], out / first['name']
    before = small.read_bytes()
    colours(5).save(file)
    later = small.stat().st_mtime + 10
    os.utime(file, (later, later))
    review(out, inside=0)
    assert small.read_bytes() != before


def test_pictures_that_no_page_uses_are_removed(run):
    out, real = run
    review(out, real, inside=0)
    review(out, inside=300)
    assert not list((out / '.diffii' / 'review').iterdir())
    assert all_pictured(out / 'review.html')


def test_readers_of_the_set_find_nothing_new_but_the_page(run):
    out, real = run

    def visible():
        files = [p.relative_to(out) for p in out.rglob('*') if p.is_file()]
        return {p.as_posix() for p in files if p.parts[0] != '.diffii'}

    before = visible()
    review(out, real, inside=0)
    assert visible() - before == {'review.html'}


def test_the_same_run_gives_the_same_page(run):
    out, real = run
    first = review(out, real).read_bytes()
    assert review(out, real).read_bytes() == first


def test_a_folder_of_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match='not a finished folder'):
        review(tmp_path)


def test_a_set_without_images_is_refused(tmp_path):
    out = write_run(tmp_path / 'out', real_set(['oak']), [])
    with pytest.raises(UserError, match='no images to look at'):
        review(out)


def test_the_page_loads_nothing(run):
    links = []

    class Links(HTMLParser):
        def handle_starttag(self, tag, attributes):
            kinds = ('src', 'href', 'srcset', 'action', 'data', 'poster')
            links.extend(value for name, value in attributes if name in kinds)

    out, real = run
    text = review(out, real).read_text(encoding='utf-8')
    Links().feed(text)
    assert not links  # the script sets the pictures, from data or files
    code = re.sub(r'<script type="application/json".*?</script>', '', text, flags=re.S)
    assert not re.search(r'url\(|@import|fetch\(|XMLHttp|import\(', code)
    assert re.findall(r'https?://[^\'"]*', code) == ['http://www.w3.org/2000/svg']


# ---- in a browser


@pytest.fixture(scope='module')
def looked_at(tmp_path_factory):
    "A page with pictures inside."
    out = tmp_path_factory.mktemp('looked') / 'out & <more>'
    real = real_set(CLASSES)
    return review(write_run(out, real, made_rows()), real)


@pytest.fixture(scope='module')
def browser():
    if not chromium():
        pytest.skip('no Chromium on this machine: apt-get install chromium')
    with Browser() as found:
        yield found


@pytest.fixture
def tab(browser, looked_at):
    "The page, freshly opened, with nothing rejected before."
    browser.open(looked_at)
    browser.js('localStorage.clear()')
    browser.open(looked_at)
    browser.messages.clear()
    yield browser
    assert not browser.messages


def shown(tab):
    "The categories and numbers of the images on the page, as ('oak', 3)."
    names = tab.js('[...document.querySelectorAll(".card")].map(c => c.title)')
    short = {folder_name(c): c for c in CLASSES}
    return [(short[n.split('/')[1]], int(n.split('/')[2][:5])) for n in names]


def rejected(tab):
    return tab.js('names()')


def text(tab, selector):
    return tab.js(f'document.querySelector({json.dumps(selector)}).textContent')


def test_all_is_shown_by_category_with_pictures(tab):
    assert [c for c, _ in shown(tab)] == [c for c in CLASSES for _ in range(6)]
    headings = tab.js('[...document.querySelectorAll("h2")].map(h => h.textContent)')
    assert headings == list(CLASSES)
    tab.wait('[...document.images].every(i => i.complete)')
    broken = '[...document.images].filter(i => !i.naturalWidth || !i.alt).length'
    assert tab.js(broken) == 0


def test_names_are_text(tab):
    assert text(tab, '.card .suffix') == SUFFIXES[0]
    assert tab.js('document.querySelectorAll("main b, main script").length') == 2 * 18
    assert 'out & <more>' in tab.js('document.title')


def test_nothing_is_fetched(tab):
    asked = [url for url in tab.requests if not url.startswith(('file:', 'data:'))]
    assert tab.requests
    assert not asked


def test_a_circle_is_drawn_with_its_angles(tab):
    label = tab.js('document.querySelector(".card svg").getAttribute("aria-label")')
    degrees = round(math.degrees(-0.4 * 1.5 % (2 * math.pi)))
    assert label == f'{degrees} degrees from parent 1; parent 2 is at 86 degrees'


def test_filter_by_category(tab):
    tab.choose('#category', '1')
    assert shown(tab) == [('ash', i) for i in range(6)]


def test_filter_by_suffix(tab):
    number = tab.js(f'data.suffixes.indexOf({json.dumps(SUFFIXES[1])})')
    tab.choose('#suffix', str(number))
    assert shown(tab) == [(c, i) for c in CLASSES for i in (1, 3, 5)]


def test_filter_by_score(tab):
    tab.choose('#least', '0.5')
    tab.choose('#most', '0.7')
    found = shown(tab)
    assert found == [
        ('oak', 2),
        ('oak', 3),
        ('oak', 4),
        ('ash', 2),
        ('ash', 3),
        *found[5:],
    ]
    assert [i for _, i in found[5:]] == [2, 3]
    tab.choose('#score', '1')
    assert not shown(tab)
    assert text(tab, '.empty') == 'No image passes these filters.'


def test_sort_by_score_lowest_first(tab):
    tab.choose('#grouped', False)
    tab.choose('#order', 'score 0')
    expected = [(c, i) for i in (5, 4, 3, 2, 1) for c in reversed(CLASSES)]
    assert shown(tab)[:15] == expected
    assert shown(tab)[-1] == ('oak', 0)  # it has no score


def test_sort_by_score_highest_first(tab):
    tab.choose('#category', '0')
    tab.choose('#order', 'score 0')
    tab.choose('#descending', True)
    assert shown(tab) == [('oak', i) for i in (1, 2, 3, 4, 5, 0)]


def test_a_click_rejects_and_another_keeps(tab):
    tab.click('.card[data-number="2"] .made')
    assert rejected(tab) == ['train/oak/00002.png']
    assert 'rejected' in tab.js('document.querySelectorAll(".card")[2].className')
    assert '1 rejected (6 %)' in text(tab, '#counts')
    tab.click('.card[data-number="2"] .made')
    assert rejected(tab) == []


def test_keys_move_and_reject(tab):
    tab.js('document.querySelector(".card").focus()')
    for key in ('ArrowRight', 'ArrowRight', 'x', 'ArrowLeft', 'Enter'):
        tab.press(key)
    assert rejected(tab) == ['train/oak/00001.png', 'train/oak/00002.png']
    tab.press('x')
    assert rejected(tab) == ['train/oak/00002.png']


def test_keys_move_between_lines(tab):
    tab.js('document.querySelector(".card").focus()')
    tab.press('ArrowDown')
    here = tab.js('Number(document.activeElement.dataset.number)')
    top = 'document.querySelectorAll(".card")[{}].getBoundingClientRect().{}'
    assert tab.js(top.format(here, 'left')) == tab.js(top.format(0, 'left'))
    assert tab.js(top.format(here, 'top')) > tab.js(top.format(0, 'top'))
    tab.press('ArrowUp')
    assert tab.js('document.activeElement.dataset.number') == '0'


def test_show_only_the_rejected_or_the_kept(tab):
    tab.click('.card[data-number="7"]')
    tab.choose('#show', 'rejected')
    assert shown(tab) == [('ash', 1)]
    tab.choose('#show', 'kept')
    assert len(shown(tab)) == 17
    tab.click('#reset')
    assert len(shown(tab)) == 18


def test_save_writes_a_name_on_each_line(tab):
    assert tab.js('document.getElementById("save").disabled')
    tab.click('.card[data-number="13"]')
    tab.click('.card[data-number="3"]')
    tab.click('#save')
    names = tab.downloaded('rejected.txt').decode().split('\n')
    assert names == ['train/oak/00003.png', f'train/{folder_name(ODD)}/00001.png', '']


def test_a_saved_file_is_loaded_again(tab):
    lines = r'train/oak/00004.png\nunknown.png\n'
    tab.js(f'load(new Blob(["{lines}"]))')
    assert rejected(tab) == ['train/oak/00004.png']
    tab.click('#keep-all')
    assert rejected(tab) == []


def test_the_rejected_are_remembered_as_long_as_they_are_the_same(tab, looked_at):
    tab.click('.card[data-number="4"]')
    tab.open(looked_at)
    assert rejected(tab) == ['train/oak/00004.png']
    tab.js('data.images[4].attempt = 1; rejected.clear(); recall()')
    assert rejected(tab) == []


def test_scores_have_the_decimals_that_tell_them_apart(tab):
    found = text(tab, '.card[data-number="8"] .scores')
    assert found == 'classifier 0.690 · clip 2.00'


def test_a_parent_shows_what_was_made_from_it(tab):
    tab.click('.card[data-number="8"] .second')
    assert shown(tab) == [('ash', i) for i in range(6)]
    assert text(tab, '#parent') == 'made from ash/1.png'
    assert rejected(tab) == []


def lines_of(tab, table):
    rows = f'document.querySelectorAll("#{table} tbody tr")'
    cells = 'r => [...r.cells].map(c => c.textContent.trim())'
    return tab.js(f'[...{rows}].map({cells})')


def test_the_summary_puts_first_what_gives_bad_images(tab):
    for number in (6, 7, 8, 2):
        tab.click(f'.card[data-number="{number}"]')
    tab.click('#summary summary')
    tab.wait('document.querySelectorAll("#by-category tbody tr").length')
    categories, suffixes = lines_of(tab, 'by-category'), lines_of(tab, 'by-suffix')
    assert categories[0] == ['ash', '6', '3', '0.640', '1.00', '2']
    assert [line[:3] for line in suffixes] == [
        [SUFFIXES[0], '9', '3'],
        [SUFFIXES[1], '9', '1'],
    ]
    assert lines_of(tab, 'by-parent')[0][:3] == ['ash/0.png', '6', '3']
    tab.choose('#worst', '0')
    found = [line[0] for line in lines_of(tab, 'by-category')]
    assert found == ['oak', ODD.strip(), 'ash']
    tab.click('#by-category tbody tr')
    assert {category for category, _ in shown(tab)} == {'oak'}


# ---- many images


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    "A page of 130 images, with its pictures in files."
    real = real_set(['oak'], size=(8, 8))
    rows = [made_row('oak', i) for i in range(130)]
    out = write_run(tmp_path_factory.mktemp('many') / 'out', real, rows, (8, 8))
    return review(out, real, inside=100)


def test_pages_are_turned(browser, many):
    browser.open(many)
    assert shown(browser) == [('oak', i) for i in range(60)]
    browser.click('#next')
    assert shown(browser)[0] == ('oak', 60)
    browser.press('n')
    assert shown(browser) == [('oak', i) for i in range(120, 130)]
    assert text(browser, '#page') == 'page 3 of 3'
    assert browser.js('document.getElementById("next").disabled')
    browser.press('p')
    assert shown(browser)[0] == ('oak', 60)
    browser.choose('#size', '120')
    assert len(shown(browser)) == 120


def test_what_is_rejected_on_another_page_is_saved(browser, many):
    browser.open(many)
    browser.click('.card[data-number="0"]')
    browser.click('#next')
    browser.click('.card[data-number="61"]')
    assert rejected(browser) == ['train/oak/00000.png', 'train/oak/00061.png']


def test_pictures_beside_the_page_are_shown(browser, many):
    browser.open(many)
    browser.wait('document.querySelector(".made").complete')
    assert browser.js('document.querySelector(".made").naturalWidth') == 8


# ---- colours


def luminance(colour):
    "The relative luminance of 'rgb(r, g, b)' (WCAG 2)."
    channels = [int(x) / 255 for x in re.findall(r'\d+', colour)[:3]]
    r, g, b = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    light, dark = sorted([luminance(one), luminance(other)], reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(tab, scheme):
    feature = dict(name='prefers-color-scheme', value=scheme)
    tab.call('Emulation.setEmulatedMedia', features=[feature])
    style = 'getComputedStyle(document.querySelector({})).{}'
    paper = tab.js(style.format('"body"', 'backgroundColor'))
    panel = tab.js(style.format('".card"', 'backgroundColor'))
    assert (luminance(paper) > 0.5) == (scheme == 'light')
    for selector, ground in [
        ('"body"', paper),
        ('".hint"', paper),
        ('".facts"', panel),
        ('".suffix"', panel),
        ('".first b"', panel),
        ('".second b"', panel),
        ('"#save"', panel),
    ]:
        assert contrast(tab.js(style.format(selector, 'color')), ground) >= 4.5, (
            selector
        )
