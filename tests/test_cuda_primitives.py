"""The kernels of the ``cuda`` backend, on shapes that whole layers rarely have.

They run on a GPU, or emulated on the CPU.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DTYPES, TARGETS, assert_as_good_as_reference, cell_case, layer_case

from naslora_kernels import cuda

TARGET = next(t.values[0] for t in TARGETS if t.values[0].backend == "cuda")
EMULATED = TARGET.device == "cpu"
pytestmark = [
    *next(t.marks for t in TARGETS if t.values[0].backend == "cuda"),
    pytest.mark.usefixtures("poisoned_memory"),
]
only_emulated = pytest.mark.skipif(not EMULATED, reason="only the emulation counts launches")


# ---- The low-rank products ---------------------------------------------------------------------

# (T, J, r): one number; features that take several rounds of warps; rows of x that are no multiple
# of 16 bytes; few features, so that warps divide the tokens; ranks for one group, for several, and
# for more than one block.
LOW_RANK = [
    (1, 1, 1),
    (7, 5, 2),
    (33, 64, 3),
    (19, 2304, 3),
    (5, 5003, 4),
    (200, 24, 6),
    (40, 300, 12),
    (21, 272, 24),
    (9, 40, 40),
    (6, 48, 77),
]


# Every shape in two dtypes, and every dtype with half of the shapes.
PAIRS = [(shape, dtype) for i, shape in enumerate(LOW_RANK) for dtype in DTYPES[i % 2 :: 2]]


def low_rank_case(tokens, columns, rank, bias=False):
    """A layer without channels, whose frozen product is zero: torch computes that one."""
    case = layer_case((1, 1, tokens), columns, max(columns, rank), rank, 0, bias=bias)
    case.arguments["weight"].zero_()
    return case


@pytest.mark.parametrize("shape, dtype", PAIRS, ids=str)
def test_low_rank_products(shape, dtype):
    for bias in (False, True):
        case = low_rank_case(*shape, bias).to(dtype)
        assert_as_good_as_reference(TARGET, case, ("x", "lora_A", "lora_B"))


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_with_any_alignment(offset):
    case = low_rank_case(30, 128, 3).to(torch.bfloat16).on(TARGET.device)
    expected = case.run(TARGET)
    case.arguments["x"] = F.pad(case.arguments["x"], (offset, 32))[..., offset : offset + 128]
    for name, value in case.run(TARGET).items():
        assert name == "weight" or torch.equal(value, expected[name]), name


# ---- The cell ----------------------------------------------------------------------------------

# (B, H, W, r), c: more images than groups of tiles; many groups of channels; more channels outside
# the cell than are copied at once.
CELLS = [((70, 3, 4, 3), 2), ((2, 17, 33, 5), 5), ((1, 4, 5, 40), 37), ((1, 2, 3, 600), 3)]


@pytest.mark.parametrize(("shape", "c"), CELLS, ids=str)
def test_cell(shape, c):
    case = cell_case(shape, c)
    expected = case.run("reference")
    for name, value in case.on(TARGET.device).run(TARGET).items():
        torch.testing.assert_close(value.cpu(), expected[name])


@pytest.mark.parametrize("wide", ["alpha", "dw_sep5", "pw"])
def test_each_parameter_may_be_float32(wide):
    case = cell_case((2, 5, 6, 3), 3).to(torch.bfloat16).on(TARGET.device)
    expected = case.run(TARGET)
    case.arguments[wide] = case.arguments[wide].float()
    for name, value in case.run(TARGET).items():
        assert value.dtype == (torch.float32 if name == wide else torch.bfloat16)
        assert torch.equal(value.bfloat16(), expected[name]), name


# ---- Launches ----------------------------------------------------------------------------------


@only_emulated
def test_layer_takes_three_and_six_launches():
    case = layer_case((2, 14, 14), 96, 128, 3, 2).to(torch.float32)
    cuda._CUDA.launches()
    case.run(TARGET, [name for name in case.arguments if name != "weight"])
    assert [launch[0] for launch in cuda._CUDA.launches()] == [
        "low_rank_pass", "cell_forward", "low_rank_expand",
        "cell_forward", "low_rank_pass", "cell_backward", "low_rank_pass", "low_rank_expand",
        "reduce_gradients",
    ]  # fmt: skip


@only_emulated
@pytest.mark.parametrize(
    ("rank", "c", "dtype"),
    [(1, 1, torch.float64), (3, 2, torch.bfloat16), *((24, 24, dtype) for dtype in DTYPES[1::2])],
    ids=str,
)
def test_shared_memory_fits_every_device(rank, c, dtype):
    case = layer_case((1, 9, 9), 72, 2600, rank, c).to(dtype)
    cuda._CUDA.launches()
    case.run(TARGET)
    launches = cuda._CUDA.launches()
    assert len(launches) == 9
    assert all(shared <= 48 * 1024 for *_, shared in launches)


def test_grids_depend_on_shapes_alone_and_fill_large_cards():
    def groups(tokens=1, *maps):
        return cuda._CUDA.groups(tokens, *(maps or (1, 1, 1, 1)))

    assert all(groups(tokens)[0] >= 132 for tokens in (4900, 6400, 19600, 10**6))
    assert groups(1)[0] == 1
    # A group has at most 96 tokens, so that its sums stay short.
    assert all(96 * groups(t)[0] >= t for t in (1, 97, 4900, 10**6))
    assert groups(1, 25, 14, 14, 2)[1] == 25
    assert all(groups(1, 4096, 14, 14, c)[1] <= 64 for c in (1, 2, 3, 16, 24, 100))
