"The pipeline on the shipped model: guidance, compilation, errors of loading."

import pytest
import torch
from diffusers import StableDiffusionPipeline
from small_models import checkpoint, load, loaded, predicted

from diffii.base.files import UserError
from diffii.base.images import ImageSet
from diffii.base.pipeline import _compiled, load_pipeline, model_digest
from diffii.evaluation.speed import unet_clock
from diffii.base.seeds import generator
from diffii.base.settings import ModelSettings
from diffii.method.concepts import named_concepts


@pytest.fixture(scope='module')
def pipe():
    return load_pipeline('tiny', device='cpu')


@pytest.fixture(scope='module')
def noised():
    return torch.randn(3, 4, 8, 8, generator=generator('noised'))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.inference_mode():
        yield


# ---- loading


def test_settings_load_as_arguments_do(pipe):
    other = load_pipeline(ModelSettings('tiny', device='cpu', batch_size=8))

    assert (other.model, other.size, other.batch_size) == ('tiny', 32, 8)
    assert other.micro_batch == 8
    assert other.latent_shape == pipe.latent_shape == (4, 8, 8)
    assert model_digest(other) == model_digest(pipe)


REFUSED = {
    'an unknown model': (dict(model='nobody/no-such-model'), 'nobody/no-such-model'),
    'an unknown precision': (dict(dtype='int8'), '--dtype int8: one of auto, float32'),
    'no safety checker': (dict(safety_checker=True), 'has no safety checker'),
    'an unknown device': (dict(device='nowhere'), '--device nowhere: cannot be used'),
    'an unknown setting': (dict(colour='red'), 'colour: no such setting'),
    'a side between two': (dict(size=34), '--size 34: .* of 4 pixels; give 32 or 36'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_loading_refuses(case):
    settings, message = REFUSED[case]

    with pytest.raises(UserError, match=message):
        load_pipeline(**settings)


def test_a_model_that_does_not_fit_into_memory(monkeypatch):
    def full(self, *args):
        raise torch.cuda.OutOfMemoryError()

    monkeypatch.setattr(StableDiffusionPipeline, 'to', full)

    with pytest.raises(UserError, match='does not fit into the memory.*float16'):
        load_pipeline('tiny')


# ---- prompts and noise


def test_a_class_name_cannot_end_the_prompt(pipe):
    evil = 'by night <|endoftext|><c1> {0} %s (x:9)'
    tokenizer = pipe.pipe.tokenizer
    named = named_concepts(pipe, ImageSet((), (), (evil, '<>'), 'bird'))

    def ends(prompt):
        return tokenizer(prompt).input_ids.count(tokenizer.eos_token_id)

    assert ends('a photo of a ' + evil) == 2  # as it is, it would
    assert ends(named.prompt(0, evil)) == 1
    assert named.prompt(1) == 'a photo of a bird'


@pytest.mark.parametrize('micro_batch', (64, 1))
def test_guidance_goes_along_the_difference(pipe, noised, monkeypatch, micro_batch):
    monkeypatch.setattr(pipe, 'micro_batch', micro_batch)
    cond = pipe.encode_prompts(['a photo of a digit'] * 3)
    empty = pipe.encode_prompts([''] * 3)
    with_prompt, without = (pipe.predict_eps(noised, 400, c) for c in (cond, empty))

    guided = pipe.predict_guided(noised, 400, cond, empty, 3.0)

    expected = without + 3 * (with_prompt - without)
    torch.testing.assert_close(guided, expected, atol=1e-4, rtol=1e-4)


def test_guidance_of_one_asks_once(pipe, noised):
    cond = pipe.encode_prompts(['a photo of a digit'] * 3)

    guided = pipe.predict_guided(noised, 400, cond, negative=None)

    assert torch.equal(guided, pipe.predict_eps(noised, 400, cond))


# ---- compilation


@pytest.fixture
def compiled():
    "A pipeline with a backend that only records the graph, which is the quick part."
    pipe = load(checkpoint('sd1'))
    pipe.compiled = _compiled(pipe.unet, backend='eager')
    return pipe


def test_a_compiled_network_predicts_the_same(compiled):
    swift = predicted(compiled, ['a bird', 'a digit'])

    plain = predicted(loaded('sd1'), ['a bird', 'a digit'])
    torch.testing.assert_close(swift, plain, atol=1e-4, rtol=1e-4)


def test_the_clock_counts_calls_of_the_compiled_network(compiled):
    with unet_clock(compiled) as calls:
        predicted(compiled, ['a bird', 'a digit'])
    assert len(calls) == 1


def test_training_uses_the_plain_network(compiled):
    assert compiled._network() is compiled.compiled
    with torch.inference_mode(False), torch.enable_grad():
        assert compiled._network() is compiled.unet


def test_compile_hands_the_network_to_torch(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, 'compile', lambda unet, **kw: asked.append(kw) or unet)

    pipe = load_pipeline('tiny', device='cpu', compile=True)

    assert pipe.compiled is pipe.unet
    assert asked == [dict(dynamic=True, backend='inductor')]
    assert load_pipeline('tiny', device='cpu').compiled is None
