"""Attention with relative positions: every backend that serves it against the reference."""

import itertools
import math

import pytest
import torch
from kernel_cases import (
    ALL_TARGETS,
    DTYPES,
    TARGETS,
    UNAVAILABLE,
    assert_as_good_as_reference,
    attention_case,
    needs_cpp,
    serves_attention,
)

from naslora_kernels import rel_pos_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory", "instruction_set")


def serving(targets):
    """The targets whose backend computes attention."""
    return [target for target in targets if serves_attention(target.values[0])]


SERVING = serving(TARGETS)
every_target = pytest.mark.parametrize("target", SERVING)
OPERANDS = ("q", "k", "v", "rel_h", "rel_w")


def targets_with(values, simulated, campaign=(), targets=SERVING):
    """(target, value) pairs. Simulated targets take long, so they get values of their own, and
    those of ``campaign`` in the campaign only."""
    pairs = []
    for target in targets:
        simulates = target.values[0].simulated
        for value in (*simulated, *campaign) if simulates else values:
            long = [pytest.mark.campaign] if simulates and value in campaign else []
            name = f"{target.id}-{value}"
            marks = [*target.marks, *long]
            pairs.append(pytest.param(target.values[0], value, marks=marks, id=name))
    return pairs


def case_for(target, usual, simulated):
    """A random case of one of two sizes: see ``attention_case``."""
    return attention_case(*(simulated if target.simulated else usual))


# batch, heads, (H, W), d and the queries, if they are not those of the grid: windows of SAM, whole
# and cut by the edge of an image, the 1024 tokens of a head's parts and blocks and more,
# the widths of heads of ViT-B, ViT-H and TinyViT, grids that are no square, one row or column wider
# than a block of keys, sizes that fill no vector, more columns than a tile has, no image.
SHAPES = [
    (2, 3, (14, 14), 64),
    (2, 3, (14, 14), 64, 28),
    (1, 2, (14, 14), 80, 4),
    (1, 1, (3, 5), 16, 1030),
    (1, 1, (32, 32), 80),
    (1, 1, (33, 34), 32),
    (2, 2, (7, 7), 32),
    (1, 2, (9, 31), 128),
    (1, 1, (2, 300), 7),
    (1, 1, (300, 2), 5),
    (3, 1, (2, 3), 1),
    (1, 1, (9, 5), 33),
    (1, 1, (2, 70), 80),
    (1, 1, (2, 3), 300),
    (0, 2, (3, 4), 8),
]
# Interpreted: several blocks of queries and tiles of keys, the last ones not full, for each width
# of lanes.
SIMULATED_SHAPES = [
    (1, 2, (5, 9), 64),
    (1, 2, (5, 9), 64, 20),
    (1, 1, (9, 5), 80),
    (1, 1, (7, 7), 32),
    (3, 1, (2, 3), 1),
]
# More columns than Triton's tiles have at 80 features, very wide heads, no image.
EDGES = [(1, 1, (2, 18), 80), (1, 1, (2, 3), 300), (0, 2, (3, 4), 8)]
LONG_SHAPES = [(1, 1, (8, 8), 16, 72), (1, 1, (9, 5), 33), (2, 2, (7, 7), 32), (1, 1, (4, 17), 80)]
QUICK = [
    *itertools.product(SIMULATED_SHAPES, DTYPES[::2]),  # float32 and bfloat16
    *itertools.product(EDGES, DTYPES[:1]),
    *itertools.product(LONG_SHAPES[:1], DTYPES[1::2]),
    (LONG_SHAPES[-1], torch.bfloat16),  # blocks of 64 queries
]
LONG = [
    pair
    for pair in itertools.product([*SIMULATED_SHAPES, *LONG_SHAPES], DTYPES)
    if pair not in QUICK
] + [((1, 1, (2, 70), 80), torch.bfloat16)]
ALL = [*itertools.product(SHAPES, DTYPES)]


@pytest.mark.parametrize(
    ("target", "case"), targets_with(ALL, QUICK, LONG, targets=serving(ALL_TARGETS))
)
def test_matches_reference(target, case):
    shape, dtype = case
    results = assert_as_good_as_reference(target, attention_case(*shape).to(dtype))
    assert results["result"].isfinite().all()


@every_target
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1)])
def test_grids_of_one_row_or_column(target, grid):
    """A bias that all keys share has no gradient: what is left are differences of rounding."""
    case = attention_case(2, 2, grid, 8).to(torch.float32).on(target.device)
    results, expected = case.run(target), case.run("reference")
    for name, value in expected.items():
        torch.testing.assert_close(results[name], value, rtol=1e-5, atol=2e-6)


@every_target
@pytest.mark.parametrize("scale", [0.0, -0.3, 2])
def test_scale(target, scale):
    case = case_for(target, (1, 2, (5, 6), 8), (1, 1, (2, 3), 8)).to(torch.float32)
    case.options["scale"] = scale
    assert_as_good_as_reference(target, case)


# ---- Memory ------------------------------------------------------------------------------------


@every_target
def test_joining_the_heads_copies_nothing(target):
    o = attention_case(2, 3, (5, 4), 6).on(target.device).run(target, ("v",))["result"]
    assert o.transpose(1, 2).flatten(2).data_ptr() == o.data_ptr()


@every_target
def test_keeps_nothing_of_the_size_of_the_scores(target):
    case = case_for(target, (1, 2, (14, 14), 16), (1, 2, (5, 6), 16)).to(torch.float32)
    case, grid = case.on(target.device), case.options["grid"]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t
    ):
        operands = [tensor.requires_grad_() for tensor in case.arguments.values()]
        rel_pos_attention(*operands, grid, backend=target.backend)
    # q, k, v and o; rel_h and rel_w; two numbers of the softmax
    of_a_token = 4 * 16 + sum(grid) + 2
    assert sum(t.numel() for t in kept.values()) == 2 * math.prod(grid) * of_a_token


# ---- Gradients ---------------------------------------------------------------------------------


# Interpreted, the larger one is part of the campaign.
NOT_FINITE = {"small": (2, 1, (2, 3), 4), "large": (2, 2, (5, 4), 6)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", [*OPERANDS, "gradient"])
@pytest.mark.parametrize(("target", "size"), targets_with(["large"], ["small"], ["large"]))
def test_non_finite_values_spread_as_in_pytorch(target, size, name, value):
    case = attention_case(*NOT_FINITE[size]).on(target.device)
    case.tensor(name)[1, 0, 2, 1] = value
    kernel, reference = case.run(target), case.run("reference")
    for result, expected in reference.items():
        finite = expected.isfinite()
        assert torch.equal(kernel[result].isfinite(), finite), result
        torch.testing.assert_close(kernel[result][finite], expected[finite])


@pytest.mark.parametrize(
    ("target", "dtype"), targets_with(DTYPES[:2], [torch.float32], [torch.float64])
)
def test_masked_keys_and_masked_queries(target, dtype):
    """-inf takes rows of keys out: whole blocks of keys, and for one query all of them."""
    height = 6 if target.simulated else 40
    case = attention_case(1, 1, (height, 16), 8).to(dtype).on(target.device)
    case.arguments["rel_h"][0, 0, : 5 * height, : height // 2] = -math.inf
    masked = 15 * height // 2
    case.arguments["rel_h"][0, 0, masked] = -math.inf
    kernel, reference = case.run(target, ("v",)), case.run("reference", ("v",))
    o, expected = kernel["result"], reference["result"]
    assert o[0, 0, masked].isnan().all()
    torch.testing.assert_close(o, expected, equal_nan=True)


@every_target
def test_large_scores(target):
    """The largest score decides, however large it is: nothing overflows."""
    case = case_for(target, (1, 1, (40, 16), 8), (1, 1, (3, 16), 8)).to(torch.float32)
    case.arguments["rel_w"] *= 1e4
    assert_as_good_as_reference(target, case)


# ---- Bad input ---------------------------------------------------------------------------------


def call(grid=(3, 4), scale=None, backend=None, **changed):
    arguments = {**attention_case(2, 2, (3, 4), 5).to(torch.float32).arguments, **changed}
    return rel_pos_attention(**arguments, grid=grid, scale=scale, backend=backend)


WRONG = {
    "integers": (TypeError, {"q": torch.ones(2, 2, 12, 5, dtype=torch.int64)}, "q: expected float"),
    "joined heads": (ValueError, {"q": torch.ones(4, 12, 5)}, r"q: expected shape \(B, heads, N"),
    "no heads": (ValueError, {"q": torch.ones(2, 0, 12, 5)}, r"q: .*\(2, 0, 12, 5\)"),
    "mixed dtypes": (TypeError, {"rel_w": torch.ones(2, 2, 12, 4).double()}, "rel_w: .*float64"),
    "other keys": (ValueError, {"k": torch.ones(2, 2, 11, 5)}, r"k: .*\(2, 2, 12, 5\), got"),
    "swapped": (ValueError, {"grid": (4, 3)}, r"rel_h: .*\(2, 2, 12, 4\), got \(2, 2, 12, 3\)"),
    "other queries": (ValueError, {"q": torch.ones(2, 2, 7, 5)}, r"rel_h: .*\(2, 2, 7, 3\), got"),
    "other grid": (ValueError, {"grid": (3, 3)}, r"k: .*\(2, 2, 9, 5\), got \(2, 2, 12, 5\)"),
    "no grid": (ValueError, {"grid": (0, 4)}, r"grid: .*at least 1, got \(0, 4\)"),
    "no pair": (TypeError, {"grid": 12}, "grid: expected two integers"),
    "devices": (ValueError, {"v": torch.ones(2, 2, 12, 5, device="meta")}, "v: expected device"),
    "infinite": (ValueError, {"scale": math.inf}, "scale: expected a finite number"),
    "backend": (ValueError, {"backend": "mkl"}, "backend: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_named_in_one_line(name):
    kind, changed, message = WRONG[name]
    with pytest.raises(kind, match=f"^{message}") as caught:
        call(**changed)
    assert "\n" not in str(caught.value)


def test_the_default_on_cpus():
    o = call(q=torch.ones(2, 2, 12, 5, requires_grad=True))
    assert ("RelPosAttention" in str(o.grad_fn)) == (needs_cpp is None)


@pytest.mark.skipif(UNAVAILABLE["cuda"] is not None, reason=str(UNAVAILABLE["cuda"]))
def test_a_backend_without_attention_says_so():
    with pytest.raises(RuntimeError, match=r"'cuda' cannot .* not compute rel_pos_attention$"):
        call(backend="cuda")
