"""What the kernels promise about infinity, NaN, overflow and the small numbers of float16.

``mixed_cell`` states the contract. The reference defines which elements are finite.
"""

import itertools

import pytest
import torch
from kernel_cases import CELL, DTYPES, KINDS, TARGETS, assert_as_good_as_reference, few_costly

VALUES = [float("inf"), float("-inf"), float("nan")]
FINITE = ("folded cell", "separable cell", "layer")
kinds = pytest.mark.parametrize("kind", FINITE)


def with_dtypes(*simulated_marks):
    """Targets and dtypes. Triton's interpreter is slow, so it gets one dtype, and the marks."""
    pairs = []
    for parameter in TARGETS:
        target, marks = parameter.values[0], [*parameter.marks]
        if target.simulated:
            marks += simulated_marks
        for dtype in DTYPES[:1] if target.simulated else DTYPES:
            pairs.append(pytest.param(target, dtype, marks=marks, id=f"{parameter.id}-{dtype}"))
    return pytest.mark.parametrize("target, dtype", pairs)


targets = pytest.mark.parametrize("target", TARGETS)


PLACES = (0.5, 0.0, 1.0)  # in a map, between two corners


def with_value(case, name, value):
    tensor = case.tensor(name)
    tensor.view(-1)[tensor.numel() // 2] = value
    return case


@targets
@kinds
@pytest.mark.parametrize("value", VALUES)
def test_an_empty_batch_has_zero_gradients(target, kind, value):
    """A sum over no pixels is zero. The reference returns NaN, its softmax times zero."""
    for name in CELL:
        case = with_value(KINDS[kind]((0, 3, 3)).to(torch.float32), name, value)
        for result in case.on(target.device).run(target).values():
            assert not result.count_nonzero() and result.isfinite().all(), name


def maps_of(target):
    maps = [(1, 6, 7), (1, 1, 1), (1, 14, 14)]
    return [(1, 3, 4)] if target.simulated else maps[: 3 if target.backend == "cpp" else 2]


@with_dtypes()
@kinds
def test_a_map_that_is_not_finite(target, kind, dtype):
    """With finite parameters the same elements of y and of dL/dz are finite as in the reference."""
    # Simulated, the three kinds have one value and place each. A gradient of the layer may spread
    # farther: its NaN reaches every feature.
    one = FINITE.index(kind)
    values, places = (VALUES[one : one + 1], PLACES[:1]) if target.simulated else (VALUES, PLACES)
    changed = ("first", "gradient") if kind != "layer" and not target.simulated else ("first",)
    for grid, value, place, name in itertools.product(maps_of(target), values, places, changed):
        case = KINDS[kind](grid).to(dtype)
        first = next(iter(case.arguments))
        pixels = case.tensor(first if name == "first" else name).flatten(0, 2)  # a view
        channel = 0 if kind == "layer" else case.options["channels"][0]
        pixels[round(place * (len(pixels) - 1)), channel] = value
        case = case.on(target.device)
        kernel, reference = case.run(target), case.run("reference")
        for result in ("result", first):
            finite = reference[result].isfinite()
            assert torch.equal(kernel[result].isfinite(), finite), (result, grid, value, place)
            if dtype == torch.float64:
                torch.testing.assert_close(kernel[result][finite], reference[result][finite])


@with_dtypes(pytest.mark.campaign)  # a minute each
@kinds
def test_nothing_hides_an_infinity_or_a_nan(target, kind, dtype):
    """Where the reference is not finite, the kernels are not. They may say NaN instead of infinity,
    and may spread a parameter's or a gradient's NaN to more elements."""
    names = (*KINDS[kind]((1, 1, 1)).arguments, "gradient")
    grids = itertools.cycle(maps_of(target))
    for value in VALUES:
        for name, grid in zip(names, grids, strict=False):
            case = with_value(KINDS[kind](grid).to(dtype), name, value).on(target.device)
            kernel, reference = case.run(target), case.run("reference")
            for result, expected in reference.items():
                if name == "gradient" and result.startswith("dw") and target.simulated:
                    continue  # some taps reach no pixel of its small map; it does not compute them
                hidden = kernel[result].isfinite() & ~expected.isfinite()
                assert not hidden.any(), (name, result, grid, value)


def scaled(case, **factors):
    for name, factor in factors.items():
        case.tensor(name).mul_(factor)
    return case


SCALES = [(1e30, 1e-30), (1e-30, 1e30), (1e17, 1e17)]


@pytest.mark.parametrize(
    ("target", "kind", "scales"),
    few_costly(
        TARGETS,
        itertools.product(FINITE[:2], SCALES),
        lambda kind, scales: (kind, scales) in zip(FINITE, SCALES, strict=True),
    ),
)
def test_large_and_small_numbers(target, kind, scales):
    """No overflow as long as every product of two arguments and every sum is below the largest."""
    grid = maps_of(target)[0]
    case = scaled(KINDS[kind](grid), z=scales[0], gradient=scales[1]).to(torch.float32)
    assert_as_good_as_reference(target, case)


SMALL = itertools.product((torch.float16, torch.float32), range(-5, 2))


@pytest.mark.parametrize(
    ("target", "parameters", "exponent"),
    few_costly(TARGETS, SMALL, lambda parameters, e: parameters == torch.float16 and e == -5),
)
@kinds
def test_small_numbers_in_float16(target, kind, parameters, exponent):
    """float16 has steps of 6e-8 below 6e-5, so errors of some percent are its own.

    z and dL/dy of a layer, and every result, are rounded to float16. An error is at most that of
    the reference, which rounds at more places, and some steps.
    """
    grid = maps_of(target)[0]
    for seed in range(1 if target.simulated else 2):
        case = KINDS[kind](grid, seed)
        case = scaled(case, **{next(iter(case.arguments)): 10.0**exponent, "gradient": 0.01})
        case = case.to(torch.float16, parameters).on(target.device)
        kernel, reference = case.run(target), case.run("reference")
        truth = case.to(torch.float64).run("reference")
        for name, exact in truth.items():
            error = (kernel[name].double() - exact).abs().max()
            reference_error = (reference[name].double() - exact).abs().max()
            step = max(2.0**-24, 1e-3 * float(exact.abs().max()))
            assert error <= 2 * reference_error + 2 * step, name
