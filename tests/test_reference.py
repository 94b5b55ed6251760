"""The reference cell and layer against their definition, checks of arguments, and backends."""

import contextlib
import sys
import types

import definition
import pytest
import torch
from fresh_process import run_fresh
from kernel_cases import CELL, cell_case, layer_case
from torch.testing import assert_close

import naslora_kernels
from naslora_kernels import (
    OPERATIONS,
    available_backends,
    backends,
    checks,
    folded_convolution,
    mixed_cell,
    nas_lora_linear,
)

# Both sides compute in float64 and differ in the order of some hundred additions of values near 1:
# 100 * 2**-53 is 1e-14, and 1e-11 leaves room for cancellation.
FLOAT64 = {"rtol": 1e-11, "atol": 1e-11}

# The last but one is larger than the 9 x 9 window of the dilated 5 x 5 kernel.
SHAPES = [(1, 1, 1), (2, 1, 1), (1, 1, 7), (1, 7, 1), (1, 2, 2), (2, 3, 5), (1, 11, 10), (0, 5, 4)]
# (rank, number of channels); "all" gives the operator no list of them.
SELECTIONS = [(1, "all"), (3, "all"), (3, 2), (3, 3), (3, 0), (5, 3), (1, 1)]


def by_definition(case, z=None):
    """The cell of a case, or of its layer for z, in float64."""
    alpha, *depthwise, pw = (case.arguments[name].double() for name in CELL)
    z = (case.arguments["z"] if z is None else z).double()
    channels = case.options["channels"]
    channels = torch.arange(z.shape[-1]) if channels is None else channels
    return definition.cell(z, alpha, depthwise, pw, channels)


def make(function, grid, rank, channels, **options):
    """A case of the cell, or of a layer of 5 to 4 features, with so many channels."""
    c = rank if channels == "all" else channels
    case = cell_case((*grid, rank), c) if function == "cell" else layer_case(grid, 5, 4, rank, c)
    if channels == "all":
        options["channels"] = None
    case.options |= options
    return case


def result(case):
    return case.run("reference", [next(iter(case.arguments))])["result"]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("rank, channels", SELECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cell_equals_the_definition(shape, rank, channels):
    case = make("cell", shape, rank, channels)
    y = result(case)
    assert y.shape == case.arguments["z"].shape and y.dtype == torch.float64
    assert_close(y, by_definition(case), **FLOAT64)


def single(case, operation):
    """The case with an alpha that singles an operation out: the other weights are exactly 0."""
    case.arguments["alpha"] = torch.full((8,), -1e4, dtype=torch.float64)
    case.arguments["alpha"][operation] = 0.0
    return case


@pytest.mark.parametrize("operation", range(8), ids=OPERATIONS)
def test_each_operation_alone_equals_the_definition(operation):
    """An error in one cannot hide behind the others."""
    case = single(make("cell", (2, 4, 5), 3, 2), operation)
    y, z, channels = result(case), case.arguments["z"], case.options["channels"]
    assert_close(y, by_definition(case), **FLOAT64)
    if OPERATIONS[operation] == "skip_connect":
        assert torch.equal(y, z)
    if OPERATIONS[operation] == "none":
        assert not y[..., channels].any()


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rank, channels", [(3, "all"), (3, 2), (3, 0), (5, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (0, 3, 4)], ids=str)
def test_layer_equals_the_definition(shape, rank, channels, with_bias):
    case = make("layer", shape, rank, channels, scaling=2.5)
    if not with_bias:
        del case.arguments["bias"]
        case.options["bias"] = None
    a = case.arguments
    y = by_definition(case, torch.einsum("bhwi,ri->bhwr", a["x"], a["lora_A"]))
    expected = torch.einsum("bhwi,oi->bhwo", a["x"], a["weight"]) + a.get("bias", 0)
    expected = expected + 2.5 * torch.einsum("bhwr,or->bhwo", y, a["lora_B"])
    assert_close(result(case), expected, **FLOAT64)


def test_nan_and_infinity_propagate():
    case = make("cell", (1, 12, 12), 2, "all")
    z = case.arguments["z"]
    z[0, 1, 1, 0], z[0, 10, 10, 1], z[0, 1, 10, 1] = torch.nan, torch.inf, -torch.inf
    expected = by_definition(case)
    assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
    assert_close(result(case), expected, equal_nan=True, **FLOAT64)


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
def test_dtypes_against_float64(dtype, tolerance, float32_adapter):
    """The layer's error is in units of the dtype's rounding, relative to the largest output.

    Four of its results are rounded on the way (W0 x, z, y, W_d y) and then their sum, each by at
    most half an epsilon of its own size, none of which is more than ~8 times the output's.
    """
    cell, layer = (
        make(function, (2, 7, 6), 3, 2).to(dtype, torch.float32 if float32_adapter else None)
        for function in ("cell", "layer")
    )
    y, h = result(cell), result(layer)
    assert y.dtype == h.dtype == dtype
    assert_close(y.double(), result(cell.to(torch.float64)), **tolerance)
    exact = result(layer.to(torch.float64))
    assert (h.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("rank, channels", [(1, "all"), (3, 2), (5, 3), (3, 0)])
@pytest.mark.parametrize("function", ["cell", "layer"])
def test_gradcheck(function, rank, channels):
    case = make(function, (1, 3, 4), rank, channels)
    # The cell of no channel is empty, and alpha does nothing.
    names = [name for name in case.arguments if channels or name not in CELL]

    def run(*leaves):
        arguments = case.arguments | dict(zip(names, leaves, strict=True))
        call = getattr(naslora_kernels, case.function)
        return call(**arguments, **case.options, backend="reference")

    assert torch.autograd.gradcheck(run, [case.arguments[n].requires_grad_() for n in names])


def test_max_pool_routes_ties_to_the_first_in_row_major_order():
    case = single(make("cell", (1, 3, 3), 1, "all"), OPERATIONS.index("max_pool_3x3"))
    case.arguments["z"].zero_()
    case.gradient.fill_(1)
    grad = case.run("reference", ("z",))["z"]
    # Windows centred at rows (columns) 0 and 1 start at 0, those at 2 start at 1.
    first = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(grad[0, :, :, 0], torch.outer(first, first))


# ---------------------------------------------------------------- folding


def test_folded_convolution_has_41_taps_and_equals_the_operations():
    case = make("cell", (2, 10, 7), 3, "all")
    z, alpha, *depthwise, pw = case.arguments.values()
    alpha[4:6] = -1e4  # the poolings are not part of the convolution
    kernel = folded_convolution(alpha.softmax(0), tuple(depthwise), pw)
    assert kernel.shape == (3, 3, 9, 9)
    # 5 x 5 dense taps and 5 x 5 with dilation 2, which share 3 x 3.
    assert (kernel != 0).any(0).any(0).sum() == 41
    y = torch.nn.functional.conv2d(z.permute(0, 3, 1, 2), kernel, padding=4).permute(0, 2, 3, 1)
    assert_close(y, by_definition(case), **FLOAT64)


# ---------------------------------------------------------------- checks


def arguments_of(function, **changes):
    case = make(function, (2, 3, 4), 3, 2).to(torch.float32)
    return {**case.arguments, **case.options, "channels": torch.tensor([2, 0]), **changes}


META = {"device": "meta"}
# Argument, value, error, and what the message has to name besides.
BAD_CELLS = [
    ("z", [1.0], TypeError, ["torch.Tensor", "list"]),
    ("z", torch.zeros(1, 2, 2, 3, dtype=torch.int64), TypeError, ["float32", "int64"]),
    ("z", torch.zeros(1, 2, 2, 3).to_sparse(), TypeError, ["a dense tensor", "sparse_coo"]),
    ("z", torch.zeros(2, 4, 3), ValueError, ["(B, H, W", "(2, 4, 3)"]),
    ("z", torch.zeros(1, 0, 4, 3), ValueError, ["at least 1", "(1, 0, 4, 3)"]),
    ("alpha", torch.zeros(8).half(), TypeError, ["torch.float32", "float16"]),
    ("dw_sep3", torch.zeros(2, 5, 5), ValueError, ["(2, 3, 3)", "(2, 5, 5)"]),
    ("pw", torch.zeros(4, 2, 2, **META), ValueError, ["cpu", "meta", "z"]),
    ("channels", torch.tensor([0, 1]).int(), TypeError, ["int64", "int32"]),
    ("channels", torch.tensor([[0, 1]]), ValueError, ["(c,)", "(1, 2)"]),
    ("channels", torch.arange(4), ValueError, ["at most the rank 3", "(4,)"]),
    ("channels", torch.tensor([0, 3]), ValueError, ["0..2", "[0, 3]"]),
    ("channels", torch.tensor([1, 1]), ValueError, ["distinct", "[1, 1]"]),
    ("channels", torch.tensor([0, 1], **META), ValueError, ["cpu", "meta", "z"]),
]
BAD_LAYERS = [
    ("x", torch.zeros(2, 9, 5), ValueError, ["(B, H, W", "(2, 9, 5)"]),
    ("weight", torch.zeros(4, 6), ValueError, ["(C_out, 5)", "(4, 6)"]),
    ("weight", torch.zeros(4, 5).double(), TypeError, ["float32", "float64"]),
    ("bias", torch.zeros(5), ValueError, ["(4,)", "(5,)"]),
    ("lora_A", torch.zeros(0, 5), ValueError, ["at least 1", "(0, "]),
    ("lora_A", [1.0], TypeError, ["torch.Tensor", "list"]),
    ("lora_B", torch.zeros(3, 4), ValueError, ["(4, 3)", "(3, 4)"]),
    ("scaling", True, TypeError, ["number", "bool"]),
    ("scaling", float("nan"), ValueError, ["finite", "nan"]),
    ("scaling", 10**400, ValueError, ["finite", "int beyond"]),
    ("backend", ("cpp",), TypeError, ["a name or None", "tuple"]),
]
BAD = [*(("cell", *case) for case in BAD_CELLS), *(("layer", *case) for case in BAD_LAYERS)]


@pytest.mark.parametrize("function, name, value, kind, fragments", BAD)
def test_bad_arguments_are_named(function, name, value, kind, fragments):
    call = mixed_cell if function == "cell" else nas_lora_linear
    with pytest.raises(kind) as error:
        call(**arguments_of(function, **{name: value}))
    message = str(error.value)
    assert message.startswith(f"{name}:") and "expected" in message and "got" in message
    assert "\n" not in message and all(fragment in message for fragment in fragments)


def test_16_bit_maps_take_float32_adapters_but_no_float32_base():
    x, weight, bias, *adapter = make("layer", (1, 2, 2), 3, 2).to(torch.float32).arguments.values()
    x, channels = x.bfloat16(), torch.tensor([0, 1])
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
        arguments = arguments_of("cell")
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
    arguments = arguments_of("cell")
    tensors = {name: arguments[name].to(dtype) for name in ("z", *CELL)}
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
