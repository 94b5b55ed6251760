"""The kernels of the ``cuda`` backend, on shapes that whole layers rarely have.

They run on a GPU, or emulated on the CPU. Expected values come from plain PyTorch in float64.
"""

import pytest
import torch
from kernel_cases import DTYPES, TARGETS, cell_case, layer_case

from naslora_kernels import cuda

TARGET = next(t.values[0] for t in TARGETS if t.values[0].backend == "cuda")
EMULATED = TARGET.device == "cpu"
pytestmark = [
    *next(t.marks for t in TARGETS if t.values[0].backend == "cuda"),
    pytest.mark.usefixtures("poisoned_memory"),
]
only_emulated = pytest.mark.skipif(not EMULATED, reason="only the emulation counts launches")


@pytest.fixture(scope="module")
def draw():
    generator = torch.Generator().manual_seed(4)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(
        TARGET.device, dtype
    )


def sum_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(result, expected, terms=1):
    """Allows one rounding to the result's dtype and the error of sums of ``terms`` numbers near 1.

    A sum is about the square root of ``terms`` large. As the kernels add short sums, its error is a
    few roundings of that size. The factor 16 covers the largest error of thousands of sums and, in
    float64, the error of the expected values.
    """
    eps = torch.finfo(result.dtype).eps
    sums = torch.finfo(sum_dtype(result.dtype)).eps * 16 * terms**0.5
    torch.testing.assert_close(result.double(), expected.double(), rtol=eps, atol=eps / 8 + sums)


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


def low_rank(rows, A, B, bias=None, z=None, G=None):
    """z and h of rows (T, J) without a frozen product and a cell; or dx, dA and dB."""
    like = {"device": rows.device, "dtype": rows.dtype}
    sizes = ((8,), (0, 3, 3), (0, 5, 5), (0, 3, 3), (0, 5, 5), (4, 0, 0))
    cell = (*(torch.empty(size, **like) for size in sizes), torch.empty(0).long().to(rows.device))
    weight, scale = torch.zeros(len(B), rows.shape[1], **like), 0.5
    kernels = torch.ops.naslora_cuda
    if G is None:
        h, z = kernels.nas_lora_linear(rows[None, None], weight, bias, A, B, *cell, scale)
        return z[0, 0], h[0, 0]
    tensors = (G[None, None], rows[None, None], z[None, None], weight, A, B, *cell)
    gradients = kernels.nas_lora_linear_backward(*tensors, scale, True, True, True, False, False)
    return gradients[0][0, 0], *gradients[1:3]


# Every shape in two dtypes, and every dtype with half of the shapes.
PAIRS = [(shape, dtype) for i, shape in enumerate(LOW_RANK) for dtype in DTYPES[i % 2 :: 2]]


@pytest.mark.parametrize("shape, dtype", PAIRS, ids=str)
def test_low_rank_products(shape, dtype, draw):
    tokens, columns, rank = shape
    rows, A = draw(tokens, columns, dtype=dtype), draw(columns, rank, dtype=dtype).t()
    A = A / columns**0.5  # so that z is near 1
    wide = max(columns, rank)
    B = draw(wide, rank, dtype=dtype)
    for bias in (None, draw(wide, dtype=dtype)):
        z, h = low_rank(rows, A, B, bias)
        assert_close(z, rows.double() @ A.double().t(), columns)
        expected = 0.5 * z.double() @ B.double().t()
        assert_close(h, expected if bias is None else expected + bias.double(), rank + 1)
    B = torch.eye(wide, rank, dtype=dtype, device=rows.device)  # dL/dy is exact
    G = draw(tokens, wide, dtype=dtype)
    dx, dA, dB = low_rank(rows, A, B, None, z, G)
    dy = 0.5 * G[:, :rank].double()
    assert_close(dx, dy @ A.double(), rank)
    assert_close(dA, dy.t() @ rows.double(), tokens)
    assert_close(dB, 0.5 * G.double().t() @ z.double(), tokens)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_with_any_alignment(offset, draw):
    wide = draw(30, 160, dtype=torch.bfloat16)
    rows = wide[:, offset : offset + 128]
    A, B = draw(3, 128, dtype=torch.bfloat16), draw(128, 3, dtype=torch.bfloat16)
    z, G = draw(30, 3, dtype=torch.bfloat16), draw(30, 128, dtype=torch.bfloat16)
    results = [
        (low_rank(some, A, B)[0], low_rank(some, A, B, None, z, G)[1])
        for some in (rows, rows.contiguous())
    ]
    assert all(map(torch.equal, *results))


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
