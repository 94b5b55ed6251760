"""SAM's attention: what is measured of it, and how much work it must do at least."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import CPU, GLOBAL, SMALL, WINDOWS, Setting, Shape, Work, of_direction
from naslora_kernels import rel_pos_attention

HEADS = 12
CASES = ((GLOBAL, HEADS), (WINDOWS, HEADS), (SMALL, HEADS))
TINY = (Shape("tiny", (2, 4, 6), c_in=32), 2)  # where nothing is timed
STOCK, SDPA = "segment_anything", "scaled_dot_product_attention"
EXACT = "reference in float64"

Attend = Callable[..., Tensor]  # of q, k, v, rel_h, rel_w and the grid, as rel_pos_attention


@dataclass
class BlockWork(Work):
    """A block with frozen weights. ``forward`` is inference: it keeps nothing for a backward."""

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.compute()


def works(shape: Shape, heads: int, setting: Setting = CPU) -> dict[str, BlockWork]:
    """A block by the fused kernels, by segment_anything's own code, and by torch's fused attention.

    Each one is the whole block: the frozen linears qkv and proj belong to it. Only the input
    needs a gradient.
    """
    from segment_anything.modeling.image_encoder import Attention

    torch.manual_seed(0)
    like = {"device": setting.device, "dtype": setting.dtype}
    grid = shape.grid[1:]
    block = Attention(shape.c_in, heads, use_rel_pos=True, input_size=grid)
    for table in (block.rel_pos_h, block.rel_pos_w):
        torch.nn.init.normal_(table, std=0.1)
    block = block.requires_grad_(False).to(**like)
    x = torch.randn(*shape.grid, shape.c_in).to(**like).requires_grad_()
    gradient = torch.randn_like(x)
    computations: dict[str, Callable[[], Tensor]] = {
        kernel: partial(_block, block, x, partial(rel_pos_attention, backend=kernel))
        for kernel in setting.kernels
    }
    computations[STOCK] = partial(block, x)
    computations[SDPA] = partial(_block, block, x, _as_more_keys)
    return {name: BlockWork(compute, [x], gradient) for name, compute in computations.items()}


def operator_works(shape: Shape, heads: int, setting: Setting = CPU) -> dict[str, Work]:
    """Attention without the linears, with gradients of q, k, v, rel_h and rel_w.

    By the fused kernels, and by torch's fused attention. ``EXACT``, the reference in float64, is
    the judge; it takes too long to be timed.
    """
    torch.manual_seed(0)
    batch, height, width = shape.grid
    grid, tokens, features = (height, width), height * width, shape.c_in // heads
    sizes = (features, features, features, height, width)
    like = {"device": setting.device, "dtype": setting.dtype}
    leaves = [torch.randn(batch, heads, tokens, n).to(**like).requires_grad_() for n in sizes]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    gradient = torch.randn(batch, heads, tokens, features).to(**like)
    attends: dict[str, Attend] = {
        name: partial(rel_pos_attention, backend=name) for name in setting.kernels
    }
    attends[SDPA] = _as_more_keys
    computes = {name: partial(attend, *leaves, grid) for name, attend in attends.items()}
    works = {name: Work(compute, leaves, gradient) for name, compute in computes.items()}
    judge = partial(rel_pos_attention, *exact, grid, backend="reference")
    return {**works, EXACT: Work(judge, exact, gradient.double())}


def _block(block: nn.Module, x: Tensor, attend: Attend) -> Tensor:
    """``block`` with another attention between its linears; x (B, H, W, C)."""
    from segment_anything.modeling.image_encoder import get_rel_pos

    batch, height, width, _ = x.shape
    grid = (height, width)
    joint = block.qkv(x).view(batch, height * width, 3, block.num_heads, -1)
    q, k, v = joint.permute(2, 0, 3, 1, 4)  # (B, heads, N, d) each
    maps = q.unflatten(2, grid)  # (B, heads, H, W, d)
    rows = get_rel_pos(height, height, block.rel_pos_h)  # (H, H, d)
    columns = get_rel_pos(width, width, block.rel_pos_w)
    rel_h = torch.einsum("bnhwc,hkc->bnhwk", maps, rows).flatten(2, 3)
    rel_w = torch.einsum("bnhwc,wkc->bnhwk", maps, columns).flatten(2, 3)
    o = attend(q, k, v, rel_h, rel_w, grid)
    return block.proj(o.transpose(1, 2).reshape(x.shape))


def _as_more_keys(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Plain attention with H + W more features: each key names its row and its column.

    torch has a fused kernel only for values as wide as the keys.
    """
    height, width = grid
    row = torch.eye(height).to(k).repeat_interleave(width, 0)  # (N, H)
    column = torch.eye(width).to(k).repeat(height, 1)  # (N, W)
    position = torch.cat([row, column], -1).expand(*k.shape[:3], height + width)
    queries = torch.cat([q * q.shape[-1] ** -0.5, rel_h, rel_w], -1)
    keys, values = torch.cat([k, position], -1), F.pad(v, (0, height + width))
    o = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return o[..., : v.shape[-1]]


def least_bytes(shape: Shape, heads: int, direction: str, setting: Setting = CPU) -> int:
    """Bytes between the two linears: forward reads q, k, v and the positions and writes o;
    backward reads all of that and the gradient of o, and writes five gradients."""
    tokens = torch.Size(shape.grid).numel()
    features, positions = shape.c_in, heads * sum(shape.grid[1:])
    forward, backward = 4 * features + positions, 8 * features + 2 * positions
    return setting.dtype.itemsize * tokens * of_direction(direction, forward, backward)


def products(shape: Shape, heads: int, direction: str) -> int:
    """Multiplications and additions of the products with N x N scores: two forward and five
    backward."""
    batch, height, width = shape.grid
    product = 2 * batch * (height * width) ** 2 * shape.c_in
    return of_direction(direction, 2 * product, 5 * product)


def operations(shape: Shape, heads: int, direction: str) -> int:
    """The same with those of the two linears in each direction."""
    linears = 2 * torch.Size(shape.grid).numel() * shape.c_in * 4 * shape.c_in
    return products(shape, heads, direction) + of_direction(direction, linears, linears)
