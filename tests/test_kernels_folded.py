"""The folded cell and layer: their definition, the mixed cell, the reference, and refusals."""

import itertools
import math

import definition
import pytest
import torch
from kernel_cases import (
    ALL_TARGETS,
    DTYPES,
    LAYOUTS,
    TARGETS,
    Case,
    Target,
    assert_as_good_as_reference,
    cell_case,
    drawing,
    few_costly,
    layer_case,
)
from torch.testing import assert_close

import naslora_kernels
from naslora_kernels import (
    folded_cell,
    folded_convolution,
    folded_linear,
    mixed_cell,
    nas_lora_linear,
)
from naslora_kernels.operations import AVG_POOL, MAX_POOL
from naslora_kernels.ops import operator

POOLINGS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.4), (0.3, -0.4)]
every_kernel = pytest.mark.parametrize("target", TARGETS)
every_backend = pytest.mark.parametrize(
    "target", [pytest.param(Target("reference"), id="reference"), *TARGETS]
)


WEIGHTS = {"average": 0.2, "maximum": 0.3}


def draw(*shape, seed=0):
    return drawing(seed)[1](shape)


def case_of(function, shapes, weights):
    """A random case in float64. Its gradients come from the reference."""
    arguments = {n: draw(*shape, seed=i) for i, (n, shape) in enumerate(shapes.items())}
    return Case(function, arguments, weights, torch.ones(()).double())


def cell(grid, c, size, weights=WEIGHTS):
    return case_of("folded_cell", {"z": (*grid, c), "kernel": (c, c, size, size)}, weights)


def linear(grid, c_in, c_out, c, size):
    shapes = {"x": (*grid, c_in), "weight": (c_out, c_in), "bias": (c_out,)}
    shapes |= {"lora_A": (c, c_in), "lora_B": (c_out, c), "kernel": (c, c, size, size)}
    return case_of("folded_linear", shapes, WEIGHTS)


def result(case, target):
    return case.run(target, ())["result"]


def by_hand(z, kernel, average, maximum):
    """y from its definition."""
    mean, largest = definition.poolings(z)
    around = definition.windows(z, kernel.shape[-1])
    y = torch.einsum("bhwkuv,okuv->bhwo", around, kernel)
    return y + average * mean + maximum * largest


DEFINED = [((2, 5, 7), 2, 3), ((1, 1, 1), 3, 9), ((2, 12, 4), 5, 9), ((1, 3, 3), 1, 1)]


@every_backend
@pytest.mark.parametrize("shape, weights", [*zip(DEFINED, POOLINGS, strict=True)], ids=str)
def test_is_its_definition(target, shape, weights):
    case = cell(*shape, dict(zip(WEIGHTS, weights, strict=True))).on(target.device)
    expected = by_hand(*case.arguments.values(), *weights)
    assert_close(result(case, target), expected, rtol=1e-12, atol=1e-12)


def folded(alpha, depthwise, pw):
    """The kernel and the weights of the poolings."""
    mixture = alpha.softmax(0)
    kernel = folded_convolution(mixture, tuple(depthwise), pw)
    return kernel, float(mixture[AVG_POOL]), float(mixture[MAX_POOL])


@every_backend
def test_is_the_mixed_cell_with_its_convolutions_folded(target):
    arguments = cell_case((2, 9, 11, 3), 3).on(target.device).arguments
    z, alpha, *depthwise, pw = arguments.values()
    y = folded_cell(z, *folded(alpha, depthwise, pw), backend=target.backend)
    expected = mixed_cell(**arguments, backend="reference")
    assert_close(y, expected, rtol=1e-12, atol=1e-12)


@every_backend
@pytest.mark.parametrize("bias", [True, False])
def test_is_the_layer_with_everything_folded(target, bias):
    """Channels that bypass the cell fold into the weight, the scaling into lora_B."""
    case = layer_case((2, 6, 5), 16, 12, 5, 3, bias=bias).on(target.device)
    a, channels, scaling = case.arguments, case.options["channels"], case.options["scaling"]
    expected = nas_lora_linear(**a, **case.options, backend="reference")
    depthwise = [a[f"dw_{name}"] for name in ("sep3", "sep5", "dil3", "dil5")]
    bypass = [k for k in range(5) if k not in channels]
    h = folded_linear(
        a["x"],
        a["weight"] + scaling * a["lora_B"][:, bypass] @ a["lora_A"][bypass],
        a.get("bias"),
        a["lora_A"][channels],
        scaling * a["lora_B"][:, channels],
        *folded(a["alpha"], depthwise, a["pw"]),
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
        ALL_TARGETS,
        itertools.product(SHAPES, DTYPES),
        lambda shape, dtype: (shape, dtype) in QUICK,
        lambda shape, _: math.prod(shape[0]) * shape[1],
    ),
)
def test_kernels_are_as_good_as_the_reference(target, shape, dtype):
    grid, c, size = shape
    for case in (cell(*shape), linear(grid, 24, 36, c, size)):
        assert_as_good_as_reference(target, case.to(dtype), ())


@every_kernel
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(target, layout):
    for case in (cell((2, 9, 6), 2, 5), linear((2, 9, 6), 8, 12, 2, 5)):
        case = case.on(target.device)
        strided = case.laid_out(layout, "contiguous")
        assert_close(result(strided, target), result(case, "reference"))


@every_backend
def test_a_pooling_without_weight_lets_infinities_alone(target):
    """0 * inf would be NaN."""
    z = draw(1, 5, 5, 1).to(target.device)
    z[0, 2, 2] = float("inf")
    kernel = torch.ones(1, 1, 1, 1).to(z)
    y = folded_cell(z, kernel, backend=target.backend)
    assert torch.equal(y, z)


@every_backend
def test_adapter_in_float32_beside_16_bit(target):
    case = linear((2, 7, 7), 16, 24, 2, 5).to(torch.float32).on(target.device)
    for name in ("x", "weight", "bias"):
        case.arguments[name] = case.arguments[name].bfloat16()
    h, truth = result(case, target), result(case.to(torch.float64), "reference")
    assert h.dtype == torch.bfloat16
    # z, y and h are rounded to 8 bits each, the reference's matrices as well.
    assert (h.double() - truth).norm() / truth.norm() < 5 * 2**-9


@pytest.mark.parametrize("case", [cell((1, 3, 4), 2, 3), linear((1, 3, 4), 3, 4, 2, 3)])
def test_gradients_come_from_the_reference(case):
    """Whoever trains through a merged model gets the right gradients, whatever the backend."""
    leaves = tuple(value.requires_grad_() for value in case.arguments.values())
    function = getattr(naslora_kernels, case.function)
    assert torch.autograd.gradcheck(lambda *values: function(*values, **WEIGHTS), leaves)


SMALL = {"cell": cell((2, 5, 4), 2, 3), "linear": linear((2, 5, 4), 6, 8, 2, 3)}


@every_kernel
@pytest.mark.parametrize("name", SMALL)
def test_operators_are_well_formed(target, name):
    arguments = SMALL[name].to(torch.float32).on(target.device).arguments.values()
    checks = ("test_schema", "test_faketensor")  # they have no gradients to check
    own = operator(target.backend, f"folded_{name}")
    torch.library.opcheck(own, (*arguments, *WEIGHTS.values()), test_utils=checks)


@every_backend
def test_compiles_in_one_graph(target):
    case = SMALL["linear"].to(torch.float32).on(target.device)
    compiled = torch.compile(folded_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        h = compiled(**case.arguments, **WEIGHTS, backend=target.backend)
    assert_close(h, result(case, target))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"kernel": draw(2, 2, 4, 4)}, ValueError, "kernel: .* with k odd"),
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
    for case in SMALL.values():
        arguments = {**case.arguments, **WEIGHTS, **change}
        with pytest.raises(error, match=message):
            getattr(naslora_kernels, case.function)(**arguments)
