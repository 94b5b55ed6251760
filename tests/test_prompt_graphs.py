"""The graphs for annotation tools compute what segment_anything's predictor does."""

import numpy as np
import pytest
import torch
import yaml
from conftest import SIZE, error_of
from segment_anything.utils.transforms import ResizeLongestSide

from naslora import inject
from naslora.sam.prompt_graphs import FRAME, ImageEncoder, export_prompts
from naslora.sam.prompts import build_predictor, build_promptable

onnxruntime = pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.usefixtures("tiny_sam")
SHAPE = (20, 40)  # which 32 and 1024 pixels divide without a rest
CLICKS = np.array([[30.0, 8.0], [5.0, 15.0]])
BOX = np.array([4.0, 2.0, 33.0, 14.0])


def ran(path, part, **inputs):
    session = onnxruntime.InferenceSession(str(path / f"{path.name}.{part}.onnx"))
    assert [entry.name for entry in session.get_inputs()] == list(inputs)
    values = {name: np.asarray(value, np.float32) for name, value in inputs.items()}
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(None, values), strict=True))


@torch.no_grad()
@pytest.mark.parametrize(
    "tool, kind, frame",
    [("x-anylabeling", "sam_med2d", SIZE), ("samexporter", "segment_anything", FRAME)],
)
def test_graphs_equal_the_predictor(tool, kind, frame, tmp_path):
    model = build_promptable("vit_t", SIZE, "none")
    path = tmp_path / "mine"
    export_prompts(model, tool, path)
    config = yaml.safe_load((path / "mine.yaml").read_text())
    assert config["type"] == kind and config["input_size"] == frame
    files = {config[f"{part}_model_path"] for part in ("encoder", "decoder")}
    assert files == {file.name for file in path.glob("*.onnx")}
    predictor = build_predictor(model)
    if tool == "samexporter":
        predictor.transform = ResizeLongestSide(SIZE)
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
    predictor.set_image(pixels)

    if tool == "samexporter":
        image = 255 * torch.rand(300, 700, 3)
        expected = ImageEncoder(model)(image).numpy()
    else:
        resized = predictor.transform.apply_image(pixels)
        image = model.preprocess(torch.from_numpy(resized).permute(2, 0, 1).float()[None])
        expected = predictor.features.numpy()
    found = ran(path, "encoder", input_image=image)["image_embeddings"]
    # float32 rounding over a few layers, with a margin; as in tests/test_export.py
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)

    sides = SHAPE[1:] * 2 if tool == "samexporter" else SHAPE[::-1]
    scale = frame / np.array(sides)
    empty = np.zeros((1, 1, frame // 4, frame // 4))

    def decoded(points, labels, mask, given):
        prompts = {"point_coords": (points * scale)[None], "point_labels": [labels]}
        prompts |= {"mask_input": mask, "has_mask_input": [given], "orig_im_size": SHAPE}
        return ran(path, "decoder", image_embeddings=predictor.features, **prompts)

    padded = (np.concatenate([CLICKS[:1], [[0, 0]]]), [1, -1])  # as most tools pass a click
    corners = (np.concatenate([BOX.reshape(2, 2), [[0, 0]]]), [2, 3, -1])
    for (points, labels), prompts, several in (
        ((CLICKS[:1], [1]), {"point_coords": CLICKS[:1], "point_labels": [1]}, True),
        (padded, {"point_coords": CLICKS[:1], "point_labels": [1]}, True),
        ((CLICKS, [1, 0]), {"point_coords": CLICKS, "point_labels": [1, 0]}, False),
        (corners, {"box": BOX}, False),
    ):
        prompts = {name: np.array(value) for name, value in prompts.items()}
        masks, scores, logits = predictor.predict(
            **prompts, multimask_output=several, return_logits=True
        )
        best = scores.argmax()
        found = decoded(points, labels, empty, 0)
        np.testing.assert_allclose(found["masks"][0, 0], masks[best], rtol=1e-4, atol=1e-4)
        assert found["iou_predictions"][0, 0] == pytest.approx(scores[best], rel=1e-4, abs=1e-4)
        assert found["low_res_masks"].shape == empty.shape
    if tool == "x-anylabeling":  # a mask is corrected by a click
        masks, _, _ = predictor.predict(
            CLICKS, np.array([1, 0]), mask_input=logits, multimask_output=False, return_logits=True
        )
        again = decoded(CLICKS, [1, 0], logits[None], 1)
        np.testing.assert_allclose(again["masks"][0], masks, rtol=1e-4, atol=1e-4)


def test_what_is_refused(tmp_path):
    model = build_promptable("vit_t", SIZE, "none")
    inject(model)
    assert "merge it first" in error_of(export_prompts, model, "samexporter", tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    plain = build_promptable("vit_t", SIZE, "none")
    assert "is not empty" in error_of(export_prompts, plain, "samexporter", tmp_path / "full")
