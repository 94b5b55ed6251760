"""Programs in processes that have imported nothing but torch, without importing torch each time."""

import atexit
import functools
import json
import os
import subprocess
import sys
from typing import NamedTuple

# Forks for every request on a line: a fork of this process has torch and nothing else.
SERVER = """
import json, os, sys, tempfile, traceback, torch

def run(program, environment):
    os.environ.clear()
    os.environ.update(environment)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            status = run(*json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        written = []
        for file in (out, err):
            file.seek(0)
            written.append(file.read().decode())
    print(json.dumps([status, *written]), flush=True)
"""


class Result(NamedTuple):
    """What a program ended with and wrote."""

    status: int
    out: str
    err: str


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    atexit.register(server.communicate)  # ends it
    return server


def run_fresh(program: str, **environment: str | None) -> Result:
    """Runs a program in a process of its own; None removes a variable of the environment."""
    changed = {**os.environ, **environment}
    kept = {name: value for name, value in changed.items() if value is not None}
    server = _server()
    server.stdin.write(json.dumps([program, kept]) + "\n")
    server.stdin.flush()
    return Result(*json.loads(server.stdout.readline()))
