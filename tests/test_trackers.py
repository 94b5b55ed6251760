"""Experiment trackers get every epoch's numbers, offline, and one line says what is wrong."""

import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import TRAIN, csv_rows, refusal, succeed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naslora.errors import UserError
from naslora.files import read_json
from naslora.training import trackers
from naslora.training.accelerator import make_accelerator
from naslora.training.run_config import TrainConfig

pytestmark = pytest.mark.usefixtures("tiny_sam")


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


def test_tensorboard_gets_every_epoch_by_default(clean_data, run, tmp_path):
    rows = csv_rows(run / "history.csv")
    for name in ("train_loss", "val_loss", "learning_rate"):
        expected = [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in rows]
        assert curve(run, name) == expected
    shares = [curve(run, f"operations/{name}")[-1] for name in ("none", "skip_connect")]
    assert all(step == 2 and 0 < share < 1 for step, share in shares)
    tested = read_json(run / "metrics.json")
    assert curve(run, "test_dice") == [(2, pytest.approx(tested["test"]["dice"]))]
    exact = tested["test_merged"]["exact"]["dice"]
    assert curve(run, "test_exact_dice") == [(2, pytest.approx(exact))]
    options = ["--data", clean_data, *TRAIN, "--epochs", "1", "--tracker"]
    succeed("train", *options, "--output", tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_trackers_that_do_not_start_cost_one_line(broken, clean_data, tmp_path, monkeypatch):
    broken(from_the_start=True)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "comet_ml" else name)
    for names, line in (
        (["comet"], "tracker comet is not installed: run pip install comet-ml"),
        (["tensorboard", "wandb"], "tracker wandb does not start (unplug it): no answer"),
    ):
        options = ["--data", clean_data, *TRAIN, "--tracker", *names]
        result = refusal("train", *options, "--output", tmp_path / "run")
        assert result.splitlines()[-1] == f"naslora: error: {line}"
        assert (tmp_path / "run").exists() == (names != ["comet"])


class Broken(trackers.tracking.GeneralTracker):
    """A tracker whose server is gone, from the start or later."""

    name, requires_logging_directory, tracker = "broken", False, None

    def __init__(self, from_the_start):
        super().__init__(_blank=True)
        self.from_the_start, self.finished = from_the_start, False

    def start(self):
        if self.from_the_start:
            raise ConnectionError("no answer\nfrom example.org")

    def store_init_configuration(self, values):
        self.stored = values

    def log(self, values, step):
        raise ConnectionError("no answer")

    def finish(self):
        self.finished = True


@pytest.fixture
def broken(monkeypatch):
    def install(from_the_start):
        tracker = Broken(from_the_start)
        kind = trackers._Kind("x", lambda *_: tracker, lambda _: "id 7", "unplug it")
        monkeypatch.setitem(trackers._KINDS, "wandb", kind)
        return tracker

    return install


def test_a_tracker_that_fails_later_is_finished(broken, fresh_accelerate, tmp_path):
    tracker = broken(from_the_start=False)
    accelerator = make_accelerator(TrainConfig(mixed_precision="no"))
    config = {"model": "vit_t", "adapter": {"rank": 3, "blocks": [0, 2]}, "cache": None}
    with (
        pytest.raises(UserError, match=r"tracker broken cannot log; --resume .*: no answer"),
        trackers.tracked(accelerator, ["wandb"], tmp_path, config, 0),
    ):
        trackers.log(accelerator, {"loss": 1.0}, 0)
    assert tracker.finished and accelerator.trackers == []
    expected = {"model": "vit_t", "adapter.rank": 3, "adapter.blocks": "0, 2", "cache": None}
    assert tracker.stored == expected
    assert read_json(tmp_path / trackers.IDENTITIES) == {"wandb": "id 7"}


# ---- The trackers themselves, offline -----------------------------------------------------------


def check_wandb(run: Path, identity: str) -> None:
    logs = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [log.stem for log in logs] == [f"run-{identity}"] * 2
    assert all(name in logs[0].read_bytes() for name in (b"val_dice", b"operations/none", b"rank"))


def check_mlflow(run: Path, identity: str) -> None:
    database = sqlite3.connect(run.parent / "mlflow.db")
    runs = database.execute("select run_uuid, name, status from runs").fetchall()
    assert runs == [(identity, "run", "FINISHED")]
    query = "select step, value from metrics where key = 'val_loss' order by step"
    expected = [
        (int(row["epoch"]), float(row["val_loss"])) for row in csv_rows(run / "history.csv")
    ]
    assert database.execute(query).fetchall() == expected
    rank = "select value from params where key = 'adapter.rank'"
    assert database.execute(rank).fetchall() == [("3",)]


def check_comet(run: Path, identity: str) -> None:
    (archive,) = (run.parent / "comet").glob("*.zip")
    assert archive.stem.startswith(identity)
    with zipfile.ZipFile(archive) as file:
        messages = file.read("messages.json").decode()
    assert all(name in messages for name in ("val_dice", "operations/none", "adapter.rank"))


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("tracker", "starts", "check"),
    [("wandb", 2, check_wandb), ("mlflow", 2, check_mlflow), ("comet", 1, check_comet)],
)
def test_trackers_offline(tracker, starts, check, clean_data, tmp_path, monkeypatch):
    """They write below the run's parent and reach no server. A second start resumes the run."""
    pytest.importorskip("comet_ml" if tracker == "comet" else tracker)
    for name, value in {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(tmp_path / "comet"),
        "PYTHONPATH": str(Path(trackers.__file__).parents[2]),
    }.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "naslora", "train", "--data", str(clean_data), *TRAIN]
    command += ["--tracker", tracker, "--output", str(run)]
    for resume in ([], ["--resume"])[:starts]:
        # In a process of its own: trackers keep threads and hooks until their process ends.
        result = subprocess.run([*command, *resume], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0, result.stderr[-3000:]
    check(run, read_json(run / trackers.IDENTITIES)[tracker])
