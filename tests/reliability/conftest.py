"""What the campaign shares: a small world of every file that naslora writes, forked commands."""

import faulthandler
import fcntl
import functools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TRAIN, succeed, tiny_models, write_checkpoint, write_data
from filelock import FileLock
from fresh_process import Result
from hypothesis import HealthCheck, given, settings, strategies
from hypothesis.strategies import SearchStrategy
from safetensors.torch import load_file

from naslora import UserError, cli, prediction  # noqa: F401, forks find imported what commands import
from naslora.report.figures import Drawing

# Seconds after which a forked command that hangs prints where, and ends.
LONGEST = 540
FORKS = multiprocessing.get_context("fork")  # whose processes coverage.py follows
SIGNALS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]


@pytest.fixture(scope="session")
def clean_world(tmp_path_factory):
    """A folder with data, a checkpoint, a finished run, and what its commands write.

    Tests only read it. Workers of pytest-xdist share it: the first that needs it writes it.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers
    world, whole = root / "world", root / "world.whole"
    with FileLock(root / "world.lock"):
        if not whole.exists():
            # The patches are undone before tests of other files run.
            with tiny_models():
                write_world(world)
            whole.touch()
    return world


def write_world(world: Path) -> None:
    """Writes the files of ``clean_world``."""
    write_data(world / "data", train=4, val=2, test=2)
    checkpoint = ("--checkpoint", write_checkpoint(world / "sam.safetensors"))
    torch.save(load_file(world / "sam.safetensors"), world / "sam.pth")
    train = ("train", "--data", world / "data", *TRAIN)
    export = ("export", world / "center", "--format")
    for command in (
        (*train, *checkpoint, "--output", world / "run"),
        (*train, "--method", "lora", "--output", world / "run-lora"),
        ("merge", world / "run", "--output", world / "merged"),
        ("merge", world / "run", "--mode", "center", "--output", world / "center"),
        (*export, "onnx", "--output", world / "a.onnx"),
        (*export, "torch-export", "--output", world / "a.pt2"),
        (*export, "safetensors", "--output", world / "a.safetensors"),
    ):
        succeed(*command)


@pytest.fixture
def world(clean_world, tmp_path):
    """A copy whose files are links: ``own`` makes one that can be spoilt. A world has 200 MB."""
    return shutil.copytree(clean_world, tmp_path / "world", copy_function=os.symlink)


def own(path: Path) -> Path:
    """Replaces a link in a ``world`` by the file."""
    content = path.read_bytes() if path.exists() else b""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def nothing_is_kept(tmp_path):
    """Removes a test's files, because runs are large."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)


class Forked:
    """``naslora`` in a fork of this process, which has imported everything already.

    Args:
        arguments: the command line.
        prepare: is called in the fork first.
    """

    def __init__(self, arguments: tuple, prepare: Callable[[], object] = lambda: None) -> None:
        # Pipes, because files may have no room. They hold a whole output, so nobody has to read.
        pipes = [os.pipe(), os.pipe()]
        for _, write in pipes:
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 1 << 20)
        words = [str(argument) for argument in arguments]
        self.process = FORKS.Process(target=self._run, args=(words, prepare, pipes))
        self.process.start()
        self.pid = self.process.pid
        self.out, self.err = (read for read, _ in pipes)
        for _, write in pipes:
            os.close(write)

    @staticmethod
    def _run(arguments: list[str], prepare: Callable[[], object], pipes: list) -> None:
        os.setsid()
        for number, (_, write) in enumerate(pipes, 1):
            os.dup2(write, number)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        sys.argv = ["naslora", *arguments]
        # Those of pytest collect what a user would see.
        sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        Drawing.svg = lambda drawing: "<svg></svg>"  # as in ``conftest.call``
        try:
            prepare()
            cli.main()
        finally:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)  # a test may have limited files
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """None while it runs, as of ``subprocess.Popen``."""
        return self.process.exitcode

    def wait(self) -> Result:
        """Waits until it ends."""
        self.process.join()
        return Result(self.process.exitcode, _all_of(self.out), _all_of(self.err))


def _all_of(pipe: int) -> str:
    """What a pipe holds. Workers of the command may still have its other end."""
    os.set_blocking(pipe, False)
    parts = []
    try:
        while part := os.read(pipe, 1 << 16):
            parts.append(part)
    except BlockingIOError:
        pass
    os.close(pipe)
    return b"".join(parts).decode()


@pytest.fixture
def forked(tiny_sam):
    """Starts a command in a fork."""
    return lambda *arguments, **options: Forked(arguments, **options)


def train(world, output):
    """Whose channels are drawn anew each epoch."""
    options = ("--checkpoint", world / "sam.safetensors", "--rank", 6, "--anneal-epochs", 1)
    options += ("--channel-selection", "resample", "--output", output)
    return ("train", "--data", world / "data", *TRAIN, *options)


@pytest.fixture(scope="module")
def unbroken(clean_world, tiny_sam, tmp_path_factory):
    """Nothing is there yet that ``--resume`` could continue."""
    output = tmp_path_factory.mktemp("runs") / "unbroken"
    succeed(*train(clean_world, output), "--resume")
    return output


PROGRAM = f"""
import sys
sys.path.insert(0, "{Path(__file__).parents[1]}")
from conftest import tiny_models
from naslora.cli import main

with tiny_models():
    main()
"""
"""``naslora`` with small models, in a process that is no fork."""


def fuzz(examples: int, check: Callable[..., None], **drawn: SearchStrategy) -> None:
    """Calls ``check`` with so many examples that Hypothesis draws. CI draws the same few each time.

    A ``UserError`` of one line is as good as a result.
    """

    @functools.wraps(check)
    def judged(**values) -> None:
        try:
            check(**values)
        except UserError as error:
            assert str(error) and "\n" not in str(error)

    free = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
    few = settings(max_examples=examples, derandomize=examples < 1000, **free)
    few(given(**drawn)(judged))()


def spoil(draw: Callable, value: dict | list, other: Callable) -> None:
    """Removes one part of nested containers, or replaces it by ``other`` of it, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(strategies.sampled_from(keys))
        inner = value[key]
        nested = isinstance(inner, dict | list) and len(inner) > 0
        if not nested or draw(strategies.integers(0, 9)) == 0:
            break
        value = inner
    if draw(strategies.integers(0, 3)) == 0:
        del value[key]
    else:
        value[key] = other(inner)


def one_line(err: str) -> str:
    """The single line of an error, which the standard error ends with."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("naslora: ")]
    lines = [line for line in lines if not line.startswith("naslora: warning")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    return lines[0]
