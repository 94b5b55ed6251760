"""What the cell, the layer and attention promise alike, on every backend."""

import functools
import itertools
import os

import pytest
import torch
from kernel_cases import (
    CELL,
    DTYPES,
    FEW_LAYOUT_PAIRS,
    KINDS,
    LAYOUT_PAIRS,
    LAYOUTS,
    TARGETS,
    assert_as_good_as_reference,
    assert_better_on_average,
    attention_case,
    cell_case,
    few_costly,
    layer_case,
    only_cpp,
    without_max_pool,
)

import naslora_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
FUZZED_SHAPES = int(os.environ.get("NASLORA_FUZZ_SHAPES", "100"))


def every_kind(names=(), cases=lambda kind: [()], fast=lambda *case: True):
    """Targets, kinds of calls and further values, which depend on the kind: see ``few_costly``."""
    pairs = [(kind, *case) for kind in KINDS for case in cases(kind)]
    return pytest.mark.parametrize(("target", "kind", *names), few_costly(TARGETS, pairs, fast))


@functools.cache
def case_and_results(target, kind):
    """A case in float32 that tests only read, and what the target computes for it."""
    case = KINDS[kind]((2, 5, 9)).to(torch.float32).on(target.device)
    return case, case.run(target)


@every_kind(
    ("layout", "gradient_layout"),
    lambda kind: LAYOUT_PAIRS,
    lambda kind, *pair: pair in FEW_LAYOUT_PAIRS[kind == "attention" :: 2],
)
def test_strided_arguments_and_gradients(target, kind, layout, gradient_layout):
    case, expected = case_and_results(target, kind)
    strided = case.laid_out(layout, gradient_layout)
    if kind == "layer":  # the frozen product is torch's, whose bits depend on strides
        assert_as_good_as_reference(target, strided)
        return
    for name, value in strided.run(target).items():
        assert torch.equal(value, expected[name]), name


@every_kind()
def test_expanded_arguments_and_gradients(target, kind):
    case = KINDS[kind]((1, 2, 3)).to(torch.float32).on(target.device)
    for name, value in case.arguments.items():
        if value.dim() == 4:
            case.arguments[name] = value.expand(3, *value.shape[1:])
        elif value.dim() == 2:
            case.arguments[name] = value.t().contiguous().t()
    shape = (3, *case.gradient.shape[1:])
    case.gradient = torch.ones((), device=target.device).expand(shape)  # as y.sum() sends it
    assert_as_good_as_reference(target, case)


WIDE = {
    "cell": lambda: cell_case((2, 9, 11, 6), 4),
    "layer": lambda: without_max_pool(layer_case((2, 7, 6), 64, 96, 3, 2)),
}


@pytest.mark.parametrize(
    ("target", "name", "dtype"),
    few_costly(
        TARGETS,
        itertools.product(WIDE, DTYPES[2:]),
        lambda name, dtype: dtype == (torch.float16 if name == "layer" else torch.bfloat16),
    ),
)
def test_float32_parameters_under_16_bits(target, name, dtype):
    case = WIDE[name]().to(dtype, parameter_dtype=torch.float32)
    needed = [name for name in case.arguments if name not in ("weight", "bias")]
    results = assert_as_good_as_reference(target, case, needed)
    assert results.pop("result").dtype == dtype
    assert all(value.dtype == case.arguments[name].dtype for name, value in results.items())


# What each kind of training step asks for, and single arguments.
NEEDED = {
    "cell": [("z", "alpha"), ("z", *CELL[1:]), CELL, ("alpha",), ("z",), ("pw",), ("dw_dil5",)],
    "layer": [("x", "alpha"), ("x", "lora_A", "lora_B", *CELL[1:]), ("lora_B",), ("x",)],
    "attention": [("q", "k", "v"), ("q", "rel_h"), ("v",), ("k",), ("q",), ("rel_w",)],
}


def needed_of(kind):
    return [(needed,) for needed in NEEDED[kind.split()[-1]]]


@every_kind(("needed",), needed_of, lambda kind, needed: (needed,) in needed_of(kind)[:2])
def test_partial_gradients_equal_full_ones(target, kind, needed):
    case, full = case_and_results(target, kind)
    for name, value in case.run(target, needed).items():
        assert torch.equal(value, full[name]), name


# The reference has a test of its own gradients, with which a costly target is compared elsewhere.
@every_kind(fast=lambda kind: kind == "attention")
def test_gradcheck(target, kind):
    case = KINDS[kind]((1, 2, 3)).on(target.device)
    function = getattr(naslora_kernels, case.function)
    leaves = {name: value.requires_grad_() for name, value in case.arguments.items()}

    def call(*values):
        arguments = dict(zip(leaves, values, strict=True))
        return function(**arguments, **case.options, backend=target.backend)

    # One random direction instead of every element: a simulated call takes 0.1 s.
    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=target.simulated)


# A case, and the argument whose maps are far from each other.
FAR = {
    "cell": (lambda: cell_case((2, 5, 6, 3), 2), "z"),
    "attention": (lambda: attention_case(2, 1, (3, 4), 8), "k"),
}


@pytest.mark.parametrize(("target", "kind"), few_costly(TARGETS, [(kind,) for kind in FAR]))
def test_offsets_beyond_32_bits(target, kind):
    # The memory between the two maps is reserved, but never touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    make, name = FAR[kind]
    case = make().to(torch.bfloat16).on(target.device)
    expected, near = case.run(target), case.arguments[name]
    far = 2**31 + 5
    storage = torch.empty(far + near[0].numel(), dtype=near.dtype, device=target.device)
    distant = storage.as_strided(near.shape, (far, *near.stride()[1:]))
    case.arguments[name] = distant.copy_(near)
    for result, value in case.run(target).items():
        assert torch.equal(value, expected[result]), result


ON_THREADS = {
    "cell, folded": lambda: cell_case((7, 14, 14, 24), 2),
    "cell, separable": lambda: cell_case((7, 14, 14, 24), 16),
    "layer": lambda: layer_case((4, 14, 14), 96, 160, 6, 4),
    "attention, blocks": lambda: attention_case(1, 1, (64, 40), 8),
    "attention, windows": lambda: attention_case(3, 2, (14, 14), 16),
}


@only_cpp
@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("make", ON_THREADS.values(), ids=ON_THREADS)
def test_same_bits_on_any_number_of_threads(make, dtype):
    case = make().to(dtype)
    # The frozen product is torch's, whose bits may depend on threads: leave it out.
    needed = [name for name in case.arguments if name not in ("weight", "bias")]
    case.arguments.get("weight", torch.empty(0)).zero_()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("cpp", needed)
        for count in (2, 2, 3):
            torch.set_num_threads(count)
            for name, value in case.run("cpp", needed).items():
                assert torch.equal(value, expected[name]), name
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", ["cell", "layer"])
@pytest.mark.parametrize("target", TARGETS)
def test_random_shapes(target, function):
    """In random dtypes and layouts, with gradients of random arguments."""
    generator = torch.Generator().manual_seed(2024)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    ratios, side = {}, 5 if target.simulated else 20
    count = FUZZED_SHAPES // (3 if function == "layer" else 1)
    for seed in range(count // (20 if target.costs_a_case else 1)):
        rank = pick(1, 24) if pick(0, 3) == 0 else pick(1, 6)
        grid = (pick(0, 3), pick(1, side), pick(1, side))
        if function == "cell":
            case = cell_case((*grid, rank), pick(0, rank), seed)
        else:
            case = layer_case(grid, pick(1, 90), pick(1, 150), rank, pick(1, rank), seed)
        dtype = DTYPES[pick(0, 3)]
        if function == "layer" and dtype.itemsize == 2:
            case = without_max_pool(case)
        layouts = [list(LAYOUTS)[pick(0, 3)] for _ in range(2)]
        first, *others = (name for name in case.arguments if name not in ("weight", "bias"))
        needed = [name for name in (first, *others) if pick(0, 1)]
        # Without channels the reference depends on the first argument alone.
        if not needed or not case.options["channels"].numel():
            needed = [first]
        about = f"{seed=} {case.gradient.shape} {case.options} {dtype} {layouts=} {needed=}"
        case = case.to(dtype).on(target.device)
        try:
            assert_as_good_as_reference(target, case.laid_out(*layouts), needed, ratios)
        except AssertionError as error:
            raise AssertionError(about) from error
    if not target.costs_a_case:  # a dozen ratios say little
        assert_better_on_average(ratios)
