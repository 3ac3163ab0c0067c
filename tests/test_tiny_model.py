"Training the shipped model: its tokenizer, its stages, their checkpoints and its files."

import numpy as np
import pytest
import torch

from diffii.base.files import UserError
from diffii.base.pipeline import load_pipeline
from diffii.data.tiny_model import (
    MAX_TOKENS,
    Stage,
    Stages,
    all_texts,
    base_pictures,
    bend,
    learning_rate,
    save_tiny,
    tiny_models,
    tiny_tokenizer,
    train_stage,
    train_tiny,
)

NETWORKS = ('vae', 'unet', 'text_encoder')
SHORT = Stages(
    Stage(3, 2e-3, 8),
    denoiser=(Stage(2, 1e-3, 8, seed=1), Stage(1, 1e-3, 8, seed=3, digits=0.5)),
    decoder=(Stage(2, 1e-3, 8, seed=2),),
)


@pytest.fixture(scope='module')
def pictures():
    return base_pictures(24, 24)


@pytest.fixture(scope='module')
def tokenizer(pictures):
    return tiny_tokenizer(all_texts(pictures))


@pytest.fixture(scope='module')
def trained(pictures, tmp_path_factory):
    "A model after a few steps of each stage: (parts, folder, what was reported)."
    folder, reported = tmp_path_factory.mktemp('work'), []

    def report(stage, step, loss, seconds):
        reported.append((stage, step))

    return train_tiny(folder, SHORT, pictures, report), folder, reported


# images and words


def test_pictures_are_digits_then_birds_with_several_captions(pictures):
    assert pictures.images.shape == (48, 32, 32, 3)
    assert pictures.images.dtype == np.uint8
    assert pictures.is_bird.tolist() == [0] * 24 + [1] * 24
    assert {len(captions) for captions in pictures.captions} == {6}
    nouns = ['digit', 'bird']
    for is_bird, captions in zip(pictures.is_bird, pictures.captions):
        assert all(nouns[is_bird] in caption.split() for caption in captions)


def test_a_bent_digit_stays_between_paper_and_ink():
    grey = np.random.default_rng(0).random((32, 32))
    bent = bend(grey, np.random.default_rng(1))
    assert bent.shape == (32, 32)
    assert 0 <= bent.min() and bent.max() <= 1


def test_the_same_texts_give_the_same_tokens(pictures, tokenizer):
    for _ in range(3):
        again = tiny_tokenizer(all_texts(pictures))
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.tokenize('a zebra juggles') == tokenizer.tokenize(
            'a zebra juggles'
        )


def test_any_prompt_can_be_read(tokenizer):
    prompts = ['a zebra quietly juggles 9 fish!', 'a photo of a bird']
    ids = tokenizer(prompts, padding='max_length', truncation=True).input_ids
    assert [len(i) for i in ids] == [MAX_TOKENS] * 2
    text = tokenizer.decode(ids[0], skip_special_tokens=True)
    assert text == 'a zebra quietly juggles 9 fish !'
    assert max(map(max, ids)) < len(tokenizer)


# stages


def test_the_learning_rate_rises_and_falls():
    stage = Stage(steps=1000, lr=1.0, warmup=100)
    rates = [learning_rate(stage, step) for step in (0, 99, 999)]
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert rates[1] > 0.9
    assert rates[2] == pytest.approx(0.02, rel=1e-3)


def test_a_horizon_stops_the_rate_from_reaching_its_end():
    broken_off = Stage(steps=10, lr=1.0, warmup=1, horizon=1000)
    assert learning_rate(broken_off, 9) > 0.99


def test_the_stages_run_leg_after_leg(trained):
    _, _, reported = trained
    steps = {'autoencoder': 3, 'denoiser-1': 2, 'denoiser-2': 1, 'decoder-1': 2}
    assert reported == [(name, k + 1) for name, n in steps.items() for k in range(n)]


def test_what_is_done_is_not_trained_again(trained, pictures):
    parts, folder, _ = trained

    def refuse(stage, step, loss, seconds):
        raise AssertionError(f'{stage} was trained again')

    again = train_tiny(folder, SHORT, pictures, refuse)
    for name in NETWORKS:
        pairs = zip(parts[name].parameters(), again[name].parameters())
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)


def toy_run(folder, stop_after=None):
    "A run of four steps with checkpoints every two: (weights, steps that were made)."
    torch.manual_seed(0)
    module, steps = torch.nn.Linear(4, 1), []

    def loss(rng, gen):
        return module(torch.randn(8, 4, generator=gen)).pow(2).mean()

    stage = Stage(4, 0.1, save_every=2)
    for step, *_ in train_stage('toy', {'m': module}, loss, stage, folder):
        steps.append(step)
        if step == stop_after:
            break
    return module.weight.detach(), steps


def test_a_resumed_stage_equals_an_uninterrupted_one(tmp_path):
    whole, _ = toy_run(tmp_path / 'whole')
    toy_run(tmp_path / 'resumed', stop_after=3)
    resumed, steps = toy_run(tmp_path / 'resumed')
    assert steps == [3, 4]
    assert torch.allclose(whole, resumed, atol=1e-7)


def test_a_stage_does_not_go_on_with_other_settings(tmp_path):
    toy_run(tmp_path, stop_after=3)
    module = torch.nn.Linear(4, 1)
    other = train_stage('toy', {'m': module}, None, Stage(4, 0.2), tmp_path)

    with pytest.raises(UserError, match='other settings .*lr=0.1.* delete what is in'):
        next(other)


def test_fresh_weights_leave_the_random_state_alone(tokenizer):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny_models(tokenizer, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    module = torch.nn.Linear(4, 1)

    def loss(rng, gen):
        return module.weight.sum() * float('nan')

    with pytest.raises(FloatingPointError, match='toy: the loss of step 0 is nan'):
        list(train_stage('toy', {'m': module}, loss, Stage(2, 0.1), tmp_path))


# files


def test_the_saved_model_is_loaded_in_single_precision(trained, tmp_path):
    parts, _, _ = trained
    save_tiny(parts, tmp_path)
    pipe = load_pipeline(str(tmp_path), device='cpu')
    assert pipe.unet.dtype == torch.float32
    assert pipe.pipe.text_encoder.dtype == torch.float32
    assert parts['unet'].dtype == torch.float32  # what is in memory is left as it was
    assert len(pipe.decode_latents(torch.randn(2, 4, 8, 8))) == 2
