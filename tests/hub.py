"A server that speaks as much of the Hugging Face hub as a push needs."

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

TOKEN = 'hf_of_the_test'
LICENSES = ('unknown', 'cc0-1.0')  # that this hub knows


class Hub:
    "Repositories in memory: (kind, name) -> whether it is private, and its files."

    def __init__(self):
        self.private = {}
        self.files = {}
        self.objects = {}  # sha256 -> bytes of a large file
        self.commits = []  # number of files in each
        self.refused = None  # (status, message) to answer to a new repository

    def repo(self, kind, name, private=True):
        self.private[kind, name] = private
        return self.files.setdefault((kind, name), {})


class Handler(BaseHTTPRequestHandler):
    "One request; the routes of `ROUTES`."

    def log_message(self, *args):
        pass

    def answer(self, body, status=200):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self):
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b''.join(parts)

    def handle_any(self):
        path, body = self.path.split('?')[0], self.body()
        known = self.headers.get('Authorization') == f'Bearer {TOKEN}'
        if not known and self.command != 'PUT':
            return self.answer(dict(error='Invalid username or password.'), 401)
        for pattern, route in ROUTES.items():
            if found := re.fullmatch(pattern, f'{self.command} {path}'):
                return route(self, self.server.hub, body, *found.groups())
        self.answer(dict(error=f'no such route: {self.command} {path}'), 404)

    do_GET = do_POST = do_PUT = handle_any


def create(request, hub, body, *_):
    about = json.loads(body)
    if hub.refused:
        return request.answer(dict(error=hub.refused[1]), hub.refused[0])
    kind = about.get('type') or 'model'
    name = f'{about.get("organization") or "me"}/{about["name"]}'
    place = f'{"datasets/" * (kind == "dataset")}{name}'
    answer = dict(url=f'http://{request.headers["Host"]}/{place}')
    if (kind, name) in hub.files:
        return request.answer({**answer, 'error': 'You already created it'}, 409)
    private = about.get('visibility') == 'private' or about.get('private', False)
    hub.repo(kind, name, private)
    request.answer(answer)


def info(request, hub, body, kind, name):
    if (kind, name) not in hub.files:
        return request.answer(dict(error='Repository not found'), 404)
    siblings = [dict(rfilename=file) for file in hub.files[kind, name]]
    about = dict(id=name, private=hub.private[kind, name], siblings=siblings)
    card = hub.files[kind, name].get('README.md', b'').decode()
    tags = header_of(card).get('tags', [])
    request.answer(dict(about, sha='0' * 40, tags=tags, downloads=0, likes=0))


def header_of(card):
    "The YAML that a card begins with."
    return yaml.safe_load(card.split('---\n')[1]) if '---\n' in card else {}


def tree(request, hub, body, kind, name):
    files = hub.files[kind, name].items()
    found = [dict(type='file', path=p, size=len(b), oid='0' * 40) for p, b in files]
    request.answer(found)


def validate_yaml(request, hub, body):
    license = header_of(json.loads(body)['content'])['license']
    good = license in LICENSES
    errors = [] if good else [dict(message='"license" must be one of ...')]
    request.answer(dict(errors=errors, warnings=[]), 200 if good else 400)


def preupload(request, hub, body, kind, name):
    modes = {True: 'lfs', False: 'regular'}
    request.answer(
        dict(
            files=[
                dict(
                    path=file['path'],
                    uploadMode=modes[file['path'].endswith(('png', 'safetensors'))],
                    shouldIgnore=False,
                )
                for file in json.loads(body)['files']
            ]
        )
    )


def lfs_batch(request, hub, body, *_):
    place = f'http://{request.headers["Host"]}/lfs'
    objects = [
        dict(
            oid=one['oid'],
            size=one['size'],
            actions=dict(upload=dict(href=f'{place}/{one["oid"]}')),
        )
        for one in json.loads(body)['objects']
        if one['oid'] not in hub.objects
    ]
    request.answer(dict(transfer='basic', objects=objects))


def lfs_upload(request, hub, body, oid):
    assert hashlib.sha256(body).hexdigest() == oid
    hub.objects[oid] = body
    request.answer({})


def commit(request, hub, body, kind, name):
    files = hub.files[kind, name]
    lines = [json.loads(line) for line in body.splitlines()]
    for line in lines:
        value = line['value']
        if line['key'] == 'file':
            files[value['path']] = base64.b64decode(value['content'])
        if line['key'] == 'lfsFile':
            files[value['path']] = hub.objects[value['oid']]
        if line['key'] == 'deletedFile':
            del files[value['path']]
    hub.commits.append(len(lines) - 1)
    url = f'http://{request.headers["Host"]}/{name}/commit/{"0" * 40}'
    request.answer(dict(commitOid='0' * 40, commitUrl=url, success=True))


REPO = r'/api/(dataset|model)s/([^/]+/[^/]+)'
ROUTES = {
    'POST /api/repos/create': create,
    'POST /api/validate-yaml': validate_yaml,
    f'GET {REPO}': info,
    f'GET {REPO}/revision/main': info,
    f'GET {REPO}/tree/main': tree,
    f'POST {REPO}/preupload/main': preupload,
    f'POST {REPO}/commit/main': commit,
    r'POST /(.*)\.git/info/lfs/objects/batch': lfs_batch,
    r'PUT /lfs/(\w+)': lfs_upload,
}


@contextmanager
def serving():  # yields (hub, address)
    "Run a hub on this machine for the time of the block."
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.hub = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub, f'http://127.0.0.1:{server.server_port}'
    finally:
        server.shutdown()
        server.server_close()
