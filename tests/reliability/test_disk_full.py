"""A full disk: one line, nothing half-written, and the run goes on when there is space again."""

import errno
import os
import resource
import shutil
import signal
import subprocess

import pytest

from reliability.conftest import TRAIN, one_line
from reliability.test_kills import assert_same, check_files

pytestmark = pytest.mark.usefixtures("tiny_vit")


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


@pytest.mark.parametrize("size", [pytest.param(100, marks=pytest.mark.campaign), 30_000])
def test_a_file_that_does_not_fit(forked, naslora, clean_world, tmp_path, size):
    """``adapter/adapter_model.safetensors`` or ``last.pt`` does not fit."""
    output = tmp_path / "run"
    command = train(clean_world, output)
    refused(forked(*command, prepare=limited(size)).wait(), "File too large")
    resume(naslora, command, output, clean_world)


def test_a_small_file_system(forked, naslora, clean_world, tmpfs):
    output = tmpfs / "run"
    command = train(clean_world, output)
    line = refused(forked(*command).wait())
    assert "free some space and run the command again, with --resume" in line
    subprocess.run(["mount", "-o", "remount,size=500m", str(tmpfs)], check=True)
    resume(naslora, command, output, clean_world)


@pytest.mark.parametrize("command", ["merge", "onnx", "predict"])
def test_other_commands_on_a_small_file_system(forked, clean_world, tmpfs, command):
    full = tmpfs / "filler"
    full.write_bytes(bytes(390_000))
    line = {
        "merge": ("merge", clean_world / "run", "--output", tmpfs / "out"),
        "onnx": (
            *("export", clean_world / "center", "--part", "encoder"),  # half as long as the model
            *("--output", tmpfs / "out.onnx"),
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


@pytest.mark.campaign
@pytest.mark.parametrize("size", [0, 10, 300, 1000, 3000, 10_000, 50_000, 100_000, 200_000])
def test_files_of_any_size(forked, naslora, clean_world, tmp_path, size):
    output = tmp_path / "run"
    command = train(clean_world, output)
    ended = forked(*command, prepare=limited(size)).wait()
    if ended.status:
        refused(ended, "File too large")
    resume(naslora, command, output, clean_world)


def test_results_that_cannot_be_printed(forked):
    ended = forked("info", prepare=lambda: os.dup2(os.open("/dev/full", os.O_WRONLY), 1)).wait()
    assert ended.status == 2
    assert "cannot be printed: No space left on device" in one_line(ended.err)
