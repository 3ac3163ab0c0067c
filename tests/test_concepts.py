"Concept learning: what moves, files, interruptions, trackers, precision, refusals."

from dataclasses import replace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker

from diffii.base.files import UserError, read_json, write_json
from diffii.base.images import few_shot
from diffii.base.pipeline import load_pipeline
from diffii.base.seeds import generator
from diffii.base.settings import ConceptSettings
from diffii.data.digits import digits_set
from diffii.method.concepts import (
    Concepts,
    ExtraEmbeddings,
    check_prompts,
    named_concepts,
)
from diffii.method.learning import (
    LatentBatches,
    learn_concepts,
    sample_row,
    start_embeddings,
)

import torch
from safetensors.torch import load_file, save_file
from torch import nn

SHORT = ConceptSettings(
    n_tokens=2,
    rank=2,
    steps=5,
    batch_size=4,
    lr=1e-3,
    token_lr=1e-2,
    init_noise=0.1,
    save_every=2,
)


@pytest.fixture(scope='module')
def pipe():
    "The shipped model."
    return load_pipeline('tiny', device='cpu')


@pytest.fixture(scope='module')
def few():
    "Two images of each digit."
    return few_shot(digits_set('pool'), 2, seed=0)[0]


@pytest.fixture(scope='module')
def whole(pipe, few):
    "What five steps learn without an interruption."
    return learn_concepts(pipe, few, SHORT)


@pytest.fixture(scope='module')
def strong(pipe, few):
    "Three steps with all images in a batch, so that every token takes part."
    rates = dict(lr=1e-3, token_lr=1e-2)
    settings = ConceptSettings(
        n_tokens=3, rank=4, steps=3, batch_size=16, flip=False, **rates
    )
    return learn_concepts(pipe, few, settings)


def weights(pipe):
    "A copy of what could move: U-Net and text encoder."
    parts = {**pipe.unet.state_dict(), **pipe.pipe.text_encoder.state_dict()}
    return {name: value.clone() for name, value in parts.items()}


def same_weights(before, pipe):
    "Has the pipeline these weights, under these names and no others?"
    after = weights(pipe)
    same = [torch.equal(value, after[name]) for name, value in before.items()]
    return before.keys() == after.keys() and all(same)


def same_concepts(a, b):
    "Are two concepts the same to the bit, with their losses?"
    return a.digest() == b.digest() and a.log == b.log


def predicted(concepts, pipe):
    "The noise that the model sees under the prompts of two categories."
    x = torch.randn(2, 4, 8, 8, generator=generator(0))
    with concepts.attached(pipe), torch.inference_mode():
        cond = pipe.encode_prompts([concepts.prompt(0), concepts.prompt(7)])
        return pipe.predict_eps(x, 500, cond)


def interrupt(pipe, few, settings, folder, after=3, **watching):
    "Learning that breaks off after some steps."

    def stop(step, steps, loss):
        if step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_concepts(pipe, few, settings, folder=folder, progress=stop, **watching)


# ---- embeddings beside a table


def test_only_embeddings_in_use_get_a_gradient():
    table = nn.Embedding(5, 3).requires_grad_(False)
    both = ExtraEmbeddings(table, torch.ones(3, 3))

    out = both(torch.tensor([[0, 5, 6, 4]]))
    out.sum().backward()

    assert torch.equal(out[0, 0], table.weight[0])
    assert torch.equal(out[0, 1], torch.ones(3))
    assert torch.equal(both.extra.grad, torch.tensor([[1.0], [1], [0]]).expand(3, 3))
    assert [n for n, p in both.named_parameters() if p.requires_grad] == ['extra']


# ---- batches


def test_a_batch_depends_on_its_step_alone(pipe, few):
    batches = LatentBatches(pipe, few, SHORT, seed=0)
    again = LatentBatches(pipe, few, replace(SHORT, steps=9), seed=0)
    batches.draw(0)

    one, same, other = batches.draw(7), again.draw(7), batches.draw(8)

    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one[2], other[2])


def test_balanced_batches_draw_categories_evenly(pipe, few):
    zeros = [i for i, label in enumerate(few.labels) if label == 0]
    long_tail = few.subset([*zeros, few.labels.index(1)])
    assert long_tail.labels == (0, 0, 1)
    settings = replace(SHORT, batch_size=500, flip=False)

    by_image = LatentBatches(pipe, long_tail, settings, 0).draw(0)[1]
    balanced = replace(settings, balanced=True)
    by_category = LatentBatches(pipe, long_tail, balanced, 0).draw(0)[1]

    assert 0.25 < (by_image == 1).float().mean() < 0.42  # a third
    assert 0.42 < (by_category == 1).float().mean() < 0.58  # a half


@pytest.mark.parametrize('flip, views', ((False, 1), (True, 2)))
def test_images_are_encoded_mirrored_where_they_may_be(pipe, few, flip, views):
    batches = LatentBatches(pipe, few, replace(SHORT, flip=flip), 0)

    assert batches.latents.shape == (20, views, 4, 8, 8)


# ---- what moves


def test_every_token_and_every_matrix_moves(pipe, few, strong):
    start = start_embeddings(pipe, 30, strong.settings, 'digit', 0)[0]

    moved = (strong.embeddings[0] - start).abs().amax(1)

    assert moved.shape == (30,) and (moved > 0).all()
    assert all(v.abs().sum() > 0 for v in strong.lora.values())


def test_the_model_is_left_as_it_was(pipe, few):
    before = weights(pipe)

    learn_concepts(pipe, few, replace(SHORT, steps=2))

    assert same_weights(before, pipe)


def test_the_prompt_has_all_tokens(strong):
    want = 'a photo of a <c3> <c3>_1 <c3>_2 digit upright.'

    assert strong.prompt(3, 'upright.') == want


def test_the_same_twice_with_several_threads(pipe, few):
    threads = torch.get_num_threads()
    torch.set_num_threads(max(2, threads))
    settings = replace(SHORT, steps=6, batch_size=24)

    twice = [learn_concepts(pipe, few, settings) for _ in range(2)]
    torch.set_num_threads(threads)

    assert same_concepts(*twice)


def test_a_falling_rate_begins_as_a_constant_one(pipe, few, whole):
    falling = learn_concepts(pipe, few, replace(SHORT, lr_schedule='cosine'))

    assert falling.log[:2] == whole.log[:2]
    assert falling.digest() != whole.digest()


# ---- files


def test_files_and_back(pipe, strong, tmp_path):
    strong.save(tmp_path)

    again = Concepts.load(tmp_path)

    assert same_concepts(again, strong)
    assert (again.classes, again.metaclass) == (strong.classes, strong.metaclass)
    assert (again.settings, again.base) == (strong.settings, strong.base)
    assert torch.equal(predicted(again, pipe), predicted(strong, pipe))


def test_concepts_change_what_the_model_sees(pipe, few, strong):
    plain = named_concepts(pipe, few)

    difference = predicted(plain, pipe) - predicted(strong, pipe)

    assert difference.abs().max() > 1e-4


def test_diffusers_reads_the_files(pipe, strong, tmp_path):
    strong.save(tmp_path)
    other = load_pipeline('tiny', device='cpu')
    tokens = load_file(tmp_path / 'learned_embeds.safetensors')

    other.pipe.load_lora_weights(tmp_path)
    for k in ('<c0>', '<c7>'):
        other.pipe.load_textual_inversion({k: tokens[k]})

    x = torch.randn(2, 4, 8, 8, generator=generator(0))
    with torch.inference_mode():
        cond = other.encode_prompts([strong.prompt(0), strong.prompt(7)])
        theirs = other.predict_eps(x, 500, cond)
    assert torch.allclose(theirs, predicted(strong, pipe), atol=1e-5)


def as_an_older_version(folder, change=lambda about: None):
    "Take away what older versions did not write: the seal and the digests."
    about = read_json(folder / 'concepts.json')
    del about['seal'], about['files']
    change(about)
    write_json(folder / 'concepts.json', about)


def test_settings_that_an_older_file_lacks_are_the_defaults(whole, tmp_path):
    whole.save(tmp_path)
    as_an_older_version(tmp_path, lambda about: about['settings'].pop('lr_schedule'))

    assert Concepts.load(tmp_path).settings == whole.settings


def without_a_token(folder):
    as_an_older_version(folder)
    file = folder / 'learned_embeds.safetensors'
    tokens = load_file(file)
    del tokens['<c4>']
    save_file(tokens, file)


@pytest.mark.parametrize(
    'spoil, message',
    (
        (without_a_token, 'no embedding for <c4> (4)'),
        (lambda folder: (folder / 'concepts.json').unlink(), 'no concepts.json'),
        (
            lambda folder: (folder / 'pytorch_lora_weights.safetensors').unlink(),
            'pytorch_lora_weights',
        ),
        (
            lambda folder: (folder / 'learned_embeds.safetensors').write_bytes(b'1'),
            'learned_embeds.safetensors',
        ),
    ),
    ids=('a token', 'the names', 'the LoRA', 'a broken file'),
)
def test_a_folder_that_lacks_something(whole, tmp_path, spoil, message):
    whole.save(tmp_path)
    spoil(tmp_path)

    with pytest.raises(UserError) as error:
        Concepts.load(tmp_path)

    assert message in str(error.value)


def test_another_model_is_refused(pipe, whole):
    before = weights(pipe)

    with pytest.raises(UserError, match='another model'):
        replace(whole, base='0' * 16).attach(pipe)

    assert same_weights(before, pipe)


def test_tokens_are_not_added_twice(pipe, whole):
    with whole.attached(pipe), pytest.raises(UserError, match='load the model afresh'):
        whole.attach(pipe)

    assert '<c0>' not in pipe.pipe.tokenizer.get_vocab()


def test_a_lora_of_other_layers_is_taken_off_again(pipe, whole):
    before = weights(pipe)
    key = next(iter(whole.lora))
    lora = {k: v for k, v in whole.lora.items() if k != key}

    with pytest.raises(UserError, match='does not fit this U-Net'):
        replace(whole, lora=lora).attach(pipe)

    assert same_weights(before, pipe)
    assert '<c0>' not in pipe.pipe.tokenizer.get_vocab()


# ---- categories that are called by their names


def test_names_go_through_files(pipe, few, tmp_path):
    named_concepts(pipe, few).save(tmp_path)

    again = Concepts.load(tmp_path)

    assert again.prompt(7, 'upright.') == 'a photo of a 7 digit upright.'
    assert [f.name for f in tmp_path.iterdir()] == ['concepts.json']


def test_names_change_nothing_in_the_model(pipe, few):
    named = named_concepts(pipe, few)
    plain = pipe.encode_prompts(['a photo of a 7 digit'] * 2)
    x = torch.randn(2, 4, 8, 8, generator=generator(0))

    with named.attached(pipe), torch.inference_mode():
        cond = pipe.encode_prompts([named.prompt(7)] * 2)
        difference = pipe.predict_eps(x, 500, plain) - pipe.predict_eps(x, 500, cond)

    assert not difference.any()


# ---- interruptions


@pytest.mark.parametrize('schedule', ('constant', 'cosine'))
def test_an_interrupted_run_ends_as_an_uninterrupted_one(pipe, few, schedule, tmp_path):
    settings = replace(SHORT, lr_schedule=schedule)
    want = learn_concepts(pipe, few, settings)
    interrupt(pipe, few, settings, tmp_path)  # the last checkpoint is of step 2
    assert (tmp_path / 'checkpoint.safetensors').exists()

    seen = []
    got = learn_concepts(
        pipe, few, settings, folder=tmp_path, progress=lambda *a: seen.append(a[:2])
    )

    assert seen == [(3, 5), (4, 5), (5, 5)]
    assert same_concepts(got, want)
    assert same_concepts(Concepts.load(tmp_path), want)
    assert not (tmp_path / 'checkpoint.safetensors').exists()


def test_what_is_learned_is_not_learned_again(pipe, few, whole, tmp_path):
    whole.save(tmp_path)

    got = learn_concepts(
        pipe, few, SHORT, folder=tmp_path, progress=lambda *a: pytest.fail('a step')
    )

    assert same_concepts(got, whole)


def test_a_folder_of_other_settings_is_refused(pipe, few, whole, tmp_path):
    whole.save(tmp_path)

    with pytest.raises(UserError, match='other settings'):
        learn_concepts(pipe, few, replace(SHORT, steps=6), folder=tmp_path)


def test_concepts_of_another_seed_or_of_other_images_are_refused(
    pipe, few, whole, tmp_path
):
    whole.save(tmp_path)
    more = replace(few, images=few.images[::-1], labels=few.labels[::-1])

    for images, seed in ((few, 1), (more, 0)):
        with pytest.raises(UserError, match='images, of another seed'):
            learn_concepts(pipe, images, SHORT, seed, folder=tmp_path)


def test_concepts_of_an_older_version_do_not_say_what_they_were_learned_from(
    pipe, few, whole, tmp_path
):
    whole.save(tmp_path)

    def forget(about):
        del about['seed'], about['images']

    as_an_older_version(tmp_path, forget)

    assert same_concepts(learn_concepts(pipe, few, SHORT, 1, tmp_path), whole)


def test_saving_elsewhere_leaves_concepts_where_they_are(pipe, few, whole, tmp_path):
    learned = learn_concepts(pipe, few, replace(SHORT, steps=1), folder=tmp_path / 'a')

    learned.save(tmp_path / 'b')
    whole.save(tmp_path / 'c')

    assert (learned.folder, whole.folder) == (tmp_path / 'a', None)
    assert Concepts.load(tmp_path / 'b').folder == tmp_path / 'b'


@pytest.mark.parametrize(
    'changed, message',
    (
        (dict(settings=replace(SHORT, rank=3)), 'another settings'),
        (dict(seed=1), 'another seed'),
        (dict(images=True), 'another set of training images'),
    ),
    ids=('settings', 'seed', 'images'),
)
def test_a_checkpoint_of_another_run_is_refused(pipe, few, tmp_path, changed, message):
    interrupt(pipe, few, SHORT, tmp_path)
    before = weights(pipe)
    changed, images = dict(changed), few
    if changed.pop('images', False):
        images = replace(few, images=few.images[::-1], labels=few.labels[::-1])

    with pytest.raises(UserError, match=message):
        learn_concepts(pipe, images, **{'settings': SHORT, **changed}, folder=tmp_path)

    assert same_weights(before, pipe)


# ---- trackers


class Diary(GeneralTracker):
    "A tracker that keeps what it is told."

    name = 'diary'
    requires_logging_directory = False
    tracker = None

    def __init__(self):
        super().__init__()
        self.losses, self.pictures, self.about, self.ended = {}, {}, None, False

    def store_init_configuration(self, values):
        self.about = values

    def log(self, values, step=None, **kwargs):
        self.losses[step] = values['loss']

    def log_images(self, values, step=None, **kwargs):
        self.pictures[step] = values['samples'][0]

    def finish(self):
        self.ended = True


def test_a_tracker_sees_every_step_and_changes_nothing(pipe, few, whole):
    diary = Diary()

    watched = learn_concepts(pipe, few, SHORT, tracker=diary, sample_every=2)

    assert same_concepts(watched, whole)
    assert diary.losses == dict(enumerate(whole.log, 1))
    shapes = {step: picture.shape for step, picture in diary.pictures.items()}
    assert shapes == {2: (32, 128, 3), 4: (32, 128, 3)}
    assert (diary.about['rank'], diary.ended) == (2, True)


def test_a_tracker_may_go_between_interruptions(pipe, few, whole, tmp_path):
    diary = Diary()
    interrupt(pipe, few, SHORT, tmp_path, tracker=diary)
    assert diary.ended

    resumed = learn_concepts(pipe, few, SHORT, folder=tmp_path)

    assert same_concepts(resumed, whole)


def test_samples_leave_the_random_state_alone(pipe):
    before = torch.get_rng_state()

    row = sample_row(pipe, ['a photo of a digit'])

    assert row.shape == (32, 32, 3)
    assert torch.equal(torch.get_rng_state(), before)


# ---- what cannot be learned


def test_no_tokens_are_refused_before_the_first_step(pipe, few):
    with pytest.raises(UserError, match='--tokens 0'):
        learn_concepts(pipe, few, replace(SHORT, n_tokens=0))


def test_a_first_word_of_spaces_is_the_metaclass(pipe):
    spaces = start_embeddings(pipe, 2, replace(SHORT, init_word='  '), 'digit', 0)
    named = start_embeddings(pipe, 2, replace(SHORT, init_word='digit'), '', 0)

    assert torch.equal(spaces[0], named[0])


def test_an_empty_metaclass_is_refused(pipe, few):
    with pytest.raises(UserError) as error:
        learn_concepts(pipe, replace(few, metaclass=''), SHORT)

    assert "--metaclass ''" in str(error.value)


def test_no_images_are_refused(pipe, few):
    with pytest.raises(UserError, match='the image set is empty'):
        learn_concepts(pipe, few.subset([]), SHORT)


def test_a_loss_that_is_not_finite_ends_it(pipe, few):
    before = weights(pipe)

    with pytest.raises(UserError, match='lower --concept-lr'):
        learn_concepts(pipe, few, replace(SHORT, token_lr=1e30))

    assert same_weights(before, pipe)


def test_a_memory_that_is_too_small_ends_it(pipe, few, monkeypatch):
    before = weights(pipe)

    def too_small(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(pipe.unet, 'forward', too_small)
    with pytest.raises(UserError, match='--concept-batch 4: memory'):
        learn_concepts(pipe, few, SHORT)

    assert same_weights(before, pipe)


# ---- precision


def test_what_was_trained_before_in_another_precision_does_not_matter(pipe, few, whole):
    AcceleratorState._reset_state()
    Accelerator(mixed_precision='bf16', cpu=True)

    got = learn_concepts(pipe, few, replace(SHORT, steps=2))

    assert got.log == whole.log[:2]


def test_concepts_stay_float32_on_a_model_in_half_precision(pipe, strong):
    half = load_pipeline('tiny', device='cpu', dtype='bfloat16')

    with strong.attached(half):
        networks = half.unet, half.pipe.text_encoder
        named = [pair for network in networks for pair in network.named_parameters()]
        trained = {p.dtype for n, p in named if 'lora_' in n or n.endswith('.extra')}
        count = sum(n.endswith('.extra') for n, _ in named)

    assert (trained, count) == ({torch.float32}, 1)
    assert half.unet.dtype == torch.bfloat16
    difference = predicted(strong, half) - predicted(strong, pipe)
    assert difference.abs().max() < 0.15


# ---- words behind the tokens


@pytest.fixture
def described(few):
    "The same digits, with words for each category."
    return replace(few, words=tuple(f'number <{k}> thin' for k in range(10)))


def test_words_stand_behind_the_tokens(pipe, few, described, whole):
    short = replace(SHORT, steps=1)
    learned = learn_concepts(pipe, described, short)
    without = learn_concepts(pipe, described, replace(short, with_words=False))
    named = named_concepts(pipe, described)

    text = 'a photo of a <c3> <c3>_1 number 3 thin digit in the snow.'
    assert learned.prompt(3, 'in the snow.') == text
    assert without.prompt(3) == whole.prompt(3) == 'a photo of a <c3> <c3>_1 digit'
    assert named.prompt(3) == 'a photo of a number 3 thin digit'
    assert learned.log != without.log
    assert same_concepts(without, learn_concepts(pipe, few, short))


def test_words_are_kept_and_belong_to_the_concepts(pipe, few, described, tmp_path):
    short = replace(SHORT, steps=1)
    learned = learn_concepts(pipe, described, short, folder=tmp_path)
    read = Concepts.load(tmp_path)

    assert read.words == described.words
    assert read.digest() == learned.digest()
    assert replace(read, words=()).digest() != learned.digest()
    with pytest.raises(UserError, match='holds concepts of other settings'):
        learn_concepts(pipe, few, short, folder=tmp_path)


def test_images_without_words_have_one_and_the_same_concepts(pipe, few, tmp_path):
    alone = replace(SHORT, steps=1, with_words=False)
    learned = learn_concepts(pipe, few, alone, folder=tmp_path)

    again = learn_concepts(pipe, few, replace(alone, with_words=True), folder=tmp_path)

    assert same_concepts(learned, again)


def test_a_checkpoint_knows_the_words(pipe, few, described, tmp_path):
    interrupt(pipe, described, SHORT, tmp_path)

    with pytest.raises(UserError, match='with another words'):
        learn_concepts(pipe, few, SHORT, folder=tmp_path)
    again = learn_concepts(pipe, described, SHORT, folder=tmp_path)
    assert same_concepts(again, learn_concepts(pipe, described, SHORT))


# ---- what a text encoder reads


def planned(n_tokens, words=(), classes=('oak', 'elm')):
    "Concepts that are not learned yet."
    settings = ConceptSettings(n_tokens=n_tokens)
    return Concepts(classes, 'tree', settings, '', [], {}, words=words)


@pytest.mark.parametrize('n_tokens, reads', [(33, True), (34, False)])
def test_a_prompt_must_be_read_up_to_its_metaclass(pipe, n_tokens, reads):
    concepts = planned(n_tokens)
    text = f'a photo of a {"x " * n_tokens}tree'
    tokens = pipe.pipe.tokenizer(text.replace('x', ',')).input_ids
    assert (len(tokens) <= 40) == reads

    if reads:
        check_prompts(pipe, concepts)
    else:
        with pytest.raises(
            UserError, match='tiny reads 38 tokens, .* has 39; give few'
        ):
            check_prompts(pipe, concepts)


def test_the_longest_words_are_the_ones_that_count(pipe):
    words = 'green', ', '.join(['green'] * 20)
    with pytest.raises(UserError, match='elm: tiny reads 38 tokens'):
        check_prompts(pipe, planned(2, words))
    check_prompts(pipe, planned(2, words[:1] * 2))


def test_suffixes_that_are_cut_off_are_told_once(pipe):
    suffixes = ['in the snow.', 'in the snow, ' * 12 + 'on a branch.']
    with pytest.warns(UserWarning, match='cuts 1 of 2 suffixes off behind') as told:
        check_prompts(pipe, planned(4), suffixes)
    assert len(told) == 1
