"""What a training run shows while it runs: the progress bar, and an epoch's numbers."""

import time
from collections.abc import Iterable
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, track

from naslora.report.tables import duration
from naslora.results import Epoch, Mixture
from naslora_kernels import OPERATIONS

Item = TypeVar("Item")
LINE_SECONDS = 30.0
"""Where there is no terminal, a line tells of the steps this often."""
WORDS = (
    "stage 1 trains the weights; stage 2{} also trains alpha, the weights of the cell's "
    "operations: arch loss is the loss of these steps, and entropy (nats) falls as alpha prefers "
    "operations"
)


class TrainProgress(Progress):
    """The bar of ``steps`` steps with the loss and the speed of the last one, and the time left."""

    def __init__(self, console: Console, steps: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # else it ends with an empty line
        )
        self.steps = self.add_task("", total=steps, numbers="")
        self.step_started = self.first_step = self.last_line = 0.0

    def start_pass(self, description: str) -> None:
        """Starts the clock of a pass over a split, and names the pass."""
        self.update(self.steps, description=description)
        self.step_started = time.perf_counter()

    def finish_step(self, loss: float, images: int) -> None:
        """Counts one step with its mean loss over ``images`` images."""
        now, task = time.perf_counter(), self.tasks[0]
        numbers = f"loss {loss:.3f}  {images / (now - self.step_started):.1f} images/s"
        self.step_started = now
        self.advance(self.steps)
        self.first_step = self.first_step or now  # which is slower than the others
        left = 0.0
        if task.completed > 2 and task.remaining:
            left = (now - self.first_step) / (task.completed - 1) * (task.remaining or 0)
            numbers += f"  about {duration(left)} left"
        self.update(self.steps, numbers=numbers)
        due = left > LINE_SECONDS and now - self.last_line > LINE_SECONDS
        if due and not self.console.is_terminal:
            self.last_line = now
            count = f"step {task.completed:.0f}/{task.total:.0f}"
            self.console.print(f"{task.description}  {count}  {numbers}", soft_wrap=True)


def with_progress(items: Iterable[Item], text: str, total: int | None = None) -> Iterable[Item]:
    """The items, with a bar on the terminal, if there is one, of how many were taken."""
    console = Console(stderr=True)
    hidden = not console.is_terminal
    return track(items, text, total, console=console, transient=True, disable=hidden)


def epoch_line(record: Epoch, epochs: int) -> str:
    """One epoch in a line of text, for logs."""
    searched = "" if record.arch_loss is None else f"  arch loss {record.arch_loss:.3f}"
    entropy = "" if record.entropy is None else f"  entropy {record.entropy:.3f}"
    dice = "-" if record.val_dice is None else f"{record.val_dice:.3f}"
    spatial = "" if record.spatial == 1 else f"  spatial {record.spatial:.2f}"
    return (
        f"epoch {record.epoch}/{epochs}  stage {record.stage}  "
        f"loss {record.train_loss:.3f}{searched}  val loss {record.val_loss:.3f}  "
        f"val Dice {dice}{entropy}{spatial}  rate {record.learning_rate:.1e}  "
        f"{record.seconds:.1f} s"
    )


def epoch_numbers(record: Epoch, mixture: Mixture | None) -> dict[str, float]:
    """An epoch's numbers by name, and the layers' mean mixture, for experiment trackers."""
    numbers = {
        name: value
        for name, value in vars(record).items()
        if isinstance(value, float) and not name.startswith("seconds_")
    }
    if mixture is not None:
        mean = torch.tensor(mixture.softmax).mean(0).tolist()
        numbers |= {
            f"operations/{name}": share for name, share in zip(OPERATIONS, mean, strict=True)
        }
    return numbers
