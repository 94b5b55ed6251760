"""What a training run shows while it runs: the progress bar, and an epoch's numbers."""

import dataclasses
import math
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from naslora.results import Epoch, Mixture
from naslora_kernels import OPERATIONS


class TrainProgress(Progress):
    """The progress bar of ``steps`` steps, with the loss and the speed of the last one."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:.1f} images/s"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.steps = self.add_task("", total=steps, loss=math.nan, rate=math.nan)
        self.step_started = 0.0

    def start_pass(self, description: str) -> None:
        """Starts the clock of a pass over a split, and names the pass."""
        self.update(self.steps, description=description)
        self.step_started = time.perf_counter()

    def finish_step(self, loss: float, images: int) -> None:
        """Counts one step with its mean loss over ``images`` images."""
        now = time.perf_counter()
        rate = images / (now - self.step_started)
        self.step_started = now
        self.update(self.steps, advance=1, loss=loss, rate=rate)


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
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    numbers = {name: value for name, value in fields.items() if isinstance(value, float)}
    if mixture is not None:
        mean = torch.tensor(mixture.softmax).mean(0).tolist()
        numbers |= {
            f"operations/{name}": share for name, share in zip(OPERATIONS, mean, strict=True)
        }
    return numbers
