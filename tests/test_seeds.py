"Random numbers of a block: seeded at its start, put back at its end."

import pytest
import torch

from diffii.base.batches import Prepare
from diffii.base.seeds import seeded


def test_a_block_draws_from_its_seed_and_leaves_no_trace():
    torch.manual_seed(1)
    expected = torch.rand(3)

    torch.manual_seed(1)
    with seeded(7):
        first = torch.rand(3)
    after = torch.rand(3)
    with seeded(7):
        second = torch.rand(3)

    assert torch.equal(first, second)
    assert torch.equal(after, expected)


def draw(block):
    with block:
        return torch.rand(1)


@pytest.mark.parametrize('what', ('a block', 'augmentation'))
def test_generators_of_gpus_are_left_alone(monkeypatch, what):
    asked = []
    for name in ('manual_seed', 'manual_seed_all'):
        monkeypatch.setattr(torch.cuda, name, asked.append)

    if what == 'a block':
        draw(seeded(7))
    else:
        x = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        Prepare(8, (0.5,) * 3, (0.5,) * 3, train=True, flip=True)((x,))

    assert asked == []
