"""Windows of an image of tokens, as SAM's windowed attention cuts them.

SAM pads the image to whole windows with zeros. A linear layer turns those into its bias, so it need
not compute them: ``partition`` can put the windows together behind the layer.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from naslora.adapter.layer.grid import Grid


def partition(x: Tensor, size: int, fill: Tensor | None = None) -> Tensor:
    """Cuts images into windows, in row-major order.

    Args:
        x: (B, H, W, C) images.
        size: side of the windows, in tokens.
        fill: (C,) what the tokens beyond the image hold; None for zeros.

    Returns:
        (B * windows, size, size, C) in the dtype of ``x``.
    """
    return _Partition.apply(x, size, fill)


def unpartition(windows: Tensor, size: int, grid: Grid) -> Tensor:
    """Puts windows together to images, without the tokens beyond them.

    Args:
        windows: (B * windows, size, size, C), from ``partition``.
        size: side of the windows.
        grid: (H, W) of the images.

    Returns:
        (B, H, W, C).
    """
    return _Unpartition.apply(windows, size, grid)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module's inputs, outputs or their gradients."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


class _Partition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, fill: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.size, ctx.grid = size, x.shape[1:3]
        windows = _cut(x, size, zeros=fill is None)
        if fill is not None:
            for beyond in _beyond(windows, size, ctx.grid):
                beyond.copy_(fill)
        return windows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        need_x, _, need_fill = ctx.needs_input_grad
        grad_fill = None
        if need_fill:
            parts = _beyond(grad.contiguous(), ctx.size, ctx.grid)
            zero = grad.new_zeros(grad.shape[-1])
            grad_fill = sum((part.flatten(0, -2).sum(0) for part in parts), zero)
        return _joined(grad, ctx.size, ctx.grid) if need_x else None, None, grad_fill


class _Unpartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, size: int, grid: Grid) -> Tensor:  # type: ignore[override]
        ctx.size, ctx.grid = size, grid
        return _joined(windows, size, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _cut(grad, ctx.size, zeros=True), None, None


def _counts(size: int, grid: Grid) -> Grid:
    """Windows down and across."""
    return -(-grid[0] // size), -(-grid[1] // size)


def _cut(x: Tensor, size: int, zeros: bool) -> Tensor:
    """The windows of images; tokens beyond them are zero or uninitialised."""
    batch, height, width, features = x.shape
    down, across = _counts(size, (height, width))
    new = x.new_zeros if zeros else x.new_empty  # one launch zeroes all, of which few stay zero
    windows = new(batch * down * across, size, size, features)
    for image, part in _pairs(x, windows, size):
        part.copy_(image)
    return windows


def _joined(windows: Tensor, size: int, grid: Grid) -> Tensor:
    down, across = _counts(size, grid)
    x = windows.new_empty(windows.shape[0] // (down * across), *grid, windows.shape[-1])
    for image, part in _pairs(x, windows.contiguous(), size):
        image.copy_(part)
    return x


def _by_place(windows: Tensor, size: int, grid: Grid) -> Tensor:
    """A view (B, windows down, size, windows across, size, C): two indices of a row, two of a
    column."""
    return windows.view(-1, *_counts(size, grid), size, size, windows.shape[-1]).transpose(2, 3)


def _pairs(x: Tensor, windows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the same tokens in images and in their windows: whole windows, then cut ones."""
    height, width = x.shape[1:3]
    places = _by_place(windows, size, (height, width))
    for rows, down in _ranges(height, size):
        for columns, across in _ranges(width, size):
            part = places[:, down[0], : down[1], across[0], : across[1]]
            image = x[:, rows, columns]
            yield image.unflatten(2, (-1, across[1])).unflatten(1, (-1, down[1])), part


def _ranges(length: int, size: int) -> Iterator[tuple[slice, tuple[slice, int]]]:
    """An axis as whole windows and the cut one: tokens, windows, tokens of each window."""
    whole = length // size
    if whole:
        yield slice(0, whole * size), (slice(0, whole), size)
    if length % size:
        yield slice(whole * size, length), (slice(whole, whole + 1), length % size)


def _beyond(windows: Tensor, size: int, grid: Grid) -> Iterator[Tensor]:
    """Views of the tokens beyond the images: below, then beside those above."""
    places = _by_place(windows, size, grid)
    below, beside = grid[0] % size, grid[1] % size
    if below:
        yield places[:, -1, below:]
    if beside:
        yield places[:, : grid[0] // size, :, -1, beside:]
        if below:
            yield places[:, -1, :below, -1, beside:]
