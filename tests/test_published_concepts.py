"Learned concepts in the formats that others publish and read: Diff-Mix, diffusers, A1111."

import re

import pytest
import small_models as models
import torch
from safetensors.torch import save_file
from small_models import TREES

from diffii.base.files import UserError
from diffii.method.concepts import Concepts, learn_concepts
from diffii.run.concept_files import FORMATS, export_concepts, import_concepts


@pytest.fixture(scope='module')
def pipe():
    return models.load(models.checkpoint('sd1'))


@pytest.fixture(scope='module')
def learned(pipe):
    return learn_concepts(pipe, TREES, models.short_learning())


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


# ---- what Diff-Mix publishes

MIX_TOKENS = {'F-16A/B': '<class_0>', 'Black footed Albatross': '<class_1>'}


def old_lora_name(name):
    "As U-Nets had it when LoRA was an attention processor."
    ends = dict(A='down', B='up')
    return re.sub(
        r'\.to_(q|k|v|out)(\.0)?\.lora_([AB])',
        lambda m: f'.processor.to_{m[1]}_lora.{ends[m[3]]}',
        name,
    )


@pytest.fixture(scope='module')
def diff_mix(learned, tmp_path_factory):
    "A folder of Diff-Mix with two steps, in the other order of categories."
    folder = tmp_path_factory.mktemp('diff-mix')
    # rows of a parameter, with a gradient, as theirs are
    rows = torch.nn.Parameter(learned.embeddings[0].flip(0))[[0, 1]]
    for step, embeddings in (('500', torch.zeros_like(rows)), ('35000', rows)):
        held = dict(
            learned_embeds_dict=dict(zip(MIX_TOKENS.values(), embeddings)),
            name2placeholder=MIX_TOKENS,
            placeholder2name={token: name for name, token in MIX_TOKENS.items()},
        )
        torch.save(held, folder / f'learned_embeds-steps-{step}.bin')
    lora = {old_lora_name(name): v for name, v in learned.lora.items()}
    save_file(lora, folder / 'pytorch_lora_weights.safetensors')
    return folder


@pytest.mark.parametrize(
    'classes',
    [
        ['Black_footed_Albatross', 'F-16A_B'],
        ['black-footed albatross', 'F-16A/B'],
    ],
    ids=lambda classes: classes[0],
)
def test_diff_mix_is_read_in_the_order_of_the_classes(pipe, learned, diff_mix, classes):
    got = import_concepts(pipe, diff_mix, classes=classes, metaclass='tree')

    assert got.classes == tuple(classes)
    assert got.n_tokens == 1
    assert got.settings.rank == 2
    assert got.base == learned.base
    assert torch.equal(got.embeddings[0], learned.embeddings[0])
    assert not got.embeddings[0].requires_grad
    expected = models.predicted_with(learned, pipe)
    assert torch.equal(models.predicted_with(got, pipe), expected)


def test_diff_mix_has_the_names_of_its_categories(pipe, diff_mix):
    assert import_concepts(pipe, diff_mix).classes == tuple(MIX_TOKENS)


def test_a_file_of_embeddings_comes_without_a_lora(pipe, diff_mix):
    file = diff_mix / 'learned_embeds-steps-35000.bin'

    assert not import_concepts(pipe, file).lora
    assert import_concepts(pipe, file, lora=diff_mix).lora


@pytest.mark.parametrize(
    'classes, message',
    [
        (['F-16A/B', 'DC-10'], 'no token for DC-10'),
        (['F-16A/B', 'F-16A_B'], 'same token'),
    ],
)
def test_a_category_without_a_token_of_its_own_is_named(
    pipe, diff_mix, classes, message
):
    with pytest.raises(UserError, match=message):
        import_concepts(pipe, diff_mix, classes=classes)


def test_embeddings_of_another_model_are_refused(diff_mix):
    with pytest.raises(UserError, match='files of all its encoders'):
        import_concepts(models.loaded('xl'), diff_mix)


def test_a_missing_file_is_named(pipe, tmp_path):
    with pytest.raises(UserError, match='no such file'):
        import_concepts(pipe, tmp_path / 'none')


# ---- out and in again, in every format


@pytest.fixture(
    scope='module',
    params=[
        (k, f) for k in ('sd2-v', 'xl') for f in FORMATS if (k, f) != ('xl', 'diff-mix')
    ],
    ids='-'.join,
)
def exported(request, tmp_path_factory):
    "A pipeline, its concepts, the folder they were written to, and the format."
    kind, form = request.param
    pipe, folder = models.load(models.checkpoint(kind)), tmp_path_factory.mktemp(form)
    settings = models.short_learning(n_tokens=1 if form == 'diff-mix' else 3)
    concepts = learn_concepts(pipe, TREES, settings)
    export_concepts(concepts, folder, form)
    return pipe, concepts, folder, form


def read_again(pipe, folder):
    return import_concepts(pipe, folder, classes=TREES.classes, metaclass='tree')


def test_what_was_written_is_read(exported):
    pipe, concepts, folder, _ = exported

    back = read_again(pipe, folder)

    assert back.n_tokens == concepts.n_tokens
    assert back.settings.rank == concepts.settings.rank
    for ours, theirs in zip(back.embeddings, concepts.embeddings):
        assert torch.equal(ours, theirs)
    expected = models.predicted_with(concepts, pipe)
    assert torch.equal(models.predicted_with(back, pipe), expected)


def test_what_was_read_can_be_saved(exported, tmp_path):
    pipe, concepts, folder, _ = exported

    read_again(pipe, folder).save(tmp_path)

    expected = models.predicted_with(concepts, pipe)
    assert torch.equal(models.predicted_with(Concepts.load(tmp_path), pipe), expected)


def test_diffusers_reads_the_lora(exported):
    pipe, concepts, folder, form = exported
    a1111 = folder / 'models' / 'Lora' / 'diffii.safetensors'
    kind = 'xl' if len(pipe.text_parts) == 2 else 'sd2-v'
    other = models.load(models.checkpoint(kind))

    other.pipe.load_lora_weights(a1111 if form == 'a1111' else folder)

    with concepts.attached(pipe):
        ours = models.predicted(pipe, ['a bird'])
    assert_close(models.predicted(other, ['a bird']), ours)


def test_diff_mix_has_no_room_for_two_text_encoders(tmp_path):
    pipe = models.load(models.checkpoint('xl'))
    concepts = learn_concepts(pipe, TREES, models.short_learning())

    with pytest.raises(UserError, match='one text encoder'):
        export_concepts(concepts, tmp_path, 'diff-mix')


# ---- single files of textual inversion


@pytest.fixture(scope='module')
def rows():
    "Three vectors for each of two categories."
    return torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def save_a1111(file, vectors):
    "A file as A1111 writes it."
    held = {
        'string_to_token': {'*': 265},
        'string_to_param': {'*': vectors},
        'name': 'my words',
        'step': 9,
        'sd_checkpoint': None,
        'sd_checkpoint_name': None,
    }
    torch.save(held, file)


@pytest.fixture
def a1111(rows, tmp_path):
    "A folder with a file of A1111 for each category."
    for name, vectors in zip(TREES.classes, rows):
        save_a1111(tmp_path / f'{name}.pt', vectors)
    return tmp_path


def test_files_of_a1111_are_called_by_their_names(pipe, rows, a1111):
    got = import_concepts(pipe, a1111, classes=['oak', 'elm'], metaclass='tree')

    assert (got.classes, got.metaclass, got.n_tokens) == (('oak', 'elm'), 'tree', 3)
    assert torch.equal(got.embeddings[0], rows.flatten(0, 1))
    assert models.predicted_with(got, pipe).isfinite().all()


def test_another_number_of_vectors_is_named(pipe, rows, a1111):
    torch.save({'string_to_param': {'*': rows[0][:1]}}, a1111 / 'ash.pt')

    with pytest.raises(UserError, match='ash has 1 vectors'):
        import_concepts(pipe, a1111, classes=['oak', 'ash'])


@pytest.mark.parametrize('classes', (['oak'], {'tree 1': '<oak>'}), ids=str)
def test_a_file_of_diffusers_is_called_by_its_token(pipe, rows, tmp_path, classes):
    torch.save({'<oak>': rows[0]}, tmp_path / 'learned_embeds.bin')

    got = import_concepts(pipe, tmp_path, classes=classes)

    assert torch.equal(got.embeddings[0], rows[0])


def test_an_embedding_that_is_not_finite_is_refused(pipe, tmp_path):
    torch.save({'<ash>': torch.full((32,), float('nan'))}, tmp_path / 'nan.bin')

    with pytest.raises(UserError, match='not finite'):
        import_concepts(pipe, tmp_path / 'nan.bin')


# ---- a LoRA of other layers and ranks


def rank_for(name):
    "Rank 3 in one kind of layer, 2 in another, and nothing in the rest."
    return 3 if name.endswith('ff.net.2') else 2 if name.endswith('attn2.to_q') else 0


@pytest.fixture(scope='module')
def lora(pipe):
    "A LoRA of two ranks, in layers that Diff-II itself does not use."
    gen = torch.Generator().manual_seed(0)
    weights = {}
    for name, layer in pipe.unet.named_modules():
        if rank := rank_for(name):
            down = torch.randn(rank, layer.in_features, generator=gen)
            up = torch.randn(layer.out_features, rank, generator=gen)
            weights[f'unet.{name}.lora_A.weight'] = down
            weights[f'unet.{name}.lora_B.weight'] = up
    return weights


@pytest.fixture
def with_lora(lora, tmp_path):
    "A folder with one embedding and that LoRA."
    save_file(lora, tmp_path / 'lora.safetensors')
    save_file({'<oak>': torch.zeros(32)}, tmp_path / 'learned_embeds.safetensors')
    return tmp_path


def test_a_lora_of_other_layers_does_what_it_does_in_diffusers(pipe, with_lora):
    file = with_lora / 'lora.safetensors'
    other = models.load(models.checkpoint('sd1'))
    other.pipe.load_lora_weights(file)
    theirs = models.predicted(other, ['a bird'])
    plain = models.predicted(pipe, ['a bird'])

    got = import_concepts(pipe, with_lora, lora=file, classes=['oak'])
    got.save(with_lora / 'saved')
    saved = Concepts.load(with_lora / 'saved')

    assert got.settings.rank == 3
    assert (theirs - plain).abs().max() > 1e-3
    for concepts in (got, saved):
        with concepts.attached(pipe):
            assert_close(models.predicted(pipe, ['a bird']), theirs)


def too_wide(lora):
    return {k: torch.zeros(len(v), 99) if 'lora_A' in k else v for k, v in lora.items()}


def of_the_text_encoder_too(lora):
    return lora | {'text_encoder.x.lora_A.weight': torch.zeros(1)}


@pytest.mark.parametrize(
    'change, message',
    [
        (too_wide, 'does not fit the U-Net'),
        (of_the_text_encoder_too, 'LoRA of the text encoder'),
    ],
)
def test_a_lora_that_cannot_be_used_is_refused(pipe, lora, with_lora, change, message):
    save_file(change(lora), with_lora / 'changed.safetensors')

    with pytest.raises(UserError, match=message):
        import_concepts(pipe, with_lora, lora=with_lora / 'changed.safetensors')
