"The recipe of the page that cannot run there."

import re

import pytest
import torch
from PIL import Image

PAGE = 'start/recipes.ipynb'


@pytest.fixture
def names():
    "What the page has imported by the time of the recipe, and two sets of images."
    from torch.nn.functional import cross_entropy
    from torch.utils.data import ConcatDataset, DataLoader, WeightedRandomSampler
    from torchvision.models import resnet18

    return dict(
        torch=torch,
        cross_entropy=cross_entropy,
        ConcatDataset=ConcatDataset,
        DataLoader=DataLoader,
        WeightedRandomSampler=WeightedRandomSampler,
        resnet18=resnet18,
    )


@pytest.fixture
def sets(tmp_path):
    "Two sets of the same categories: real and synthetic images."
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    for place, count in dict(real=2, made=6).items():
        for name in ('ash', 'oak'):
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (32, 32), (40 * i, 0, 0)).save(folder / f'{i}.png')
    places = tmp_path / 'real', tmp_path / 'made'
    return [ImageFolder(place, ToTensor()) for place in places]


def source_of(notebooks, text):
    "The one cell of the page that has a text in it."
    cells = [''.join(cell['source']) for cell in notebooks[PAGE]]
    (found,) = [cell for cell in cells if text in cell]
    return found


def test_a_share_of_what_is_seen_is_synthetic(notebooks, names, sets):
    scope = dict(names)
    body = source_of(notebooks, 'def mixed(').split('torch.manual_seed')[0]
    exec(body, scope)

    real, made = sets
    weights = scope['mixed'](real, made, share=0.25).sampler.weights

    assert weights[: len(real)].sum() == pytest.approx(0.75)
    assert weights[len(real) :].sum() == pytest.approx(0.25)


def test_lightning_takes_the_loader(notebooks, names, sets, tmp_path, monkeypatch):
    lightning = pytest.importorskip('lightning')
    monkeypatch.chdir(tmp_path)
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = lightning.Trainer
    monkeypatch.setattr(
        lightning,
        'Trainer',
        lambda **given: trainer(**quiet, accelerator='cpu', **given),
    )
    scope = names | dict(real=sets[0], made=sets[1])
    exec(source_of(notebooks, 'def mixed(').split('torch.manual_seed')[0], scope)
    text = source_of(notebooks, 'import lightning')
    (block,) = re.findall(r'```python\n(.*?)```', text, re.S)

    exec(block, scope)

    assert scope['trainer'].global_step == 8 * 2
