"""Annealing: its schedule, the annealed cell against its definition, and the saved adapter."""

import definition
import pytest
import torch
from adapted_models import adapted_layer, randomize, relative, tokens
from torch.testing import assert_close

from naslora import load_adapter, merge, unmerge
from naslora.adapter.io.storage import trained_state, write_adapter
from naslora.adapter.merging.annealing import annealed, set_spatial, spatial_share

SHARES = [(3, 0, [1, 1, 1]), (3, 1, [1, 1, 0]), (4, 2, [1, 1, 0, 0]), (2, 2, [0, 0])]
SHARES += [(6, 4, [1, 1, 0.5, 0, 0, 0]), (6, 6, [2 / 3, 1 / 3, 0, 0, 0, 0])]


@pytest.mark.parametrize("epochs, anneal, expected", SHARES)
def test_schedule(epochs, anneal, expected):
    assert [spatial_share(e, epochs, anneal) for e in range(epochs)] == pytest.approx(expected)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_the_annealed_cell_is_its_definition(share):
    """Its gradients, too, also at share 0, whose logarithm is infinite."""
    layer = adapted_layer(torch.float64, rank=3, channel_ratio=1.0).qkv
    layer.cell.spatial = share
    x = tokens(2, 6, 7, 16, dtype=torch.float64)
    weight = tokens(2, 6, 7, 12, dtype=torch.float64, seed=4)
    parameters = [layer.lora_A, layer.lora_B, layer.alpha, *layer.cell.depthwise, layer.cell.pw]
    parts = (layer.alpha, layer.cell.depthwise, layer.cell.pw, layer.channels)
    y = definition.cell(x @ layer.lora_A.T, *parts, share)
    ours, theirs = layer(x), layer.base(x) + layer.scaling * y @ layer.lora_B.T
    assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad((weight * h).sum(), parameters) for h in (ours, theirs))
    assert_close(found, expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_once_annealed_the_zero_cost_merge_is_exact(dtype):
    model = adapted_layer(dtype)
    x = tokens(2, 6, 6, 16, dtype=dtype)
    errors = {}
    for share in (1.0, 0.5, 0.0):
        set_spatial(model, share)
        expected = model(x)
        report = merge(model, "center")
        errors[share] = relative(model(x) - expected, expected)
        unmerge(model)
    assert errors[1.0] > errors[0.5] > 5 * errors[0.0]
    # Rounding of a layer: see ROUNDING in test_merging.py.
    assert errors[0.0] < {torch.float32: 5e-6, torch.bfloat16: 5 * 2**-9}[dtype]
    assert dtype != torch.float32 or report.max_update_error < 1e-5


@torch.no_grad()
def test_an_annealed_adapter_is_saved_as_what_it_computes(tmp_path):
    model = adapted_layer()
    set_spatial(model, 0.25)
    x = tokens(2, 6, 6, 16)
    expected = model(x)
    write_adapter(model, tmp_path, {**trained_state(model), **annealed(model)}, "")
    other = adapted_layer()
    randomize(other, seed=5)
    load_adapter(other, tmp_path, check_base=False)
    assert other.qkv.cell.spatial == 1.0
    assert relative(other(x) - expected, expected) < 1e-6
