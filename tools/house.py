"""The house, drawn from the code: which part of the package imports which.

    python tools/house.py           # write the graph into CONTRIBUTING.md
    python tools/house.py --check   # exit 1 where the graph there is another

An arrow goes from a part to the part that builds on it. Arrows that follow from others
are left out.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ('base', 'data', 'method', 'run', 'evaluation', 'start', 'app')
GRAPH = re.compile(r'```mermaid\n.*?```', re.S)


def rooms(part: str) -> list:
    "The modules of a part, by name."
    return sorted(p.stem for p in (ROOT / 'diffii' / part).glob('[!_]*.py'))


def imported(path: Path) -> set:
    "The (part, room) pairs that a module imports."
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = (node.module or '').split('.')
        if node.level == 1:  # from .files import ...
            names = [path.parent.name, *names]
        elif node.level == 0 and names[0] == 'diffii':
            names = names[1:]
        elif node.level == 0:
            continue
        if not names or names[0] not in PARTS:
            continue
        if len(names) > 1:
            found.add((names[0], names[1]))
        else:  # from diffii.data import aviary
            found |= {(names[0], alias.name) for alias in node.names}
    return found


def part_imports() -> dict:
    "The parts that each part imports from, itself left out."
    return {
        part: {
            other
            for room in rooms(part)
            for other, _ in imported(ROOT / 'diffii' / part / f'{room}.py')
        }
        - {part}
        for part in PARTS
    }


def room_imports() -> dict:
    "The (part, room) pairs that each module imports."
    return {
        (part, room): imported(ROOT / 'diffii' / part / f'{room}.py')
        for part in PARTS
        for room in rooms(part)
    }


def arrows(imports: dict) -> list:
    "The imports between parts that do not follow from others."

    def reach(part):
        return imports[part].union(*map(reach, imports[part]))

    return [
        (below, part)
        for part in imports
        for below in PARTS
        if below in imports[part]
        and not any(below in reach(other) for other in imports[part])
    ]


def graph() -> str:
    "The Mermaid graph of the parts, with their rooms."
    lines = ['graph LR']
    for part in PARTS:
        names = ', '.join(rooms(part)).replace('_', ' ')
        lines.append(f'    {part}["<b>{part}</b><br>{names}"]')
    lines += [f'    {below} --> {part}' for below, part in arrows(part_imports())]
    return '```mermaid\n' + '\n'.join(lines) + '\n```'


def main():
    page = ROOT / 'CONTRIBUTING.md'
    old = page.read_text(encoding='utf-8')
    new = GRAPH.sub(lambda _: graph(), old, count=1)
    if '--check' not in sys.argv[1:]:
        page.write_text(new, encoding='utf-8')
    elif old != new or not GRAPH.search(old):
        sys.exit('CONTRIBUTING.md: the graph is stale; run `python tools/house.py`')


if __name__ == '__main__':
    main()
