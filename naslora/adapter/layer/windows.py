"""Windows of an image of tokens, as SAM's windowed attention cuts them.

SAM pads the image to whole windows with zeros. A linear layer turns those into its bias, so it need
not compute them: ``partition`` can put the windows together behind the layer. What leaves the
attention there is dropped, so these queries need not be computed, either: ``heads_of_windows``
leaves them out.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from naslora.adapter.layer.grid import Grid


def partition(x: Tensor, size: int, fill: Tensor | None = None, by_shape: bool = False) -> Tensor:
    """Cuts images into windows.

    Args:
        x: (B, H, W, C) images.
        size: side of the windows, in tokens.
        fill: (C,) what the tokens beyond the image hold; None for zeros.
        by_shape: whether the windows are ordered as ``heads_of_windows`` takes them: first those
            inside the images, then those that the right edge cuts, the lower one, both. If not,
            their order is row-major in each image.

    Returns:
        (B * windows, size, size, C) in the dtype of ``x``.
    """
    return _Partition.apply(x, size, fill, by_shape).unflatten(0, (-1, size, size))


def unpartition(windows: Tensor, size: int, grid: Grid) -> Tensor:
    """Puts windows in row-major order together to images, without the tokens beyond them.

    Args:
        windows: (B * windows, size, size, C), from ``partition``.
        size: side of the windows.
        grid: (H, W) of the images.

    Returns:
        (B, H, W, C).
    """
    return _Unpartition.apply(windows, size, grid)


def ordered_by_shape(windows: Tensor, size: int, grid: Grid) -> Tensor:
    """Puts windows (B * windows, ...) in row-major order into the order ``by_shape``."""
    places = torch.arange(len(windows), device=windows.device)
    parts = [own.flatten() for _, own in _by_shape(places, size, grid, ordered=False)]
    return windows.index_select(0, torch.cat(parts))


def heads_of_windows(
    qkv: Tensor, heads: int, size: int, grid: Grid
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of windows, without the queries beyond the images.

    Args:
        qkv: (B * windows, size, size, 3 C), ordered by shape.
        heads: number of heads.
        size: side of the windows.
        grid: (H, W) of the images.

    Returns:
        Views for each shape of windows: (n, h, w, heads, d) queries inside the images, and
        (n, size, size, heads, d) keys and values.
    """
    views = _Heads.apply(qkv, heads, size, grid)
    return [views[i : i + 3] for i in range(0, len(views), 3)]


def join_windows(parts: Sequence[Tensor], size: int, grid: Grid) -> Tensor:
    """Puts the insides of windows together to images.

    Args:
        parts: (n, h, w, C) for each shape of windows, as ``heads_of_windows`` cuts the queries.
        size: side of the windows.
        grid: (H, W) of the images.

    Returns:
        (B, H, W, C).
    """
    return _Join.apply(size, grid, *parts)


def adapted_windows(
    base: nn.Linear,
    encoder: Tensor,
    mixed: Callable[[Tensor], Tensor],
    decoder: Tensor,
    x: Tensor,
    size: int,
    by_shape: bool,
) -> Tensor:
    """Computes an adapted linear layer on the windows of images, which are padded with zeros.

    The frozen product is computed on the images' tokens alone; beyond them it is the bias. The
    mixture sees the padding, because it looks at a token's neighbours.

    Args:
        base: the frozen layer.
        encoder: (r, C_in).
        mixed: maps (B * windows, size, size, r) to the same.
        decoder: (C_out, r), with the scaling.
        x: (B, H, W, C_in) images.
        size: side of the windows, in tokens.
        by_shape: the order of the windows, as in ``partition``.

    Returns:
        (B * windows, size, size, C_out).
    """
    y = mixed(partition(F.linear(x, encoder.to(x.dtype)), size, by_shape=by_shape))
    h = _Partition.apply(base(x), size, base.bias, by_shape)
    # Not in place of a view of h: autograd would copy the gradient of h twice.
    h.addmm_(y.flatten(0, 2).to(h.dtype), decoder.to(h.dtype).t())
    return h.view(*y.shape[:-1], -1)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches a module's inputs, outputs or their gradients."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


class _Partition(torch.autograd.Function):
    """The tokens of ``partition``, one after the other: (B * windows * size * size, C)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, size: int, fill: Tensor | None, by_shape: bool
    ) -> Tensor:
        ctx.size, ctx.grid, ctx.by_shape = size, x.shape[1:3], by_shape
        tokens = _cut(x, size, by_shape, zeros=fill is None)
        if fill is not None:
            windows = tokens.unflatten(0, (-1, size, size))
            for beyond in _beyond(windows, size, ctx.grid, by_shape):
                beyond.copy_(fill)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        need_x, _, need_fill, _ = ctx.needs_input_grad
        grad = grad.unflatten(0, (-1, ctx.size, ctx.size))
        grad_fill = None
        if need_fill:
            parts = _beyond(grad.contiguous(), ctx.size, ctx.grid, ctx.by_shape)
            zero = grad.new_zeros(grad.shape[-1])
            grad_fill = sum((part.flatten(0, -2).sum(0) for part in parts), zero)
        grad_x = _joined(grad, ctx.size, ctx.grid, ctx.by_shape) if need_x else None
        return grad_x, None, grad_fill, None


class _Unpartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, size: int, grid: Grid) -> Tensor:  # type: ignore[override]
        ctx.size = size
        return _joined(windows, size, grid, ordered=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens = _cut(grad, ctx.size, ordered=False, zeros=True)
        return tokens.unflatten(0, (-1, ctx.size, ctx.size)), None, None


class _Heads(torch.autograd.Function):
    """One pass joins the gradients of all views; autograd's own would make a tensor of each."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.arguments, ctx.shape = arguments, qkv.shape
        return tuple(view for views in _heads(qkv, *arguments) for view in views[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_qkv = grads[0].new_empty(ctx.shape)
        for i, (q, k, v, *beyond) in enumerate(_heads(grad_qkv, *ctx.arguments)):
            for view, grad in zip((q, k, v), grads[3 * i :], strict=False):
                view.copy_(grad)
            for view in beyond:
                view.zero_()
        return grad_qkv, None, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, grid: Grid, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.size, shapes = size, _shapes(size, grid)
        batch = parts[0].shape[0] // math.prod(shapes[0].windows)
        x = parts[0].new_empty(batch, *grid, parts[0].shape[-1])
        for part, shape in zip(parts, shapes, strict=True):
            inside = shape.of_images(x, size)
            inside.copy_(part.view(inside.shape))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        shapes = _shapes(ctx.size, (grad.shape[1], grad.shape[2]))
        return None, None, *(shape.of_images(grad, ctx.size).flatten(0, 2) for shape in shapes)


class _Shape(NamedTuple):
    """Windows of which equally much is inside the images."""

    down: slice
    """Their rows of windows."""
    across: slice
    """Their columns of windows."""
    height: int
    """Tokens inside, of a window's ``size``."""
    width: int

    @property
    def windows(self) -> Grid:
        """Windows of an image, down and across."""
        return self.down.stop - self.down.start, self.across.stop - self.across.start

    def of_images(self, x: Tensor, size: int) -> Tensor:
        """A view (B, down, across, height, width, C) of (B, H, W, C)."""
        down, across = self.windows
        x = x[:, self.down.start * size :, self.across.start * size :]
        x = x[:, : down * self.height, : across * self.width]
        return x.unflatten(2, (across, -1)).unflatten(1, (down, -1)).transpose(2, 3)


def _shapes(size: int, grid: Grid) -> list[_Shape]:
    """Inside the images, cut by the right edge, by the lower one, by both; as far as there are."""
    rows, columns = (list(_ranges(length, size)) for length in grid)
    return [_Shape(i, j, height, width) for i, height in rows for j, width in columns]


def _ranges(length: int, size: int) -> Iterator[tuple[slice, int]]:
    """An axis as whole windows and the cut one: windows, tokens of each."""
    whole = length // size
    if whole:
        yield slice(0, whole), size
    if length % size:
        yield slice(whole, whole + 1), length % size


def _by_shape(
    windows: Tensor, size: int, grid: Grid, ordered: bool
) -> Iterator[tuple[_Shape, Tensor]]:
    """Windows of each shape, (B, down, across, size, size, C). ``ordered``: they are in turn."""
    shapes = _shapes(size, grid)
    down, across = shapes[-1].down.stop, shapes[-1].across.stop
    places = windows.unflatten(0, (-1, down, across))
    first = 0
    for shape in shapes:
        if ordered:
            count = len(places) * math.prod(shape.windows)
            yield shape, windows[first : first + count].unflatten(0, (len(places), *shape.windows))
            first += count
        else:
            yield shape, places[:, shape.down, shape.across]


def _cut(x: Tensor, size: int, ordered: bool, zeros: bool) -> Tensor:
    """The tokens of images' windows, as rows; those beyond the images are zero or uninitialised."""
    batch, height, width, features = x.shape
    count = -(-height // size) * -(-width // size)
    new = x.new_zeros if zeros else x.new_empty  # one launch zeroes all, of which few stay zero
    tokens = new(batch * count * size * size, features)
    windows = tokens.unflatten(0, (-1, size, size))
    for shape, own in _by_shape(windows, size, (height, width), ordered):
        own[..., : shape.height, : shape.width, :] = shape.of_images(x, size)
    return tokens


def _joined(windows: Tensor, size: int, grid: Grid, ordered: bool) -> Tensor:
    count = -(-grid[0] // size) * -(-grid[1] // size)
    x = windows.new_empty(windows.shape[0] // count, *grid, windows.shape[-1])
    for shape, own in _by_shape(windows, size, grid, ordered):
        shape.of_images(x, size).copy_(own[..., : shape.height, : shape.width, :])
    return x


def _beyond(windows: Tensor, size: int, grid: Grid, ordered: bool) -> Iterator[Tensor]:
    """Views of the tokens beyond the images, if there are any: below, then beside."""
    for shape, own in _by_shape(windows, size, grid, ordered):
        if shape.height < size:
            yield own[..., shape.height :, :, :]
        if shape.width < size:
            yield own[..., : shape.height, shape.width :, :]


def _heads(qkv: Tensor, heads: int, size: int, grid: Grid) -> Iterator[tuple[Tensor, ...]]:
    """Views for each shape of windows: q inside the images, k, v, and q beyond them."""
    for shape, own in _by_shape(qkv, size, grid, ordered=True):
        q, k, v = own.flatten(0, 2).unflatten(-1, (3, heads, -1)).unbind(3)
        height, width = shape.height, shape.width
        yield q[:, :height, :width], k, v, q[:, height:], q[:, :height, width:]
