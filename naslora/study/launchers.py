"""Where the runs of a study are made: here, one after another, or as jobs of Slurm or Ray.

submitit and Ray queue, start and watch the jobs. A job trains one run in its folder, which every
machine must see.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from naslora.errors import UserError, imported
from naslora.study.design import Launch
from naslora.study.measurement import run_and_measure
from naslora.study.plan import Outcome, Run

RETRIES = 3
"""How often a job that died is started again."""
POLL_SECONDS = 0.5
LONGEST_MINUTES = 24 * 60
"""Of a job of Slurm. submitit's own default is 5."""
Submit = Callable[..., Any]
"""Takes the arguments of ``run_and_measure``; returns what has done(), result() and cancel()."""


@contextlib.contextmanager
def jobs(launch: Launch, output: Path) -> Iterator[Submit]:
    """Starts jobs, one a run of the study in ``output``; one GPU each, if there are some.

    Raises:
        UserError: the library is not installed or finds no cluster, or an option is none.
    """
    given: dict[str, Any] = {}
    for text in itertools.chain(*launch.cluster):
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise UserError(f"--cluster takes NAME=VALUE, got {text!r}")
        given[name] = int(value) if value.isdecimal() else value
    with contextlib.ExitStack() as stack:
        try:
            yield _slurm(given, output) if launch.launcher == "slurm" else _ray(given, stack)
        except UserError:
            raise
        except (RuntimeError, TypeError, ConnectionError, NameError, ValueError) as error:
            raise UserError(f"--launcher {launch.launcher} cannot start jobs: {error}") from error


def _slurm(given: dict[str, Any], output: Path) -> Submit:
    (submitit,) = imported("slurm", "submitit")
    executor = submitit.AutoExecutor(output / "jobs", cluster=given.pop("cluster", "slurm"))
    default = {"gpus_per_node": int(torch.cuda.is_available()), "timeout_min": LONGEST_MINUTES}
    executor.update_parameters(**{**default, **given})
    return lambda *arguments: executor.submit(attempt, os.getcwd(), *arguments)


def _ray(given: dict[str, Any], stack: contextlib.ExitStack) -> Submit:
    (ray,) = imported("ray", "ray")
    if not ray.is_initialized():
        ray.init(**{"log_to_driver": False, "include_dashboard": False, **given})
        stack.callback(ray.shutdown)
    gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    # A process makes one run, so that its peak memory is the run's. Job starts lost ones again.
    remote = ray.remote(num_gpus=gpus, max_calls=1, max_retries=0)(attempt)
    return lambda *arguments: remote.remote(os.getcwd(), *arguments).future()


def attempt(place: str, *arguments: Any) -> Outcome:
    """What ``run_and_measure`` returns or raises, in a job that starts in any folder."""
    try:
        os.chdir(place)
        return run_and_measure(*arguments)
    except UserError as error:
        return error
    except Exception as error:  # whose class the other process may not know
        return RuntimeError(f"{type(error).__name__}: {error}")


@dataclass(eq=False)
class Job:
    """The job of a run."""

    run: Run
    submit: Submit
    arguments: Sequence[Any]
    starts: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Starts it, or starts it again."""
        self.starts += 1
        self.running = self.submit(*self.arguments)


def finished(running: list[Job]) -> tuple[Run, Outcome]:
    """Waits for the next job that ends, and takes it out of ``running``. Starts lost ones again."""
    while True:
        for job in [own for own in running if own.running.done()]:
            try:
                outcome = job.running.result()
            except Exception as error:  # the library's own: the process is gone
                if job.starts <= RETRIES:
                    job.start()
                    continue
                outcome = RuntimeError(f"its job died {job.starts} times: {error}")
            running.remove(job)
            return job.run, outcome
        time.sleep(POLL_SECONDS)
