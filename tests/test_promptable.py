"""SAM that keeps its prompts: objects, training, scores by clicks, and that it stays SAM."""

import json
from pathlib import Path
from unittest import mock

import msgspec
import numpy as np
import pytest
import torch
from adapted_models import original_sam
from conftest import SIZE, TRAIN, call, refusal, succeed, write_pairs
from PIL import Image
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator, SamPredictor
from segment_anything.modeling import ImageEncoderViT, TwoWayTransformer

from bench.families import transformers_model
from naslora.data.masks import IGNORED
from naslora.data.objects import choose_objects, components, count_objects, numbered
from naslora.data.regions import Drawing, Instance, draw_objects
from naslora.files import read_safetensors
from naslora.sam import prompts
from naslora.sam.encoders import build_image_encoder
from naslora.sam.prompts import build_promptable
from naslora.trained import load_model
from naslora.training import trainer
from naslora.training.clicks import _next_clicks
from naslora.training.interactive import InteractiveLoss, Objects, Prompts, objects_of

pytestmark = pytest.mark.usefixtures("tiny_sam")


@pytest.fixture(scope="module")
def run(tiny_sam, tmp_path_factory):
    """A finished run on squares, two in each image; tests only read it."""
    root = tmp_path_factory.mktemp("promptable")
    write_pairs(root / "data", squares, train=4, val=2, test=2)
    succeed(*command_of(root / "data", root / "run"))
    return root / "run"


def command_of(data: Path, output: Path) -> tuple:
    command = ("train", "--task", "promptable", "--data", data, *TRAIN, "--output", output)
    return (*command, "--clicks", "3", "--train-prompt-encoder")


def squares(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image with two bright squares, and its mask."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for left in (2, SIZE // 2 + 2):
        top = rng.integers(2, SIZE - 12)
        mask[top : top + 9, left : left + 9] = 1
    return 180 * mask[..., None] + rng.integers(0, 50, (SIZE, SIZE, 3)), 255 * mask


# --- Objects ---


def test_components_are_numbered_by_class_and_no_object_is_ignored():
    labels = np.array([[1, 0, 2, IGNORED], [0, 1, 2, 0], [3, 0, 0, 1]])
    expected = [[1, 0, 3, IGNORED], [0, 1, 3, 0], [4, 0, 0, 2]]
    assert components(labels).tolist() == expected
    many = numbered(np.arange(301).reshape(7, 43))
    assert IGNORED not in many and len(np.unique(many)) == 301 and many.max() == 301


def test_objects_are_drawn_anew_in_each_epoch_and_are_not_too_small():
    numbers = torch.zeros(64, 64, dtype=torch.int64)
    for k in range(9):
        numbers[7 * k : 7 * k + 4, :4] = k + 1
    numbers[0, 0:1], numbers[:, 60] = 0, IGNORED  # the first has 15 pixels
    assert count_objects(numbers.numpy())[:2] == (8, 1)
    drawn = [choose_objects(numbers, 3, 0, epoch, 5) for epoch in range(4)]
    assert torch.equal(drawn[0], choose_objects(numbers, 3, 0, 0, 5))
    assert any(not torch.equal(drawn[0], other) for other in drawn)
    for chosen in drawn:
        assert chosen.unique().tolist() == [0, 1, 2, 3, IGNORED]
        assert not chosen[:4, :4].any() and (chosen[:, 60] == IGNORED).all()


def test_coco_instances_overlap_and_crowds_are_left_out():
    def square(x, y, side, **more):
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        return Instance(0, 0, [list(map(float, corners))], **more)

    parts = [(1, square(2, 2, 4)), (2, square(0, 0, 10)), (1, square(12, 12, 3, iscrowd=1))]
    drawn = draw_objects(msgspec.json.encode(Drawing(16, 16, [*parts, (0, parts[0][1])])), "a")
    assert drawn.overlapping and drawn.crowds == 1
    assert drawn.numbers[3, 3] == 2 and drawn.numbers[8, 8] == 1 and drawn.numbers.max() == 2


# --- The model ---


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("three", [False, True])
def test_objects_of_several_images_are_decoded_as_sam_decodes_one(given, three):
    torch.manual_seed(0)
    model = build_promptable("vit_t", SIZE, "none")
    model.mask_decoder.transformer = TwoWayTransformer(2, 256, 8, 64)  # a second layer adds
    embeddings, owners = torch.randn(2, 256, 2, 2), torch.tensor([0, 1, 1])
    points, labels = SIZE * torch.rand(3, 2, 2), torch.tensor([[1, -1], [0, -1], [1, -1]])
    low = torch.randn(3, 1, 8, 8) if given else None
    wanted = slice(1, 4) if three else slice(0, 1)
    ours = model.decode(embeddings, owners, points, labels, low, wanted)
    for i, owner in enumerate(owners):
        sparse, dense = model.prompt_encoder(
            (points[i : i + 1, :1], labels[i : i + 1, :1]), None, None if low is None else low[[i]]
        )
        theirs = model.mask_decoder(
            embeddings[owner][None], model.prompt_encoder.get_dense_pe(), sparse, dense, three
        )
        for own, other in zip(ours, theirs, strict=True):
            # the order of products differs; float32
            torch.testing.assert_close(own[i : i + 1], other, atol=2e-5, rtol=1e-5)


# --- Training ---


@pytest.mark.parametrize("corrections", [0, 2])
def test_the_loss_trains_decoder_and_encoder_and_ignores_what_does_not_count(
    corrections, monkeypatch
):
    monkeypatch.setattr(InteractiveLoss, "corrections", lambda _: corrections)
    torch.manual_seed(0)
    model = build_promptable("vit_t", SIZE, "none")
    embeddings = torch.randn(3, 256, 2, 2, requires_grad=True)
    numbers = torch.zeros(3, SIZE, SIZE, dtype=torch.int64)
    numbers[0, 4:14, 4:14], numbers[0, 20:28, 2:14], numbers[1, 5:25, 5:25] = 1, 2, 1
    numbers[1, :, 28:] = IGNORED
    loss = InteractiveLoss(model, 3)(embeddings, numbers)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert embeddings.grad[0].any() and embeddings.grad[1].any() and not embeddings.grad[2].any()
    head = model.mask_decoder.iou_prediction_head.layers[0].weight
    assert head.grad.any() and all(p.grad is None for p in model.prompt_encoder.parameters())
    empty = InteractiveLoss(model, 3)(embeddings, torch.zeros_like(numbers))
    assert empty == 0 and empty.requires_grad
    found = objects_of(numbers)
    assert found.owners.tolist() == [0, 0, 1] and found.masks.sum((1, 2)).tolist() == [100, 96, 400]


def test_a_run_has_scores_by_clicks_beside_the_untouched_model(run):
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("test", "untouched"):
        scores = metrics[name]
        assert len(scores["click_iou"]) == 8 and scores["iou"] == scores["click_iou"][0]
        assert set(scores["metrics"]) >= {"IoU, 3 clicks", "Dice, box", "NoC 85%", "NoC 90%"}
        assert scores["metrics"]["IoU, 1 click, best of 3"] >= scores["iou"]
    assert metrics["untouched"] != metrics["test"] and set(metrics["test_merged"]) >= {"center"}
    assert any("prompt_encoder" in key for key in read_safetensors(next(run.glob("adapter/*.s*"))))


def test_a_run_resumes_to_the_same_bits(run, tmp_path):
    command = command_of(run.parent / "data", tmp_path / "run")
    stop = mock.patch.object(trainer, "log", side_effect=ArithmeticError)
    with stop, pytest.raises(ArithmeticError):
        call(*command)
    succeed(*command, "--resume")
    ours, theirs = (read_safetensors(next(p.glob("adapter/*.s*"))) for p in (run, tmp_path / "run"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# --- Scores ---


def test_clicks_are_the_centres_of_the_largest_errors():
    """The masks are what a prediction would have to be; the logits are made from them."""
    truth, predicted = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    truth[2:9, 3:10] = True  # 7 x 7, its centre is (6, 5)
    none = Prompts(torch.zeros(1, 1, 2), torch.full((1, 1), -1))
    objects = Objects(torch.tensor([0]), torch.tensor(truth)[None], torch.ones(1, 20, 20).bool())

    def click(mask, before=none):
        points, labels = _next_clicks(torch.tensor(mask)[None].float() - 0.5, objects, before)
        return *points[0].tolist(), int(labels[0])

    assert click(predicted) == (6, 5, 1)
    predicted[11:20, 11:20] = True  # 9 x 9 too much at the border, beside what is missed
    assert click(predicted) == (15, 15, 0)
    once = none.plus(torch.tensor([[15.0, 15.0]]), torch.tensor([0]))
    assert click(predicted, once)[:2] != (15, 15)
    assert click(truth) == (0, 0, -1)  # nothing is wrong


# --- It stays SAM ---


def test_the_exported_model_is_sam(run, tmp_path):
    merged, file = tmp_path / "merged", tmp_path / "sam.safetensors"
    succeed("merge", run, "--mode", "center", "--output", merged)
    succeed("export", merged, "--format", "safetensors", "--output", file)
    model, _ = load_model(merged)
    encoder = build_image_encoder("vit_t", SIZE)
    assert type(encoder) is ImageEncoderViT
    theirs = original_sam(encoder, SIZE, depth=1, mlp_dim=64)  # as ``tiny_sam`` has it
    theirs.load_state_dict(read_safetensors(file))
    image = np.asarray(Image.open(run.parent / "data/images/test0.png"))
    found = []
    for predictor in (SamPredictor(theirs), prompts.build_predictor(model)):
        predictor.set_image(image)
        point = {"point_coords": np.array([[6, 8]]), "point_labels": np.array([1])}
        found.append(predictor.predict(**point, return_logits=True))
    for own, other in zip(*found, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-4)
    options = {"points_per_side": 2, "pred_iou_thresh": -9, "stability_score_thresh": 0}
    folder = tmp_path / "huggingface"
    succeed("export", merged, "--format", "huggingface", "--output", folder)
    hugging = hugging_face_sam()
    hugging.load_state_dict(read_safetensors(folder / "model.safetensors"))
    pixels = torch.tensor(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        out = hugging(model.preprocess(pixels), torch.tensor([[[[6.0, 8.0]]]]))
        points = torch.tensor([[[6.0, 8.0], [0.0, 0.0]]]), torch.tensor([[1, -1]])
        masks, scores = model.decode(
            model(pixels / 255), torch.tensor([0]), *points, None, slice(1, 4)
        )
    torch.testing.assert_close(out.pred_masks[0], masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.iou_scores[0], scores, atol=1e-4, rtol=1e-4)
    masks = [SamAutomaticMaskGenerator(sam, **options).generate(image) for sam in (theirs, model)]
    assert len(masks[0]) == len(masks[1]) > 0
    for own, other in zip(*masks, strict=True):
        assert (own["segmentation"] == other["segmentation"]).all()
    for command in (("predict", file, run.parent / "data/images"), ("export", merged)):
        assert "takes prompts" in refusal(*command, "--output", tmp_path / "sam.onnx")


def hugging_face_sam():
    """SAM of transformers, of the size of the tiny model."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_dim": 128}
    vision |= {"image_size": SIZE, "global_attn_indexes": [1]}
    parts = {"vision_config": vision, "prompt_encoder_config": {"image_size": SIZE}}
    parts["mask_decoder_config"] = {"num_hidden_layers": 1, "mlp_dim": 64}
    return transformers_model("SamModel", **parts).eval()


# --- What is refused, and what is said ---


def test_commands_that_do_not_fit_cost_a_line(run, tmp_path):
    output = ("--output", tmp_path / "o")
    assert "--task semantic" in refusal("evaluate", "--resolution", "tiles", run)
    assert "--task semantic" in refusal("analyse", run, *output)
    data = numbers_of(run.parent / "data", tmp_path)
    command = ("train", "--task", "promptable", "--data", data, *TRAIN, *output)
    assert "set --objects numbers if each object" in refusal(*command)
    assert not (tmp_path / "o" / "config.json").exists()


def numbers_of(data: Path, folder: Path) -> Path:
    """The same data with label images of 16 bits."""
    for path in (data / "masks").iterdir():
        parts, _ = ndimage.label(np.asarray(Image.open(path)))
        Image.fromarray(np.array([0, 7, 300], np.uint16)[parts]).save(folder / path.name)
    for split in ("train", "val", "test"):
        text = (data / f"{split}.csv").read_text()
        text = text.replace("images/", f"{data}/images/").replace("masks/", f"{folder}/")
        (folder / f"{split}.csv").write_text(text)
    return folder


def test_label_images_of_16_bits_and_what_is_left_out(run, tmp_path):
    data = numbers_of(run.parent / "data", tmp_path)
    Image.new("I;16", (SIZE, SIZE)).save(tmp_path / "empty.png")
    small = np.zeros((SIZE, SIZE), np.uint16)
    small[0, 0], small[9:20, 9:20] = 9, 8
    Image.fromarray(small).save(tmp_path / "small.png")
    rows = (data / "train.csv").read_text().splitlines()
    rows[1] = rows[1].split(",")[0] + ",empty.png"
    rows[2] = rows[2].split(",")[0] + ",small.png"
    (data / "train.csv").write_text("\n".join(rows) + "\n")
    result = succeed(
        *("train", "--task", "promptable", "--objects", "numbers", "--data", data, *TRAIN),
        *("--epochs", "1", "--objects-per-image", "1", "--cache", tmp_path / "cache"),
        *("--output", tmp_path / "run"),
    )
    for line in (
        "1 of 8 images hold no object",
        "1 of 14 objects are left out: they have fewer than 16 pixels at 32 x 32",
        "an image has up to 2 objects; 1 of each are scored",
    ):
        assert line in result.err, result.err
    for row in ("val", "test"):
        lines = (data / f"{row}.csv").read_text().splitlines()
        lines[1:] = [line.split(",")[0] + ",empty.png" for line in lines[1:]]
        (data / f"{row}.csv").write_text("\n".join(lines) + "\n")
    assert "the split 'test' holds no object" in refusal("evaluate", tmp_path / "run")
