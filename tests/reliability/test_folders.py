"""Two processes, one output: the second is refused and told who the first is."""

import os
import subprocess
import time

import pytest
from conftest import error_of, refusal, succeed

from naslora.files import LOCK
from naslora.locks import locked
from reliability.conftest import FORKS, TRAIN, one_line

pytestmark = pytest.mark.usefixtures("tiny_sam")

COMMANDS = {
    "demo": ("demo", "--epochs", 1),
    "train": ("train", "--data", "data", *TRAIN),
    "resume": ("train", "--data", "data", *TRAIN, "--resume"),
    "compare": ("compare", "--methods", "lora", "--data", "data", *TRAIN),
    "ablate": ("ablate", "rank", "--data", "data", *TRAIN),
    "analyse": ("analyse", "run"),
    "merge": ("merge", "run"),
    "predict": ("predict", "run", "data/images"),
    "export": ("export", "center"),
}


@pytest.fixture
def holder():
    """Starts a process that holds the lock of an output."""
    started = []

    def hold(output, folder):
        held = FORKS.Event()

        def keep():
            with locked(output, folder):
                held.set()
                time.sleep(600)

        started.append(FORKS.Process(target=keep, daemon=True))
        started[-1].start()
        held.wait()
        return started[-1]

    yield hold
    for process in started:
        end(process)


def take(output, folder=True):
    with locked(output, folder):
        pass


def end(process):
    process.kill()
    process.join()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_in_use_is_refused_by_name(holder, clean_world, tmp_path, command):
    output = tmp_path / ("out.onnx" if command == "export" else "out")
    pid = holder(output, folder=command not in ("analyse", "merge", "export")).pid
    given = ((a, clean_world / str(a)) for a in COMMANDS[command])
    arguments = [path if path.exists() else argument for argument, path in given]
    line = one_line(refusal(*arguments, "--output", output))
    assert f"{output} is in use by process {pid} on " in line
    assert not output.exists() or not [path for path in output.iterdir() if path.name != LOCK]


def test_a_dead_process_frees_its_output(holder, clean_world, tmp_path):
    output, lock = tmp_path / "merged", tmp_path / ".merged.naslora.lock"
    end(holder(output, folder=False))
    assert lock.exists()
    succeed("merge", clean_world / "run", "--output", output)
    assert not lock.exists()


def test_two_runs_that_start_together(forked, clean_world, tmp_path):
    arguments = ("train", "--data", clean_world / "data", *TRAIN, "--output", tmp_path / "run")
    runs = [forked(*arguments) for _ in range(2)]
    ends = {run.pid: run.wait() for run in runs}
    (first,) = (pid for pid, end in ends.items() if end.status == 0)
    (second,) = (pid for pid in ends if pid != first)
    assert ends[second].status == 2
    # The second may have come when the first was done: it then sees a finished run.
    line = one_line(ends[second].err)
    assert f"in use by process {first} on " in line or "exists and is not empty" in line


def test_the_lock_itself(tmp_path):
    """It leaves nothing, and can be taken twice by its process."""
    with locked(tmp_path / "a/b/out"), locked(tmp_path / "a/b/out"):
        assert (tmp_path / "a/b/out" / LOCK).exists()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a/b/out", folder=False):
        (tmp_path / "a/b/out").mkdir()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["out"]
    (tmp_path / "file").touch()
    assert "cannot be written" in error_of(take, tmp_path / "file/out")
    assert "file is a file" in error_of(take, tmp_path / "file")


PLANTED = {
    "a link": lambda path, precious: path.symlink_to(precious),
    "a link to nothing": lambda path, precious: path.symlink_to(path.parent / "new"),
    "a hard link": lambda path, precious: path.hardlink_to(precious),
    "a file": lambda path, precious: path.write_text("precious"),
    "a pipe": lambda path, precious: os.mkfifo(path),
    "a folder": lambda path, precious: path.mkdir(),
}


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("what", PLANTED)
def test_what_is_no_lock_is_not_touched(tmp_path, what, folder):
    precious, output = tmp_path / "precious", tmp_path / "d/out"
    precious.write_text("precious")
    output.mkdir(parents=True)
    PLANTED[what](output / LOCK if folder else output.with_name(".out" + LOCK), precious)
    before = states(tmp_path)
    assert "is no lock of naslora" in error_of(take, output, folder)
    assert states(tmp_path) == before and precious.read_text() == "precious"


def states(folder):
    return {path: (path.lstat().st_mode, path.lstat().st_size) for path in folder.rglob("*")}


@pytest.mark.parametrize("way", ["link", "mount"])
def test_another_way_to_a_folder_has_the_same_lock(holder, tmp_path, way):
    output, other = tmp_path / "out", tmp_path / "other"
    output.mkdir()
    if way == "link":
        other.symlink_to("out")
    else:
        other.mkdir()
        if subprocess.run(["mount", "--bind", output, other], capture_output=True).returncode:
            pytest.skip("this user may not mount a folder")
    try:
        process = holder(output, folder=True)
        assert f"in use by process {process.pid} " in error_of(take, other)
        end(process)
        with locked(output):
            take(other)
        assert not list(output.iterdir())
    finally:
        if way == "mount":
            subprocess.run(["umount", other], check=True)
