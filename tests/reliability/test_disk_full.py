"""A full disk: one line, nothing half-written, and the run goes on when there is space again."""

import io
import os
import subprocess
import sys

import pytest

from naslora.__main__ import open_streams
from reliability.conftest import one_line, train
from reliability.test_kills import FULL, assert_ended, resume

pytestmark = pytest.mark.usefixtures("tiny_sam")


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of 400 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_small_file_system(forked, clean_world, unbroken, tmpfs):
    output = tmpfs / "run"
    ended = forked(*train(clean_world, output)).wait()
    assert_ended(ended, *FULL)
    assert "free some space and run the command again, with --resume" in ended.err
    subprocess.run(["mount", "-o", "remount,size=500m", str(tmpfs)], check=True)
    resume(clean_world, output, unbroken)


LONG = pytest.param("out.onnx", marks=pytest.mark.campaign)


@pytest.mark.parametrize("command", ["merge", "predict", "out.safetensors", LONG])
def test_other_commands_on_a_small_file_system(forked, clean_world, tmpfs, command):
    full, output = tmpfs / "filler", tmpfs / (command if "." in command else "out")
    full.write_bytes(bytes(390_000))
    line = {
        "merge": ("merge", clean_world / "run"),
        "out.onnx": ("export", clean_world / "center"),
        "out.safetensors": ("export", clean_world / "center", "--format", "safetensors"),
        "predict": ("predict", clean_world / "run", clean_world / "data/images"),
    }[command]
    assert_ended(forked(*line, "--output", output).wait(), *FULL)
    left = {path.relative_to(tmpfs) for path in tmpfs.rglob("*") if path.is_file()}
    whole = {path for path in left if path.parent.name == "out"}  # masks that did fit
    assert left - whole == {full.relative_to(tmpfs)}
    assert not whole or command == "predict"


LOST = "naslora: error: the results cannot be printed: "
MERGE = ("merge", "nowhere", "--output", "out")
STREAMS = {  # arguments, what the standard streams are (None: closed), status, the line
    "full output": (("info",), {1: "/dev/full"}, 2, LOST + "No space left on device"),
    "closed output": (("info",), {1: None}, 2, LOST + "Bad file descriptor"),
    "closed output, help": (("--help",), {1: None}, 2, LOST + "Bad file descriptor"),
    "closed output, an error": (MERGE, {1: None}, 2, "nowhere is no run"),
    "full errors": (MERGE, {2: "/dev/full"}, 2, None),
    "closed errors": (MERGE, {2: None}, 2, None),
    "all closed": (("info",), {0: None, 1: None, 2: None}, 2, None),
    "closed input": (("info",), {1: "/dev/null", 0: None}, 0, None),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_cannot_be_written(forked, tmp_path, case):
    arguments, streams, status, line = STREAMS[case]

    def prepare():
        os.chdir(tmp_path)
        for number, target in streams.items():
            os.close(number)
            assert target is None or os.open(target, os.O_WRONLY) == number
        sys.stdout, sys.stderr = (
            None
            if streams.get(number, "") is None
            else io.TextIOWrapper(io.FileIO(number, "w", closefd=False))
            for number in (1, 2)
        )
        open_streams()

    ended = forked(*arguments, prepare=prepare).wait()
    assert ended.status == status and ended.out == ""
    if line is not None:
        assert line in one_line(ended.err)
    elif status:
        assert ended.err == ""
