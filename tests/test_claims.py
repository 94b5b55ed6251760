"""The paper's claims on cost, held to counts: operations, operator calls, bytes kept.

No load on the machine changes them; seconds are measured in ``bench``.
"""

import statistics
from functools import partial

import pytest
import torch

from bench import counts, models
from bench.models import MERGED, STOCK, UNTOUCHED, Setting
from naslora.methods import merge, searches
from naslora.sam import vits as sam

# Two blocks as wide as a real encoder's are narrow: small, and yet a frozen product dwarfs a cell.
ENCODER = sam.ViT(width=384, depth=2, heads=6, global_blocks=(1,))
# The image is one window, so that no method computes padding.
SETTING = Setting("vit_t", image_size=224, batch=1)
FOUR_WINDOWS = Setting("vit_t", image_size=448, batch=1)
# A method of each kind, and those that the claims name.
TRAINED = ("decoder-only", "bitfit", "lora", "conv-lora", "nas-lora", "nas-pc-lora")
MERGED_INTO_WEIGHTS, NEVER_MERGED = ("lora", "vera", "nas-pc-lora"), ("conv-lora", "mona")
RUN = (*MERGED_INTO_WEIGHTS, *NEVER_MERGED)


@pytest.fixture(scope="module", autouse=True)
def encoder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sam.VITS, "vit_t", ENCODER)
        yield


@pytest.fixture(scope="module")
def base(encoder):
    return models.untouched(SETTING)


@pytest.fixture(scope="module")
def candidates(base):
    return models.candidates(SETTING, TRAINED, base)


def measure(candidate, step):
    """Counts of forward and backward, and bytes kept in between."""
    step()  # leaves unfrozen what the step trains
    counted = counts.count(lambda: candidate.loss().backward())
    candidate.model.zero_grad()
    saved = []
    # Conv-LoRA's bytes depend on the experts that its noisy gate selects.
    for seed in range(4 if candidate.method == "conv-lora" else 1):
        torch.manual_seed(seed)
        saved.append(counts.saved_bytes(candidate.loss, candidate.model))
    return counted, statistics.mean(saved)


@pytest.fixture(scope="module")
def steps(candidates):
    found = {(name, "weights"): measure(c, c.weight_step) for name, c in candidates.items()}
    searching = {name: c for name, c in candidates.items() if c.alpha}
    found |= {(name, "alpha"): measure(c, c.architecture_step) for name, c in searching.items()}
    return found


@pytest.fixture(scope="module")
def inference(base):
    images, _ = models.batch(SETTING)

    def merge_quickly(model, mode, calibration):
        """The other modes measure their error on the images, which changes no count."""
        merge(model, mode, calibration if mode == "calibrated" else calibration[:1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "merge", merge_quickly)
        merged = models.inference_models(RUN, base, SETTING)
    return {
        name: counts.count(partial(models.inference, model, SETTING, images))
        for name, model in merged.items()
    }


@pytest.mark.parametrize("method", ["nas-lora", "nas-pc-lora"])
def test_a_weight_step_costs_what_lora_costs(steps, method):
    (ours, ours_saved), (lora, lora_saved) = steps[method, "weights"], steps["lora", "weights"]
    # The cell adds 41 c^2 multiplications a token and pass to the 4 C^2 of a frozen product.
    assert lora.operations < ours.operations < 1.01 * lora.operations
    assert ours.calls < lora.calls
    assert ours_saved <= 1.001 * lora_saved  # alpha's mixture is a few bytes
    assert ours.peak <= 1.001 * lora.peak


def test_conv_lora_costs_more(steps):
    conv, conv_saved = steps["conv-lora", "weights"]
    ours, ours_saved = steps["nas-pc-lora", "weights"]
    floor, _ = steps["decoder-only", "weights"]
    # Its experts are launched one after the other, with their resizing, forward and backward.
    assert conv.calls - floor.calls > 2 * (ours.calls - floor.calls)
    assert conv.operations > ours.operations
    assert conv_saved > 1.01 * ours_saved and conv.peak > ours.peak


def test_fused_attention_keeps_and_needs_less_memory():
    """At 1024 x 1024 pixels, where the global blocks have 4096 tokens, less than half."""
    names = ["lora", "lora" + STOCK]
    found = models.candidates(FOUR_WINDOWS, names, models.untouched(FOUR_WINDOWS))
    (fused, saved), (stock, stock_saved) = (measure(c, c.weight_step) for c in found.values())
    assert saved < 0.8 * stock_saved and fused.peak < 0.8 * stock.peak
    assert fused.calls < stock.calls
    # Each block computes its logits once more, in the backward.
    assert stock.operations < fused.operations < 1.05 * stock.operations


@pytest.mark.parametrize("method", ["nas-lora", "nas-pc-lora"])
def test_an_architecture_step_computes_no_weight_gradient(candidates, steps, method):
    candidate = candidates[method]
    candidate.architecture_step()
    candidate.loss().backward()
    assert all(parameter.grad is None for parameter in candidate.weights)
    assert all(alpha.grad.abs().sum() > 0 for alpha in candidate.alpha)
    candidate.model.zero_grad()
    (alpha, alpha_saved), (weights, saved) = steps[method, "alpha"], steps[method, "weights"]
    # Without their gradients the decoder's products run backward once instead of twice.
    embedding, prompt = torch.zeros(SETTING.batch, 256, 14, 14), torch.zeros(1, 256, 1, 1)
    with torch.no_grad():
        positions = candidate.model.prompt_encoder.get_dense_pe()
        run = partial(candidate.model.mask_decoder, embedding, positions, prompt)
        decoder = counts.count(run).operations
    assert alpha.operations < weights.operations - 0.9 * decoder
    assert alpha.calls < weights.calls and alpha_saved < saved and alpha.peak < weights.peak


def test_inference(inference):
    """A merge into the weights leaves the untouched model; an exact one costs a percent at most."""
    untouched = inference[UNTOUCHED]
    for method in MERGED_INTO_WEIGHTS:
        merged = {n: c for n, c in inference.items() if n.startswith(method + MERGED)}
        if searches(method):
            for counted in (merged.pop(f"{method}{MERGED}exact"), inference[method]):
                assert counted.operations <= 1.01 * untouched.operations
        assert merged and all(counted == untouched for counted in merged.values()), method
    for method in NEVER_MERGED:
        assert inference[method].calls > untouched.calls
        assert inference[method].operations > untouched.operations
