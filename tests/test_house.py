"The house: parts and rooms, the direction of imports, and the style of the code."

import ast
import builtins
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
import yaml

import house

LONGEST_CELL = 50  # lines of an exported cell
MOST_PARAMETERS = 10


def source(cell):
    return ''.join(cell['source'])


def exported(cells):
    return [
        source(c)
        for c in cells
        if c['cell_type'] == 'code' and re.match(r'#\|\s*exports?\b', source(c))
    ]


def code_of(text):
    "A cell's code without directives and shell lines, as Python."
    lines = (line for line in text.splitlines() if not re.match(r'[%!]|#\|', line))
    return '\n'.join(lines)


def sidebar(root):
    site = yaml.safe_load((root / '_quarto.yml').read_text(encoding='utf-8'))
    return site['website']['sidebar']['contents']


def test_the_sidebar_lists_every_notebook_once(root, notebooks):
    listed = []
    for item in sidebar(root):
        listed += [item] if isinstance(item, str) else item['contents']
    assert sorted(listed) == sorted(notebooks)
    assert listed[0] == 'index.ipynb'


def test_sections_of_the_sidebar_are_the_folders(root):
    for section in sidebar(root)[1:]:
        folders = {path.split('/')[0] for path in section['contents']}
        assert folders == {section['section'].lower()}


def test_the_sidebar_is_linked_into_the_notebooks_folder(root):
    link = root / 'nbs' / '_quarto.yml'
    assert link.is_symlink()
    assert link.resolve() == root / '_quarto.yml'


def test_a_notebook_exports_the_module_of_its_path(root, notebooks):
    for path, cells in notebooks.items():
        found = [
            m[1]
            for c in cells
            if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M))
        ]
        assert found in ([], [path.removesuffix('.ipynb').replace('/', '.')]), path
        if not found:
            assert not exported(cells), f'{path}: exports without a module'


def test_every_module_has_its_notebook(root, notebooks):
    rooms = {
        f'{part}/{room}.ipynb' for part in house.PARTS for room in house.rooms(part)
    }
    assert rooms <= set(notebooks)


def test_a_part_imports_only_from_parts_before_it():
    order = {part: i for i, part in enumerate(house.PARTS)}
    for part, others in house.part_imports().items():
        later = [other for other in others if order[other] > order[part]]
        assert not later, f'{part} imports from {later}'


def test_modules_do_not_import_in_circles():
    TopologicalSorter(house.room_imports()).prepare()


def test_the_graph_in_contributing_is_that_of_the_code(root):
    text = (root / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert house.graph() in text, 'run: python tools/house.py'


def test_all_names_can_be_had_in_one_import():
    import diffii.all

    assert {'synthesize', 'load_pipeline', 'Settings'} <= set(diffii.all.__all__)
    assert not [n for n in diffii.all.__all__ if n.startswith('_')]


def ruff(root, *args):
    "What ruff finds, as text; empty where it is content."
    line = [sys.executable, '-m', 'ruff', *args]
    done = subprocess.run(line, cwd=root, capture_output=True, text=True)
    found = done.stdout + done.stderr or 'it ended without a word'
    return found[-3000:] if done.returncode else ''


def test_ruff_finds_nothing(root):
    assert not ruff(root, 'check', 'nbs', 'tests', 'tools')
    assert not ruff(root, 'format', '--check', 'nbs', 'tests', 'tools')


def test_modules_name_only_what_they_have(root):
    "Cells of a notebook share names; the functions of its module may not."
    assert not ruff(root, 'check', '--isolated', '--select=F821', 'diffii')


def bound_names(tree):
    "The names that code defines, imports or assigns, at any depth."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((a.asname or a.name).split('.')[0] for a in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.name


def test_cells_use_names_that_their_notebook_has(notebooks):
    import diffii.all

    found = {}
    for path, cells in notebooks.items():
        code = [source(c) for c in cells if c['cell_type'] == 'code']
        trees = [ast.parse(code_of(text)) for text in code]
        known = set(dir(builtins)) | {'display'}
        known |= {name for tree in trees for name in bound_names(tree)}
        if '*' in known:
            known |= set(diffii.all.__all__)
        used = {
            node.id
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        if used - known:
            found[path] = sorted(used - known)
    assert not found


def test_exported_cells_hold_one_idea(notebooks):
    long = {
        f'{path}: {text.splitlines()[1]}': len(text.splitlines())
        for path, cells in notebooks.items()
        for text in exported(cells)
        if len(text.splitlines()) > LONGEST_CELL
    }
    assert not long


def test_functions_take_few_parameters(notebooks):
    many = []
    for path, cells in notebooks.items():
        for text in exported(cells):
            for node in ast.walk(ast.parse(code_of(text))):
                if not isinstance(node, ast.FunctionDef):
                    continue
                names = [*node.args.args, *node.args.kwonlyargs]
                names = [a.arg for a in names if a.arg not in ('self', 'cls')]
                if len(names) > MOST_PARAMETERS:
                    many.append(f'{path}: {node.name} takes {len(names)}')
    assert not many


def test_imports_stand_in_cells_of_their_own(notebooks):
    "The documentation runs every cell that imports, so it must need no other cell."
    imports = (ast.Import, ast.ImportFrom)
    harmless = (*imports, ast.FunctionDef, ast.ClassDef)
    mixed = []
    for path, cells in notebooks.items():
        for cell in cells:
            text = source(cell)
            if cell['cell_type'] != 'code' or re.search(
                r'^#\|\s*(export|eval)', text, re.M
            ):
                continue
            tree = ast.parse(code_of(text))
            has_import = any(isinstance(n, imports) for n in ast.walk(tree))
            if has_import and not all(isinstance(n, harmless) for n in tree.body):
                mixed.append(f'{path}: {text[:80]!r}')
    assert not mixed


@pytest.mark.parametrize('given, expected', [(None, '1000'), ('7', '7')])
def test_openmp_is_told_how_to_wait_unless_it_was_told_before(given, expected, run):
    code = 'import os, diffii; print(os.environ["GOMP_SPINCOUNT"])'
    setting = 'os.environ.pop("GOMP_SPINCOUNT", None)'
    if given:
        setting = f'os.environ["GOMP_SPINCOUNT"] = "{given}"'
    done = run(sys.executable, '-c', f'import os; {setting}; {code}')
    assert done.stdout.strip() == expected


def test_importing_the_package_loads_no_torch(run):
    code = 'import sys, diffii; print("torch" in sys.modules)'
    assert run(sys.executable, '-c', code).stdout.strip() == 'False'


def test_notebooks_import_diffii_before_torch(notebooks):
    "Otherwise OpenMP's threads have already begun to wait in their own way."
    late = []
    for path, cells in notebooks.items():
        text = '\n'.join(code_of(source(c)) for c in cells if c['cell_type'] == 'code')
        loads = r'(torch|torchvision|diffusers|transformers|peft|timm|lpips|fastai)'
        first = re.search(rf'^(import|from) ({loads}|diffii)\b', text, re.M)
        if first and first[2] != 'diffii':
            late.append(path)
    assert not late
