"""The cell of every backend against the reference."""

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
    cell_case,
    few_costly,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")
every_target = pytest.mark.parametrize("target", TARGETS)

# (B, H, W, r), c: the windows and global maps of SAM, TinyViT's, and the corners: one pixel, one
# row, one column, odd sizes, maps cut into bands with a ragged last one, an empty batch, no
# channel, one channel, ranks that are no power of two, few (folded) and many (separable) channels.
SHAPES = [
    ((3, 14, 14, 3), 2),
    ((1, 64, 64, 3), 2),
    ((2, 7, 7, 3), 3),
    ((2, 14, 14, 24), 16),
    ((2, 14, 14, 6), 4),
    ((2, 1, 1, 4), 3),
    ((1, 1, 50, 3), 1),
    ((1, 50, 1, 5), 5),
    ((2, 5, 3, 7), 7),
    ((1, 67, 31, 3), 3),
    ((1, 20, 300, 6), 5),
    ((0, 14, 14, 3), 2),
    ((2, 6, 6, 3), 0),
    ((1, 14, 14, 3), 2),
    ((1, 5, 6, 24), 16),
    ((1, 20, 21, 3), 2),
]
# Where cases cost seconds, these run, with each dtype folded and separable once.
FOLDED, SEPARABLE = ((1, 14, 14, 3), 2), ((2, 5, 3, 7), 7)
QUICK = [
    *((FOLDED, dtype) for dtype in (torch.float32, torch.bfloat16)),
    *((SEPARABLE, dtype) for dtype in (torch.float64, torch.float16)),
    *((shape, torch.float32) for shape in SHAPES[5:8] + SHAPES[11:13] + SHAPES[14:]),
]


@pytest.mark.parametrize(
    ("target", "case", "dtype"),
    few_costly(
        ALL_TARGETS,
        itertools.product(SHAPES, DTYPES),
        lambda case, dtype: (case, dtype) in QUICK,
        lambda case, _: math.prod(case[0]),
    ),
)
def test_matches_reference(target, case, dtype):
    assert_as_good_as_reference(target, cell_case(*case).to(dtype))


@pytest.mark.parametrize(("target", "c"), few_costly(TARGETS, [(2,), (5,)], lambda c: c == 2))
def test_all_channels_by_default(target, c):
    case = cell_case((2, 5, 6, c), c).on(target.device)
    order = case.options["channels"]
    case.options["channels"] = torch.arange(c, device=target.device)
    expected = case.run(target)
    case.options["channels"] = None
    for name, value in case.run(target).items():
        assert torch.equal(value, expected[name]), name
    assert sorted(order.tolist()) == list(range(c))


@every_target
def test_other_channels_pass_bit_for_bit(target):
    case = cell_case((2, 5, 6, 7), 3).to(torch.float32).on(target.device)
    case.arguments["z"][0, 0, 0] = float("nan")
    results = case.run(target)
    others = [k for k in range(7) if k not in case.options["channels"]]
    assert torch.equal(results["result"][1, ..., others], case.arguments["z"][1, ..., others])
    assert torch.equal(results["z"][..., others], case.gradient[..., others])
    assert results["result"][0, 0, 0, others].isnan().all()


@every_target
def test_gradient_of_alpha_with_many_channels(target):
    """Every eight channels add four terms: here they are more than the 32 columns of a program."""
    assert_as_good_as_reference(target, cell_case((1, 1, 2, 57), 57).to(torch.float32), ("alpha",))


# Small integers make ties, -inf everywhere makes a window without a maximum above the padding.
@every_target
@pytest.mark.parametrize("maps", ["ties", "constant", "lowest", "nan among ties"])
def test_max_pool_routes_ties_as_pytorch(target, maps):
    case = cell_case((2, 6, 7, 3), 3).on(target.device)
    z = case.arguments["z"]
    if maps == "constant":
        z.fill_(1)
    elif maps == "lowest":
        z.fill_(float("-inf"))
    else:
        z.round_()
    if maps == "nan among ties":
        z[0, 2, 2:4] = float("nan")
    for name in CELL[1:]:  # the poolings and the skip alone
        case.arguments[name].zero_()
    case.arguments["alpha"][5] = 3.0
    kernel, reference = case.run(target, ("z",)), case.run("reference", ("z",))
    if maps in ("ties", "constant"):
        torch.testing.assert_close(kernel["result"], reference["result"])
    torch.testing.assert_close(kernel["z"], reference["z"])
