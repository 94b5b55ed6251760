"""SIGKILL at any moment: every file stays whole, and the resumed run equals the unbroken one."""

import itertools
import os
import random
import shutil
import signal
import time

import pytest
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from naslora.data.dataset import SegmentationDataset
from naslora.files import read_json, read_safetensors, read_torch
from naslora.records import read_rows
from naslora.results import LAST, Epoch
from reliability.conftest import TRAIN, one_line

pytestmark = pytest.mark.usefixtures("tiny_sam")

WEIGHTS = "adapter/adapter_model.safetensors"
TIMES = ("seconds", "history_sha256")  # differ between equal runs


def kill_at(write: int, moment: str):
    """Makes a process kill itself at its n-th atomic write: at half of the file, before the file
    gets its name, or after that."""

    def prepare():
        count = 0
        fsync, replace = os.fsync, os.replace

        def die():
            os.kill(os.getpid(), signal.SIGKILL)

        def counted_fsync(descriptor):
            nonlocal count
            count += 1
            if count == write and moment == "half":
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
                die()
            fsync(descriptor)
            if count == write and moment == "before":
                die()

        def counted_replace(*arguments, **options):
            replace(*arguments, **options)
            if count == write and moment == "after":
                die()

        os.fsync, os.replace = counted_fsync, counted_replace

    return prepare


def check_files(folder):
    """Reads every file that has its name: none is half-written."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".json":
            read_json(path)
        elif path.suffix == ".safetensors":
            read_safetensors(path)
        elif path.suffix == ".pt":
            read_torch(path)
        elif path.name == "history.csv":
            read_rows(path, Epoch)


def result_of(run):
    """What equal runs have in common: the weights, the last checkpoint's, scores."""
    metrics = {k: v for k, v in read_json(run / "metrics.json").items() if k not in TIMES}
    return load_file(run / WEIGHTS), read_torch(run / LAST)["model"], metrics


def assert_same(run, other):
    weights, checkpoint, metrics = result_of(run)
    other_weights, other_checkpoint, other_metrics = result_of(other)
    for ours, theirs in ((weights, other_weights), (checkpoint, other_checkpoint)):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in ours)
    assert metrics == other_metrics


def arguments(world, output):
    return ("train", "--data", world / "data", *TRAIN, "--checkpoint", world / "sam.safetensors"), (
        "--output",
        output,
    )


def kill_and_resume(forked, naslora, world, output, prepare) -> bool:
    """Kills a run and resumes it; returns False if the run ended before the kill."""
    command, out = arguments(world, output)
    ended = forked(*command, *out, prepare=prepare).wait()
    if ended.status == 0:
        return False
    assert ended.status == -signal.SIGKILL, ended.err
    if output.exists():
        check_files(output)
    resume = ("--resume",) if (output / "config.json").exists() else ()
    result = naslora(*command, *out, *resume)
    assert result.status == 0, result.err
    assert_same(output, world / "run")
    assert not list(output.rglob(".*.partial"))
    return True


@pytest.mark.parametrize("moment", ["half", "before", "after"])
def test_a_kill_while_the_checkpoint_is_written(forked, naslora, clean_world, tmp_path, moment):
    # config.json, the adapter's two files, last.pt
    assert kill_and_resume(forked, naslora, clean_world, tmp_path / "run", kill_at(4, moment))


@pytest.mark.campaign
@pytest.mark.parametrize("moment", ["half", "before", "after"])
def test_a_kill_in_every_write_of_a_run(forked, naslora, clean_world, tmp_path, moment):
    kills = 0
    for write in range(1, 100):
        run = tmp_path / f"run{write}"
        if not kill_and_resume(forked, naslora, clean_world, run, kill_at(write, moment)):
            break
        shutil.rmtree(run)
        kills += 1
    assert kills >= 9
    print(f"kills while writing, {moment}: {kills}")


@pytest.mark.campaign
def test_kills_at_random_moments(forked, naslora, clean_world, tmp_path):
    """Several kills a run, until it ends; channels are drawn anew each epoch."""
    options = ("--channel-selection", "resample", "--epochs", 6)
    command = ("train", "--data", clean_world / "data", *TRAIN, *options)
    started = time.monotonic()
    assert naslora(*command, "--output", tmp_path / "whole").status == 0
    seconds = time.monotonic() - started
    draw, kills = random.Random(0), 0
    for number in range(10):
        run = tmp_path / f"run{number}"
        for _ in range(3):
            resume = ("--resume",) if (run / "config.json").exists() else ()
            process = forked(*command, "--output", run, *resume)
            time.sleep(draw.uniform(0, 0.7 * seconds))
            kills += process.poll() is None
            process.kill()
            process.wait()
            if run.exists():
                check_files(run)
        resume = ("--resume",) if (run / "config.json").exists() else ()
        result = naslora(*command, "--output", run, *resume)
        assert result.status == 0, result.err
        assert_same(run, tmp_path / "whole")
        shutil.rmtree(run)
    assert kills
    print(f"kills at random moments: {kills}")


@pytest.mark.campaign
@pytest.mark.parametrize("command", ["analyse", "merge", "predict", "export", "export2"])
def test_a_kill_in_every_write_of_other_commands(forked, naslora, clean_world, tmp_path, command):
    output = tmp_path / {"export": "a.onnx", "export2": "a.pt2"}.get(command, "out")
    line = {
        "analyse": ("analyse", clean_world / "run"),
        "merge": ("merge", clean_world / "run"),
        "predict": ("predict", clean_world / "run", clean_world / "data/images", "--overwrite"),
        "export": ("export", clean_world / "center"),
        "export2": ("export", clean_world / "center", "--format", "torch-export"),
    }[command]
    kills = 0
    for write in range(1, 5):
        moment = ("half", "before", "after")[write % 3]
        ended = forked(*line, "--output", output, prepare=kill_at(write, moment)).wait()
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.err
        kills += 1
        if command == "merge" and output.exists():
            assert (output / "merged.json").exists()
        if command != "predict" and moment != "after":
            assert not output.exists()
    if not output.exists():
        assert naslora(*line, "--output", output).status == 0
    assert kills >= 1
    print(f"kills of {command}: {kills}")


WORKER_DIES = {
    "at the first image": lambda worker, item: (worker, item) == (0, 1),
    "of the second, later": lambda worker, item: (worker, item) == (1, 2),
    "both": lambda worker, item: item == 2,
}


@pytest.mark.parametrize("when", WORKER_DIES)
def test_a_kill_of_a_loader_worker(forked, clean_world, tmp_path, when):
    def prepare():
        load, loaded = SegmentationDataset.__getitem__, itertools.count(1)

        def deadly(dataset, index):
            worker = get_worker_info()
            if worker and WORKER_DIES[when](worker.id, next(loaded)):
                os.kill(os.getpid(), signal.SIGKILL)
            return load(dataset, index)

        SegmentationDataset.__getitem__ = deadly

    command, out = arguments(clean_world, tmp_path / "run")
    ended = forked(*command, *out, "--workers", 2, "--batch-size", 1, prepare=prepare).wait()
    assert ended.status == 2
    line = one_line(ended.err)
    assert "DataLoader worker (pid" in line and "lower --workers, or free some memory" in line
