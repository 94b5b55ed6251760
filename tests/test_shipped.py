"""The weights in the package: which models start from them, and what happens if they are bad."""

import json
import shlex

import numpy as np
import pytest
import torch
from conftest import call, error_of, refusal, succeed
from run_configs import run_config

from naslora.files import read_metadata, read_safetensors, write_tensors
from naslora.sam import prompts, shipped, vits
from naslora.sam.segmentation import build_model
from naslora.training.resolve import resolve

SIZE = 32
TINY = vits.ViT(width=32, depth=2, heads=2, global_blocks=(1,), weights="tiny.safetensors")
TRAIN = shlex.split("--model vit_t --epochs 1 --search-start 0 --workers 0 --method lora")


@pytest.fixture
def weights(monkeypatch, tmp_path):
    """A package with a tiny ``vit_t``; the file of its weights."""
    monkeypatch.setitem(vits.VITS, "vit_t", TINY)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "package")
    path = tmp_path / "package" / TINY.weights
    torch.manual_seed(3)
    state = prompts.PromptableSam("vit_t", shipped.SHIPPED_SIZE).half().state_dict()
    write_tensors(path, state, {"similarity": "0.5"})
    return path


def encoder_of(*arguments):
    return build_model("vit_t", shipped.SHIPPED_SIZE, 1, *arguments).image_encoder.state_dict()


def test_a_model_starts_from_the_package_unless_the_user_says_otherwise(weights, tmp_path):
    stored = read_safetensors(weights)
    for name, value in encoder_of().items():
        assert torch.equal(value, stored[f"image_encoder.{name}"].float()), name
    fresh, again = encoder_of("none"), encoder_of(None)
    assert not torch.equal(fresh["neck.0.weight"], again["neck.0.weight"])
    other = tmp_path / "other.safetensors"
    write_tensors(other, {name: 2 * value.float() for name, value in stored.items()})
    assert torch.equal(encoder_of(other)["neck.0.weight"], 2 * again["neck.0.weight"])
    assert shipped.find_checkpoint("vit_b", None) is None


@pytest.mark.parametrize("given", [None, "none"])
def test_a_configuration_says_which_weights(weights, given):
    config = run_config(name="vit_t", checkpoint=given)
    stored = f"shipped {read_metadata(weights)['sha256'][:12]}"
    assert config.model.checkpoint == (given or stored) and resolve(config) == config
    found = shipped.find_checkpoint("vit_t", config.model.checkpoint)
    assert found == (None if given else weights)
    assert config.model.image_size == shipped.SHIPPED_SIZE
    line = error_of(run_config, name="vit_b")
    assert "model vit_b needs its weights: give --checkpoint hf:" in line
    large = run_config(name="vit_b", checkpoint="none").model
    assert (large.checkpoint, large.image_size) == ("none", 1024)


def test_training_says_so_if_positions_are_resized(weights, clean_data, tmp_path):
    output = ("--image-size", SIZE, "--output", tmp_path / "run")
    result = succeed("train", "--data", clean_data, *TRAIN, *output)
    warnings = [line for line in result.err.splitlines() if "position embeddings" in line]
    assert warnings == [
        "naslora: warning: the weights of vit_t were made for images of 256 pixels; their position "
        "embeddings are resized to 32 pixels"
    ]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["checkpoint"].startswith("shipped ")


@pytest.mark.parametrize("harm, words", [
    (lambda content: None, "the weights of vit_t are missing from the package: "),
    (lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
     "is damaged: it does not match its checksum"),
])  # fmt: skip
def test_a_bad_package_costs_one_line(weights, clean_data, tmp_path, harm, words):
    found = json.loads(call("info").out)["weights"]["vit_t"]
    assert found["file"] == str(weights) and found["similarity"] == "0.5"
    content = harm(weights.read_bytes())
    weights.unlink()
    if content:
        weights.write_bytes(content)
    output = ("--image-size", SIZE, "--output", tmp_path / "run")
    lines = refusal("train", "--data", clean_data, *TRAIN, *output).strip().splitlines()
    assert len(lines) == 1, lines
    assert words in lines[0] and str(weights) in lines[0]
    problem = json.loads(call("info").out)["weights"]["vit_t"].get("problem", "")
    assert ("does not exist" in problem) == (content is None)
    # Neither a user's own weights nor random ones need the package's.
    build_model("vit_t", SIZE, checkpoint="none")


def test_a_run_from_other_weights_is_refused(weights):
    config = run_config(name="vit_t")
    state = read_safetensors(weights)
    write_tensors(weights, {name: 2 * value for name, value in state.items()})
    assert "in another version of naslora (shipped " in error_of(resolve, config)


def test_prompts_are_in_pixels_of_the_image(weights):
    predictor = prompts.build_predictor("vit_t", SIZE)
    image = np.random.default_rng(0).integers(0, 256, (20, 50, 3), dtype=np.uint8)
    predictor.set_image(image)
    assert predictor.features.shape == (1, 256, SIZE // 16, SIZE // 16)
    moved = predictor.transform.apply_coords(np.array([[25.0, 5.0]]), (20, 50))
    assert moved.tolist() == [[SIZE / 2, SIZE / 4]]
    masks, scores, logits = predictor.predict(box=np.array([10, 4, 30, 16]))
    assert masks.shape == (3, 20, 50) and scores.shape == (3,) and logits.shape == (3, 8, 8)
    line = error_of(predictor.predict, box=np.array([10, 4, 60, 16]))
    assert "the point (60, 16) is outside of the image of 50x20" in line
    line = error_of(prompts.build_predictor, "vit_b", SIZE)
    assert "a predictor for vit_b needs pre-trained weights" in line


def test_the_shipped_weights_segment_what_a_box_names():
    """A bright disc on a dark ground, at two places: the mask follows the box."""
    path = shipped.shipped_file("vit_t")
    assert path.stat().st_size <= 16_000_000  # so that they fit into the package
    assert {tensor.dtype for tensor in read_safetensors(path).values()} == {torch.float16}
    assert read_metadata(path)["image_size"] == str(shipped.SHIPPED_SIZE)
    predictor = prompts.build_predictor()
    rows, columns = np.mgrid[:200, :300]
    noise = np.random.default_rng(0).integers(0, 30, (200, 300, 3))
    for x, y in ((90, 70), (200, 120)):
        disc = np.hypot(rows - y, columns - x) < 45
        predictor.set_image((noise + 40 + 150 * disc[..., None]).astype(np.uint8))
        box = np.array([x - 45, y - 45, x + 45, y + 45])
        masks, _, _ = predictor.predict(box=box, multimask_output=False)
        # The box itself has an IoU of 0.79 with the disc.
        assert (masks[0] & disc).sum() / (masks[0] | disc).sum() > 0.82
