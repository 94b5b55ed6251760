"""Two processes, one output: the second is refused and told who the first is."""

import os
import subprocess
import sys

import pytest
from conftest import wait_for

from naslora.errors import UserError
from naslora.locks import locked
from reliability.conftest import TRAIN, one_line

pytestmark = pytest.mark.usefixtures("tiny_vit")

COMMANDS = {
    "demo": ("demo", "--epochs", 1),
    "train": ("train", "--data", "data", *TRAIN),
    "compare": ("compare", "--methods", "lora", "--data", "data", *TRAIN),
    "ablate": ("ablate", "rank", "--data", "data", *TRAIN),
    "analyse": ("analyse", "run"),
    "merge": ("merge", "run"),
    "predict": ("predict", "run", "data/images"),
    "export": ("export", "center"),
}


@pytest.fixture
def holder(tmp_path):
    """Starts a process that holds the lock of an output, and returns it."""
    started = []

    def hold(output):
        code = (
            "import sys, time, pathlib\n"
            "from naslora.locks import locked\n"
            "with locked(pathlib.Path(sys.argv[1]), folder=False):\n"
            "    print('held', flush=True)\n"
            "    time.sleep(600)\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_in_use_is_refused_by_name(naslora, holder, clean_world, tmp_path, command):
    output = tmp_path / ("out.onnx" if command == "export" else "out")
    process = holder(output)
    arguments = [
        clean_world / a if (clean_world / str(a)).exists() else a for a in COMMANDS[command]
    ]
    result = naslora(*arguments, "--output", output)
    assert result.status == 2
    line = one_line(result.err)
    assert f"{output} is in use by process {process.pid} on " in line
    assert not output.exists()


def test_a_dead_process_frees_its_output(naslora, holder, clean_world, tmp_path):
    output = tmp_path / "merged"
    process = holder(output)
    process.kill()
    process.wait()
    assert (tmp_path / ".merged.lock").exists()
    assert naslora("merge", clean_world / "run", "--output", output).status == 0
    assert not (tmp_path / ".merged.lock").exists()


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


def test_resuming_a_run_that_goes_on(forked, naslora, clean_world, tmp_path):
    arguments = ("train", "--data", clean_world / "data", *TRAIN, "--output", tmp_path / "run")
    run = forked(*arguments, "--epochs", 500)
    wait_for((tmp_path / "run/last.pt").exists, run)
    result = naslora(*arguments, "--epochs", 500, "--resume")
    run.kill()
    run.wait()
    assert result.status == 2 and f"in use by process {run.pid} on " in one_line(result.err)


def test_the_lock_itself(tmp_path):
    """It leaves nothing, can be taken twice by its process, and lies inside a read-only parent."""
    with locked(tmp_path / "a/b/out"), locked(tmp_path / "a/b/out"):
        assert (tmp_path / "a/b/.out.lock").exists()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a/b/out"):
        (tmp_path / "a/b/out").mkdir()
    assert [path.name for path in (tmp_path / "a/b").iterdir()] == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file/out"):
        pass
    with pytest.raises(UserError, match="file is a file"), locked(tmp_path / "file"):
        pass


def test_a_symbolic_link_is_the_same_folder(naslora, holder, clean_world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    process = holder(tmp_path / "out")
    result = naslora("merge", clean_world / "run", "--output", tmp_path / "link")
    assert f"process {process.pid}" in one_line(result.err)


def test_a_parent_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "out").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and real(path, mode))
    with locked(tmp_path / "out"):
        assert (tmp_path / "out/.naslora.lock").exists()
    assert not list((tmp_path / "out").iterdir())
