"What lies in a folder, and links to somebody else's file, for tests that damage or stop."

from pathlib import Path


def contents(folder, but=()):
    "All files below a folder but those of some names: name -> bytes."
    folder = Path(folder)
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob('*'))}
    return {
        name: path.read_bytes()
        for name, path in found.items()
        if path.is_file() and path.name not in but
    }


def assert_same_files(one, other):
    "Two mappings of names to bytes are the same."
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


def link_to_keep(file):
    "Put a link to somebody's file where a file is, or would be written."
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    file.symlink_to(Path('outside', 'keep.txt').resolve())
