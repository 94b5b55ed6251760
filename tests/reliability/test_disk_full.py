"""A full disk: one line, nothing half-written, and the run goes on when there is space again."""

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from naslora.__main__ import open_streams
from reliability.conftest import TRAIN, one_line
from reliability.test_kills import assert_same, check_files

pytestmark = pytest.mark.usefixtures("tiny_sam")


def full_at(write: int):
    """Makes a process's n-th atomic write, and those after it, fail as on a full disk."""

    def prepare():
        count = 0

        def fsync(descriptor):
            nonlocal count
            count += 1
            if count >= write:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.fsync = fsync

    return prepare


def limited(size: int):
    """Makes writes beyond ``size`` bytes of any file fail with EFBIG."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


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


def refused(ended, reason="No space left on device"):
    assert ended.status == 2, ended.err
    line = one_line(ended.err)
    assert reason in line and line.startswith("naslora: error: ")
    return line


def train(world, output):
    options = (*TRAIN, "--checkpoint", world / "sam.safetensors")
    return ("train", "--data", world / "data", *options, "--output", output)


def resume(naslora, command, output, world):
    check_files(output) if output.exists() else None
    assert not list(output.rglob(".*.partial"))
    more = ("--resume",) if (output / "config.json").exists() else ()
    result = naslora(*command, *more)
    assert result.status == 0, result.err
    assert_same(output, world / "run")


SIZES = [0, 10, 100, 300, 1000, 3000, 10_000, 50_000, 100_000, 200_000, 10**8]


@pytest.mark.parametrize(
    "size", [30_000, *(pytest.param(size, marks=pytest.mark.campaign) for size in SIZES)]
)
def test_a_file_that_does_not_fit(forked, naslora, clean_world, tmp_path, size):
    """One of the run's files is longer than ``size``, if it is not the last."""
    output = tmp_path / "run"
    command = train(clean_world, output)
    ended = forked(*command, prepare=limited(size)).wait()
    if size < SIZES[-1]:
        refused(ended, "File too large")
    resume(naslora, command, output, clean_world)


def test_a_small_file_system(forked, naslora, clean_world, tmpfs):
    output = tmpfs / "run"
    command = train(clean_world, output)
    line = refused(forked(*command).wait())
    assert "free some space and run the command again, with --resume" in line
    subprocess.run(["mount", "-o", "remount,size=500m", str(tmpfs)], check=True)
    resume(naslora, command, output, clean_world)


@pytest.mark.parametrize(
    "command",
    ["merge", "predict", "safetensors", pytest.param("onnx", marks=pytest.mark.campaign)],
)
def test_other_commands_on_a_small_file_system(forked, clean_world, tmpfs, command):
    full = tmpfs / "filler"
    full.write_bytes(bytes(390_000))
    line = {
        "merge": ("merge", clean_world / "run", "--output", tmpfs / "out"),
        "onnx": ("export", clean_world / "center", "--output", tmpfs / "out.onnx"),
        "safetensors": (
            *("export", clean_world / "center", "--format", "safetensors"),
            *("--output", tmpfs / "out.safetensors"),
        ),
        "predict": (
            *("predict", clean_world / "run", clean_world / "data/images"),
            *("--output", tmpfs / "out"),
        ),
    }[command]
    refused(forked(*line).wait())
    left = {path.relative_to(tmpfs) for path in tmpfs.rglob("*") if path.is_file()}
    whole = {path for path in left if path.parent.name == "out"}  # masks that did fit
    assert left - whole == {full.relative_to(tmpfs)}
    assert not whole or command == "predict"


@pytest.mark.campaign
def test_a_disk_that_is_full_at_every_write_of_a_run(forked, naslora, clean_world, tmp_path):
    places = 0
    for write in range(1, 100):
        output = tmp_path / f"run{write}"
        command = train(clean_world, output)
        ended = forked(*command, prepare=full_at(write)).wait()
        if ended.status == 0:
            break
        refused(ended)
        resume(naslora, command, output, clean_world)
        shutil.rmtree(output)
        places += 1
    assert places >= 9
    print(f"places where the disk was full: {places}")


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


@pytest.mark.campaign
def test_a_closed_output_of_the_command():
    command = [sys.executable, "-m", "naslora", "info"]
    line = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    result = subprocess.run(line, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 2
    assert "cannot be printed: Bad file descriptor" in one_line(result.stderr)
