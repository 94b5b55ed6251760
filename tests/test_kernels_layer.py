"""The adapter layer of every backend against the reference."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import (
    ALL_TARGETS,
    CELL,
    DTYPES,
    TARGETS,
    assert_as_good_as_reference,
    few_costly,
    layer_case,
    only_cpp,
    targets_and,
    without_max_pool,
)

from naslora_kernels import nas_lora_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")
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


@pytest.mark.parametrize(("target", "bias"), few_costly(TARGETS, [(True,), (False,)], bool))
def test_gradients_of_the_frozen_linear_where_asked_for(target, bias):
    case = layer_case(*SMALL, bias=bias).to(torch.float32)
    assert_as_good_as_reference(target, case)


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
