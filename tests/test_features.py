"LPIPS networks: weights are read from what is installed, and files run no code."

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from diffii.base.features import lpips_features, lpips_model, read_arrays
from diffii.base.files import UserError


class Evil:
    "Unpickled by `pickle`, it would run a command."

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch {self.mark}',)


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'weights.ckpt'


WRAPPED = {
    'bare': lambda evil: evil,
    'in a list': lambda evil: {'kernel': [evil]},
    'in an array': lambda evil: np.array([evil], dtype=object),
    'another class': lambda evil: Path('x'),
}


@pytest.mark.parametrize('wrap', WRAPPED.values(), ids=WRAPPED.keys())
def test_a_pickle_with_more_than_arrays_is_refused_and_not_run(file, tmp_path, wrap):
    mark = tmp_path / 'was-here'
    file.write_bytes(pickle.dumps(wrap(Evil(mark))))
    with pytest.raises(UserError, match='only numpy arrays'):
        read_arrays(file)
    assert not mark.exists()


def test_the_oldest_pickle_protocol_is_refused_too(file):
    file.write_bytes(b'cos\nsystem\n(S"true"\ntR.')
    with pytest.raises(UserError, match=r'os\.system'):
        read_arrays(file)


def test_a_broken_pickle_is_an_error_that_names_the_file(file):
    file.write_bytes(b'\x80\x04')
    with pytest.raises(UserError, match=r'weights\.ckpt'):
        read_arrays(file)


def test_arrays_in_containers_are_read(file):
    good = {'a': {'kernel': np.arange(6, dtype='f4').reshape(2, 3)}, 'n': [1, 'x']}
    file.write_bytes(pickle.dumps(good, protocol=4))
    got = read_arrays(file)
    assert (got['a']['kernel'] == good['a']['kernel']).all()
    assert got['n'] == [1, 'x']


def test_the_network_has_the_shapes_of_torchvisions():
    import torch
    from torchvision import models

    def shapes(module):
        found = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
        return [tuple(m.weight.shape) for m in found]

    assert shapes(lpips_model('alex').net) == shapes(models.alexnet().features)


def test_an_unknown_network_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="'alex'"):
        lpips_model('resnet')


def test_points_of_random_images_are_as_far_apart_as_lpips_says():
    import torch

    model = lpips_model('alex')
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.rand(4, 3, 64, 64, generator=gen) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        expected = model(a, b).flatten()
    distance = (lpips_features(model, a) - lpips_features(model, b)).pow(2).sum(1)
    assert torch.allclose(distance, expected, atol=1e-5)
