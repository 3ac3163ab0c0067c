"The documentation: every notebook in the sidebar, links that lead somewhere, nothing hidden on a page, README.md as the notebook says."

import ast, json, os, re, shutil, sys
from configparser import ConfigParser
import pytest, yaml


def contents(items):  # the files of a sidebar, in order
    for i in items:
        if isinstance(i, str):
            yield i
        else:
            yield from contents(i['contents'])


def source(cell):
    return ''.join(cell['source'])


def flags(cell):
    return (
        set(re.findall(r'^#\|\s*(\w+)', source(cell), re.M))
        if cell['cell_type'] == 'code'
        else set()
    )


def test_sidebar_lists_every_notebook_in_reading_order(root, notebooks):
    sidebar = list(
        contents(
            yaml.safe_load((root / '_quarto.yml').read_text())['website']['sidebar'][
                'contents'
            ]
        )
    )
    assert sorted(sidebar) == sorted(notebooks), (
        'the sidebar in _quarto.yml and the notebooks in nbs/ differ'
    )
    chapters = [f for f in sidebar if re.match(r'\d\d[a-z]?_', f)]
    assert sidebar[0] == 'index.ipynb' and chapters == sorted(chapters)
    assert (root / 'nbs/_quarto.yml').is_symlink() and (
        root / 'nbs/_quarto.yml'
    ).resolve() == root / '_quarto.yml'


def test_numbered_chapters_export_the_module_of_their_name(root, notebooks):
    for f, cells in notebooks.items():
        exports = [
            m[1]
            for c in cells
            if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M))
        ]
        if m := re.fullmatch(r'\d\d[a-z]?_(\w+)\.ipynb', f):
            assert exports in ([m[1]], [f'__{m[1]}__']), f
        for e in exports:
            assert (root / 'diffii' / (e.replace('.', '/') + '.py')).exists(), (
                f'{f}: diffii/{e}.py is missing, run nbdev_export'
            )
    made = {
        e
        for cells in notebooks.values()
        for c in cells
        for e in re.findall(r'^#\|\s*default_exp\s+(\S+)', source(c), re.M)
    }
    orphans = (
        {p.stem for p in (root / 'diffii').glob('*.py') if p.stem[0] != '_'}
        - made
        - {'all'}
    )
    assert not orphans, f'modules without a notebook: {orphans}'


def test_imports_go_down_the_list_only(root, notebooks):
    number = {
        m[2]: m[1]
        for f in notebooks
        if (m := re.fullmatch(r'(\d\d[a-z]?)_(\w+)\.ipynb', f))
    }
    for module, n in number.items():
        path = root / 'diffii' / f'{module}.py'
        tree = ast.parse(
            (path if path.exists() else path.with_stem(f'__{module}__')).read_text(
                encoding='utf-8'
            )
        )
        used = [
            i.module
            for i in ast.walk(tree)
            if isinstance(i, ast.ImportFrom) and i.module
        ] + [
            a.name for i in ast.walk(tree) if isinstance(i, ast.Import) for a in i.names
        ]
        used += [
            f'diffii.{a.name}'
            for i in ast.walk(tree)
            if isinstance(i, ast.ImportFrom) and i.module == 'diffii'
            for a in i.names
        ]
        up = [
            u
            for u in used
            if u.startswith('diffii.')
            and number.get(
                u.split('.')[1], '99' if u.split('.')[1] == 'training' else ''
            )
            >= n
        ]
        assert not up, f'{module} imports {up}, which stands below it'


def test_links_and_pictures_exist(root, notebooks):
    dead = []
    for f, cells in notebooks.items():
        for c in cells:
            if c['cell_type'] != 'markdown':
                continue
            for link in re.findall(
                r'\]\(([^)#\s]+)',
                re.sub(r'```.*?```|`[^`]*`', '', source(c), flags=re.S),
            ) + re.findall(r'src="([^"]+)"', source(c)):
                if (
                    not re.match(r'[a-z]+:', link)
                    and not (root / 'nbs' / f).parent.joinpath(link).exists()
                ):
                    dead.append(f'{f}: {link}')
    assert not dead, 'dead links:\n' + '\n'.join(dead)


def test_imports_stand_in_cells_of_their_own(notebooks):
    "The documentation executes every cell that imports, so such a cell must not need what other cells define."
    mixed = []
    for f, cells in notebooks.items():
        for c in cells:
            if c['cell_type'] != 'code' or flags(c) & {'export', 'exports', 'exporti'}:
                continue
            code = '\n'.join(
                l for l in source(c).splitlines() if not re.match(r'\s*[%!]', l)
            )
            tree = ast.parse(code)
            imports = any(
                isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.walk(tree)
            )
            others = [
                n
                for n in tree.body
                if not isinstance(
                    n, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
                )
            ]
            if imports and others:
                mixed.append(f'{f}: {code[:80]!r}')
    assert not mixed, 'imports mixed with code:\n' + '\n'.join(mixed)


PROCESS = """
from pathlib import Path
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
if __name__ == '__main__':
    refresh_quarto_yml()
    proc_nbs(n_workers=2)
"""


@pytest.fixture(scope='module')
def pages(root, run, tmp_path_factory):
    "The notebooks as Quarto would get them, made in a copy of the checkout."
    d = tmp_path_factory.mktemp('docs')
    for f in ('settings.ini', '_quarto.yml'):
        shutil.copy(root / f, d)
    shutil.copytree(
        root / 'nbs',
        d / 'nbs',
        symlinks=True,
        ignore=shutil.ignore_patterns('.ipynb_checkpoints'),
    )
    os.symlink(root / 'diffii', d / 'diffii')
    (d / 'process.py').write_text(PROCESS)
    run(sys.executable, 'process.py', cwd=d, timeout=900)
    return d / '_proc'


def test_every_page_is_made_and_shows_nothing_hidden(pages, notebooks):
    site = yaml.safe_load((pages / 'nbdev.yml').read_text())['website']
    assert site['title'] == 'diffii' and (pages / '_quarto.yml').exists()
    for f, cells in notebooks.items():
        page = json.loads((pages / f).read_text(encoding='utf-8'))['cells']
        shown = '\n'.join(source(c) for c in page)
        lines = lambda cs: {
            l.strip()
            for c in cs
            for l in source(c).splitlines()
            if len(l.strip()) > 12 and not l.startswith('#|')
        }
        hidden = lines(c for c in cells if 'hide' in flags(c)) - lines(
            c for c in cells if 'hide' not in flags(c)
        )
        leaked = [l for l in hidden if l in shown]
        assert not leaked, f'{f}: {leaked}'
        assert not any(
            re.search(r'^#\|\s*(hide|export|default_exp)', source(c), re.M)
            for c in page
        ), f
        public = {
            n.name
            for c in cells
            if 'export' in flags(c)
            for n in ast.parse(source(c)).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_'
        }
        missing = {
            n for n in public if not re.search(rf'show_doc\((\w+\.)?{n}\)', shown)
        }  # with a class in front for methods patched in
        assert not missing, f'{f}: no documentation of {missing}'


NOTEBOOK = """
# demo

> What it is.

%%
#| hide
secret_setting = 'must not be seen'
%%
#| echo: false
print('made by an unseen cell')
%%
[the chapter](01_data.ipynb) and ![a strip](images/strip.png) and <img src="images/grid.png"> and [out](https://example.org) and [below](#below)

```
[as it is](typed.md)
```
%%
1+1
"""


def toy_notebook(folder):
    cells = []
    for part in NOTEBOOK.split('%%\n'):
        code = part.lstrip().startswith(('#|', '1'))
        out = (
            [dict(output_type='stream', name='stdout', text='made by an unseen cell\n')]
            if 'print' in part
            else [
                dict(
                    output_type='execute_result',
                    execution_count=1,
                    metadata={},
                    data={'text/plain': '2'},
                )
            ]
            if part[0] == '1'
            else []
        )
        cells.append(
            dict(
                cell_type='code' if code else 'markdown',
                id=str(len(cells)),
                metadata={},
                source=part.strip(),
                **(dict(outputs=out, execution_count=None) if code else {}),
            )
        )
    (folder / 'nbs').mkdir(exist_ok=True)
    path = folder / 'nbs' / 'index.ipynb'
    path.write_text(
        json.dumps(
            dict(
                cells=cells,
                metadata=dict(
                    kernelspec=dict(
                        name='python3', language='python', display_name='python3'
                    )
                ),
                nbformat=4,
                nbformat_minor=5,
            )
        )
    )
    return path


def test_readme_shows_what_the_documentation_shows(root, tmp_path, monkeypatch):
    import readme

    monkeypatch.chdir(root)
    text = readme.readme(toy_notebook(tmp_path))
    assert text.startswith('# demo\n\n> What it is.')
    assert 'secret_setting' not in text and 'must not be seen' not in text
    assert 'made by an unseen cell' in text and 'print(' not in text
    assert (
        '](nbs/01_data.ipynb)' in text
        and '](nbs/images/strip.png)' in text
        and 'src="nbs/images/grid.png"' in text
    )
    assert (
        '](https://example.org)' in text
        and '](#below)' in text
        and '](typed.md)' in text
    )
    assert '```python\n1+1\n```\n\n```\n2\n```' in text


def test_readme_refuses_pictures_that_are_no_files(root, tmp_path, monkeypatch):
    import readme

    monkeypatch.chdir(root)
    path = toy_notebook(tmp_path)
    nb = json.loads(path.read_text())
    nb['cells'][-1]['outputs'][0]['data']['image/png'] = 'aGk='
    path.write_text(json.dumps(nb))
    with pytest.raises(SystemExit, match='nbs/images'):
        readme.readme(path)


def test_contributing_explains_exactly_the_declared_dependencies(root):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(root / 'settings.ini')
    cfg = cfg['DEFAULT']
    declared = {
        re.match(r'[\w-]+', r)[0]
        for r in (cfg['requirements'] + ' ' + cfg['dev_requirements']).split()
    }
    explained = [
        n
        for line in re.findall(
            r'^\| (`.*?) \|',
            (root / 'CONTRIBUTING.md').read_text().split('## Dependencies')[1],
            re.M,
        )
        for n in re.findall(r'`([\w-]+)`', line)
    ]
    assert sorted(explained) == sorted(declared)
