"""Random changes of training images: masks stay aligned, and every choice is seeded."""

import numpy as np
import pytest
import torch
from miniatures import save
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from naslora.data.augmentation import geometry
from naslora.data.dataset import SegmentationDataset, collate
from naslora.data.images import Sample
from naslora.data.masks import IGNORED

S = 64
CHANGED = ("dihedral", "medical", "natural")


def coordinates() -> torch.Tensor:
    """An image whose red channel is the column and whose green channel the row, times 3; blue is
    255."""
    rows, columns = torch.meshgrid(torch.arange(S), torch.arange(S), indexing="ij")
    return torch.stack([3 * columns, 3 * rows, torch.full_like(rows, 255)]).to(torch.uint8)


def in_shape(x, y):
    """An asymmetric shape as a function of the coordinates: a disc and a bar."""
    return ((x - 20) ** 2 + (y - 40) ** 2 < 144) | ((x > 40) & (y < 22))


@pytest.mark.parametrize("augment", CHANGED)
def test_masks_move_with_their_images(augment):
    """The image tells where each pixel came from, so it tells the mask that belongs there."""
    image = coordinates()
    mask = in_shape(image[0] / 3, image[1] / 3).long()
    transform = v2.Compose(geometry(augment, S))
    moved = outside = 0
    for seed in range(20):
        torch.manual_seed(seed)
        changed, labels = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        expected = in_shape(changed[0].float() / 3, changed[1].float() / 3)
        seen = changed[2] == 255  # bilinear pixels at the border of the image are mixed
        known = seen & (labels != IGNORED)
        # The nearest and the bilinear pixel differ at the outline, by at most a pixel.
        assert (expected == (labels == 1))[known].float().mean() > 0.97
        assert set(labels.unique().tolist()) <= {0, 1, IGNORED}
        assert (labels == IGNORED)[changed[2] == 0].all()
        outside += int((labels == IGNORED).sum())
        moved += int((labels != mask).sum())
        shifted = torch.roll(labels, 3, dims=1)  # the test sees an error of three pixels
        assert (expected == (shifted == 1))[known].float().mean() < 0.97
    assert moved > 1000 and (outside > 0) == (augment == "medical")


def test_dihedral_draws_the_eight_symmetries_of_the_square(tmp_path):
    (sample,) = samples(tmp_path, 1)
    image = SegmentationDataset([sample], S, 1)[0]["image"]
    turned = [torch.rot90(image, k, (1, 2)) for k in range(4)]
    symmetries = [*turned, *(image.flip(2) for image in turned)]
    data, seen = SegmentationDataset([sample], S, 1, flip=True, augment="dihedral"), []
    for epoch in range(60):
        data.set_epoch(epoch)
        seen.append(next(i for i, s in enumerate(symmetries) if torch.equal(data[0]["image"], s)))
    assert {*seen} == {*range(8)}


def samples(folder, count=3):
    rng = np.random.default_rng(0)
    for i in range(count):
        save(folder / f"{i}.png", rng.integers(0, 256, (S, S, 3)))
        save(folder / f"{i}_mask.png", rng.integers(0, 2, (S, S)))
    return [Sample(folder / f"{i}.png", folder / f"{i}_mask.png", "x") for i in range(count)]


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in ("image", "mask"))


@pytest.mark.parametrize("augment", CHANGED)
def test_changes_depend_on_seed_epoch_and_index_only(tmp_path, augment):
    files = samples(tmp_path)

    def dataset(seed=5, epoch=0):
        own = SegmentationDataset(files, S, 1, flip=True, seed=seed, augment=augment)
        own.set_epoch(epoch)
        return own

    first = dataset()
    state = torch.get_rng_state()
    items = [first[i] for i in range(3)]
    assert torch.equal(torch.get_rng_state(), state)  # the noise of the model does not change
    torch.manual_seed(99)
    assert all(same(first[i], items[i]) for i in (2, 0, 1))
    assert not same(dataset(seed=6)[0], items[0]) and not same(dataset(epoch=1)[0], items[0])
    again = SegmentationDataset([files[0]] * 8, S, 1, augment=augment)
    assert not all(same(again[0], again[i]) for i in range(8))  # the index counts
    loader = DataLoader(first, batch_size=1, collate_fn=collate, num_workers=2)
    for i, batch in enumerate(loader):
        assert same({key: batch[key][0] for key in ("image", "mask")}, items[i])
