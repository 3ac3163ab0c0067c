"""A page in headless Chromium, with its clicks, keys, downloads and pictures.

    with Browser() as browser:
        browser.open('page.html')
        browser.click('#save')
        browser.js('document.title')

Chromium is driven by the DevTools protocol (https://chromedevtools.github.io) over a pipe:
messages are JSON, each with a zero byte behind it, on the file descriptors 3 and 4.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from fcntl import F_DUPFD, fcntl
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome')
# without a window, and without calls of its own
QUIET = (
    '--headless',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
)
KEYS = {'Enter': '\r', ' ': ' '}  # keys that write a character, beside the letters


def chromium():
    "The path of the browser on this machine; None where there is none."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One tab of a headless Chromium with a profile of its own."

    def __init__(self, size=(1280, 900), dark=False):
        self.size, self.dark = size, dark
        self.count, self.unread = 0, b''
        self.messages = []  # what the page said to its console, and its errors
        self.requests = []  # addresses that the page asked for

    def __enter__(self):
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.downloads = Path(self.home.name) / 'downloads'
        self._start()
        target = self.call('Target.createTarget', url='about:blank')['targetId']
        found = self.call('Target.attachToTarget', targetId=target, flatten=True)
        self.session = found['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network'):
            self.call(f'{domain}.enable')
        width, height = self.size
        screen = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Emulation.setDeviceMetricsOverride', **screen)
        scheme = dict(
            name='prefers-color-scheme', value='dark' if self.dark else 'light'
        )
        self.call('Emulation.setEmulatedMedia', features=[scheme])
        where = dict(behavior='allow', downloadPath=str(self.downloads))
        self.call('Browser.setDownloadBehavior', **where)
        return self

    def _start(self):
        "Start the browser with its pipe."
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()
        self.session = None

        def wire():  # in the new process: from 10 on, neither is in the other's way
            there = [fcntl(end, F_DUPFD, 10) for end in (read_there, write_there)]
            for number, end in zip((3, 4), there):
                os.dup2(end, number)

        profile = f'--user-data-dir={self.home.name}/profile'
        self.process = subprocess.Popen(
            [chromium(), *QUIET, '--remote-debugging-pipe', profile, 'about:blank'],
            preexec_fn=wire,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_there)
        os.close(write_there)
        self.pipe = read_here, write_here

    def __exit__(self, *error):
        self.session = None
        try:
            self.call('Browser.close')
            self.process.wait(20)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for end in self.pipe:
            os.close(end)
        self.home.cleanup()

    def call(self, method, **params):
        "Call a method of the protocol and wait for what it answers."
        self.count += 1
        message = dict(id=self.count, method=method, params=params)
        if self.session:
            message['sessionId'] = self.session
        os.write(self.pipe[1], json.dumps(message).encode() + b'\0')
        while True:
            answer = self._read()
            if answer.get('id') == self.count:
                assert 'error' not in answer, f'{method}: {answer["error"]}'
                return answer['result']
            self._note(answer)

    def _read(self):
        "The next message of the browser."
        while b'\0' not in self.unread:
            more = os.read(self.pipe[0], 2**20)
            if not more:
                raise EOFError('the browser has ended')
            self.unread += more
        first, self.unread = self.unread.split(b'\0', 1)
        return json.loads(first)

    def _note(self, event):
        "Keep what an event tells of messages and requests."
        method, params = event.get('method'), event.get('params', {})
        if method == 'Runtime.exceptionThrown':
            self.messages.append(params['exceptionDetails'].get('text', 'error'))
        elif method == 'Runtime.consoleAPICalled':
            self.messages.append(' '.join(str(a.get('value')) for a in params['args']))
        elif method == 'Log.entryAdded':
            self.messages.append(params['entry']['text'])
        elif method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])

    def open(self, page):
        "Open an HTML file and wait until it has loaded."
        self.call('Page.navigate', url=Path(page).resolve().as_uri())
        self.wait('document.readyState === "complete"')

    def js(self, expression):
        "The value of a JavaScript expression; promises are waited for."
        options = dict(returnByValue=True, awaitPromise=True)
        found = self.call('Runtime.evaluate', expression=expression, **options)
        assert 'exceptionDetails' not in found, found['exceptionDetails']
        return found['result'].get('value')

    def wait(self, expression, seconds=60):
        "Wait until an expression is true."
        end = time.time() + seconds
        while not self.js(expression):
            assert time.time() < end, f'{expression}: not true after {seconds} s'
            time.sleep(0.02)

    def click(self, selector):
        "Click the middle of the first element that a selector finds."
        found = f'document.querySelector({json.dumps(selector)})'
        self.js(f'{found}.scrollIntoView({{block: "center"}})')
        box = self.js(f'{found}.getBoundingClientRect().toJSON()')
        at = dict(x=box['x'] + box['width'] / 2, y=box['y'] + box['height'] / 2)
        for kind in ('mousePressed', 'mouseReleased'):
            mouse = dict(type=kind, button='left', clickCount=1, **at)
            self.call('Input.dispatchMouseEvent', **mouse)

    def press(self, key):
        "Press and release a key, as 'x', 'Enter' or 'ArrowDown'."
        text = KEYS.get(key, key if len(key) == 1 else None)
        down = dict(type='keyDown', key=key) | (dict(text=text) if text else {})
        self.call('Input.dispatchKeyEvent', **down)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key)

    def choose(self, selector, value):
        "Set a field or a check box, and tell the page as a user's choice would."
        field = f'document.querySelector({json.dumps(selector)})'
        name = 'checked' if isinstance(value, bool) else 'value'
        event = 'new Event("change", {bubbles: true})'
        self.js(f'{field}.{name} = {json.dumps(value)}; {field}.dispatchEvent({event})')

    def downloaded(self, name, seconds=20):
        "The content of a file that the page had the browser download, and is not empty."
        file, end = self.downloads / name, time.time() + seconds
        # an empty file keeps the name free until the whole one takes its place
        while not file.is_file() or not file.stat().st_size:
            assert time.time() < end, f'{name}: not downloaded'
            self.js('0')
            time.sleep(0.02)
        return file.read_bytes()

    def screenshot(self, path):
        "Write what the tab shows into a PNG file."
        found = self.call('Page.captureScreenshot', format='png')
        Path(path).write_bytes(base64.b64decode(found['data']))
