"""Users' layouts, decoding of images and masks, items, flips, batches, and the demo data set."""

import functools
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of
from miniatures import check_samples, save
from PIL import Image
from torch.utils.data import DataLoader

from naslora.data.dataset import SegmentationDataset, collate
from naslora.data.datasets import draw_folds, load_all, load_splits, write_splits
from naslora.data.demo_data import write_mni152
from naslora.data.images import Sample, open_picture
from naslora.data.sampling import GlobalBatches, hold_out


def random_pair(folder: Path, name: str, size=(6, 8), seed=0) -> tuple[Path, Path]:
    rng = np.random.default_rng(seed)
    image = save(folder / "images" / f"{name}.png", rng.integers(0, 256, (*size, 3)))
    mask = save(folder / "masks" / f"{name}.png", 255 * rng.integers(0, 2, size))
    return image, mask


def write_csv(path: Path, *names: str, header: str = "image,label") -> None:
    rows = [f"images/{name}.png,masks/{name}.png" for name in names]
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


@pytest.fixture
def csv_root(tmp_path):
    for name in "abcde":
        random_pair(tmp_path, name)
    write_csv(tmp_path / "train.csv", "a", "b")
    write_csv(tmp_path / "val.csv", "c")
    write_csv(tmp_path / "test.csv", "d")
    return tmp_path


@pytest.fixture
def folder_root(tmp_path):
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        random_pair(tmp_path / split, name)
    return tmp_path


def sample_of(image: Path, mask: Path | None = None) -> Sample:
    return Sample(image, mask, "train.csv row 2")


# --- users' layouts


def test_csv_gives_each_row_with_its_line(csv_root):
    splits = load_splits("csv", csv_root)
    assert list(splits) == ["train", "val", "test"]
    assert splits["train"] == [
        Sample(csv_root / f"images/{name}.png", csv_root / f"masks/{name}.png", origin)
        for name, origin in (("a", "train.csv row 2"), ("b", "train.csv row 3"))
    ]
    write_csv(csv_root / "arch.csv", "e")
    assert [s.origin for s in load_splits("csv", csv_root)["arch"]] == ["arch.csv row 2"]


def test_csv_from_a_spreadsheet_with_further_columns_and_a_blank_line(csv_root):
    text = "\ufeffid, label, image\r\n\r\n7, masks/a.png, images/a.png\r\n"
    (csv_root / "train.csv").write_bytes(text.encode())
    (sample,) = load_splits("csv", csv_root)["train"]
    assert sample == Sample(csv_root / "images/a.png", csv_root / "masks/a.png", "train.csv row 3")


ROWS = {name: f"images/{name}.png,masks/{name}.png\n" for name in "abcdx"}
HEADER = "image,label\n"
# The file, what it holds (None: there is none), and parts of the line. tests/reliability has more.
BAD_CSV = [
    ("val", None, "has no split val; add it, or give --split 0.7 0.15 0.15"),
    ("train", None, "train.csv, val.csv and test.csv, or one CSV file, found test.csv, val.csv"),
    ("train", "file;mask\n", "image,label", "found file;mask"),
    ("val", HEADER, "val.csv names no images"),
    ("train", HEADER + "images/a.png\n", "train.csv: row 2 needs image and label"),
    ("train", HEADER + ROWS["a"] + ROWS["x"], "names 2 missing files", "x.png (train.csv row 3)"),
    ("train", HEADER + ROWS["a"] + ROWS["b"] + ROWS["a"],
     "train.csv row 2 and train.csv row 4: ", "listed twice in train"),
    ("test", HEADER + "images/../images/b.png,masks/d.png\n",
     "train.csv row 3 and test.csv row 2: ", "both in train and in test"),
]  # fmt: skip


@pytest.mark.parametrize("split, text, parts", [
    (split, text, parts) for split, text, *parts in BAD_CSV
])  # fmt: skip
def test_bad_csv_files(csv_root, split, text, parts):
    path = csv_root / f"{split}.csv"
    path.unlink()
    if text is not None:
        path.write_text(text)
    message = error_of(load_splits, "csv", csv_root)
    assert all(part in message for part in parts), message


def test_folders_pair_by_stem_whatever_the_suffix(folder_root):
    save(folder_root / "train/images/z.jpg", np.zeros((4, 4)))
    save(folder_root / "train/masks/z.png", np.zeros((4, 4)))
    (folder_root / "train/images/.DS_Store").write_bytes(b"")
    (folder_root / "val/masks").rename(folder_root / "val/labels")
    (folder_root / "val/images").rename(folder_root / "val/image")
    splits = load_splits("folders", folder_root)
    pairs = [(s.image.name, s.mask.name) for s in splits["train"]]
    assert pairs == [("a.png", "a.png"), ("z.jpg", "z.png")]
    (sample,) = splits["val"]
    assert sample.image == folder_root / "val/image/b.png"
    assert sample.mask == folder_root / "val/labels/b.png"
    assert "val" in sample.origin and "arch" not in splits
    random_pair(folder_root / "arch", "d")
    assert len(load_splits("folders", folder_root)["arch"]) == 1


def test_folders_missing_empty_or_ambiguous(folder_root):
    save(folder_root / "train/images/a.jpg", np.zeros((4, 4)))
    assert "a.jpg and a.png differ only" in error_of(load_splits, "folders", folder_root)
    (folder_root / "train/images/a.jpg").unlink()
    (folder_root / "test/labels").mkdir()
    assert "found test/labels, test/masks" in error_of(load_splits, "folders", folder_root)
    (folder_root / "test/labels").rmdir()
    for kept, lacking in (("masks", "image"), ("images", "mask")):
        lonely = save(folder_root / "train" / kept / "lonely.png", np.zeros((4, 4)))
        message = error_of(load_splits, "folders", folder_root)
        assert f"1 of 2 files without {lacking}: lonely.png" in message
        lonely.unlink()
    (folder_root / "val/images/b.png").unlink()
    (folder_root / "val/masks/b.png").unlink()
    assert "val/images holds no images" in error_of(load_splits, "folders", folder_root)
    (folder_root / "val").rename(folder_root / "validation")
    message = error_of(load_splits, "folders", folder_root)
    assert "expected one folder val/images|image, found test, test/images, test/masks" in message


# --- drawn splits


def test_one_csv_file_is_split_by_group(csv_root):
    rows = [f"images/{n}.png,masks/{n}.png,{g}" for n, g in zip("abcde", "xxyzz", strict=True)]
    for split in ("train", "val", "test"):
        (csv_root / f"{split}.csv").unlink()
    (csv_root / "all.csv").write_text("\n".join(["image,label,group", *rows]) + "\n")
    assert "has no split train, val, test; add it" in error_of(load_splits, "csv", csv_root)
    splits = load_splits("csv", csv_root, (), (0.4, 0.2, 0.4))
    assert splits == load_splits("csv", csv_root / "all.csv", (), (0.4, 0.2, 0.4))
    names = {split: "".join(s.image.stem for s in samples) for split, samples in splits.items()}
    assert list(names) == ["train", "val", "test"]
    assert sorted(names.values()) == ["ab", "c", "de"]
    assert all(sample.group is None for samples in splits.values() for sample in samples)


def test_one_folder_of_pairs_is_split(tmp_path):
    for number in range(20):
        random_pair(tmp_path, f"{number:02}")
    splits = load_splits("folders", tmp_path, (), (0.7, 0.15, 0.15))
    assert [len(samples) for samples in splits.values()] == [14, 3, 3]
    assert len({sample.image for samples in splits.values() for sample in samples}) == 20
    assert splits == load_splits("folders", tmp_path, (), (0.7, 0.15, 0.15))


@pytest.mark.parametrize(
    ("groups", "count", "sizes"),
    [
        ([None] * 10, 5, [2, 2, 2, 2, 2]),
        ([None] * 7, 3, [2, 2, 3]),
        ([*"aaaabbbccd", None], 3, [3, 4, 4]),  # b; a; c, d and the one alone
    ],
)
def test_folds_hold_every_image_once_and_groups_together(groups, count, sizes):
    samples = [sample_of(Path(f"{i}.png"))._replace(group=g) for i, g in enumerate(groups)]
    folds = draw_folds(samples, count)
    assert sorted(map(len, folds)) == sizes and folds == draw_folds(samples, count)
    assert sorted(s.image for fold in folds for s in fold) == sorted(s.image for s in samples)
    for group in {*groups} - {None}:
        assert sum(any(s.group == group for s in fold) for fold in folds) == 1
    few = len({*groups} - {None}) + groups.count(None)
    assert f"groups of images, got {few}" in error_of(draw_folds, samples, few + 1)


def test_splits_are_joined_and_written(csv_root, tmp_path):
    samples = load_all("csv", csv_root, "--folds")
    splits = load_splits("csv", csv_root)
    assert [s.image for s in samples] == [s.image for own in splits.values() for s in own]
    write_splits(tmp_path / "lists", splits)
    again = load_splits("csv", tmp_path / "lists")
    one, other = ([(s.image, s.mask) for own in v.values() for s in own] for v in (splits, again))
    assert one == other
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        random_pair(tmp_path / "parts" / split, name)
    joined = load_all("folders", tmp_path / "parts", "--folds")
    assert [sample.image.stem for sample in joined] == ["a", "b", "c"]
    line = error_of(load_all, "coco", csv_root, "--folds")
    assert line == "coco has its own splits; drop --folds"


# What is done to a folder of 5 pairs and a CSV file, the layout, the shares, and the line.
BAD_SPLITS = [
    (None, "folders", (0.5, 0.2, 0.2), "three shares above 0 that sum to 1, got 0.5 0.2 0.2"),
    (None, "folders", (1.0, 0.0, 0.0), "three shares above 0"),
    (None, "folders", (0.98, 0.01, 0.01), "--split leaves val and test empty: there are 5 images"),
    (lambda root: (root / "train.csv").unlink(), "csv", (0.7, 0.15, 0.15),
     "or one CSV file, found test.csv, val.csv"),
    (None, "coco", (0.7, 0.15, 0.15), "coco has its own splits; drop --split"),
    (lambda root: (root / "masks/c.png").unlink(), "folders", (0.6, 0.2, 0.2),
     "1 of 5 files without mask: c.png"),
    (lambda root: (root / "masks").rename(root / "truth"), "folders", (0.6, 0.2, 0.2),
     "expected one folder masks|mask|labels|label, found images, truth"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, source, shares, part", BAD_SPLITS)
def test_bad_splits(csv_root, spoil, source, shares, part):
    if spoil is not None:
        spoil(csv_root)
    assert part in error_of(load_splits, source, csv_root, (), shares)


# --- held-out splits


def test_hold_out_is_a_repeatable_partition():
    samples = [sample_of(Path(f"{i}.png")) for i in range(10)]
    kept, held = hold_out(samples, 0.2, seed=3)
    assert len(held) == 2 and sorted(kept + held) == sorted(samples)
    assert kept == sorted(kept) and held == sorted(held)
    assert (kept, held) == hold_out(samples, 0.2, seed=3)
    assert len({tuple(hold_out(samples, 0.2, seed)[1]) for seed in range(5)}) > 1
    for fraction in (0.01, 0.99):
        assert [len(part) for part in hold_out(samples[:2], fraction, 0)] == [1, 1]
    assert hold_out(samples[:1], 0, 0) == (samples[:1], [])
    assert "at least 2" in error_of(hold_out, samples[:1], 0.2, 0)


# --- images


def test_exif_rotation_is_applied_to_image_and_size_check(tmp_path):
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255  # in the file, the left half is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate clockwise: then the upper half is bright
    image = save(tmp_path / "a.jpg", pixels, exif=exif)
    upright = open_picture(sample_of(image)).rows()[..., 0]
    assert upright.shape == (32, 16)
    assert upright[:14].min() > 200 and upright[18:].max() < 55
    upright_mask = save(tmp_path / "upright.png", np.zeros((32, 16)))
    check_samples([sample_of(image, upright_mask)], 1)
    stored_mask = save(tmp_path / "stored.png", np.zeros((16, 32)))
    message = error_of(check_samples, [sample_of(image, stored_mask)], 1)
    assert "16x32" in message and "32x16" in message


# --- the check before a run


@pytest.fixture
def samples(tmp_path):
    return [
        Sample(*random_pair(tmp_path, f"s{i}", (9 + i, 12), seed=i), f"train.csv row {i + 2}")
        for i in range(5)
    ]


def test_sizes_that_differ(samples):
    save(samples[2].mask, np.zeros((3, 4)))
    dataset = SegmentationDataset(samples, 8, 1)
    for call, argument in ((check_samples, (samples, 1)), (dataset.__getitem__, (2,))):
        message = error_of(call, *argument)
        assert message.startswith("train.csv row 4: ")
        assert "12x11" in message and "4x3" in message and samples[2].mask.name in message


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) * 2 // 3], lambda data: b"hello"])
@pytest.mark.parametrize("which", ["image", "mask"])
def test_unreadable_files(tmp_path, suffix, damage, which):
    noise = 255 * np.random.default_rng(0).integers(0, 2, (64, 64))
    paths = {name: save(tmp_path / f"{name}.{suffix}", noise) for name in ("image", "mask")}
    bad = paths[which]
    bad.write_bytes(damage(bad.read_bytes()))
    sample = sample_of(paths["image"], paths["mask"])
    dataset = SegmentationDataset([sample], 8, 1)
    for call, argument in ((check_samples, ([sample], 1)), (dataset.__getitem__, (0,))):
        message = error_of(call, *argument)
        assert message.startswith(f"train.csv row 2: {which} {bad} cannot be read (")


# --- items


def test_item_shapes_and_values(samples, tmp_path):
    item = SegmentationDataset(samples, 16, 1)[1]
    assert item["image"].shape == (3, 16, 16) and item["image"].dtype == torch.float32
    assert item["image"].min() >= 0 and item["image"].max() <= 1
    assert item["mask"].shape == (16, 16) and item["mask"].dtype == torch.int64
    assert item["index"] == 1 and item["name"] == "s1.png"
    # At its own size it is the file.
    image, mask = random_pair(tmp_path, "a", (8, 8))
    item = SegmentationDataset([sample_of(image, mask)], 8, 1)[0]
    pixels = np.asarray(Image.open(image)).astype(np.float32) / 255
    torch.testing.assert_close(item["image"], torch.from_numpy(pixels).permute(2, 0, 1))
    assert (item["mask"].numpy() == np.asarray(Image.open(mask)) // 255).all()
    # What bicubic resizing overshoots is clamped.
    edge = save(tmp_path / "edge.png", np.tile([0, 0, 255, 255], (4, 1)))
    values = SegmentationDataset([sample_of(edge)], 32, 1)[0]["image"]
    assert values.min() == 0 and values.max() == 1


def test_item_is_squashed_with_antialiasing_and_nearest_labels(tmp_path):
    # Alternating black and white columns average to grey, but only with antialiasing.
    columns = np.tile([0, 255], (8, 32))
    image = save(tmp_path / "a.png", columns)
    mask = save(tmp_path / "m.png", np.repeat([[0, 1, 2, 0]], 8, axis=0).repeat(16, axis=1))
    item = SegmentationDataset([sample_of(image, mask)], 8, 3)[0]
    inner = item["image"][:, :, 1:-1]
    assert (inner - 0.5).abs().max() < 0.02  # rounding to 8 bits and the ripple of the filter
    assert item["mask"].tolist() == [[0, 0, 1, 1, 2, 2, 0, 0]] * 8


# --- flips


def test_flips_move_image_and_mask_alike_and_depend_on_seed_epoch_and_index(samples):
    plain = list(SegmentationDataset(samples, 16, 1))

    def flips(seed, epoch):
        """Which items are flipped; each is the upright one or its mirror image."""
        dataset, flipped = SegmentationDataset(samples, 16, 1, flip=True, seed=seed), []
        dataset.set_epoch(epoch)
        for item, upright in zip(dataset, plain, strict=True):
            flipped.append(not torch.equal(item["image"], upright["image"]))
            for key in ("image", "mask"):
                assert torch.equal(item[key].flip(-1) if flipped[-1] else item[key], upright[key])
        return flipped

    epochs = [flips(5, epoch) for epoch in range(12)]
    assert flips(5, 7) == epochs[7]  # a resumed run
    assert len(set(map(tuple, epochs))) > 1 and any(len(set(row)) > 1 for row in epochs)
    assert [flips(6, epoch) for epoch in range(12)] != epochs


# --- batches


def test_batches_of_a_loader(samples):
    """Workers that last follow the epoch's flips, and a share may be empty."""
    dataset = SegmentationDataset(samples, 8, 1, flip=True)
    loader = DataLoader(
        dataset, batch_size=2, collate_fn=collate, num_workers=2, persistent_workers=True
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected = torch.stack([dataset[i]["image"] for i in range(len(dataset))])
        batches = list(loader)
        assert torch.equal(torch.cat([batch["image"] for batch in batches]), expected)
    assert batches[0]["image"].shape == (2, 3, 8, 8) and batches[0]["mask"].shape == (2, 8, 8)
    assert batches[1]["index"].tolist() == [2, 3] and batches[1]["name"] == ["s2.png", "s3.png"]
    share = GlobalBatches(range(5), 4, rank=1, world_size=2, shuffle=False)
    first, last = DataLoader(dataset, batch_sampler=share, collate_fn=collate)
    assert first["index"].tolist() == [1, 3] and last is None


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (9, 4), (8, 4), (3, 4), (1, 1)])
def test_global_batches_are_the_same_for_any_number_of_processes(
    count, batch_size, world_size, shuffle
):
    make = functools.partial(GlobalBatches, range(count), batch_size, shuffle=shuffle, seed=1)
    alone, shares = make(), [make(rank, world_size) for rank in range(world_size)]
    for epoch in (0, 3):
        for batches in (alone, *shares):
            batches.set_epoch(epoch)
        whole = list(alone)
        assert sorted(itertools.chain(*whole)) == list(range(count))
        assert all(len(share) == len(whole) for share in shares)
        for step, (batch, *parts) in enumerate(zip(whole, *shares, strict=True)):
            assert alone.global_size(step) == len(batch) == sum(map(len, parts))
            merged = [part[i] for i in range(len(batch)) for part in parts if i < len(part)]
            assert merged == batch


def test_global_batches_order_depends_on_seed_and_epoch():
    def order(epoch, **options):
        batches = GlobalBatches(range(20), 20, **options)
        batches.set_epoch(epoch)
        return next(iter(batches))

    orders = [order(epoch, seed=seed) for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 6
    assert order(1, seed=1) == orders[3]
    assert order(1, shuffle=False) == list(range(20))


# --- the demo data set


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    pytest.importorskip("nilearn")
    root = tmp_path_factory.mktemp("demo") / "new" / "mni152"
    write_mni152(root)
    return root


def test_demo_splits_lie_apart(demo):
    splits = load_splits("mni152", demo)
    planes = {
        split: {int(sample.image.stem[1:]) for sample in samples}
        for split, samples in splits.items()
    }
    sizes = {split: len(samples) for split, samples in splits.items()}
    assert sizes == {"train": 60, "val": 12, "test": 18, "arch": 16}
    for split in planes:
        for other in planes.keys() - {split}:
            assert min(abs(a - b) for a in planes[split] for b in planes[other]) > 4


def test_the_folder_of_the_demo(demo, tmp_path, monkeypatch):
    """It is complete, is not written again, replaces no other folder, and needs nilearn."""
    assert os.listdir(demo.parent) == ["mni152"]
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    write_mni152(demo)
    assert before == {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    (tmp_path / "mine.txt").write_text("keep")
    assert "not the demo data set" in error_of(write_mni152, tmp_path)
    monkeypatch.setitem(sys.modules, "nilearn", None)
    assert "run pip install nilearn" in error_of(write_mni152, tmp_path / "new" / "demo")
    assert os.listdir(tmp_path) == ["mine.txt"]
