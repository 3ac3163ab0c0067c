"`python -m diffii` is the `diffii` command."
from .app.cli import main

if __name__ == '__main__':
    main()
