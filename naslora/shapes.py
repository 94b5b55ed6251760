"""Scores of a predicted and a true shape: bool arrays of any dimension. docs/losses.md has sources.

A score is NaN if both shapes are empty, and the worst value if one is.
"""

from collections.abc import Sequence

import numpy as np

Spacing = Sequence[float] | None
"""The size of an element along each axis; None is 1."""
TOLERANCE = 2.0
"""Distance up to which ``nsd`` takes two surfaces for the same, in the unit of the spacing."""
BOUNDARY_WIDTH = 0.02
"""Width of the boundaries of ``boundary_iou``, as a share of the image's diagonal."""


def _distances(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing) -> list[np.ndarray]:
    """Of each element of one surface the distance to the other surface, both ways. An element of a
    surface touches by a side what is not of the shape, or the border."""
    from scipy import ndimage  # not for the help

    if not (prediction.any() and truth.any()):
        lengths = np.array(truth.shape) * (1.0 if spacing is None else np.array(spacing))
        empty = not (prediction.any() or truth.any())
        return [np.array([np.nan if empty else np.linalg.norm(lengths)])] * 2
    box = ndimage.find_objects((prediction | truth).astype(np.uint8))[0]  # beyond it is nothing
    own, true = prediction[box], truth[box]
    surfaces = [shape & ~ndimage.binary_erosion(shape) for shape in (own, true)]
    return [
        ndimage.distance_transform_edt(~other, sampling=spacing)[own]
        for own, other in (surfaces, surfaces[::-1])
    ]


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing = None) -> float:
    """The 95th percentile of the surfaces' distances, the larger one of both ways. The worst value
    is the diagonal."""
    both = _distances(prediction, truth, spacing)
    return float(max(np.percentile(distances, 95) for distances in both))


def nsd(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing = None) -> float:
    """The normalised surface distance: the share of both surfaces that is at most ``TOLERANCE``
    from the other one."""
    if not (prediction.any() and truth.any()):
        return 0.0 if prediction.any() or truth.any() else np.nan
    return float((np.concatenate(_distances(prediction, truth, spacing)) <= TOLERANCE).mean())


def size_difference(prediction: np.ndarray, truth: np.ndarray, spacing: Spacing = None) -> float:
    """How much larger or smaller the prediction is."""
    if not (prediction.any() or truth.any()):
        return np.nan
    difference = abs(int(prediction.sum()) - int(truth.sum()))
    return float(difference * np.prod(1.0 if spacing is None else spacing))


def boundary_iou(prediction: np.ndarray, truth: np.ndarray, _: Spacing = None) -> float:
    """The IoU of the boundaries, which lie inside the shapes."""
    from scipy import ndimage  # not for the help

    width = max(1, round(BOUNDARY_WIDTH * np.linalg.norm(truth.shape)))
    a, b = (  # what as many erosions by 3 x 3 pixels as the boundary is wide take away
        shape
        & (ndimage.distance_transform_cdt(np.pad(shape, 1), "chessboard")[1:-1, 1:-1] <= width)
        for shape in (prediction, truth)
    )
    return _share((a & b).sum(), (a | b).sum())


def cldice(prediction: np.ndarray, truth: np.ndarray, _: Spacing = None) -> float:
    """The F1 of the skeletons: precision and recall are the shares that lie in the other shape."""
    from skimage.morphology import skeletonize  # imported here: it takes half a second

    own, true = skeletonize(prediction), skeletonize(truth)
    return _f1(truth[own].sum(), own.sum(), prediction[true].sum(), true.sum())


def lesion_f1(prediction: np.ndarray, truth: np.ndarray, _: Spacing = None) -> float:
    """The F1 of the connected parts, by any neighbours. A part is found if an element of it is."""
    from scipy import ndimage  # not for the help

    counts: list[int] = []
    for own, other in ((prediction, truth), (truth, prediction)):
        parts, count = ndimage.label(own, np.ones((3,) * own.ndim))
        counts += [len(np.setdiff1d(parts[other], 0)), count]
    return _f1(*counts)


def _f1(right: int, predicted: int, found: int, true: int) -> float:
    """The harmonic mean of right / predicted and found / true."""
    if not (right and found):
        return _share(0, predicted + true)
    return float(2 / (predicted / right + true / found))


def _share(part: int, whole: int) -> float:
    return float(part / whole) if whole else np.nan
