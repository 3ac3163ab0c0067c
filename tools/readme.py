"""Make README.md from nbs/index.ipynb: nbdev's own processors decide what is shown, this file only writes it as Markdown (`nbdev_readme`
would ask Quarto, which the package index does not carry). `python tools/readme.py` writes it; with `--check` it compares, and exits 1 with
the difference if README.md is stale."""

import difflib, os, re, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'^(```.*?^```[^\n]*$)', re.M | re.S)
TARGET = re.compile(
    r'(\]\(|(?:src|href)=")(?![a-z][a-z0-9+.-]*:|[/#])', re.I
)  # the start of a relative link or image


def processed(nb):
    "`nb` as nbdev's documentation shows it, but without links to the documentation's own pages."
    from nbdev.processors import FilterDefaults, add_links

    class Shown(FilterDefaults):
        def procs(self):
            return super().procs().filter(lambda p: p is not add_links)

    Shown()(nb)
    return nb


def relative_to_root(markdown, folder):
    "Relative links and images, which start from the notebook's folder, made to start from the README's. Code blocks stay as they are."
    return ''.join(
        part if part.startswith('```') else TARGET.sub(rf'\g<1>{folder}/', part)
        for part in FENCE.split(markdown)
    )


def title_of(raw):
    "The notebook's title and purpose, which nbdev turns into front matter."
    import yaml

    front = yaml.safe_load(raw.strip().strip('-'))
    return f'# {front["title"]}' + (
        f'\n\n> {front["description"]}' if front.get('description') else ''
    )


def fenced(text, language=''):
    return f'```{language}\n{text.rstrip()}\n```'


def output_of(out):
    "One output of a cell. Pictures must be files, so that README.md and the documentation show the same one."
    text = lambda x: x if isinstance(x, str) else ''.join(x)
    if out.output_type == 'stream':
        return '' if out.name == 'stderr' else fenced(text(out.text))
    if out.output_type == 'error':
        raise SystemExit(
            f'index.ipynb holds a failed cell ({out.ename}: {out.evalue}); run it again'
        )
    if any(k.startswith('image/') for k in out.data):
        raise SystemExit(
            'index.ipynb: a cell has a picture as its output; save it to nbs/images/ and show it from a Markdown cell'
        )
    if 'text/markdown' in out.data:
        return text(out.data['text/markdown'])
    return fenced(text(out.data.get('text/plain', '')))


def code_of(cell):
    "A code cell and its outputs, as its Quarto directives ask."
    lines = cell.source.splitlines()
    asked = dict(
        re.match(r'#\|\s*([\w-]+)\s*:\s*(.*)', l).groups()
        for l in lines
        if re.match(r'#\|\s*[\w-]+\s*:', l)
    )
    source = '\n'.join(l for l in lines if not l.startswith('#|')).strip()
    off = lambda k: asked.get(k, '').strip().lower() == 'false'
    if off('include'):
        return ''
    shown = (
        []
        if off('echo') or not source
        else [fenced(source, cell.metadata.get('language', 'python'))]
    )
    return '\n\n'.join(
        shown
        + (
            []
            if off('output')
            else [t for t in map(output_of, cell.get('outputs', [])) if t]
        )
    )


def readme(path):
    "The text of README.md for the notebook at `path`."
    from execnb.nbio import read_nb

    folder, parts = Path(path).parent.name, []
    for c in processed(read_nb(path)).cells:
        if c.cell_type == 'raw':
            parts.append(title_of(c.source))
        elif c.cell_type == 'markdown':
            parts.append(relative_to_root(c.source, folder).strip())
        else:
            parts.append(code_of(c))
    return '\n\n'.join(p for p in parts if p) + '\n'


def main():
    os.chdir(ROOT)  # nbdev finds settings.ini from the working folder
    from nbdev.config import get_config

    cfg = get_config()
    new, target = readme(cfg.nbs_path / cfg.readme_nb), ROOT / 'README.md'
    if sys.argv[1:] != ['--check']:
        target.write_text(new, encoding='utf-8')
    else:
        old = target.read_text(encoding='utf-8') if target.exists() else ''
        sys.stdout.writelines(
            difflib.unified_diff(
                old.splitlines(True),
                new.splitlines(True),
                'README.md',
                'from nbs/index.ipynb',
            )
        )
        if old != new:
            sys.exit('README.md is stale: run `python tools/readme.py` and commit it')


if __name__ == '__main__':
    main()
