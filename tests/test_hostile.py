"""Files from elsewhere with odd contents: published concepts, and models whose folder was
edited. Each is read, or refused in one line."""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oddities import changed, property_of
from safetensors.torch import save_file

from diffii.base.checkpoints import TINY
from diffii.base.files import UserError
from diffii.base.loras import lora_to_peft, read_lora
from diffii.base.pipeline import load_pipeline
from diffii.base.settings import model_notes
from diffii.run.concept_files import import_concepts, read_embeddings


def works(action):
    "Does it work? A `UserError` of one line is the only other thing allowed."
    try:
        action()
    except UserError as e:
        assert str(e).splitlines() == [str(e)]
        return False
    return True


NUMBERS = st.integers(-(10**30), 10**30) | st.floats() | st.booleans()
SCALARS = st.none() | NUMBERS | st.text(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda part: (
        st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=8), part)
    ),
    max_leaves=6,
)


# ---- published concepts

SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.complex64])
TENSORS = st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), SHAPES, DTYPES)
KEYS = st.sampled_from(
    [
        '<oak>',
        'emb_params',
        'clip_g',
        'clip_l',
        'string_to_param',
        'learned_embeds_dict',
    ]
)
THINGS = TENSORS | st.dictionaries(KEYS, TENSORS, max_size=2) | SCALARS | st.just([1])
HELD = st.dictionaries(KEYS | st.just('name2placeholder') | st.integers(), THINGS)


@given(held=HELD | THINGS)
@property_of(100)
def test_a_torch_file_of_anything_is_read_or_refused(tmp_path_factory, held):
    file = tmp_path_factory.mktemp('odd') / 'learned_embeds.bin'
    torch.save(held, file)

    works(lambda: read_embeddings(file))


LAYER = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
LORA_KEYS = st.sampled_from(
    [
        f'unet.{LAYER}.lora_A.weight',
        f'unet.{LAYER}.lora_B.weight',
        f'unet.{LAYER}.lora.down.weight',
        f'unet.{LAYER}.lora.up.weight',
        f'{LAYER}.alpha',
        'lora_unet_mid.lora_down.weight',
        'text_encoder.x',
        '',
    ]
)
HEADS = st.fixed_dictionaries(
    {},
    optional={
        'unet.lora_alpha': JSON,
        'unet.alpha_pattern': JSON
        | st.dictionaries(st.sampled_from(['to_q', '(a+)+$', '[']), JSON),
        'unet.use_rslora': JSON,
    },
)
NOTES = st.builds(json.dumps, HEADS | JSON) | st.text(max_size=9)


@given(
    held=st.dictionaries(LORA_KEYS, TENSORS, max_size=3),
    down=TENSORS,
    up=TENSORS,
    notes=NOTES,
)
@property_of(100)
def test_a_lora_of_anything_is_read_or_refused(held, down, up, notes):
    pair = {f'unet.{LAYER}.lora_A.weight': down, f'unet.{LAYER}.lora_B.weight': up}

    works(lambda: lora_to_peft(pair | held, {'lora_adapter_metadata': notes}))
    works(lambda: lora_to_peft(held, {'lora_adapter_metadata': notes}))


def test_a_pattern_that_could_run_for_ever_is_refused():
    pair = {f'unet.{LAYER}.lora_{end}.weight': torch.ones(2, 2) for end in 'AB'}
    notes = json.dumps({'unet.alpha_pattern': {'(a+)+$': 2}})

    with pytest.raises(UserError, match='alpha_pattern'):
        lora_to_peft(pair, {'lora_adapter_metadata': notes})


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny')


def test_an_embedding_without_vectors_is_refused(pipe, tmp_path):
    save_file({'<oak>': torch.zeros(0, 64)}, tmp_path / 'learned_embeds.safetensors')

    with pytest.raises(UserError, match='not an embedding'):
        import_concepts(pipe, tmp_path)


def test_a_lora_whose_ranks_differ_is_refused(pipe, tmp_path):
    pair = {f'unet.{LAYER}.lora_{e}.weight': torch.ones(3, 2) for e in 'AB'}
    save_file(pair, tmp_path / 'lora.safetensors')

    with pytest.raises(UserError, match='not of one rank'):
        read_lora(pipe, tmp_path / 'lora.safetensors')


# ---- models

STAGES = st.sampled_from(['concepts', 'inversion', 'sampling', 'version'])
SETTINGS = st.sampled_from(
    [
        'steps',
        'guided',
        'flip',
        'lr',
        'by_metaclass',
        'per_image',
        'method',
        'strengths',
    ]
)
ADVICE = st.dictionaries(STAGES, st.dictionaries(SETTINGS, JSON, max_size=3) | JSON)


@given(advice=ADVICE | JSON)
@property_of(100)
def test_recommendations_of_any_kind_are_read_or_refused(tmp_path_factory, advice):
    folder = tmp_path_factory.mktemp('model')
    (folder / 'diffii.json').write_text(json.dumps(advice), encoding='utf-8')

    works(lambda: model_notes(str(folder)))


CONFIGS = (
    'model_index.json',
    'scheduler/scheduler_config.json',
    'unet/config.json',
    'vae/config.json',
    'text_encoder/config.json',
)


@given(data=st.data())
@property_of(25, share=0.25)
def test_an_edited_model_is_loaded_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp('edited') / 'model'
    shutil.copytree(TINY, folder)
    file = folder / data.draw(st.sampled_from(CONFIGS))
    file.write_text(json.dumps(changed(data, json.loads(file.read_text()))))

    loads = works(lambda: load_pipeline(str(folder)))

    shutil.rmtree(folder)
    assert loads in (True, False)


@pytest.mark.parametrize(
    'file, key, value',
    [
        ('scheduler/scheduler_config.json', 'beta_schedule', 'parabolic'),
        ('scheduler/scheduler_config.json', 'beta_end', 'high'),
        ('scheduler/scheduler_config.json', 'num_train_timesteps', 10),
        ('unet/config.json', 'sample_size', None),
        ('unet/config.json', 'in_channels', 9),
        ('unet/config.json', 'block_out_channels', [10**12, 10**12, 10**12]),
        ('unet/config.json', 'cross_attention_dim', 12),
        ('vae/config.json', 'scaling_factor', 0),
        ('vae/config.json', 'latent_channels', '4'),
        ('text_encoder/config.json', 'hidden_size', 10**12),
        ('model_index.json', '_class_name', 7),
        ('model_index.json', 'unet', ['os', 'system']),
    ],
)
def test_a_model_that_cannot_be_is_one_line(tmp_path, file, key, value):
    shutil.copytree(TINY, tmp_path / 'model')
    config = tmp_path / 'model' / file
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))

    with pytest.raises(UserError) as e:
        load_pipeline(str(tmp_path / 'model'))

    assert str(e.value).splitlines() == [str(e.value)]
