"""Kills, signals and full disks at any moment of a write: every file stays whole, and the resumed
run equals the unbroken one."""

import errno
import itertools
import os
import resource
import shutil
import signal

import pytest
from conftest import succeed
from safetensors.torch import load_file
from torch.utils.data import get_worker_info

from naslora.data.dataset import SegmentationDataset
from naslora.files import read_json, read_safetensors, read_torch
from naslora.records import read_rows
from naslora.results import LAST, Epoch
from reliability.conftest import SIGNALS, one_line, train

pytestmark = pytest.mark.usefixtures("tiny_sam")

WEIGHTS = "adapter/adapter_model.safetensors"
TIMES = ("seconds", "history_sha256")  # differ between equal runs


def at_write(write: int, moment: str, fault):
    """Makes a process suffer a fault at its n-th atomic write: at half of the file, before the file
    gets its name, or after that."""

    def prepare():
        count = 0
        fsync, replace = os.fsync, os.replace

        def counted_fsync(descriptor):
            nonlocal count
            count += 1
            if count == write and moment == "half":
                os.truncate(descriptor, os.fstat(descriptor).st_size // 2)
                fault()
            fsync(descriptor)
            if count == write and moment == "before":
                fault()

        def counted_replace(*arguments, **options):
            replace(*arguments, **options)
            if count == write and moment == "after":
                fault()

        os.fsync, os.replace = counted_fsync, counted_replace

    return prepare


def send(number: int):
    return lambda: os.kill(os.getpid(), number)


def full(*_):
    os.fsync = full  # the disk stays full
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def limited(size: int):
    """Makes writes beyond ``size`` bytes of any file fail with EFBIG."""

    def prepare():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    return prepare


def check_files(folder):
    """Reads every file that has its name: none is half-written."""
    read = {".json": read_json, ".safetensors": read_safetensors, ".pt": read_torch}
    for path in folder.rglob("[!.]*"):
        if path.is_file() and path.suffix in read:
            read[path.suffix](path)
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


def resume(world, output, unbroken):
    """The run after an interruption: its files are whole, and it ends as the unbroken one."""
    if output.exists():
        check_files(output)
    more = ("--resume",) if (output / "config.json").exists() else ()
    succeed(*train(world, output), *more)
    assert_same(output, unbroken)
    assert not list(output.rglob(".*.partial"))


def assert_ended(ended, status: int, line: str | None):
    """How a command ended that was interrupted, and the one line that it wrote unless killed."""
    assert ended.status == status, ended.err
    assert line is None or line in one_line(ended.err)


KILLED, FULL = (-signal.SIGKILL, None), (2, "No space left on device")
# The moment of a write, what happens then, the status, and the line.
FAULTS = {
    **{moment: (moment, send(signal.SIGKILL), *KILLED) for moment in ("half", "before", "after")},
    "full": ("before", full, *FULL),
}
SIZES = [0, 10, 100, 300, 1000, 3000, 10_000, 50_000, 100_000, 200_000]
# The fourth write of a run is last.pt, after config.json and the adapter's two files.
INTERRUPTIONS = {
    **{f"{name}, last.pt": (at_write(4, *fault[:2]), *fault[2:]) for name, fault in FAULTS.items()},
    **{
        word: (at_write(2, "after", send(number)), status, f"naslora: {word}; --resume continues")
        for number, status, word in SIGNALS
    },
    **{f"limit of {size}": (limited(size), 2, "File too large") for size in (30_000, *SIZES)},
}


@pytest.mark.parametrize(
    ("prepare", "status", "line"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.campaign] * (name[9:] in map(str, SIZES)))
        for name, case in INTERRUPTIONS.items()
    ],
)
def test_an_interrupted_run_goes_on(forked, clean_world, unbroken, tmp_path, prepare, status, line):
    """The limits are below the size of one of the run's files."""
    output = tmp_path / "run"
    assert_ended(forked(*train(clean_world, output), prepare=prepare).wait(), status, line)
    resume(clean_world, output, unbroken)


@pytest.mark.campaign
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_every_write_of_a_run(forked, clean_world, unbroken, tmp_path, name):
    moment, fault, status, line = FAULTS[name]
    faults = 0
    for write in range(1, 100):
        output = tmp_path / f"run{write}"
        ended = forked(*train(clean_world, output), prepare=at_write(write, moment, fault)).wait()
        if ended.status == 0:
            break
        assert_ended(ended, status, line)
        resume(clean_world, output, unbroken)
        shutil.rmtree(output)
        faults += 1
    assert faults >= 9
    print(f"faults while writing, {name}: {faults}")


@pytest.mark.campaign
@pytest.mark.parametrize("command", ["analyse", "merge", "predict", "export", "export2"])
def test_a_kill_in_every_write_of_other_commands(forked, clean_world, tmp_path, command):
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
        prepare = at_write(write, moment, send(signal.SIGKILL))
        ended = forked(*line, "--output", output, prepare=prepare).wait()
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.err
        kills += 1
        if command == "merge" and output.exists():
            assert (output / "merged.json").exists()
        if command != "predict" and moment != "after":
            assert not output.exists()
    if not output.exists():
        succeed(*line, "--output", output)
    assert kills >= 1
    print(f"kills of {command}: {kills}")


def in_workers(act):
    """Makes workers of a loader call ``act`` with their number before their n-th image, and n."""

    def prepare():
        load, loaded = SegmentationDataset.__getitem__, itertools.count(1)

        def watched(dataset, index):
            if worker := get_worker_info():
                act(worker.id, next(loaded))
            return load(dataset, index)

        SegmentationDataset.__getitem__ = watched

    return prepare


WORKER_DIES = {
    "at the first image": lambda worker, item: (worker, item) == (0, 1),
    "of the second, later": lambda worker, item: (worker, item) == (1, 2),
    "both": lambda worker, item: item == 2,
}


@pytest.mark.parametrize("when", WORKER_DIES)
def test_a_kill_of_a_loader_worker(forked, clean_world, tmp_path, when):
    def act(worker, item):
        if WORKER_DIES[when](worker, item):
            os.kill(os.getpid(), signal.SIGKILL)

    command = train(clean_world, tmp_path / "run")
    ended = forked(*command, "--workers", 2, "--batch-size", 1, prepare=in_workers(act)).wait()
    assert ended.status == 2
    line = one_line(ended.err)
    assert "DataLoader worker (pid" in line and "lower --workers, or free some memory" in line
