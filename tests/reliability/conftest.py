"""What the campaign shares: a small world of every file that naslora writes, forked commands."""

import os
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from naslora import cli
from naslora.sam.segmentation import SamForSegmentation

TRAIN = shlex.split("--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0")


@pytest.fixture(scope="session")
def tiny_world_vit():
    """``tiny_vit`` for fixtures of the session."""
    from conftest import TINY

    from naslora.sam import encoders

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.VITS, "vit_t", TINY)
        yield TINY


@pytest.fixture(scope="session")
def clean_world(naslora, make_data, tiny_world_vit, tmp_path_factory):
    """A folder with data, a checkpoint, a finished run, and what its commands write."""
    world = tmp_path_factory.mktemp("world")
    make_data(world / "data", train=4, val=2, test=2)
    torch.manual_seed(0)
    state = SamForSegmentation("vit_t", 32).state_dict()
    head = {"mask_decoder.iou_prediction_head.layers.0.weight": torch.zeros(4, 4)}
    save_file({**state, **head}, world / "sam.safetensors")
    torch.save(state, world / "sam.pth")
    train = ("train", "--data", world / "data", *TRAIN)
    checkpoint = ("--checkpoint", world / "sam.safetensors")
    for command in (
        (*train, *checkpoint, "--output", world / "run"),
        (*train, "--method", "lora", "--output", world / "run-lora"),
        ("merge", world / "run", "--output", world / "merged"),
        ("merge", world / "run", "--mode", "center", "--output", world / "center"),
        ("export", world / "center", "--output", world / "a.onnx"),
        ("export", world / "center", "--format", "torch-export", "--output", world / "a.pt2"),
        (
            "export",
            world / "center",
            "--format",
            "safetensors",
            "--output",
            world / "a.safetensors",
        ),
    ):
        result = naslora(*command)
        assert result.status == 0, result.err
    return world


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


@dataclass
class Ended:
    """How a forked command ended."""

    status: int
    """The exit status; -n if signal n killed it."""
    out: str
    err: str


class Forked:
    """``naslora`` in a fork of this process, which has imported everything already.

    Args:
        folder: for the files of its standard output and error.
        arguments: the command line.
        prepare: is called in the fork first.
    """

    def __init__(
        self, folder: Path, arguments: tuple, prepare: Callable[[], object] = lambda: None
    ) -> None:
        self.out, self.err = folder / ".stdout", folder / ".stderr"
        self.pid = os.fork()
        if self.pid == 0:
            self._run([str(argument) for argument in arguments], prepare)

    def _run(self, arguments: list[str], prepare: Callable[[], object]) -> None:
        status: object = 1
        try:
            os.setsid()
            for number, path in ((1, self.out), (2, self.err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
            sys.argv = ["naslora", *arguments]
            prepare()
            cli.main()
            status = 0
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(status if isinstance(status, int) else 1)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)

    def running(self) -> bool:
        """Whether it runs; does not reap it."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> Ended:
        """Waits until it ends."""
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, self.out.read_text(), self.err.read_text())


@pytest.fixture
def forked(tmp_path, tiny_vit):
    """Starts a command in a fork."""
    made: list[Path] = []

    def start(*arguments, prepare=lambda: None):
        made.append(tmp_path / f".forked{len(made)}")
        made[-1].mkdir()
        return Forked(made[-1], arguments, prepare)

    return start


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    """Waits until a condition holds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)


def one_line(err: str) -> str:
    """The single line of an error, which the standard error ends with."""
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("naslora: ")]
    lines = [line for line in lines if not line.startswith("naslora: warning")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), err
    return lines[0]
