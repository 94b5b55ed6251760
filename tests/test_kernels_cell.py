"""The cell of every backend against the reference."""

import functools
import itertools
import math
import os

import pytest
import torch
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
    cell_case,
    few_costly,
    needs_cpp,
    targets_and,
)

from naslora_kernels import mixed_cell

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")
only_cpp = pytest.mark.skipif(bool(needs_cpp), reason=str(needs_cpp))
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
FUZZED_SHAPES = int(os.environ.get("NASLORA_FUZZ_SHAPES", "100"))


@functools.cache
def case_and_results(target, shape, c):
    """A case in float32 that tests only read, and what the target computes for it."""
    case = cell_case(shape, c).to(torch.float32).on(target.device)
    return case, case.run(target)


@pytest.mark.parametrize(
    ("target", "case", "dtype"),
    few_costly(
        targets_and(SHAPES, lambda case: math.prod(case[0]), ALL_TARGETS),
        [(dtype,) for dtype in DTYPES],
        lambda case, dtype: (case, dtype) in QUICK,
    ),
)
def test_matches_reference(target, case, dtype):
    assert_as_good_as_reference(target, cell_case(*case).to(dtype))


@pytest.mark.parametrize(
    ("target", "dtype"),
    few_costly(TARGETS, [(d,) for d in DTYPES[2:]], lambda dtype: dtype == torch.bfloat16),
)
def test_float32_parameters_under_16_bit_maps(target, dtype):
    case = cell_case((2, 9, 11, 6), 4).to(dtype, parameter_dtype=torch.float32)
    results = assert_as_good_as_reference(target, case)
    assert results["alpha"].dtype == torch.float32


@pytest.mark.parametrize(
    ("target", "layout", "gradient_layout"),
    few_costly(TARGETS, LAYOUT_PAIRS, lambda *pair: pair in FEW_LAYOUT_PAIRS),
)
def test_strided_maps_and_gradients(target, layout, gradient_layout):
    case, expected = case_and_results(target, (2, 5, 4, 6), 4)
    for name, value in case.laid_out(layout, gradient_layout).run(target).items():
        assert torch.equal(value, expected[name]), name
        assert value.is_contiguous(), name


@every_target
def test_expanded_map_and_gradient(target):
    case = cell_case((1, 6, 5, 4), 3).to(torch.float32).on(target.device)
    case.arguments["z"] = case.arguments["z"].expand(3, 6, 5, 4)
    ones = torch.ones((), device=target.device)
    case.gradient = ones.expand(3, 6, 5, 4)  # as y.sum() sends it
    assert_as_good_as_reference(target, case)


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


# The reference has a test of its own gradients, with which a costly target is compared elsewhere.
@pytest.mark.parametrize(("target", "c"), few_costly(TARGETS, [(2,), (4,)], lambda c: False))
def test_gradcheck(target, c):
    case = cell_case((1, 4, 3, c + 1), c).on(target.device)
    inputs = [case.arguments[name].requires_grad_() for name in ("z", *CELL)]
    channels = case.options["channels"]
    assert torch.autograd.gradcheck(
        lambda *tensors: mixed_cell(*tensors, channels, backend=target.backend),
        inputs,
        # One random direction instead of every element: a simulated call takes 0.1 s.
        fast_mode=target.simulated,
    )


# What each kind of training step asks for, and single arguments.
NEEDED = [("z", "alpha"), ("z", *CELL[1:]), CELL, ("alpha",), ("z",), ("pw",), ("dw_dil5",)]


@pytest.mark.parametrize(
    ("target", "needed", "c"),
    few_costly(
        TARGETS,
        itertools.product(NEEDED, [2, 5]),
        lambda needed, c: (needed, c) in zip(NEEDED[:4], [2, 5, 5, 2], strict=True),
    ),
)
def test_partial_gradients_equal_full_ones(target, needed, c):
    case, full = case_and_results(target, (2, 5, 9, 6), c)
    for name, value in case.run(target, needed).items():
        assert torch.equal(value, full[name]), name


@every_target
def test_gradient_of_alpha_with_many_channels(target):
    """Every eight channels add four terms: here they are more than the 32 columns of a program."""
    assert_as_good_as_reference(target, cell_case((1, 1, 2, 57), 57).to(torch.float32), ("alpha",))


@only_cpp
@pytest.mark.parametrize("c", [2, 16])
def test_same_bits_on_any_number_of_threads(c):
    case = cell_case((7, 14, 14, 24), c).to(torch.float32)
    assert_same_bits_on_any_number_of_threads(case)


CORNERS_AND_MIDDLE = [(0, 0), (3, 4), (5, 6)]
NON_FINITE = [float("nan"), float("inf"), float("-inf")]
# Every place and every value once in each argument.
FEW_NON_FINITE = [
    *zip(["z"] * 3, CORNERS_AND_MIDDLE, NON_FINITE, [2, 5, 2], strict=True),
    *zip(["gradient"] * 3, CORNERS_AND_MIDDLE, NON_FINITE, [5, 2, 5], strict=True),
]


@pytest.mark.parametrize(
    ("target", "argument", "where", "value", "c"),
    few_costly(
        TARGETS,
        itertools.product(["z", "gradient"], CORNERS_AND_MIDDLE, NON_FINITE, [2, 5]),
        lambda *case: case in FEW_NON_FINITE[::2],
    ),
)
def test_non_finite_values_spread_as_in_pytorch(target, argument, where, value, c):
    case = cell_case((2, 6, 7, 6), c).on(target.device)
    changed = case.gradient if argument == "gradient" else case.arguments["z"]
    changed[1, where[0], where[1], case.options["channels"][0]] = value
    kernel, reference = case.run(target), case.run("reference")
    for name, expected in reference.items():
        finite, spared = expected.isfinite(), kernel[name].isfinite()
        assert spared[finite].all(), name
        assert not spared.all() or finite.all(), name
        if name in ("result", "z"):
            # PyTorch's gradients of weights may multiply the padding, so that NaN reaches every
            # tap; a kernel that leaves the padding out keeps more of them finite.
            assert torch.equal(spared, finite), name
        torch.testing.assert_close(kernel[name][finite], expected[finite])


@pytest.mark.parametrize(
    ("target", "value"), few_costly(TARGETS, [(math.nan,), (math.inf,)], math.isnan)
)
def test_non_finite_values_on_one_pixel(target, value):
    case = cell_case((2, 1, 1, 3), 3).on(target.device)
    case.arguments["z"][0, 0, 0, 1] = value
    kernel, reference = case.run(target), case.run("reference")
    for name, expected in reference.items():
        assert torch.equal(kernel[name].isfinite(), expected.isfinite()), name


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


@every_target
def test_offsets_beyond_32_bits(target):
    # The memory between the two maps is reserved, but never touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    shape, far = (2, 5, 6, 3), 2**31 + 5
    case = cell_case(shape, 2).to(torch.bfloat16).on(target.device)
    storage = torch.empty(far + 90, dtype=torch.bfloat16, device=target.device)
    distant = storage.as_strided(shape, (far, 18, 3, 1)).copy_(case.arguments["z"])
    expected = case.run(target)
    case.arguments["z"] = distant
    for name, value in case.run(target).items():
        assert torch.equal(value, expected[name]), name


@every_target
def test_random_shapes(target):
    def draw(pick, seed):
        rank = pick(1, 24) if pick(0, 3) == 0 else pick(1, 6)
        side = 6 if target.simulated else 70 if pick(0, 9) == 0 else 20
        return cell_case((pick(0, 3), pick(1, side), pick(1, side), rank), pick(0, rank), seed)

    assert_random_cases_match(target, FUZZED_SHAPES // (20 if target.costs_a_case else 1), draw)
