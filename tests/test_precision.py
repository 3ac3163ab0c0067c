"The precision of a device, TF32, and what a run's record says of both."

import pytest
import small_models as models

from diffii.base import checkpoints
from diffii.base.checkpoints import best_precision, precision
from diffii.base.files import UserError
from diffii.base.pipeline import Pipeline, load_pipeline
from diffii.base.settings import ModelSettings
from diffii.run import filters

import torch
from PIL import Image


@pytest.fixture
def gpu(monkeypatch):
    "Pretend that there is an NVIDIA GPU of some capability and name."

    def _gpu(capability, name='A card'):
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda d: capability)
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda d: name)

    return _gpu


@pytest.mark.parametrize(
    'capability, name, expected',
    (
        ((9, 0), 'NVIDIA H100', 'float16'),
        ((8, 0), 'NVIDIA A100', 'float16'),
        ((7, 0), 'Tesla V100', 'float16'),
        ((7, 5), 'NVIDIA GeForce GTX 1660 Ti', 'float32'),
        ((6, 1), 'NVIDIA GeForce GTX 1080', 'float32'),
    ),
)
def test_a_gpu_works_in_the_precision_it_is_quick_with(gpu, capability, name, expected):
    gpu(capability, name)

    assert precision(ModelSettings(device='cuda')) == expected


def test_a_cpu_works_in_32_bits():
    assert best_precision('cpu') == 'float32'
    assert precision(ModelSettings(device='cpu')) == 'float32'
    assert load_pipeline('tiny', device='cpu').dtype_name == 'float32'


@pytest.mark.parametrize('dtype', ('float32', 'float16', 'bfloat16'))
def test_what_was_asked_for_is_taken(gpu, dtype):
    gpu((9, 0))

    assert precision(ModelSettings(device='cuda', dtype=dtype)) == dtype


@pytest.mark.parametrize(
    'capability, dtype, hint',
    (((7, 5), 'bfloat16', 'float16'), ((5, 2), 'float16', 'float32')),
)
def test_a_precision_that_the_device_lacks_is_refused(gpu, capability, dtype, hint):
    gpu(capability)
    message = f'--dtype {dtype}: A card lacks it; give --dtype {hint}'

    with pytest.raises(UserError, match=message):
        load_pipeline('tiny', device='cuda', dtype=dtype)


@pytest.fixture
def switches():
    "The switches of CUDA that are set on purpose; they are put back at the end."
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    names = [(matmul, 'allow_tf32')]
    names += [(cudnn, name) for name in ('allow_tf32', 'deterministic', 'benchmark')]
    before = [getattr(owner, name) for owner, name in names]
    yield matmul, cudnn
    for (owner, name), value in zip(names, before):
        setattr(owner, name, value)


@pytest.mark.parametrize('tf32', (False, True))
def test_tf32_is_set_on_purpose(switches, tf32):
    matmul, cudnn = switches
    matmul.allow_tf32 = cudnn.allow_tf32 = not tf32
    cudnn.deterministic, cudnn.benchmark = False, True

    checkpoints.set_arithmetic(ModelSettings(tf32=tf32), 'cuda')

    assert (matmul.allow_tf32, cudnn.allow_tf32) == (tf32, tf32)
    assert cudnn.deterministic and not cudnn.benchmark


def test_the_cpu_leaves_the_switches_of_cuda_alone():
    before = torch.backends.cudnn.allow_tf32

    checkpoints.set_arithmetic(ModelSettings(tf32=not before), 'cpu')

    assert torch.backends.cudnn.allow_tf32 == before


def test_tf32_is_of_gpus(monkeypatch, switches):
    pipe = models.loaded('sd1')
    torch.backends.cuda.matmul.allow_tf32 = True
    on_cpu = pipe.tf32
    monkeypatch.setattr(Pipeline, 'device', torch.device('cuda'))

    assert (on_cpu, pipe.tf32) == (False, True)


def test_the_filter_computes_where_its_network_is(monkeypatch):
    "The device `meta` stands in for a GPU: what is computed there has no values."
    seen = []

    def features(model, x):
        seen.append(x.device.type)
        return torch.zeros(len(x), 2)

    monkeypatch.setattr(filters, 'lpips_features', features)
    network = torch.nn.Linear(1, 1, device='meta')
    images = [Image.new('RGB', (64, 64), color) for color in ('red', 'blue')]

    far = filters.distances(images, images, network)

    assert set(seen) == {'meta'}
    assert far.device.type == 'cpu'
