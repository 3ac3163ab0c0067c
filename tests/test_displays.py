"What a notebook shows of sets, concepts and results, and bars of progress."

import pytest
from garden import photo

from diffii.base.images import ImageSet
from diffii.base.processes import Progress, reporter, step_reporter
from diffii.evaluation.training_report import KINDS, ComparisonResults


def test_a_set_shows_its_first_images_and_its_counts():
    images = tuple(photo(i, (30 + i, 20)) for i in range(5))
    some = ImageSet(images, (0, 0, 0, 2, 2), ('<b>', 'empty', 'z'), 'plant')
    html = some._repr_html_()
    assert 'data:image/png;base64,' in html
    assert '5 images of 3 categories (plant): 3 &lt;b&gt;, 0 empty, 2 z' in html
    assert some.overview(side=10).size == (3 * 10 + 2 * 2, 3 * 10 + 2 * 2)


def test_a_large_set_shows_a_part_of_it():
    image = photo(0)
    many = ImageSet((image,) * 200, tuple(range(100)) * 2, tuple(map(str, range(100))))
    assert many.overview(rows=2, columns=8, side=8).size == (2 * 8 + 2, 2 * 8 + 2)
    assert many.caption().endswith('2 5, ...')


def test_an_empty_set_shows_its_counts():
    empty = ImageSet((), (), ('a',))
    assert '<img' not in empty._repr_html_()


def test_a_comparison_shows_its_table_and_verdict():
    accuracy = dict(mean=50.0, interval=None, seeds=[50.0])
    shown = ComparisonResults(
        accuracy={kind: accuracy for kind in KINDS},
        gain=dict(mean=0.0, interval=None, verdict='undecided'),
        counts=dict(real=1, synthetic=1, test=4, folds=1, seeds=1),
    )._repr_html_()
    assert '<table' in shown and 'no interval for one seed' in shown


@pytest.fixture()
def bars(monkeypatch):
    "Bars as they are where the environment says nothing of them."
    monkeypatch.delenv('TQDM_DISABLE', raising=False)


def test_a_bar_is_shown_by_default(bars, capfd):
    step_reporter(True, 'classifier')(1, 1)
    assert 'classifier' in capfd.readouterr().err


def test_no_bar_is_shown_where_none_is_wanted(bars, capfd):
    step_reporter(False, 'classifier')(1, 1)
    Progress(quiet=True)('inversion', 1, 1)
    assert not capfd.readouterr().err


def test_a_function_is_called_instead():
    seen = []

    def note(*of):
        seen.append(of)

    reporter(note)('images', 1, 2)
    step_reporter(note, 'concepts')(1, 2, 0.5)
    assert seen == [('images', 1, 2), (1, 2, 0.5)]
