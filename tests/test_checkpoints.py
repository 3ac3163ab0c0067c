"""Checkpoints people have: SD 1.x, SD 2.x and SDXL in the hub's layout, in 32 and 16 bits, with variants, old names and a safety checker; and learned concepts in the formats others publish.
No weights can be fetched where this runs, so every checkpoint is of the real classes, small and random, and the real loading code reads it from files."""

import gzip, json, os, re, shutil, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from diffii.base.files import UserError
from diffii.base.images import ImageSet
from diffii.method.concepts import (
    Concepts,
    start_embeddings,
    learn_concepts,
    sample_row,
)
from diffii.base.settings import ConceptSettings, SamplingSettings
from diffii.run.concept_files import (
    FORMATS,
    export_concepts,
    import_concepts,
    read_weights,
)
from diffii.base.pipeline import model_digest, same_model
from diffii.method.denoising import two_stage_denoise
from diffii.base.settings import InversionSettings
from diffii.method.inversion import invert_images
from diffii.base.pipeline import Pipeline, load_pipeline

KINDS = ('sd1', 'sd2', 'sd2-v', 'xl')
TREES = ImageSet(
    tuple(
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        ).resize((16, 16))
        for i in range(4)
    ),
    (0, 0, 1, 1),
    ('oak', 'elm'),
    'tree',
    ('a', 'b', 'c', 'd'),
)
LEARN = dict(
    steps=3, batch_size=4, rank=2, lr=1e-2, token_lr=1e-2, weight_decay=0.0, flip=False
)


def learn(**given):
    "Settings of a short learning."
    return ConceptSettings(**{**LEARN, **given})


def clip_vocabulary(folder, pad):
    "CLIP's tokenizer as the hub has it, vocab.json and merges.txt; the vocabulary is in open_clip."
    import open_clip

    merges = (
        gzip.open(Path(open_clip.__file__).parent / 'bpe_simple_vocab_16e6.txt.gz')
        .read()
        .decode()
        .split('\n')[1:48895]
    )
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    chars = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    words = (
        chars
        + [c + '</w>' for c in chars]
        + [m.replace(' ', '') for m in merges]
        + ['<|startoftext|>', '<|endoftext|>']
    )
    assert len(words) == 49408
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'vocab.json').write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / 'merges.txt').write_text('#version: 0.2\n' + '\n'.join(merges) + '\n')
    (folder / 'tokenizer_config.json').write_text(
        json.dumps(
            dict(
                tokenizer_class='CLIPTokenizer',
                model_max_length=77,
                bos_token='<|startoftext|>',
                eos_token='<|endoftext|>',
                unk_token='<|endoftext|>',
                pad_token=pad,
                do_lower_case=True,
            )
        )
    )
    return folder


def small_checker(size=30):
    from diffusers.pipelines.stable_diffusion.safety_checker import (
        StableDiffusionSafetyChecker,
    )
    from transformers import CLIPConfig

    torch.manual_seed(0)
    return StableDiffusionSafetyChecker(
        CLIPConfig(
            projection_dim=16,
            text_config=dict(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            ),
            vision_config=dict(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=size,
                patch_size=10,
            ),
        )
    )


def build(folder, kind, checker=None, seed=0, variant=None):
    "A small random checkpoint in the hub's layout, with the settings that published ones have."
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPImageProcessor,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
    )

    torch.manual_seed(seed)
    xl = kind == 'xl'
    folder = Path(folder)

    def text(width, act):
        return CLIPTextConfig(
            vocab_size=49408,
            hidden_size=width,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=32,
            hidden_act=act,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )  # the end has id 49407, whatever is said here

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4 if kind == 'sd1' else (2, 4),
        use_linear_projection=kind != 'sd1',
        cross_attention_dim=64 if xl else 32,
        down_block_types=('DownBlock2D', 'CrossAttnDownBlock2D'),
        up_block_types=('CrossAttnUpBlock2D', 'UpBlock2D'),
        **(
            dict(
                addition_embed_type='text_time',
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=32 + 6 * 8,
                transformer_layers_per_block=(1, 2),
            )
            if xl
            else {}
        ),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=['DownEncoderBlock2D'] * 2,
        up_block_types=['UpDecoderBlock2D'] * 2,
        sample_size=16,
        force_upcast=True,
    )
    levels = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule='scaled_linear',
        steps_offset=1,
    )
    pads = {
        'tokenizer': '<|endoftext|>' if kind in ('sd1', 'xl') else '!',
        **({'tokenizer_2': '!'} if xl else {}),
    }
    tok = {
        t: CLIPTokenizer.from_pretrained(clip_vocabulary(folder / t, pad))
        for t, pad in pads.items()
    }
    if xl:
        p = StableDiffusionXLPipeline(
            vae=vae,
            unet=unet,
            text_encoder=CLIPTextModel(text(24, 'quick_gelu')),
            text_encoder_2=CLIPTextModelWithProjection(text(40, 'gelu')),
            scheduler=EulerDiscreteScheduler(**levels, timestep_spacing='leading'),
            **tok,
        )
    else:
        p = StableDiffusionPipeline(
            vae=vae,
            unet=unet,
            text_encoder=CLIPTextModel(
                text(32, 'quick_gelu' if kind == 'sd1' else 'gelu')
            ),
            safety_checker=checker,
            requires_safety_checker=bool(checker),
            feature_extractor=CLIPImageProcessor(
                size={'shortest_edge': 30}, crop_size=30
            )
            if checker
            else None,
            **tok,
            scheduler=PNDMScheduler(
                **levels, skip_prk_steps=True, set_alpha_to_one=False
            )
            if kind == 'sd1'
            else DDIMScheduler(
                **levels,
                clip_sample=False,
                set_alpha_to_one=False,
                prediction_type='v_prediction' if kind == 'sd2-v' else 'epsilon',
            ),
        )
    (p.to(torch.float16) if variant else p).save_pretrained(folder, variant=variant)
    for t, pad in pads.items():
        shutil.rmtree(folder / t)
        clip_vocabulary(folder / t, pad)
    if xl:  # the published file has settings of several schedulers
        file = folder / 'scheduler' / 'scheduler_config.json'
        file.write_text(
            json.dumps(
                {
                    **json.loads(file.read_text()),
                    'set_alpha_to_one': False,
                    'clip_sample': False,
                    'sample_max_value': 1.0,
                    'skip_prk_steps': True,
                }
            )
        )
    return folder


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    "The folder of a checkpoint of a kind, built when it is first asked for."
    made = {}

    def _get(kind):
        if kind not in made:
            made[kind] = build(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return _get


def load(folder, **kw):
    return load_pipeline(str(folder), device='cpu', **kw)


def noise(n=2, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def eps(pipe, prompts):
    with torch.inference_mode():
        return pipe.predict_eps(noise(len(prompts)), 500, pipe.encode_prompts(prompts))


def eps_with(c, pipe):
    with c.attached(pipe):
        return eps(pipe, [c.prompt(0), c.prompt(1, 'in the rain.')])


def weights(pipe):
    return {
        f'{n}.{k}': v.clone()
        for n, m in pipe.pipe.components.items()
        if isinstance(m, torch.nn.Module)
        for k, v in m.state_dict().items()
    }


def fails(f, text):
    with pytest.raises(UserError, match=re.escape(text)):
        f()


# ---- one code path


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16', 'float16'))
@pytest.mark.parametrize('kind', KINDS)
def test_from_images_to_images(checkpoint, kind, dtype):
    pipe = load(checkpoint(kind), dtype=dtype)
    assert not list(checkpoint(kind).rglob('*.bin'))
    assert (pipe.size, pipe.dtype) == (
        16,
        getattr(torch, dtype),
    ) and pipe.vae.dtype == (torch.float32 if kind == 'xl' else pipe.dtype)
    before = weights(pipe)
    got = learn_concepts(pipe, TREES, learn(n_tokens=2))
    after = weights(pipe)
    assert before.keys() == after.keys() and all(
        torch.equal(v, after[k]) for k, v in before.items()
    )  # nothing else moved
    assert (
        len(got.embeddings) == len(pipe.text_parts) == (2 if kind == 'xl' else 1)
        and np.isfinite(got.log).all()
    )
    for r, s in zip(
        got.embeddings,
        start_embeddings(pipe, 4, got.settings, 'tree', 0),
    ):
        assert (
            r.dtype == torch.float32
            and r.isfinite().all()
            and ((r - s).abs().amax(1) > 0).all()
        )  # every vector, in every text encoder
    assert {v.dtype for v in got.lora.values()} == {torch.float32} and all(
        v.abs().sum() > 0 for v in got.lora.values()
    )
    with got.attached(pipe), warnings.catch_warnings():
        warnings.simplefilter(
            'ignore'
        )  # a random network's inversions are not Gaussian
        assert {
            p.dtype
            for m in (pipe.unet, pipe.pipe.text_encoder)
            for k, p in m.named_parameters()
            if 'lora_' in k or 'extra' in k
        } == {torch.float32}
        assert sample_row(pipe, [got.prompt(0), got.prompt(1)]).shape == (
            16,
            32,
            3,
        )  # what a tracker is shown
        z = torch.cat(
            invert_images(
                pipe, TREES, got, InversionSettings.of(pipe, steps=10)
            ).latents
        )
        labels = TREES.labels
        out = two_stage_denoise(
            pipe,
            z,
            pipe.encode_prompts([got.prompt(k) for k in labels]),
            pipe.encode_prompts([got.prompt(k, 'in the rain.') for k in labels]),
            SamplingSettings(split_ratio=0.3, guidance_scale=3, steps=10),
        )
        images = pipe.decode_latents(out)
    assert (
        z.shape == out.shape == (4, 4, 8, 8)
        and z.dtype == torch.float32
        and out.isfinite().all()
        and {im.size for im in images} == {(16, 16)}
        and np.std([np.asarray(im) for im in images]) > 0
    )


@pytest.mark.parametrize('kind', KINDS)
def test_denoising_is_diffusers_own(checkpoint, kind):
    from diffusers import DDIMScheduler

    pipe = load(checkpoint(kind))
    ours = two_stage_denoise(
        pipe,
        noise(),
        pipe.encode_prompts(['a photo of a bird'] * 2),
        settings=SamplingSettings(split_ratio=0, guidance_scale=5, steps=10),
    )
    if kind == 'xl':
        assert pipe.pipe.scheduler.config['set_alpha_to_one'] is False
    pipe.pipe.scheduler = DDIMScheduler.from_config(
        pipe.pipe.scheduler.config, clip_sample=False
    )
    theirs = pipe.pipe(
        ['a photo of a bird'] * 2,
        latents=noise(),
        guidance_scale=5.0,
        num_inference_steps=10,
        output_type='latent',
        height=16,
        width=16,
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_sdxl_reads_the_whole_prompt(checkpoint):
    "The pooled vector stands at the end of the prompt, also with new words, whose ids are larger than the end's."
    pipe = load(checkpoint('xl'))
    got = learn_concepts(pipe, TREES, learn())
    with torch.inference_mode():
        theirs = pipe.pipe.encode_prompt(
            'a photo of a bird in the rain.',
            device='cpu',
            do_classifier_free_guidance=False,
        )
    ours = pipe.encode_prompts(['a photo of a bird in the rain.'])
    torch.testing.assert_close(ours.embeds, theirs[0])
    torch.testing.assert_close(ours.pooled, theirs[2])
    with got.attached(pipe):
        a, b, c = pipe.encode_prompts(
            [got.prompt(0), got.prompt(0, 'in the rain.'), got.prompt(1)]
        ).pooled
    assert (a - b).abs().max() > 1e-4 and (a - c).abs().max() > 1e-6


def test_one_model_in_several_precisions(checkpoint, tmp_path):
    full, half, other = (
        load(checkpoint('sd1')),
        load(checkpoint('sd1'), dtype='bfloat16'),
        load(build(tmp_path / 'other', 'sd1', seed=1)),
    )
    half16 = load(checkpoint('sd1'), dtype='float16')
    assert same_model(model_digest(full), model_digest(half16)) and same_model(
        model_digest(half), model_digest(half16)
    )
    got = learn_concepts(full, TREES, learn())
    torch.testing.assert_close(
        eps_with(got, half), eps_with(got, full), atol=0.1, rtol=0.1
    )
    fails(lambda: got.attach(other), 'another model')


# ---- files


def test_variant(tmp_path):
    folder = build(tmp_path / 'fp16', 'sd2', variant='fp16')
    assert {f.name for f in folder.rglob('*.safetensors')} == {
        'model.fp16.safetensors',
        'diffusion_pytorch_model.fp16.safetensors',
    }
    fails(lambda: load(folder), 'give --variant fp16')
    fails(lambda: load(folder, variant='bf16'), 'give --variant fp16')
    stored, _ = read_weights(
        folder / 'unet' / 'diffusion_pytorch_model.fp16.safetensors'
    )
    for dtype in ('float16', 'float32'):
        got = load(folder, variant='fp16', dtype=dtype).unet.state_dict()
        assert all(
            v.dtype == getattr(torch, dtype) and torch.equal(v, stored[k].to(v.dtype))
            for k, v in got.items()
        )


def rename(file, names):
    from safetensors.torch import load_file, save_file

    t = {names(k): v.clone() for k, v in load_file(file).items()}
    t[
        'text_model.embeddings.position_ids'
        if file.parent.name == 'text_encoder'
        else 'vision_model.vision_model.embeddings.position_ids'
    ] = torch.arange(77)[None]
    file.unlink()
    save_file(t, file, metadata={'format': 'pt'})


def test_names_of_older_libraries(tmp_path):
    "SD 1.x was published with the layer and class names of its time."
    folder = build(tmp_path / 'old', 'sd1', checker=small_checker())
    want = weights(load(folder, safety_checker=True))
    rename(
        folder / 'text_encoder' / 'model.safetensors',
        lambda k: 'text_model.' + k.removeprefix('text_model.'),
    )
    rename(
        folder / 'safety_checker' / 'model.safetensors',
        lambda k: (
            'vision_model.vision_model.'
            + k.removeprefix('vision_model.').removeprefix('vision_model.')
            if k.startswith('vision_model.')
            else k
        ),
    )
    index = json.loads((folder / 'model_index.json').read_text())
    index['feature_extractor'] = ['transformers', 'CLIPFeatureExtractor']
    (folder / 'model_index.json').write_text(json.dumps(index))
    for f in (folder / 'feature_extractor').iterdir():
        f.unlink()
    (folder / 'feature_extractor' / 'preprocessor_config.json').write_text(
        json.dumps(
            dict(
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
        )
    )
    for checker in (False, True):
        got = weights(load(folder, safety_checker=checker))
        assert all(torch.equal(v, want[k]) for k, v in got.items())
    assert load(folder, safety_checker=True).flagged([TREES.open(0)]) == [False]


@pytest.mark.parametrize('dtype', ('float32', 'bfloat16'))
def test_safety_checker(checkpoint, tmp_path, dtype):
    fails(lambda: load(checkpoint('sd2'), safety_checker=True), 'has no safety checker')
    fails(lambda: load(checkpoint('xl'), safety_checker=True), 'has no safety checker')
    folder = build(tmp_path / 'guarded', 'sd1', checker=small_checker())
    off = load(folder)
    assert off.pipe.safety_checker is None
    fails(lambda: off.flagged([]), 'safety_checker=True')
    pipe = load(folder, safety_checker=True, dtype=dtype)
    checker, (a, b) = (
        pipe.pipe.safety_checker,
        (TREES.open(0), Image.new('RGB', (16, 16))),
    )
    with torch.inference_mode():
        A, B = (
            torch.nn.functional.normalize(
                checker.visual_projection(
                    checker.vision_model(
                        pipe.pipe.feature_extractor(
                            im, return_tensors='pt'
                        ).pixel_values.to(pipe.dtype)
                    )[1]
                )
            )[0]
            for im in (a, b)
        )
    with torch.no_grad():
        checker.concept_embeds[5] = A - B
        checker.concept_embeds_weights[5] = 0.0
    pipe.batch_size = 2
    assert pipe.flagged([b, a, b, a, a]) == [
        False,
        True,
        False,
        True,
        True,
    ] and a == TREES.open(0)


# ---- concepts in published formats


def old_names(lora):  # as U-Nets had them when LoRA was an attention processor
    return {
        re.sub(
            r'\.to_(q|k|v|out)(\.0)?\.lora_([AB])',
            lambda m: f'.processor.to_{m[1]}_lora.{dict(A="down", B="up")[m[3]]}',
            k,
        ): v
        for k, v in lora.items()
    }


def test_what_diff_mix_publishes(checkpoint, tmp_path):
    from safetensors.torch import save_file

    pipe = load(checkpoint('sd1'))
    got = learn_concepts(pipe, TREES, learn())
    rows = torch.nn.Parameter(got.embeddings[0].flip(0))[
        [0, 1]
    ]  # as theirs: rows of a parameter, with a gradient
    names = {'F-16A/B': '<class_0>', 'Black footed Albatross': '<class_1>'}
    for step, r in (('500', torch.zeros_like(rows)), ('35000', rows)):
        torch.save(
            dict(
                learned_embeds_dict=dict(zip(names.values(), r)),
                name2placeholder=names,
                placeholder2name={p: n for n, p in names.items()},
            ),
            tmp_path / f'learned_embeds-steps-{step}.bin',
        )
    save_file(old_names(got.lora), tmp_path / 'pytorch_lora_weights.safetensors')
    for classes in (
        ['Black_footed_Albatross', 'F-16A_B'],
        ['black-footed albatross', 'F-16A/B'],
    ):
        back = import_concepts(pipe, tmp_path, classes=classes, metaclass='tree')
        assert back.classes == tuple(classes) and (
            back.n_tokens,
            back.settings.rank,
            back.base,
        ) == (1, 2, got.base)
        assert (
            torch.equal(back.embeddings[0], got.embeddings[0])
            and not back.embeddings[0].requires_grad
            and torch.equal(eps_with(back, pipe), eps_with(got, pipe))
        )
    assert import_concepts(pipe, tmp_path).classes == tuple(names)
    alone = import_concepts(pipe, tmp_path / 'learned_embeds-steps-35000.bin')
    assert (
        not alone.lora
        and import_concepts(
            pipe, tmp_path / 'learned_embeds-steps-35000.bin', lora=tmp_path
        ).lora
    )
    fails(
        lambda: import_concepts(pipe, tmp_path, classes=['F-16A/B', 'DC-10']),
        'no token for DC-10',
    )
    fails(
        lambda: import_concepts(pipe, tmp_path, classes=['F-16A/B', 'F-16A_B']),
        'same token',
    )
    fails(
        lambda: import_concepts(load(checkpoint('xl')), tmp_path),
        'files of all its encoders',
    )
    fails(
        lambda: import_concepts(load(checkpoint('sd2')), tmp_path / 'none'),
        'no such file',
    )


@pytest.mark.parametrize('form', FORMATS)
@pytest.mark.parametrize('kind', ('sd2-v', 'xl'))
def test_out_and_in_again(checkpoint, tmp_path, kind, form):
    pipe = load(checkpoint(kind))
    got = learn_concepts(pipe, TREES, learn(n_tokens=1 if form == 'diff-mix' else 3))
    if (kind, form) == ('xl', 'diff-mix'):
        return fails(lambda: export_concepts(got, tmp_path, form), 'one text encoder')
    export_concepts(got, tmp_path, form)
    back = import_concepts(pipe, tmp_path, classes=TREES.classes, metaclass='tree')
    assert torch.equal(eps_with(back, pipe), eps_with(got, pipe))
    assert [getattr(back.settings, k) for k in ('n_tokens', 'rank')] == [
        getattr(got.settings, k) for k in ('n_tokens', 'rank')
    ] and all(torch.equal(a, b) for a, b in zip(back.embeddings, got.embeddings))
    back.save(tmp_path / 'again')
    assert torch.equal(
        eps_with(Concepts.load(tmp_path / 'again'), pipe), eps_with(got, pipe)
    )
    other = load(checkpoint(kind))
    other.pipe.load_lora_weights(
        tmp_path / 'models' / 'Lora' / 'diffii.safetensors'
        if form == 'a1111'
        else tmp_path
    )  # diffusers reads the LoRA
    with got.attached(pipe):
        torch.testing.assert_close(
            eps(other, ['a bird']), eps(pipe, ['a bird']), atol=1e-5, rtol=1e-5
        )


def test_textual_inversion_files(checkpoint, tmp_path):
    pipe = load(checkpoint('sd1'))
    width = 32
    rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    got = Concepts(
        ('oak', 'elm'),
        'tree',
        ConceptSettings(n_tokens=3, rank=0),
        model_digest(pipe),
        [rows.flatten(0, 1)],
        {},
    )
    for k, c in enumerate(got.classes):
        d = tmp_path / 'a1111'
        d.mkdir(exist_ok=True)
        torch.save(
            {
                'string_to_token': {'*': 265},
                'string_to_param': {'*': rows[k]},
                'name': 'my words',
                'step': 9,
                'sd_checkpoint': None,
                'sd_checkpoint_name': None,
            },
            d / f'{c}.pt',
        )
        d = tmp_path / f'bin-{c}'
        d.mkdir()
        torch.save({f'<{c}>': rows[k]}, d / 'learned_embeds.bin')
    assert torch.equal(
        eps_with(
            import_concepts(
                pipe, tmp_path / 'a1111', classes=['oak', 'elm'], metaclass='tree'
            ),
            pipe,
        ),
        eps_with(got, pipe),
    )
    for k, c in enumerate(got.classes):
        assert torch.equal(
            import_concepts(pipe, tmp_path / f'bin-{c}', classes=[c]).embeddings[0],
            rows[k],
        ) and torch.equal(
            import_concepts(
                pipe, tmp_path / f'bin-{c}', classes={'tree 1': f'<{c}>'}
            ).embeddings[0],
            rows[k],
        )
    torch.save({'<ash>': torch.full((width,), float('nan'))}, tmp_path / 'nan.bin')
    fails(lambda: import_concepts(pipe, tmp_path / 'nan.bin'), 'not finite')
    torch.save({'string_to_param': {'*': rows[0][:1]}}, tmp_path / 'a1111' / 'ash.pt')
    fails(
        lambda: import_concepts(pipe, tmp_path / 'a1111', classes=['oak', 'ash']),
        'ash has 1 vectors',
    )


def test_a_lora_of_other_layers_and_ranks(checkpoint, tmp_path):
    from safetensors.torch import save_file

    pipe, g = load(checkpoint('sd1')), torch.Generator().manual_seed(0)
    lora = {}
    for name, layer in pipe.unet.named_modules():
        r = 3 if name.endswith('ff.net.2') else 2 if name.endswith('attn2.to_q') else 0
        if r:
            lora.update(
                {
                    f'unet.{name}.lora_A.weight': torch.randn(
                        r, layer.in_features, generator=g
                    ),
                    f'unet.{name}.lora_B.weight': torch.randn(
                        layer.out_features, r, generator=g
                    ),
                }
            )
    save_file(lora, tmp_path / 'lora.safetensors')
    save_file({'<oak>': torch.zeros(32)}, tmp_path / 'learned_embeds.safetensors')
    got = import_concepts(
        pipe, tmp_path, lora=tmp_path / 'lora.safetensors', classes=['oak']
    )
    other = load(checkpoint('sd1'))
    other.pipe.load_lora_weights(tmp_path / 'lora.safetensors')
    assert (
        got.settings.rank == 3
        and (eps(other, ['a bird']) - eps(pipe, ['a bird'])).abs().max() > 1e-3
    )
    with got.attached(pipe):
        torch.testing.assert_close(
            eps(pipe, ['a bird']), eps(other, ['a bird']), atol=1e-5, rtol=1e-5
        )
    got.save(tmp_path / 'saved')
    with Concepts.load(tmp_path / 'saved').attached(pipe):
        torch.testing.assert_close(
            eps(pipe, ['a bird']), eps(other, ['a bird']), atol=1e-5, rtol=1e-5
        )
    wide = {
        k: torch.zeros(v.shape[0], 99) if 'lora_A' in k else v for k, v in lora.items()
    }
    save_file(wide, tmp_path / 'wide.safetensors')
    fails(
        lambda: import_concepts(pipe, tmp_path, lora=tmp_path / 'wide.safetensors'),
        'does not fit the U-Net',
    )
    save_file(
        {**lora, 'text_encoder.x.lora_A.weight': torch.zeros(1)},
        tmp_path / 'both.safetensors',
    )
    fails(
        lambda: import_concepts(pipe, tmp_path, lora=tmp_path / 'both.safetensors'),
        'LoRA of the text encoder',
    )


# ---- true size


@pytest.mark.skipif(
    not os.environ.get('DIFFII_WIDE_TEST'),
    reason='builds a U-Net of 860 million parameters; set DIFFII_WIDE_TEST=1',
)
def test_true_widths(tmp_path):
    "SD 1.5's channels, 64-pixel images, two steps: 3.4 GB in float32."
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
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4,
        norm_num_groups=8,
        latent_channels=4,
        down_block_types=['DownEncoderBlock2D'] * 4,
        up_block_types=['UpDecoderBlock2D'] * 4,
        sample_size=64,
    )
    p = StableDiffusionPipeline(
        vae=vae,
        unet=unet.to(memory_format=torch.channels_last),
        tokenizer=CLIPTokenizer.from_pretrained(
            clip_vocabulary(tmp_path / 'tokenizer', '<|endoftext|>')
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=768,
                num_hidden_layers=1,
                num_attention_heads=12,
                max_position_embeddings=77,
                eos_token_id=2,
            )
        ),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule='scaled_linear',
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
    )
    pipe = Pipeline(p, 'true widths', 64)
    out = two_stage_denoise(
        pipe,
        noise(),
        pipe.encode_prompts(['a photo of a bird'] * 2),
        pipe.encode_prompts(['a photo of a bird flying over water.'] * 2),
        SamplingSettings(split_ratio=0.5, guidance_scale=7.5, steps=2),
    )
    assert out.isfinite().all() and {im.size for im in pipe.decode_latents(out)} == {
        (64, 64)
    }
