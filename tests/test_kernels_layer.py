"""The adapter layer of every backend against the reference."""

import itertools
import math

import pytest
import torch
from kernel_cases import (
    ALL_TARGETS,
    CELL,
    DTYPES,
    TARGETS,
    assert_as_good_as_reference,
    few_costly,
    layer_case,
    without_max_pool,
)

from naslora_kernels import nas_lora_linear

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")

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


def largest_map(shape, _):
    """Numbers in the rank-r map, and a twentieth of those in x, which is only passed over."""
    grid, c_in, _, rank, _ = shape
    return math.prod(grid) * max(rank, c_in // 20)


@pytest.mark.parametrize(
    ("target", "shape", "dtype"),
    few_costly(
        ALL_TARGETS,
        itertools.product(SHAPES, DTYPES),
        lambda shape, dtype: (shape, dtype) in QUICK,
        largest_map,
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


Z, X = (2, 7, 6, 3), (2, 7, 6, 64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("needed, expected", [(("x", *ADAPTER), [Z, X]), (("x", "alpha"), [Z])])
def test_what_is_kept_for_the_backward(target, needed, expected):
    """Beside the parameters x and z, and in an architecture step z alone."""
    case = layer_case(*SMALL).to(torch.float32).on(target.device)
    arguments = {n: t.requires_grad_(n in needed) for n, t in case.arguments.items()}
    given = {id(arguments[n]) for n in (*ADAPTER, "weight")} | {id(case.options["channels"])}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        nas_lora_linear(**arguments, **case.options, backend=target.backend)
    assert sorted(tuple(t.shape) for t in kept if id(t) not in given) == expected
