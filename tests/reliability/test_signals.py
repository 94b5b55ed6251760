"""SIGINT and SIGTERM: one line, an exit status, no process left, and a run that can go on."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import group_lives, wait_for
from torch.utils.data.dataloader import _BaseDataLoaderIter

from reliability.conftest import SIGNALS, one_line, train
from reliability.test_kills import assert_ended, at_write, in_workers, send

pytestmark = pytest.mark.usefixtures("tiny_sam")


@pytest.mark.parametrize("number, status, word", SIGNALS)
def test_workers_end_with_the_run(forked, clean_world, tmp_path, number, status, word):
    options = ("--workers", 2, "--epochs", 500)
    run = forked(*train(clean_world, tmp_path / "run"), *options)
    wait_for((tmp_path / "run/last.pt").exists, run)
    # Ctrl-C reaches every process of the terminal, and a scheduler's SIGTERM often the first alone.
    if number == signal.SIGINT:
        os.killpg(run.pid, number)
    else:
        run.kill(number)
    assert_ended(run.wait(), status, word)
    wait_for(lambda: not group_lives(run.pid))


ORPHAN = """
import multiprocessing, os, time
from naslora.training.evaluation import end_with_the_run

def work(run):
    while os.getppid() == run:
        time.sleep(0.01)
    end_with_the_run(0)
    time.sleep(600)

multiprocessing.get_context("fork").Process(target=work, args=(os.getpid(),)).start()
os._exit(0)
"""


def test_a_worker_that_begins_after_its_run_has_ended_ends_too():
    # The worker has the same standard output, which is read to its end.
    subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, check=True, timeout=120)


def at_the_first_step():
    """`timeout` sends SIGTERM to the first process, and then to all. The run waits for workers."""

    def slow_after_the_first(worker, item):
        if item > 1:
            time.sleep(0.3 if worker else 1)  # the run waits for the first worker first
            os.kill(os.getpid(), signal.SIGTERM)

    in_workers(slow_after_the_first)()
    torch.optim.AdamW.step = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)


def while_a_loader_starts_its_workers():
    """Its iterator is half built then, and its destructor raises AttributeError."""
    real = _BaseDataLoaderIter.__init__

    def init(self, loader):
        os.kill(os.getpid(), signal.SIGTERM)
        real(self, loader)

    _BaseDataLoaderIter.__init__ = init


@pytest.mark.parametrize("prepare", [at_the_first_step, while_a_loader_starts_its_workers])
def test_a_signal_while_there_are_workers(forked, clean_world, tmp_path, prepare):
    command = (*train(clean_world, tmp_path / "run"), "--workers", 2, "--batch-size", 1)
    line = "naslora: terminated; --resume continues the run"
    assert_ended(forked(*command, prepare=prepare).wait(), 143, line)


@pytest.mark.parametrize("number, status, word", SIGNALS)
def test_commands_that_cannot_resume(forked, clean_world, tmp_path, number, status, word):
    command = ("merge", clean_world / "run", "--output", tmp_path / "merged")
    ended = forked(*command, prepare=at_write(1, "half", send(number))).wait()
    assert_ended(ended, status, f"naslora: {word}")
    assert "--resume" not in ended.err
    assert not [path for path in tmp_path.iterdir() if "merged" in path.name]


@pytest.mark.parametrize("delay", [0.3, pytest.param(1.5, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("number, status, word", SIGNALS)
def test_a_signal_at_the_start(number, status, word, delay):
    """While torch and the other libraries are imported."""
    code = "import naslora.__main__ as start; print('started', flush=True); start.main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code, "info"], **pipes)
    assert process.stdout.readline() == "started\n"
    time.sleep(delay)
    process.send_signal(number)
    _, err = process.communicate()
    if process.returncode:  # else the machine is so fast that the command has ended
        assert process.returncode == status, err
        assert one_line(err) in ("naslora: interrupted", "naslora: terminated")


def test_a_second_signal_ends_at_once(forked, clean_world, tmp_path):
    def prepare():
        from naslora.training.trainer import Trainer

        def stubborn(self):
            while True:
                try:
                    (tmp_path / "trains").touch()
                    time.sleep(600)
                except KeyboardInterrupt:
                    (tmp_path / "first").touch()

        Trainer.run = stubborn

    run = forked(*train(clean_world, tmp_path / "run"), prepare=prepare)
    wait_for((tmp_path / "trains").exists, run)
    run.kill(signal.SIGTERM)
    wait_for((tmp_path / "first").exists, run)
    run.kill(signal.SIGTERM)
    assert run.wait().status == 143


def test_a_signal_during_a_fork_arrives_and_prints_nothing():
    script = """
import os, signal, time
from naslora.exits import Interrupted, signals

def fail():
    raise IndexError("half built")

os.register_at_fork(before=lambda: signal.raise_signal(signal.SIGINT))
os.register_at_fork(after_in_parent=fail, after_in_child=fail)
try:
    with signals():
        if os.fork() == 0:
            os._exit(0)
        time.sleep(60)
except Interrupted:
    print("interrupted")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("interrupted\n", "")
