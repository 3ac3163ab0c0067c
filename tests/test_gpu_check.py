"The program for a GPU, rehearsed with small networks on the CPU."

import json

import gpu_check
import pytest


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_check.torch.cuda, 'is_available', lambda: False)


def test_without_a_gpu_it_says_so(no_gpu, capsys):
    assert gpu_check.main([]) == gpu_check.NO_GPU
    assert 'no CUDA device here: nothing was checked' in capsys.readouterr().out


def test_a_rehearsal_runs_every_check_that_a_cpu_can(no_gpu, capsys, tmp_path):
    file = tmp_path / 'table.json'

    code = gpu_check.main(
        ['--rehearse', '--batch', '4', '--steps', '4', '--out', str(file)]
    )

    said = capsys.readouterr().out
    assert code == 0, said
    assert 'FAILED' not in said and 'all is well' in said
    assert said.count('needs CUDA') == 2 * 4
    found = json.loads(file.read_text())
    rows = found['rows']
    names = ['published', 'diffii', 'diffii, 4 calls']
    assert [row['procedure'] for row in rows] == names * 2
    assert all(row[name] > 0 for row in rows for name in ('inverted', 'made', 'share'))
    assert [run['images'] for run in found['runs']] == [8, 8]
    assert all(
        run['planned_seconds'] > 0 and run['seconds'] > 0 for run in found['runs']
    )
    assert len(found['checks']) == 2 * len(gpu_check.CHECKS)


def test_what_fails_is_named_and_counted(monkeypatch):
    def check_nothing(pipe, images):
        raise AssertionError('as it should')

    said = []
    monkeypatch.setattr(gpu_check, 'CHECKS', (check_nothing,))

    failed = gpu_check.run_checks('SD', None, None, said.append)

    assert failed == ['SD: nothing']
    assert said == ['FAILED   SD: nothing: AssertionError: as it should']
