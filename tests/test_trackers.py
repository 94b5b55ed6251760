"""Experiment trackers get every epoch's numbers, offline, and one line says what is wrong."""

import csv
import shlex
import sqlite3
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from naslora.errors import UserError
from naslora.files import read_json
from naslora.training import trackers
from naslora.training.accelerator import make_accelerator
from naslora.training.train_config import TrainConfig

pytestmark = pytest.mark.usefixtures("tiny_vit")

TRAIN = shlex.split("--model vit_t --image-size 32 --epochs 2 --search-start 1 --workers 0")


def history(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open() as file:
        return list(csv.DictReader(file))


def curve(run: Path, name: str) -> list[tuple[int, float]]:
    """The points of a curve that TensorBoard shows."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(point.step, point.value) for point in events.Scalars(name)]


@pytest.fixture(scope="module")
def run(naslora, clean_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    result = naslora("train", "--data", clean_data, *TRAIN, "--output", output)
    assert result.status == 0, result.err
    return output


def test_tensorboard_gets_every_epoch_by_default(run):
    rows = history(run)
    for name in ("train_loss", "val_loss", "learning_rate"):
        expected = [(int(row["epoch"]), pytest.approx(float(row[name]))) for row in rows]
        assert curve(run, name) == expected
    shares = [curve(run, f"operations/{name}")[-1] for name in ("none", "skip_connect")]
    assert all(step == 1 and 0 < share < 1 for step, share in shares)
    tested = read_json(run / "metrics.json")
    assert curve(run, "test_dice") == [(1, pytest.approx(tested["test"]["dice"]))]
    exact = tested["test_merged"]["exact"]["dice"]
    assert curve(run, "test_exact_dice") == [(1, pytest.approx(exact))]


def test_a_run_without_trackers_writes_no_curves(naslora, clean_data, tmp_path):
    options = ["--data", clean_data, *TRAIN, "--epochs", "1", "--tracker"]
    assert naslora("train", *options, "--output", tmp_path / "run").status == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("comet", "comet-ml")])
def test_a_tracker_that_is_not_installed_costs_one_line(
    name, package, naslora, clean_data, tmp_path, monkeypatch
):
    monkeypatch.setitem(
        trackers._KINDS, name, trackers._KINDS[name]._replace(available=lambda: False)
    )
    options = ["--data", clean_data, *TRAIN, "--tracker", name]
    result = naslora("train", *options, "--output", tmp_path / "run")
    assert result.status == 2 and not (tmp_path / "run").exists()
    assert result.err.splitlines() == [
        f"naslora: error: tracker {name} is not installed: run pip install {package}"
    ]


class Broken(trackers.GeneralTracker):
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
        kind = trackers._Kind("x", lambda: True, lambda *_: tracker, lambda _: "id 7", "unplug it")
        monkeypatch.setitem(trackers._KINDS, "wandb", kind)
        return tracker

    return install


def test_a_tracker_that_does_not_start_costs_one_line(broken, naslora, clean_data, tmp_path):
    broken(from_the_start=True)
    options = ["--data", clean_data, *TRAIN, "--tracker", "tensorboard", "wandb"]
    result = naslora("train", *options, "--output", tmp_path / "run")
    assert result.status == 2
    assert result.err.splitlines()[-1] == (
        "naslora: error: tracker wandb does not start (unplug it): no answer"
    )


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


def train_offline(tracker: str, output: Path, data: Path, monkeypatch) -> None:
    """Trains with a tracker that writes below the output's parent and reaches no server.

    In a process of its own: trackers keep threads and hooks until their process ends.
    """
    if not trackers._KINDS[tracker].available():
        pytest.skip(f"{tracker} is not installed: pip install 'naslora[trackers]'")
    folder = output.parent
    for name, value in {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "COMET_START_ONLINE": "0",
        "COMET_OFFLINE_DIRECTORY": str(folder / "comet"),
        "PYTHONPATH": str(Path(trackers.__file__).parents[2]),
    }.items():
        monkeypatch.setenv(name, value)
    resume = ["--resume"] if output.exists() else []
    command = [sys.executable, "-m", "naslora", "train", "--data", str(data), *TRAIN, *resume]
    command += ["--tracker", tracker, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.campaign
def test_wandb_offline(clean_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for _ in range(2):  # the second resumes the run, which is finished
        train_offline("wandb", run, clean_data, monkeypatch)
    identity = read_json(run / trackers.IDENTITIES)["wandb"]
    logs = sorted((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert [log.stem for log in logs] == [f"run-{identity}"] * 2
    assert all(name in logs[0].read_bytes() for name in (b"val_dice", b"operations/none", b"rank"))


@pytest.mark.campaign
def test_mlflow_in_a_local_file(clean_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for _ in range(2):
        train_offline("mlflow", run, clean_data, monkeypatch)
    database = sqlite3.connect(tmp_path / "mlflow.db")
    runs = database.execute("select run_uuid, name, status from runs").fetchall()
    assert runs == [(read_json(run / trackers.IDENTITIES)["mlflow"], "run", "FINISHED")]
    query = "select step, value from metrics where key = 'val_loss' order by step"
    expected = [(int(row["epoch"]), float(row["val_loss"])) for row in history(run)]
    assert database.execute(query).fetchall() == expected
    rank = "select value from params where key = 'adapter.rank'"
    assert database.execute(rank).fetchall() == [("3",)]


@pytest.mark.campaign
def test_comet_offline(clean_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train_offline("comet", run, clean_data, monkeypatch)
    (archive,) = (tmp_path / "comet").glob("*.zip")
    assert archive.stem.startswith(read_json(run / trackers.IDENTITIES)["comet"])
    with zipfile.ZipFile(archive) as file:
        messages = file.read("messages.json").decode()
    assert all(name in messages for name in ("val_dice", "operations/none", "adapter.rank"))
