"""The cell from the definition of its eight operations, by the numbers around each pixel.

No convolution and no pooling of a library has a part in it.
"""

import torch
import torch.nn.functional as F

# (kernel size, dilation) of the convolutions, in the order of alpha.
CONVOLUTIONS = ((3, 1), (5, 1), (3, 2), (5, 2))


def windows(maps, kernel, dilation=1, fill=0.0):
    """(B, H, W, c, k, k): the numbers around each pixel of (B, H, W, c); ``fill`` is beside it."""
    reach = dilation * (kernel // 2)
    padded = F.pad(maps, (0, 0, reach, reach, reach, reach), value=fill)
    cut = padded.unfold(1, 2 * reach + 1, 1).unfold(2, 2 * reach + 1, 1)
    return cut[..., ::dilation, ::dilation]


def poolings(maps):
    """The mean and the largest of the pixels of the map among the 3 x 3 around each one."""
    inside = windows(torch.ones_like(maps), 3).sum((-2, -1))
    largest = windows(maps, 3, fill=-torch.inf).amax((-2, -1))
    return windows(maps, 3).sum((-2, -1)) / inside, largest


def cell(z, alpha, depthwise, pw, channels, share=1.0):
    """The mixed cell of z (B, H, W, r), in which neighbours keep ``share`` of their part."""
    maps, weights = z[..., channels], alpha.softmax(0)
    average, largest = poolings(maps)
    y = share * (weights[4] * average + weights[5] * largest)
    y = y + (weights[6] + (1 - share) / 9 * weights[4]) * maps  # weights[7] is that of "none"
    for i, (kernel, dilation) in enumerate(CONVOLUTIONS):
        kept = torch.full_like(depthwise[i], share)
        kept[:, kernel // 2, kernel // 2] = 1
        around = windows(maps, kernel, dilation)
        filtered = torch.einsum("bhwkuv,kuv->bhwk", around, kept * depthwise[i])
        y = y + weights[i] * filtered @ pw[i].T
    return z.index_copy(-1, channels, y)
