"""``naslora compare``: what it refuses, marks, keeps and writes."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
from dataclasses import replace
from unittest import mock

import pytest
from conftest import call, csv_rows, error_of, group_lives, refusal, scores_of, succeed, wait_for
from reliability.conftest import Forked
from run_configs import run_config

from naslora.errors import UserError
from naslora.report.page import write_page
from naslora.results import RunNumbers
from naslora.study import compare, launchers, tables
from naslora.study.design import Design, Launch, parse_grid, with_values
from naslora.study.differences import over_images
from naslora.study.measurement import find_refusals, in_own_process
from naslora.training.run_config import DataConfig, RunConfig, TrainConfig

TRAIN = shlex.split(
    "--model vit_t --image-size 32 --epochs 1 --search-start 0 --arch-fraction 0.5 --workers 0"
)
METHOD_NAMES = ("lora", "vpt", "nas-pc-lora")


# --- Killed, resumed, and what is there at the end ---


@pytest.fixture(scope="module", autouse=True)
def runs_are_forks():
    """The processes of runs are forks, which need not import PyTorch again. None fits VPT."""
    context = multiprocessing.get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", lambda _: context)
        patch.setattr("naslora.methods.vpt.is_plain_vit", lambda _: False)
        yield


@pytest.fixture(scope="module")
def arguments(clean_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("comparisons") / "all"
    options = ("--seeds", 3, 4, "--data", clean_data, *TRAIN, "--output", output)
    return output, ["compare", "--methods", *METHOD_NAMES, *options]


@pytest.fixture(scope="module")
def killed(arguments, tiny_sam):
    """A comparison that was killed once its first run had finished."""
    output, options = arguments
    process = Forked(options)
    wait_for(lambda: measured(output), process)
    process.kill()
    assert process.wait().status == -signal.SIGKILL
    wait_for(lambda: not group_lives(process.pid))  # a run has to end with its parent
    return output, options


@pytest.fixture(scope="module")
def finished(killed):
    """The same, resumed: the command's result, its folder, what had been finished before."""
    output, options = killed
    before = modified(output / "runs/lora/3")
    return call(*options, "--resume"), output, before


def measured(output):
    """The numbers of the finished runs, by method and seed."""
    return {
        (path.parts[-3], int(path.parts[-2])): json.loads(path.read_text())
        for path in output.glob(f"runs/*/*/{compare.NUMBERS}")
    }


def modified(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_refused_methods_end_in_one_line_and_status_2(finished):
    result, _, _ = finished
    assert result.status == 2
    errors = [line for line in result.err.splitlines() if "error" in line]
    assert len(errors) == 1 and "2 of 6 runs have no result (vpt: " in errors[0]
    # It was refused, with the reason, before anything trained.
    assert result.err.index("vpt is left out: ") < result.err.index("run 1 of 3")
    assert "needs the attention of SAM" in errors[0]


def test_resuming_keeps_the_finished_run(finished):
    result, output, before = finished
    assert before and modified(output / "runs/lora/3") == before
    assert "run 3 of 3" in result.err and "4 of" not in result.err.replace("2 of 6", "")


def test_every_run_is_one_of_train(finished):
    _, output, _ = finished
    expected = {(name, seed) for name in ("lora", "nas-pc-lora") for seed in (3, 4)}
    assert measured(output).keys() == expected
    for name in ("lora", "nas-pc-lora"):
        config = json.loads((output / f"runs/{name}/4/config.json").read_text())
        assert config["method"] == name and config["seed"] == 4
        dice = scores_of(output / f"runs/{name}/4")["dice"]
        assert measured(output)[name, 4]["numbers"]["dice"] == pytest.approx(dice, nan_ok=True)


def test_tables_of_a_comparison(finished):
    _, output, _ = finished
    rows = csv_rows(output / "table.csv")
    assert [row["row"] for row in rows] == list(METHOD_NAMES)
    lora, vpt, ours = rows
    assert vpt["trainable_parameters"] == "" and "needs the attention of SAM" in vpt["reason"]
    assert float(lora["weight_seconds"]) == pytest.approx(float(lora["training_seconds"]), rel=0.01)
    assert float(ours["training_seconds"]) > float(ours["weight_seconds"])
    assert 2e8 < float(ours["peak_memory"]) < 8e9
    assert float(ours["inference_exact"]) > 0 and lora["inference_center"] == ""
    markdown = (output / "table.md").read_text()
    assert "| VPT (refused) |" in markdown and "one run at a time" in markdown
    report = (output / "report.html").read_text()
    assert "VPT (refused)" in report and report.count("<svg") == 2
    (difference,) = csv_rows(output / "differences.csv")
    dice = {key: numbers["numbers"]["dice"] for key, numbers in measured(output).items()}
    gains = [dice["nas-pc-lora", seed] - dice["lora", seed] for seed in (3, 4)]
    assert difference["title"] == "NAS-PC-LoRA"
    assert float(difference["mean"]) == pytest.approx(statistics.mean(gains), abs=1e-12)
    assert not re.search(r"https?:|<script|<link", report)
    own, other = (
        {seed: image_dice(output / f"runs/{name}/{seed}") for seed in (3, 4)}
        for name in ("nas-pc-lora", "lora")
    )
    expected = over_images(own, other, 0.005)
    for name in ("low", "high", "equivalence"):
        value = float(difference[f"images_{name}"])
        assert value == pytest.approx(getattr(expected, name), abs=1e-12)
    assert "| 95% over images |" in markdown


def image_dice(run):
    return [float(row["dice"]) for row in csv_rows(run / "test_images.csv")]


def test_a_method_is_added_later(finished, clean_data):
    _, output, _ = finished
    before = modified(output / "runs/lora")
    options = ["--methods", "decoder-only", "lora", "--seeds", 3, "--data", clean_data, *TRAIN]
    result = succeed("compare", *options, "--output", output, "--resume")
    assert "run 1 of 1: Decoder only" in result.err and modified(output / "runs/lora") == before
    rows = csv_rows(output / "table.csv")
    assert [(row["row"], row["seeds"]) for row in rows] == [("decoder-only", "1"), ("lora", "1")]
    decoder, lora = (int(row["trainable_parameters"]) for row in rows)
    assert lora == decoder + 2 * 3 * 16 * 32  # r = 3 on all linears of two blocks of width 32


def test_the_numbers_of_a_finished_run_are_enough(finished, clean_data, tmp_path):
    """A comparison goes on elsewhere, or without the models."""
    kept = tmp_path / "runs/lora/3" / compare.NUMBERS
    kept.parent.mkdir(parents=True)
    shutil.copy(finished[1] / kept.relative_to(tmp_path), kept)
    options = ("--methods", "lora", "--seeds", 3, "--data", clean_data, *TRAIN, "--resume")
    assert "run 1" not in succeed("compare", *options, "--output", tmp_path).err
    (row,) = csv_rows(tmp_path / "table.csv")
    assert float(row["dice"]) == json.loads(kept.read_text())["numbers"]["dice"]
    assert [*kept.parent.iterdir()] == [kept]


def test_a_comparison_resumes_with_its_own_settings(finished, arguments):
    output, options = arguments
    before = modified(output)
    assert "it has epochs 1" in refusal(*options, "--epochs", 2, "--resume")
    assert modified(output) == before


# --- The order of things, on runs that do not train ---


@pytest.fixture
def compared(monkeypatch, tmp_path, clean_data):
    """Compares two methods with runs that ``answer`` stands for; what ran; the configuration."""
    ran = []
    config = RunConfig(data=DataConfig(root=clean_data), training=TrainConfig(learning_rate=1e-4))

    def run(answer=lambda _: numbers(0.5), seeds=(0, 1), resume=False, design=None, page=None):
        def in_process(function, config, *_):
            if function is find_refusals:
                return {}
            ran.append(config)
            return answer(config)

        monkeypatch.setattr(compare, "in_own_process", in_process)
        # A real one takes half a second.
        monkeypatch.setattr(tables, "write_page", page or (lambda *_, **__: None))
        monkeypatch.setattr(compare, "check_output", lambda *_, **__: None)  # there are no runs
        ran.clear()
        compare.compare(config, ("lora", "mona"), seeds, tmp_path / "out", resume, design)

    return run, ran, config


def numbers(dice, **changed):
    scores = {"dice": dice, "iou": dice and dice / 2, "accuracy": 0.9, "dice_exact": dice}
    costs = {"weight_seconds": 0.5, "training_seconds": 0.75, "peak_memory": 10**9}
    costs |= {"inference_unmerged": 0.2, "inference_exact": 0.1}
    parameters = {"trainable_parameters": 250, "share_of_parameters": 0.25, "entropy": None}
    machine = "1 threads each, on 2 processors (cpu)"
    return RunNumbers({**parameters, **scores, **costs, **changed}, machine=machine, load=1.0)


def test_seeds_are_the_outer_loop_and_a_finished_comparison_is_drawn_again(compared, tmp_path):
    run, ran, _ = compared
    run()
    order = [("lora", 0), ("mona", 0), ("lora", 1), ("mona", 1)]
    assert [(config.method, config.seed) for config in ran] == order
    assert not (tmp_path / "out/report.html").exists()
    run(resume=True, page=write_page)
    assert ran == [] and "<path" in (tmp_path / "out/report.html").read_text()


def test_a_failed_run_is_marked_and_tried_again(compared, tmp_path):
    def fails(config):
        if (config.method, config.seed) == ("mona", 0):
            raise RuntimeError("its process\nwas killed")
        return numbers(0.5)

    run, ran, _ = compared
    assert "1 of 4 runs have no result (mona: RuntimeError" in error_of(run, fails)
    assert len(ran) == 4
    table = (tmp_path / "out/table.md").read_text()
    assert "| Mona (1 failed) |" in table
    assert "seed 0: RuntimeError: its process was killed" in table
    run(resume=True)
    assert [(config.method, config.seed) for config in ran] == [("mona", 0)]
    assert "failed" not in (tmp_path / "out/table.md").read_text()


def test_all_methods_refused(monkeypatch, tmp_path, clean_data):
    monkeypatch.setattr(compare, "in_own_process", lambda *_: {"vpt": "it needs a plain ViT"})
    with pytest.raises(UserError, match="no method fits: vpt: it needs a plain ViT"):
        compare.compare(run_config(root=clean_data), ["vpt"], [0], tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "launcher, library",
    [("slurm", "submitit"), pytest.param("ray", "ray", marks=pytest.mark.campaign)],
)
def test_jobs_that_die_are_started_again(
    monkeypatch, compared, tmp_path, clean_data, launcher, library
):
    """The table of jobs, of which one is killed, is that of runs here, one after another."""
    pytest.importorskip(library)
    run, _, config = compared
    run(lambda config: numbers(0.7 if (config.method, config.seed) == ("mona", 1) else 0.5))
    marker = tmp_path / "killed"
    found = {("mona", 1): numbers(0.7)}
    others = numbers(0.5)

    def answer(place, config, folder, costs):  # it travels to the jobs, which import no test
        if config.method == "mona" and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found.get((config.method, config.seed), others)

    monkeypatch.setattr(launchers, "attempt", answer)
    options = {"slurm": ["cluster=local"], "ray": ["num_cpus=2"]}[launcher]
    launch = Launch(launcher, (tuple(options),))
    compare.compare(config, ("lora", "mona"), (0, 1), tmp_path / "jobs", False, launch=launch)
    assert marker.exists()
    for name in ("table.csv", "differences.csv"):
        assert (tmp_path / "jobs" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_jobs_of_ray(monkeypatch, tmp_path):
    """A process makes one run, so that its peak memory is the run's, and no lost one again."""
    ray = mock.Mock(is_initialized=lambda: False, cluster_resources=lambda: {"GPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    with launchers.jobs(Launch("ray", (("num_cpus=2", "address=auto"),)), tmp_path) as submit:
        future = submit("config", tmp_path, False)
    options = {"log_to_driver": False, "include_dashboard": False}
    ray.init.assert_called_once_with(**options, num_cpus=2, address="auto")
    ray.remote.assert_called_once_with(num_gpus=1, max_calls=1, max_retries=0)
    started = ray.remote.return_value.return_value.remote
    started.assert_called_once_with(os.getcwd(), "config", tmp_path, False)
    assert future is started.return_value.future.return_value
    ray.shutdown.assert_called_once_with()
    jobs = launchers.jobs(Launch("ray", (("gpus",),)), tmp_path)
    assert error_of(jobs.__enter__) == "--cluster takes NAME=VALUE, got 'gpus'"
    for error, line in (
        (ValueError("no"), "--launcher ray cannot start jobs: no"), (UserError("gone"), "gone")
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^{line}$"), launchers.jobs(Launch("ray"), tmp_path):
            raise error


def test_what_a_job_returns(monkeypatch, tmp_path):
    monkeypatch.chdir("/")
    for error, text in ((UserError("refused"), "refused"), (KeyError("lost"), "KeyError: 'lost'")):
        monkeypatch.setattr(launchers, "run_and_measure", mock.Mock(side_effect=error))
        assert str(launchers.attempt(tmp_path, "config")) == text and os.getcwd() == str(tmp_path)
    died = mock.Mock(result=mock.Mock(side_effect=OSError("node 3")))
    job = launchers.Job("run", mock.Mock(return_value=died), ())
    _, outcome = launchers.finished([job])
    assert str(outcome) == "its job died 4 times: node 3" and job.starts == 4


# --- Tuned, on folds ---


DICE = {1e-3: 0.6, 1e-2: 0.7, 1.0: 0.1}  # of a run with this rate


@pytest.fixture
def tuned(compared):
    """Compares on folds with runs whose Dice ``DICE`` holds; returns what ran."""
    run, ran, _ = compared

    def tune(resume=False, errors=None, seeds=(0, 1), **changed):
        """``errors``: by rate, what every run with it raises."""

        def answer(config):
            rate = config.training.learning_rate
            if rate in (errors or {}):
                raise errors[rate]
            tested = csv_rows(config.data.root / "test.csv")
            return replace(numbers(DICE[rate]), image_dice=[DICE[rate]] * len(tested))

        design = {"tune": [["learning-rate=1e-3,1e-2,1"]], "folds": 4, **changed}
        run(answer, seeds, resume, Design(**design))

    return tune, ran


def images_of(folder, split):
    return {row["image"] for row in csv_rows(folder / f"{split}.csv")}


def test_nothing_is_tuned_on_what_it_is_tested_on(tuned, tmp_path):
    run, ran = tuned
    run(inner_folds=2)
    trials = [config for config in ran if "inner" in config.data.root.name]
    finals = [config for config in ran if config not in trials]
    # Of each method: three rates on two inner folds with the first seed, then two seeds.
    assert len(trials) == 2 * 4 * 3 * 2 and {config.seed for config in trials} == {0}
    assert len(finals) == 2 * 4 * 2 and {c.training.learning_rate for c in finals} == {1e-2}
    everything = {row["image"] for row in csv_rows(tmp_path / "out/images.csv")}
    assert len(everything) == 8
    for config in ran:
        parts = [images_of(config.data.root, split) for split in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set().union(*parts))
        if config in trials:
            assert not set().union(*parts) & images_of(config.data.root.parent, "test")
        else:
            assert set().union(*parts) == everything
    folds = [images_of(tmp_path / f"out/lists/fold-{k}", "test") for k in range(1, 5)]
    assert sorted(image for fold in folds for image in fold) == sorted(everything)
    table = (tmp_path / "out/table.md").read_text()
    assert "| 2 | 1e-2 |" in table and "| LoRA | 3 | 0.6000 | 0.7000 (chosen) | 0.1000 |" in table
    for row in csv_rows(tmp_path / "out/table.csv"):
        assert row["learning_rate"] == "1e-2" and float(row["dice"]) == pytest.approx(0.7)
    (difference,) = csv_rows(tmp_path / "out/differences.csv")
    assert difference["images_verdict"] == "level, within ± 0.005"


def test_a_trial_that_cannot_train_is_the_worst_and_others_are_made_again(tuned, tmp_path):
    run, ran = tuned
    run(seeds=(0,), errors={1.0: UserError("the loss is nan")})
    assert "| 0.7000 (chosen) | failed |" in (tmp_path / "out/table.md").read_text()
    run(seeds=(0,), resume=True)
    assert not ran  # the choice is made
    shutil.rmtree(tmp_path / "out")
    lines = r"2 of 2 runs have no result .*1 has no result: OSError: gone"
    with pytest.raises(UserError, match=lines):
        run(seeds=(0,), errors={1.0: OSError("gone")})
    run(seeds=(0,), resume=True)
    assert len(ran) == 2 * 4 * 2  # a trial and the run that waited for it


def test_the_protocol_is_written_first_and_stays(tuned, tmp_path, clean_data):
    run, ran = tuned
    with pytest.raises(KeyboardInterrupt):
        run(errors={1e-3: KeyboardInterrupt()})
    words = (tmp_path / "out/protocol.md").read_text()
    assert "Each method has 3 trials a fold" in words and "(2 2 2 2)" in words
    before = modified(tmp_path / "out")
    for changed, part in [
        ({"seeds": (0,)}, "it has seeds [0, 1]"),
        ({"margin": 0.01}, "it has margin 0.005"),
        ({"folds": 3}, "it has folds 4, images [2, 2, 2, 2], images_sha256"),
        ({"tune": [["learning_rate=1e-3"]]}, "it has tune ['learning-rate=1e-3,1e-2,1'], trials"),
    ]:
        with pytest.raises(UserError, match=re.escape(part)):
            run(resume=True, **changed)
    assert not ran and modified(tmp_path / "out") == before


def test_values_are_those_of_the_command_line():
    config = RunConfig.from_dict({"method": "lora"})
    values = {"learning_rate": "3e-4", "search_start": "null", "rank": "6", "flip": "false"}
    values["target"] = "mlp.fc1"
    varied = with_values(config, values)
    assert (varied.training.learning_rate, varied.training.search_start) == (3e-4, None)
    assert (varied.adapter.rank, varied.adapter.target) == (6, "mlp.fc1")
    assert varied.training.flip is False
    grid = parse_grid([["learning-rate=1e-4,1e-3"], ["target=qkv,mlp"]])
    assert len(grid) == 4 and grid[1] == {"learning_rate": "1e-4", "target": "mlp"}


def test_tuning_on_the_validation_images(clean_data, tiny_sam, tmp_path):
    """Real runs: without folds the data's own test images are tested."""
    options = ["--methods", "lora", "--data", clean_data, *TRAIN, "--output", tmp_path / "out"]
    result = succeed("compare", *options, "--tune", "learning_rate=1e-3,1e-2", "--tune", "rank=3")
    assert "run 2 of 3: LoRA, seed 0, tries learning_rate=1e-2, rank=3 (inner-1)" in result.err
    assert re.search(r"learning_rate=1e-\d, rank=3 is chosen", result.err)
    trial = json.loads((tmp_path / "out/runs/lora/tuning/trial-2/inner-1/config.json").read_text())
    assert trial["training"]["learning_rate"] == 1e-2
    validated = {str(clean_data / row["image"]) for row in csv_rows(clean_data / "val.csv")}
    assert images_of(tmp_path / "out/lists/inner-1", "test") == validated
    final = json.loads((tmp_path / "out/runs/lora/0/config.json").read_text())
    assert final["data"]["root"] == str(clean_data)
    assert "Tuned: learning_rate=1e-3,1e-2 rank=3." in (tmp_path / "out/protocol.md").read_text()


def test_folds_of_one_csv_file(data, tiny_sam, tmp_path):
    """Real runs, whose rates and class weights are fitted to the training images of each fold."""
    files = [data / f"{split}.csv" for split in ("train", "val", "test")]
    rows = [row for file in files for row in csv_rows(file)]
    lines = [f"{row['image']},{row['label']},{i % 4}" for i, row in enumerate(rows)]
    for file in files:
        file.unlink()
    (data / "all.csv").write_text("\n".join(["image,label,patient", *lines]))
    output = tmp_path / "out"
    options = ["compare", "--methods", "decoder-only", "--data", data, *TRAIN, "--output", output]
    options += ["--epochs", 1, "--class-weights", "auto", "--folds", 2, "--group", "patient"]
    succeed(*options)
    patients = {str(data / line.split(",")[0]): line[-1] for line in lines}
    tested, scores = [], []
    for k in (1, 2):
        run = output / f"runs/decoder-only/0/fold-{k}"
        config = json.loads((run / "config.json").read_text())
        assert config["training"]["learning_rate"] and len(config["training"]["class_weights"]) == 2
        parts = [images_of(output / f"lists/fold-{k}", part) for part in ("train", "val", "test")]
        groups = [{patients[image] for image in part} for part in parts]
        assert sum(map(len, groups)) == 4 == len(set.union(*groups))
        tested += parts[2]
        scores.append(json.loads((run / "metrics.json").read_text())["test"]["dice"])
    assert sorted(tested) == sorted(patients)
    best = scores.index(max(scores)) + 1
    table = (output / "table.md").read_text()
    assert f"runs/decoder-only/0/fold-{best} |" in table
    assert f" {statistics.mean(scores):.3f} (" in table  # the mean over the folds, with an interval
    succeed(*options, "--resume")
    for column, message in (
        ("image", "each group of the column 'image' has one"),
        ("x", "no colu"),
    ):
        assert message in refusal(*options[:-1], column, "--output", tmp_path / "other")
        assert not (tmp_path / "other").exists()


# --- Numbers ---


def test_a_process_of_its_own():
    assert in_own_process(os.getpid) != os.getpid()
    assert "epochs: expected int >= 1" in error_of(in_own_process, TrainConfig, 0)
    with pytest.raises(RuntimeError, match="its process was killed"):
        in_own_process(os._exit, 1)
