"""``bench``: the gate holds what is timed against the reference."""

import pytest
import torch

from bench import models, suite
from bench.models import Setting

TINY = Setting("vit_t", image_size=64, batch=4)


@pytest.fixture
def base(tiny_vit):
    return models.untouched(TINY)


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
