"The command in a forked process that `kill -9` ends at a write that the test chooses."

import os
import signal
import sys
import tempfile
import traceback
from itertools import count

from folder_files import assert_same_files, contents

KILLED = -signal.SIGKILL  # the exit code


def forked(words, place, moment=None) -> tuple:  # (exit code, what it printed)
    "Run the command in a folder; of file n it is killed before (2n) or after (2n+1)."
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if not pid:
            _run(words, place, moment, printed.fileno())
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        printed.seek(0)
        return code, printed.read().decode()


def _run(words, place, moment, printed):
    "The forked process, which does not return."
    from diffii.app.cli import main

    code = 1
    signal.alarm(300)  # a fork that hangs ends, and its test says so
    try:
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.stdout, sys.stderr = (open(n, 'w', buffering=1) for n in (1, 2))
        os.chdir(place)
        sys.argv = ['diffii', *map(str, words)]
        if moment is not None:
            _kill_at(moment)
        main()
        code = 0
    except SystemExit as e:
        code = e.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _kill_at(moment):
    "Every file takes its name by `os.replace`; end this process at one of them."
    numbers, replace = count(), os.replace

    def replace_or_die(*args, **kwargs):
        number = next(numbers)
        if moment == 2 * number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args, **kwargs)
        if moment == 2 * number + 1:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def done(words, place) -> str:  # what it printed
    "Run the command to its end."
    code, printed = forked(words, place)
    assert code == 0, printed
    return printed


def files_below(place) -> dict:  # name -> bytes
    "All files of a folder but the journals, whose lines come as processes wrote them."
    found = contents(place)
    return {name: data for name, data in found.items() if '/digests/' not in name}


def assert_same(place, other):
    "Two folders hold the same files with the same bytes."
    assert_same_files(files_below(place), files_below(other))
