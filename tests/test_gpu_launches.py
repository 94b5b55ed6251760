"""The launches of ``launches.py``: their number, and their order against the reference.

The primitives below are plain PyTorch, so the order is tested without any kernel.
"""

import pytest
import torch
from kernel_cases import CELL, cell_case, layer_case

from naslora_kernels import reference
from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.launches import Launches, Primitives, register

ADAPTER = ("lora_A", "lora_B", *CELL)
GROUPS = 2


class PlainPrimitives(Primitives):
    """Every primitive in plain PyTorch; records the calls.

    A cell has one group. Its partial sums are the gradients themselves.
    """

    def __init__(self):
        self.calls = []

    def low_rank_pass(self, rows, factor, u, scale, product, partials):
        self.calls.append("low_rank_pass")
        assert rows.stride(1) == 1
        if product is not None:
            product.view(len(rows), -1).copy_(scale * rows @ factor.to(rows.dtype).t())
        if partials is not None:
            u = u.view(len(rows), -1)
            for group, (some_u, some_rows) in enumerate(
                zip(u.tensor_split(GROUPS), rows.tensor_split(GROUPS), strict=True)
            ):
                partials[group] = (
                    scale * some_u.to(partials.dtype).t() @ some_rows.to(partials.dtype)
                )

    def low_rank_expand(self, u, factor, bias, scale, out):
        self.calls.append("low_rank_expand")
        out.copy_(scale * u.view(len(out), -1) @ factor.to(u.dtype))
        if bias is not None:
            out.add_(bias)

    def cell_forward(self, z, cell, y):
        self.calls.append("cell_forward")
        y.copy_(reference.mixed_cell(z, cell))

    def cell_backward(self, grad_y, z, cell, grad_z, partials):
        self.calls.append("cell_backward")
        leaves = [t.detach().requires_grad_() for t in (z, *cell.parameters)]
        with torch.enable_grad():
            y = reference.mixed_cell(leaves[0], Cell(*leaves[1:], cell.channels))
            gradients = torch.autograd.grad(y, leaves, grad_y)
        if grad_z is not None:
            grad_z.copy_(gradients[0])
        if partials is not None:
            partials[0] = torch.cat([g.flatten() for g in gradients[1:]])

    def reduce_gradients(self, cell, sums, A, B):
        self.calls.append("reduce_gradients")
        if sums is not None:
            parts = sums.partials.sum(0).split([t.numel() for t in cell.parameters])
            for gradient, part in zip(sums.gradients, parts, strict=True):
                if gradient is not None:
                    gradient.copy_(part.view_as(gradient))
        if A is not None:
            A.gradient.copy_(A.partials.sum(0))
        if B is not None:
            B.gradient.copy_(B.partials.sum(0).t())

    def folded_cell_forward(self, z, kernel, avg_weight, max_weight, y):
        self.calls.append("folded_cell_forward")
        y.copy_(reference.folded_cell(z, kernel, avg_weight, max_weight))

    def row_groups(self, tokens):
        return GROUPS

    def cell_groups(self, batch, height, width, c):
        return 1

    def cell_partial_size(self, c):
        return 8 + 68 * c + 4 * c * c


def cell_of(case):
    """The cell of a case."""
    return Cell(*(case.arguments[name] for name in CELL), case.options["channels"])


def linear_of(case):
    """The linear layer and the adapter of a case."""
    names = ("weight", "bias", "lora_A", "lora_B")
    return LoRALinear(*(case.arguments[name] for name in names))


def layer_results(case, needed):
    """The results of a layer over the plain primitives, and the calls forward and backward."""
    primitives = PlainPrimitives()
    launches = Launches(primitives)
    x, linear, cell = case.arguments["x"], linear_of(case), cell_of(case)
    scaling = case.options["scaling"]
    h, z = launches.nas_lora_linear(x, *linear, *cell, scaling)
    forward, primitives.calls = primitives.calls, []
    need = (name in needed for name in ("x", "lora_A", "lora_B", "alpha", "pw"))
    weight, _, *factors = linear
    saved = (x, z, weight, *factors, *cell, scaling)
    gradients = launches.nas_lora_linear_backward(case.gradient, *saved, *need)
    results = {"result": h, **dict(zip(("x", *ADAPTER), gradients, strict=True))}
    return {n: results[n] for n in ("result", *needed)}, forward, primitives.calls


EVERYTHING = ("x", *ADAPTER)
WEIGHT_STEP = ("x", "lora_A", "lora_B", *CELL[1:])
ARCHITECTURE_STEP = ("x", "alpha")


@pytest.mark.parametrize(
    ("needed", "launches"),
    [
        (EVERYTHING, 6),
        (WEIGHT_STEP, 6),
        (ARCHITECTURE_STEP, 4),  # dy, cell, reduction, dx
        (("lora_B",), 3),  # y, dW_d, reduction
        (("x",), 3),  # dy, cell, dx
        (("lora_A",), 4),  # dy, cell, dW_e, reduction
    ],
    ids=str,
)
def test_layer_takes_at_most_three_and_six_launches(needed, launches):
    case = layer_case((2, 5, 4), 7, 9, 4, 3)
    results, forward, backward = layer_results(case, needed)
    assert len(forward) == 3
    assert len(backward) == launches
    expected = case.run("reference", needed)
    for name, value in results.items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("c", [0, 3])
@pytest.mark.parametrize("grid", [(2, 5, 4), (0, 5, 4), (1, 1, 1)], ids=str)
def test_without_channels_or_tokens(grid, c):
    case = layer_case(grid, 7, 9, 3, c)
    needed = EVERYTHING if c else ("x", "lora_A", "lora_B", "alpha", *CELL[1:])
    results, forward, backward = layer_results(case, needed)
    expected = case.run("reference", EVERYTHING if c else ("x", "lora_A", "lora_B"))
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value)
    if not c:
        assert not results["alpha"].any()
        assert "cell_forward" not in forward
    if grid[0] == 0:
        assert not forward
        assert not backward


def test_cell_takes_one_and_two_launches():
    primitives = PlainPrimitives()
    library = register("plain", primitives)
    try:
        case = cell_case((2, 5, 4, 6), 4)
        z, cell = case.arguments["z"], cell_of(case)
        y = torch.ops.naslora_plain.mixed_cell(z, *cell)
        assert primitives.calls == ["cell_forward"]
        gradients = torch.ops.naslora_plain.mixed_cell_backward(
            case.gradient, z, *cell, True, True, True
        )
        assert primitives.calls[1:] == ["cell_backward", "reduce_gradients"]
        expected = case.run("reference")
        for name, value in zip(("result", "z", *CELL), (y, *gradients), strict=True):
            torch.testing.assert_close(value, expected[name])
    finally:
        library._destroy()


def test_folded_layer_takes_three_launches():
    primitives = PlainPrimitives()
    case = layer_case((2, 5, 4), 7, 9, 3, 3)
    kernel = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    x, linear, folded = case.arguments["x"], linear_of(case), (kernel, 0.3, 0.2)
    h = Launches(primitives).folded_linear(x, *linear, *folded)
    assert primitives.calls == ["low_rank_pass", "folded_cell_forward", "low_rank_expand"]
    torch.testing.assert_close(h, reference.folded_linear(x, linear, *folded))
