"""``bench``: that its tables say what was measured, and that a claim which fails is no success."""

import json
import re
import sys

import pytest
import torch

from bench import models, report, suite
from bench.models import Setting
from naslora.sam.vits import VITS, ViT

INFO = {"model": "vit_b", "image_size": 256, "batch": 4, "precision": "no", "device": "cpu"}
TINY = Setting("vit_t", image_size=64, batch=4)
# Seconds of three rounds; the machine slows down meanwhile, for all alike.
ROUNDS = (1.0, 1.2, 2.0)
GOOD = {
    ("lora", "weights"): 1.0,
    ("lora stock attention", "weights"): 1.25,
    ("conv-lora", "weights"): 1.5,
    ("conv-lora stock attention", "weights"): 1.6,
    ("nas-pc-lora", "weights"): 0.95,
    ("nas-pc-lora", "architecture"): 0.9,
    ("nas-pc-lora", "epoch"): 1.13,
    ("untouched stock attention", "inference"): 0.5,
    ("untouched", "inference"): 0.4,
    ("nas-pc-lora merged exact", "inference"): 0.402,
    ("nas-pc-lora merged center", "inference"): 0.4,
    ("nas-pc-lora merged calibrated", "inference"): 0.398,
    ("conv-lora", "inference"): 0.5,
}
SAVED = {"lora": 1000, "lora stock attention": 1500, "nas-pc-lora": 1010}


def entries(seconds, saved=SAVED, info=INFO):
    found = []

    def add(group, candidate, about, data):
        about = info | {"candidate": candidate} | about
        stats = {"data": data}
        found.append({"group": group, "name": "x", "extra_info": about, "stats": stats})

    for (candidate, step), factor in seconds.items():
        data = [factor * seconds for seconds in ROUNDS]
        group = "inference" if step == "inference" else "training_step"
        add(group, candidate, {"step": step}, data)
    for candidate, size in saved.items():
        numbers = {"saved": size, "peak": 3 * size, "operations": 10**9, "calls": 1234}
        add("memory", candidate, numbers, [1.0])
    return found


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``python -m bench.report`` of several files: its exit status and what it printed."""

    def main(*files):
        paths = [tmp_path / f"measured{i}.json" for i in range(len(files))]
        for path, found in zip(paths, files, strict=True):
            path.write_text(json.dumps({"benchmarks": found}))
        monkeypatch.setattr(sys, "argv", ["report", *map(str, paths)])
        return report.main(), capsys.readouterr().out

    return main


def cells(text, first):
    return next(line for line in text.splitlines() if line.startswith(f"| {first} |")).split(" | ")


def test_all_claims_hold(run):
    found = entries(GOOD)
    status, text = run(found[:3], found[3:])
    assert status == 0 and "FAILS" not in text and "not measured" not in text
    conv = cells(text, "Conv-LoRA")
    assert conv[3] == "1.500 (1.500, 1.500)"  # drift cancels round by round
    assert conv[4] == "1.34"  # 1.64 / 1.22 iterations a second in the paper
    stock = cells(text, "Conv-LoRA, stock attention")
    assert stock[2] == "1.280 (1.280, 1.280)" and stock[4] == "1.34"  # of LoRA's 1.25
    ours = cells(text, "NAS-PC-LoRA")
    assert ours[1].startswith("1,140 (")  # the median round: 0.95 * 1.2 s
    assert ours[2].startswith("0.760 (") and ours[3].startswith("0.950 (")
    assert ours[6].startswith("0.947 (") and ours[7].startswith("1.130 (")
    assert ours[8].startswith("1.24")  # 25.2 / 20.3 minutes
    exact = cells(text, "NAS-PC-LoRA, merged exact")
    assert exact[2:4] == ["0.804 (0.804, 0.804)", "1.005 (1.005, 1.005)"]
    assert text.count("\n| LoRA, stock attention | 1.00") == 1


STOCK = ("lora stock attention", "weights")
FAILING = [
    ({STOCK: 1.04}, {}, "of LoRA, stock attention"),
    ({("nas-pc-lora", "architecture"): 0.96}, {}, "an architecture step"),
    ({("nas-pc-lora merged exact", "inference"): 0.41}, {}, "merged exact"),
    ({}, {"nas-pc-lora": 1030}, r"bytes saved .* LoRA \|.* 1\.030 "),
]


@pytest.mark.parametrize("changed, changed_saved, claim", FAILING)
def test_one_claim_fails(run, changed, changed_saved, claim):
    status, text = run(entries(GOOD | changed, SAVED | changed_saved))
    (failed,) = [line for line in text.splitlines() if "FAILS" in line]
    assert status == 1 and re.search(claim, failed)


def test_what_was_not_measured_is_not_shown(run):
    status, text = run(entries({key: v for key, v in GOOD.items() if key != STOCK}))
    assert status == 1 and "not measured" in text and "FAILS" not in text
    assert run([])[0] == 1


@pytest.mark.parametrize(
    "other", [{"model": "vit_t"}, {"image_size": 512}, {"precision": "fp16"}, {"device": "cuda"}]
)
def test_other_settings_claim_nothing(run, other):
    slow = GOOD | {("nas-pc-lora", "weights"): 1.5}
    status, text = run(entries(GOOD) + entries(slow, info=INFO | other))
    assert status == 0 and text.count("## vit_") == 2 and text.count("| Claim |") == 1


@pytest.fixture
def base(monkeypatch):
    monkeypatch.setitem(VITS, "vit_t", ViT(width=32, depth=2, heads=2, global_blocks=(1,)))
    return models.untouched(TINY)


def test_gate_takes_experts_that_no_window_chose(base):
    """Four windows cannot choose eight experts; the others have no gradient."""
    (candidate,) = models.candidates(TINY, ["conv-lora"], base).values()
    assert any(not gradient.any() for gradient in candidate.gradients())
    assert models.gate_training({"conv-lora": candidate}, base) is None


@pytest.mark.parametrize("name", ["lora", "nas-pc-lora", "nas-pc-lora stock attention"])
def test_gate_holds_the_fused_against_the_stock(base, name, monkeypatch):
    """The models of the gate share weight matrices, so a bias is changed."""
    found = models.candidates(TINY, [name], base)
    assert models.gate_training(found, base) is None
    attention = found[name].model.image_encoder.blocks[1].attn
    assert (type(attention) is type(base.image_encoder.blocks[1].attn)) == ("stock" in name)
    with torch.no_grad():
        attention.proj.bias += 0.1
    reason = models.gate_training(found, base)
    assert reason.startswith(f"{name}: ") and "differs from the reference" in reason

    images, _ = models.batch(TINY)
    merged = models.inference_models(["lora"], base, TINY)
    assert models.gate_inference(merged, TINY, images) is None
    with torch.no_grad():
        merged["untouched"].image_encoder.blocks[1].attn.proj.bias += 0.1
    assert "untouched differs from untouched stock" in models.gate_inference(merged, TINY, images)
    monkeypatch.setattr(suite.models, "gate_training", lambda *_: "lora: wrong")
    with pytest.raises(RuntimeError, match="gate failed: lora: wrong"):
        suite.time_training(Setting("vit_t", 32, 1), ["lora"], rounds=1)
