"Captioners, language models and the choice of suffixes: models of random weights, real servers."

import contextlib
import json
import re
import subprocess
import sys
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from diffii.base.files import UserError
from diffii.base.prompts import prefix
from diffii.base.settings import ContextSettings, ModelSettings, Settings
from diffii.data import aviary, digits
from diffii.method.suffixes import (
    ClusterSummariser,
    MeasuringCaptioner,
    make_suffixes,
    published,
    published_suffixes,
)
from diffii.run.captioners import ModelCaptioner
from diffii.run.contexts import (
    choose_suffixes,
    get_captioner,
    get_summariser,
    kept_suffixes,
    known_suffixes,
)
from diffii.run.endpoints import EndpointSummariser
from diffii.run.runs import run_suffixes
from diffii.run.summarisers import (
    ChatSummariser,
    LLMSummariser,
    parse_suffixes,
    summary_prompt,
)

CAPTIONS = [
    'a bird flying over the water',
    'a small bird flying over water',
    'bird flies over blue water',
    'there is a bird that is sitting on a branch',
    'a bird sitting on a tree branch',
    'a red bird sitting on a branch',
    'a bird standing in the snow',
    'a bird in deep snow',
    'a bird standing in white snow',
]


@pytest.mark.parametrize('room', ['contexts', 'captioners', 'summarisers', 'endpoints'])
def test_nothing_heavy_is_imported_with(room):
    heavy = ('torch', 'transformers', 'sklearn', 'diffusers', 'httpx')
    code = f'import sys, diffii.run.{room}; print([m for m in {heavy} if m in sys.modules])'
    command = [sys.executable, '-c', code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == '[]'


# captions by a model: a BLIP of the real classes, with random weights and a few words

WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] [ENC] a photo of bird on the water branch'
SMALL = dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
)


@pytest.fixture(scope='module')
def blip(tmp_path_factory):
    import torch
    import transformers as tf

    folder = tmp_path_factory.mktemp('blip')
    words = [*WORDS.split(), 'flying']
    part = dict(SMALL, projection_dim=16, initializer_range=0.5)
    ids = dict(bos_token_id=5, eos_token_id=3, sep_token_id=3, pad_token_id=0)
    text = dict(part, **ids, vocab_size=len(words), max_position_embeddings=64)
    text['encoder_hidden_size'] = 16
    vision = dict(part, image_size=32, patch_size=16)
    config = tf.BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    torch.manual_seed(1)
    model = tf.BlipForConditionalGeneration(config)
    with torch.no_grad():  # real words are likelier than special tokens
        model.text_decoder.cls.predictions.bias[7:] += 5.0
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tf.BertTokenizerFast(vocab=vocabulary, bos_token='[DEC]')
    images = tf.BlipImageProcessor(size=dict(height=32, width=32))
    model.save_pretrained(folder)
    tf.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def pictures():
    "Three pictures of different sizes and modes."
    birds = [im for im, *_ in aviary.draw_birds(aviary.UNSEEN[:1], 10, seed=3)]
    grey = birds[5].convert('L').resize((8, 64))
    return [birds[0].resize((40, 30)), grey, birds[9].convert('RGBA')]


def test_every_picture_has_a_caption_whatever_its_size_and_the_batch(blip, pictures):
    two = ModelCaptioner(blip, batch_size=2, max_new_tokens=6).caption(pictures)
    three = ModelCaptioner(blip, batch_size=3, max_new_tokens=6).caption(pictures)
    assert len(two) == 3 and all(two)
    assert two == three


def test_captions_in_half_precision(blip, pictures):
    captioner = ModelCaptioner(blip, dtype='bfloat16', max_new_tokens=6)
    assert len(captioner.caption(pictures)) == 3


def test_no_pictures_have_no_captions(blip):
    assert ModelCaptioner(blip).caption([]) == []


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match='dtype int8'):
        ModelCaptioner(dtype='int8')


KINDS = {'--captioner': ModelCaptioner, '--summariser': ChatSummariser}


def use(model, pictures):
    return model.caption(pictures) if hasattr(model, 'caption') else model.ask('hello')


@pytest.mark.parametrize('option', KINDS)
def test_a_model_that_cannot_be_had_is_one_line_at_its_first_use(
    option, pictures, monkeypatch
):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    model = KINDS[option]('nobody/no-such-model')  # nothing is loaded yet
    with pytest.raises(UserError, match=f'{option} nobody/no-such-model') as e:
        use(model, pictures)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('option', KINDS)
def test_a_folder_without_a_model_is_an_error_that_names_it(option, pictures, tmp_path):
    with pytest.raises(UserError, match=re.escape(f'{option} {tmp_path}')):
        use(KINDS[option](str(tmp_path)), pictures)


# the request to a language model


def many_captions(seed=0):
    captions = [f'caption {i} {{n}} of a bird' for i in range(500)]
    return summary_prompt(captions, 'bird', seed=seed)


def test_a_request_shows_at_most_200_captions_as_they_are():
    assert many_captions().count('{n} of a bird') == 200


def test_the_captions_shown_depend_on_the_seed_alone():
    assert many_captions() == many_captions()
    assert many_captions() != many_captions(seed=1)


def test_empty_captions_are_refused():
    with pytest.raises(UserError, match='no captions'):
        summary_prompt(['', '\n'], 'bird')


# reading an answer

TWO = ['by a lake.', 'in the sky.']
ANSWERS = {
    'bare lines with the prefix, its article corrected': (
        'a photo of an aircraft by a lake\na photo of an aircraft in the sky'
    ),
    'bare lines': 'By a lake.\nIn the sky.',
    'JSON': '["a photo of a aircraft by a lake", "In the sky"]',
    'fenced JSON': '```json\n["by a lake","in the sky"]\n```',
    'thoughts before': (
        '<think>a photo of a aircraft upside down</think>- **by a lake**\n- **in the sky**'
    ),
    'bold numbers': '**1.** by a lake\n**2.** in the sky',
    'quotes': "- 'by a lake.'\n- 'in the sky.'",
    'letters': 'a) by a lake\nb) in the sky',
}


@pytest.mark.parametrize('answer', ANSWERS.values(), ids=ANSWERS.keys())
def test_an_answer_is_read_whatever_its_form(answer):
    assert parse_suffixes(answer, prefix('aircraft')) == (TWO, [])


def test_lines_beyond_the_number_asked_for_are_dropped():
    answer = '\n'.join(f'- beside {i} trees' for i in range(12))
    found, dropped = parse_suffixes(answer, prefix('bird'))
    assert len(found) == 10
    assert [reason for _, reason in dropped] == ['more than 10'] * 2


def test_a_metaclass_with_parentheses_and_tokens_in_lines():
    answer = '- a photo of a sports car (red) at dawn\n- by <|endoftext|> night'
    found, _ = parse_suffixes(answer, prefix('sports car (red)'))
    assert found == ['at dawn.', 'by endoftext night.']


DROPPED = {
    'longer than 25 words': '- ' + 'very ' * 30 + 'far away',
    'a repetition': '- Near!',
    'a heading': 'Descriptions:',
    'not in the list': 'I hope this helps!',
    "does not go on from 'a photo of a bird'": '- a photo of a dog in a garden',
    'nothing behind the prefix': '- a photo of a bird.',
}


@pytest.mark.parametrize('reason, line', DROPPED.items(), ids=DROPPED.keys())
def test_a_line_that_is_no_suffix_is_dropped_with_the_reason(reason, line):
    found, dropped = parse_suffixes(f'- near\n- far\n{line}', prefix('bird'))
    assert found == ['near.', 'far.']
    assert [r for _, r in dropped] == [reason]


REFUSALS = {
    'an apology': 'I am sorry, I cannot do that.\nPlease give me captions.',
    'nothing': '',
    'one line': '- a photo of a bird in the sky.\nThat is all.',
    'control characters': 'x\x00\x1b[31m',
}


@pytest.mark.parametrize('answer', REFUSALS.values(), ids=REFUSALS.keys())
def test_an_answer_with_fewer_than_two_suffixes_is_an_error_that_shows_it(answer):
    with pytest.raises(UserError) as e:
        parse_suffixes(answer, prefix('bird'))
    assert f'The answer was: {answer!r}' in str(e.value)


class Parrot(LLMSummariser):
    "Answers what it is told to."

    def __init__(self, answer, cut_off=False):
        self.answer, self.cut_off = answer, cut_off

    def ask(self, prompt):
        return self.answer, self.cut_off


def test_dropped_lines_are_told_in_a_warning():
    with pytest.warns(UserWarning, match=r"'Well:' \(a heading\)"):
        found = Parrot('Well:\n- in snow\n- by a lake').summarise(['a bird'], 'bird')
    assert found == ['in snow.', 'by a lake.']


def test_the_last_line_of_an_answer_that_was_cut_off_is_not_taken():
    parrot = Parrot('- in snow\n- by a lake\n- under a', cut_off=True)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert parrot.summarise(['a bird'], 'bird') == ['in snow.', 'by a lake.']


# a chat model: a Llama of the real classes with random weights

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
)


def save_chat(folder, template):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token='<unk>'))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=['<unk>', '<s>', '</s>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([summary_prompt(CAPTIONS, 'bird')], trainer)
    special = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    tokenizer.chat_template = template
    torch.manual_seed(0)
    ids = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    sizes = dict(SMALL, vocab_size=len(tokenizer), num_key_value_heads=2)
    config = LlamaConfig(max_position_embeddings=1024, **ids, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def chat(tmp_path_factory):
    return save_chat(tmp_path_factory.mktemp('chat'), TEMPLATE)


def test_an_answer_of_a_chat_model_that_is_no_list_is_shown(chat):
    summariser = ChatSummariser(chat, max_new_tokens=12)
    answer, _ = summariser.ask(summary_prompt(CAPTIONS, 'bird'))
    with pytest.raises(UserError) as e:
        summariser.summarise(CAPTIONS, 'bird')
    assert f'The answer was: {answer!r}' in str(e.value)


def test_a_request_that_is_too_long_for_a_chat_model_is_refused(chat):
    with pytest.raises(UserError, match='max_captions'):
        ChatSummariser(chat, max_new_tokens=12).summarise(CAPTIONS * 30, 'bird')


def test_a_model_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(UserError, match='chat template'):
        ChatSummariser(save_chat(tmp_path, None)).ask('hello')


# an endpoint: a server on this machine, which keeps what it was sent

KEY = 'sk-test/Very+Secret=0123456789'
SILENT = 'silent'


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = self.rfile.read(int(self.headers['Content-Length'])).decode()
        server.seen.append((self.path, dict(self.headers), body))
        last = len(server.replies)
        status, reply, headers = server.replies[min(len(server.seen), last) - 1]
        if status == SILENT:
            server.stop.wait(20)
            return
        data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
        self.send_response(status)
        for name, value in {'Content-Length': len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def endpoint(*replies, key=KEY):
    "A server with these replies, (status, body[, headers]), one after the other."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.seen, server.stop = [], threading.Event()
    server.replies = [(*reply, {})[:3] for reply in replies]
    server.daemon_threads = True
    serve = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    serve.start()
    server.url = f'http://127.0.0.1:{server.server_port}/v1'
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv('OPENAI_BASE_URL', server.url)
            environment.setenv('OPENAI_API_KEY', key)
            yield server
    finally:
        server.stop.set()
        server.shutdown()
        server.server_close()


def says(content):
    "A chat completion with that content."
    message = dict(role='assistant', content=content)
    choice = dict(index=0, message=message, finish_reason='stop')
    return dict(id='1', object='chat.completion', choices=[choice])


GOOD = (200, says('- in snow\n- by a lake'))


@pytest.fixture
def quick():
    options = dict(temperature=0)
    return EndpointSummariser('some-model', timeout=20, wait=0.01, options=options)


def test_suffixes_come_from_an_endpoint(quick):
    answer = '1. a photo of a bird in the snow.\n2. a photo of a bird by a lake.'
    with endpoint((200, says(answer))):
        assert quick.summarise(CAPTIONS, 'bird') == ['in the snow.', 'by a lake.']


def test_a_request_has_the_model_the_options_and_one_message(quick):
    with endpoint(GOOD) as server:
        quick.summarise(CAPTIONS, 'bird')
    path, _, body = server.seen[0]
    sent = json.loads(body)
    assert path == '/v1/chat/completions'
    assert (sent['model'], sent['temperature']) == ('some-model', 0)
    message = dict(role='user', content=summary_prompt(CAPTIONS, 'bird'))
    assert sent['messages'] == [message]


def test_the_key_is_sent_in_one_header_and_kept_nowhere(quick):
    with endpoint(GOOD) as server:
        quick.summarise(CAPTIONS, 'bird')
    path, headers, body = server.seen[0]
    with_key = {name.lower(): value for name, value in headers.items() if KEY in value}
    assert with_key == {'authorization': f'Bearer {KEY}'}
    assert KEY not in path + body
    assert KEY not in repr(vars(quick)) + repr(quick)


def test_without_a_key_no_authorization_is_sent(quick):
    with endpoint(GOOD, key='') as server:
        quick.summarise(CAPTIONS, 'bird')
    assert 'authorization' not in [name.lower() for name in server.seen[0][1]]


def test_a_content_in_parts_is_joined(quick):
    parts = [dict(type='text', text='- in snow\n'), dict(type='text', text='- at dusk')]
    with endpoint((200, says(parts))):
        assert quick.summarise(CAPTIONS, 'bird') == ['in snow.', 'at dusk.']


def test_a_server_on_this_machine_is_asked_without_a_proxy(quick, monkeypatch):
    for name in ('http_proxy', 'HTTP_PROXY', 'all_proxy', 'ALL_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    with endpoint(GOOD):
        assert quick.summarise(CAPTIONS, 'bird') == ['in snow.', 'by a lake.']


def test_a_busy_server_is_asked_again(quick):
    busy = (429, dict(error=dict(message='slow down')))
    with endpoint(busy, (500, ''), GOOD) as server:
        assert quick.summarise(CAPTIONS, 'bird') == ['in snow.', 'by a lake.']
    assert len(server.seen) == 3


FAILURES = {  # the replies, what the error says, how often the server was asked
    'a refusal that repeats the key': (
        (401, dict(error=dict(message=f'Incorrect API key provided: {KEY}.'))),
        r'answered 401 \(Incorrect API key provided: \*\*\*\.\); check OPENAI_API_KEY',
        1,
    ),
    'a page': (
        (404, '<html>\nnot here\n</html>'),
        'answered 404 .*not here.*check OPENAI_BASE_URL',
        1,
    ),
    'another JSON': ((200, dict(hello=1)), 'not a chat completion .*hello', 1),
    'no JSON': ((200, 'no JSON ' + KEY), r'not a chat completion .*\*\*\*', 1),
    'no content': ((200, says(None)), 'not a chat completion', 1),
    'always busy': ((503, dict(error='busy')), r'answered 503 \(busy\); try again', 3),
    'nothing said': ((400, ''), r'answered 400 \(Bad Request\); check the model', 1),
    'an answer without suffixes': ((200, says('No.')), "The answer was: 'No.'", 1),
}


def error_of(summariser):
    with pytest.raises(UserError) as e:
        summariser.summarise(CAPTIONS, 'bird')
    return e.value


@pytest.mark.parametrize('reply, said, times', FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_is_one_line_without_the_key(quick, reply, said, times):
    with endpoint(reply) as server:
        error = error_of(quick)
    assert re.search(said, str(error))
    assert '\n' not in str(error) and KEY not in str(error)
    # no traceback of a library, which might show the key
    behind = None if error.__suppress_context__ else error.__context__
    assert (error.__cause__ or behind) is None
    assert len(server.seen) == times


def test_a_silent_server_is_asked_again_and_given_up():
    impatient = EndpointSummariser('m', timeout=0.3, retries=1, wait=0.01)
    with endpoint((SILENT, None)) as server:
        assert 'no answer within 0.3 s' in str(error_of(impatient))
    assert len(server.seen) == 2


def test_a_redirect_is_refused_and_nothing_is_sent_there(quick):
    with endpoint((200, says('never'))) as other:
        target = dict(Location=other.url + '/chat/completions')
        with endpoint((307, '', target)):
            assert 'answered 307' in str(error_of(quick))
        assert other.seen == []


def test_no_server_at_all(quick, monkeypatch):
    with endpoint(GOOD) as server:
        url = server.url
    monkeypatch.setenv('OPENAI_BASE_URL', url)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    error = str(error_of(quick))
    assert 'cannot be reached' in error and KEY not in error


def test_without_address_and_key_no_question_can_be_asked(quick, monkeypatch):
    monkeypatch.setenv('OPENAI_BASE_URL', '')
    monkeypatch.setenv('OPENAI_API_KEY', '')
    with pytest.raises(UserError, match='OPENAI_API_KEY: not set'):
        quick.ask('x')
    with pytest.raises(UserError, match='OPENAI_API_KEY: not set'):
        quick.check()


ADDRESSES = ('localhost:8000/v1', 'file:///etc/passwd', f'https://me:{KEY}@host/v1')


@pytest.mark.parametrize('address', ADDRESSES)
def test_what_is_no_address_is_refused(quick, monkeypatch, address):
    monkeypatch.setenv('OPENAI_BASE_URL', address)
    monkeypatch.setenv('OPENAI_API_KEY', KEY)
    with pytest.raises(UserError, match='OPENAI_BASE_URL: not an address') as e:
        quick.ask('x')
    assert KEY not in str(e.value)


def test_a_key_with_a_line_break_is_refused_and_not_shown(quick, monkeypatch):
    monkeypatch.setenv('OPENAI_BASE_URL', 'http://127.0.0.1:9')
    monkeypatch.setenv('OPENAI_API_KEY', f'{KEY}\nX-Other: 1')
    with pytest.raises(UserError, match='OPENAI_API_KEY') as e:
        quick.ask('x')
    assert KEY not in str(e.value)


# by name, together, and which


def test_a_model_captioner_and_an_endpoint_together(blip, birds):
    captioner = get_captioner(blip, 'bird', max_new_tokens=6)
    summariser = get_summariser('openai:m', wait=0.01)
    with endpoint(GOOD) as server:
        found = make_suffixes(birds.subset(range(3)), 'bird', captioner, summariser)
    assert found == ['in snow.', 'by a lake.']
    assert captioner.caption([birds.open(0)])[0] in server.seen[0][2]


@pytest.fixture(scope='module')
def birds():
    return aviary.aviary_set(n=5, seed=1)


NAMES = {
    'a/b': (ChatSummariser, 'a/b'),
    'openai:m:7b': (EndpointSummariser, 'm:7b'),
    'a:b': (ChatSummariser, 'a:b'),
}


@pytest.mark.parametrize('name, expected', NAMES.items())
def test_summarisers_by_name(name, expected):
    summariser = get_summariser(name)
    assert (type(summariser), summariser.model) == expected


def test_an_endpoint_without_a_model_is_refused():
    with pytest.raises(UserError, match='openai:gpt-4-turbo'):
        get_summariser('openai:')


def test_a_captioner_by_name():
    assert isinstance(get_captioner('a/b', 'car'), ModelCaptioner)


def test_the_users_suffixes_go_before_all_others():
    expected = published_suffixes('5-shot CUB'), 'from 5-shot CUB'
    assert choose_suffixes('5-shot CUB', 'car') == expected
    assert choose_suffixes(['in snow'], 'bird') == (['in snow.'], 'given')


def test_a_captioner_goes_before_what_is_known(birds):
    expected = make_suffixes(
        birds, 'bird', MeasuringCaptioner('bird'), ClusterSummariser()
    )
    assert choose_suffixes(None, 'bird', birds, 'measure')[0] == expected


def test_models_that_are_named_run_on_the_device_of_the_run(birds, monkeypatch):
    made = []

    def make(images, metaclass, *parts, progress):
        made.extend(parts)
        return []

    monkeypatch.setattr('diffii.run.contexts.make_suffixes', make)
    choose_suffixes(None, 'bird', birds, 'a/b', 'c/d', device='cuda:7')
    assert [part.device for part in made[:2]] == ['cuda:7', 'cuda:7']

    names = 'measure', 'openai:m'
    choose_suffixes(None, 'bird', birds, *names, device='cuda:7')
    assert isinstance(made[3], MeasuringCaptioner)
    assert isinstance(made[4], EndpointSummariser)


def test_the_device_of_a_run_is_that_of_its_captioner(birds, tmp_path, monkeypatch):
    asked = []

    def choose(*args, **about):
        asked.append(about['device'])
        return ['in snow.'], 'given'

    monkeypatch.setattr('diffii.run.runs.choose_suffixes', choose)
    settings = Settings(
        model=ModelSettings(device='cpu'), contexts=ContextSettings(captioner='a/b')
    )
    run_suffixes(settings, birds, tmp_path / 'out')
    assert asked == ['cpu']


def test_what_is_known_goes_before_the_fallback():
    assert choose_suffixes(metaclass='digit')[0] == digits.digit_suffixes()
    known = choose_suffixes(metaclass='bird', fallback=['in a field'])[0]
    assert 'flying over water.' in known and 'in a field.' not in known


@pytest.mark.parametrize('metaclass', sorted(set(published()['metaclasses'].values())))
def test_every_metaclass_of_the_paper_has_suffixes(metaclass):
    suffixes, source = known_suffixes(metaclass)
    assert len(suffixes) >= 7 and source.startswith('published')


def test_a_fallback_is_used_where_nothing_is_known():
    found, _ = choose_suffixes(metaclass='oak', fallback=['in a field.'])
    assert found == ['in a field.']


def test_nothing_known_and_no_fallback_is_an_error():
    with pytest.raises(UserError, match="'oak'"):
        choose_suffixes(metaclass='oak')


def test_a_captioner_without_images_is_an_error():
    with pytest.raises(UserError, match='--captioner'):
        choose_suffixes(None, 'bird', captioner='measure')


# chosen once


class Moody:
    "Another answer to every question."

    asked = 0

    def summarise(self, captions, metaclass, max_suffixes=10, seed=0):
        self.asked += 1
        return [f'in mood {self.asked}.', 'in snow.']


@pytest.fixture
def choice(birds):
    moody, few = Moody(), birds.subset(range(3))
    return lambda: choose_suffixes(None, 'bird', few, 'measure', moody)


@pytest.fixture
def file(tmp_path):
    return tmp_path / '.diffii' / 'suffixes.json'


def test_suffixes_are_chosen_once(file, choice):
    first = (['in mood 1.', 'in snow.'], 'summed up from 3 captions')
    assert [kept_suffixes(file, choice, dict(seed=0)) for _ in range(3)] == [first] * 3


def test_something_else_to_choose_from_is_another_choice(file, choice):
    kept_suffixes(file, choice, dict(seed=0))
    second = [kept_suffixes(file, choice, dict(seed=1))[0][0] for _ in range(2)]
    assert second == ['in mood 2.'] * 2


def test_a_choice_that_is_not_written_leaves_the_runs_own(file, choice):
    kept_suffixes(file, choice, dict(seed=0))
    before = file.read_bytes()
    found, _ = kept_suffixes(file, choice, dict(seed=1), write=False)
    assert found[0] == 'in mood 2.'
    assert file.read_bytes() == before


def test_a_choice_that_fails_leaves_no_folder(tmp_path):
    file = tmp_path / 'x' / 'suffixes.json'
    with pytest.raises(UserError, match='--suffixes nothing'):
        kept_suffixes(file, lambda: choose_suffixes('nothing'), {})
    assert list(tmp_path.iterdir()) == []
