"""Make the documentation with Quarto, and leave README.md as it is.

    python tools/docs.py

`nbdev_docs` alone would also write README.md where it is older than nbs/index.ipynb, with
links that start from `nbs/`. Here README.md is written first, by `tools/readme.py`, so
that it is the newer one and nbdev passes it over.
"""

import os
import subprocess
import sys
from pathlib import Path

import readme

ROOT = Path(__file__).resolve().parent.parent


def main():
    os.chdir(ROOT)
    readme.main()
    (ROOT / 'README.md').touch()
    sys.exit(subprocess.run(['nbdev_docs', '--n_workers', '2']).returncode)


if __name__ == '__main__':
    main()
