"""The reference cell and layer against a NumPy loop that computes every operation pixel by pixel.

The loop is written from the definition of the eight operations, not from the code under test, and
runs in float64.
"""

import contextlib
import importlib.machinery
import sys
import types

import numpy as np
import pytest
import torch
from fresh_process import run_fresh
from torch.testing import assert_close

import naslora_kernels
from naslora_kernels import (
    OPERATIONS,
    available_backends,
    backends,
    build_info,
    checks,
    folded_convolution,
    mixed_cell,
    nas_lora_linear,
)

torch.set_num_threads(1)

# Both sides compute in float64 and differ in the order of some hundred additions of values near 1:
# 100 * 2**-53 is 1e-14, and 1e-11 leaves room for cancellation.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}

# (name, kernel size, dilation) of the convolutions, in the order of alpha.
CONVOLUTIONS = (("sep3", 3, 1), ("sep5", 5, 1), ("dil3", 3, 2), ("dil5", 5, 2))
KERNEL_SIZES = tuple(kernel for _, kernel, _ in CONVOLUTIONS)
PARAMETERS = ("alpha", "dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5", "pw")

# The last but one is larger than the 9 x 9 window of the dilated 5 x 5 kernel.
SHAPES = [(1, 1, 1), (2, 1, 1), (1, 1, 7), (1, 7, 1), (1, 2, 2), (2, 3, 5), (1, 11, 10), (0, 5, 4)]
# (rank, channels): every channel (None or listed), a permuted part, none.
SELECTIONS = [(1, None), (3, None), (3, [2, 0]), (3, [1, 2, 0]), (3, []), (5, [4, 1, 3]), (1, [0])]


def loop_cell(z, alpha, depthwise, pw, channels):
    """The mixed cell in float64 NumPy, one output pixel and channel at a time."""
    z = np.asarray(z, dtype=np.float64)
    batch, height, width, _ = z.shape
    weights = np.exp(np.asarray(alpha, dtype=np.float64) - np.max(alpha))
    weights = weights / weights.sum()
    y = z.copy()
    for b in range(batch):
        for row in range(height):
            for column in range(width):
                y[b, row, column, channels] = _loop_pixel(
                    z[b][:, :, channels], row, column, weights, depthwise, pw
                )
    return y


def _loop_pixel(maps, row, column, weights, depthwise, pw):
    height, width, c = maps.shape
    result = np.zeros(c)
    for i, (_, kernel, dilation) in enumerate(CONVOLUTIONS):
        filtered = np.zeros(c)
        for u in range(kernel):
            for v in range(kernel):
                r = row + dilation * (u - kernel // 2)
                s = column + dilation * (v - kernel // 2)
                if 0 <= r < height and 0 <= s < width:
                    for k in range(c):
                        filtered[k] += depthwise[i][k, u, v] * maps[r, s, k]
        for out in range(c):
            for k in range(c):
                result[out] += weights[i] * pw[i, out, k] * filtered[k]
    rows = range(max(row - 1, 0), min(row + 2, height))
    columns = range(max(column - 1, 0), min(column + 2, width))
    for k in range(c):
        window = [maps[r, s, k] for r in rows for s in columns]
        result[k] += weights[4] * (sum(window) / len(window))
        result[k] += weights[5] * np.max(window)  # np.max, unlike max(), propagates NaN
        result[k] += weights[6] * maps[row, column, k]
    return result  # weights[7] is that of "none"


def make_cell(c, dtype=torch.float64, seed=0):
    """Random cell parameters, in the order of ``mixed_cell``'s arguments."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(8,), *((c, k, k) for k in KERNEL_SIZES), (4, c, c)]
    values = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    return [value.to(dtype) for value in values]


def make_map(*shape, dtype=torch.float64, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_layer(rank=3, c=2, c_in=5, c_out=4, dtype=torch.float64, seed=2):
    """(weight, bias, lora_A, lora_B) followed by the cell's parameters."""
    shapes = enumerate([(c_out, c_in), (c_out,), (rank, c_in), (c_out, rank)])
    matrices = [make_map(*shape, dtype=dtype, seed=seed + i) for i, shape in shapes]
    return [*matrices, *make_cell(c, dtype, seed)]


def selection(rank, channels):
    """The channels as a tensor or None, and their number."""
    if channels is None:
        return None, rank
    return torch.tensor(channels, dtype=torch.int64), len(channels)


def gradients(function, tensors, grad_output=None):
    """Of the function at the tensors, which keep their strides."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves, grad_output)


def expected_cell(z, cell, channels):
    alpha, *depthwise, pw = [parameter.double().numpy() for parameter in cell]
    channels = list(range(z.shape[-1])) if channels is None else list(channels)
    return torch.from_numpy(loop_cell(z.double().numpy(), alpha, depthwise, pw, channels))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("rank, channels", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cell_equals_the_loop(shape, rank, channels):
    selected, c = selection(rank, channels)
    z, cell = make_map(*shape, rank), make_cell(c)
    y = mixed_cell(z, *cell, selected, backend="reference")
    assert y.shape == z.shape and y.dtype == z.dtype
    assert_close(y, expected_cell(z, cell, channels), **FLOAT64)


@pytest.mark.parametrize("operation", range(8), ids=OPERATIONS)
def test_each_operation_alone_equals_the_loop(operation):
    """alpha singles one operation out, so an error in one cannot hide behind the others."""
    z, cell = make_map(2, 4, 5, 3), make_cell(2)
    cell[0] = torch.full((8,), -1e4, dtype=torch.float64)
    cell[0][operation] = 0.0  # the other weights are exp(-1e4) = 0 exactly
    y = mixed_cell(z, *cell, torch.tensor([2, 0]), backend="reference")
    assert_close(y, expected_cell(z, cell, [2, 0]), **FLOAT64)
    if OPERATIONS[operation] == "skip_connect":
        assert torch.equal(y, z)
    if OPERATIONS[operation] == "none":
        assert torch.equal(y[..., [2, 0]], torch.zeros(2, 4, 5, 2, dtype=torch.float64))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank, channels", [(3, None), (3, [2, 0]), (3, []), (5, [4, 1, 3])])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (0, 3, 4)], ids=str)
def test_layer_equals_the_loop(shape, rank, channels, with_bias):
    x, (selected, c) = make_map(*shape, 5), selection(rank, channels)
    weight, bias, lora_A, lora_B, *cell = make_layer(rank, c)
    linear = (weight, bias if with_bias else None, lora_A, lora_B)
    h = nas_lora_linear(x, *linear, *cell, selected, 2.5, backend="reference")
    z = np.einsum("bhwi,ri->bhwr", x.numpy(), lora_A.numpy())
    y = expected_cell(torch.from_numpy(z), cell, channels).numpy()
    expected = np.einsum("bhwi,oi->bhwo", x.numpy(), weight.numpy())
    expected = expected + (bias.numpy() if with_bias else 0)
    expected = expected + 2.5 * np.einsum("bhwr,or->bhwo", y, lora_B.numpy())
    assert_close(h, torch.from_numpy(expected), **FLOAT64)


def test_nan_and_infinity_propagate():
    cell = make_cell(2)
    z = make_map(1, 12, 12, 2)
    z[0, 1, 1, 0], z[0, 10, 10, 1], z[0, 1, 10, 1] = np.nan, np.inf, -np.inf
    y = mixed_cell(z, *cell, backend="reference")
    with np.errstate(invalid="ignore"):  # inf - inf is NaN on both sides
        expected = expected_cell(z, cell, None)
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    assert_close(y, expected, equal_nan=True, **FLOAT64)


# A 16-bit map is computed in float32 and rounded once: half a unit in the last place relative to
# the result, 2**-9 (bfloat16) and 2**-12 (float16, of numbers in its normal range), here doubled.
# float32 keeps 24 bits; some hundred terms whose magnitudes add up to ~30 cost at most
# 100 * 30 * 2**-24, typically its root.
DTYPES = [
    (torch.float32, {"rtol": 1e-5, "atol": 1e-5}),
    (torch.bfloat16, {"rtol": 2**-8, "atol": 1e-4}),
    (torch.float16, {"rtol": 2**-11, "atol": 1e-4}),
]


@pytest.mark.parametrize("float32_adapter", [False, True])
@pytest.mark.parametrize("dtype, tolerance", DTYPES, ids=lambda v: str(v).split(".")[-1])
def test_cell_dtypes_against_float64(dtype, tolerance, float32_adapter):
    z = make_map(2, 7, 6, 3, dtype=dtype)
    cell = make_cell(2, torch.float32 if float32_adapter else dtype)
    channels = torch.tensor([2, 0])
    y = mixed_cell(z, *cell, channels, backend="reference")
    assert y.dtype == dtype
    exact = mixed_cell(z.double(), *(p.double() for p in cell), channels, backend="reference")
    assert_close(y.double(), exact, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_dtypes_against_float64(dtype):
    """Error of the whole layer in units of the dtype's rounding, relative to the largest output.

    Four results are rounded on the way (W0 x, z, y, W_d y) and then their sum, each by at most
    half an epsilon of its own size, none of which is more than ~8 times the output's.
    """
    x = make_map(2, 5, 5, 8, dtype=dtype)
    layer = make_layer(c_in=8, dtype=dtype)
    channels = torch.tensor([0, 2])
    h = nas_lora_linear(x, *layer, channels, 1.5, backend="reference")
    assert h.dtype == dtype
    exact = nas_lora_linear(
        x.double(), *(p.double() for p in layer), channels, 1.5, backend="reference"
    )
    error = (h.double() - exact).abs().max() / exact.abs().max()
    assert error <= 8 * torch.finfo(dtype).eps


# ---------------------------------------------------------------- gradients


def gradcheck(function, inputs, *rest):
    def run(*leaves):
        return function(*leaves, *rest, backend="reference")

    leaves = [tensor.requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("rank, channels", [(1, None), (3, [2, 0]), (5, [4, 1, 3])], ids=str)
def test_cell_gradcheck(rank, channels):
    selected, c = selection(rank, channels)
    gradcheck(mixed_cell, [make_map(1, 3, 4, rank), *make_cell(c)], selected)


@pytest.mark.parametrize("channels", [None, [2, 0], []], ids=str)
def test_layer_gradcheck(channels):
    selected, c = selection(3, channels)
    inputs = [make_map(1, 3, 2, 3), *make_layer(c=c, c_in=3, c_out=2)]
    checked = len(inputs) if c else 5  # the cell of no channel is empty, and alpha does nothing
    gradcheck(nas_lora_linear, inputs[:checked], *inputs[checked:], selected, 1.5)


def test_max_pool_routes_ties_to_the_first_in_row_major_order():
    z = torch.zeros(1, 3, 3, 1, dtype=torch.float64, requires_grad=True)
    cell = make_cell(1)
    cell[0] = torch.full((8,), -1e4, dtype=torch.float64)
    cell[0][OPERATIONS.index("max_pool_3x3")] = 0.0
    y = mixed_cell(z, *cell, backend="reference")
    (grad,) = torch.autograd.grad(y.sum(), z)
    # Windows centred at rows (columns) 0 and 1 start at 0, those at 2 start at 1.
    first = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(grad[0, :, :, 0], torch.outer(first, first))


LAYOUTS = {
    "permuted": lambda: make_map(2, 3, 5, 4).permute(0, 2, 3, 1),
    "sliced": lambda: make_map(4, 10, 8, 6)[::2, 1::2, ::2, 1:4],
    "expanded batch": lambda: make_map(1, 5, 4, 3).expand(2, 5, 4, 3),
    "expanded pixels": lambda: make_map(2, 1, 1, 3).expand(2, 5, 4, 3),
}


def assert_strides_do_not_matter(run, tensors, grad, rest, dense_rest):
    """The same numbers in another layout give the same results: same code, so to rounding."""

    def of(rest):
        return lambda *leaves: run(*leaves, *rest, backend="reference")

    dense = [tensor.contiguous() for tensor in tensors]
    assert_close(of(rest)(*tensors), of(dense_rest)(*dense), **FLOAT64)
    expected = gradients(of(dense_rest), dense, grad.contiguous())
    assert_close(gradients(of(rest), tensors, grad), expected, **FLOAT64)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_inputs_and_gradients_do_not_matter(layout):
    z, cell = LAYOUTS[layout](), make_cell(2)
    assert z.shape == (2, 5, 4, 3) and not z.is_contiguous()
    cell[1] = cell[1].transpose(1, 2)
    cell[5] = make_map(2, 2, 4).permute(2, 0, 1)
    channels = torch.tensor([9, 2, 9, 0])[1::2]
    grad = make_map(4, 3, 5, seed=7).permute(2, 0, 1).expand(2, 5, 4, 3)
    assert_strides_do_not_matter(mixed_cell, [z, *cell], grad, [channels], [channels.contiguous()])


def test_layer_strides_do_not_matter():
    x, layer = make_map(2, 5, 3, 4).permute(0, 2, 3, 1), make_layer()
    layer[0], layer[2] = make_map(5, 4, seed=2).T, make_map(5, 6, seed=4).T[::2]
    grad = make_map(1, 1, 1, 4, seed=9).expand(2, 3, 4, 4)
    rest = [torch.tensor([2, 0]), 1.5]
    assert_strides_do_not_matter(nas_lora_linear, [x, *layer], grad, rest, rest)


# ---------------------------------------------------------------- folding


def test_folded_convolution_has_41_taps_and_equals_the_operations():
    alpha, *depthwise, pw = make_cell(3)
    alpha[4:6] = -1e4  # the poolings are not part of the convolution
    kernel = folded_convolution(alpha.softmax(0), tuple(depthwise), pw)
    assert kernel.shape == (3, 3, 9, 9)
    # 5 x 5 dense taps and 5 x 5 with dilation 2, which share 3 x 3.
    assert (kernel != 0).any(0).any(0).sum() == 41
    z = make_map(2, 10, 7, 3)
    y = torch.nn.functional.conv2d(z.permute(0, 3, 1, 2), kernel, padding=4).permute(0, 2, 3, 1)
    assert_close(y, expected_cell(z, [alpha, *depthwise, pw], None), **FLOAT64)


# ---------------------------------------------------------------- compile and autocast


def test_compiles_in_one_graph_forward_and_backward():
    def run(x, *tensors):
        h = nas_lora_linear(x, *tensors, torch.tensor([2, 0]), 1.5, backend="reference")
        return h + mixed_cell(x[..., :2], *tensors[4:], backend="reference").sum()

    inputs = [make_map(2, 4, 3, 5), *make_layer()]
    grad = make_map(2, 4, 3, 4, seed=9)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*inputs), run(*inputs), **FLOAT64)
    expected = gradients(run, inputs, grad)
    assert_close(gradients(compiled, inputs, grad), expected, **FLOAT64)


def test_autocast_gives_16_bit_output_and_float32_gradients():
    x = make_map(2, 4, 3, 8, dtype=torch.float32).requires_grad_()
    layer = [t.requires_grad_() for t in make_layer(c_in=8, dtype=torch.float32)]
    channels = torch.tensor([2, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = nas_lora_linear(x, *layer, channels, backend="reference")
        y = mixed_cell(x.detach()[..., :3].bfloat16(), *layer[4:], channels, backend="reference")
    assert h.dtype == y.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        double = nas_lora_linear(make_map(1, 3, 3, 5), *make_layer(), channels, backend="reference")
    assert double.dtype == torch.float64
    h.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in (x, *layer))
    exact = nas_lora_linear(
        *(t.detach().double() for t in (x, *layer)), channels, backend="reference"
    )
    # As in the test of 16-bit layers, and x, W0 and the adapter's matrices are rounded besides.
    assert (h.double() - exact).abs().max() <= 12 * 2**-8 * exact.abs().max()


# ---------------------------------------------------------------- checks


def cell_arguments(**changes):
    values = [make_map(2, 3, 4, 3), *make_cell(2)]
    found = dict(zip(("z", *PARAMETERS), [value.float() for value in values], strict=True))
    return {**found, "channels": torch.tensor([2, 0]), **changes}


def layer_arguments(**changes):
    names = ("x", "weight", "bias", "lora_A", "lora_B", *PARAMETERS)
    values = [make_map(2, 3, 4, 5), *make_layer()]
    found = dict(zip(names, [value.float() for value in values], strict=True))
    return {**found, "channels": torch.tensor([2, 0]), **changes}


META = {"device": "meta"}
# Argument, value, error, and what the message has to name besides.
BAD_CELLS = [
    ("z", [1.0], TypeError, ["torch.Tensor", "list"]),
    ("z", torch.zeros(1, 2, 2, 3, dtype=torch.int64), TypeError, ["float32", "int64"]),
    ("z", torch.zeros(1, 2, 2, 3).to_sparse(), TypeError, ["a dense tensor", "sparse_coo"]),
    ("z", torch.zeros(2, 4, 3), ValueError, ["(B, H, W", "(2, 4, 3)"]),
    ("z", torch.zeros(1, 0, 4, 3), ValueError, ["at least 1", "(1, 0, 4, 3)"]),
    ("z", torch.zeros(1, 2, 4, 0), ValueError, ["at least 1", "(1, 2, 4, 0)"]),
    ("alpha", torch.zeros(7), ValueError, ["(8,)", "(7,)"]),
    ("alpha", torch.zeros(8).half(), TypeError, ["torch.float32", "float16"]),
    ("dw_sep3", torch.zeros(2, 5, 5), ValueError, ["(2, 3, 3)", "(2, 5, 5)"]),
    ("dw_dil3", torch.zeros(2, 1, 3, 3), ValueError, ["(2, 3, 3)", "(2, 1, 3, 3)"]),
    ("dw_dil5", 1.0, TypeError, ["torch.Tensor", "float"]),
    ("pw", torch.zeros(4, 2, 2, **META), ValueError, ["cpu", "meta", "z"]),
    ("channels", [0, 1], TypeError, ["torch.Tensor", "list"]),
    ("channels", torch.tensor([0, 1]).int(), TypeError, ["int64", "int32"]),
    ("channels", torch.tensor([[0, 1]]), ValueError, ["(c,)", "(1, 2)"]),
    ("channels", torch.arange(4), ValueError, ["at most the rank 3", "(4,)"]),
    ("channels", torch.tensor([0, 3]), ValueError, ["0..2", "[0, 3]"]),
    ("channels", torch.tensor([-1, 1]), ValueError, ["0..2", "[-1, 1]"]),
    ("channels", torch.tensor([1, 1]), ValueError, ["distinct", "[1, 1]"]),
    ("channels", torch.tensor([0, 1], **META), ValueError, ["cpu", "meta", "z"]),
]
BAD_LAYERS = [
    ("x", "image", TypeError, ["torch.Tensor", "str"]),
    ("x", torch.zeros(2, 9, 5), ValueError, ["(B, H, W", "(2, 9, 5)"]),
    ("weight", torch.zeros(4, 5).to_sparse(), TypeError, ["a dense tensor", "sparse_coo"]),
    ("weight", torch.zeros(4, 6), ValueError, ["(C_out, 5)", "(4, 6)"]),
    ("weight", torch.zeros(4, 5).double(), TypeError, ["float32", "float64"]),
    ("bias", torch.zeros(5), ValueError, ["(4,)", "(5,)"]),
    ("bias", torch.zeros(4).half(), TypeError, ["float32", "float16"]),
    ("lora_A", torch.zeros(3, 4), ValueError, ["(r, 5)", "(3, 4)"]),
    ("lora_A", torch.zeros(0, 5), ValueError, ["at least 1", "(0, "]),
    ("lora_B", torch.zeros(3, 4), ValueError, ["(4, 3)", "(3, 4)"]),
    ("lora_B", torch.zeros(4, 3, **META), ValueError, ["cpu", "meta", "x"]),
    ("alpha", torch.zeros(8, 1), ValueError, ["(8,)", "(8, 1)"]),
    ("channels", torch.tensor([5, 0]), ValueError, ["0..2", "[5, 0]"]),
    ("scaling", "1", TypeError, ["number", "str"]),
    ("scaling", True, TypeError, ["number", "bool"]),
    ("scaling", float("nan"), ValueError, ["finite", "nan"]),
    ("scaling", 10**400, ValueError, ["finite", "int beyond"]),
    ("backend", ("cpp",), TypeError, ["a name or None", "tuple"]),
]
BAD = [(mixed_cell, cell_arguments, *case) for case in BAD_CELLS]
BAD += [(nas_lora_linear, layer_arguments, *case) for case in BAD_LAYERS]


@pytest.mark.parametrize("function, arguments, name, value, kind, fragments", BAD)
def test_bad_arguments_are_named(function, arguments, name, value, kind, fragments):
    with pytest.raises(kind) as error:
        function(**arguments(**{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name}:") and "expected" in message and "got" in message
    assert "\n" not in message and all(fragment in message for fragment in fragments)


def test_16_bit_maps_take_float32_adapters_but_no_float32_base():
    x = make_map(1, 2, 2, 5, dtype=torch.bfloat16)
    weight, bias, *adapter = make_layer(dtype=torch.float32)
    channels = torch.tensor([0, 1])
    base = weight.bfloat16(), bias.bfloat16()
    assert nas_lora_linear(x, *base, *adapter, channels).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"^weight: expected torch.bfloat16 .* got torch.float32$"):
        nas_lora_linear(x, weight, bias, *adapter, channels)
    with pytest.raises(TypeError, match=r"^lora_A: expected torch.bfloat16 or torch.float32 .*16$"):
        nas_lora_linear(x, *base, adapter[0].half(), *adapter[1:], channels)


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_channels_are_checked_again(mode):
    """After a change in place, and at another rank."""
    with mode():
        arguments = cell_arguments()
        mixed_cell(**arguments)
        with pytest.raises(ValueError, match=r"0\.\.1"):
            mixed_cell(**arguments | {"z": torch.zeros(1, 2, 2, 2)})
        arguments["channels"][0] = 0
        with pytest.raises(ValueError, match="distinct"):
            mixed_cell(**arguments)


# ---------------------------------------------------------------- backends


@pytest.fixture
def fake_backend(monkeypatch):
    """A backend "fake", preferred to the reference, that serves float32 on the CPU alone."""
    module = types.ModuleType("naslora_kernels.fake")
    module.__spec__ = importlib.machinery.ModuleSpec("naslora_kernels.fake", None)
    module.reason = None
    module.unavailable_reason = lambda: module.reason
    module.unsupported_reason = lambda device, dtype: (
        None if dtype == torch.float32 else f"it has no {dtype} code"
    )
    module.mixed_cell = lambda z, *_: torch.full_like(z, 42.0)
    monkeypatch.setitem(sys.modules, "naslora_kernels.fake", module)
    monkeypatch.setattr(naslora_kernels, "fake", module, raising=False)
    monkeypatch.setattr(backends, "BACKENDS", ("fake", "reference"))
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    for cached in (remembered := (backends._choose, backends._unavailable_reason, backends.probe)):
        cached.cache_clear()
    yield module
    for cached in remembered:
        cached.cache_clear()


def served_by_fake(dtype=torch.float32, **named):
    arguments = cell_arguments()
    tensors = {name: arguments[name].to(dtype) for name in ("z", *PARAMETERS)}
    return bool((mixed_cell(**arguments | tensors, **named) == 42.0).all())


def test_the_best_backend_that_serves_is_chosen(fake_backend, monkeypatch):
    assert served_by_fake() and not served_by_fake(torch.float64)
    assert available_backends() == {"reference": None, "fake": None}
    monkeypatch.setenv("NASLORA_BACKEND", "reference")
    assert not served_by_fake() and served_by_fake(backend="fake")  # an argument wins


def test_an_unavailable_backend_says_why_and_is_passed_over(fake_backend):
    fake_backend.reason = "it needs hardware of tomorrow"
    assert available_backends() == {"reference": None, "fake": "it needs hardware of tomorrow"}
    assert not served_by_fake()
    with pytest.raises(RuntimeError, match="hardware of tomorrow"):
        served_by_fake(backend="fake")


@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize(
    "name, kind, message",
    [
        ("fake", RuntimeError, r"'fake' cannot serve.*it has no torch.float64 code"),
        ("abacus", ValueError, r"^backend: expected one of .*reference; got 'abacus'"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(
    fake_backend, monkeypatch, by_environment, name, kind, message
):
    if by_environment:
        monkeypatch.setenv("NASLORA_BACKEND", name)
    with pytest.raises(kind, match=message):
        served_by_fake(torch.float64, **({} if by_environment else {"backend": name}))


@pytest.mark.parametrize(
    ("function", "dtype", "capability", "chosen"),
    [
        ("nas_lora_linear", torch.bfloat16, (9, 0), "triton"),
        ("folded_linear", torch.float16, (8, 0), "triton"),
        ("mixed_cell", torch.bfloat16, (9, 0), "cuda"),
        ("nas_lora_linear", torch.bfloat16, (7, 5), "cuda"),  # its tensor cores know no bfloat16
        ("nas_lora_linear", torch.float32, (9, 0), "cuda"),
    ],
)
def test_products_in_16_bits_go_where_the_tensor_cores_are_used(
    function, dtype, capability, chosen, monkeypatch
):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_refusal", lambda *arguments: None)
    monkeypatch.setattr(backends, "probe", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choose = backends._choose.__wrapped__  # without its memory
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert choose(gpu, dtype, None, function) == chosen
    assert choose(gpu, dtype, "cuda", function) == "cuda"  # a name is a name
    assert choose(cpu, dtype, None, function) == "cpp"


@pytest.mark.parametrize("failing", [("cuda",), ("cuda", "triton")])
def test_a_backend_that_cannot_launch_is_passed_over(failing, fake_backend, monkeypatch, caplog):
    """Such as with a driver that is too old for the runtime of the extension."""
    gpu = torch.device("cuda", 0)

    def fail(*arguments):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version\nat a.cu")

    def load(name):
        module = types.SimpleNamespace(unsupported_reason=lambda *_: None, mixed_cell=None)
        module.folded_cell = fail if name in failing else lambda *_: None
        return module

    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(backends, "BACKENDS", ("cuda", "triton", "reference"))
    monkeypatch.setattr(backends, "_unavailable_reason", lambda name: None)
    monkeypatch.setattr(backends, "_load", load)
    chosen = "triton" if failing == ("cuda",) else "reference"
    assert backends._choose(gpu, torch.float32, None, "mixed_cell") == chosen
    warned = [record.args[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warned == [*failing]
    reason = "its first launch on cuda:0 fails: CUDA driver version is insufficient"
    with pytest.raises(RuntimeError, match=reason):
        backends._choose(gpu, torch.float32, "cuda", "mixed_cell")


class ChannelsOnAGPU:
    """As much of a tensor of channels on a GPU as their check looks at; counts reads."""

    device, is_meta = torch.device("cuda"), False

    def __init__(self, inference):
        self.inference, self.version, self.reads = inference, 0, 0

    @property
    def _version(self):
        if self.inference:
            raise RuntimeError("Inference tensors do not track version counter.")
        return self.version

    def is_inference(self):
        return self.inference

    def tolist(self):
        self.reads += 1
        return [0, 2]


@pytest.mark.parametrize("inference", [False, True])
def test_channels_on_a_gpu_are_read_once(inference, monkeypatch):
    """Reading waits for the GPU and ends the capture of a CUDA graph."""
    channels = ChannelsOnAGPU(inference)
    for _ in range(3):
        checks._check_channel_values(channels, 3)
    assert channels.reads == 1
    if not inference:
        channels.version += 1
        checks._check_channel_values(channels, 3)
        assert channels.reads == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = ChannelsOnAGPU(inference=True)
    checks._check_channel_values(captured, 3)
    assert captured.reads == 0


def test_every_backend_answers():
    reasons = available_backends()
    assert next(iter(reasons)) == "reference" and reasons["reference"] is None
    assert set(reasons) == {"reference", "cpp", "triton", "cuda"}
    assert all(reason is None or reason.strip() for reason in reasons.values())
    assert {"version", "compiled", "compiler", "architectures"} <= build_info().keys()


IMPORT_WATCH = """
import contextlib
import sys
import torch

attempts = []

class Watch:
    def find_spec(self, name, path=None, target=None):
        attempts.append(name)

before = set(sys.modules)
sys.meta_path.insert(0, Watch())
{statement}

assert not [n for n in attempts if n.split(".")[0] == "triton"], "it imports triton"
loaded = set(sys.modules) - before
models = "peft segment_anything timm torch._dynamo torchvision transformers"
others = "accelerate matplotlib naslora.training.run pandas scipy torchmetrics"
assert not loaded & {{*models.split(), *others.split()}}
assert not torch.cuda.is_initialized()
for backend in ("reference", "cpp", "triton", "cuda"):
    assert "naslora_kernels." + backend not in loaded, backend
"""


HELP = """
from naslora.__main__ import main

sys.argv[1:] = ["train", "--help"]
with contextlib.suppress(SystemExit):
    main()
"""


@pytest.mark.parametrize(
    "statement", ["import naslora, naslora_kernels", HELP], ids=["import", "help"]
)
def test_importing_and_help_load_no_backend_and_nothing_heavy(statement):
    """Attempts are watched, so that this holds where Triton is not installed as well."""
    result = run_fresh(IMPORT_WATCH.format(statement=statement))
    assert result.status == 0, result.err[-1500:]
