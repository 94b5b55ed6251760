"""Experiment trackers: the numbers of every epoch in TensorBoard, wandb, MLflow or Comet.

Accelerate drives them. What belongs to an account, such as keys, servers and the offline mode, is
each tracker's own: it reads it from its environment variables and its own files.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator, tracking

from naslora.choices import Tracker
from naslora.errors import UserError
from naslora.files import disk_error, read_json, reason_of, write_json
from naslora.settings import checked
from naslora.training.accelerator import in_main_process

PROJECT = "naslora"
"""Project of the trackers, unless their own environment variables name another."""
IDENTITIES = "trackers.json"
"""File of a run: the identities by which trackers continue it. TensorBoard needs none."""


class _Kind(NamedTuple):
    """What differs between the trackers."""

    package: str
    """What pip installs."""
    make: Callable[[Path, int, str | None], tracking.GeneralTracker]
    """Of the run's folder, its first epoch, and the identity of the run to continue, if any."""
    identity: Callable[[Any], str] | None
    """Of a tracker that has started."""
    offline: str
    """How to use it without its server."""


_KINDS: dict[Tracker, _Kind] = {
    "tensorboard": _Kind(
        "tensorboard",
        # Epochs of a killed run that the resumed one repeats are not shown twice.
        # A Ctrl-C inside the writer's queue can cost so many seconds; its default is 120.
        lambda output, epoch, _: tracking.TensorBoardTracker(
            "tensorboard", output, purge_step=epoch, flush_secs=10
        ),
        None,
        "check the disk",
    ),
    "wandb": _Kind(
        "wandb",
        lambda output, _, identity: tracking.WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            name=output.name,
            dir=os.environ.get("WANDB_DIR", str(output)),
            id=identity,
            resume=identity and "allow",
        ),
        lambda tracker: tracker.run.id,
        "log in, or set WANDB_MODE=offline",
    ),
    "mlflow": _Kind(
        "mlflow",
        lambda output, _, identity: tracking.MLflowTracker(
            PROJECT, run_name=output.name, run_id=identity
        ),
        lambda tracker: tracker.active_run.info.run_id,
        "check MLFLOW_TRACKING_URI; sqlite:///mlflow.db is a local file",
    ),
    "comet": _Kind(
        "comet-ml",
        lambda _, __, identity: tracking.CometMLTracker(
            os.environ.get("COMET_PROJECT_NAME", PROJECT), experiment_key=identity
        ),
        lambda tracker: tracker.writer.get_key(),
        "set COMET_API_KEY, or COMET_START_ONLINE=0",
    ),
}


def check_trackers(names: Iterable[Tracker]) -> None:
    """Refuses a tracker that is unknown or not installed, and says what to install."""
    for name in names:
        kind = _KINDS[checked("tracker", name, Tracker)]
        if find_spec(kind.package.replace("-", "_")) is None:
            raise UserError(f"tracker {name} is not installed: run pip install {kind.package}")


@contextmanager
def tracked(
    accelerator: Accelerator,
    names: Iterable[Tracker],
    output: Path,
    config: dict[str, Any],
    epoch: int,
) -> Iterator[None]:
    """What the body logs goes to the trackers. All processes enter; the main one tracks.

    A resumed run, whose folder is ``output``, continues what the trackers have of it. The trackers
    are installed, ``config`` is JSON-ready, and ``epoch`` is the first one that is logged.

    Raises:
        UserError: in every process; a tracker does not start, or cannot log.
    """

    def start() -> None:
        path = output / IDENTITIES
        known: dict[str, str] = read_json(path) if path.exists() else {}
        identities = dict(known)
        for name in dict.fromkeys(names):
            kind = _KINDS[name]
            with _one_line(name, f"does not start ({kind.offline})"):
                tracker = kind.make(output, epoch, known.get(name))
                tracker.start()
                accelerator.trackers.append(tracker)
                if kind.identity is not None:  # TensorBoard would show the settings as another run
                    tracker.store_init_configuration(dict(_flat(config)))
                    identities[name] = kind.identity(tracker)
        if identities != known:
            write_json(path, identities)

    try:
        in_main_process(accelerator, start)
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers = []


def log(accelerator: Accelerator, values: dict[str, float], epoch: int) -> None:
    """Logs numbers of an epoch, in the main process. A ``UserError`` says which tracker cannot."""
    for tracker in accelerator.trackers:
        with _one_line(tracker.name, "cannot log; --resume continues the run"):
            tracker.log(values, step=epoch)


@contextmanager
def _one_line(name: str, what: str) -> Iterator[None]:
    """Turns what a tracker raises, of any kind, into one line. A full disk reports itself."""
    try:
        yield
    except Exception as error:
        if disk_error(error) is not None:
            raise
        raise UserError(f"tracker {name} {what}: {reason_of(error)}") from error


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted name; lists become text, because trackers take single values."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, ", ".join(map(str, value))
        else:
            yield prefix + name, value
