"""Windows of an image of tokens, as SAM's windowed attention cuts them.

SAM pads the image to whole windows with zeros. A linear layer turns those into its bias, so it need
not compute them: ``partition`` can put the windows together behind the layer. What leaves the
attention there is dropped, so these queries need not be computed, either: ``heads`` leaves them
out.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from naslora.adapter.layer.grid import Grid


class Windows(NamedTuple):
    """How images (B, H, W, C) are cut into windows (B * windows, size, size, C)."""

    size: int
    """Side of the windows, in tokens."""
    grid: Grid
    """(H, W) of the images."""
    by_shape: bool = False
    """Whether the windows are ordered by how much of them is inside the images: first those inside,
    then those that the right edge cuts, the lower one, both. If not, their order is row-major in
    each image."""

    def partition(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """Cuts images into windows. The tokens beyond the images hold ``fill``, (C,), or zeros."""
        return self.tokens(x, fill).unflatten(0, (-1, self.size, self.size))

    def tokens(self, x: Tensor, fill: Tensor | None = None) -> Tensor:
        """The tokens of ``partition``, one after the other: (B * windows * size * size, C)."""
        return _Partition.apply(x, fill, self)

    def unpartition(self, windows: Tensor) -> Tensor:
        """Puts windows together to images, without the tokens beyond them."""
        return _Unpartition.apply(windows, self)

    def ordered(self, windows: Tensor) -> Tensor:
        """Puts windows (B * windows, ...) from row-major order into the order ``by_shape``."""
        places = torch.arange(len(windows), device=windows.device)
        row_major = self._replace(by_shape=False)
        order = torch.cat([own.flatten() for *_, own in row_major.shapes(places)])
        return windows.index_select(0, order)

    def heads(self, qkv: Tensor, heads: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values of windows (B * windows, size, size, 3 C) that are ordered by
        shape: for each shape views of (n, h, w, heads, d) queries, those inside the images, and of
        (n, size, size, heads, d) keys and values."""
        views = _Heads.apply(qkv, heads, self)
        return [views[i : i + 3] for i in range(0, len(views), 3)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Puts the insides of windows together to images: (n, h, w, C) for each shape of windows,
        as ``heads`` cuts the queries."""
        return _Join.apply(self, *parts)

    # ---- Views -----------------------------------------------------------------------------------

    @property
    def counts(self) -> Grid:
        """Windows of an image, down and across."""
        return -(-self.grid[0] // self.size), -(-self.grid[1] // self.size)

    def insides(self, x: Tensor) -> Iterator[Tensor]:
        """Views of images for each shape of windows: (B, down, across, height, width, C)."""
        for (top, down, height), (left, across, width) in self._parts():
            part = x.narrow(1, top * self.size, down * height).unflatten(1, (down, height))
            part = part.narrow(3, left * self.size, across * width)
            yield part.unflatten(3, (across, width)).transpose(2, 3)

    def shapes(self, windows: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """For each shape of windows how high and wide they are inside the images, and the windows:
        views (B, down, across, ...) of (B * windows, ...)."""
        images = windows.unflatten(0, (-1, *self.counts))
        first = 0
        for (top, down, height), (left, across, width) in self._parts():
            if self.by_shape:
                own = windows.narrow(0, first, len(images) * down * across)
                first += len(own)
                own = own.unflatten(0, (len(images), down, across))
            else:
                own = images.narrow(1, top, down).narrow(2, left, across)
            yield height, width, own

    def pairs(self, windows: Tensor, images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views of the tokens inside, of windows and of images, for each shape of windows."""
        both = zip(self.shapes(windows), self.insides(images), strict=True)
        for (height, width, own), inside in both:
            yield own[..., :height, :width, :], inside

    def beyond(self, windows: Tensor) -> Iterator[Tensor]:
        """Views of windows' tokens beyond the images, if there are any: below, then beside."""
        for height, width, own in self.shapes(windows):
            if height < self.size:
                yield own[..., height:, :, :]
            if width < self.size:
                yield own[..., :height, width:, :]

    def _parts(self) -> Iterator[tuple[tuple[int, int, int], ...]]:
        """Rows and columns of each shape of windows: the first, how many, and how many tokens of
        each are inside. An axis has whole windows and the cut one."""
        axes = []
        for length in self.grid:
            whole, rest = divmod(length, self.size)
            parts = (0, whole, self.size), (whole, 1, rest)
            axes.append([own for own in parts if own[1] and own[2]])
        return itertools.product(*axes)


def _cut(x: Tensor, windows: Windows, zeros: bool) -> Tensor:
    """The tokens of images' windows, as rows; those beyond the images are zero or uninitialised."""
    count, size = len(x) * math.prod(windows.counts), windows.size
    new = x.new_zeros if zeros else x.new_empty  # one launch zeroes all, of which few stay zero
    tokens = new(count * size * size, x.shape[-1])
    for place, inside in windows.pairs(tokens.unflatten(0, (count, size, size)), x):
        place.copy_(inside)
    return tokens


def _joined(own: Tensor, windows: Windows) -> Tensor:
    """The images of windows."""
    batch = len(own) // math.prod(windows.counts)
    x = own.new_empty(batch, *windows.grid, own.shape[-1])
    for inside, place in windows.pairs(own, x):
        place.copy_(inside)
    return x


def _split(qkv: Tensor, heads: int, windows: Windows) -> Iterator[tuple[Tensor, ...]]:
    """Views for each shape of windows: q inside the images, k, v, and q beyond them."""
    for height, width, own in windows.shapes(qkv):
        q, k, v = own.flatten(0, 2).unflatten(-1, (3, heads, -1)).unbind(3)
        yield q[:, :height, :width], k, v, q[:, height:], q[:, :height, width:]


class _Partition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fill: Tensor | None, windows: Windows) -> Tensor:  # type: ignore[override]
        ctx.windows = windows
        tokens = _cut(x, windows, zeros=fill is None)
        if fill is not None:
            for beyond in windows.beyond(tokens.unflatten(0, (-1, windows.size, windows.size))):
                beyond.copy_(fill)
        return tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        need_x, need_fill, _ = ctx.needs_input_grad
        grad = grad.unflatten(0, (-1, ctx.windows.size, ctx.windows.size))
        grad_fill = None
        if need_fill:
            zero = grad.new_zeros(grad.shape[-1])
            parts = ctx.windows.beyond(grad.contiguous())
            grad_fill = sum((part.flatten(0, -2).sum(0) for part in parts), zero)
        return _joined(grad, ctx.windows) if need_x else None, grad_fill, None


class _Unpartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, windows: Windows) -> Tensor:  # type: ignore[override]
        ctx.windows = windows
        return _joined(x, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        size = ctx.windows.size
        return _cut(grad, ctx.windows, zeros=True).unflatten(0, (-1, size, size)), None


class _Heads(torch.autograd.Function):
    """One pass joins the gradients of all views; autograd's own would make a tensor of each."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.arguments, ctx.shape = arguments, qkv.shape
        return tuple(view for views in _split(qkv, *arguments) for view in views[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_qkv = grads[0].new_empty(ctx.shape)
        for i, (q, k, v, *beyond) in enumerate(_split(grad_qkv, *ctx.arguments)):
            for view, grad in zip((q, k, v), grads[3 * i :], strict=False):
                view.copy_(grad)
            for view in beyond:
                view.zero_()
        return grad_qkv, None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Windows, *parts: Tensor) -> Tensor:  # type: ignore[override]
        ctx.windows = windows
        batch = sum(part[..., 0].numel() for part in parts) // math.prod(windows.grid)
        x = parts[0].new_empty(batch, *windows.grid, parts[0].shape[-1])
        for part, inside in zip(parts, windows.insides(x), strict=True):
            inside.copy_(part.view(inside.shape))
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(inside.flatten(0, 2) for inside in ctx.windows.insides(grad))
