"""Runs that several processes share: gradients in buckets, resuming on others, dead processes."""

import itertools
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from adapted_models import differing
from conftest import free_port, refusal, succeed, wait_for, write_data
from test_trainer import ALPHA_RATE, RATE, assert_same_training

from naslora.adapter.io.storage import trained_state
from naslora.files import read_safetensors
from naslora.records import from_json
from naslora.results import ADAPTER, CONFIG, LAST, Epoch
from naslora.training import step
from naslora.training.accelerator import TIMEOUT_VARIABLE
from naslora.training.trainer import Trainer
from reliability.conftest import PROGRAM, Forked, one_line
from reliability.test_kills import assert_same as assert_same_bits
from reliability.test_kills import check_files

pytestmark = pytest.mark.usefixtures("tiny_sam")

OPTIONS = shlex.split(
    f"--model vit_t --image-size 32 --num-classes 3 --search-start 1 --learning-rate {RATE} "
    f"--alpha-learning-rate {ALPHA_RATE} --workers 0 --ema 0.5"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Of 11 images the last batch gets one, so that a second process has no share of it."""
    folder = tmp_path_factory.mktemp("data") / "data"
    return write_data(folder, classes=3, train=11, val=3, test=2)


@pytest.fixture
def launch(tiny_sam, tmp_path):
    """Starts the processes of one command, as forks; ends those that still run after the test.

    ``stop_after`` is an epoch after which every process is interrupted. Each process works in its
    folder of ``folders``, and stores what it has trained below ``tmp_path``.
    """
    started = []

    def start(count, *arguments, bucket=step.BUCKET, stop_after=None, folders=(), **environment):
        port = free_port()
        save = Trainer._save

        def save_and_stop(trainer, record):
            save(trainer, record)
            rank = trainer.accelerator.process_index
            torch.save(trained_state(trainer.model), tmp_path / f"rank{rank}.pt")
            if trainer.epoch == stop_after:
                raise KeyboardInterrupt

        def prepare(rank):
            group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count}
            group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environ = {**(group if count > 1 else {}), **environment}
            os.environ.update({name: str(value) for name, value in environ.items()})
            step.BUCKET, Trainer._save = bucket, save_and_stop
            if folders:
                os.chdir(folders[rank])

        processes = [Forked(arguments, partial(prepare, rank)) for rank in range(count)]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


def finish(processes, status=0):
    ended = [process.wait() for process in processes]
    errors = [process.err for process in ended]
    assert [process.status for process in ended] == [status] * len(processes), errors
    return errors


def last_of(output):
    return torch.load(output / LAST)


def assert_same(*outputs):
    """Equal up to rounding: the processes' sums of gradients are taken in another order."""
    states = [last_of(output) for output in outputs]
    histories = [from_json(list[Epoch], state["history"], LAST) for state in states]
    assert_same_training(*(state["model"] for state in states), *histories)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """Three epochs of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    arguments = ("train", "--data", data, *OPTIONS, "--epochs", 3, "--output", output)
    succeed(*arguments)
    return output


# ---- Two processes -------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["linear", "paper"])
def test_two_processes_hold_the_same_and_train_as_one(launch, data, alone, tmp_path, preset):
    """Batch norms included, which the preset `paper` has."""
    run, options = tmp_path / "run", ("--epochs", 3, "--preset", preset)
    finish(launch(2, "train", "--data", data, *OPTIONS, *options, "--output", run))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    last = last_of(run)["model"]
    assert [k for k in last if not torch.equal(first[k], last[k])] == []
    # Batch norms count their batches, and a process may have no share of one.
    named = [k for k in last if not k.endswith("num_batches_tracked")]
    assert [k for k in named if not torch.equal(first[k], second[k])] == []
    if preset == "linear":
        assert_same(run, alone)
        kept = [read_safetensors(r / ADAPTER / "adapter_model.safetensors") for r in (run, alone)]
        assert_same_training(*kept, [], [])


@pytest.mark.parametrize("spoilt, reason", [(True, "val.csv row 2"), (False, "nowhere")])
def test_two_processes_refuse_bad_input_once(launch, clean_data, tmp_path, spoilt, reason):
    data = tmp_path / "nowhere"
    if spoilt:
        shutil.copytree(clean_data, data)
        (data / "images/val0.png").write_bytes(b"")
    command = ("train", "--data", data, *OPTIONS, "--output", tmp_path / "run")
    first, second = finish(launch(2, *command), status=2)
    assert reason in one_line(first) and second == ""
    assert not (tmp_path / "run").exists()


# ---- Buckets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket", [1, 10, 25, 10**6])
def test_gradients_travel_in_buckets(monkeypatch, bucket):
    """As if another process had the same ones."""
    sizes = []

    def reduce(flat, how):
        assert how == "sum" and flat.dtype == torch.float32
        sizes.append(flat.numel())
        return 2 * flat

    monkeypatch.setattr(step, "BUCKET", bucket)
    shapes = [(3, 4), (5,), (), (30,), (2, 2)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float32]
    pairs = zip(shapes, dtypes, strict=True)
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape, dtype in pairs]
    for i, parameter in enumerate(parameters[:-1]):  # the last has no gradient here
        parameter.grad = torch.full_like(parameter, i + 1)
    group = SimpleNamespace(parameters=parameters)
    accelerator = SimpleNamespace(num_processes=2, reduce=reduce)
    assert step.sum_over_processes([group], torch.tensor(1.5), accelerator) == 3.0
    assert max(sizes) <= max(bucket, 30) + 1
    assert sum(sizes) == sum(p.numel() for p in parameters) + len(sizes)
    for i, parameter in enumerate(parameters):
        expected = 0 if i == 4 else 2 * (i + 1)
        assert parameter.grad.dtype == parameter.dtype and (parameter.grad == expected).all()


@pytest.mark.campaign
def test_buckets_change_no_bit(launch, data, tmp_path):
    """A sum over two processes has one order, however it is cut."""
    for name, bucket in (("whole", 1 << 23), ("cut", 500)):
        arguments = ("train", "--data", data, *OPTIONS, "--epochs", 1, "--method", "full")
        finish(launch(2, *arguments, "--output", tmp_path / name, bucket=bucket))
    whole, cut = (last_of(tmp_path / name)["model"] for name in ("whole", "cut"))
    assert not differing(whole, cut)


# ---- Other numbers of processes ------------------------------------------------------------------


@pytest.mark.parametrize("first, then", [(2, 1), pytest.param(1, 2, marks=pytest.mark.campaign)])
def test_a_run_resumes_on_another_number_of_processes(launch, data, alone, tmp_path, first, then):
    arguments = ("train", "--data", data, *OPTIONS, "--epochs", 3, "--output", tmp_path / "run")
    finish(launch(first, *arguments, stop_after=1), status=130)
    assert last_of(tmp_path / "run")["epoch"] == 1
    finish(launch(then, *arguments, "--resume"))
    assert_same(tmp_path / "run", alone)


@pytest.mark.campaign
def test_two_agents_train_as_one(tiny_sam, data, alone, tmp_path):
    """Two launchers, as on two machines, that meet at a rendezvous on the loopback address."""
    endpoint = f"127.0.0.1:{free_port()}"
    agent = shlex.split(
        f"torch.distributed.run --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-id run "
        f"--rdzv-endpoint {endpoint} --local-addr 127.0.0.1"
    )
    arguments = ("train", "--data", data, *OPTIONS, "--epochs", 3, "--output", tmp_path / "run")
    script = tmp_path / "launch.py"
    script.write_text(PROGRAM)
    command = [sys.executable, "-m", *agent, script, *map(str, arguments)]
    streams = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    agents = [subprocess.Popen(command, **streams) for _ in range(2)]
    try:
        errors = [process.communicate()[1] for process in agents]
        assert [process.returncode for process in agents] == [0, 0], errors
    finally:
        for process in agents:
            process.kill()
    assert_same(tmp_path / "run", alone)


def test_processes_that_do_not_share_the_output(launch, data, tmp_path):
    """Two relative paths stand for the file systems of two machines."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    arguments = ("train", "--data", data, *OPTIONS, "--epochs", 3, "--output", "run")
    errors = finish(launch(2, *arguments, folders=folders), status=2)
    line = "the processes 1 do not see run/data.json; give an --output on a file system"
    assert line in errors[0]
    assert not (folders[0] / "run" / LAST).exists()


# ---- Dead processes ------------------------------------------------------------------------------


FAST = [(signal.SIGKILL, 0, LAST), (signal.SIGSTOP, 1, LAST)]
ENDINGS = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.campaign)
    for case in itertools.product((signal.SIGKILL, signal.SIGSTOP), (0, 1), (CONFIG, LAST))
]


@pytest.mark.parametrize("how, dead, when", ENDINGS)
def test_one_dead_process_ends_the_others(launch, data, tmp_path, dead, how, when):
    """A killed process shows before the time of a test is over, a hung one after its timeout."""
    arguments = ("train", "--data", data, *OPTIONS, "--epochs", 500, "--output", tmp_path / "run")
    timeout = 20 if how == signal.SIGSTOP else 600
    processes = launch(2, *arguments, **{TIMEOUT_VARIABLE: timeout})
    wait_for((tmp_path / "run" / when).exists, *processes)
    processes[dead].kill(how)
    alive = processes[1 - dead]
    status, _, text = alive.wait()
    assert status == 2, text
    lines = [line for line in text.splitlines() if line.startswith("naslora: error: ")]
    assert lines == [
        f"naslora: error: process {1 - dead} has lost another process of the run, which ended or "
        f"did not answer within {timeout} s; start all of them again with --resume"
    ]
    assert "Traceback" not in text


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "inf"])
def test_a_timeout_that_is_no_time(data, tmp_path, monkeypatch, value):
    monkeypatch.setenv(TIMEOUT_VARIABLE, value)
    line = refusal("train", "--data", data, *OPTIONS, "--output", tmp_path / "run")
    assert line.startswith(f"naslora: error: {TIMEOUT_VARIABLE}: expected ")
    assert line.count("\n") == 1


@pytest.mark.campaign
@pytest.mark.parametrize("count, runs", [(1, 4), (2, 1)])
def test_kills_at_random_moments(launch, data, tmp_path, count, runs):
    """Several kills a run, which then ends with the bits of an unbroken one."""
    command = ("train", "--data", data, *OPTIONS, "--epochs", 8)
    started = time.monotonic()
    finish(launch(count, *command, "--output", tmp_path / "whole"))
    seconds = time.monotonic() - started
    draw, kills = random.Random(0), 0
    for number in range(runs):
        run = tmp_path / f"run{number}"
        for _ in range(6):
            resume = ("--resume",) if (run / CONFIG).exists() else ()
            processes = launch(count, *command, "--output", run, *resume)
            time.sleep(draw.uniform(0.05, 0.25) * seconds)  # six of them make one run
            for process in processes:
                kills += process.poll() is None
                process.kill()
            for process in processes:
                process.wait()
            if run.exists():
                check_files(run)
        resume = ("--resume",) if (run / CONFIG).exists() else ()
        finish(launch(count, *command, "--output", run, *resume))
        assert_same_bits(run, tmp_path / "whole")
    assert kills
    print(f"kills of {count} processes: {kills}")
