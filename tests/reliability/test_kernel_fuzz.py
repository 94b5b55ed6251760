"""Random and hostile calls of the kernels: nothing may crash, read out of bounds or disagree.

``make sanitize`` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer as well. The
long part is marked ``campaign``.
"""

import contextlib
import os
import threading

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    TARGETS,
    Case,
    attention_case,
    cell_case,
    few_costly,
    layer_case,
    only_cpp,
)
from torch.autograd import forward_ad

import naslora_kernels
from naslora_kernels import mixed_cell, nas_lora_linear, rel_pos_attention
from reliability.conftest import fuzz

pytestmark = only_cpp

RANK, C, C_IN, C_OUT = 4, 2, 6, 5
GRID = (2, 5, 4)
REFUSED = r"^channels: expected "  # in Python, or in the kernel


def tensors(function, device="cpu"):
    """The arguments of a small call, by name, each a leaf that requires a gradient."""
    if function is mixed_cell:
        case = cell_case((*GRID, RANK), C)
    elif function is nas_lora_linear:
        case = layer_case(GRID, C_IN, C_OUT, RANK, C)
    else:
        case = attention_case(2, 2, GRID[1:], 5)
    case = case.to(torch.float32).on(device)
    leaves = {name: value.clone().requires_grad_() for name, value in case.arguments.items()}
    if "channels" in case.options:
        case.options["channels"] = torch.tensor([3, 0], device=device)
    return leaves, case.options


# ---- Tampered channels ---------------------------------------------------------------------------


# Views of a tensor's memory, whose writes raise no version.
VIEWS = {
    "data": lambda channels: channels.data,
    "numpy": lambda channels: channels.detach().numpy(),
    "storage": lambda channels: torch.tensor([], dtype=int).set_(channels.untyped_storage()),
}
BAD = [RANK, -1, 2**62, -(2**63), 0]  # 0 repeats the second channel


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("before", ["forward", "backward"])
@pytest.mark.parametrize("function", [mixed_cell, nas_lora_linear])
def test_channels_changed_between_calls(function, before, view, value):
    arguments, options = tensors(function)
    result = function(**arguments, **options, backend="cpp")
    VIEWS[view](options["channels"])[0] = value
    with pytest.raises(ValueError, match=REFUSED):
        if before == "forward":
            function(**arguments, **options, backend="cpp")
        else:
            result.sum().backward()


@pytest.mark.parametrize("value", BAD)
def test_channels_in_a_compiled_graph(value):
    """The values cannot be checked while torch.compile traces; the kernel checks them."""
    arguments, options = tensors(mixed_cell)

    def run(channels):
        return mixed_cell(**arguments, channels=channels, backend="cpp")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled(options["channels"])
    options["channels"].data[0] = value
    with pytest.raises(ValueError, match=REFUSED):
        compiled(options["channels"])


def public_call(function):
    """Forward and backward of a public function, of given channels."""
    arguments, options = tensors(function)
    del options["channels"]
    return lambda channels: (
        function(**arguments, **options, channels=channels, backend="cpp").sum().backward()
    )


def call_of_operators():
    """Forward and backward of the operators: here the kernels alone check the channels."""
    arguments, _ = tensors(mixed_cell)
    z, alpha, *weights = (value.detach() for value in arguments.values())
    operators = torch.ops.naslora_cpp

    def call(channels):
        cell = (alpha, *weights, channels)
        y = operators.mixed_cell(z, *cell)
        operators.mixed_cell_backward(y, z, *cell, True, True, True)

    return call


CALLS = {
    "mixed_cell": lambda: public_call(mixed_cell),
    "nas_lora_linear": lambda: public_call(nas_lora_linear),
    "operators": call_of_operators,
}


@pytest.mark.parametrize("calls", [500, pytest.param(20_000, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("call", CALLS)
def test_channels_written_by_another_thread(call, calls):
    function, channels, done = CALLS[call](), torch.tensor([3, 0]), threading.Event()

    def write():
        while not done.is_set():
            for value in (1, 2, 3, *BAD, 1, 2, 3):
                channels.data[0] = value

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for number in range(100 * calls):  # the writer may get no turn for long
            if number >= calls and refused:
                break
            try:
                function(channels)
            except ValueError as error:
                assert str(error).startswith("channels: expected ")
                refused += 1
    finally:
        done.set()
        writer.join()
    print(f"{call}: {refused} of {calls} calls refused")
    assert refused > 0


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("value", [RANK, -1, 2**40])
def test_channels_on_a_gpu_stay_within_the_map(target, value):
    """A GPU's channels are read by the host once. The kernels keep to the map all the same."""
    case = cell_case((1, 3, 3, RANK), C).to(torch.float32)
    # The maps lie inside a larger tensor, so that reads beside them show as NaN.
    case.arguments["z"] = LAYOUTS["every_second"](case.arguments["z"])
    case = case.on(target.device)
    z, alpha, *weights = case.arguments.values()
    kernels = torch.ops.__getattr__(f"naslora_{target.backend}")
    mixed_cell(z, alpha, *weights, case.options["channels"], backend=target.backend)  # loads it
    channels = torch.tensor([value, 0], device=target.device)
    cell = (alpha, *weights, channels)
    y = kernels.mixed_cell(z, *cell)
    gradients = kernels.mixed_cell_backward(case.gradient, z, *cell, True, True, True)
    assert all(t.isfinite().all() for t in (y, *gradients))


# ---- Other tensors that change between forward and backward --------------------------------------


# What replaces a tensor's data, and what is left of the bytes of its storage.
DATA = {
    "other shape": lambda tensor: tensor.new_zeros(1),
    "larger": lambda tensor: tensor.new_zeros([2 * size + 1 for size in tensor.shape]),
    "other dtype": lambda tensor: tensor.detach().to(
        torch.float64 if tensor.is_floating_point() else torch.int32
    ),
}
STORAGES = {"freed": lambda size: 0, "halved": lambda size: size // 2}
SAVED = ["alpha", "dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5", "pw", "channels"]


OF_FUNCTIONS = {
    mixed_cell: ("z", *SAVED),
    nas_lora_linear: ("x", "weight", "lora_A", "lora_B", *SAVED),
    rel_pos_attention: ("q", "k", "v", "rel_h", "rel_w"),
}
SAVED_BY = [(function, name) for function, names in OF_FUNCTIONS.items() for name in names]


@pytest.mark.parametrize("change", [*DATA, *STORAGES])
@pytest.mark.parametrize(
    ("target", "function", "name"),
    few_costly(TARGETS, SAVED_BY, lambda function, name: name in ("alpha", "k", "rel_h")),
)
def test_saved_tensors_that_change(target, function, name, change):
    """A saved tensor of another shape, dtype or storage is named; it was a crash or garbage.

    Assignments to ``.data`` raise no version.
    """
    if target.backend == "triton" and change in STORAGES:
        pytest.skip("its check looks at shapes and dtypes")
    arguments, options = tensors(function, target.device)
    result = function(**arguments, **options, backend=target.backend)
    tensor = options[name] if name == "channels" else arguments[name]
    if change in DATA:
        tensor.data = DATA[change](tensor)
    else:
        storage = tensor.untyped_storage()
        storage.resize_(STORAGES[change](storage.nbytes()))
    # Of rel_h and rel_w only the product of the last sizes is known.
    named = f"({name}|rel_h, rel_w)" if name.startswith("rel") else name
    with pytest.raises(RuntimeError, match=rf"^{named}: .*changed between forward and backward"):
        result.sum().backward()


# ---- Random calls --------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 6e-8, 65504.0, 3.4e38)


class Subclass(torch.Tensor):
    pass


FORMS = {
    "negative bit": lambda t: torch.complex(torch.zeros_like(t), -t).conj().imag,
    "no memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "expanded": lambda t: t[(0,) * t.dim()].expand(t.shape),
    "subclass": lambda tensor: tensor.as_subclass(Subclass),
    "parameter": torch.nn.Parameter,
    **LAYOUTS,
}


def cases(draw):
    """A random case of a public function in float64; no size of it is 0 but the batch's."""
    grid = tuple(draw(st.sampled_from(sizes)) for sizes in ((0, 1, 2), (1, 2, 9), (1, 3, 17)))
    rank = draw(st.sampled_from((1, 2, 3, 4, 6, 9)))
    c, seed = draw(st.integers(0, rank)), draw(st.integers(0, 1000))
    kind = draw(st.sampled_from(("cell", "layer", "attention")))
    if kind == "cell":
        return cell_case((*grid, rank), c, seed)
    if kind == "attention":
        queries = draw(st.one_of(st.none(), st.integers(1, 40)))
        return attention_case(grid[0], 2, grid[1:], rank, queries, seed)
    c_in, c_out = draw(st.sampled_from((1, 5, 32))), draw(st.sampled_from((1, 7, 33)))
    return layer_case(grid, c_in, c_out, rank, c, seed, draw(st.booleans()))


def exotic(draw, case):
    """The case with some tensors in other forms, and the same case with plain tensors."""

    def form(tensor):
        name = draw(st.sampled_from(("plain", *FORMS)))
        # Complex numbers have no 16-bit parts that all operators know.
        unfit = name == "negative bit" and tensor.dtype.itemsize == 2
        unfit |= name == "channels_first" and tensor.dim() < 2
        if name == "plain" or unfit or not tensor.numel():
            return tensor
        return FORMS[name](tensor)

    def plain(tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor)

    changed = case.of_each(form)
    return changed, changed.of_each(plain)


def same(results, expected, bits):
    for name, value in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if bits else {}
        result = torch.zeros(value.shape, dtype=value.dtype).copy_(results[name])
        torch.testing.assert_close(result, value, **tolerance, equal_nan=True, msg=name)


def agrees_with_reference(case, needed, results):
    """Sums of up to some 10^3 rounding errors; tests/test_kernels_* state tighter bounds."""
    exact = case.to(torch.float64).run("reference", needed)
    for name, value in results.items():
        if value.numel() and case.gradient.numel():
            unit = torch.finfo(case.gradient.dtype).eps * max(1.0, float(exact[name].abs().max()))
            error = float((value.double() - exact[name]).abs().max())
            assert error <= 100 * unit, f"{name}: error {error:.3g}, unit {unit:.3g}"


def random_call(data):
    """Runs one random call of a public function by ``cpp``, forward and backward.

    What a tensor is beside its values changes no bit of the kernels' results. They agree with the
    reference. Special values must not crash.
    """
    draw = data.draw
    case, dtype = cases(draw), draw(st.sampled_from(DTYPES))
    wide = dtype.itemsize == 2 and case.function != "rel_pos_attention" and draw(st.booleans())
    case = case.to(dtype, torch.float32 if wide else None)
    special = draw(st.booleans())
    if special:
        for value in draw(st.lists(st.sampled_from([*case.arguments.values(), case.gradient]))):
            value.flatten()[: 1 + value.numel() // 9] = torch.tensor(draw(st.sampled_from(SPECIAL)))
    needed = draw(st.sets(st.sampled_from(list(case.arguments)), min_size=1))
    needed = needed if case.options.get("channels", torch.ones(1)).numel() else case.arguments
    changed, plain = exotic(draw, case)
    results = plain.run("cpp", needed)
    again = changed.run("cpp", needed)
    product = case.function == "nas_lora_linear"  # by torch, whose bits depend on strides
    if not (special and product):
        same(again, results, bits=not product)
    if not special:
        agrees_with_reference(plain, needed, results)


def operator_call(data):
    """Calls an operator of ``cpp`` with tensors of wrong sizes and dtypes: an error or a result."""
    draw = data.draw
    case = cases(draw).to(torch.float32)
    arguments, saved = list(case.arguments.values()), []
    name = case.function
    backward = draw(st.booleans())
    if name == "rel_pos_attention":
        softmax = torch.ones(2, *case.gradient.shape[:3])
        saved, numbers, needs = [case.gradient, softmax], [1.0], 5
    else:
        if "bias" in case.options:
            arguments.insert(2, None)
        channels = draw(st.sampled_from((None, case.options["channels"])))
        arguments, numbers, needs = [*arguments, channels], [], 3
        if name == "nas_lora_linear":
            numbers, needs = [1.5], 5
            if backward:
                x, weight, _, lora_A, *rest = arguments
                z = torch.ones(*x.shape[:3], lora_A.shape[0])
                arguments = [x, z, weight, lora_A, *rest]
    if backward:
        name, arguments = f"{name}_backward", [case.gradient, *arguments, *saved]
        numbers += [draw(st.booleans()) for _ in range(needs)]
    for position in draw(st.lists(st.integers(0, len(arguments) - 1), max_size=3)):
        if arguments[position] is not None:
            arguments[position] = draw(st.sampled_from(list(WRONG)))(arguments[position])
    with contextlib.suppress(RuntimeError, ValueError):
        getattr(torch.ops.naslora_cpp, name)(*arguments, *numbers)


WRONG = (
    torch.Tensor.flatten,
    torch.Tensor.double,
    torch.Tensor.int,
    lambda tensor: tensor[None],
    lambda tensor: tensor.new_ones([2 * size + 1 for size in tensor.shape]),
    lambda tensor: tensor.new_ones([max(0, size - 1) for size in tensor.shape]),
)


MANY = int(os.environ.get("NASLORA_FUZZ_CALLS", "10000"))
RANDOM = [(random_call, 60), (operator_call, 100)]
RANDOM += [pytest.param(call, MANY, marks=pytest.mark.campaign) for call, _ in RANDOM]


@pytest.mark.parametrize("call, examples", RANDOM)
def test_random_calls(call, examples):
    """The same in every run; NASLORA_FUZZ_SEED gives others."""
    seeded = hypothesis.seed(int(os.environ.get("NASLORA_FUZZ_SEED", "0")))
    fuzz(examples, seeded(call), data=st.data())


# ---- Derivatives that the kernels do not have ----------------------------------------------------


def dual(function, leaf):
    with forward_ad.dual_level():
        result = function(forward_ad.make_dual(leaf, leaf.cos()))
        return forward_ad.unpack_dual(result).tangent


TRANSFORMS = {
    "vmap": lambda function, leaf: torch.func.vmap(function)(torch.stack([leaf, 2 * leaf])),
    "jvp": lambda function, leaf: torch.func.jvp(function, (leaf,), (leaf.cos(),))[1],
    "forward-mode": dual,
    "grad": lambda function, leaf: torch.func.grad(lambda t: function(t).square().sum())(leaf),
    "batched backward": lambda function, leaf: torch.autograd.functional.jacobian(
        function, leaf, vectorize=True
    ),
    "functionalize": lambda function, leaf: torch.func.functionalize(function)(leaf),
}
KERNEL = torch.ones(2, 2, 3, 3)
FUNCTIONS = {
    "mixed_cell": cell_case((1, 2, 3, 2), 2),
    "nas_lora_linear": layer_case((1, 2, 3), 2, 2, 2, 1),
    "rel_pos_attention": attention_case(1, 2, (2, 3), 2),
    "folded_cell": Case("folded_cell", {"z": torch.rand(1, 2, 3, 2), "kernel": KERNEL}, {}, None),
}


def of_first_argument(case, backend):
    _, *others = case.arguments.items()
    function = getattr(naslora_kernels, case.function)
    return lambda leaf: function(leaf, **dict(others), **case.options, backend=backend)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_compute_what_the_reference_does(name, transform):
    case = FUNCTIONS[name]
    leaf = next(iter(case.arguments.values()))
    compute = TRANSFORMS[transform]
    result, expected = (compute(of_first_argument(case, b), leaf) for b in ("cpp", "reference"))
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", list(FUNCTIONS)[:3])
def test_second_derivatives_are_refused(name):
    """Also where the incoming gradient requires none: saved tensors do."""
    case = FUNCTIONS[name]
    leaf = next(iter(case.arguments.values())).clone().requires_grad_()
    y = of_first_argument(case, "cpp")(leaf)
    (gradient,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (y.sum() + gradient.square().sum()).backward()
