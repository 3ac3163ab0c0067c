"Concepts in the files of other programs: read, written, matched, refused."

import json
import os
import re
from functools import cache

import pytest
from small_models import (
    TREES,
    build,
    checkpoint,
    load,
    loaded,
    predicted,
    predicted_with,
    short_learning,
)

from diffii.base.files import UserError
from diffii.base.pipeline import model_digest
from diffii.base.settings import ConceptSettings
from diffii.method.concepts import Concepts, named_concepts
from diffii.method.learning import learn_concepts
from diffii.base.loras import lora_to_peft, read_weights
from diffii.run.concept_files import (
    FORMATS,
    export_concepts,
    import_concepts,
    open_concepts,
    read_embeddings,
)

import torch
from safetensors.torch import save_file

LORA = 'pytorch_lora_weights.safetensors'


@cache
def learned(kind='sd1', n_tokens=1):
    "Concepts of two trees, learned in three steps."
    return learn_concepts(loaded(kind), TREES, short_learning(n_tokens=n_tokens))


def same(a, b):
    "Are two predictions the same, but for the order of sums?"
    return torch.allclose(a, b, atol=1e-5, rtol=1e-5)


def refuses(function, text):
    "Assert that calling a function raises a `UserError` with this text."
    with pytest.raises(UserError, match=re.escape(text)):
        function()


# ---- Diff-Mix


NAMES = {'F-16A/B': '<class_0>', 'Black footed Albatross': '<class_1>'}


def old_names(lora):
    "A LoRA's names when it was an attention processor."

    def old(m):
        return f'.processor.to_{m[1]}_lora.{dict(A="down", B="up")[m[3]]}'

    pattern = r'\.to_(q|k|v|out)(\.0)?\.lora_([AB])'
    return {re.sub(pattern, old, key): value for key, value in lora.items()}


def write_diff_mix(folder, vectors, step):
    "What Diff-Mix writes after a number of steps."
    held = dict(
        learned_embeds_dict=dict(zip(NAMES.values(), vectors)),
        name2placeholder=NAMES,
        placeholder2name={token: name for name, token in NAMES.items()},
    )
    torch.save(held, folder / f'learned_embeds-steps-{step}.bin')


@pytest.fixture
def diff_mix(tmp_path):
    "A folder of Diff-Mix's, of two moments, with its LoRA."
    concepts = learned()
    vectors = torch.nn.Parameter(concepts.embeddings[0].flip(0))[[0, 1]]
    assert vectors.requires_grad  # as theirs
    write_diff_mix(tmp_path, torch.zeros_like(vectors), 500)
    write_diff_mix(tmp_path, vectors, 35000)
    save_file(old_names(concepts.lora), tmp_path / LORA)
    return tmp_path


@pytest.mark.parametrize(
    'classes',
    (
        ['Black_footed_Albatross', 'F-16A_B'],
        ['black-footed albatross', 'F-16A/B'],
    ),
    ids=('as folders', 'in other letters'),
)
def test_what_diff_mix_publishes(diff_mix, classes):
    pipe, concepts = loaded('sd1'), learned()

    back = import_concepts(pipe, diff_mix, classes=classes, metaclass='tree')

    assert back.classes == tuple(classes)
    assert (back.n_tokens, back.settings.rank, back.base) == (1, 2, concepts.base)
    assert torch.equal(back.embeddings[0], concepts.embeddings[0])
    assert not back.embeddings[0].requires_grad
    assert torch.equal(predicted_with(back, pipe), predicted_with(concepts, pipe))


def test_all_names_of_a_file_are_the_categories(diff_mix):
    assert import_concepts(loaded('sd1'), diff_mix).classes == tuple(NAMES)


def test_a_file_alone_has_no_lora_and_may_be_given_one(diff_mix):
    pipe, file = loaded('sd1'), diff_mix / 'learned_embeds-steps-35000.bin'

    assert not import_concepts(pipe, file).lora
    assert import_concepts(pipe, file, lora=diff_mix).lora


def test_the_last_file_counts(diff_mix):
    pipe, last = loaded('sd1'), torch.ones(2, 32)
    write_diff_mix(diff_mix, last, 'last')

    assert torch.equal(import_concepts(pipe, diff_mix).embeddings[0], last)


@pytest.mark.parametrize(
    'kind, given, message',
    (
        ('sd1', dict(classes=['F-16A/B', 'DC-10']), 'no token for DC-10'),
        ('sd1', dict(classes=['F-16A/B', 'F-16A_B']), 'same token'),
        ('xl', {}, 'files of all its encoders'),
        ('sd1', dict(lora='nowhere'), 'nowhere: no pytorch_lora_weights.safetensors'),
    ),
    ids=('no token', 'one token twice', 'another model', 'no LoRA there'),
)
def test_files_that_do_not_fit(diff_mix, kind, given, message):
    refuses(lambda: import_concepts(loaded(kind), diff_mix, **given), message)


def test_files_that_are_not_there(tmp_path):
    pipe = loaded('sd1')

    refuses(lambda: import_concepts(pipe, tmp_path / 'none'), 'no such file')
    refuses(lambda: import_concepts(pipe, tmp_path), 'no file of embeddings there')


# ---- every format, out and in again

BOTH = [(kind, form) for kind in ('sd1', 'sd2-v', 'xl') for form in FORMATS]
BOTH.remove(('xl', 'diff-mix'))  # which has room for one text encoder


@pytest.mark.parametrize('kind, form', BOTH)
def test_out_and_in_again(tmp_path, kind, form):
    pipe, concepts = loaded(kind), learned(kind, 1 if form == 'diff-mix' else 3)
    export_concepts(concepts, tmp_path, form)

    back = import_concepts(pipe, tmp_path, classes=TREES.classes, metaclass='tree')

    assert (back.classes, back.base) == (concepts.classes, concepts.base)
    assert back.n_tokens == concepts.n_tokens
    assert back.settings.rank == concepts.settings.rank
    assert back.digest() == concepts.digest()
    assert torch.equal(predicted_with(back, pipe), predicted_with(concepts, pipe))


@pytest.mark.parametrize('kind, form', BOTH)
def test_what_was_imported_can_be_saved(tmp_path, kind, form):
    pipe, concepts = loaded(kind), learned(kind, 1 if form == 'diff-mix' else 3)
    export_concepts(concepts, tmp_path / 'out', form)
    back = import_concepts(pipe, tmp_path / 'out', classes=TREES.classes)

    back.save(tmp_path / 'saved')

    assert Concepts.load(tmp_path / 'saved').digest() == concepts.digest()


@pytest.mark.parametrize('kind, form', BOTH)
def test_diffusers_reads_the_lora(tmp_path, kind, form):
    concepts = learned(kind, 1 if form == 'diff-mix' else 3)
    export_concepts(concepts, tmp_path, form)
    other = load(checkpoint(kind))

    place = tmp_path / 'models' / 'Lora' / 'diffii.safetensors'
    other.pipe.load_lora_weights(place if form == 'a1111' else tmp_path)

    with concepts.attached(loaded(kind)) as pipe:
        assert same(predicted(other, ['a bird']), predicted(pipe, ['a bird']))


@pytest.mark.parametrize('form', FORMATS)
def test_any_place_can_be_opened(tmp_path, form):
    concepts = learned()
    export_concepts(concepts, tmp_path, form)

    back = open_concepts(loaded('sd1'), tmp_path, TREES.classes, 'tree')

    assert back.digest() == concepts.digest()


def test_diffusers_files_without_our_names(tmp_path):
    pipe, concepts = loaded('sd1'), learned()
    export_concepts(concepts, tmp_path)
    (tmp_path / 'concepts.json').unlink()
    tokens = {'oak': '<c0>', 'elm': '<c1>'}

    back = import_concepts(pipe, tmp_path, classes=tokens, metaclass='tree')

    assert back.classes == ('oak', 'elm')
    assert back.digest() == concepts.digest()
    refuses(
        lambda: import_concepts(pipe, tmp_path, classes=['oak', 'elm']),
        'no token for oak, elm among <c0>, <c1>',
    )


def test_what_cannot_be_exported(tmp_path):
    three, two = learned('sd1', 3), learned('xl', 1)
    named = named_concepts(loaded('sd1'), TREES)

    refuses(lambda: export_concepts(three, tmp_path, 'diff-mix'), 'one vector per')
    refuses(lambda: export_concepts(two, tmp_path, 'diff-mix'), 'one text encoder')
    refuses(lambda: export_concepts(named, tmp_path), 'called by their names')
    refuses(lambda: export_concepts(three, tmp_path, 'png'), "format 'png': one of")
    assert not list(tmp_path.iterdir())


# ---- textual inversions


@pytest.fixture
def vectors():
    "Three vectors for each of two trees."
    return torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def write_a1111(folder, name, vectors):
    "A textual inversion as A1111's interface wrote it before safetensors."
    held = {
        'string_to_token': {'*': 265},
        'string_to_param': {'*': vectors},
        'name': 'my words',
        'step': 9,
        'sd_checkpoint': None,
        'sd_checkpoint_name': None,
    }
    folder.mkdir(exist_ok=True)
    torch.save(held, folder / f'{name}.pt')


def test_a_folder_of_a1111(vectors, tmp_path):
    pipe = loaded('sd1')
    settings = ConceptSettings(n_tokens=3, rank=0)
    about = ('oak', 'elm'), 'tree', settings, model_digest(pipe)
    want = Concepts(*about, [vectors.flatten(0, 1)], {})
    for name, three in zip(('oak', 'elm'), vectors):
        write_a1111(tmp_path, name, three)

    got = import_concepts(pipe, tmp_path, classes=['oak', 'elm'], metaclass='tree')

    assert torch.equal(predicted_with(got, pipe), predicted_with(want, pipe))


def test_a_category_with_fewer_vectors(vectors, tmp_path):
    write_a1111(tmp_path, 'oak', vectors[0])
    write_a1111(tmp_path, 'ash', vectors[1][:1])

    refuses(
        lambda: import_concepts(loaded('sd1'), tmp_path, classes=['oak', 'ash']),
        'ash has 1 vectors, others have 3',
    )


@pytest.mark.parametrize(
    'classes', (['oak'], {'tree 1': '<oak>'}), ids=('a name', 'a token')
)
def test_a_file_of_diffusers(vectors, tmp_path, classes):
    torch.save({'<oak>': vectors[0]}, tmp_path / 'learned_embeds.bin')

    got = import_concepts(loaded('sd1'), tmp_path, classes=classes)

    assert torch.equal(got.embeddings[0], vectors[0])
    assert got.classes == tuple(classes)


def test_an_embedding_that_is_not_finite(tmp_path):
    torch.save({'<ash>': torch.full((32,), float('nan'))}, tmp_path / 'nan.bin')

    refuses(lambda: import_concepts(loaded('sd1'), tmp_path / 'nan.bin'), 'not finite')


def test_vectors_of_another_width(tmp_path):
    file = tmp_path / 'wide.safetensors'
    save_file({'<tern>': torch.zeros(768)}, file)

    refuses(lambda: import_concepts(loaded('sd1'), file), 'width [768]')


def test_a_file_that_holds_other_things(tmp_path):
    file = tmp_path / 'images.safetensors'
    save_file({'image': torch.zeros(3, 8, 8)}, file)

    refuses(lambda: read_embeddings(file), 'image is not an embedding')


class Trap:
    "Code that would run when a pickle is read."

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_file_that_would_run_code(tmp_path):
    torch.save({'<tern>': Trap(tmp_path / 'ran')}, tmp_path / 'trap.bin')

    refuses(lambda: read_weights(tmp_path / 'trap.bin'), 'could run code')

    assert not (tmp_path / 'ran').exists()


def test_a_file_without_names(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / 'list.bin')

    refuses(lambda: read_weights(tmp_path / 'list.bin'), 'holds no named tensors')


# ---- LoRAs of others


def rank_for(name):
    "Rank 3 in one kind of layer, 2 in another, and none in the rest."
    return 3 if name.endswith('ff.net.2') else 2 if name.endswith('attn2.to_q') else 0


@pytest.fixture
def mixed_lora():
    "A LoRA of other layers than ours, with two ranks."
    gen, lora = torch.Generator().manual_seed(0), {}
    for name, layer in loaded('sd1').unet.named_modules():
        if rank := rank_for(name):
            shapes = dict(A=(rank, layer.in_features), B=(layer.out_features, rank))
            for end, shape in shapes.items():
                key = f'unet.{name}.lora_{end}.weight'
                lora[key] = torch.randn(shape, generator=gen)
    return lora


def test_a_lora_of_other_layers_and_ranks(mixed_lora, tmp_path):
    file = tmp_path / 'lora.safetensors'
    save_file(mixed_lora, file)
    save_file({'<oak>': torch.zeros(32)}, tmp_path / 'learned_embeds.safetensors')
    pipe, other = loaded('sd1'), load(checkpoint('sd1'))
    other.pipe.load_lora_weights(file)
    theirs = predicted(other, ['a bird'])
    assert (theirs - predicted(pipe, ['a bird'])).abs().max() > 1e-3

    got = import_concepts(pipe, tmp_path, lora=file, classes=['oak'])
    got.save(tmp_path / 'saved')

    assert got.settings.rank == 3
    for concepts in (got, Concepts.load(tmp_path / 'saved')):
        with concepts.attached(pipe):
            assert same(predicted(pipe, ['a bird']), theirs)


def wide(lora):
    return {k: torch.zeros(len(v), 99) if 'lora_A' in k else v for k, v in lora.items()}


def with_text_encoder(lora):
    return lora | {'text_encoder.x.lora_A.weight': torch.zeros(1)}


def half_of_it(lora):
    return {k: v for k, v in lora.items() if 'lora_A' in k}


@pytest.mark.parametrize(
    'change, message',
    (
        (wide, 'does not fit the U-Net'),
        (with_text_encoder, 'LoRA of the text encoder'),
        (half_of_it, 'not a LoRA of a U-Net in a format of diffusers, peft or kohya'),
        (lambda lora: {'x': torch.zeros(1)}, 'not a LoRA of a U-Net'),
    ),
    ids=('other widths', 'text encoder', 'one matrix of two', 'something else'),
)
def test_a_lora_that_cannot_be_used(mixed_lora, tmp_path, change, message):
    save_file({'<oak>': torch.zeros(32)}, tmp_path / 'learned_embeds.safetensors')
    file = tmp_path / 'lora.safetensors'
    save_file(change(mixed_lora), file)

    refuses(lambda: import_concepts(loaded('sd1'), tmp_path, lora=file), message)


def scaled(lora, **header):
    "How much of a LoRA is left, layer by layer, under a header of its file."
    meta = {'lora_adapter_metadata': json.dumps(header)}
    got = lora_to_peft({f'unet.{k}': v for k, v in lora.items()}, meta)
    ups = [k for k in lora if 'lora_B' in k]
    return {round(float((got[k] / lora[k]).mean()), 4) for k in ups}


@pytest.mark.parametrize(
    'header, want',
    (
        ({}, {1.0}),
        ({'unet.lora_alpha': 2}, {1.0}),  # their rank is 2
        ({'unet.lora_alpha': 1}, {0.5}),
        ({'unet.lora_alpha': 4, 'unet.use_rslora': True}, {round(4 / 2**0.5, 4)}),
        ({'unet.lora_alpha': 2, 'unet.alpha_pattern': {'to_q': 4}}, {1.0, 2.0}),
    ),
    ids=('none', 'the rank', 'half', 'rank-stabilised', 'by layer'),
)
def test_the_alpha_in_a_header(header, want):
    assert scaled(learned().lora, **header) == want


def test_an_alpha_beside_the_weights():
    lora = learned().lora
    tensors = {f'unet.{k}': v for k, v in old_names(lora).items()}
    downs = [k for k in tensors if k.endswith('down.weight')]
    alphas = {k.replace('down.weight', 'alpha'): torch.tensor(1.0) for k in downs}

    got = lora_to_peft(tensors | alphas)

    assert all(torch.equal(got[k], v / 2) for k, v in lora.items() if 'lora_B' in k)
    assert all(torch.equal(got[k], v) for k, v in lora.items() if 'lora_A' in k)


def test_concepts_of_another_model(tmp_path):
    other = load(build(tmp_path / 'other', 'sd1', seed=1))

    refuses(lambda: learned().attach(other), 'another model')
