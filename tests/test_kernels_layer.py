"""The adapter layer of every backend against the reference."""

import functools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALL_TARGETS,
    CELL,
    DTYPES,
    FEW_LAYOUT_PAIRS,
    LAYOUT_PAIRS,
    TARGETS,
    assert_as_good_as_reference,
    assert_random_cases_match,
    assert_same_bits_on_any_number_of_threads,
    few_costly,
    layer_case,
    needs_cpp,
    targets_and,
)

from naslora_kernels import nas_lora_linear
from naslora_kernels.operations import MAX_POOL

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")
only_cpp = pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
every_target = pytest.mark.parametrize("target", TARGETS)

ADAPTER = ("lora_A", "lora_B", *CELL)
# (B, H, W), C_in, C_out, r, c: widths that are and are no multiple of a vector, numbers of tokens
# that are and are no multiple of a block, one token, none, ranks in blocks of 1, 2 and 3.
SHAPES = [
    ((3, 14, 14), 64, 192, 3, 2),
    ((1, 9, 13), 37, 51, 1, 1),
    ((2, 7, 7), 128, 96, 4, 3),
    ((1, 1, 1), 5, 3, 2, 1),
    ((1, 33, 17), 24, 40, 24, 16),
    ((2, 6, 5), 16, 1, 7, 5),
    ((0, 14, 14), 16, 24, 3, 2),
    ((2, 5, 5), 16, 24, 3, 0),
]
SMALL = ((2, 7, 6), 64, 96, 3, 2)
# Where cases cost seconds, these run.
QUICK = [
    *((((2, 6, 5), 16, 1, 7, 5), dtype) for dtype in (torch.bfloat16, torch.float16)),
    (((1, 1, 1), 5, 3, 2, 1), torch.float64),
    *((shape, torch.float32) for shape in SHAPES[1:2] + SHAPES[4:5] + SHAPES[6:]),
]


def without_max_pool(case):
    """In 16 bits z is rounded, which at random changes which pixel is the largest, here as in
    PyTorch, and sends a gradient elsewhere. The cell's tests cover the max-pool."""
    case.arguments["alpha"][MAX_POOL] = -15.0  # a weight of about 1e-7
    return case


FUZZED_SHAPES = int(os.environ.get("NASLORA_FUZZ_SHAPES", "100")) // 3


def largest_map(shape):
    """Numbers in the rank-r map, and a twentieth of those in x, which is only passed over."""
    grid, c_in, _, rank, _ = shape
    return math.prod(grid) * max(rank, c_in // 20)


@pytest.mark.parametrize(
    ("target", "shape", "dtype"),
    few_costly(
        targets_and(SHAPES, largest_map, ALL_TARGETS),
        [(dtype,) for dtype in DTYPES],
        lambda shape, dtype: (shape, dtype) in QUICK,
    ),
)
def test_matches_reference(target, shape, dtype):
    case = layer_case(*shape)
    if dtype in (torch.bfloat16, torch.float16):
        case = without_max_pool(case)
    case = case.to(dtype)
    needed = ("x", *ADAPTER) if shape[-1] else ("x", "lora_A", "lora_B")
    assert_as_good_as_reference(target, case, needed)


@pytest.mark.parametrize(
    ("target", "dtype"),
    few_costly(TARGETS, [(d,) for d in DTYPES[2:]], lambda dtype: dtype == torch.float16),
)
def test_float32_adapter_under_16_bit_activations(target, dtype):
    case = without_max_pool(layer_case(*SMALL)).to(dtype, parameter_dtype=torch.float32)
    results = assert_as_good_as_reference(target, case, ("x", *ADAPTER))
    assert results["x"].dtype == dtype
    assert results["lora_A"].dtype == torch.float32


@pytest.mark.parametrize(("target", "bias"), few_costly(TARGETS, [(True,), (False,)], bool))
def test_gradients_of_the_frozen_linear_where_asked_for(target, bias):
    case = layer_case(*SMALL, bias=bias).to(torch.float32)
    assert_as_good_as_reference(target, case)


@pytest.mark.parametrize(
    ("target", "layout", "gradient_layout"),
    few_costly(TARGETS, LAYOUT_PAIRS, lambda *pair: pair in FEW_LAYOUT_PAIRS),
)
def test_strided_inputs_and_gradients(target, layout, gradient_layout):
    case = layer_case((2, 5, 7), 48, 40, 4, 3).to(torch.float32).on(target.device)
    case = case.laid_out(layout, gradient_layout)
    assert_as_good_as_reference(target, case, ("x", *ADAPTER))


@every_target
def test_expanded_input_and_gradient_and_transposed_parameters(target):
    case = layer_case((1, 6, 5), 16, 24, 3, 2).to(torch.float32).on(target.device)
    case.arguments["x"] = case.arguments["x"].expand(3, 6, 5, 16)
    for name in ("lora_A", "lora_B", "weight"):
        case.arguments[name] = case.arguments[name].t().contiguous().t()
    case.gradient = torch.ones((), device=target.device).expand(3, 6, 5, 24)
    assert_as_good_as_reference(target, case)


@pytest.mark.parametrize("target", few_costly(TARGETS, [()], lambda: False))
def test_gradcheck(target):
    case = layer_case((1, 3, 4), 5, 4, 3, 2).on(target.device)
    tensors = {name: t.requires_grad_() for name, t in case.arguments.items()}
    assert torch.autograd.gradcheck(
        lambda *values: nas_lora_linear(
            **dict(zip(tensors, values, strict=True)), **case.options, backend=target.backend
        ),
        list(tensors.values()),
        fast_mode=target.simulated,
    )


@functools.cache
def small_case_and_results(target):
    """A case in float32 that tests only read, and what the target computes for it."""
    case = layer_case(*SMALL).to(torch.float32).on(target.device)
    return case, case.run(target, ("x", *ADAPTER))


NEEDED = [("x", "alpha"), ("x", "lora_A", "lora_B", *CELL[1:]), ("lora_B",), ("x",)]


@pytest.mark.parametrize(
    ("target", "needed"),
    few_costly(TARGETS, [(n,) for n in NEEDED], lambda needed: needed in NEEDED[:2]),
)
def test_partial_gradients_equal_full_ones(target, needed):
    case, full = small_case_and_results(target)
    for name, value in case.run(target, needed).items():
        assert torch.equal(value, full[name]), name


def kept_for_backward(target, case, needed):
    """The tensors kept for the backward, without the parameters."""
    case = case.on(target.device)
    arguments = {n: t.requires_grad_(n in needed) for n, t in case.arguments.items()}
    given = {id(arguments[n]) for n in (*ADAPTER, "weight")} | {id(case.options["channels"])}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nas_lora_linear(**arguments, **case.options, backend=target.backend)
    return [tuple(t.shape) for t in kept if id(t) not in given]


@every_target
def test_keeps_x_and_z_for_the_backward(target):
    case = layer_case(*SMALL).to(torch.float32)
    x, z = (2, 7, 6, 64), (2, 7, 6, 3)
    assert sorted(kept_for_backward(target, case, ("x", *ADAPTER))) == sorted([x, z])


@every_target
def test_keeps_as_many_bytes_as_plain_lora(target):
    lora = pytest.importorskip("peft.tuners.lora")
    linear = torch.nn.Linear(64, 96).requires_grad_(False)
    layer = lora.Linear(linear, "default", lora.LoraConfig(r=3, lora_alpha=32), r=3, lora_alpha=32)
    x = torch.randn(2, 7, 6, 64, requires_grad=True)
    parameters = {p.data_ptr() for p in layer.parameters()}
    kept = {}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x)
    case = layer_case(*SMALL).to(torch.float32)
    shapes = kept_for_backward(target, case, ("x", *ADAPTER))
    ours = sum(torch.Size(shape).numel() for shape in shapes)
    assert ours <= 1.02 * sum(kept.values())


@every_target
def test_keeps_only_z_in_an_architecture_step(target):
    case = layer_case(*SMALL).to(torch.float32)
    assert kept_for_backward(target, case, ("x", "alpha")) == [(2, 7, 6, 3)]


@only_cpp
def test_same_bits_on_any_number_of_threads():
    case = layer_case((4, 14, 14), 96, 160, 6, 4).to(torch.float32)
    # The frozen product is torch's, whose bits may depend on threads: leave it out.
    case.arguments["weight"].zero_()
    assert_same_bits_on_any_number_of_threads(case, ("x", *ADAPTER))


@every_target
def test_zero_decoder_changes_nothing(target):
    case = layer_case(*SMALL).to(torch.float32).on(target.device)
    case.arguments["lora_B"].zero_()
    x, weight, bias = (case.arguments[name] for name in ("x", "weight", "bias"))
    torch.testing.assert_close(
        case.run(target, ("x",))["result"], F.linear(x, weight, bias), rtol=0, atol=1e-6
    )  # both are torch's product; the order of its sums may differ


@only_cpp
def test_row_offsets_beyond_32_bits():
    # The memory between the two rows is reserved, but never touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    far, columns, rank = 2**31 + 5, 21, 3
    storage = torch.empty(far + columns, dtype=torch.bfloat16)
    distant = storage.as_strided((1, 1, 2, columns), (0, 0, far, 1)).copy_(torch.randn(2, columns))
    case = layer_case((1, 1, 2), columns, 5, rank, 0).to(torch.bfloat16)
    z = torch.zeros(1, 1, 2, rank, dtype=torch.bfloat16)
    weight, A, B, *cell = (case.arguments[n] for n in ("weight", "lora_A", "lora_B", *CELL))
    saved = (distant, z, weight, A, B, *cell, case.options["channels"], 1.0)
    need_lora_A = (False, True, False, False, False)
    backward = torch.ops.naslora_cpp.nas_lora_linear_backward
    gradient = backward(case.gradient, *saved, *need_lora_A)[1]
    saved = (distant.contiguous(), *saved[1:])
    assert torch.equal(gradient, backward(case.gradient, *saved, *need_lora_A)[1])


@every_target
def test_random_shapes(target):
    side = 5 if target.simulated else 15

    def draw(pick, seed):
        rank = pick(1, 24) if pick(0, 3) == 0 else pick(1, 6)
        grid = (pick(0, 3), pick(1, side), pick(1, side))
        return layer_case(grid, pick(1, 90), pick(1, 150), rank, pick(1, rank), seed)

    count = FUZZED_SHAPES // (10 if target.costs_a_case else 1)
    assert_random_cases_match(target, count, draw, without_max_pool)
