"""``bench``: that its tables say what was measured, and that a claim which fails is no success."""

import json
import re
import sys

import pytest

from bench import models, report, suite
from bench.models import Setting
from naslora.methods import METHODS
from naslora.sam.encoders import VITS, ViT

INFO = {"model": "vit_b", "image_size": 256, "batch": 4, "precision": "no", "device": "cpu"}
# Seconds of three rounds; the machine slows down meanwhile, for all alike.
ROUNDS = (1.0, 1.2, 2.0)
GOOD = {
    ("lora", "weights"): 1.0,
    ("conv-lora", "weights"): 1.5,
    ("nas-pc-lora", "weights"): 0.95,
    ("nas-pc-lora", "architecture"): 0.9,
    ("nas-pc-lora", "epoch"): 1.13,
    ("untouched", "inference"): 0.4,
    ("nas-pc-lora merged exact", "inference"): 0.402,
    ("nas-pc-lora merged center", "inference"): 0.4,
    ("nas-pc-lora merged calibrated", "inference"): 0.398,
    ("conv-lora", "inference"): 0.5,
}
SAVED = {"lora": 1000, "nas-pc-lora": 1010}


def entries(seconds, saved=SAVED, info=INFO):
    found = []
    for (contestant, step), factor in seconds.items():
        about = info | {"contestant": contestant} | ({"step": step} if step != "inference" else {})
        group = "inference" if step == "inference" else "training_step"
        stats = {"data": [factor * seconds for seconds in ROUNDS]}
        found.append({"group": group, "name": "x", "extra_info": about, "stats": stats})
    for contestant, size in saved.items():
        numbers = {"saved": size, "peak": 3 * size, "operations": 10**9, "calls": 1234}
        about = info | {"contestant": contestant} | numbers
        stats = {"data": [1.0]}
        found.append({"group": "memory", "name": "x", "extra_info": about, "stats": stats})
    return found


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``python -m bench.report``: its exit status and what it printed."""

    def main(found):
        path = tmp_path / "measured.json"
        path.write_text(json.dumps({"benchmarks": found}))
        monkeypatch.setattr(sys, "argv", ["report", str(path)])
        return report.main(), capsys.readouterr().out

    return main


def cells(text, first):
    return next(line for line in text.splitlines() if line.startswith(f"| {first} |")).split(" | ")


def test_all_claims_hold(run):
    status, text = run(entries(GOOD))
    assert status == 0 and "FAILS" not in text and "not measured" not in text
    conv = cells(text, "Conv-LoRA")
    assert conv[2] == "1.500 (1.500, 1.500)"  # drift cancels round by round
    assert conv[3] == "1.34"  # 1.64 / 1.22 iterations a second in the paper
    ours = cells(text, "NAS-PC-LoRA")
    assert ours[1].startswith("1,140 (")  # the median round: 0.95 * 1.2 s
    assert ours[5].startswith("0.947 (") and ours[6].startswith("1.130 (")
    assert ours[7].startswith("1.24")  # 25.2 / 20.3 minutes
    assert cells(text, "NAS-PC-LoRA, merged exact")[2] == "1.005 (1.005, 1.005)"


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({("nas-pc-lora", "weights"): 0.98, ("conv-lora", "weights"): 1.6}, "of PEFT's LoRA"),
        ({("conv-lora", "weights"): 1.3}, "of Conv-LoRA"),
        ({("nas-pc-lora", "architecture"): 0.96}, "an architecture step"),
        ({("nas-pc-lora merged exact", "inference"): 0.41}, "merged with exact"),
        ({("nas-pc-lora merged center", "inference"): 0.41}, "merged with center"),
    ],
)
def test_one_claim_fails(run, changed, claim):
    status, text = run(entries(GOOD | changed))
    assert status == 1
    failed = [line for line in text.splitlines() if "FAILS" in line]
    assert len(failed) == 1 and claim in failed[0]


def test_saved_bytes_are_claimed_too(run):
    status, text = run(entries(GOOD, saved={"lora": 1000, "nas-pc-lora": 1030}))
    assert status == 1 and re.search(r"bytes saved .* 1\.030 .* FAILS", text)


def test_what_was_not_measured_is_not_shown(run):
    status, text = run(entries({key: v for key, v in GOOD.items() if key[0] != "conv-lora"}))
    assert status == 1 and "not measured" in text and "FAILS" not in text
    assert run([])[0] == 1


def test_small_encoders_claim_nothing(run):
    slow = GOOD | {("nas-pc-lora", "weights"): 1.5}
    small = entries(slow, info=INFO | {"model": "vit_t"})
    status, text = run(entries(GOOD) + small)
    assert status == 0 and "## vit_t 256px x4" in text


def test_several_files_are_one(tmp_path, monkeypatch, capsys):
    found = entries(GOOD)
    for name, part in (("a", found[:3]), ("b", found[3:])):
        (tmp_path / name).write_text(json.dumps({"benchmarks": part}))
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "a"), str(tmp_path / "b")])
    assert report.main() == 0
    assert "holds" in capsys.readouterr().out


def test_nothing_is_timed_that_fails_its_gate(monkeypatch):
    monkeypatch.setattr(suite.models, "gate_training", lambda *_: "lora: wrong")
    with pytest.raises(RuntimeError, match="gate failed: lora: wrong"):
        suite.time_training(Setting("vit_t", 32, 1), ["lora"], [], rounds=1)


def test_the_papers_table_names_our_methods():
    assert set(report.PAPER) < set(METHODS)


def test_gate_takes_experts_that_no_window_chose(monkeypatch):
    """Four windows cannot choose eight experts; the others have no gradient."""
    tiny = ViT(width=32, depth=2, heads=2, global_blocks=(1,))
    monkeypatch.setitem(VITS, "vit_t", tiny)
    setting = Setting("vit_t", image_size=64, batch=4)
    base = models.untouched(setting)
    (contestant,) = models.contestants(setting, ["conv-lora"], base).values()
    assert any(not gradient.any() for gradient in contestant.gradients())
    # By that name it is held against another of its kind, whether or not it was compiled.
    assert models.gate_training({"conv-lora" + models.COMPILED: contestant}, base) is None
