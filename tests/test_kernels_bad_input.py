"""Arguments that the kernels' public functions refuse in one line, which names the argument."""

import pytest
import torch

from naslora_kernels import folded_cell, mixed_cell, nas_lora_linear

RANK, C_IN, C_OUT = 3, 6, 5


def cell():
    depthwise = [torch.randn(RANK, k, k) for k in (3, 5, 3, 5)]
    return torch.randn(8), *depthwise, torch.randn(4, RANK, RANK)


def maps(channels=RANK):
    return torch.randn(1, 4, 4, channels)


def layer(x=None, weight=None, scaling=1.0):
    x = maps(C_IN) if x is None else x
    weight = torch.randn(C_OUT, C_IN) if weight is None else weight
    lora = torch.randn(RANK, C_IN), torch.randn(C_OUT, RANK)
    return nas_lora_linear(x, weight, None, *lora, *cell(), None, scaling)


@pytest.mark.parametrize("backend", [[], 3, ("cpp",)])
def test_a_backend_is_a_name(backend):
    with pytest.raises(TypeError, match=r"^backend: expected a name or None, got [a-z]+$"):
        mixed_cell(maps(), *cell(), backend=backend)


@pytest.mark.parametrize(
    "name, call",
    [
        ("z", lambda: mixed_cell(maps().to_sparse(), *cell())),
        ("x", lambda: layer(x=maps(C_IN).to_sparse())),
        ("weight", lambda: layer(weight=torch.randn(C_OUT, C_IN).to_sparse())),
    ],
)
def test_sparse_tensors(name, call):
    with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got .*sparse_coo$"):
        call()


@pytest.mark.parametrize("value", [10**400, -(10**400)])
def test_numbers_beyond_float64(value):
    with pytest.raises(ValueError, match=r"^scaling: expected a finite number, got a int beyond"):
        layer(scaling=value)
    with pytest.raises(ValueError, match=r"^average: expected a finite number, got a int beyond"):
        folded_cell(maps(), torch.randn(RANK, RANK, 3, 3), value, 0.0)


@pytest.mark.parametrize("value", [RANK, -1, 2**62])
def test_channels_that_change_behind_the_back_of_autograd(value):
    """Writes through ``.data`` raise no version; the kernels would read out of bounds."""
    alpha, *weights = cell()
    weights = [dw[:2] for dw in weights[:4]] + [weights[4][:, :2, :2]]
    channels = torch.tensor([0, 2])
    mixed_cell(maps(), alpha, *weights, channels)
    channels.data[0] = value
    with pytest.raises(ValueError, match=r"^channels: expected values in 0\.\.2, got"):
        mixed_cell(maps(), alpha, *weights, channels)
