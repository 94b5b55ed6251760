"""Distillation: a plain ViT learns a teacher's embedding, and becomes a SAM that loads."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sam_families import PLAIN
from torch.testing import assert_close

from bench.experiments import crops as images
from bench.experiments import distill as distillation
from bench.experiments import student as bench_student
from naslora.data.cache import Cache
from naslora.data.images import Sample
from naslora.errors import UserError
from naslora.files import read_safetensors, write_tensors
from naslora.records import read_rows
from naslora.sam import promptable, vits
from naslora.sam.export import Embedding
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
    write_tensors(checkpoint, promptable.PromptableSam("vit_b", SIZE).state_dict())
    return distillation.Settings(
        checkpoint,
        photographs,
        teacher="vit_b",
        image_size=SIZE,
        epochs=3,
        crops=2,
        held_out=0.25,
        batch_size=4,
        warm_up=2,
        averaging=0.5,
    )


def run(settings, output, resume=False):
    distillation.distill(settings, output, resume)
    return read_rows(output / distillation.HISTORY, distillation.Pass)


# --- The images ---


def test_crops_repeat_after_their_count(photographs, tmp_path):
    samples = [Sample(path, None, path.name) for path in sorted(photographs.iterdir())]
    crops = images.Crops(samples, SIZE, 2, 0.5, 0, Cache(tmp_path / "cache"))
    seen = []
    for epoch in range(3):
        crops.set_epoch(epoch)
        seen.append([crops[i] for i in range(len(crops))])
    assert [item["index"] for item in seen[1]] == list(range(len(crops), 2 * len(crops)))
    for first, second, third in zip(*seen, strict=True):
        assert first["image"].shape == (3, SIZE, SIZE)
        assert torch.equal(first["image"], third["image"]) and first["index"] == third["index"]
        assert not torch.equal(first["image"], second["image"])
    boxes = np.array([crops._box(np.random.default_rng(i)) for i in range(500)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= crops.image_size).all() and (left + width <= crops.image_size).all()
    area = height * width / crops.image_size**2
    # A side is rounded to a pixel of 88, and a side that does not fit is cut: at 4:3 and the whole
    # area the longer one is 1.155, so 0.866 of the area is left.
    assert area.min() > 0.48 and area.max() <= 1 and 0.65 < area.mean() < 0.8


def test_held_out_photographs_are_not_trained_on(settings, make_data, tmp_path):
    data = make_data(tmp_path / "data", train=3, val=2, test=2)
    train, held_out = images.find_images(settings.photographs, 0.25, 2, [data], seed=0)
    assert len(held_out) == 3 and len(train) == 2 * 9 + 3
    assert not {sample.image for sample in held_out} & {sample.image for sample in train}
    others = {sample.image.name for sample in train if sample.image.parent.parent == data}
    assert others == {"train0.png", "train1.png", "train2.png"}


# --- Teacher and student ---


def test_the_teacher_sees_a_crop_once(tmp_path):
    calls = []

    def teacher(images):
        calls.append(len(images))
        return images.mean((1, 2, 3)).reshape(-1, 1, 1, 1).expand(-1, 256, 4, 4)

    targets = images.Targets(tmp_path, teacher, count=5, grid=4)
    batch, indices = torch.rand(2, 3, SIZE, SIZE), torch.tensor([3, 1])
    first = targets.of(batch, indices)
    again = images.Targets(tmp_path, teacher, count=5, grid=4).of(batch, indices)
    assert calls == [2] and torch.equal(first, again)
    assert_close(first, teacher(batch), atol=1e-3, rtol=1e-3)  # float16 on disk


def test_teacher_and_student(settings):
    """The student starts with the teacher's last layers; a perfect one has no loss."""
    teacher = build_model("vit_b", SIZE, checkpoint=settings.checkpoint)
    given = teacher.image_encoder.neck
    own = distillation.build_student(settings, teacher).image_encoder.neck
    assert torch.equal(own[2].weight, given[2].weight.float())
    assert torch.equal(own[3].weight, given[3].weight)
    assert own[0].weight.shape != given[0].weight.shape
    given.append(torch.nn.AvgPool2d(2))
    with pytest.raises(UserError, match=r"teacher vit_b has the shape \(256, 2, 2\), that of stud"):
        distillation.build_student(settings, teacher)
    target = torch.randn(2, 256, 3, 3)
    assert float(distillation.distance(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(distillation.similarity(2 * target, target)) == pytest.approx(1, abs=1e-6)
    assert float(distillation.distance(-target, target)) > 2  # 1 - (-1), and the smooth L1


# --- Training ---


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
    assert score(settings, path) == pytest.approx(max(o.similarity for o in history), abs=2e-3)
    bench_student.main(tmp_path / "out")
    printed = capsys.readouterr().out
    shown = re.search(r"similarity of the embeddings \| 3 \| ([\d.]+) ± [\d.]+", printed)
    # It is in float32, and resizes photographs bilinearly.
    assert float(shown[1]) == pytest.approx(score(settings, path), abs=0.02)
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


@torch.no_grad()
def score(settings, path) -> float:
    """The similarity of two models on the held-out photographs, computed in float32."""
    models = (
        build_model(settings.teacher, SIZE, checkpoint=settings.checkpoint),
        build_model("vit_t", SIZE, checkpoint=path),
    )
    _, held_out = images.find_images(settings.photographs, settings.held_out, 1, [], settings.seed)
    found = []
    for sample in held_out:
        pixels = Image.open(sample.image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None] / 255
        teacher, student = (Embedding(model.eval())(image) for model in models)
        norms = teacher.norm(dim=1) * student.norm(dim=1)
        found.append(float(((teacher * student).sum(1) / norms).mean()))
    return sum(found) / len(found)


def test_an_interrupted_distillation_continues_as_if_it_was_not(settings, tmp_path, monkeypatch):
    whole = run(settings, tmp_path / "whole")
    run_pass, broken = distillation.Distillation.run_pass, tmp_path / "broken"

    def once(self):
        if self.history:
            raise KeyboardInterrupt
        return run_pass(self)

    monkeypatch.setattr(distillation.Distillation, "run_pass", once)
    with pytest.raises(KeyboardInterrupt):
        run(settings, broken)
    monkeypatch.undo()
    monkeypatch.setitem(vits.VITS, "vit_b", TEACHER)
    resumed = run(settings, broken, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    weights = (read_safetensors(out / "vit_t.safetensors") for out in (tmp_path / "whole", broken))
    one, other = weights
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_refused(settings, tmp_path):
    settings, output = dataclasses.replace(settings, epochs=1), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    run(settings, output)
    for change, resume, words in (
        ({}, False, "is not empty; choose another --output, or add --resume"),
        ({"seed": 1}, True, "was started with other settings .it has seed 0.; resume with the sa"),
        ({"photographs": tmp_path / "empty"}, False, "no images in .*empty; give another --phot"),
    ):
        other = tmp_path / "other" if "photographs" in change else output
        with pytest.raises(UserError, match=words):
            run(dataclasses.replace(settings, **change), other, resume)
    path = output / distillation.LAST
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        run(settings, output, resume=True)
