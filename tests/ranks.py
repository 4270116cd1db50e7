"""Calls a function of a test file on two ranks: one start of the launcher for all that the function checks or runs."""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def on_two_ranks(function, *arguments: str) -> None:
    """function(*arguments) on each of two ranks; fails with what they said where one of them raises."""
    import helpers

    done = helpers.launch("tests/ranks.py", 2, function.__module__, function.__name__, json.dumps(arguments))
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT)]  # this file's own folder is there
    module, name, arguments = [part for part in sys.argv[1:] if not part.startswith("--local_rank")]
    status = 1
    try:
        getattr(importlib.import_module(module), name)(*json.loads(arguments))
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without the interpreter's teardown, in which Gloo's threads may abort
