"""Calibrated merging, against least squares that numpy solves, and against a slow pass by hand."""

import itertools
import json
import warnings
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from adapted_models import (
    adapted_encoder,
    build_encoder,
    images,
    outputs,
    randomize,
    relative,
    smooth_images,
    snapshot,
    tokens,
)
from torch import nn
from torch.testing import assert_close

from naslora import NASLoRAConfig, UserError, inject, merge, unmerge
from naslora.adapter.merging import calibration
from naslora.adapter.merging.calibration import FOLDS, PENALTIES, Moments, fit


def ridge(x, y, prior, penalty, bias=True):
    """(G, g) by numpy's lstsq. The penalty is written as further rows with zero targets.

    Minimises mean |y - G x - g|^2 + penalty * v * |G - prior|^2, v the mean variance of x.
    """
    e = y - x @ prior.T
    mean_x, mean_e = (v.mean(0) if bias else np.zeros(v.shape[1]) for v in (x, e))
    centred = (x - mean_x) / len(x) ** 0.5
    weight = (penalty * (centred**2).sum() / x.shape[1]) ** 0.5
    rows = np.concatenate([centred, weight * np.eye(x.shape[1])])
    values = np.concatenate([(e - mean_e) / len(x) ** 0.5, np.zeros((x.shape[1], y.shape[1]))])
    difference = np.linalg.lstsq(rows, values, rcond=None)[0].T
    return prior + difference, mean_e - difference @ mean_x


def problem(tokens=400, c_in=12, rank=3, seed=0):
    """Inputs off centre and unevenly spread, noisy targets, a prior and a decoder."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, c_in)) * np.linspace(0.1, 2, c_in) + rng.normal(size=c_in)
    y = x @ rng.normal(size=(c_in, rank)) + 0.5 + 0.3 * rng.normal(size=(tokens, rank))
    return x, y, rng.normal(size=(rank, c_in)), rng.normal(size=(7, rank))


def fitted(x, y, prior, decoder, bias=True):
    moments = Moments(len(x), x.shape[1], y.shape[1], torch.device("cpu"))
    for part in np.array_split(np.arange(len(x)), 3):  # batches that do not end where folds do
        moments.add(torch.from_numpy(x[part]), torch.from_numpy(y[part]))
    return fit(moments, torch.from_numpy(prior), torch.from_numpy(decoder), bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [400, 14])
def test_the_fit_is_the_ridge_regression_that_held_out_tokens_choose(count, bias):
    """Every penalty on every fold, by hand. The best penalty depends on the number of tokens."""
    x, y, prior, decoder = problem(count)
    result = fitted(x, y, prior, decoder, bias)
    bounds = [round(count * fold / FOLDS) for fold in range(FOLDS + 1)]
    errors = []
    for penalty in PENALTIES:
        total = 0.0
        for first, last in itertools.pairwise(bounds):
            held_out = np.arange(first, last)
            rest = np.setdiff1d(np.arange(count), held_out)
            linear_map, offset = ridge(x[rest], y[rest], prior, penalty, bias)
            residual = y[held_out] - x[held_out] @ linear_map.T - offset
            total += ((residual @ decoder.T) ** 2).sum()
        errors.append((total / ((y @ decoder.T) ** 2).sum()) ** 0.5)
    assert result.regularisation == PENALTIES[int(np.argmin(errors))]
    assert result.held_out_error == pytest.approx(min(errors), rel=1e-6)
    linear_map, offset = ridge(x, y, prior, result.regularisation, bias)
    assert result.tokens == len(x)
    # float64; the normal equations square a condition number of some 1e3.
    assert_close(result.linear_map.numpy(), linear_map, rtol=1e-8, atol=1e-9)
    assert_close(result.offset.numpy(), offset, rtol=1e-8, atol=1e-9)
    assert bias or not result.offset.any()


class TwoLayers(nn.Module):
    """Two adapted layers, registered in the reverse of the order in which they are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.second = nn.Linear(10, 6)
        self.first = nn.Linear(8, 10)
        inject(self, NASLoRAConfig(target="first|second"))
        randomize(self)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


@torch.no_grad()
def test_layers_are_fitted_in_turn_on_what_the_merged_ones_give():
    model = TwoLayers().eval()
    batches = [tokens(2, 5, 6, 8, seed=seed) for seed in range(3)]
    first, second = model.first, model.second
    # By hand. The targets come from the unmerged model.
    x = torch.cat(batches)
    hidden = F.gelu(first(x))
    targets = [first.mixed(x), second.mixed(hidden)]
    report = merge(model, "calibrated", batches)
    errors = {error.name: error for error in report.layers}
    inputs = x
    for name, layer, y in (("first", first, targets[0]), ("second", second, targets[1])):
        given, wanted = (v.double().flatten(0, -2).numpy() for v in (inputs, y))
        prior, penalty = layer.pointwise().numpy(), errors[name].regularisation
        linear_map, offset = ridge(given, wanted, prior, penalty)
        decoder = layer.scaling * layer.lora_B.double().numpy()
        weight = torch.from_numpy(layer.base.weight.double().numpy() + decoder @ linear_map).float()
        bias = torch.from_numpy(layer.base.bias.double().numpy() + decoder @ offset).float()
        merged = getattr(model, name)
        assert_close(merged.weight, weight, rtol=1e-5, atol=1e-6)
        assert_close(merged.bias, bias, rtol=1e-5, atol=1e-6)
        assert errors[name].tokens == 3 * 2 * 5 * 6
        inputs = F.gelu(F.linear(inputs, weight, bias))


class Block(nn.Module):
    """A block that counts its calls, and adds in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.calls = nn.Linear(8, 10), nn.Linear(10, 8), 0

    def forward(self, x):
        self.calls += 1
        return x.add_(self.second(F.gelu(self.first(x))))


class Blocks(nn.Module):
    """Three blocks; ``around`` leads past the second one, too."""

    def __init__(self, around):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.around = nn.Linear(8, 8), around
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        inject(self, NASLoRAConfig(target="first|second"))
        randomize(self)

    def forward(self, x):
        first = self.blocks[0](self.stem(x))
        second = self.blocks[1](first.clone())
        return self.blocks[2](second + first if self.around else second)


@torch.no_grad()
@pytest.mark.parametrize("around", [False, True])
def test_what_lies_before_a_block_is_computed_once(around, monkeypatch):
    """With equal results, also where a connection leads around the block before."""
    batches = [tokens(2, 5, 6, 8, seed=seed) for seed in range(3)]
    states, calls = [], []
    for units in (calibration._units, lambda *_: iter(())):
        monkeypatch.setattr(calibration, "_units", units)
        model = Blocks(around).eval()
        merge(model, "calibrated", batches)
        states.append(model.state_dict())
        calls.append([block.calls / len(batches) for block in model.blocks])
        assert model(batches[0]).isfinite().all()
    assert_close(states[0], states[1], rtol=0, atol=0)
    # In the unmerged model, for its own layers, for those of later blocks, and for the errors.
    assert calls[1] == [1 + 2 + 4 + 1, 1 + 2 + 2 + 1, 1 + 2 + 1]
    # A block is computed once more for the later ones. The third one meets NaN, and starts again.
    assert calls[0] == ([5 + 2, 5 + 2, 5] if around else [5, 5, 4])


@torch.no_grad()
def test_it_loses_less_than_center_on_new_images():
    model = adapted_encoder()
    new = smooth_images(4, seed=99)
    expected, errors = model(new), {}
    for mode in ("center", "calibrated"):
        report = merge(model, mode, [smooth_images(4, seed) for seed in range(4)])
        errors[mode] = relative(model(new) - expected, expected)
        unmerge(model)
    assert errors["calibrated"] < 0.85 * errors["center"]
    assert all(0 < error.held_out_error < 1 for error in report.layers)
    assert json.loads(json.dumps(asdict(report)))["layers"][0]["tokens"] == 16 * 36
    assert "on held-out tokens, of at least 256 a layer" in str(report)


def test_the_result_loads_strictly_into_an_unmodified_model():
    """With batches from any iterable, and from a preset that is not linear."""
    batches = [images(seed) for seed in range(8)]
    loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=2)
    reports = []
    for preset, source in (("linear", batches), ("linear", loader), ("paper", iter(batches))):
        model, original = adapted_encoder(preset=preset), build_encoder()
        reports.append(merge(model, "calibrated", source))
        assert list(model.state_dict()) == list(original.state_dict())
        original.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(outputs(original), outputs(model))
    assert reports[0] == reports[1]
    assert all(0 < error.held_out_error < 1 for report in reports for error in report.layers)


def test_few_tokens_are_reported_with_a_warning():
    model = adapted_encoder()
    with pytest.warns(UserWarning, match=r"2 layers .* fewer tokens .* saw 64, and has 128: give"):
        report = merge(model, "calibrated", [images(seed) for seed in range(2)])
    assert "blocks.0.mlp.lin2" in report.warning
    unmerge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert merge(model, "calibrated", [images(s) for s in range(4)]).warning is None


def test_a_failure_half_way_leaves_no_layer_merged():
    """The forward fails only after the first layer was replaced."""
    model = adapted_encoder()
    before = snapshot(model)
    calls = 0
    forward = model.blocks[1].attn.forward

    def fail_later(x):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("out of luck")
        return forward(x)

    model.blocks[1].attn.forward = fail_later
    with pytest.raises(UserError, match=r"batch 1 .* does not fit the model: out of luck"):
        merge(model, "calibrated", [images(seed) for seed in range(4)])
    assert calls == 5  # four in the unmerged model, one more with the first layer merged
    del model.blocks[1].attn.forward
    assert snapshot(model) == before
