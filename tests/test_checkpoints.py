"""Checkpoints that people have: SD 1.x, SD 2.x and SDXL in the hub's layout, in 32 and
16 bits, with variants, old names and a safety checker."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import small_models as models
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_models import KINDS, TREES

from diffii.base.files import UserError
from diffii.base.pipeline import Pipeline, model_digest, same_model
from diffii.base.settings import InversionSettings, SamplingSettings
from diffii.method.learning import learn_concepts, sample_row, start_embeddings
from diffii.method.denoising import two_stage_denoise
from diffii.method.inversion import invert_images

# ---- from images to images, with every kind of model in every precision


@pytest.fixture(
    scope='module',
    params=[(k, d) for k in KINDS for d in ('float32', 'bfloat16', 'float16')],
    ids='-'.join,
)
def learned(request):
    "A pipeline, its weights before concepts were learned on it, and the concepts."
    kind, dtype = request.param
    pipe = models.load(models.checkpoint(kind), dtype=dtype)
    before = models.weights(pipe)
    concepts = learn_concepts(pipe, TREES, models.short_learning(n_tokens=2))
    return SimpleNamespace(
        kind=kind, dtype=dtype, pipe=pipe, before=before, concepts=concepts
    )


def test_loading_keeps_to_precision_and_size(learned):
    pipe, dtype = learned.pipe, getattr(torch, learned.dtype)

    assert (pipe.size, pipe.dtype, pipe.latent_shape) == (16, dtype, (4, 8, 8))
    # the autoencoder of SDXL overflows in half precision
    assert pipe.vae.dtype == (torch.float32 if learned.kind == 'xl' else dtype)
    assert not list(models.checkpoint(learned.kind).rglob('*.bin'))


def test_learning_leaves_the_model_as_it_was(learned):
    after = models.weights(learned.pipe)

    assert learned.before.keys() == after.keys()
    assert all(torch.equal(v, after[k]) for k, v in learned.before.items())


def test_every_vector_of_every_text_encoder_is_learned(learned):
    pipe, got = learned.pipe, learned.concepts
    encoders = 2 if learned.kind == 'xl' else 1
    starts = start_embeddings(pipe, 4, got.settings, 'tree', 0)

    assert len(got.embeddings) == len(pipe.text_parts) == encoders
    assert np.isfinite(got.log).all()
    for embeddings, start in zip(got.embeddings, starts):
        assert embeddings.isfinite().all()
        assert ((embeddings - start).abs().amax(1) > 0).all()
    assert all(v.abs().sum() > 0 for v in got.lora.values())


def test_what_is_trained_stays_in_32_bits(learned):
    got, pipe = learned.concepts, learned.pipe

    kept = [*got.embeddings, *got.lora.values()]
    with got.attached(pipe):
        attached = [
            p
            for network in (pipe.unet, pipe.pipe.text_encoder)
            for name, p in network.named_parameters()
            if 'lora_' in name or 'extra' in name
        ]

    assert attached
    assert {v.dtype for v in [*kept, *attached]} == {torch.float32}


def test_a_tracker_gets_one_picture_for_each_prompt(learned):
    got = learned.concepts

    with got.attached(learned.pipe):
        row = sample_row(learned.pipe, [got.prompt(0), got.prompt(1)])

    assert row.shape == (16, 32, 3)


# a random network's inversions are not Gaussian, which is said
@pytest.mark.filterwarnings('ignore')
def test_images_are_inverted_denoised_and_decoded(learned):
    pipe, got = learned.pipe, learned.concepts
    with got.attached(pipe):
        inversion = InversionSettings.of(pipe, steps=10)
        latents = torch.cat(invert_images(pipe, TREES, got, inversion).latents)
        prompts = [got.prompt(k) for k in TREES.labels]
        suffixed = [got.prompt(k, 'in the rain.') for k in TREES.labels]
        denoised = two_stage_denoise(
            pipe,
            latents,
            pipe.encode_prompts(prompts),
            pipe.encode_prompts(suffixed),
            SamplingSettings(split_ratio=0.3, guidance_scale=3, steps=10),
        )
        images = pipe.decode_latents(denoised)

    assert latents.shape == denoised.shape == (4, 4, 8, 8)
    assert latents.dtype == torch.float32
    assert denoised.isfinite().all()
    assert {im.size for im in images} == {(16, 16)}
    assert np.std([np.asarray(im) for im in images]) > 0


# ---- the same as diffusers


@pytest.mark.parametrize('kind', KINDS)
def test_denoising_is_that_of_diffusers(kind):
    from diffusers import DDIMScheduler

    pipe = models.load(models.checkpoint(kind))
    prompts = ['a photo of a bird'] * 2
    ours = two_stage_denoise(
        pipe,
        models.noise(),
        pipe.encode_prompts(prompts),
        settings=SamplingSettings(split_ratio=0, guidance_scale=5, steps=10),
    )

    config = pipe.pipe.scheduler.config
    pipe.pipe.scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    theirs = pipe.pipe(
        prompts,
        latents=models.noise(),
        guidance_scale=5.0,
        num_inference_steps=10,
        output_type='latent',
        height=16,
        width=16,
    ).images

    assert kind != 'xl' or config['set_alpha_to_one'] is False
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_a_velocity_becomes_noise():
    pipe = models.loaded('sd2-v')
    x, t = models.noise(), 500
    with torch.inference_mode():
        cond = pipe.encode_prompts(['a bird', 'a digit'])
        velocity = pipe.unet(x, t, cond.embeds).sample
        ours = pipe.predict_eps(x, t, cond)

    scheduler = pipe.pipe.scheduler
    scheduler.set_timesteps(25)
    x0 = scheduler.step(velocity, t, x).pred_original_sample
    abar = pipe.abar()[t].float()
    theirs = (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_sdxl_encodes_prompts_as_diffusers():
    "The empty prompt is zeros, as the configuration says."
    pipe = models.loaded('xl')
    prompt = 'a photo of a bird in the rain.'
    with torch.inference_mode():
        embeds, none, pooled, none_pooled = pipe.pipe.encode_prompt(
            prompt, device='cpu'
        )

    ours = pipe.encode_prompts([prompt, ''])

    torch.testing.assert_close(ours.embeds, torch.cat([embeds, none]))
    torch.testing.assert_close(ours.pooled, torch.cat([pooled, none_pooled]))
    assert ours.embeds[1].count_nonzero() == ours.pooled[1].count_nonzero() == 0


def test_sdxl_reads_the_prompt_to_its_end_with_learned_tokens():
    "Their ids are larger than the end's, where published configurations look for it."
    pipe = models.load(models.checkpoint('xl'))
    got = learn_concepts(pipe, TREES, models.short_learning())
    prompts = [got.prompt(0), got.prompt(0, 'in the rain.'), got.prompt(1)]

    with got.attached(pipe):
        plain, suffixed, other = pipe.encode_prompts(prompts).pooled

    assert (plain - suffixed).abs().max() > 1e-4
    assert (plain - other).abs().max() > 1e-6


# ---- which model it is


def test_one_model_in_every_precision():
    full, bfloat16, float16 = (
        model_digest(models.loaded('sd1', dtype))
        for dtype in ('float32', 'bfloat16', 'float16')
    )

    assert same_model(full, float16)
    assert same_model(bfloat16, float16)
    assert same_model(full, model_digest(models.load(models.checkpoint('sd1'))))


def test_concepts_serve_in_another_precision_and_not_on_another_model(tmp_path):
    full, half = (
        models.load(models.checkpoint('sd1'), dtype=dtype)
        for dtype in ('float32', 'bfloat16')
    )
    other = models.load(models.build(tmp_path / 'other', 'sd1', seed=1))
    got = learn_concepts(full, TREES, models.short_learning())

    in_half, in_full = (models.predicted_with(got, pipe) for pipe in (half, full))

    torch.testing.assert_close(in_half, in_full, atol=0.1, rtol=0.1)
    with pytest.raises(UserError, match='another model'):
        got.attach(other)


# ---- files


def test_a_model_that_predicts_the_sample_is_refused(tmp_path):
    folder = models.build(tmp_path / 's', 'sd2', prediction_type='sample')

    with pytest.raises(UserError, match="prediction_type 'sample' has no noise"):
        models.load(folder)


def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    (tmp_path / 'model_index.json').write_text('{"_class_name": "FluxPipeline"}')

    with pytest.raises(UserError, match='a FluxPipeline; give a Stable Diffusion'):
        models.load(tmp_path)


def test_weights_that_break_off_are_named(tmp_path):
    folder = shutil.copytree(models.checkpoint('sd1'), tmp_path / 'cut')
    file = folder / 'text_encoder' / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:5000])

    with pytest.raises(UserError, match=f'--model {folder}: '):
        models.load(folder)


@pytest.fixture(scope='module')
def variant(tmp_path_factory):
    "A folder whose weights are there in the variant fp16 only."
    return models.build(tmp_path_factory.mktemp('fp16'), 'sd2', variant='fp16')


@pytest.mark.parametrize('asked', (None, 'bf16'))
def test_the_only_variant_is_named(variant, asked):
    names = {file.name for file in variant.rglob('*.safetensors')}
    model, diffusion_model = 'model', 'diffusion_pytorch_model'
    expected = {f'{name}.fp16.safetensors' for name in (model, diffusion_model)}
    assert names == expected

    with pytest.raises(UserError, match='give --variant fp16'):
        models.load(variant, variant=asked)


@pytest.mark.parametrize('dtype', ('float16', 'float32'))
def test_a_variant_is_read_in_the_precision_asked_for(variant, dtype):
    stored = load_file(variant / 'unet' / 'diffusion_pytorch_model.fp16.safetensors')

    pipe = models.load(variant, variant='fp16', dtype=dtype)

    for name, value in pipe.unet.state_dict().items():
        assert value.dtype == getattr(torch, dtype)
        assert torch.equal(value, stored[name].to(value.dtype))


def rename(file, new_name, position_ids):
    "Give the tensors of a file other names, and add the one that old files had."
    tensors = {new_name(k): v.clone() for k, v in load_file(file).items()}
    tensors[position_ids] = torch.arange(77)[None]
    file.unlink()
    save_file(tensors, file, metadata={'format': 'pt'})


def old_text_name(name):
    return 'text_model.' + name.removeprefix('text_model.')


def old_checker_name(name):
    if not name.startswith('vision_model.'):
        return name
    rest = name.removeprefix('vision_model.').removeprefix('vision_model.')
    return 'vision_model.vision_model.' + rest


OLD_PREPROCESSOR = dict(
    crop_size=30,
    do_center_crop=True,
    do_convert_rgb=True,
    do_normalize=True,
    do_resize=True,
    feature_extractor_type='CLIPFeatureExtractor',
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
    resample=3,
    size=30,
)


@pytest.fixture
def old_names(tmp_path):
    "SD 1.x with the layer and class names of its time, and the weights it has."
    folder = models.build(tmp_path / 'old', 'sd1', checker=models.small_checker())
    weights = models.weights(models.load(folder, safety_checker=True))
    rename(
        folder / 'text_encoder' / 'model.safetensors',
        old_text_name,
        'text_model.embeddings.position_ids',
    )
    rename(
        folder / 'safety_checker' / 'model.safetensors',
        old_checker_name,
        'vision_model.vision_model.embeddings.position_ids',
    )
    index = json.loads((folder / 'model_index.json').read_text())
    index['feature_extractor'] = ['transformers', 'CLIPFeatureExtractor']
    (folder / 'model_index.json').write_text(json.dumps(index))
    shutil.rmtree(folder / 'feature_extractor')
    (folder / 'feature_extractor').mkdir()
    file = folder / 'feature_extractor' / 'preprocessor_config.json'
    file.write_text(json.dumps(OLD_PREPROCESSOR))
    return folder, weights


def test_names_of_older_libraries_are_read(old_names):
    folder, expected = old_names

    for checker in (False, True):
        pipe = models.load(folder, safety_checker=checker)
        got = models.weights(pipe)
        assert all(torch.equal(v, expected[k]) for k, v in got.items())

    assert pipe.flagged([TREES.open(0)]) == [False]


# ---- the safety checker


@pytest.mark.parametrize('kind', ('sd2', 'xl'))
def test_a_checkpoint_without_a_checker_says_so(kind):
    with pytest.raises(UserError, match='has no safety checker'):
        models.load(models.checkpoint(kind), safety_checker=True)


@pytest.fixture(scope='module')
def guarded(tmp_path_factory):
    "The folder of a model that has a safety checker."
    folder = tmp_path_factory.mktemp('guarded')
    return models.build(folder, 'sd1', checker=models.small_checker())


def test_the_checker_is_left_out_unless_asked_for(guarded):
    pipe = models.load(guarded)

    assert pipe.pipe.safety_checker is None
    with pytest.raises(UserError, match='safety_checker=True'):
        pipe.flagged([])


def flag(pipe, image, not_this):
    "Make the checker flag one image, and not another."
    checker, extractor = pipe.pipe.safety_checker, pipe.pipe.feature_extractor

    def direction(image):
        pixels = extractor(image, return_tensors='pt').pixel_values.to(pipe.dtype)
        states = checker.vision_model(pixels)[1]
        return torch.nn.functional.normalize(checker.visual_projection(states))[0]

    with torch.no_grad():
        checker.concept_embeds[5] = direction(image) - direction(not_this)
        checker.concept_embeds_weights[5] = 0.0


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_images_in_an_unwanted_direction_are_flagged(guarded, dtype):
    pipe = models.load(guarded, safety_checker=True, dtype=dtype, batch_size=2)
    bad, good = TREES.open(0), Image.new('RGB', (16, 16))
    flag(pipe, bad, not_this=good)

    flags = pipe.flagged([good, bad, good, bad, bad])

    assert flags == [False, True, False, True, True]
    assert bad == TREES.open(0)  # not turned black


# ---- true size


@pytest.mark.skipif(
    not os.environ.get('DIFFII_WIDE_TEST'),
    reason='builds a U-Net of 860 million parameters; set DIFFII_WIDE_TEST=1',
)
def test_true_widths(tmp_path):
    "SD 1.5's channels, 64-pixel images, two steps: 3.4 GB in float32."
    pipe = Pipeline(wide_model(tmp_path), 'true widths', 64)

    denoised = two_stage_denoise(
        pipe,
        models.noise(),
        pipe.encode_prompts(['a photo of a bird'] * 2),
        pipe.encode_prompts(['a photo of a bird flying over water.'] * 2),
        SamplingSettings(split_ratio=0.5, guidance_scale=7.5, steps=2),
    )

    assert sum(p.numel() for p in pipe.unet.parameters()) == 859_520_964
    assert denoised.isfinite().all()
    assert {im.size for im in pipe.decode_latents(denoised)} == {(64, 64)}


def wide_model(folder):
    "A diffusers pipeline with the U-Net of SD 1.5, and other parts that are small."
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
    )
    four = dict(
        block_out_channels=(8,) * 4,
        down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4,
        sample_size=64,
    )
    text = dict(
        hidden_size=768,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=12,
    )
    vocabulary = models.clip_vocabulary(folder / 'tokenizer', '<|endoftext|>')
    return StableDiffusionPipeline(
        unet=unet.to(memory_format=torch.channels_last),
        vae=AutoencoderKL(**models.VAE | four),
        tokenizer=CLIPTokenizer.from_pretrained(vocabulary),
        text_encoder=CLIPTextModel(CLIPTextConfig(**models.TEXT | text)),
        scheduler=DDIMScheduler(
            **models.LEVELS, clip_sample=False, set_alpha_to_one=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
