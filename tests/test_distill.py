"""Distillation: a plain ViT learns a teacher's embedding, and becomes a SAM that loads."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sam_families import PLAIN

from bench.experiments import distill as distillation
from bench.experiments import student as bench_student
from naslora.files import read_safetensors, write_tensors
from naslora.records import read_rows
from naslora.sam import prompts, vits
from naslora.sam.segmentation import build_model

pytestmark = pytest.mark.usefixtures("tiny_vit")

SIZE = 64
TEACHER = vits.ViT(width=48, depth=1, heads=2, global_blocks=(0,))


@pytest.fixture(autouse=True)
def small_teacher(monkeypatch):
    monkeypatch.setitem(vits.VITS, "vit_b", TEACHER)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Smooth colours, as in photographs: neighbouring tokens differ little."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((96, 72), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def settings(photographs, tmp_path):
    checkpoint = tmp_path / "teacher.safetensors"
    torch.manual_seed(1)
    write_tensors(checkpoint, prompts.PromptableSam("vit_b", SIZE).state_dict())
    values = {"teacher": "vit_b", "image_size": SIZE, "epochs": 3, "crops": 2, "held_out": 0.25}
    values |= {"batch_size": 4, "warm_up": 2, "averaging": 0.5}
    return distillation.Settings(checkpoint, photographs, **values)


def run(settings, output, resume=False):
    distillation.distill(settings, output, resume)
    return read_rows(output / distillation.HISTORY, distillation.Pass)


def test_the_student_learns_and_the_best_weights_are_a_sam(settings, tmp_path, capsys):
    settings = dataclasses.replace(settings, epochs=8)
    history = run(settings, tmp_path / "out")
    assert [one.epoch for one in history] == list(range(1, 9))
    assert history[-1].views == 8 * 2 * 9
    assert history[-1].loss < 0.9 * history[0].loss
    assert history[-1].similarity > history[0].similarity
    path = tmp_path / "out" / "vit_t.safetensors"
    tensors, given = read_safetensors(path), read_safetensors(settings.checkpoint)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    for name in given:
        if not name.startswith("image_encoder."):
            assert torch.equal(tensors[name], given[name].half()), name
    bench_student.main(tmp_path / "out")
    printed = capsys.readouterr().out
    shown = re.search(r"similarity of the embeddings \| 3 \| ([\d.]+) ± [\d.]+", printed)
    # It is in float32, and resizes photographs bilinearly.
    assert float(shown[1]) == pytest.approx(max(o.similarity for o in history), abs=0.02)
    assert "similarity of a constant" in printed


@pytest.mark.parametrize("part", ["student", "teacher"])
def test_an_encoder_of_today_learns_and_teaches(settings, tmp_path, monkeypatch, part):
    table, small = PLAIN["dinov3_s"]
    monkeypatch.setitem(table, "dinov3_s", small)
    if part == "teacher":
        torch.manual_seed(1)
        write_tensors(settings.checkpoint, build_model("dinov3_s", SIZE, 4).state_dict())
    settings = dataclasses.replace(settings, **{part: "dinov3_s"})
    history = run(settings, tmp_path / "out")
    assert history[-1].loss < history[0].loss
    build_model(settings.student, SIZE, 1, tmp_path / "out" / f"{settings.student}.safetensors")
