"""The primitives of the ``cuda`` backend, on shapes that whole layers rarely have.

They run on a GPU, or emulated on the CPU. Expected values come from plain PyTorch in float64.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CELL, DTYPES, TARGETS, cell_case, layer_case

from naslora_kernels import cuda, reference
from naslora_kernels.cell import Cell, LoRALinear
from naslora_kernels.cuda.primitives import CUDAPrimitives
from naslora_kernels.launches import CellSums, MatrixSums

TARGET = next(t.values[0] for t in TARGETS if t.values[0].backend == "cuda")
EMULATED = TARGET.device == "cpu"
primitives = CUDAPrimitives()
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


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(result, expected, terms=1):
    """Allows one rounding to the result's dtype and the error of sums of ``terms`` numbers near 1.

    A sum is about the square root of ``terms`` large. As the kernels add short sums, its error is a
    few roundings of that size. The factor 16 covers the largest error of thousands of sums and, in
    float64, the error of the expected values.
    """
    eps = torch.finfo(result.dtype).eps
    sums = torch.finfo(accumulator(result.dtype)).eps * 16 * terms**0.5
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOW_RANK, ids=str)
def test_low_rank_pass(shape, dtype, draw):
    tokens, columns, rank = shape
    rows, u = draw(tokens, columns, dtype=dtype), draw(tokens, rank, dtype=dtype)
    matrix = draw(columns, rank, dtype=dtype).t()
    product = torch.empty(tokens, rank, dtype=dtype, device=TARGET.device)
    groups = primitives.row_groups(tokens)
    partials = torch.empty(groups, rank, columns, dtype=accumulator(dtype), device=TARGET.device)
    primitives.low_rank_pass(rows, matrix, u, 0.5, product, partials)
    assert_close(product, 0.5 * rows.double() @ matrix.double().t(), columns)
    assert_close(partials.sum(0), 0.5 * u.double().t() @ rows.double(), tokens)

    # Product and partials have the same bits if only one of them is computed.
    alone = torch.empty_like(product), torch.empty_like(partials)
    primitives.low_rank_pass(rows, matrix, None, 0.5, alone[0], None)
    primitives.low_rank_pass(rows, None, u, 0.5, None, alone[1])
    assert torch.equal(alone[0], product)
    assert torch.equal(alone[1], partials)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LOW_RANK, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_low_rank_expand(shape, dtype, biased, draw):
    tokens, columns, rank = shape
    u, matrix = draw(tokens, rank, dtype=dtype), draw(rank, columns, dtype=dtype)
    bias = draw(columns, dtype=dtype) if biased else None
    out = torch.empty(tokens, columns, dtype=dtype, device=TARGET.device)
    primitives.low_rank_expand(u, matrix, bias, 0.5, out)
    expected = 0.5 * u.double() @ matrix.double()
    assert_close(out, expected + bias.double() if biased else expected, rank + 1)


@pytest.mark.parametrize("offset", [0, 1, 8])
def test_rows_with_any_alignment(offset, draw):
    wide = draw(30, 160, dtype=torch.bfloat16)
    rows, matrix = wide[:, offset : offset + 128], draw(3, 128)
    u = draw(30, 3, dtype=torch.bfloat16)
    results = []
    for same_rows in (rows, rows.contiguous()):
        product = torch.empty(30, 3, dtype=torch.bfloat16, device=TARGET.device)
        partials = torch.empty(primitives.row_groups(30), 3, 128, device=TARGET.device)
        primitives.low_rank_pass(same_rows, matrix, u, 1.0, product, partials)
        results.append((product, partials))
    assert all(map(torch.equal, *results))


def test_memory_beyond_a_row_is_not_read(draw):
    wide = torch.full((12, 512), float("nan"), dtype=torch.bfloat16, device=TARGET.device)
    wide[:, :248] = draw(12, 248, dtype=torch.bfloat16)
    rows, matrix = wide[:, :248], draw(3, 248)
    product = torch.empty(12, 3, dtype=torch.bfloat16, device=TARGET.device)
    primitives.low_rank_pass(rows, matrix, None, 1.0, product, None)
    assert_close(product, rows.double() @ matrix.double().t(), 248)


def test_an_infinity_stays_in_its_row_and_column(draw):
    rows, matrix, u = draw(50, 70), draw(4, 70), draw(50, 4)
    rows[20, 30] = float("inf")
    product = torch.empty(50, 4, device=TARGET.device)
    partials = torch.empty(primitives.row_groups(50), 4, 70, device=TARGET.device)
    primitives.low_rank_pass(rows, matrix, u, 1.0, product, partials)
    assert product.isfinite().all(1).logical_not().nonzero().tolist() == [[20]]
    assert partials.sum(0).isfinite().all(0).logical_not().nonzero().tolist() == [[30]]


# ---- The cell ----------------------------------------------------------------------------------

# (B, H, W, r), c: more images than groups of tiles; many groups of channels; more channels outside
# the cell than are copied at once.
CELLS = [((70, 3, 4, 3), 2), ((2, 17, 33, 5), 5), ((1, 4, 5, 40), 37), ((1, 2, 3, 600), 3)]


def cell_of(case):
    return Cell.unflatten([*(case.arguments[name] for name in CELL), case.options["channels"]])


def run_cell(case):
    """Runs the four primitives of a cell; returns y, grad_z and parameter gradients by name."""
    z, cell = case.arguments["z"], cell_of(case)
    y, grad_z = torch.empty_like(z), torch.empty_like(z)
    primitives.cell_forward(z, cell, y)
    c = cell.pw.shape[-1]
    size = primitives.cell_groups(*z.shape[:-1], c), primitives.cell_partial_size(c)
    partials = torch.empty(size, dtype=accumulator(z.dtype), device=z.device)
    primitives.cell_backward(case.gradient, z, cell, grad_z, partials)
    gradients = [torch.empty_like(t) for t in cell.parameters]
    primitives.reduce_gradients(cell, CellSums(partials, gradients), None, None)
    return dict(zip(("result", "z", *CELL), (y, grad_z, *gradients), strict=True))


@pytest.mark.parametrize(("shape", "c"), CELLS, ids=str)
def test_cell(shape, c):
    case = cell_case(shape, c)
    expected = case.run("reference")
    for name, value in run_cell(case.on(TARGET.device)).items():
        torch.testing.assert_close(value.cpu(), expected[name])


@pytest.mark.parametrize("wide", ["alpha", "dw_sep5", "pw"])
def test_each_parameter_may_be_float32(wide):
    case = cell_case((2, 5, 6, 3), 3).to(torch.bfloat16).on(TARGET.device)
    expected = run_cell(case)
    case.arguments[wide] = case.arguments[wide].float()
    for name, value in run_cell(case).items():
        assert value.dtype == (torch.float32 if name == wide else torch.bfloat16)
        assert torch.equal(value.bfloat16(), expected[name]), name


def test_each_gradient_alone():
    """Each gradient has the same bits if only it is computed."""
    case = cell_case((3, 6, 5, 6), 5).to(torch.float32).on(TARGET.device)
    z, cell = case.arguments["z"], cell_of(case)
    expected = run_cell(case)
    grad_z = torch.empty_like(z)
    primitives.cell_backward(case.gradient, z, cell, grad_z, None)
    assert torch.equal(grad_z, expected["z"])

    partials = torch.empty(
        primitives.cell_groups(3, 6, 5, 5), primitives.cell_partial_size(5), device=TARGET.device
    )
    primitives.cell_backward(case.gradient, z, cell, None, partials)
    grad_alpha = torch.empty_like(cell.alpha)
    sums = CellSums(partials, [grad_alpha, None, None, None, None, None])
    primitives.reduce_gradients(cell, sums, None, None)
    assert torch.equal(grad_alpha, expected["alpha"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reduction_of_the_adapters_gradients(dtype, draw):
    A_partials = draw(9, 4, 70, dtype=accumulator(dtype))
    B_partials = draw(130, 4, 45, dtype=accumulator(dtype))
    grad_A = torch.empty(4, 70, dtype=dtype, device=TARGET.device)
    grad_B = torch.empty(45, 4, dtype=dtype, device=TARGET.device)
    cell = cell_of(cell_case((1, 1, 1, 1), 1))
    A, B = MatrixSums(A_partials, grad_A), MatrixSums(B_partials, grad_B)
    primitives.reduce_gradients(cell, None, A, B)
    assert_close(grad_A, A_partials.double().sum(0), 9)
    assert_close(grad_B, B_partials.double().sum(0).t(), 130)


# ---- The folded cell ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("c", [1, 2, 6])
def test_folded_cell(c, size, dtype, draw):
    z, kernel = draw(2, 9, 18, c, dtype=dtype), draw(c, c, size, size, dtype=dtype)
    y = torch.empty_like(z)
    primitives.folded_cell_forward(z, kernel, 0.3, 0.6, y)
    maps = z.double().movedim(-1, 1)
    expected = (
        F.conv2d(maps, kernel.double(), padding=size // 2)
        + 0.3 * F.avg_pool2d(maps, 3, 1, 1, count_include_pad=False)
        + 0.6 * F.max_pool2d(maps, 3, 1, 1)
    )
    assert_close(y, expected.movedim(1, -1), c * size * size)


def test_pools_of_weight_zero_are_not_added(draw):
    z, kernel = draw(1, 6, 6, 1), torch.ones(1, 1, 1, 1, device=TARGET.device)
    z[0, 2, 2, 0] = float("nan")
    y = torch.empty_like(z)
    primitives.folded_cell_forward(z, kernel, 0.0, 0.0, y)
    assert torch.equal(y.isnan(), z.isnan())


# ---- Launches ----------------------------------------------------------------------------------


def test_a_failed_launch_names_the_kernel_and_the_error():
    case = cell_case((0, 3, 3, 3), 2).to(torch.float32).on(TARGET.device)
    with pytest.raises(RuntimeError, match=r"^cell_forward: invalid configuration argument$"):
        run_cell(case)


@only_emulated
def test_layer_takes_three_and_six_launches():
    case = layer_case((2, 14, 14), 96, 128, 3, 2).to(torch.float32)
    leaves = {name: t.requires_grad_() for name, t in case.arguments.items() if name != "weight"}
    cuda._CUDA.launches()
    names = ("weight", "bias", "lora_A", "lora_B")
    linear = LoRALinear(*(case.arguments[name] for name in names))
    h = cuda.nas_lora_linear(case.arguments["x"], linear, cell_of(case), 1.0)
    forward = [launch[0] for launch in cuda._CUDA.launches()]
    torch.autograd.grad(h, list(leaves.values()), case.gradient)
    backward = [launch[0] for launch in cuda._CUDA.launches()]
    assert forward == ["low_rank_pass", "cell_forward", "low_rank_expand"]
    assert backward == [
        "cell_forward", "low_rank_pass", "cell_backward", "low_rank_pass", "low_rank_expand",
        "reduce_gradients",
    ]  # fmt: skip


@only_emulated
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rank", "c"), [(1, 1), (3, 2), (24, 24)])
def test_shared_memory_fits_every_device(rank, c, dtype):
    case = layer_case((1, 9, 9), 72, 2600, rank, c).to(dtype)
    cuda._CUDA.launches()
    case.run(TARGET)
    launches = cuda._CUDA.launches()
    assert len(launches) == 9
    assert all(shared <= 48 * 1024 for *_, shared in launches)


def test_grids_depend_on_shapes_alone_and_fill_large_cards():
    for tokens in (4900, 6400, 19600, 10**6):
        assert primitives.row_groups(tokens) >= 132
    assert primitives.row_groups(1) == 1
    # A group has at most 96 tokens, so that its sums stay short.
    assert all(96 * primitives.row_groups(t) >= t for t in (1, 97, 4900, 10**6))
    assert primitives.cell_groups(25, 14, 14, 2) == 25
    assert all(primitives.cell_groups(4096, 14, 14, c) <= 64 for c in (1, 2, 3, 16, 24, 100))


def test_a_cell_without_channels_and_an_empty_batch_take_none():
    z = torch.ones(2, 3, 3, 3, device=TARGET.device)
    case = cell_case((2, 3, 3, 3), 0).to(torch.float32).on(TARGET.device)
    cell = cell_of(case)
    assert torch.equal(cuda.mixed_cell(z, cell), reference.mixed_cell(z, cell))
    assert cuda.mixed_cell(z[:0], cell).shape == (0, 3, 3, 3)
