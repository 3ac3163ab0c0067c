"README.md and CONTRIBUTING.md say what the notebooks and the settings say."

import json
import re
from configparser import ConfigParser

import pytest

import readme


def code_cell(source, output=None):
    outputs = [output] if output else []
    return dict(
        cell_type='code',
        id='a',
        metadata={},
        source=source,
        outputs=outputs,
        execution_count=None,
    )


def markdown_cell(source):
    return dict(cell_type='markdown', id='b', metadata={}, source=source)


PRINTED = dict(output_type='stream', name='stdout', text='made by an unseen cell\n')
RESULT = dict(
    output_type='execute_result',
    execution_count=1,
    metadata={},
    data={'text/plain': '2'},
)
LINKS = """[the chapter](base/images.ipynb) and ![a strip](images/strip.png) and
<img src="images/grid.png"> and [out](https://example.org) and [below](#below)

```
[as it is](typed.md)
```"""


@pytest.fixture
def notebook(tmp_path, root, monkeypatch):
    "Writes an index notebook of given cells; the working folder is the checkout's."
    monkeypatch.chdir(root)
    (tmp_path / 'nbs').mkdir()

    def write(cells):
        path = tmp_path / 'nbs' / 'index.ipynb'
        kernel = dict(name='python3', language='python', display_name='python3')
        nb = dict(cells=cells, metadata=dict(kernelspec=kernel))
        path.write_text(json.dumps(nb | dict(nbformat=4, nbformat_minor=5)))
        return path

    return write


def test_title_and_purpose_come_first(notebook):
    path = notebook([markdown_cell('# demo\n\n> What it is.')])
    assert readme.readme(path).startswith('# demo\n\n> What it is.')


def test_hidden_cells_are_not_shown(notebook):
    hidden = "#| hide\nsecret_setting = 'must not be seen'"
    path = notebook([markdown_cell('# demo'), code_cell(hidden)])
    assert 'secret_setting' not in readme.readme(path)


def test_a_cell_without_echo_shows_its_output_alone(notebook):
    source = "#| echo: false\nprint('made by an unseen cell')"
    text = readme.readme(
        notebook([markdown_cell('# demo'), code_cell(source, PRINTED)])
    )
    assert 'made by an unseen cell' in text
    assert 'print(' not in text


def test_code_and_its_result_are_shown(notebook):
    text = readme.readme(
        notebook([markdown_cell('# demo'), code_cell('1 + 1', RESULT)])
    )
    assert '```python\n1 + 1\n```\n\n```\n2\n```' in text


def test_relative_links_start_from_the_top_folder(notebook):
    text = readme.readme(notebook([markdown_cell('# demo'), markdown_cell(LINKS)]))
    assert '](nbs/base/images.ipynb)' in text
    assert '](nbs/images/strip.png)' in text
    assert 'src="nbs/images/grid.png"' in text
    for unchanged in ('](https://example.org)', '](#below)', '](typed.md)'):
        assert unchanged in text


def test_a_picture_that_is_no_file_is_refused(notebook):
    picture = RESULT | dict(data={'image/png': 'aGk='})
    path = notebook([markdown_cell('# demo'), code_cell('1 + 1', picture)])
    with pytest.raises(SystemExit, match='nbs/images'):
        readme.readme(path)


def test_readme_is_that_of_the_index(root, monkeypatch):
    monkeypatch.chdir(root)
    written = (root / 'README.md').read_text(encoding='utf-8')
    assert written == readme.readme(root / 'nbs' / 'index.ipynb')


def test_links_of_the_pages_at_the_top_lead_somewhere(root):
    for page in ('README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'):
        text = (root / page).read_text(encoding='utf-8')
        text = re.sub(r'```.*?```|`[^`]*`', '', text, flags=re.S)
        for link in re.findall(r'\]\(([^)#\s]+)', text):
            if not re.match(r'[a-z]+:', link):
                assert (root / link).exists(), f'{page}: {link}'


def test_contributing_explains_exactly_the_declared_dependencies(root):
    parser = ConfigParser(delimiters=['='])
    parser.read(root / 'settings.ini')
    cfg = parser['DEFAULT']
    requirements = cfg['requirements'].split() + cfg['dev_requirements'].split()
    declared = {re.match(r'[\w-]+', requirement)[0] for requirement in requirements}
    page = (root / 'CONTRIBUTING.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| (`.*?) \|', page.split('## Dependencies')[1], re.M)
    explained = [name for row in rows for name in re.findall(r'`([\w-]+)`', row)]
    assert sorted(explained) == sorted(declared)
