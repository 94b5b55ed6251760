"""Random and hostile calls of the kernels: nothing may crash, read out of bounds or disagree.

``make sanitize`` runs this file under AddressSanitizer and UndefinedBehaviorSanitizer as well. The
long part is marked ``campaign``.
"""

import os
import threading

import pytest
import torch
from kernel_cases import CELL, LAYOUTS, TARGETS, cell_case, layer_case, needs_cpp

from naslora_kernels import folded_cell, folded_linear, mixed_cell, nas_lora_linear

pytestmark = pytest.mark.skipif(needs_cpp is not None, reason=str(needs_cpp))

RANK, C, C_IN, C_OUT = 4, 2, 6, 5
GRID = (2, 5, 4)
REFUSED = r"^channels: expected "  # in Python, or in the kernel


def tensors(function, seed=0):
    """The arguments of a small call, by name, each a leaf that requires a gradient."""
    if function is mixed_cell:
        case = cell_case((*GRID, RANK), C, seed)
    else:
        case = layer_case(GRID, C_IN, C_OUT, RANK, C, seed)
    case = case.to(torch.float32)
    leaves = {name: value.clone().requires_grad_() for name, value in case.arguments.items()}
    channels = torch.tensor([3, 0])
    return leaves, {**case.options, "channels": channels}


# ---- Tampered channels ---------------------------------------------------------------------------


def write_data(channels, value):
    channels.data[0] = value


def write_numpy(channels, value):
    channels.detach().numpy()[0] = value


def write_storage(channels, value):
    view = torch.empty(0, dtype=torch.int64).set_(channels.untyped_storage())
    view[0] = value


WRITES = [write_data, write_numpy, write_storage]
BAD = [RANK, -1, 2**62, -(2**63), 0]  # 0 repeats the second channel


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("function", [mixed_cell, nas_lora_linear])
def test_channels_changed_between_calls(function, write, value):
    arguments, options = tensors(function)
    function(**arguments, **options, backend="cpp")
    write(options["channels"], value)
    with pytest.raises(ValueError, match=REFUSED):
        function(**arguments, **options, backend="cpp")


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("function", [mixed_cell, nas_lora_linear])
def test_channels_changed_between_forward_and_backward(function, write, value):
    arguments, options = tensors(function)
    result = function(**arguments, **options, backend="cpp")
    write(options["channels"], value)
    with pytest.raises(ValueError, match=REFUSED):
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


def hammer(function, calls):
    """Calls a function while another thread writes to ``channels``; returns the refusals."""
    channels, done = torch.tensor([3, 0]), threading.Event()

    def write():
        while not done.is_set():
            for value in (1, 2, 3, *BAD, 1, 2, 3):
                channels.data[0] = value

    writer = threading.Thread(target=write)
    writer.start()
    refused = 0
    try:
        for _ in range(calls):
            try:
                function(channels)
            except ValueError as error:
                assert str(error).startswith("channels: expected ")
                refused += 1
    finally:
        done.set()
        writer.join()
    return refused


def public_call(function):
    """Forward and backward of a public function, of given channels."""
    arguments, options = tensors(function)
    del options["channels"]
    return lambda channels: (
        function(**arguments, **options, channels=channels, backend="cpp").sum().backward()
    )


def operator_call():
    """Forward and backward of the operators: here the kernels alone check the channels."""
    arguments, _ = tensors(mixed_cell)
    z, alpha, *weights = (value.detach() for value in arguments.values())
    operators = torch.ops.naslora_cpp

    def call(channels):
        cell = (alpha, weights[:4], weights[4], channels)
        y = operators.mixed_cell(z, *cell)
        operators.mixed_cell_backward(y, z, *cell, True, True, True)

    return call


CALLS = {
    "mixed_cell": lambda: public_call(mixed_cell),
    "nas_lora_linear": lambda: public_call(nas_lora_linear),
    "operators": operator_call,
}


@pytest.mark.parametrize("call", CALLS)
def test_channels_written_by_another_thread(call):
    assert hammer(CALLS[call](), 500) > 0


@pytest.mark.parametrize("target", TARGETS[1:])
@pytest.mark.parametrize("value", [RANK, -1, 2**40])
def test_channels_on_a_gpu_stay_within_the_map(target, value):
    """A GPU's channels are read by the host once. The kernels keep to the map all the same."""
    case = cell_case((1, 3, 3, RANK), C).to(torch.float32)
    # The maps lie inside a larger tensor, so that reads beside them show as NaN.
    case = case.laid_out("every_second", "every_second").on(target.device)
    z, alpha, *weights = case.arguments.values()
    kernels = torch.ops.__getattr__(f"naslora_{target.backend}")
    mixed_cell(z, alpha, *weights, case.options["channels"], backend=target.backend)  # loads it
    channels = torch.tensor([value, 0], device=target.device)
    cell = (alpha, weights[:4], weights[4], channels)
    y = kernels.mixed_cell(z, *cell)
    gradients = kernels.mixed_cell_backward(case.gradient, z, *cell, True, True, True)
    assert all(t.isfinite().all() for t in (y, *gradients))


# ---- Other tensors that change between forward and backward --------------------------------------


def other_shape(tensor):
    tensor.data = tensor.new_zeros(1)


def larger(tensor):
    tensor.data = tensor.new_zeros([2 * size + 1 for size in tensor.shape])


def other_dtype(tensor):
    tensor.data = tensor.detach().to(torch.float64 if tensor.is_floating_point() else torch.int32)


def freed_storage(tensor):
    tensor.untyped_storage().resize_(0)


def halved_storage(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)


CHANGES = [other_shape, larger, other_dtype, freed_storage, halved_storage]
SAVED = ["alpha", "dw_sep3", "dw_sep5", "dw_dil3", "dw_dil5", "pw", "channels"]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "function, name",
    [(mixed_cell, name) for name in ("z", *SAVED)]
    + [(nas_lora_linear, name) for name in ("x", "weight", "lora_A", "lora_B", *SAVED)],
)
def test_saved_tensors_that_change(function, name, change):
    """A saved tensor of another shape, dtype or storage is named; it was a crash or garbage."""
    arguments, options = tensors(function)
    result = function(**arguments, **options, backend="cpp")
    change(options[name] if name == "channels" else arguments[name])
    if change is other_dtype and name in (*CELL, "lora_A", "lora_B"):
        return  # these are cast, so any floating dtype will do
    with pytest.raises(RuntimeError, match=rf"^{name}: .*changed between forward and backward"):
        result.sum().backward()


@pytest.mark.parametrize("name", ["z", "x", "alpha", "pw"])
def test_special_values_written_between_forward_and_backward(name):
    arguments, options = tensors(mixed_cell if name == "z" else nas_lora_linear)
    function = mixed_cell if name == "z" else nas_lora_linear
    result = function(**arguments, **options, backend="cpp")
    arguments[name].data.fill_(float("nan"))
    result.sum().backward()  # NaN, but no crash


# ---- Random calls --------------------------------------------------------------------------------

SPECIAL = (0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 6e-8, 65504.0, 3.4e38)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pick(generator, options):
    return options[int(torch.randint(len(options), (1,), generator=generator))]


def sprinkle(tensor, generator):
    """Replaces some elements by special values; keeps the strides."""
    where = torch.rand(tensor.shape, generator=generator) < 0.1
    values = torch.tensor(SPECIAL, dtype=torch.float64)
    drawn = values[torch.randint(len(SPECIAL), tensor.shape, generator=generator)]
    return tensor.copy_(torch.where(where, drawn.to(tensor.dtype), tensor))


def random_call(seed):
    """Runs one random call of a public function by ``cpp``, forward and backward.

    Shapes, dtypes, strides of maps and gradients, special values, threads and channels vary. A
    call with special values must not crash, and repeats with the same bits. Any other call agrees
    with the reference.
    """
    generator = torch.Generator().manual_seed(seed)

    def size(*options):
        return pick(generator, options)

    grid = (size(0, 1, 1, 2, 3), size(1, 2, 5, 9, 14), size(1, 3, 4, 8, 17))
    rank = size(1, 2, 3, 4, 6, 9)
    c = size(*range(rank + 1))
    if size(True, False):
        case = cell_case((*grid, rank), c, seed)
    else:
        case = layer_case(grid, size(1, 5, 32), size(1, 7, 33), rank, c, seed, size(True, False))
    dtype = pick(generator, DTYPES)
    half = dtype in (torch.bfloat16, torch.float16)
    case = case.to(dtype, torch.float32 if half and size(True, False) else None)
    case = case.laid_out(pick(generator, list(LAYOUTS)), pick(generator, list(LAYOUTS)))
    special = size(True, False)
    if special:
        for value in (*case.arguments.values(), case.gradient):
            if size(True, False):
                sprinkle(value, generator)
    if size(*[False] * 9, True) and c:
        return refused_call(case, generator, rank)
    needed = [name for name in case.arguments if size(True, True, False)]
    needed = needed if needed and c else list(case.arguments)  # without a cell alpha is not used
    threads = torch.get_num_threads()
    first = case.run("cpp", needed)
    if case.function == "mixed_cell":  # a layer has products by torch, whose bits depend on threads
        torch.set_num_threads(size(1, 2))
    second = case.run("cpp", needed)
    torch.set_num_threads(threads)
    for name, value in first.items():
        same = torch.equal(value.nan_to_num(1.5, 2.5, 3.5), second[name].nan_to_num(1.5, 2.5, 3.5))
        assert same, f"seed {seed}: {name} differs between two calls"
    if not special:
        agrees_with_reference(case, needed, first, seed)


def refused_call(case, generator, rank):
    channels = case.options["channels"]
    channels.data[int(torch.randint(len(channels), (1,), generator=generator))] = pick(
        generator, (rank, -1, 2**62, -(2**63))
    )
    with pytest.raises(ValueError, match=REFUSED):
        case.run("cpp")


def agrees_with_reference(case, needed, results, seed):
    """Sums of up to some 10^3 rounding errors; tests/test_kernels_* state tighter bounds."""
    if not case.gradient.numel():
        assert all(not value.isnan().any() for value in results.values()), f"seed {seed}"
        return
    exact = case.to(torch.float64).run("reference", needed)
    for name, value in results.items():
        if not value.numel():
            continue
        unit = torch.finfo(case.gradient.dtype).eps * max(1.0, float(exact[name].abs().max()))
        error = float((value.double() - exact[name]).abs().max())
        assert error <= 100 * unit, f"seed {seed}: {name}: error {error:.3g}, unit {unit:.3g}"


@pytest.mark.parametrize("block", range(4))
def test_random_calls(block):
    for seed in range(50 * block, 50 * block + 50):
        random_call(seed)


@pytest.mark.campaign
def test_ten_thousand_random_calls():
    calls = int(os.environ.get("NASLORA_FUZZ_CALLS", "10000"))
    start = int(os.environ.get("NASLORA_FUZZ_SEED", "1000"))
    for seed in range(start, start + calls):
        random_call(seed)


@pytest.mark.campaign
@pytest.mark.parametrize("call", CALLS)
def test_channels_written_by_another_thread_for_long(call):
    refused = hammer(CALLS[call](), 20000)
    print(f"{call}: {refused} of 20000 calls refused")
    assert refused > 0


@pytest.mark.parametrize("size", [1, 3, 9])
@pytest.mark.parametrize("value", SPECIAL)
def test_folded_functions_with_special_values(size, value):
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(2, 4, 5, C_IN, generator=generator)
    A, B = torch.randn(C, C_IN, generator=generator), torch.randn(C_OUT, C, generator=generator)
    weight = torch.randn(C_OUT, C_IN, generator=generator)
    kernel = torch.randn(C, C, size, size, generator=generator)
    kernel[0, 1, size // 2, 0] = value
    x[0, 2, 1, 3] = value
    for _ in range(2):
        h = folded_linear(x, weight, None, A, B, kernel, 0.5, 0.25, backend="cpp")
        y = folded_cell(x[..., :C], kernel, 0.5, 0.25, backend="cpp")
        assert h.shape == (2, 4, 5, C_OUT) and y.shape == (2, 4, 5, C)
