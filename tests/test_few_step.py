"Few-step sampling: the consistency step, and few-step weights beside the concepts'."

from dataclasses import replace

import pytest
from small_models import TREES, checkpoint, load, loaded, noise, predicted, weights

from diffii.base.consistency import boundary, consistency_step
from diffii.base.files import UserError, save_tensors
from diffii.base.pipeline import model_digest
from diffii.base.seeds import generator
from diffii.base.settings import SamplingSettings, Settings, recommended_classifier
from diffii.evaluation.tasks import few_step
from diffii.method.concepts import LORA_TARGETS, Concepts, ConceptSettings, lora_config
from diffii.method.denoising import two_stage_denoise, visited_steps
from diffii.method.diffusion import ddim_grid, ddim_step
from diffii.method.few_step import FewStep, open_few_step
from diffii.run.folders import RunFolder
from diffii.run.review import remake
from diffii.run.planning import unet_calls
from diffii.run.runs import synthesize

import numpy as np
import torch
from diffusers import LCMScheduler


@pytest.fixture(scope='module')
def pipe():
    "A small SD 1.x with random weights, for these tests alone."
    return load(checkpoint('sd1'), batch_size=4)


def random_lora(pipe, ends=('to_q', 'conv1', 'proj_in'), seed=0, rank=3):
    "A LoRA of random weights on the layers with these ends, in peft's names."
    gen, lora = generator('lora', seed), {}
    for name, layer in pipe.unet.named_modules():
        if name.endswith(ends) and hasattr(layer, 'weight'):
            out, width, *kernel = layer.weight.shape
            down = torch.randn(rank, width, *kernel, generator=gen)
            up = torch.randn(out, rank, *[1 for _ in kernel], generator=gen)
            lora |= {f'{name}.lora_A.weight': down / 5, f'{name}.lora_B.weight': up / 5}
    return lora


@pytest.fixture
def file(pipe, tmp_path):
    "A file of few-step weights for the small model."
    lora = {f'unet.{k}': v for k, v in random_lora(pipe).items()}
    save_tensors(tmp_path / 'few.safetensors', lora)
    return str(tmp_path / 'few.safetensors')


def few_step_settings(file, method='diff-ii', **given):
    "A run of two images for each tree, in three calls of six steps."
    sampling = dict(method=method, few_step=file, calls=3, steps=6, expansion=2)
    concepts = dict(steps=1, rank=2, batch_size=2)
    return Settings.of(sampling=sampling | given, concepts=concepts)


# recommended by a model

ADVICE = dict(
    sampling=dict(
        guidance_scale=2.0, by_metaclass=dict(tree=dict(few_step='own', expansion=20))
    )
)


@pytest.mark.parametrize(
    'given, expected',
    [
        ({}, ('own', 20)),
        (dict(split_ratio=0.5), ('own', 20)),
        (dict(expansion=3), ('own', 3)),
        (dict(method='diff-ii'), ('own', 20)),
        (dict(few_step='none'), (None, 5)),
        (dict(few_step=''), (None, 5)),
        (dict(guidance_scale=3.0), (None, 5)),
        (dict(solver='dpm++', stride=3), (None, 5)),
        (dict(few_step='own', steps=50), ('own', 20)),
        (dict(few_step='none', expansion=10), (None, 10)),
        (dict(method='random-noise', expansion=4), (None, 4)),
    ],
)
def test_recommended_weights_give_way_to_other_sampling(given, expected):
    found = SamplingSettings.of(ADVICE, 'tree', **given)

    assert (found.few_step, found.expansion) == expected
    assert SamplingSettings.of(ADVICE, 'bird', **given).expansion == given.get(
        'expansion', 5
    )


def test_steps_that_a_model_recommends_are_those_of_its_inversion_too():
    advice = dict(inversion=dict(forward_steps=14), sampling=dict(steps=10))

    found = Settings.of(advice, 'bird')

    assert (found.inversion.steps, found.inversion.forward_steps) == (10, 6)
    assert advice['inversion'] == dict(forward_steps=14)


BETTER = ADVICE | dict(classifier=dict(replacement_probability=0.7, flip=True, new=1))


@pytest.mark.parametrize(
    'sampling, expected',
    [
        (dict(few_step='own', expansion=20), dict(replacement_probability=0.7)),
        (dict(few_step='own', expansion=30), dict(replacement_probability=0.7)),
        (dict(few_step='own', expansion=5), {}),
        (dict(few_step=None, expansion=20), {}),
    ],
)
def test_a_classifier_is_recommended_with_the_images_it_is_for(sampling, expected):
    "What the user alone knows, and what this version does not know, are left out."
    assert recommended_classifier(BETTER, 'tree', sampling) == expected


def test_exact_sampling_may_be_recommended_in_words():
    advice = dict(sampling=dict(few_step='none'), classifier=dict(lr=0.05))

    found = recommended_classifier(advice, 'bird', dict(few_step=None, expansion=5))

    assert found == dict(lr=0.05)


def test_the_weights_that_the_shipped_model_recommends_are_there():
    from diffii.base.pipeline import load_pipeline

    pipe = load_pipeline('tiny')
    settings = Settings.of(pipe, 'bird').sampling

    assert settings.few_step == 'own'
    open_few_step(pipe, settings.few_step)


# the step


def test_four_calls_are_those_of_diffusers(pipe):
    timesteps = [ddim_grid(pipe, 25).timesteps[i] for i in (0, 6, 12, 18)]
    scheduler = LCMScheduler.from_config(pipe.pipe.scheduler.config)
    scheduler.set_timesteps(timesteps=timesteps)
    abar = [float(scheduler.alphas_cumprod[t]) for t in timesteps] + [1]

    ours = theirs = noise(2)
    for i, t in enumerate(timesteps):
        eps, fresh = noise(2, 10 + i), noise(2, 20 + i)
        gen = torch.Generator().manual_seed(20 + i)
        theirs = scheduler.step(eps, t, theirs, generator=gen).prev_sample
        ours = consistency_step(ours, eps, t, (abar[i], abar[i + 1]), fresh)

    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def test_at_timestep_0_the_input_is_the_end():
    assert boundary(0) == (1, 0)


def test_without_fresh_noise_a_call_is_a_ddim_step():
    x, eps = noise(2), noise(2, 1)

    ours = consistency_step(x, eps, 500, (0.2, 0.6), share=0)

    torch.testing.assert_close(ours, ddim_step(x, eps, 0.2, 0.6), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('share', (0.0, 0.5, 1.0))
def test_any_share_of_fresh_noise_keeps_the_variance(share):
    eps, fresh = noise(500, 1), noise(500, 2)

    out = consistency_step(0.8**0.5 * eps, eps, 500, (0.2, 0.4), fresh, share)

    assert out.var().item() == pytest.approx(0.6, rel=0.02)


# settings


@pytest.mark.parametrize(
    'calls, start, steps',
    [
        (4, 0, [0, 6, 12, 18]),
        (25, 0, list(range(25))),
        (1, 0, [0]),
        (8, 13, [13, 16, 19, 22]),
        (4, 24, [24]),
    ],
)
def test_calls_are_spread_over_what_is_left_of_the_grid(calls, start, steps):
    settings = SamplingSettings(few_step='x', calls=calls)

    assert visited_steps(settings, start) == steps


@pytest.mark.parametrize(
    'calls, guidance, steps', [(4, 1, [0, 6, 12, 18]), (4, 2, [0, 12]), (2, 1.5, [0])]
)
def test_a_guided_step_takes_two_calls(calls, guidance, steps):
    settings = SamplingSettings(few_step='x', calls=calls, few_step_guidance=guidance)

    assert visited_steps(settings) == steps


@pytest.mark.parametrize('given', [1, 7.5])
def test_guidance_of_exact_sampling_is_not_that_of_few_steps(given):
    settings = SamplingSettings(few_step='x', guidance_scale=given, solver='dpm++')

    assert (settings.guidance_scale, settings.solver) == (1, 'ddim')


@pytest.mark.parametrize(
    'place, calls, guidance, share', [('own', 8, 2, 0), ('lcm.safetensors', 8, 1, 1)]
)
def test_the_models_own_weights_have_defaults_of_their_own(
    place, calls, guidance, share
):
    usual = SamplingSettings(few_step=place)
    other = SamplingSettings(few_step=place, fresh_noise=0.5, few_step_guidance=1.5)

    assert (usual.calls, usual.guidance_scale) == (calls, guidance)
    assert usual.fresh_noise == share
    assert (other.fresh_noise, other.guidance_scale) == (0.5, 1.5)


def test_few_steps_are_not_more_than_the_grid_has():
    assert SamplingSettings(few_step='x', steps=5).calls == 5
    assert SamplingSettings(few_step='own', steps=1).calls == 2


@pytest.mark.parametrize(
    'given, message',
    [
        (dict(calls=4), '--calls: is of few-step sampling; give --few-step too'),
        (dict(fresh_noise=0), '--fresh-noise: is of few-step sampling'),
        (dict(few_step_guidance=2), '--few-step-guidance: is of few-step sampling'),
        (dict(few_step='x', calls=9, steps=8), '--calls 9: more than --steps 8 take'),
        (dict(few_step='own', calls=5), '--calls 5: a guided step takes two; give an'),
        (dict(few_step='own', calls=18, steps=8), 'more than --steps 8 take; give 16'),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        SamplingSettings(**given)


def test_fresh_noise_must_be_given(pipe):
    plain = pipe.encode_prompts(['a tree'] * 2)
    settings = SamplingSettings(few_step='x', calls=3, split_ratio=0)

    with pytest.raises(UserError, match='needs fresh noise'):
        two_stage_denoise(pipe, noise(2), plain, settings=settings)


@pytest.mark.parametrize('calls, guidance', [(2, 1), (4, 2)])
def test_the_first_step_sees_the_suffix_guided_or_not(pipe, calls, guidance):
    plain, suffixed = (pipe.encode_prompts([p] * 2) for p in ('a tree', 'a red tree'))
    empty, grid = pipe.encode_prompts([''] * 2), ddim_grid(pipe, 25)
    settings = SamplingSettings(
        few_step='x',
        calls=calls,
        few_step_guidance=guidance,
        fresh_noise=0,
        split_ratio=0.5,
    )

    ours = two_stage_denoise(pipe, noise(2), plain, suffixed, settings)

    x = noise(2)
    with torch.inference_mode():
        for step, there, prompts in ((0, grid.abar[12], suffixed), (12, 1, plain)):
            t = grid.timesteps[step]
            eps, other = (pipe.predict_eps(x, t, p) for p in (prompts, empty))
            eps = other + guidance * (eps - other)
            x = consistency_step(x, eps, t, (grid.abar[step], there), share=0)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    assert unet_calls(pipe, settings) == calls


# the weights


def test_the_weights_act_as_a_lora_of_peft(pipe):
    from peft import set_peft_model_state_dict

    lora, prompts = random_lora(pipe), ['a tree', 'an elm']

    with FewStep('x', lora).attached(pipe):
        ours = predicted(pipe, prompts)

    fresh = load(checkpoint('sd1'))
    fresh.unet.add_adapter(lora_config(3, lora), adapter_name='x')
    set_peft_model_state_dict(fresh.unet, lora, adapter_name='x')
    theirs = predicted(fresh, prompts)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert (ours - predicted(pipe, prompts)).abs().max() > 0.01


def test_they_stand_beside_the_lora_of_concepts(pipe):
    lora = random_lora(pipe, tuple(LORA_TARGETS), seed=1, rank=2)
    settings = ConceptSettings(n_tokens=0, rank=2)
    base = model_digest(pipe)
    concepts = Concepts(('oak', 'elm'), 'tree', settings, base, [], lora)
    few = FewStep('x', random_lora(pipe))
    layer = 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q'
    before = pipe.unet.get_submodule(layer).weight.clone()

    with concepts.attached(pipe), few.attached(pipe):
        got = pipe.unet.get_submodule(layer).base_layer.weight.clone()

    added = [
        found[f'{layer}.lora_B.weight'] @ found[f'{layer}.lora_A.weight']
        for found in (lora, few.lora)
    ]
    torch.testing.assert_close(got, before + sum(added), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('with_concepts', (False, True))
def test_the_model_is_put_back_to_the_bit(pipe, with_concepts):
    lora = random_lora(pipe, tuple(LORA_TARGETS), seed=1, rank=2)
    settings = ConceptSettings(n_tokens=0, rank=2)
    given = lora if with_concepts else {}
    base = model_digest(pipe)
    concepts = Concepts(('oak', 'elm'), 'tree', settings, base, [], given)

    with concepts.attached(pipe):
        before = predicted(pipe, ['a tree'])
        with FewStep('x', random_lora(pipe)).attached(pipe):
            pass
        assert torch.equal(predicted(pipe, ['a tree']), before)

    theirs = weights(loaded('sd1'))
    assert all(torch.equal(w, theirs[name]) for name, w in weights(pipe).items())


def test_a_file_is_read(pipe, file):
    found = open_few_step(pipe, file)

    assert found.digest() == FewStep('', random_lora(pipe)).digest()


@pytest.mark.parametrize(
    'place, message',
    [
        ('own', '--few-step own: no few_step.safetensors beside'),
        ('no/such-weights', '--few-step no/such-weights: neither a file nor one'),
        ('nothing', '--few-step nothing: neither a file nor one'),
    ],
)
def test_weights_that_are_not_there_are_one_line(pipe, place, message, monkeypatch):
    def no_network(*args):
        raise OSError('no network\nand more')

    monkeypatch.setattr('huggingface_hub.hf_hub_download', no_network)

    with pytest.raises(UserError, match=message) as e:
        open_few_step(pipe, place)

    assert '\n' not in str(e.value)


@pytest.mark.parametrize('other', ('sd2', 'xl'))
def test_weights_of_another_architecture_are_refused(file, other):
    with pytest.raises(UserError, match='does not fit the U-Net of .* give few-step'):
        open_few_step(loaded(other), file)


def test_weights_of_another_model_are_refused(pipe, tmp_path):
    file = tmp_path / 'few.safetensors'
    base = model_digest(pipe).split('-')[0] + '-' + '00' * 64
    save_tensors(file, random_lora(pipe), dict(base=base))

    with pytest.raises(UserError, match='was trained on another model than'):
        open_few_step(pipe, str(file))


def test_a_damaged_file_is_told_by_its_option(pipe, tmp_path):
    (tmp_path / 'few.safetensors').write_bytes(b'no tensors')

    with pytest.raises(UserError, match='--few-step .*few.safetensors: .*') as e:
        open_few_step(pipe, str(tmp_path / 'few.safetensors'))
    assert '--few-step none' in str(e.value)
    assert 'delete' not in str(e.value)


def test_a_folder_without_weights_is_told_by_its_option(pipe, tmp_path):
    with pytest.raises(UserError, match='--few-step .*: no pytorch_lora_weights'):
        open_few_step(pipe, str(tmp_path))


# a run


@pytest.fixture(scope='module')
def made(pipe, tmp_path_factory):
    "A run with few-step weights: the images, and the file of the weights."
    place = tmp_path_factory.mktemp('few')
    save_tensors(place / 'few.safetensors', random_lora(pipe))
    settings = few_step_settings(str(place / 'few.safetensors'))
    return synthesize(pipe, TREES, place / 'out', settings, ['in the rain.'])


def weights_of(made):
    "The file of the weights; rows have its name alone."
    return str(made.folder.parent / made.rows[0]['few_step'])


def test_a_run_says_which_weights_made_its_images(pipe, made):
    row, about = made.rows[0], RunFolder(made.folder).about()

    assert (row['calls'], row['fresh_noise'], row['guidance_scale']) == (3, 1, 1)
    assert row['few_step'] == 'few.safetensors'
    assert about['few_step'] == FewStep('', random_lora(pipe)).digest()


def test_an_image_is_made_again(pipe, made):
    again = remake(pipe, made.folder, made.names[3])

    assert np.array_equal(np.asarray(again), np.asarray(made.open(3)))


def test_fresh_noise_is_each_image_s_own(pipe, made):
    from diffii.method.synthesis import fresh_noise

    rows = list(made.rows[:4])

    alone = fresh_noise(rows[2:3], pipe)

    assert torch.equal(alone[:, 0], fresh_noise(rows, pipe)[:, 2])
    assert not torch.equal(*fresh_noise(rows[:2], pipe).unbind(1))


def test_other_weights_do_not_make_an_image_again(pipe, made):
    file = weights_of(made)
    before = open(file, 'rb').read()
    save_tensors(file, random_lora(pipe, seed=5))

    try:
        with pytest.raises(UserError, match='other weights are there now'):
            remake(pipe, made.folder, made.names[0])
    finally:
        with open(file, 'wb') as f:
            f.write(before)


def test_a_folder_goes_on_with_the_same_weights_alone(pipe, made):
    other = few_step_settings(weights_of(made), calls=2)

    with pytest.raises(UserError, match='calls: 3 then, 2 now'):
        synthesize(pipe, TREES, made.folder, other, ['in the rain.'])


def test_nothing_is_written_where_the_weights_do_not_fit(made, tmp_path):
    settings = few_step_settings(weights_of(made))

    with pytest.raises(UserError, match='--few-step .* does not fit the U-Net'):
        synthesize(loaded('sd2'), TREES, tmp_path / 'out', settings, ['in the rain.'])

    assert not (tmp_path / 'out').exists()


def test_methods_that_start_from_images_take_few_steps_too(pipe, file, tmp_path):
    settings = few_step_settings(file, 'da-fusion')

    found = synthesize(pipe, TREES, tmp_path / 'out', settings, [])

    assert len(found) == 8
    assert {row['start'] for row in found.rows} == {'image'}


def test_rows_of_earlier_versions_have_no_few_steps(made):
    from diffii.method.synthesis import settings_of

    new = ('few_step', 'calls', 'fresh_noise')
    row = {k: v for k, v in made.rows[0].items() if k not in new}

    assert settings_of(row) == replace(
        settings_of(made.rows[0]), **dict.fromkeys((*new, 'few_step_guidance'))
    )


@pytest.mark.parametrize('guidance', [1.0, 2.0])
def test_a_row_says_how_its_few_steps_were_guided(made, guidance):
    from diffii.method.synthesis import settings_of

    row = made.rows[0] | dict(few_step='own', calls=4, guidance_scale=guidance)

    assert settings_of(row).guidance_scale == guidance


# experiments


def test_an_experiment_compares_numbers_of_calls():
    found = few_step(calls=(4.0, 8.0))

    assert [c.name for c in found[2:]] == ['few-step, 4 calls', 'few-step, 8 calls']
    assert [SamplingSettings(**c.sampling).calls for c in found[1:]] == [None, 4, 8]
