"""Make README.md from nbs/index.ipynb.

    python tools/readme.py            # write it
    python tools/readme.py --check    # exit 1, with the difference, where it is stale

nbdev's own processors decide what is shown; this file only writes it as Markdown, since
`nbdev_readme` would ask Quarto, which the package index does not carry.
"""

import difflib
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'^(```.*?^```[^\n]*$)', re.M | re.S)
# the start of a link or image that is relative
TARGET = re.compile(r'(\]\(|(?:src|href)=")(?![a-z][a-z0-9+.-]*:|[/#])', re.I)
DIRECTIVE = re.compile(r'#\|\s*([\w-]+)\s*:\s*(.*)')


def processed(nb):
    "`nb` as the documentation shows it, without links to the documentation's pages."
    from nbdev.processors import FilterDefaults, add_links

    class Shown(FilterDefaults):
        def procs(self):
            return super().procs().filter(lambda p: p is not add_links)

    Shown()(nb)
    return nb


def relative_to_root(markdown, folder):
    "Links that start from the notebook's folder, made to start from README.md's."
    parts = FENCE.split(markdown)
    return ''.join(
        part if part.startswith('```') else TARGET.sub(rf'\g<1>{folder}/', part)
        for part in parts
    )


def title_of(raw):
    "The notebook's title and purpose, which nbdev turns into front matter."
    import yaml

    front = yaml.safe_load(raw.strip().strip('-'))
    purpose = front.get('description')
    return f'# {front["title"]}' + (f'\n\n> {purpose}' if purpose else '')


def fenced(text, language=''):
    return f'```{language}\n{text.rstrip()}\n```'


def output_of(out, folder):
    "One output of a cell. Pictures must be files, which the documentation shows too."
    if out.output_type == 'error':
        raise SystemExit(f'index.ipynb: a cell failed ({out.ename}); run it again')
    if out.output_type == 'stream':
        return '' if out.name == 'stderr' else fenced(joined(out.text))
    if any(kind.startswith('image/') for kind in out.data):
        where = 'save it to nbs/images/ and show it from a Markdown cell'
        raise SystemExit(f'index.ipynb: a cell has a picture as its output; {where}')
    if 'text/markdown' in out.data:
        return relative_to_root(joined(out.data['text/markdown']), folder)
    return fenced(joined(out.data.get('text/plain', '')))


def joined(text):
    return text if isinstance(text, str) else ''.join(text)


def code_of(cell, folder):
    "A code cell and its outputs, as its directives ask."
    lines = cell.source.splitlines()
    asked = dict(m.groups() for line in lines if (m := DIRECTIVE.match(line)))
    off = {key for key, value in asked.items() if value.strip().lower() == 'false'}
    if 'include' in off:
        return ''
    source = '\n'.join(line for line in lines if not line.startswith('#|')).strip()
    parts = []
    if source and 'echo' not in off:
        parts.append(fenced(source, cell.metadata.get('language', 'python')))
    if 'output' not in off:
        parts += [output_of(out, folder) for out in cell.get('outputs', [])]
    return '\n\n'.join(filter(None, parts))


def readme(path):
    "The text of README.md for the notebook at `path`."
    from execnb.nbio import read_nb

    folder, parts = Path(path).parent.name, []
    for cell in processed(read_nb(path)).cells:
        if cell.cell_type == 'raw':
            parts.append(title_of(cell.source))
        elif cell.cell_type == 'markdown':
            parts.append(relative_to_root(cell.source, folder).strip())
        else:
            parts.append(code_of(cell, folder))
    return '\n\n'.join(p for p in parts if p) + '\n'


def main(check=False):
    os.chdir(ROOT)  # nbdev finds settings.ini from the working folder
    from nbdev.config import get_config

    cfg = get_config()
    new, target = readme(cfg.nbs_path / cfg.readme_nb), ROOT / 'README.md'
    if not check:
        target.write_text(new, encoding='utf-8')
        return
    old = target.read_text(encoding='utf-8') if target.exists() else ''
    lines = (text.splitlines(True) for text in (old, new))
    sys.stdout.writelines(difflib.unified_diff(*lines, 'README.md', 'nbs/index.ipynb'))
    if old != new:
        sys.exit('README.md is stale: run `python tools/readme.py` and commit it')


if __name__ == '__main__':
    main(check='--check' in sys.argv[1:])
