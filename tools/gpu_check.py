"""What only a GPU can tell, in about ten minutes on one CUDA device.

Stable Diffusion 1.5 and SDXL are built at their true size with random weights, so that
nothing is fetched. Each check prints a line; then a whole run, from concepts to files, is
planned and made. Two tables follow: what the plans said and what the runs took; and
images per second for the published procedure (one image at a time) and for this
package's, at exact settings and in four calls, with the U-Net's share and the peak of
memory. The exit code is 1 where a check failed, and 3 where there is no GPU.

    python tools/gpu_check.py [--out table.json] [--batch 8] [--only 'SD 1.5']
    python tools/gpu_check.py --rehearse    # small networks on the CPU: does it run?
"""

import diffii  # noqa: F401  before torch: it tells OpenMP's threads how to wait

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / 'tests'))

import small_models  # noqa: E402  the vocabulary of CLIP, and schedules

from diffii.base.batches import Prepare  # noqa: E402
from diffii.base.checkpoints import best_precision, device_name  # noqa: E402
from diffii.base.checkpoints import set_arithmetic  # noqa: E402
from diffii.base.features import lpips_model  # noqa: E402
from diffii.base.files import UserError  # noqa: E402
from diffii.base.images import ImageSet  # noqa: E402
from diffii.base.pipeline import SEPARATE_MEMORY, Pipeline, load_pipeline  # noqa: E402
from diffii.base.settings import (  # noqa: E402
    ConceptSettings,
    InversionSettings,
    ModelSettings,
    SamplingSettings,
    Settings,
)
from diffii.evaluation.speed import covered, unet_clock  # noqa: E402
from diffii.method.concepts import lora_config, named_concepts  # noqa: E402
from diffii.method.learning import learn_concepts  # noqa: E402
from diffii.method.denoising import two_stage_denoise  # noqa: E402
from diffii.method.few_step import FewStep  # noqa: E402
from diffii.method.inversion import ddim_invert  # noqa: E402
from diffii.run.filters import distances  # noqa: E402
from diffii.run.planning import UNETS, model_memory, plan_run  # noqa: E402
from diffii.run.runs import synthesize  # noqa: E402

GIB = 2**30
NO_GPU = 3  # exit code
WARM_UP = 4  # steps; the fewest in which four calls can be made
PARTS = ('unet', 'vae', 'text_encoder', 'text_encoder_2')


# ---- models at their true size, with random weights


@dataclass
class Size:
    "How large the networks are."

    kind: str  # of `small_models`: sd1 or xl
    unet: dict
    widths: tuple  # of the autoencoder
    text: tuple  # for each text encoder (width, layers, heads, projection, activation)
    image: int  # side in pixels


TRUE = {
    'SD 1.5': Size(
        'sd1',
        UNETS['SD 1.5'],
        (128, 256, 512, 512),
        ((768, 12, 12, 768, 'quick_gelu'),),
        512,
    ),
    'SDXL': Size(
        'xl',
        UNETS['SDXL'],
        (128, 256, 512, 512),
        ((768, 12, 12, 768, 'quick_gelu'), (1280, 32, 20, 1280, 'gelu')),
        1024,
    ),
}


def text_encoder(width, layers, heads, projection, activation, with_projection):
    "A text encoder of CLIP's kind."
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    own = dict(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=projection,
        hidden_act=activation,
    )
    config = CLIPTextConfig(**{**small_models.TEXT, **own})
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def build(size: Size, device, batch: int) -> Pipeline:
    "A pipeline with random weights, in the precision that suits the device."
    import diffusers
    from transformers import CLIPTokenizer

    set_arithmetic(ModelSettings('tiny'), device)
    dtype = getattr(torch, best_precision(device))
    torch.manual_seed(0)
    parts = tokenizers(size, CLIPTokenizer)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        parts['unet'] = diffusers.UNet2DConditionModel(**size.unet)
        for i, about in enumerate(size.text):
            second = '_2' if i else ''
            parts[f'text_encoder{second}'] = text_encoder(*about, with_projection=i)
        torch.set_default_dtype(torch.float32 if size.kind == 'xl' else dtype)
        parts['vae'] = autoencoder(size)
        torch.set_default_dtype(torch.float32)
    return loaded(size, parts, device, batch)


def tokenizers(size, kind):
    "CLIP's tokenizer, for each text encoder."
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(size.text)):
            name = f'tokenizer{"_2" if i else ""}'
            pad = '!' if i else '<|endoftext|>'
            small_models.clip_vocabulary(Path(folder) / name, pad)
            found[name] = kind.from_pretrained(Path(folder) / name)
    return found


def autoencoder(size):
    from diffusers import AutoencoderKL

    n = len(size.widths)
    return AutoencoderKL(
        block_out_channels=size.widths,
        down_block_types=['DownEncoderBlock2D'] * n,
        up_block_types=['UpDecoderBlock2D'] * n,
        layers_per_block=2 if n > 2 else 1,
        norm_num_groups=32 if n > 2 else 8,
        latent_channels=4,
        sample_size=size.image,
    )


def loaded(size, parts, device, batch) -> Pipeline:
    "The parts as `load_pipeline` leaves them."
    import diffusers

    for name in PARTS:
        if name in parts:
            parts[name].requires_grad_(False).eval()
    for name in ('unet', 'vae'):
        parts[name].to(memory_format=torch.channels_last)
    parts['scheduler'] = small_models.scheduler(size.kind)
    if size.kind == 'xl':
        whole = diffusers.StableDiffusionXLPipeline(**parts)
    else:
        none = dict(safety_checker=None, feature_extractor=None)
        whole = diffusers.StableDiffusionPipeline(
            **parts, **none, requires_safety_checker=False
        )
    offload = torch.device(device).type in SEPARATE_MEMORY
    pipe = Pipeline(whole, 'random', size.image, batch_size=batch, offload=offload)
    pipe.rest()
    return pipe


def images_of(pipe, n: int) -> ImageSet:
    "Smooth images of the model's size, of two categories."
    pixels = np.random.default_rng(0).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
    images = tuple(Image.fromarray(p).resize((pipe.size, pipe.size)) for p in pixels)
    labels = tuple(i % 2 for i in range(n))
    return ImageSet(images, labels, ('oak', 'elm'), 'tree', tuple(map(str, range(n))))


# ---- measuring


def on_gpu(pipe) -> bool:
    return pipe.device.type == 'cuda'


def wait(pipe):
    if on_gpu(pipe):
        torch.cuda.synchronize()


def start_peak(pipe):
    if on_gpu(pipe):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(pipe) -> float:  # GiB; 0 on a CPU
    return torch.cuda.max_memory_allocated() / GIB if on_gpu(pipe) else 0.0


def learn(pipe, images, steps=2, **given):
    "Concepts of a few steps, and the peak of memory in GiB."
    settings = ConceptSettings(
        **{'steps': steps, 'batch_size': 2, 'flip': False} | given
    )
    # one image at a time in the autoencoder, else its peak hides that of learning
    before, pipe.vae_batch = pipe.vae_batch, 1
    start_peak(pipe)
    try:
        concepts = learn_concepts(pipe, images, settings)
        wait(pipe)
        return concepts, peak(pipe)
    finally:
        pipe.vae_batch = before


def random_noise(pipe, *shape):
    return torch.randn(
        *shape, *pipe.latent_shape, generator=torch.Generator().manual_seed(0)
    )


def sample(pipe, n: int, steps: int, **given):
    "Images of `n` noises, all in one call of the sampler."
    settings = SamplingSettings(split_ratio=0.0, steps=steps, **given)
    plain = pipe.encode_prompts(['a photo of a tree'] * n)
    fresh = random_noise(pipe, settings.few_steps - 1, n) if settings.few_step else None
    made = two_stage_denoise(
        pipe, random_noise(pipe, n), plain, settings=settings, fresh=fresh
    )
    return pipe.decode_latents(made)


def invert(pipe, images, steps: int):
    "Inversions of images, all in one call."
    latents = pipe.encode_images([images.open(i) for i in range(len(images))])
    cond = pipe.encode_prompts(['a photo of a tree'] * len(images))
    return ddim_invert(pipe, latents, cond, InversionSettings(steps=steps))


@contextmanager
def one_at_a_time(pipe):
    "A batch of one image, whose two prompts go through the U-Net together."
    before, pipe.micro_batch = pipe.micro_batch, 2
    try:
        yield
    finally:
        pipe.micro_batch = before


class Published:
    "The published procedure: prompts and U-Net for one image at a time."

    name, batch, few = 'published', 1, True  # it has no batches: a few images will do

    def ready(self, pipe):
        "A block in which the model is ready to sample."
        return nullcontext()

    def invert(self, pipe, images, steps):
        with one_at_a_time(pipe):
            for i in range(len(images)):
                pipe.cache.clear()
                invert(pipe, images.subset([i]), steps)

    def sample(self, pipe, images, steps):
        with one_at_a_time(pipe):
            for _ in range(len(images)):
                pipe.cache.clear()
                sample(pipe, 1, steps)


class Together:
    "This package's: prompts once, batches as large as memory has room for."

    few = False

    def __init__(self, name, batch, **given):
        self.name, self.batch, self.given = name, batch, given

    def ready(self, pipe):
        "A block in which few-step weights, where it samples with them, are in the model."
        few_step = self.given.get('few_step')
        return random_few_step(pipe).attached(pipe) if few_step else nullcontext()

    def invert(self, pipe, images, steps):
        pipe.cache.clear()
        invert(pipe, images, steps)

    def sample(self, pipe, images, steps):
        sample(pipe, len(images), steps, **self.given)


def random_few_step(pipe) -> FewStep:
    "A LoRA of rank 64 on the attention, with random numbers in it."
    from peft import get_peft_model_state_dict

    others = list(getattr(pipe.unet, 'peft_config', {}))
    pipe.unet.add_adapter(lora_config(64), adapter_name='shape')
    shapes = get_peft_model_state_dict(pipe.unet, adapter_name='shape')
    lora = {k: 1e-3 * torch.randn(v.shape) for k, v in shapes.items()}
    pipe.unet.delete_adapters('shape')
    if others:
        pipe.unet.set_adapters(others)
    return FewStep('random', lora)


def seconds_of(pipe, work) -> float:
    "How long a function takes, to the end of what it asked of the device."
    wait(pipe)
    began = time.perf_counter()
    work()
    wait(pipe)
    return time.perf_counter() - began


def clocked(pipe, work, images, steps) -> tuple:  # (seconds, those of the U-Net)
    work(pipe, images, WARM_UP)
    with unet_clock(pipe) as calls:
        seconds = seconds_of(pipe, partial(work, pipe, images, steps))
    return seconds, covered(calls)


def timed(pipe, procedure, images, steps) -> dict:
    "Images per second, the U-Net's share, and the peak of memory."
    start_peak(pipe)
    inverting, unet = clocked(pipe, procedure.invert, images, steps)
    with procedure.ready(pipe):
        sampling, more = clocked(pipe, procedure.sample, images, steps)
    share = (unet + more) / (inverting + sampling)
    speeds = dict(inverted=len(images) / inverting, made=len(images) / sampling)
    return dict(speeds, share=share, peak=peak(pipe))


# ---- a whole run


def run_whole(name, pipe, images) -> dict:
    "A run from concepts to files: what is planned, and what it takes."
    settings = Settings.of(
        concepts=dict(steps=20, batch_size=2), sampling=dict(expansion=2)
    )
    pipe.vae_batch = 1
    plan = plan_run(pipe, images, settings)
    start_peak(pipe)
    with tempfile.TemporaryDirectory() as folder:
        make = partial(synthesize, pipe, images, Path(folder) / 'run', settings)
        work = partial(make, suffixes=['in the rain.'], progress=False)
        seconds = seconds_of(pipe, work)
    return dict(
        model=name,
        images=2 * len(images),
        planned_seconds=sum(row['seconds'] for row in plan.work),
        seconds=seconds,
        planned_peak=max(row['bytes'] for row in plan.memory) / GIB,
        peak=peak(pipe),
    )


def told_runs(runs) -> list:  # of lines of Markdown
    "The table of whole runs."
    lines = ['| model | images | planned, s | took, s | planned, GiB | peak, GiB |']
    lines.append('|' + '---|' * 6)
    for r in runs:
        seconds = f'{r["planned_seconds"]:.0f} | {r["seconds"]:.0f}'
        memory = f'{r["planned_peak"]:.1f} | {r["peak"]:.1f}'
        lines.append(f'| {r["model"]} | {r["images"]} | {seconds} | {memory} |')
    return lines


# ---- checks: each returns what it found, in words, or raises


class NeedsCuda(Exception):
    "The check makes no sense on a CPU."


def check(right, text):
    "An AssertionError that is not switched off."
    if not right:
        raise AssertionError(text)


def cuda_only(pipe):
    if not on_gpu(pipe):
        raise NeedsCuda


def check_precision(pipe, images):
    expected = best_precision(pipe.device)
    check(pipe.dtype_name == expected, f'{pipe.dtype_name}, not {expected}')
    return pipe.dtype_name


def check_waiting(pipe, images):
    cuda_only(pipe)
    places = {name: place_of(pipe, name) for name in PARTS if hasattr(pipe.pipe, name)}
    idle = {place for name, place in places.items() if name != 'unet'}
    check(places['unet'] == 'cuda' and idle == {'cpu'}, f'{places}')
    with pipe.at_work('vae'):
        check(place_of(pipe, 'vae') == 'cuda', 'the autoencoder stays on the CPU')
    return 'the U-Net alone is on the device'


def place_of(pipe, name):
    network = getattr(pipe.pipe, name)
    return None if network is None else next(network.parameters()).device.type


def check_learning(pipe, images):
    concepts, gib = learn(pipe, images)
    check(all(np.isfinite(concepts.log)), f'losses {concepts.log}')
    needed = model_memory(pipe, concepts.settings)
    expected = needed.unet + needed.text + needed.lora + 2 * needed.learning
    return f'{gib:.1f} GiB for two images, estimated {expected / GIB:.1f}'


def check_checkpointing(pipe, images):
    whole, gib = learn(pipe, images)
    less, less_gib = learn(pipe, images, checkpointing=True, micro_batch=1)
    apart = abs(whole.log[0] - less.log[0]) / whole.log[0]
    check(apart < 1e-2, f'losses {whole.log[0]} and {less.log[0]}')
    check(not on_gpu(pipe) or less_gib < gib, f'{less_gib} GiB, not below {gib}')
    return f'{less_gib:.1f} GiB instead of {gib:.1f}; losses {apart:.0e} apart'


def check_full_memory(pipe, images):
    "With little more than the weights, learning saves memory by itself."
    cuda_only(pipe)
    _, least = learn(pipe, images, checkpointing=True, micro_batch=1)
    _, most = learn(pipe, images)
    total = torch.cuda.get_device_properties(pipe.device).total_memory / GIB
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((0.7 * least + 0.3 * most) / total)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            learn(pipe, images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    ran_out = 'memory ran out in concept learning'
    told = [str(w.message) for w in caught if ran_out in str(w.message)]
    check(told, 'nothing was told of a full memory')
    return told[0]


def check_autoencoder_alone(pipe, images):
    "An autoencoder that runs out leaves the U-Net its batch."
    decode, before = pipe.vae.decode, pipe.vae_batch

    def limited(z, *args, **kwargs):
        if len(z) > 1:
            raise torch.cuda.OutOfMemoryError
        return decode(z, *args, **kwargs)

    pipe.vae.decode = limited
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            pipe.decode_latents(torch.zeros(2, *pipe.latent_shape))
        rooms = pipe.micro_batch, pipe.vae_batch
    finally:
        pipe.vae.decode, pipe.vae_batch = decode, before
    check(rooms == (pipe.batch_size, 1), f'{rooms}')
    return f'U-Net {rooms[0]} images at a time, autoencoder {rooms[1]}'


def check_generators(pipe, images):
    cuda_only(pipe)
    before = torch.cuda.get_rng_state(pipe.device)
    x = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    Prepare(32, (0.5,) * 3, (0.5,) * 3, train=True, flip=True)((x,))
    same = torch.equal(before, torch.cuda.get_rng_state(pipe.device))
    check(same, 'augmentation moved the generator of the GPU')
    return 'augmentation leaves the generator of the GPU alone'


def check_twice(pipe, images):
    first, second = (sample(pipe, 2, 4) for _ in range(2))
    same = all(a.tobytes() == b.tobytes() for a, b in zip(first, second))
    check(same, 'the same batch came out otherwise')
    return 'the same batch comes out the same to the bit'


def check_filter(pipe, images):
    try:
        nets = [lpips_model('alex', device) for device in ('cpu', pipe.device)]
    except UserError as e:
        return f'passed over: {e}'
    real = [images.open(i) for i in range(len(images))]
    here, there = (distances(real, real, net) for net in nets)
    apart = ((here - there).abs() / here.clamp(min=1e-6)).max().item()
    check(apart < 1e-2, f'distances {apart} apart')
    return f'distances on the device and on the CPU {apart:.0e} apart'


def check_tf32(pipe, images):
    cuda_only(pipe)
    load_pipeline('tiny', device=str(pipe.device), dtype='float32')
    off = not torch.backends.cuda.matmul.allow_tf32
    check(off and not torch.backends.cudnn.allow_tf32, 'TF32 is on')
    return 'off, as it was not asked for'


def check_against_cpu(pipe, images):
    "The shipped model in 32 bits: the same image on the device and on the CPU."
    places = ('cpu', str(pipe.device))
    models = [load_pipeline('tiny', device=d, dtype='float32') for d in places]
    here, there = (np.asarray(sample(m, 1, 10)[0]).astype(int) for m in models)
    apart = np.abs(here - there).max()
    check(apart <= 3, f'{apart} of 255 apart')
    return f'{apart} of 255 apart'


def check_named(pipe, images):
    "Prompts with categories by their names go through the pipeline."
    concepts = named_concepts(pipe, images)
    embeds = pipe.encode_prompts([concepts.prompt(0), concepts.prompt(1)]).embeds
    check(bool(embeds.isfinite().all()), 'embeddings are not finite')
    return f'embeddings {tuple(embeds.shape)}'


CHECKS = (
    check_precision,
    check_waiting,
    check_named,
    check_learning,
    check_checkpointing,
    check_full_memory,
    check_autoencoder_alone,
    check_generators,
    check_twice,
    check_filter,
    check_tf32,
    check_against_cpu,
)


# ---- all of it


def run_checks(name, pipe, images, say=print) -> list:  # names of what failed
    "Make each check; a line for each."
    failed = []
    for function in CHECKS:
        title = f'{name}: {function.__name__.removeprefix("check_").replace("_", " ")}'
        try:
            say(f'ok       {title}: {function(pipe, images)}')
        except NeedsCuda:
            say(f'skipped  {title}: needs CUDA')
        except Exception as e:
            failed.append(title)
            say(f'FAILED   {title}: {type(e).__name__}: {e}')
            if not isinstance(e, AssertionError):
                traceback.print_exc()
    return failed


def procedures(batch) -> list:
    return [
        Published(),
        Together('diffii', batch),
        Together('diffii, 4 calls', batch, few_step='random', calls=4),
    ]


def run_table(name, pipe, images, batch, steps) -> list:  # of dicts
    "Every procedure, timed; the published one on two images."
    concepts, _ = learn(pipe, images)
    rows = []
    for procedure in procedures(batch):
        own = images.subset(range(min(2, len(images)))) if procedure.few else images
        with concepts.attached(pipe):  # with a LoRA, as in a real run
            found = timed(pipe, procedure, own, steps)
        rows.append(
            dict(model=name, procedure=procedure.name, batch=procedure.batch, **found)
        )
    return rows


def told(rows) -> list:  # of lines of Markdown
    "The table for the page."
    lines = [
        '| model | procedure | batch | inverted/s | made/s | times | U-Net share '
        '| peak, GiB |'
    ]
    lines.append('|' + '---|' * 8)
    first = {r['model']: r['made'] for r in reversed(rows)}
    for r in rows:
        times = r['made'] / first[r['model']]
        speeds = f'{r["inverted"]:.3f} | {r["made"]:.3f} | {times:.1f}'
        about = f'{r["model"]} | {r["procedure"]} | {r["batch"]}'
        share = f'{r["share"]:.0%}'
        lines.append(f'| {about} | {speeds} | {share} | {r["peak"]:.1f} |')
    return lines


def small_sizes() -> dict:
    "Networks for a rehearsal on the CPU."
    unets = {kind: dict(small_models.small_unet(kind).config) for kind in ('sd1', 'xl')}
    unets = {k: {n: v for n, v in c.items() if n[0] != '_'} for k, c in unets.items()}
    one, two = (32, 2, 4, 32, 'quick_gelu'), (24, 2, 4, 32, 'quick_gelu')
    return {
        'small SD': Size('sd1', unets['sd1'], (8, 16), (one,), 16),
        'small XL': Size('xl', unets['xl'], (8, 16), (two, (40, 2, 4, 32, 'gelu')), 16),
    }


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', help='a file for the table, as JSON')
    parser.add_argument('--batch', type=int, default=8, help='images of a batch')
    parser.add_argument('--steps', type=int, default=25, help='DDIM steps of the table')
    parser.add_argument('--only', help='one model, as "SD 1.5"')
    parser.add_argument('--rehearse', action='store_true', help='small, on the CPU')
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        print('no CUDA device here: nothing was checked')
        return NO_GPU
    device = 'cpu' if args.rehearse else 'cuda'
    sizes = small_sizes() if args.rehearse else TRUE
    rows, runs, failed, said = [], [], [], []

    def say(line):
        print(line, flush=True)
        said.append(line)

    print(
        f'{device_name(device)}; torch {torch.__version__}, CUDA {torch.version.cuda}'
    )
    for name, size in sizes.items():
        if args.only in (None, name):
            pipe = build(size, device, args.batch)
            images = images_of(pipe, args.batch)
            failed += run_checks(name, pipe, images, say)
            rows += run_table(name, pipe, images, args.batch, args.steps)
            runs.append(run_whole(name, pipe, images))
            del pipe
    print('', *told_runs(runs), '', *told(rows), sep='\n')
    if args.out:
        about = dict(device=device_name(device), torch=torch.__version__)
        Path(args.out).write_text(
            json.dumps(dict(about, checks=said, runs=runs, rows=rows), indent=1) + '\n'
        )
    print(f'\n{len(failed)} failed' if failed else '\nall is well')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
