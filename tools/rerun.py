"""Run notebooks from top to bottom and keep their new outputs in them.

    python tools/rerun.py nbs/method            # all notebooks of a part
    python tools/rerun.py nbs/data/aviary.ipynb --slow

Cells that begin with `#| slow`, `#| gpu` or `#| notest` are passed over and keep
the outputs that they have; with `--slow` they run too, but for those of a GPU.
A notebook with a failing cell is left as it was.
"""

import argparse
import os
import re
import sys
import time
from pathlib import Path

os.environ.setdefault('GOMP_SPINCOUNT', '1000')
os.environ['TQDM_DISABLE'] = '1'  # a page keeps no progress bars
ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {'gpu', 'notest', 'eval'}


def passed_over(cell, slow):
    "Is this a cell that does not run here?"
    flags = set(re.findall(r'^#\|\s*(\w+)(?:: false)?\s*$', cell.source, re.M))
    return bool(flags & (SKIPPED if slow else SKIPPED | {'slow'}))


def rerun(path, slow=False):
    "Run the notebook at `path`; returns the error of the first cell that failed."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell

    nb = read_nb(path)
    os.chdir(path.parent)
    shell = CaptureShell(path.parent)
    shell.run_cell('import matplotlib; matplotlib.use("agg")')
    shell.run_cell('%matplotlib inline')
    for cell in nb.cells:
        if cell.cell_type != 'code' or passed_over(cell, slow):
            continue
        # warnings name folders of this machine
        found = shell.run(cell.source)
        cell.outputs = [out for out in found if out.get('name') != 'stderr']
        if shell.exc is not None:
            return f'{path}: {type(shell.exc).__name__}: {shell.exc}\n{cell.source}'
    write_nb(nb, path)
    return None


def main():
    parser = argparse.ArgumentParser(description='Run notebooks, keep their outputs.')
    parser.add_argument('paths', nargs='+', type=Path, help='notebooks or folders')
    parser.add_argument('--slow', action='store_true', help='run slow cells too')
    args = parser.parse_args()
    found = [p.rglob('*.ipynb') if p.is_dir() else [p] for p in args.paths]
    for path in sorted(p.resolve() for some in found for p in some):
        began = time.time()
        if error := rerun(path, args.slow):
            sys.exit(error)
        print(f'{path.relative_to(ROOT)}: {time.time() - began:.0f} s', flush=True)


if __name__ == '__main__':
    main()
