"""The folded cell and layer: their definition, the mixed cell, the reference, and refusals."""

import math

import pytest
import torch
from kernel_cases import (
    ALL_TARGETS,
    DTYPES,
    LAYOUTS,
    TARGETS,
    Target,
    cell_case,
    few_costly,
    layer_case,
    targets_and,
)
from torch.testing import assert_close

from naslora_kernels import (
    OPERATIONS,
    folded_cell,
    folded_convolution,
    folded_linear,
    mixed_cell,
    nas_lora_linear,
)
from naslora_kernels.ops import operator

AVG_POOL, MAX_POOL = (OPERATIONS.index(name) for name in ("avg_pool_3x3", "max_pool_3x3"))
POOLINGS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, -0.4)]
every_kernel = pytest.mark.parametrize("target", TARGETS)
every_backend = pytest.mark.parametrize(
    "target", [pytest.param(Target("reference"), id="reference"), *TARGETS]
)


def draw(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def layer_arguments(grid, c_in, c_out, c, size, dtype=torch.float64, device="cpu"):
    shapes = {
        "x": (*grid, c_in),
        "weight": (c_out, c_in),
        "bias": (c_out,),
        "lora_A": (c, c_in),
        "lora_B": (c_out, c),
        "kernel": (c, c, size, size),
    }
    return {
        name: draw(*shape, seed=i, dtype=dtype, device=device)
        for i, (name, shape) in enumerate(shapes.items())
    }


def by_hand(z, kernel, average, maximum):
    """y from its definition, pixel by pixel."""
    batch, height, width, c = z.shape
    reach = kernel.shape[-1] // 2
    y = torch.zeros_like(z)
    for row in range(height):
        for column in range(width):
            for dy in range(-reach, reach + 1):
                for dx in range(-reach, reach + 1):
                    if 0 <= row + dy < height and 0 <= column + dx < width:
                        tap = kernel[:, :, dy + reach, dx + reach]
                        y[:, row, column] += z[:, row + dy, column + dx] @ tap.T
            window = z[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            window = window.reshape(batch, -1, c)
            y[:, row, column] += average * window.mean(1) + maximum * window.amax(1)
    return y


DEFINED = [((2, 5, 7, 2), 3), ((1, 1, 1, 3), 9), ((2, 12, 4, 5), 9), ((1, 3, 3, 1), 1)]


@every_backend
@pytest.mark.parametrize(
    "shape, size, average, maximum",
    [(*case, *weights) for case, weights in zip(DEFINED, POOLINGS, strict=True)],
    ids=str,
)
def test_is_its_definition(target, shape, size, average, maximum):
    z = draw(*shape, device=target.device)
    kernel = draw(shape[-1], shape[-1], size, size, seed=1, device=target.device)
    y = folded_cell(z, kernel, average, maximum, backend=target.backend)
    assert_close(y, by_hand(z, kernel, average, maximum), rtol=1e-12, atol=1e-12)


@every_backend
def test_is_the_mixed_cell_with_its_convolutions_folded(target):
    arguments = cell_case((2, 9, 11, 3), 3).on(target.device).arguments
    z, alpha, *depthwise, pw = arguments.values()
    mixture = alpha.softmax(0)
    y = folded_cell(
        z,
        folded_convolution(mixture, tuple(depthwise), pw),
        float(mixture[AVG_POOL]),
        float(mixture[MAX_POOL]),
        backend=target.backend,
    )
    expected = mixed_cell(**arguments, backend="reference")
    assert_close(y, expected, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_layer_with_everything_folded(target, bias):
    """Channels that bypass the cell fold into the weight, the scaling into lora_B."""
    case = layer_case((2, 6, 5), 16, 12, 5, 3, bias=bias).on(target.device)
    a, channels, scaling = case.arguments, case.options["channels"], case.options["scaling"]
    expected = nas_lora_linear(**a, **case.options, backend="reference")
    mixture = a["alpha"].softmax(0)
    depthwise = tuple(a[f"dw_{name}"] for name in ("sep3", "sep5", "dil3", "dil5"))
    bypass = [k for k in range(5) if k not in channels]
    h = folded_linear(
        a["x"],
        a["weight"] + scaling * a["lora_B"][:, bypass] @ a["lora_A"][bypass],
        a.get("bias"),
        a["lora_A"][channels],
        scaling * a["lora_B"][:, channels],
        folded_convolution(mixture, depthwise, a["pw"]),
        float(mixture[AVG_POOL]),
        float(mixture[MAX_POOL]),
        backend=target.backend,
    )
    assert_close(h, expected, rtol=1e-12, atol=1e-12)


# (B, H, W), c, k
SHAPES = [
    ((3, 14, 14), 2, 9),
    ((1, 64, 33), 3, 5),
    ((2, 7, 7), 16, 9),
    ((1, 5, 6), 16, 9),
    ((1, 20, 21), 2, 7),
    ((1, 1, 40), 1, 3),
    ((2, 9, 18), 6, 1),
    ((0, 4, 4), 2, 3),
]
# Where cases cost seconds, these run.
QUICK = [
    (SHAPES[3], torch.bfloat16),
    *((SHAPES[4], dtype) for dtype in (torch.float64, torch.float16)),
    *((shape, torch.float32) for shape in SHAPES[5:]),
]


@pytest.mark.usefixtures("poisoned_memory", "instruction_set")
@pytest.mark.parametrize(
    ("target", "shape", "dtype"),
    few_costly(
        targets_and(SHAPES, lambda shape: math.prod(shape[0]) * shape[1], ALL_TARGETS),
        [(dtype,) for dtype in DTYPES],
        lambda shape, dtype: (shape, dtype) in QUICK,
    ),
)
def test_kernels_are_as_good_as_the_reference(target, shape, dtype):
    grid, c, size = shape
    given = layer_arguments(grid, 24, 36, c, size, dtype, target.device)
    z = draw(*grid, c, dtype=dtype, device=target.device)
    calls = {
        "cell": lambda a, z, backend: folded_cell(z, a["kernel"], 0.2, 0.3, backend=backend),
        "layer": lambda a, z, backend: folded_linear(
            **a, average=0.2, maximum=0.3, backend=backend
        ),
    }
    wide = {name: value.double() for name, value in given.items()}
    for name, call in calls.items():
        kernel, reference = call(given, z, target.backend), call(given, z, "reference")
        truth = call(wide, z.double(), "reference")
        assert kernel.dtype == dtype and kernel.shape == truth.shape
        if not truth.numel():
            continue
        # Twice the reference's error, and the ulps that kernel_cases grants.
        unit = 2 * max(torch.finfo(dtype).eps, 1e-13) * truth.abs().max()
        allowed = 2 * (reference.double() - truth).abs().max() + unit
        assert (kernel.double() - truth).abs().max() <= allowed, name


@every_kernel
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, layout):
    a = layer_arguments((2, 9, 6), 8, 12, 2, 5, device=target.device)
    strided = {n: LAYOUTS[layout](v) if v.dim() > 1 else v for n, v in a.items()}
    z = draw(2, 9, 6, 2, device=target.device)
    assert_close(
        folded_linear(**strided, average=0.2, maximum=0.3, backend=target.backend),
        folded_linear(**a, average=0.2, maximum=0.3, backend="reference"),
    )
    assert_close(
        folded_cell(LAYOUTS[layout](z), strided["kernel"], 0.2, 0.3, backend=target.backend),
        folded_cell(z, a["kernel"], 0.2, 0.3, backend="reference"),
    )


@every_backend
def test_a_pooling_without_weight_lets_infinities_alone(target):
    """0 * inf would be NaN."""
    z = draw(1, 5, 5, 1, device=target.device)
    z[0, 2, 2] = float("inf")
    kernel = torch.ones(1, 1, 1, 1).to(z)
    y = folded_cell(z, kernel, backend=target.backend)
    assert torch.equal(y, z)


@every_backend
def test_adapter_in_float32_beside_16_bit(target):
    a = layer_arguments((2, 7, 7), 16, 24, 2, 5, torch.float32, target.device)
    low = {n: v.bfloat16() if n in ("x", "weight", "bias") else v for n, v in a.items()}
    h = folded_linear(**low, average=0.2, maximum=0.3, backend=target.backend)
    truth = folded_linear(
        **{n: v.double() for n, v in low.items()}, average=0.2, maximum=0.3, backend="reference"
    )
    assert h.dtype == torch.bfloat16
    # z, y and h are rounded to 8 bits each, the reference's matrices as well.
    assert (h.double() - truth).norm() / truth.norm() < 5 * 2**-9


def test_gradients_come_from_the_reference():
    """Whoever trains through a merged model gets the right gradients, whatever the backend."""
    a = layer_arguments((1, 3, 4), 3, 4, 2, 3)
    for value in a.values():
        value.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *tensors: folded_linear(*tensors, 0.2, 0.3), tuple(a.values())
    )
    z = draw(1, 3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, kernel: folded_cell(z, kernel, 0.2, 0.3), (z, a["kernel"])
    )


@every_kernel
def test_operators_are_well_formed(target):
    cell, linear = (operator(target.backend, f"folded_{part}") for part in ("cell", "linear"))
    a = layer_arguments((2, 5, 4), 6, 8, 2, 3, torch.float32, target.device)
    checks = ("test_schema", "test_faketensor")  # they have no gradients to check
    torch.library.opcheck(linear, (*a.values(), 0.2, 0.3), test_utils=checks)
    z = draw(2, 5, 4, 2, dtype=torch.float32, device=target.device)
    torch.library.opcheck(cell, (z, a["kernel"], 0.2, 0.3), test_utils=checks)


@every_backend
def test_compiles_in_one_graph(target):
    a = layer_arguments((2, 5, 4), 6, 8, 2, 3, torch.float32, target.device)
    compiled = torch.compile(folded_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(
            compiled(**a, average=0.2, maximum=0.3, backend=target.backend),
            folded_linear(**a, average=0.2, maximum=0.3, backend=target.backend),
        )


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"kernel": draw(2, 2, 4, 4)},
            ValueError,
            "kernel: .* with k odd",
        ),
        ({"kernel": draw(2, 2, 11, 11)}, ValueError, "at most 9"),
        ({"kernel": draw(2, 2, 3, 5)}, ValueError, r"kernel: expected shape \(2, 2, 5, 5\)"),
        ({"kernel": draw(2, 2, 3, 3).float()}, TypeError, "kernel: expected torch.float64"),
        ({"average": float("nan")}, ValueError, "average: expected a finite number"),
        ({"maximum": "much"}, TypeError, "maximum: expected a number, got str"),
        ({"backend": "magic"}, ValueError, "backend: expected one of"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, error, message):
    a = layer_arguments((2, 5, 4), 6, 8, 2, 3)
    with pytest.raises(error, match=message):
        folded_linear(**{**a, "average": 0.2, "maximum": 0.3, **change})
    cell = {"z": draw(2, 5, 4, 2), "kernel": a["kernel"], **change}
    with pytest.raises(error, match=message):
        folded_cell(**cell)
