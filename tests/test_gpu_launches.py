"""The launches of ``gpu.py``: their number, and their order against the reference.

The primitives stand here in plain PyTorch, so that the order is judged apart from any kernel.
"""

import pytest
import torch
from kernel_cases import CELL, cell_case, layer_case

from naslora_kernels import gpu, reference

ADAPTER = ("lora_A", "lora_B", *CELL)
GROUPS = 2


class PlainPrimitives:
    """Every primitive in plain PyTorch; notes which were called. A cell has one group, and the
    gradients themselves for its partial sums."""

    def __init__(self):
        self.calls = []

    def low_rank_pass(self, rows, matrix, u, scale, product, partials):
        self.calls.append("low_rank_pass")
        assert rows.stride(1) == 1
        if product is not None:
            product.copy_(scale * rows @ matrix.to(rows.dtype).t())
        if partials is not None:
            for group, (some_u, some_rows) in enumerate(
                zip(u.tensor_split(GROUPS), rows.tensor_split(GROUPS), strict=True)
            ):
                partials[group] = (
                    scale * some_u.to(partials.dtype).t() @ some_rows.to(partials.dtype)
                )

    def low_rank_expand(self, u, matrix, bias, scale, out):
        self.calls.append("low_rank_expand")
        out.copy_(scale * u @ matrix.to(u.dtype))
        if bias is not None:
            out.add_(bias)

    def cell_forward(self, z, alpha, depthwise, pw, channels, y):
        self.calls.append("cell_forward")
        y.copy_(reference.mixed_cell(z, alpha, depthwise, pw, channels))

    def cell_backward(self, grad_y, z, alpha, depthwise, pw, channels, grad_z, partials):
        self.calls.append("cell_backward")
        leaves = [t.detach().requires_grad_() for t in (z, alpha, *depthwise, pw)]
        with torch.enable_grad():
            y = reference.mixed_cell(leaves[0], leaves[1], leaves[2:6], leaves[6], channels)
            gradients = torch.autograd.grad(y, leaves, grad_y)
        if grad_z is not None:
            grad_z.copy_(gradients[0])
        if partials is not None:
            partials[0] = torch.cat([g.flatten() for g in gradients[1:]])

    def reduce_gradients(
        self, cell_partials, alpha, depthwise, pw, grad_alpha, grad_depthwise, grad_pw,
        A_partials, grad_A, B_partials, grad_B,
    ):  # fmt: skip
        self.calls.append("reduce_gradients")
        if cell_partials is not None:
            parts = cell_partials.sum(0).split([t.numel() for t in (alpha, *depthwise, pw)])
            due = (grad_alpha, *(grad_depthwise or [None] * 4), grad_pw)
            for gradient, part in zip(due, parts, strict=True):
                if gradient is not None:
                    gradient.copy_(part.view_as(gradient))
        if grad_A is not None:
            grad_A.copy_(A_partials.sum(0))
        if grad_B is not None:
            grad_B.copy_(B_partials.sum(0).t())

    def folded_cell_forward(self, z, kernel, average, maximum, y):
        self.calls.append("folded_cell_forward")
        y.copy_(reference.folded_cell(z, kernel, average, maximum))

    def row_groups(self, tokens):
        return GROUPS

    def cell_groups(self, batch, height, width, c):
        return 1

    def cell_partial_size(self, c):
        return 8 + 68 * c + 4 * c * c


class PlainBackend:
    """``gpu.py`` over the plain primitives, as a backend that a case can run on."""

    def __init__(self):
        self.primitives = PlainPrimitives()

    def cell(self, z, **arguments):
        return gpu.mixed_cell(self.primitives, z, *self._split(arguments))

    @staticmethod
    def _split(a):
        depthwise = [a[name] for name in ("dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5")]
        return a["alpha"], depthwise, a["pw"], a["channels"]

    def layer_results(self, case, needed):
        a, options = case.arguments, case.options
        cell = self._split({**a, **options})
        frozen = (a["weight"], a["lora_A"], a["lora_B"])
        scaling = options["scaling"]
        h, z = gpu.nas_lora_linear(
            self.primitives, a["x"], a["weight"], a.get("bias"), a["lora_A"], a["lora_B"], *cell,
            scaling,
        )  # fmt: skip
        forward, self.primitives.calls = self.primitives.calls, []
        gradients = gpu.nas_lora_linear_backward(
            self.primitives, case.gradient, a["x"], z, *frozen, *cell, scaling,
            "x" in needed, "lora_A" in needed, "lora_B" in needed, "alpha" in needed,
            "pw" in needed,
        )  # fmt: skip
        results = {"result": h, **dict(zip(("x", *ADAPTER), gradients, strict=True))}
        return {n: results[n] for n in ("result", *needed)}, forward, self.primitives.calls


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
    results, forward, backward = PlainBackend().layer_results(case, needed)
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
    results, forward, backward = PlainBackend().layer_results(case, needed)
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
    library = gpu.register("plain", primitives)
    try:
        case = cell_case((2, 5, 4, 6), 4)
        a = case.arguments
        depthwise = [a[name] for name in CELL[1:5]]
        operands = (a["alpha"], depthwise, a["pw"], case.options["channels"])
        y = torch.ops.naslora_plain.mixed_cell(a["z"], *operands)
        assert primitives.calls == ["cell_forward"]
        gradients = torch.ops.naslora_plain.mixed_cell_backward(
            case.gradient, a["z"], *operands, True, True, True
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
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    arguments = (*(case.arguments[name] for name in names), kernel, 0.3, 0.2)
    h = gpu.folded_linear(primitives, *arguments)
    assert primitives.calls == ["low_rank_pass", "folded_cell_forward", "low_rank_expand"]
    torch.testing.assert_close(h, reference.folded_linear(*arguments))
