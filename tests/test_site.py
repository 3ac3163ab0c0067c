"The site: the notebooks as Quarto gets them, with their links, pictures and symbols."

import ast
import json
import os
import re
import shutil
import sys
from collections import Counter

import pytest
import yaml

WIDEST = 100  # characters of a line of code, which a page shows without scrolling
WRAPPED = 400  # characters of a line of output, which the style sheet wraps
PROCESS = """
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

if __name__ == '__main__':
    refresh_quarto_yml()
    proc_nbs(n_workers=2)
"""


def source(cell):
    return ''.join(cell['source'])


def code(cells):
    return [cell for cell in cells if cell['cell_type'] == 'code']


def flags(cell):
    "The directives of a code cell, as {'hide', 'export'}."
    return set(re.findall(r'^#\|\s*(\w+)', source(cell), re.M))


def pictures(cell):
    return [
        kind
        for out in cell.get('outputs', [])
        for kind in out.get('data', {})
        if kind.startswith('image/')
    ]


@pytest.fixture(scope='module')
def pages(root, run, tmp_path_factory):
    "The pages as Quarto would get them, made in a copy of the checkout."
    folder = tmp_path_factory.mktemp('docs')
    for name in ('settings.ini', '_quarto.yml'):
        shutil.copy(root / name, folder)
    ignored = shutil.ignore_patterns('.ipynb_checkpoints', 'work')
    shutil.copytree(root / 'nbs', folder / 'nbs', symlinks=True, ignore=ignored)
    os.symlink(root / 'diffii', folder / 'diffii')
    (folder / 'process.py').write_text(PROCESS)
    run(sys.executable, 'process.py', cwd=folder, timeout=900)
    return folder / '_proc'


@pytest.fixture(scope='module')
def shown(pages, notebooks):
    "The cells of every page: path -> cells."
    read = {path: (pages / path).read_text(encoding='utf-8') for path in notebooks}
    return {path: json.loads(text)['cells'] for path, text in read.items()}


def test_the_site_has_its_title_its_style_and_its_sidebar(pages):
    site = yaml.safe_load((pages / 'nbdev.yml').read_text())['website']
    assert site['title'] == 'diffii'
    quarto = yaml.safe_load((pages / '_quarto.yml').read_text())
    assert (pages / quarto['format']['html']['css']).exists()
    assert quarto['website']['page-navigation']
    assert 'sidebar' in quarto['website']


def test_nothing_hidden_is_shown(shown, notebooks):
    def lines(cells):
        found = {line.strip() for cell in cells for line in source(cell).splitlines()}
        return {line for line in found if len(line) > 12 and not line.startswith('#|')}

    for path, cells in notebooks.items():
        page = '\n'.join(source(cell) for cell in shown[path])
        hidden = lines(c for c in code(cells) if 'hide' in flags(c))
        visible = lines(
            c for c in cells if c['cell_type'] != 'code' or 'hide' not in flags(c)
        )
        leaked = [line for line in hidden - visible if line in page]
        assert not leaked, f'{path}: {leaked}'


def test_every_public_name_is_documented(shown, notebooks):
    for path, cells in notebooks.items():
        page = '\n'.join(source(cell) for cell in shown[path])
        kinds = (ast.FunctionDef, ast.ClassDef)
        public = {
            node.name
            for cell in code(cells)
            if 'export' in flags(cell)
            for node in ast.parse(source(cell)).body
            if isinstance(node, kinds) and not node.name.startswith('_')
        }
        found = set(re.findall(r'show_doc\((?:\w+\.)?(\w+)\)', page))
        assert public <= found, f'{path}: no documentation of {public - found}'


def test_symbols_link_to_their_pages(pages):
    text = ' '.join(
        source(cell)
        for path in pages.rglob('*.ipynb')
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']
        if cell['cell_type'] == 'markdown'
    )
    linked = re.findall(r'\[`(\w+)`\]\(https?://[^)]*diffii[^)]*\)', text)
    assert {'synthesize', 'ImageSet', 'ddim_step'} & set(linked), Counter(linked)


def test_every_picture_has_a_text_for_who_cannot_see_it(notebooks):
    silent = [
        f'{path}: {source(cell)[:60]!r}'
        for path, cells in notebooks.items()
        for cell in code(cells)
        if pictures(cell)
        and not re.search(r'^#\|\s*fig-alt:\s*"?\S', source(cell), re.M)
    ]
    silent += [
        f'{path}: a picture in a text'
        for path, cells in notebooks.items()
        for cell in cells
        if cell['cell_type'] == 'markdown' and re.search(r'!\[\s*\]\(', source(cell))
    ]
    assert not silent


def test_code_fits_the_page(notebooks):
    wide = [
        f'{path}: {line}'
        for path, cells in notebooks.items()
        for cell in code(cells)
        for line in source(cell).splitlines()
        if len(line) > WIDEST and not line.startswith('#| fig-')
    ]
    assert not wide


def test_text_outputs_are_wrapped_and_short_enough_for_it(root, notebooks):
    style = (root / 'nbs' / 'styles.css').read_text(encoding='utf-8')
    assert re.search(r'\.cell-output > pre > code \{ white-space: pre-wrap', style)
    wide = []
    for path, cells in notebooks.items():
        for cell in code(cells):
            for out in cell.get('outputs', []):
                data = out.get('data', {})
                if 'text/html' in data or 'text/markdown' in data or pictures(cell):
                    continue
                text = ''.join(out.get('text') or data.get('text/plain', ''))
                wide += [f'{path}: {x}' for x in text.splitlines() if len(x) > WRAPPED]
    assert not wide


def test_outputs_name_no_folder_of_this_machine(notebooks):
    told = []
    for path, cells in notebooks.items():
        for cell in code(cells):
            text = json.dumps([out.get('text', '') for out in cell.get('outputs', [])])
            if found := re.search(r'(/tmp/venv|/work/|/root/|site-packages)\S*', text):
                told.append(f'{path}: {found[0]}')
    assert not told


def test_headings_of_a_page_differ(notebooks):
    for path, cells in notebooks.items():
        text = '\n'.join(source(c) for c in cells if c['cell_type'] == 'markdown')
        text = re.sub(r'```.*?```', '', text, flags=re.S)
        headings = re.findall(r'^#+ (.*)$', text, re.M)
        twice = [h for h, n in Counter(headings).items() if n > 1]
        assert not twice, f'{path}: {twice}'


def test_links_and_pictures_of_pages_lead_somewhere(root, notebooks):
    dead = []
    for path, cells in notebooks.items():
        for cell in cells:
            if cell['cell_type'] != 'markdown':
                continue
            text = re.sub(r'```.*?```|`[^`]*`', '', source(cell), flags=re.S)
            links = re.findall(r'\]\(([^)#\s]+)', text)
            for link in links + re.findall(r'src="([^"]+)"', text):
                if re.match(r'[a-z]+:', link):
                    continue
                if not (root / 'nbs' / path).parent.joinpath(link).exists():
                    dead.append(f'{path}: {link}')
    assert not dead


def test_most_examples_show_something(notebooks):
    examples = [
        cell
        for path, cells in notebooks.items()
        for cell in code(cells)
        if not flags(cell) & {'export', 'exports', 'default_exp', 'hide', 'eval', 'gpu'}
        and not re.match(r'(import|from) ', source(cell))
    ]
    showing = [cell for cell in examples if cell.get('outputs')]
    assert len(showing) / len(examples) > 0.55


def test_method_chapters_open_in_a_hosted_notebook(notebooks):
    for path, cells in notebooks.items():
        if not path.startswith('method/') or path.endswith('glossary.ipynb'):
            continue
        text = '\n'.join(source(cell) for cell in cells[:6])
        assert (
            f'colab.research.google.com/github/diffii/diffii/blob/main/nbs/{path}'
            in text
        )
        assert 'pip install' in text, f'{path}: no cell that installs the package'
