"""The processes, device and precision of a run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, gather_object
from msgspec import Meta

from naslora.errors import LostProcessError, UserError
from naslora.settings import checked
from naslora.training.run_config import TrainConfig

TIMEOUT_VARIABLE = "NASLORA_PROCESS_TIMEOUT"
"""Environment variable: the seconds that a process waits for the others.

They wait while the main process reads the data and writes the report, so it must not be too short.
"""
DEFAULT_TIMEOUT = 1800.0
Result = TypeVar("Result")


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Joins the processes of a run, and sets its device and precision.

    Raises:
        UserError: fp16 without a GPU, or Accelerate joins fewer processes than were launched.
        LostProcessError: a process does not join in time.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed precision fp16 needs a GPU; use bf16 or no on a CPU")
    # Without cpu=True Accelerate does not join processes that have no GPU.
    on_cpu = not torch.accelerator.is_available()
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=_timeout()))
    with lost_processes():
        accelerator = Accelerator(
            mixed_precision=config.mixed_precision, cpu=on_cpu, kwargs_handlers=[group]
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but Accelerate joins {accelerator.num_processes} "
            f"on {accelerator.device.type}; launch one"
        )
    return accelerator


@contextmanager
def in_float32(accelerator: Accelerator) -> Iterator[None]:
    """Turns mixed precision off. Merged weights would be rounded to 16 bits where the adapter's
    product is not, so models before and after a merge are compared in float32."""
    before = accelerator.autocast_handler
    accelerator.autocast_handler = AutocastKwargs(enabled=False)
    try:
        yield
    finally:
        accelerator.autocast_handler = before


def _timeout() -> float:
    given = os.environ.get(TIMEOUT_VARIABLE) or DEFAULT_TIMEOUT
    return checked(TIMEOUT_VARIABLE, given, Annotated[float, Meta(gt=0, lt=1e7)], is_text=True)


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turns the error of a process that waits for one that is gone into a ``LostProcessError``."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, torch.distributed.DistError) or any(
            sign in text for sign in ("gloo", "Gloo", "NCCL", "Connection closed by peer")
        )
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not lost:
            raise
        raise LostProcessError(
            f"process {os.environ.get('RANK', 0)} has lost another process of the run, which ended "
            f"or did not answer within {_timeout():g} s; start all of them again with --resume"
        ) from error


def in_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result | None:
    """Calls ``work`` in the main process, and returns its result there; the others wait.

    Raises:
        UserError: in every process, if ``work`` raises one.
    """
    result, problem = None, None
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as error:
            problem = str(error)
    for found in gather_object([problem]):
        if found is not None:
            raise UserError(found)
    return result


def check_shared(path: Path, accelerator: Accelerator) -> None:
    """Checks that all processes see a file that the main process has written.

    Raises:
        UserError: in every process; processes on another machine have another file system.
    """
    accelerator.wait_for_everyone()
    seen = gather_object([path.stat().st_mtime_ns if path.is_file() else None])
    blind = [rank for rank, written in enumerate(seen) if written != seen[0]]
    if blind:
        raise UserError(
            f"the processes {', '.join(map(str, blind))} do not see {path}; give an --output on a "
            "file system that all machines share"
        )
