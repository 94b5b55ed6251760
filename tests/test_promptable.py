"""SAM that keeps its prompts: training, scores by clicks, and that it stays SAM."""

import numpy as np
import pytest
import torch
from conftest import SIZE, error_of
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from naslora.sam import prompts
from naslora.sam.promptable import PROMPTED, PromptableSam, build_promptable

pytestmark = pytest.mark.usefixtures("tiny_sam")


def test_it_is_segment_anything(tmp_path):
    model = build_promptable("vit_t", SIZE, "none")
    assert isinstance(model, Sam)
    images = torch.rand(2, 3, SIZE, SIZE)
    predictor = prompts.build_predictor(model)
    assert isinstance(predictor, SamPredictor)
    pixels = (255 * images[0]).round().byte()
    predictor.set_image(pixels.permute(1, 2, 0).numpy())
    ours = model(pixels[None] / 255)
    assert torch.allclose(predictor.features, ours, atol=1e-5)
    masks, _, _ = predictor.predict(np.array([[5, 9]]), np.array([1]))
    assert masks.shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("name", ["sam_hq_b", "sam2.1_t"])
def test_models_with_another_decoder_are_refused(name):
    message = error_of(PromptableSam, name, 64)
    assert (
        message.startswith(f"prompts work with {', '.join(PROMPTED)}") and "of its own" in message
    )
