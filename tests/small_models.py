"""Stable Diffusion checkpoints of the real classes, small and with random weights.

No published weights can be fetched where the tests run. So each kind of checkpoint is
built here with the configuration that the published one has, saved in the hub's layout,
and read by the real loading code.
"""

import gzip
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import diffii  # noqa: F401  before torch: it tells OpenMP's threads how to wait

import numpy as np
import torch
from PIL import Image

from diffii.base.checkpoints import NO_CHECKER
from diffii.base.images import ImageSet
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import ConceptSettings

KINDS = ('sd1', 'sd2', 'sd2-v', 'xl')  # SD 1.x, SD 2.x with noise or velocity, SDXL
EDITS = 'pix2pix'  # InstructPix2Pix, which is SD 1.x with a wider first layer
LEVELS = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule='scaled_linear', steps_offset=1
)
TEXT = dict(
    vocab_size=49408,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=77,
    projection_dim=32,
    bos_token_id=0,
    eos_token_id=2,  # the end has id 49407, whatever is said here
    pad_token_id=1,
)
UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
    up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
)
VAE = dict(
    block_out_channels=(8, 16),
    norm_num_groups=8,
    latent_channels=4,
    down_block_types=['DownEncoderBlock2D'] * 2,
    up_block_types=['UpDecoderBlock2D'] * 2,
    sample_size=16,
    force_upcast=True,
)
CHECKER = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)


# ---- the parts of a checkpoint


def clip_vocabulary(folder, pad):
    "CLIP's tokenizer as the hub has it; the vocabulary is inside open_clip."
    import open_clip

    file = Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz'
    merges = gzip.open(file).read().decode().split('\n')[1:48895]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = chars + [c + '</w>' for c in chars]
    words += [m.replace(' ', '') for m in merges]
    words += ['<|startoftext|>', '<|endoftext|>']
    assert len(words) == 49408
    config = dict(
        tokenizer_class='CLIPTokenizer',
        model_max_length=77,
        bos_token='<|startoftext|>',
        eos_token='<|endoftext|>',
        unk_token='<|endoftext|>',
        pad_token=pad,
        do_lower_case=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    return folder


def small_checker():
    "A safety checker for images of 30 pixels."
    from diffusers.pipelines.stable_diffusion import safety_checker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    text, vision = CHECKER | dict(intermediate_size=16), CHECKER
    vision = vision | dict(image_size=30, patch_size=10)
    config = CLIPConfig(projection_dim=16, text_config=text, vision_config=vision)
    return safety_checker.StableDiffusionSafetyChecker(config)


def small_unet(kind):
    from diffusers import UNet2DConditionModel

    if kind in ('sd1', EDITS):
        extra = dict(attention_head_dim=4, cross_attention_dim=32)
    else:
        extra = dict(attention_head_dim=(2, 4), use_linear_projection=True)
        extra['cross_attention_dim'] = 64 if kind == 'xl' else 32
    if kind == 'xl':
        extra |= dict(
            addition_embed_type='text_time',
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            transformer_layers_per_block=(1, 2),
        )
    if kind == EDITS:
        extra |= dict(in_channels=8)
    return UNet2DConditionModel(**UNET, **extra)


def text_encoders(kind):  # name -> encoder
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    quick = 'gelu' if kind in ('sd2', 'sd2-v') else 'quick_gelu'
    width = 24 if kind == 'xl' else 32
    config = CLIPTextConfig(**TEXT, hidden_size=width, hidden_act=quick)
    encoders = {'text_encoder': CLIPTextModel(config)}
    if kind == 'xl':
        config = CLIPTextConfig(**TEXT, hidden_size=40, hidden_act='gelu')
        encoders['text_encoder_2'] = CLIPTextModelWithProjection(config)
    return encoders


def scheduler(kind, prediction_type=None):
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler

    if kind == 'xl':
        return EulerDiscreteScheduler(**LEVELS, timestep_spacing='leading')
    if kind == 'sd1':
        return PNDMScheduler(**LEVELS, skip_prk_steps=True, set_alpha_to_one=False)
    velocity = 'v_prediction' if kind == 'sd2-v' else 'epsilon'
    return DDIMScheduler(
        **LEVELS,
        clip_sample=False,
        set_alpha_to_one=False,
        prediction_type=prediction_type or velocity,
    )


# ---- whole checkpoints


def build(
    folder,
    kind,  # one of `KINDS`
    checker=None,  # a safety checker, for 'sd1'
    seed=0,
    variant=None,  # 'fp16' writes half precision under names of that variant
    prediction_type=None,  # of 'sd2': another than the published one
):  # -> the folder
    "A small random checkpoint in the hub's layout."
    import diffusers
    from diffusers import EulerAncestralDiscreteScheduler
    from transformers import CLIPImageProcessor, CLIPTokenizer

    torch.manual_seed(seed)
    folder = Path(folder)
    pads = {'tokenizer': '!' if kind in ('sd2', 'sd2-v') else '<|endoftext|>'}
    if kind == 'xl':
        pads['tokenizer_2'] = '!'
    for name, pad in pads.items():
        clip_vocabulary(folder / name, pad)
    parts = {t: CLIPTokenizer.from_pretrained(folder / t) for t in pads}
    parts |= dict(unet=small_unet(kind), vae=diffusers.AutoencoderKL(**VAE))
    parts |= text_encoders(kind) | dict(scheduler=scheduler(kind, prediction_type))
    if kind == 'xl':
        pipe = diffusers.StableDiffusionXLPipeline(**parts)
    elif kind == EDITS:
        parts |= dict(NO_CHECKER, scheduler=EulerAncestralDiscreteScheduler(**LEVELS))
        pipe = diffusers.StableDiffusionInstructPix2PixPipeline(**parts)
    else:
        size = dict(size={'shortest_edge': 30}, crop_size=30)
        parts['feature_extractor'] = checker and CLIPImageProcessor(**size)
        parts |= dict(safety_checker=checker, requires_safety_checker=bool(checker))
        pipe = diffusers.StableDiffusionPipeline(**parts)
    (pipe.to(torch.float16) if variant else pipe).save_pretrained(
        folder, variant=variant
    )
    for name, pad in pads.items():  # diffusers saves them in another form
        shutil.rmtree(folder / name)
        clip_vocabulary(folder / name, pad)
    if kind == 'xl':
        _settings_of_other_schedulers(folder)
    return folder


def _settings_of_other_schedulers(folder):
    "The published file of SDXL has settings of several schedulers."
    file = folder / 'scheduler' / 'scheduler_config.json'
    other = dict(set_alpha_to_one=False, clip_sample=False, skip_prk_steps=True)
    config = json.loads(file.read_text()) | other | dict(sample_max_value=1.0)
    file.write_text(json.dumps(config))


_made = tempfile.TemporaryDirectory()  # removed when the tests are over


@cache
def checkpoint(kind):
    "The folder of a checkpoint of a kind, built once."
    return build(Path(_made.name) / kind, kind)


def load(folder, **settings):
    return load_pipeline(str(folder), device='cpu', **settings)


@cache
def loaded(kind, dtype='float32'):
    "A pipeline of a kind, loaded once; for tests that leave it as it is."
    return load(checkpoint(kind), dtype=dtype)


# ---- what tests do with them


def _tree(i):
    "A random image of four by four coarse pixels."
    pixels = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((16, 16))


TREES = ImageSet(
    images=tuple(map(_tree, range(4))),
    labels=(0, 0, 1, 1),
    classes=('oak', 'elm'),
    metaclass='tree',
    names=('a', 'b', 'c', 'd'),
)


def short_learning(**given):
    "Settings of three steps of concept learning."
    rates = dict(lr=1e-2, token_lr=1e-2, weight_decay=0.0)
    short = dict(steps=3, batch_size=4, rank=2, flip=False)
    return ConceptSettings(**{**rates, **short, **given})


def noise(n=2, seed=0):
    "Latents of pure noise."
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def predicted(pipe, prompts):
    "The noise that a pipeline sees in `noise` under the prompts."
    with torch.inference_mode():
        cond = pipe.encode_prompts(prompts)
        return pipe.predict_eps(noise(len(prompts)), 500, cond)


def predicted_with(concepts, pipe):
    "The same with concepts attached, under a plain prompt and one with a suffix."
    with concepts.attached(pipe):
        prompts = [concepts.prompt(0), concepts.prompt(1, 'in the rain.')]
        return predicted(pipe, prompts)


def weights(pipe):
    "A copy of all weights of a pipeline."
    networks = {
        name: part
        for name, part in pipe.pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    return {
        f'{name}.{k}': v.clone()
        for name, network in networks.items()
        for k, v in network.state_dict().items()
    }


def small_clip(folder, name='small-clip'):
    "A CLIP of open_clip's kind with random weights: its name, and the file of weights."
    import open_clip

    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8)
    text = dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1)
    about = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    (Path(folder) / f'{name}.json').write_text(json.dumps(about))
    open_clip.add_model_config(Path(folder) / f'{name}.json')
    torch.manual_seed(0)
    file = Path(folder) / f'{name}.pt'
    torch.save(open_clip.create_model(name).state_dict(), file)
    return name, file
