"Paired tests, Holm's correction, verdicts, and pages whose comparisons are one family."

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from diffii.base.files import UserError, read_json, write_json
from diffii.evaluation.statistics import (
    Comparison,
    Paired,
    decide,
    holm,
    paired,
    plot_comparisons,
    verdict_of,
)
from diffii.evaluation.tables import base_of, condition_of, finished, table_lines
from diffii.evaluation.tasks import remedies
from diffii.evaluation.verdicts import Page, comparisons, in_three_measures, rebuild
from diffii.evaluation.tables import usual_row

RESULTS = Path(__file__).parent.parent / 'nbs' / 'results' / 'cells'


def test_a_paired_test_is_scipys():
    one, other = [3.0, 5.0, 4.0, 7.0], [1.0, 4.5, 2.0, 3.0]

    found = paired([a - b for a, b in zip(one, other)])

    theirs = stats.ttest_rel(one, other)
    low, high = theirs.confidence_interval()
    assert found.p == pytest.approx(theirs.pvalue)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(
        (low, high)
    )


@pytest.mark.parametrize(
    'differences, p, half',
    [
        ([2.0], 1, np.inf),
        ([2.0, 2.0], 0.5, 0),
        ([3.0] * 5, 1 / 16, 0),
        ([0.0] * 3, 1, 0),
    ],
)
def test_differences_that_do_not_vary(differences, p, half):
    found = paired(differences)
    assert (found.p, found.half) == (p, half)


def test_differences_that_vary_by_rounding_do_not_vary():
    found = paired([1.3333333333333286, 1.3333333333333428, 1.3333333333333428])

    assert (found.p, found.half) == (0.25, 0)


def test_no_differences_are_an_error():
    with pytest.raises(UserError, match='one finite number'):
        paired([])


# worked by hand: sorted, times m, m - 1, ..., never falling, at most 1
HOLM = [
    ([], []),
    ([0.02], [0.02]),
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.01, 0.02, 0.03, 0.04], [0.04, 0.06, 0.06, 0.06]),
    ([0.6, 0.7], [1.0, 1.0]),
    ([0.01, 0.01], [0.02, 0.02]),
]


@pytest.mark.parametrize('p, adjusted', HOLM)
def test_holms_correction(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


@pytest.mark.parametrize('p', [[-0.1], [1.1], [float('nan')]])
def test_what_is_no_probability_is_refused(p):
    with pytest.raises(UserError, match='from 0 to 1'):
        holm(p)


@pytest.mark.parametrize(
    'mean, half, p, margin, word',
    [
        (3, 1, 0.01, 2, 'better'),
        (-3, 1, 0.01, 2, 'worse'),
        (3, 1, 0.06, 2, 'undecided'),  # it falls under the correction
        (1, 0.5, 0.01, 2, 'better'),  # small, but there
        (1, 0.9, 0.06, 2, 'equivalent'),
        (1, 1.1, 0.06, 2, 'undecided'),
        (1, 1.5, None, 0, 'undecided'),  # without p the interval decides
        (2, 1.5, None, 0, 'better'),
        (0, 0, None, 0, 'equivalent'),
        (3, float('nan'), None, 0, 'undecided'),
        (3, float('inf'), 1.0, 2, 'undecided'),
    ],
)
def test_the_word_for_a_difference(mean, half, p, margin, word):
    assert verdict_of(mean, half, p, margin) == word


def comparison(row, other, p, **more):
    return Comparison('5-shot', row, other, Paired(3.0, 2.0, p, 10), **more)


def test_a_question_asked_from_both_sides_counts_once():
    one, other = comparison('a', 'b', 0.03), comparison('b', 'a', 0.03)

    assert [c.p for c in decide([one, other])] == [0.03, 0.03]
    assert decide([one, other])[0].verdict == 'better'


def test_the_same_names_in_two_experiments_are_two_questions():
    both = [comparison('a', 'b', 0.03, experiment=e) for e in ('x', 'y')]

    assert [c.p for c in decide(both)] == [0.06, 0.06]


def test_a_page_corrects_over_all_its_experiments():
    folders = RESULTS / 'few-shot-aviary', RESULTS / 'few-shot-10-aviary'

    page = Page(*folders)

    raw = [c.found.p for c in page.family]
    assert min(raw) > 0 and len(raw) > 10
    assert len(page.of(folders[0])) + len(page.of(folders[1])) == len(raw)
    assert [c.p for c in page.family] == pytest.approx(holm(raw).tolist())


def test_a_table_without_the_recipe_is_about_the_row_asked_for():
    folder = RESULTS / 'recipe-aviary'
    row = 'diffii + learn=tokens+lora + classifier-steps=400'

    page = Page(folder, also={folder: (row,)})

    assert {c.row for c in page.family} == {row}
    (panel,) = page.plot().axes
    title = 'recipe-aviary, 5-shot: diffii, learned, 400 steps minus'
    assert panel.get_title(loc='left') == title
    assert Page(folder).family == []


def test_a_plot_has_a_panel_for_each_row_that_is_asked_about():
    folder = RESULTS / 'few-shot-aviary'

    panels = Page(folder, also={folder: ('diff-ii',)}).plot().axes

    titles = [panel.get_title(loc='left') for panel in panels]
    asked = ('diffii', 'diff-ii')
    assert titles == [f'few-shot-aviary, 5-shot: {row} minus' for row in asked]


@pytest.mark.parametrize('folder, row', [('recipe-aviary', 'diffi'), ('x', 'diffii')])
def test_a_row_that_no_table_has_cannot_be_asked_about(folder, row):
    asked = {RESULTS / folder: (row,)}

    with pytest.raises(UserError, match=f'no configuration {row} is there'):
        Page(RESULTS / 'recipe-aviary', also=asked)


def test_measures_of_several_conditions_are_no_pairs():
    cells = [dict(setting=name, row='a', trial=0) for name in ('IF=10', 'IF=100')]

    with pytest.raises(UserError, match='cells of IF=10, IF=100; give those of one'):
        in_three_measures(cells, 'a', cells, 'a')


def test_panels_share_one_axis():
    family = decide([comparison('a', name, 0.01) for name in 'bcd'])

    fig = plot_comparisons({'one': family, 'other': family[:1]})

    one, other = fig.axes
    assert one.get_xlim() == other.get_xlim()
    assert [t.get_text() for t in one.get_yticklabels()] == [
        f'{name}: better' for name in 'bcd'
    ]


def test_a_long_name_takes_two_lines_beside_its_dot():
    name = 'real-gen + few-step=own + expansion=20 + replacement=0.7'

    fig = plot_comparisons({'one': decide([comparison('a', name, 0.01)])})

    (label,) = fig.axes[0].get_yticklabels()
    first, second = label.get_text().splitlines()
    assert f'{first} {second}' == f'{name}: better'


def test_trials_that_only_one_has_are_not_compared():
    cells = [dict(setting='s', row='a', trial=t, accuracy=t) for t in range(3)]
    cells += [dict(setting='s', row='b', trial=1, accuracy=0.0)]

    found = comparisons(cells, 's', 'a')

    assert [(c.other, c.found.trials, c.found.mean) for c in found] == [('b', 1, 1.0)]


# tables from cells alone

EXPERIMENTS = sorted({file.parent.parent for file in RESULTS.glob('*/cells/*.json')})


@pytest.mark.parametrize('kept', EXPERIMENTS, ids=lambda folder: folder.name)
def test_tables_plots_and_verdicts_follow_from_the_cells(tmp_path, kept):
    out = tmp_path / kept.name
    shutil.copytree(kept / 'cells', out / 'cells')
    shutil.copy(kept / 'experiment.json', out)

    assert rebuild(tmp_path) == [out]

    lines, before = (read_json(f / 'table.json') for f in (out, kept))
    assert {(x['setting'], x['row']): x['accuracy'] for x in lines} == {
        (x['setting'], x['row']): pytest.approx(x['accuracy']) for x in before
    }
    family = Page(kept).family
    told = [(c.row, c.other, c.found.mean, c.p, c.verdict) for c in family]
    names = 'configuration', 'compared_with', 'difference', 'p_corrected', 'verdict'
    verdicts = read_json(out / 'verdicts.json')
    assert [tuple(line[name] for name in names) for line in verdicts] == told
    assert (out / 'plot.png').is_file() and (out / 'table.csv').is_file()


def test_gains_are_over_the_original_set_wherever_it_stands(tmp_path):
    out = tmp_path / 'kept'
    shutil.copytree(RESULTS / 'few-shot-10-aviary', out)
    lines = read_json(out / 'table.json')
    write_json(out / 'table.json', lines[::-1])

    _, _, table = finished(out)

    gains = dict(zip(table['row'], table['gain']))
    assert list(gains) == [line['row'] for line in lines[::-1]]
    assert np.isnan(gains['original'])
    assert gains['diffii'] == pytest.approx(
        next(line['gain'] for line in lines if line['row'] == 'diffii')
    )


@pytest.mark.parametrize(
    'condition, rows, base',
    [
        ('5-shot', ['cutmix', 'original'], 'original'),
        ('5-shot', ['diffii', 'diff-ii'], 'diff-ii'),
        ('IF=10', ['diff-ii', 'CMO', 'CE'], 'CE'),
        ('5-shot', ['split_ratio=0', 'split_ratio=1'], 'split_ratio=0'),
        ('5-shot', ['diffii + words', 'original + steps=9'], 'original + steps=9'),
        ('5-shot', ['original + cutmix', 'diffii'], 'diffii'),
    ],
)
def test_the_row_that_gains_are_over(condition, rows, base):
    assert base_of(condition, rows) == base


@pytest.mark.parametrize(
    'names',
    ((), ('experiment.json',), ('experiment.json', 'cells/.5-shot--a--0.json.77.tmp')),
    ids=('an empty folder', 'no cell', 'an unfinished cell'),
)
def test_without_a_finished_cell_there_is_one_line(say, tmp_path, names):
    (tmp_path / 'cells').mkdir()
    for name in names:
        (tmp_path / name).write_text('{}')
    before = sorted(tmp_path.rglob('*'))

    line = say('benchmark', '--from', tmp_path).line

    assert f'--from {tmp_path}: no cells' in line
    assert 'diffii benchmark with it as --out' in line
    assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize(
    'task, data, name, table',
    (
        ('few-shot', 'cub', '10-shot', ('few_shot', 'cub_10')),
        ('split', 'aircraft', '5-shot', ('few_shot', 'aircraft_5')),
        ('ood', 'cub', '5-shot, shifted', ('waterbirds', '')),
        ('long-tail', 'flower', 'IF=100', ('long_tail', 'flower_lt_100')),
        ('long-tail', 'cub', 'IF=12.5', ('long_tail', 'cub_lt_12.5')),
    ),
)
def test_a_condition_is_known_from_the_record(task, data, name, table):
    found = condition_of(dict(task=task, dataset=data), name)

    assert (found.name, found.table) == (name, table)


def test_sweeps_go_by_value_and_tails_from_the_steepest():
    names = [('IF=10', 'diff-ii'), ('IF=100', 'diff-ii'), ('IF=100', 'CE')]
    names += [('5-shot', f'expansion={n}') for n in (10, 2)] + [('5-shot', 'original')]

    found = table_lines([dict(setting=setting, row=row) for setting, row in names])

    assert found[:3] == [('IF=100', 'CE'), ('IF=100', 'diff-ii'), ('IF=10', 'diff-ii')]
    assert [row for _, row in found[3:]] == ['original', 'expansion=2', 'expansion=10']


def test_rows_with_settings_of_their_own_come_last():
    rows = ['diffii + expansion=10', 'original', 'diffii + few-step=none', 'diffii']

    found = table_lines([dict(setting='5-shot', row=row) for row in rows])

    assert [row for _, row in found] == ['original', 'diffii', rows[0], rows[2]]


def test_inversions_go_from_the_dearest_as_the_task_has_them():
    names = [c.name for c in remedies()]
    cells = [dict(setting='3-shot', row=row) for row in sorted(names)]

    assert [row for _, row in table_lines(cells)] == names


def test_inversions_are_compared_with_what_the_model_recommends():
    assert usual_row([c.name for c in remedies()]) == '2 forward, 2 corrections'
