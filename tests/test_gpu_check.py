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
        ['--rehearse', '--batch', '4', '--steps', '2', '--out', str(file)]
    )

    said = capsys.readouterr().out
    assert code == 0, said
    assert 'FAILED' not in said and 'all is well' in said
    assert said.count('needs CUDA') == 2 * 4
    rows = json.loads(file.read_text())['rows']
    assert [row['procedure'] for row in rows] == ['published', 'diffii'] * 2
    assert all(row['images_per_second'] > 0 and row['share'] > 0 for row in rows)


def test_what_fails_is_named_and_counted(monkeypatch):
    def check_nothing(pipe, images):
        raise AssertionError('as it should')

    said = []
    monkeypatch.setattr(gpu_check, 'CHECKS', (check_nothing,))

    failed = gpu_check.run_checks('SD', None, None, said.append)

    assert failed == ['SD: nothing']
    assert said == ['FAILED   SD: nothing: AssertionError: as it should']
