"""What a training run shows while it runs: the progress bar, and an epoch's numbers."""

import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from naslora.results import Epoch, Mixture
from naslora_kernels import OPERATIONS


class TrainProgress:
    """The progress bar of a run, with the loss and the speed of the last step."""

    def __init__(self) -> None:
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.description, self.step_started = "", 0.0

    @contextmanager
    def shown(self, console: Console, steps: int) -> Iterator[None]:
        """Shows the bar, for ``steps`` steps, while the body runs."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:.1f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as self.bar:
            self.task = self.bar.add_task("", total=steps, loss=math.nan, rate=math.nan)
            yield
        self.bar = None

    def start_pass(self, description: str) -> None:
        """Starts the clock of a pass over a split, and names the pass."""
        self.description = description
        self.step_started = time.perf_counter()

    def advance(self, loss: float, images: int) -> None:
        """Counts one step with its mean loss over ``images`` images."""
        now = time.perf_counter()
        rate = images / (now - self.step_started)
        self.step_started = now
        if self.bar is not None:
            self.bar.update(
                self.task, advance=1, loss=loss, rate=rate, description=self.description
            )


def epoch_line(record: Epoch, epochs: int) -> str:
    """One epoch in a line of text, for logs."""
    searched = "" if record.arch_loss is None else f"  arch loss {record.arch_loss:.3f}"
    entropy = "" if record.entropy is None else f"  entropy {record.entropy:.3f}"
    dice = "-" if record.val_dice is None else f"{record.val_dice:.3f}"
    spatial = "" if record.spatial == 1 else f"  spatial {record.spatial:.2f}"
    return (
        f"epoch {record.epoch + 1}/{epochs}  stage {record.stage}  "
        f"loss {record.train_loss:.3f}{searched}  val loss {record.val_loss:.3f}  "
        f"val Dice {dice}{entropy}{spatial}  "
        f"{record.seconds.total:.1f} s"
    )


def epoch_numbers(record: Epoch, mixture: Mixture | None) -> dict[str, float]:
    """An epoch's numbers by name, and the layers' mean mixture, for experiment trackers."""
    numbers = {
        f.name: value
        for f in dataclasses.fields(record)
        if isinstance(value := getattr(record, f.name), float)
    }
    if mixture is not None:
        mean = torch.tensor(mixture.softmax).mean(0).tolist()
        numbers |= {
            f"operations/{name}": share for name, share in zip(OPERATIONS, mean, strict=True)
        }
    return numbers
