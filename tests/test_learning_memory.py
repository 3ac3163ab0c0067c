"Concept learning in little memory and in half precision, and its losses."

import warnings
from dataclasses import asdict, replace

import pytest
import small_models as models
from accelerate.optimizer import AcceleratedOptimizer
from small_models import TREES

from diffii.base.files import UserError, load_tensors, save_tensors
from diffii.base.memory import kept_for_backward
from diffii.base.processes import training_accelerator
from diffii.base.settings import ConceptSettings
from diffii.method.learning import (
    ConceptLearner,
    ConceptTraining,
    learn_concepts,
    recompute,
    snr_weights,
)

import torch
from diffusers.training_utils import compute_snr

FULL = 'memory ran out in concept learning'


def learned(pipe, **given):
    "Concepts of three steps on the small images of trees."
    return learn_concepts(pipe, TREES, models.short_learning(**given))


@pytest.fixture
def in_training():
    "A function that puts concepts into training on a small model of a kind."
    blocks = []

    def begin(kind='sd1', **given):
        pipe = models.load(models.checkpoint(kind))
        acc = training_accelerator(pipe.device, pipe.dtype, {})
        settings = models.short_learning(**given)
        training = ConceptTraining(pipe, TREES, settings, 0, acc)
        blocks.append(training.on_model())
        blocks[-1].__enter__()
        training.begin()
        return training

    yield begin
    for block in blocks:
        block.__exit__(None, None, None)


# ---- the same step in less memory


@pytest.mark.parametrize('kind', ('sd1', 'xl'))
@pytest.mark.parametrize(
    'memory',
    (dict(micro_batch=1), dict(micro_batch=3), dict(checkpointing=True)),
    ids=('one by one', 'uneven parts', 'checkpointing'),
)
def test_less_memory_is_the_same_step_to_rounding(in_training, kind, memory):
    whole, less = in_training(kind), in_training(kind, **memory)

    losses = [t.step() for t in (whole, less)]

    gradients = [t.optimizer.state_dict()['state'] for t in (whole, less)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for mine, theirs in zip(*(g.values() for g in gradients)):
        torch.testing.assert_close(
            mine['exp_avg'], theirs['exp_avg'], rtol=1e-3, atol=1e-7
        )


def test_checkpointing_keeps_less_of_unet_and_text_encoders(in_training):
    training = in_training('sd1')
    pipe, batch = training.pipe, training.batches.draw(0)
    weights = [*pipe.unet.parameters(), *training.learner.encoders.parameters()]
    ids = training.learner.ids

    def kept():
        step = kept_for_backward(lambda: training.learner(*batch), weights)
        prompts = kept_for_backward(lambda: pipe.encode_ids(ids), weights)
        return step, prompts

    step, prompts = kept()
    recompute(pipe, True)
    less_step, less_prompts = kept()

    assert less_step < 0.7 * step
    assert less_prompts < 0.7 * prompts


def test_the_model_keeps_activations_again_afterwards():
    pipe = models.load(models.checkpoint('sd1'))

    learned(pipe, checkpointing=True)

    networks = [*pipe.unet.modules(), *pipe.pipe.text_encoder.modules()]
    assert not any(getattr(m, 'gradient_checkpointing', False) for m in networks)
    assert not any(m.training for m in networks)


# ---- where memory runs out


def limit(monkeypatch, pipe, fits):
    "A U-Net that has memory for a call where `fits(images, checkpointing)`."
    forward, tried = pipe.unet.forward, []

    def limited(x, *args, **kwargs):
        on = any(getattr(m, 'gradient_checkpointing', 0) for m in pipe.unet.modules())
        tried.append((len(x), on))
        if not fits(len(x), on):
            raise torch.cuda.OutOfMemoryError
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, 'forward', limited)
    return tried


def test_checkpointing_turns_itself_on(monkeypatch):
    pipe = models.load(models.checkpoint('sd1'))
    whole = learned(models.load(models.checkpoint('sd1')))
    tried = limit(monkeypatch, pipe, lambda images, on: on)

    with pytest.warns(UserWarning, match=f'{FULL}; .*--checkpointing') as caught:
        got = learned(pipe)

    assert len(caught) == 1
    assert tried == [(4, False)] + [(4, True)] * 3
    assert got.log == pytest.approx(whole.log, rel=1e-3)


def test_then_a_step_is_made_in_parts(monkeypatch):
    pipe = models.load(models.checkpoint('sd1'))
    whole = learned(models.load(models.checkpoint('sd1')))
    tried = limit(monkeypatch, pipe, lambda images, on: images == 1)

    with pytest.warns(UserWarning, match=f'{FULL}; 1 images at a time.*micro-batch'):
        got = learned(pipe)

    assert tried[:3] == [(4, False), (4, True), (2, True)]
    assert tried[3:] == [(1, True)] * 12
    assert got.log == pytest.approx(whole.log, rel=1e-3)


def test_memory_that_is_full_in_the_backward_pass_spoils_no_step(in_training):
    "A part has left its gradient before the next one finds no memory."
    training, whole = in_training(micro_batch=2, checkpointing=True), in_training()
    backward, calls = training.accelerator.backward, []

    def second_fails(loss):
        calls.append(loss)
        if len(calls) == 2:
            raise torch.cuda.OutOfMemoryError
        backward(loss)

    training.accelerator.backward = second_fails
    with pytest.warns(UserWarning, match=FULL):
        training._gradients(training.batches.draw(0))
    whole._gradients(whole.batches.draw(0))

    for mine, theirs in zip(training.parameters, whole.parameters):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


def test_what_was_given_is_not_tried_without():
    pipe = models.load(models.checkpoint('sd1'))

    with warnings.catch_warnings():
        warnings.simplefilter('error')
        learned(pipe, micro_batch=1, checkpointing=True)


def test_no_memory_for_one_image_is_an_error(monkeypatch):
    pipe = models.load(models.checkpoint('sd1'))
    limit(monkeypatch, pipe, lambda images, on: False)

    with (
        pytest.warns(UserWarning, match=FULL),
        pytest.raises(UserError, match='--concept-batch 4: .* one image .*--dtype'),
    ):
        learned(pipe)


# ---- a run goes on with other settings of memory


def test_memory_is_no_part_of_what_concepts_are():
    one, other = ConceptSettings(), ConceptSettings(micro_batch=1, checkpointing=True)

    assert one.deciding() == other.deciding()
    assert one.deciding() != ConceptSettings(rank=3).deciding()


def test_a_checkpoint_goes_on_in_less_memory(tmp_path):
    pipe = models.load(models.checkpoint('sd1'))
    settings = models.short_learning(save_every=1)
    whole = learn_concepts(pipe, TREES, settings)

    def stop(step, steps, loss):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_concepts(pipe, TREES, settings, folder=tmp_path, progress=stop)
    settings = replace(settings, micro_batch=1)
    got = learn_concepts(pipe, TREES, settings, folder=tmp_path)
    again = learn_concepts(
        pipe, TREES, replace(settings, micro_batch=2), folder=tmp_path
    )

    assert got.log[0] == whole.log[0]
    assert got.log == pytest.approx(whole.log, rel=1e-3)
    assert again.digest() == got.digest()


# ---- float16


def skipping(monkeypatch, which):
    "An optimizer that skips these calls, as where gradients of float16 overflow."
    step, calls = AcceleratedOptimizer.step, []

    def some_steps(self, closure=None):
        calls.append(self)
        self._is_overflow = len(calls) in which
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, 'step', some_steps)


def test_the_rate_waits_where_a_step_was_skipped(in_training, monkeypatch):
    skipping(monkeypatch, {1})
    falling = dict(lr_schedule='linear', steps=4, lr=1e-2)
    training = in_training(**falling)
    before = [p.detach().clone() for p in training.parameters]

    training.step()
    unmoved = [torch.equal(p, q) for p, q in zip(before, training.parameters)]
    rates = [training.schedule.get_last_lr()[-1]]
    training.step()
    rates.append(training.schedule.get_last_lr()[-1])

    assert all(unmoved)
    assert rates == pytest.approx([1e-2, 0.75e-2])
    assert (training.done, training.skipped) == (2, 1)


class Scaler:
    "What a checkpoint asks of a scaler."

    def __init__(self, scale):
        self.scale = scale

    def state_dict(self):
        return dict(scale=self.scale)

    def load_state_dict(self, state):
        self.scale = state['scale']


def test_a_checkpoint_keeps_skipped_steps_and_the_scale(
    in_training, monkeypatch, tmp_path
):
    skipping(monkeypatch, {2})
    falling = dict(lr_schedule='linear', steps=4)
    first, second = in_training(**falling), in_training(**falling)
    first.step()
    first.step()
    first.accelerator.scaler = Scaler(1024.0)
    first.write_checkpoint(tmp_path / 'c.safetensors')
    second.accelerator.scaler = Scaler(65536.0)

    second.begin(tmp_path / 'c.safetensors')

    assert (second.done, second.skipped) == (2, 1)
    assert second.accelerator.scaler.scale == 1024.0
    assert second.schedule.get_last_lr() == first.schedule.get_last_lr()


def test_a_checkpoint_of_an_older_version_goes_on(in_training, tmp_path):
    "Which knew neither of skipped steps nor of the newer settings."
    training, file = in_training(), tmp_path / 'c.safetensors'
    training.step()
    training.write_checkpoint(file)
    tensors, about = load_tensors(file)
    for name in ('micro_batch', 'checkpointing', 'snr_gamma', 'size_ids'):
        del about['settings'][name]
    del about['skipped']
    save_tensors(file, tensors, about)
    training.begin(file)

    assert (training.done, training.skipped) == (1, 0)


# ---- the loss


def loss_of(training, **settings):
    "The loss of the first batch, and the batch."
    learner, batch = training.learner, training.batches.draw(0)
    changed = replace(training.concepts.settings, **settings)
    learner = ConceptLearner(training.pipe, ['a tree', 'a tall tree'], changed)
    with torch.inference_mode():
        return learner(*batch), batch


def outputs(training, batch):
    "What the U-Net says of the noised latents of a batch."
    pipe, (x0, labels, noise, t, _) = training.pipe, batch
    x_t = pipe.pipe.scheduler.add_noise(x0, noise, t)
    with torch.inference_mode():
        cond = pipe.encode_ids(pipe.tokenize(['a tree', 'a tall tree']))[labels]
        return pipe.unet_output(x_t, t, cond)


def test_a_model_of_velocities_learns_on_velocities(in_training):
    training = in_training('sd2-v')

    loss, batch = loss_of(training)

    x0, _, noise, t, _ = batch
    target = training.pipe.pipe.scheduler.get_velocity(x0, noise, t)
    theirs = (outputs(training, batch) - target).square().mean()
    torch.testing.assert_close(loss, theirs)


def test_a_model_of_noise_learns_on_noise(in_training):
    training = in_training('sd2')

    loss, batch = loss_of(training)

    theirs = (outputs(training, batch) - batch[2]).square().mean()
    torch.testing.assert_close(loss, theirs)


@pytest.mark.parametrize('kind', ('sd2', 'sd2-v'))
def test_min_snr_weighs_each_image_as_diffusers_scripts_do(in_training, kind):
    training = in_training(kind)
    scheduler = training.pipe.pipe.scheduler

    loss, batch = loss_of(training, snr_gamma=2.0)

    x0, _, noise, t, _ = batch
    snr = compute_snr(scheduler, t)
    weights = snr.clamp(max=2.0) / (snr + 1 if kind == 'sd2-v' else snr)
    target = scheduler.get_velocity(x0, noise, t) if kind == 'sd2-v' else noise
    squares = (outputs(training, batch) - target).square().mean((1, 2, 3))
    torch.testing.assert_close(loss, (weights * squares).mean())


def test_pure_noise_has_a_finite_weight():
    pure = torch.tensor([0.0])

    assert snr_weights(pure, 5.0).item() == 1
    assert snr_weights(pure, 5.0, velocity=True).item() == 0


# ---- sizes that SDXL is told


@pytest.mark.parametrize(
    'size, ids',
    (
        ((16, 16), [16, 16, 0, 0, 16, 16]),
        ((64, 32), [32, 64, 0, 8, 16, 16]),  # twice as wide: 8 pixels cut on the left
        ((8, 24), [24, 8, 16, 0, 16, 16]),  # smaller than the model's: enlarged first
    ),
)
def test_sizes_are_those_of_the_image_and_of_its_crop(size, ids):
    assert models.loaded('xl').size_ids(size) == ids


@pytest.mark.parametrize(
    'size_ids, told', (('image', [40, 80, 0, 8]), ('model', [16, 16, 0, 0]))
)
def test_sdxl_is_told_of_the_image_in_learning(monkeypatch, size_ids, told):
    pipe, seen = models.load(models.checkpoint('xl')), []
    forward = pipe.unet.forward

    def watched(*args, added_cond_kwargs=None, **kwargs):
        seen.extend(added_cond_kwargs['time_ids'].tolist())
        return forward(*args, added_cond_kwargs=added_cond_kwargs, **kwargs)

    monkeypatch.setattr(pipe.unet, 'forward', watched)
    wide = replace(TREES, images=tuple(im.resize((80, 40)) for im in TREES.images))
    settings = models.short_learning(steps=1, size_ids=size_ids)
    learn_concepts(pipe, wide, settings)

    assert seen == [[*told, 16, 16]] * 4


def test_settings_of_an_older_file_are_read():
    old = asdict(ConceptSettings(rank=3))
    for name in ('micro_batch', 'checkpointing', 'snr_gamma', 'size_ids'):
        del old[name]

    assert ConceptSettings(**old) == ConceptSettings(rank=3)
