"The plan of a run: calls, memory, disk and time, and what to change where it does not fit."

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import small_models as models
from small_models import TREES
from typer.testing import CliRunner

from diffii.app import cli
from diffii.base.files import UserError
from diffii.base.images import ImageSet
from diffii.base.pipeline import Pipeline
from diffii.base.settings import (
    ConceptSettings,
    InversionSettings,
    SamplingSettings,
    Settings,
)
from diffii.method.denoising import two_stage_denoise
from diffii.method.imagination import Guide, imagine
from diffii.method.inversion import ddim_invert, images_to_invert
from diffii.method.synthesis import make_plan
from diffii.run import planning, runs
from diffii.run.planning import (
    LiveBytes,
    ModelMemory,
    Stage,
    advice,
    check_fits,
    disk_bytes,
    free_bytes,
    fused_attention,
    inverted_images,
    inversion_calls,
    made_images,
    model_memory,
    plan_run,
    seconds_per_image,
    stages,
    unet_calls,
    unet_inputs,
)
from diffii.run.runs import synthesize

import torch

GIB = 2**30
SECONDS = dict(step=0.1, call=0.01, decoding=0.02)


@pytest.fixture
def pipe():
    return models.load(models.checkpoint('sd1'))


@pytest.fixture
def asked(pipe, monkeypatch):
    "Images in all calls of the U-Net, as they are made."
    forward, seen = pipe.unet.forward, []

    def counted(x, *args, **kwargs):
        seen.append(len(x))
        return forward(x, *args, **kwargs)

    monkeypatch.setattr(pipe.unet, 'forward', counted)
    return seen


# ---- calls


@pytest.mark.parametrize(
    'given, calls',
    (
        (dict(), 20),
        (dict(guidance_scale=1), 10),
        (dict(guided=(0.0, 0.6)), 16),
        (dict(guided=(0.0, 0.6), solver='dpm++', stride=3), 6),
    ),
    ids=('guided', 'not guided', 'guided in part', 'steps left out'),
)
def test_calls_of_sampling_are_those_that_are_made(pipe, asked, given, calls):
    settings = SamplingSettings(steps=10, split_ratio=0.0, **given)

    counted = unet_calls(pipe, settings)
    before = list(asked)
    plain = pipe.encode_prompts(['a tree'])
    two_stage_denoise(pipe, models.noise(1), plain, settings=settings)

    assert before == []  # nothing is computed to count them
    assert counted == sum(asked) == calls


@pytest.mark.parametrize(
    'given, calls',
    [
        (dict(few_step='own'), 8),
        (dict(few_step='own', fresh_noise=0.5, calls=4), 4),
        (dict(few_step='latent-consistency/lcm-lora-sdv1-5'), 8),
    ],
)
def test_calls_with_few_step_weights_need_no_weights(pipe, given, calls):
    settings = SamplingSettings(steps=10, split_ratio=0.0, **given)

    assert unet_calls(pipe, settings) == calls


def test_of_images_that_begin_later_the_mean_is_taken(pipe):
    settings = SamplingSettings(method='da-fusion', steps=10, strengths=(0.2, 0.6))

    assert unet_calls(pipe, settings) == 2 * (2 + 6) / 2


@pytest.mark.parametrize(
    'given',
    (dict(), dict(forward_steps=2, fixed_point_iters=2), dict(guidance_scale=2.0)),
    ids=('plain', 'forward steps and corrections', 'guided'),
)
@pytest.mark.filterwarnings('ignore:inversion at guidance')
def test_calls_of_inversion_are_those_that_are_made(pipe, asked, given):
    settings = InversionSettings(steps=6, **given)
    cond = pipe.encode_prompts(['a tree'])

    ddim_invert(pipe, models.noise(1), cond, settings, models.noise(1), cond)

    assert sum(asked) == inversion_calls(settings)


def test_a_guide_has_every_image_decoded_twice_in_each_step(pipe, monkeypatch):
    settings = Settings.of(
        pipe, 'tree', sampling=dict(method='gif'), guide=dict(steps=3)
    )
    decode, seen = pipe.vae.decode, []

    def counted(z):
        seen.append(len(z))
        return decode(z)

    def look(x):
        return x.flatten(1)[:, :2], x.flatten(1)

    monkeypatch.setattr(pipe.vae, 'decode', counted)
    start, labels = torch.zeros(2, 2, 4, 1, 1), torch.tensor([0, 1])
    with Guide(look, settings.guide).attached(pipe):
        imagine(pipe, models.noise(2), start, labels, labels)
    work = plan_run(pipe, TREES, settings, dict(SECONDS, look=0.04)).work

    [row] = [row for row in work if row['stage'] == 'guiding']
    assert sum(seen) == 2 * 3 * 2
    assert row['images'] == 2 * 3 * made_images(TREES, settings.sampling)
    assert row['seconds'] == pytest.approx(row['images'] * (0.02 + 0.04) / 2)


@pytest.mark.parametrize('flip', (True, False))
@pytest.mark.parametrize('steps', (0, 5))
def test_inversions_are_those_of_a_pool(flip, steps):
    "One category has one image, which gets views."
    images = TREES.subset([0, 1, 2])
    settings = InversionSettings(steps=steps, flip=flip)

    todo = [images_to_invert(images, k, settings, fit=lambda im: im) for k in (0, 1)]

    assert inverted_images(images.counts, settings) == sum(map(len, todo))


@pytest.mark.parametrize('method', ('diff-mix', 'real-filter', 'real-gen', 'original'))
def test_images_are_those_of_the_plan(method):
    settings = SamplingSettings(method=method, expansion=3, split_ratio=0.0)
    pool = SimpleNamespace(names=[['a', 'b'], ['c', 'd']])
    rows = make_plan(TREES.classes, pool, [], settings, TREES.counts, 'm', 0, 8)

    assert made_images(TREES, settings) == len(rows)


# ---- memory


def test_bytes_are_counted_while_tensors_live():
    with torch.device('meta'), LiveBytes() as live:
        a = torch.zeros(100)
        a.view(10, 10).add_(1)  # no new memory
        b = a + 1
        del b
        c = a + 2
        in_block = live.now
    del a, c

    assert (in_block, live.peak, live.now) == (800, 800, 0)


def test_what_was_there_before_does_not_count():
    weight = torch.zeros(100)

    with LiveBytes([weight]) as live:
        weight.mul_(2)

    assert live.peak == 0


@pytest.mark.parametrize('kind', ('sd1', 'sd2-v', 'xl'))
def test_memory_without_content_is_memory_with_content(kind):
    pipe = models.loaded(kind)
    needed = model_memory(pipe, ConceptSettings(rank=2))

    arguments, named = unet_inputs(pipe.unet, 1)
    with torch.no_grad(), fused_attention(), LiveBytes(pipe.unet.parameters()) as live:
        pipe.unet(*arguments, **named)

    assert needed.call == live.peak
    assert needed.unet == sum(p.nbytes for p in pipe.unet.parameters())
    assert needed.call < needed.checkpointed < needed.learning


def test_the_estimate_is_of_the_size_that_was_asked_for():
    small, large = (
        model_memory(models.load(models.checkpoint('sd1'), size=s), ConceptSettings())
        for s in (16, 32)
    )

    assert large.unet == small.unet
    assert 3 < large.call / small.call < 5
    assert 3 < large.vae_call / small.vae_call < 5


def test_the_model_is_left_as_it_was(pipe):
    before, default = models.weights(pipe), torch.get_default_dtype()
    attention = torch.nn.functional.scaled_dot_product_attention

    model_memory(pipe, ConceptSettings())

    after = models.weights(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.get_default_dtype() == default
    assert torch.nn.functional.scaled_dot_product_attention is attention


# ---- what does not fit

NEEDED = ModelMemory(
    unet=2 * GIB,
    vae=GIB,
    text=GIB,
    lora=0,
    call=GIB // 4,
    learning=2 * GIB,
    checkpointed=GIB // 2,
    vae_call=GIB,
)


def told(name, room, settings=None, **changes):
    "The advice about a stage."
    settings = settings or Settings.of(concepts=dict(batch_size=8))
    pipe = SimpleNamespace(offload=True, micro_batch=16, vae_batch=16)
    found = {stage.name: stage for stage in stages(pipe, settings, NEEDED)}
    return advice(replace(found[name], **changes), room * GIB, NEEDED, settings)


@pytest.mark.parametrize(
    'name, room, change',
    (
        ('learning', 24, ''),
        ('learning', 8, '--checkpointing'),
        ('learning', 5, '--checkpointing --concept-micro-batch 4'),
        ('inversion', 6, ''),
        ('inversion', 4, '--batch-size 8'),
        ('sampling', 4, '--batch-size 8'),
        ('decoding', 20, ''),
        ('decoding', 6, '--vae-batch 3'),
        ('decoding', 3.5, '--vae-batch 1 --vae-tiling'),
    ),
)
def test_what_to_change_where_it_does_not_fit(name, room, change):
    assert told(name, room) == change


@pytest.mark.parametrize('name', ('learning', 'sampling'))
def test_what_cannot_fit_is_an_error(name):
    least = dict(learning='3.5', sampling='2.2')[name]
    message = f'{name}: needs {least} GiB for one image.*; give a smaller --size'

    with pytest.raises(UserError, match=message):
        told(name, 2)


def test_half_precision_helps_where_it_is_not_in_force():
    exact = Settings.of(model=dict(dtype='float32'))

    with pytest.raises(UserError, match='give --dtype float16 or a smaller --size'):
        told('sampling', 2, exact)


def test_tiles_that_do_not_fit_are_an_error():
    tiles = Settings.of(model=dict(vae_tiling=True, dtype='float16'))

    with pytest.raises(UserError, match='decoding: .*; give a smaller --size'):
        told('decoding', 3, tiles)


def test_parts_that_do_not_wait_take_memory_in_every_stage():
    settings = Settings()
    waiting, there = (
        stages(SimpleNamespace(offload=o, micro_batch=1, vae_batch=1), settings, NEEDED)
        for o in (True, False)
    )

    more = [b.fixed - a.fixed for a, b in zip(waiting, there)]

    assert more == [GIB, 2 * GIB, 2 * GIB, GIB]


@pytest.mark.parametrize(
    'given, names',
    [
        (dict(sampling=dict(method='real-gen')), ['sampling', 'decoding']),
        (dict(run=dict(concepts='there')), ['inversion', 'sampling', 'decoding']),
    ],
)
def test_where_nothing_is_learned_there_is_no_such_stage(given, names):
    settings = Settings.of(**given)
    pipe = SimpleNamespace(offload=True, micro_batch=1, vae_batch=1)

    found = [stage.name for stage in stages(pipe, settings, NEEDED)]

    assert found == names


def test_a_stage_says_how_many_images_fit():
    stage = Stage('sampling', GIB, GIB // 4, 64, '')

    assert [stage.fitting(n * GIB) for n in (0, 1, 2, 4)] == [0, 0, 4, 12]


# ---- disk


def test_a_disk_that_is_too_small_is_an_error(pipe, monkeypatch, tmp_path):
    monkeypatch.setattr(planning, 'free_bytes', lambda path: 100)
    settings = Settings.of(pipe, 'tree', run=dict(out=str(tmp_path / 'x')))

    told = r'x: the run makes 20 images and writes up to .* 0.0 MiB are free; make'
    with pytest.raises(UserError, match=told):
        plan_run(pipe, TREES, settings, SECONDS)


def test_every_run_is_asked_before_it_plans(pipe, monkeypatch, tmp_path):
    def no_plan(*about):
        raise AssertionError('it is planned')

    monkeypatch.setattr(runs, 'iter_plan', no_plan)
    settings = Settings.of(pipe, 'tree', sampling=dict(expansion=10**12))

    told = 'makes 4,000,000,000,000 images and writes up to .* a smaller --expansion'
    with pytest.raises(UserError, match=told):
        synthesize(pipe, TREES, tmp_path / 'x', settings, ['in snow.'], progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_goes_on_is_not_asked_again(pipe, monkeypatch, tmp_path):
    given = dict(method='real-gen', steps=1, expansion=1)
    about = pipe, TREES, tmp_path / 'x', Settings.of(pipe, 'tree', sampling=given), []
    made = synthesize(*about, progress=False)

    monkeypatch.setattr(planning, 'free_bytes', lambda path: 0)

    assert len(synthesize(*about, progress=False)) == len(made) == 4


def test_disk_is_counted_in_pixels_latents_and_weights(pipe):
    settings = Settings.of(pipe, 'tree', sampling=dict(expansion=2))

    disk = disk_bytes(pipe, TREES, settings, lora=1600)

    assert disk['images'] == 8 * 3 * 16 * 16
    assert disk['records'] == 8 * planning.RECORDS
    assert disk['inversions'] == 4 * 4 * (4 * 8 * 8)
    assert disk['concepts'] == 4 * (2 * 32) * 4 + 1600


def test_augment_writes_nothing_where_the_disk_is_too_small(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(planning, 'free_bytes', lambda path: 100)
    out = tmp_path / 'out'
    line = ['augment', str(folder), '--out', str(out), '--metaclass', 'tree']

    result = CliRunner().invoke(cli.app, [*line, '--device', 'cpu'])

    assert isinstance(result.exception, UserError)
    assert f'--out {out}: the run makes' in str(result.exception)
    assert not out.exists()


def test_augment_asks_whether_a_gpu_has_the_memory(pipe, monkeypatch):
    monkeypatch.setattr(planning, 'room_of', lambda pipe: 10)
    settings = Settings.of(pipe, 'tree')
    check_fits(pipe, settings)  # a CPU is not asked
    monkeypatch.setattr(Pipeline, 'device', torch.device('cuda'))

    with pytest.raises(UserError, match='learning: needs .* GiB for one image'):
        check_fits(pipe, settings)


def test_free_space_is_that_of_the_folder_that_will_be(tmp_path):
    assert free_bytes(tmp_path / 'not' / 'yet') == pytest.approx(
        free_bytes(tmp_path), rel=0.1
    )


# ---- time


@pytest.fixture
def clock(monkeypatch):
    "A clock that only a call moves, by a tenth of a second for each image."
    now = SimpleNamespace(time=0.0, calls=[])

    def call(n):
        now.calls.append(n)
        now.time += 0.1 * n

    monkeypatch.setattr(planning.time, 'perf_counter', lambda: now.time)
    now.call = call
    return now


def test_as_many_images_are_timed_as_take_half_a_second(clock):
    seconds = seconds_per_image(clock.call, most=64)

    assert seconds == pytest.approx(0.1)
    assert clock.calls == [1, 1, 2, 4, 8, 8, 8]


def test_no_more_images_are_timed_than_there_are(clock):
    assert seconds_per_image(clock.call, most=3) == pytest.approx(0.1)
    assert clock.calls == [1, 1, 2, 3, 3, 3]


def test_a_long_call_is_timed_once(clock):
    slow = 200
    assert seconds_per_image(lambda n: clock.call(slow * n), most=8) == pytest.approx(
        20
    )
    assert clock.calls == [slow, slow]


LEARNED_AND_GUIDED = dict(
    sampling=dict(method='gif'), concepts=dict(learn='tokens+lora')
)


@pytest.mark.parametrize('kind', ('sd1', 'xl'))
def test_timed_batches_leave_the_model_as_it_was(kind, monkeypatch):
    pipe = models.load(models.checkpoint(kind))
    settings = Settings.of(pipe, 'tree', **LEARNED_AND_GUIDED)
    before = models.weights(pipe)

    def once(call, most):
        call(1)
        return 1

    monkeypatch.setattr(planning, 'seconds_per_image', once)
    seconds = planning.time_stages(pipe, settings)

    assert seconds == dict(step=1, call=1, decoding=1, look=1)
    after = models.weights(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    networks = pipe.unet, pipe.vae
    assert all(p.grad is None for net in networks for p in net.parameters())


@pytest.mark.parametrize('given', (dict(learn='none'), dict(learn='tokens')))
def test_a_step_is_timed_where_concepts_are_learned(given, monkeypatch):
    pipe = models.load(models.checkpoint('sd1'))
    monkeypatch.setattr(planning, 'seconds_per_image', lambda call, most: 1)

    seconds = planning.time_stages(pipe, Settings.of(pipe, 'tree', concepts=given))

    assert ('step' in seconds) == (given['learn'] != 'none')


@pytest.mark.parametrize('asked', (False, True))
def test_a_step_is_timed_in_the_memory_that_it_will_have(asked, monkeypatch):
    pipe = models.load(models.checkpoint('sd1'))
    seen = []

    def timed(call, most):
        seen.append(pipe.unet.is_gradient_checkpointing)
        return 1

    monkeypatch.setattr(planning, 'seconds_per_image', timed)
    concepts = dict(learn='tokens', checkpointing=asked)
    planning.time_stages(pipe, Settings.of(pipe, 'tree', concepts=concepts))

    assert any(seen) == asked
    assert not pipe.unet.is_gradient_checkpointing


def test_a_step_that_does_not_fit_is_timed_with_checkpointing():
    settings = Settings()
    memory = [dict(stage='learning', change='--checkpointing --concept-micro-batch 1')]

    assert planning._as_advised(settings, memory).concepts.checkpointing
    assert planning._as_advised(settings, []) == settings


def test_the_time_of_moving_networks_is_not_that_of_a_batch(monkeypatch):
    "Networks that wait on the CPU are not moved in a timed batch."
    pipe = models.load(models.checkpoint('sd1'))
    settings = Settings.of(pipe, 'tree', **LEARNED_AND_GUIDED)
    pipe.offload, brought, away, during = True, [], [], []
    bring = Pipeline._bring

    def counted(self, part, device):
        # where networks wait is a name, and where they work a torch.device
        (away if device == 'cpu' else brought).append(part)
        bring(self, part, device)

    def twice(call, most):
        call(1)
        brought.clear()
        away.clear()
        call(1)
        during.append((list(brought), list(away)))
        return 1

    monkeypatch.setattr(Pipeline, '_bring', counted)
    monkeypatch.setattr(planning, 'seconds_per_image', twice)
    planning.time_stages(pipe, settings)

    assert len(during) == 4 and 'vae' in away  # in the end
    for came, went in during:
        assert 'text' not in came and 'vae' not in went


# ---- half precision


def test_norms_are_counted_in_32_bits_and_products_in_16():
    layers = (
        (torch.nn.Conv2d, (4, 4, 1), torch.float16),
        (torch.nn.GroupNorm, (2, 4), torch.float32),
    )
    with planning.on_meta(torch.float16):
        x = torch.zeros(1, 4, 2, 2)
        for layer, sizes, expected in layers:
            with planning.mixed_precision():
                assert layer(*sizes)(x.float()).dtype == expected
                assert layer(*sizes)(x).dtype == expected
        rows = torch.zeros(3, 4)
        with planning.mixed_precision():
            assert torch.nn.LayerNorm(4)(rows).dtype == torch.float32
            assert torch.nn.Linear(4, 2)(rows.float()).dtype == torch.float16
        assert torch.nn.LayerNorm(4)(rows).dtype == torch.float16


def test_a_step_in_half_precision_takes_more_than_half_of_one_in_full(pipe):
    config = dict(pipe.unet.config)
    peaks = {}
    for dtype in (torch.float16, torch.float32):
        with planning.on_meta(dtype):
            unet = type(pipe.unet).from_config(config)
            planning.with_lora(unet, 2)
            peaks[dtype] = planning.peak_of_call(unet, learning=True)

    share = peaks[torch.float16] / peaks[torch.float32]
    assert 0.55 < share < 0.9


# ---- the whole plan


def test_work_is_images_times_calls_times_seconds(pipe):
    settings = Settings.of(
        pipe,
        'tree',
        concepts=dict(steps=100, batch_size=2),
        sampling=dict(expansion=5, steps=10),
    )

    plan = plan_run(pipe, TREES, settings, SECONDS)

    rows = {r['stage']: (r['images'], r['calls'], r['seconds']) for r in plan.work}
    assert rows['learning'] == (200, 600, pytest.approx(20))
    assert rows['inversion'] == (4, 40, pytest.approx(0.4))
    assert rows['sampling'] == (20, 400, pytest.approx(4))
    assert rows['decoding'] == (20, 0, pytest.approx(0.4))
    assert plan.about == dict(model=pipe.model, device='cpu', dtype='float32')


def test_given_concepts_are_not_learned(pipe):
    settings = Settings.of(pipe, 'tree', run=dict(concepts='somewhere'))

    plan = plan_run(pipe, TREES, settings, SECONDS)

    assert 'learning' not in [row['stage'] for row in plan.work]


def test_the_plan_as_text_says_what_to_change(pipe, monkeypatch):
    needed = model_memory(pipe, ConceptSettings())
    room = needed.unet + 3 * needed.call
    monkeypatch.setattr(planning, 'room_of', lambda pipe: int(room))
    monkeypatch.setattr(planning, 'advice', lambda stage, *a: f'change {stage.name}')

    text = str(plan_run(pipe, TREES, Settings.of(pipe, 'tree'), SECONDS))

    for stage in ('learning', 'inversion', 'sampling', 'decoding'):
        assert f'change {stage}' in text
    assert 'in float32' in text and 'disk: up to' in text
    assert 'not counted' not in text


def test_the_plan_of_a_guide_says_what_is_not_counted(pipe):
    settings = Settings.of(pipe, 'tree', **LEARNED_AND_GUIDED)

    text = str(plan_run(pipe, TREES, settings, dict(SECONDS, look=0.04)))

    assert 'guiding' in text
    assert 'not counted: training the guide, its own calls' in text


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        file = tmp_path / 'trees' / TREES.classes[TREES.labels[i]] / f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        TREES.open(i).save(file)
    return tmp_path / 'trees'


@pytest.mark.parametrize('words', (('plan',), ('augment', '--plan')))
def test_the_command_writes_nothing(words, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, 'time_stages', lambda pipe, settings: SECONDS)
    monkeypatch.chdir(tmp_path)
    out = ('--out', str(tmp_path / 'out'), '--metaclass', 'tree')

    result = CliRunner().invoke(cli.app, [*words, str(folder), *out, '--device', 'cpu'])

    assert result.exit_code == 0, result.output
    assert 'learning' in result.output and 'fits' in result.output
    assert [p.name for p in tmp_path.iterdir()] == ['trees']


def test_a_plan_needs_images():
    result = CliRunner().invoke(cli.app, ['plan'])

    assert isinstance(result.exception, UserError)
    assert 'IMAGES' in str(result.exception)


def test_an_image_set_without_files_can_be_planned(pipe):
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    images = ImageSet(tuple(pixels), (0, 0), ('oak',), 'tree', ('a', 'b'))

    plan = plan_run(pipe, images, Settings.of(pipe, 'tree'), SECONDS)

    assert plan.work[-1]['images'] == 10
