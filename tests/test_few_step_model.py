"The few-step model: its lessons, its losses, and a training that goes on."

from dataclasses import replace
from itertools import islice

import pytest

from diffii.base.files import UserError, load_tensors, save_tensors
from diffii.base.pipeline import load_pipeline
from diffii.data.few_step_model import (
    ADAPTER,
    Distillation,
    Points,
    averaged,
    distil,
    encode_lessons,
    huber_loss,
    kept_trajectories,
    save_few_step,
    student_lora,
    teacher,
    teacher_step,
)
from diffii.data.tiny_model import Stage, base_pictures
from diffii.method.diffusion import ddim_grid, ddim_step
from diffii.method.few_step import open_few_step

import torch

LEG = dict(steps=3, lr=1e-2, batch_size=2, save_every=1, digits=0.5)
SHORT = Distillation(
    rank=2, shards=1, shard=2, ends=Stage(**LEG), stage=Stage(**LEG, seed=1)
)


@pytest.fixture
def pipe():
    "The shipped model, for one test alone."
    return load_pipeline('tiny', device='cpu')


@pytest.fixture(scope='module')
def lessons():
    return encode_lessons(load_pipeline('tiny', device='cpu'), base_pictures(6, 6, 2))


@pytest.fixture(scope='module')
def work(lessons, tmp_path_factory):
    "A folder in which a short training came to its end."
    folder = tmp_path_factory.mktemp('work')
    pipe = load_pipeline('tiny', device='cpu')
    list(distil(pipe, lessons, folder, SHORT))
    return folder


def lora_of(pipe):
    "The weights of the LoRA."
    return [p.detach().clone() for k, p in pipe.unet.named_parameters() if 'lora_' in k]


@pytest.mark.parametrize('gap, loss', [(1e-5, 5e-8), (1.0, 0.999)])
def test_the_loss_is_squared_near_zero_and_absolute_above(gap, loss):
    a = torch.zeros(10, dtype=torch.float64)

    assert huber_loss(a, a + gap, 1e-3).item() == pytest.approx(loss, rel=1e-2)


def test_lessons_are_latents_and_captions(lessons):
    assert lessons.latents.shape == (12, 4, 8, 8)
    assert lessons.ids.shape == (12, 2, 40)


def test_a_lora_at_its_start_changes_nothing(pipe):
    cond, x = pipe.encode_prompts(['a photo of a bird']), torch.ones(1, 4, 8, 8)
    before = pipe.predict_eps(x, 500, cond)

    student_lora(pipe, 2)

    assert torch.equal(pipe.predict_eps(x, 500, cond), before)


def test_the_teacher_is_without_the_lora(pipe):
    cond, x = pipe.encode_prompts(['a photo of a bird']), torch.ones(1, 4, 8, 8)
    with torch.inference_mode():
        before = pipe.predict_eps(x, 500, cond)
        for p in student_lora(pipe, 2):
            p.data += 0.1

        with teacher(pipe):
            inside = pipe.predict_eps(x, 500, cond)

        assert torch.equal(inside, before)
        assert not torch.equal(pipe.predict_eps(x, 500, cond), before)


def test_the_teacher_steps_along_the_grid_of_sampling(pipe):
    cond, negative = (pipe.encode_prompts([p] * 2) for p in ('a photo of a bird', ''))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    student_lora(pipe, 2)
    grid, scale = ddim_grid(pipe, 25), torch.full((2, 1, 1, 1), 2.0)

    points = Points(x, torch.full((2,), 961), cond)
    for _ in range(25):
        points = teacher_step(pipe, points, negative, scale, 40)

    with torch.inference_mode():
        for t, here, there in zip(grid.timesteps, grid.abar, grid.abar[1:]):
            x = ddim_step(
                x, pipe.predict_guided(x, t, cond, negative, 2.0), here, there
            )
    assert points.t.tolist() == [0, 0]
    torch.testing.assert_close(points.x, x, atol=1e-3, rtol=1e-3)


def test_trajectories_are_kept_and_not_made_again(pipe, lessons, work, monkeypatch):
    monkeypatch.setattr('diffii.data.few_step_model.teacher_trajectories', None)

    kept = kept_trajectories(pipe, lessons, SHORT, work)

    assert kept['film'].shape == (13, 2, 4, 8, 8)
    assert kept['ends'].shape == (2, 4, 8, 8)


@pytest.mark.parametrize('change', [dict(guidance=(3.0, 4.0)), dict(shard=3)])
def test_trajectories_of_other_settings_are_refused(pipe, lessons, work, change):
    with pytest.raises(UserError, match='trajectories-00.*other settings; delete'):
        kept_trajectories(pipe, lessons, replace(SHORT, **change), work)


def test_trajectories_of_an_older_version_are_told_by_their_shape(
    pipe, lessons, work, tmp_path
):
    name = 'trajectories-00.safetensors'
    tensors, _ = load_tensors(work / name)
    save_tensors(tmp_path / name, tensors)

    kept_trajectories(pipe, lessons, SHORT, tmp_path)

    with pytest.raises(UserError, match='other settings'):
        kept_trajectories(pipe, lessons, replace(SHORT, leap=160), tmp_path)


def test_a_new_lora_leaves_the_random_state_alone(pipe):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    student_lora(pipe, 2, seed=7)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_training_that_was_stopped_goes_on_to_the_same_weights(
    pipe, lessons, work, tmp_path
):
    list(islice(distil(pipe, lessons, tmp_path, SHORT), 4))  # in the second leg

    fresh = load_pipeline('tiny', device='cpu')
    steps = [step for _, step, *_ in distil(fresh, lessons, tmp_path, SHORT)]

    done = load_pipeline('tiny', device='cpu')
    assert not list(distil(done, lessons, work, SHORT))
    assert steps == [2, 3]
    for a, b in zip(lora_of(fresh), lora_of(done), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_the_file_holds_the_averaged_weights_and_their_history(work, tmp_path):
    file = tmp_path / 'few_step.safetensors'

    save_few_step(work, file, SHORT)

    found = open_few_step(load_pipeline('tiny', device='cpu'), str(file))
    trained = load_pipeline('tiny', device='cpu')
    student_lora(trained, 2)
    about = averaged(trained, work)
    own = {k: p for k, p in trained.unet.named_parameters() if 'lora_' in k}
    for name, weight in found.lora.items():
        layer, _, end = name.partition('.lora_')
        p = own[f'{layer}.lora_{end[0]}.{ADAPTER}.weight']
        torch.testing.assert_close(weight, p, atol=1e-3, rtol=1e-3)
    assert [about[leg]['step'] for leg in about] == [3, 3]


def test_diffusers_reads_the_file(pipe, work, tmp_path):
    save_few_step(work, tmp_path / 'few_step.safetensors', SHORT)
    cond, x = pipe.encode_prompts(['a photo of a bird']), torch.ones(1, 4, 8, 8)
    with open_few_step(pipe, str(tmp_path / 'few_step.safetensors')).attached(pipe):
        ours = pipe.predict_eps(x, 500, cond)

    pipe.pipe.load_lora_weights(tmp_path, weight_name='few_step.safetensors')

    torch.testing.assert_close(
        pipe.predict_eps(x, 500, cond), ours, atol=1e-4, rtol=1e-3
    )


def test_a_checkpoint_says_how_far_it_is(work):
    for leg in ('ends', 'consistency'):
        _, about = load_tensors(work / f'{leg}.safetensors')
        assert about['step'] == len(about['log']) == 3
