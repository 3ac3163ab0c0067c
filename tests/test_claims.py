"The paper's claims: which differences they are, and the word for each."

from dataclasses import replace
from pathlib import Path

import pytest

from diffii.evaluation.claims import (
    CLAIMS,
    FEW_BASELINES,
    GROUPS,
    Claim,
    claim_b,
    claim_d,
    claim_e,
    claim_f,
    claim_g,
    claim_h,
    claim_table,
    comparison_table,
    plot_claims,
    claims_on,
)
from diffii.base.files import read_json
from diffii.base.records import write_record
from diffii.evaluation.statistics import Comparison, Paired, decide
from diffii.evaluation.tables import rebuild_tables

RESULTS = Path(__file__).parent.parent / 'nbs' / 'results' / 'cells'


def claim(*words):
    found = Paired(1.0, 0.5, 0.01, 10)
    return Claim(
        'a', 'it is above', [Comparison('', 'x', 'y', found, verdict=w) for w in words]
    )


@pytest.mark.parametrize(
    'words, verdict',
    [
        ((), 'not tested'),
        (('better', 'better'), 'holds'),
        (('better', 'undecided'), 'undecided'),
        (('better', 'equivalent'), 'undecided'),
        (('better', 'worse'), 'contradicted'),
    ],
)
def test_the_verdict_of_a_claim(words, verdict):
    assert claim(*words).verdict == verdict


def cell(setting, row, accuracy, **more):
    return dict(setting=setting, row=row, trial=0, accuracy=accuracy, **more)


def test_more_gain_with_fewer_shots_is_a_positive_difference():
    few = [cell('5-shot', 'original', 40), cell('5-shot', 'diff-ii', 60)]
    more = [cell('10-shot', 'original', 60), cell('10-shot', 'diff-ii', 65)]

    [(*_, differences)] = claim_b({'few-shot': few, 'few-shot-10': more})

    assert differences == {0: 15}


def ablation(setting):
    "Cells in which the circle adds ten points and the two stages one."
    rows = {
        f'circle {c}, two-stage {s}': 10 * (c == 'yes') + (s == 'yes')
        for c in ('yes', 'no')
        for s in ('yes', 'no')
    }
    return [cell(setting, row, a, lpips=a / 100) for row, a in rows.items()]


def test_circle_and_stages_are_compared_with_the_other_held_still():
    found = [
        differences for *_, differences in claim_e({'ablation': ablation('5-shot')})
    ]

    assert [x[0] for x in found] == pytest.approx(2 * [10, 10, 1, 1])


def test_trials_of_different_conditions_are_no_pairs():
    begun = cell('10-shot', 'circle yes, two-stage yes', 90, lpips=0.9)

    found = claim_e({'ablation': [*ablation('5-shot'), begun]})

    compared = [(name, differences) for name, *_, differences in found if differences]
    assert [x[0] for _, x in compared] == pytest.approx(2 * [10, 10, 1, 1])
    assert {name for name, _ in compared} == {'5-shot, accuracy', '5-shot, LPIPS'}


def test_a_group_under_two_conditions_is_two_questions():
    groups = dict.fromkeys(GROUPS, 50)
    cells = [
        cell(f'{shots}-shot, shifted', row, 50, groups=groups)
        for shots in (5, 10)
        for row in ('original', 'diff-ii')
    ]

    names = [name for name, *_, found in claim_d({'ood': cells}) if found]

    assert len(names) == len(set(names)) == 2 * len(GROUPS)


def test_only_accuracy_has_a_margin_for_equivalent():
    family = [c for found in claims_on(RESULTS) for c in found.family]
    tight = [replace(c, found=Paired(0.1, 0.2, 0.5, 10)) for c in family]

    words = {c.condition: c.verdict for c in decide(tight)}

    others = {c for c in words if 'LPIPS' in c or 'percent' in c}
    assert {words[c] for c in others} == {'undecided'}
    assert {words[c] for c in words.keys() - others} == {'equivalent'}


def split(ratio, accuracy, lpips, consistency):
    measures = dict(lpips=lpips, class_consistency=consistency)
    return cell('5-shot', f'split_ratio={ratio}', accuracy, **measures)


def test_the_split_ratio_compares_relative_change_and_inner_ratios():
    cells = [split(0, 50, 0.2, 80), split(0.3, 60, 0.25, 76), split(1, 55, 0.3, 72)]
    cells.append(cell('5-shot', 'original', 30))

    [(*_, change)] = claim_f({'split': cells})
    inner = [differences for *_, differences in claim_g({'split': cells})]

    assert change == {0: pytest.approx(50 - 10)}
    assert inner == [{0: 10}, {0: 5}]


def test_the_recipe_is_compared_with_every_other_row_of_four_tables():
    rows = dict(original=40, cutmix=45)
    rows['diff-ii'] = 50
    rows['diffii'] = 55
    names = dict.fromkeys(('few-shot', 'few-shot-10', 'long-tail', 'ood'))
    cells = {n: [cell(n, row, a) for row, a in rows.items()] for n in names}

    found = claim_h(cells)

    assert [x[:3] for x in found] == [
        (n, 'diffii', other)
        for n in names
        for other in ('original', 'cutmix', 'diff-ii')
    ]
    assert [x[3][0] for x in found] == 4 * [15, 10, 5]


def test_the_claims_follow_from_the_committed_cells():
    claims = claims_on(RESULTS)

    assert [c.letter for c in claims] == list(CLAIMS)
    assert all(c.family for c in claims)
    assert len(claim_table(claims)) == 8
    assert len(comparison_table(claims)) == sum(len(c.family) for c in claims)
    (ax,) = plot_claims(claims).axes
    beside = ' '.join(text.get_text() for text in ax.get_yticklabels())
    for c in claims:
        assert f'({c.letter})' in beside
    dots = [line for line in ax.lines if line.get_alpha() == 0.5]
    assert len(dots) == len(comparison_table(claims))


def test_a_claim_whose_baseline_was_not_run_does_not_hold(tmp_path):
    accuracies = dict.fromkeys(('original', *FEW_BASELINES), 40.0)
    accuracies.pop('real-mix')
    for task, shots in (('few-shot', 5), ('few-shot-10', 10)):
        out = tmp_path / f'{task}-aviary'
        about = dict(task='few-shot', dataset='aviary', model='tiny', protocol=2)
        write_record(out / 'experiment.json', about)
        for row, accuracy in (accuracies | {'diff-ii': 60.0}).items():
            for trial in range(3):
                varied = accuracy * (1 + trial / 50)
                found = cell(f'{shots}-shot', row, varied)
                found |= dict(trial=trial, n_train=5, n_test=5)
                found |= dict(n_synthetic=0, seconds=1.0)
                write_record(out / 'cells' / f'{row}--{trial}.json', found)
        rebuild_tables(out)

    claim = claims_on(tmp_path)[0]

    assert {c.verdict for c in claim.family} == {'better'}
    assert len(claim.not_run) == 2
    assert 'real-mix' in claim.not_run[0]
    assert claim.verdict == 'undecided'


def test_a_sweep_that_has_only_begun_compares_nothing():
    cells = {'split': [split(0, 50, 0.2, 80)]}

    assert [x for *_, x in claim_f(cells) + claim_g(cells)] == [{}] * 3


def test_without_cells_nothing_is_tested(tmp_path):
    assert {c.verdict for c in claims_on(tmp_path)} == {'not tested'}


def test_trials_of_different_protocols_are_no_pairs(tmp_path):
    """Claim (b) compares the same trials of two experiments; (a) does not."""
    for task, shots, protocol in (('few-shot', 5, 2), ('few-shot-10', 10, 1)):
        out = tmp_path / f'{task}-aviary'
        about = dict(task='few-shot', dataset='aviary', model='tiny')
        write_record(out / 'experiment.json', about | dict(protocol=protocol))
        for row, accuracy in (('original', 40.0), ('diff-ii', 60.0)):
            found = cell(f'{shots}-shot', row, accuracy)
            found |= dict(n_train=5, n_test=5, n_synthetic=0, seconds=1.0)
            write_record(out / 'cells' / f'{row}--0.json', found)
        rebuild_tables(out)

    families = {c.letter: len(c.family) for c in claims_on(tmp_path)}
    assert families['a'] == 2
    assert families['b'] == 0
    record = read_json(tmp_path / 'few-shot-10-aviary' / 'experiment.json')
    record.pop('seal')
    write_record(
        tmp_path / 'few-shot-10-aviary' / 'experiment.json', record | dict(protocol=2)
    )
    families = {c.letter: len(c.family) for c in claims_on(tmp_path)}
    assert families['b'] == 1
