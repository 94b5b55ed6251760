"""The paper's data sets, read from small copies of their folders, and the caches."""

import copy
import os
import shutil
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from conftest import SHORT, error_of, succeed
from miniatures import check_samples
from PIL import Image
from run_configs import run_config
from sam_families import small_models

from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import DATASETS, count_differences, load_splits
from naslora.data.images import Sample
from naslora.data.layouts import draw_splits
from naslora.data.masks import IGNORED, read_mask
from naslora.errors import UserError
from naslora.records import read_rows
from naslora.results import HISTORY, Epoch
from naslora.sam.segmentation import build_model
from naslora.training.resolve import resolve
from naslora.training.run_config import RunConfig
from naslora.training.run_model import keep_embeddings

V2_CLASSES = np.where(miniatures.CLASSES == 2, 11, miniatures.CLASSES)


def tree(root: Path, name: str) -> Path:
    miniatures.TREES[name](root)
    return root


# --- every layout


@pytest.mark.parametrize(
    "name, write, sizes",
    [
        ("isic2017", miniatures.isic2017, (4, 1, 2)),
        ("kvasir", miniatures.pranet, (4, 1, 1)),
        ("kvasir", miniatures.kvasir_raw, (7, 2, 1)),  # test: 1/10 of 10; val: 1/5 of the other 9
        ("cvc-clinicdb", miniatures.pranet, (4, 1, 1)),
        ("cvc-clinicdb", miniatures.cvc_raw, (7, 2, 1)),
        ("polyp", miniatures.pranet, (8, 2, 2)),
        ("polyp", miniatures.polyps_raw, (14, 4, 2)),
        ("camouflage", miniatures.camouflage, (9, 1, 4)),
        ("sbu", miniatures.sbu, (9, 1, 2)),
        ("leaf", miniatures.leaf, (9, 1, 2)),
        ("leaf", miniatures.leaf_flat, (9, 1, 2)),
        ("roads", miniatures.roads, (3, 1, 1)),
        ("trans10k-v1", miniatures.trans10k_v1, (3, 2, 2)),
        ("trans10k-v2", miniatures.trans10k_v2, (3, 1, 1)),
    ],
)
def test_every_file_of_a_layout_is_read_and_its_masks_are_decoded(tmp_path, name, write, sizes):
    write(tmp_path)
    splits = load_splits(name, tmp_path)
    assert tuple(len(splits[split]) for split in ("train", "val", "test")) == sizes
    assert len(splits) == 3
    config = run_config(dataset=name, root=tmp_path).data
    samples = [sample for split in splits.values() for sample in split]
    check_samples(samples, config.num_classes)
    labels = {"trans10k-v1": miniatures.CLASSES, "trans10k-v2": V2_CLASSES}
    expected = labels.get(name, miniatures.DISC)
    for sample in samples:
        mask = read_mask(sample, config.num_classes)
        # The compression of a JPEG mask may change pixels at the edge of the disc.
        assert name != "isic2017" or sample.mask.stem == f"{sample.image.stem}_segmentation"
        wrong = (mask != expected).mean()
        assert wrong < 0.02 if sample.mask.suffix == ".jpg" else wrong == 0


def test_polyp_sets_share_a_training_folder_and_take_their_own_images(tmp_path):
    tree(tmp_path, "kvasir")
    kvasir, cvc, joint = (load_splits(n, tmp_path) for n in ("kvasir", "cvc-clinicdb", "polyp"))
    assert all(s.image.stem.startswith("cju") for split in kvasir.values() for s in split)
    assert all(s.image.stem.isdigit() for split in cvc.values() for s in split)
    tested = [s.image.parent.parent.name for s in kvasir["test"] + cvc["test"]]
    assert tested == ["Kvasir", "CVC-ClinicDB"]
    # The joint set scores each on its own.
    assert [sample.group for sample in joint["test"]] == ["Kvasir-SEG", "CVC-ClinicDB"]
    assert {sample.group for sample in joint["train"] + joint["val"]} == {None}
    assert joint["train"] == kvasir["train"] + cvc["train"]


# --- the paper's counts


def test_counts_are_checked_against_the_paper(tmp_path):
    splits = load_splits("camouflage", tree(tmp_path / "cod", "camouflage"))
    assert [s.group for s in splits["test"]] == ["CAMO", "CHAMELEON", "CHAMELEON", "COD10K"]
    assert count_differences("camouflage", splits) == [
        "9 train images instead of 3636",
        "1 val images instead of 404",
        "1 CAMO images instead of 250",
        "2 CHAMELEON images instead of 76",
        "1 COD10K images instead of 2026",
    ]
    assert count_differences("csv", {"train": [], "val": [], "test": []}) == []
    splits = load_splits("trans10k-v1", tree(tmp_path / "v1", "trans10k-v1"))
    assert [s.group for s in splits["test"]] == ["easy", "hard"]
    assert {s.group for s in splits["train"]} == {None}


def test_a_paper_sized_list_is_split_as_expected():
    """The splits that are drawn at random, from lists of the lengths in the paper's appendix B."""

    def samples(count):
        return [Sample(Path(f"{i}.png"), None, "") for i in range(count)]

    for name, counts, *shares in (
        ("kvasir", {"train": 1000}, 0.2, 100 / 1000),
        ("cvc-clinicdb", {"train": 612}, 0.2, 62 / 612),
        ("kvasir", {"train": 900, "test": 100}, 0.2),
        ("sbu", {"train": 4085, "test": 638}, 0.1),
        ("leaf", {"train": 498, "test": 90}, 0.1),
    ):
        splits = draw_splits({split: samples(n) for split, n in counts.items()}, *shares)
        assert {split: len(splits[split]) for split in splits} == DATASETS[name].counts


# --- error messages


@pytest.mark.parametrize("name", miniatures.TREES)
def test_a_wrong_layout_names_what_was_looked_for_and_what_was_found(tmp_path, name):
    miniatures.picture(tmp_path / "photos/a.jpg")
    message = error_of(load_splits, name, tmp_path)
    assert f"{tmp_path}: expected one folder " in message and message.endswith("found photos")


TRAIN_MASKS = "ISIC-2017_Training_Part1_GroundTruth"
# A data set, what happens to its folder, and parts of the line.
SPOILT = [
    ("camouflage", lambda root: shutil.rmtree(root / "TestDataset/CHAMELEON"),
     "expected one folder TestDataset/CHAMELEON/Imgs, found TestDataset, TestDataset/CAMO, "),
    ("isic2017", lambda root: (root / TRAIN_MASKS / "ISIC_0000001_segmentation.png").unlink(),
     "1 of 4 files without mask: ISIC_0000001.jpg"),
    ("isic2017",
     lambda root: miniatures.save(
         root / TRAIN_MASKS / "ISIC_9999999_segmentation.png", miniatures.BINARY),
     "1 of 5 files without image: ISIC_9999999_segmentation.png"),
    ("sbu", lambda root: miniatures.picture(root / "SBU-Test/ShadowImages/LSSD1.jpg"),
     "LSSD1.jpg and lssd1.jpg differ only in their suffix or in case"),
    ("roads", lambda root: (root / "tiff/val_labels/val_0_15.tif").write_bytes(b"II*\0"),
     "val_0_15.tif cannot be read", "tiff/val"),
    ("trans10k-v1",
     lambda root: miniatures.save(
         root / "train/masks/1_mask.png", np.full((*miniatures.SIZE, 3), 7, np.uint8)),
     "1_mask.png", "means 7.0; expected 0 (background), 85 (things)"),
]  # fmt: skip


@pytest.mark.parametrize(
    "name, spoil, parts", [(name, spoil, parts) for name, spoil, *parts in SPOILT]
)
def test_spoilt_folders(tmp_path, name, spoil, parts):
    spoil(tree(tmp_path, name))

    def check():
        for samples in load_splits(name, tmp_path).values():
            check_samples(samples, run_config(dataset=name).data.num_classes)

    message = error_of(check)
    assert all(part in message for part in parts), message


# --- the cache


def dataset_of(root: Path, cache: Path | None, **options) -> SegmentationDataset:
    samples = load_splits("sbu", root)["train"]
    return SegmentationDataset(samples, 16, 1, cache=cache and Cache(cache), **options)


def test_the_cache_changes_no_pixel_and_is_used(tmp_path, monkeypatch):
    tree(tmp_path, "sbu")
    plain = list(dataset_of(tmp_path, None, flip=True))
    dataset = dataset_of(tmp_path, tmp_path / "cache", flip=True)
    first = list(dataset)
    for entry in (tmp_path / "cache").iterdir():  # a damaged one is created again
        entry.write_bytes(b"")
        break
    again = list(dataset)
    sample = dataset.samples[0]
    monkeypatch.setattr(SegmentationDataset, "_decode", None)  # decoding would fail now
    second = list(dataset_of(tmp_path, tmp_path / "cache", flip=True))
    for a, *others in zip(plain, first, again, second, strict=True):
        assert all(torch.equal(a[k], other[k]) for other in others for k in ("image", "mask"))
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)
    monkeypatch.undo()
    miniatures.save(sample.mask, np.zeros((5, 5), np.uint8))
    for _ in range(2):  # errors are not cached
        assert "must be the same" in error_of(dataset.__getitem__, 0)
    assert "cannot be created" in error_of(Cache, sample.mask / "cache")


def test_the_cache_is_never_stale(tmp_path):
    tree(tmp_path, "sbu")
    dataset = dataset_of(tmp_path, tmp_path / "cache")
    before, sample = dataset[0], dataset.samples[0]
    stat = sample.mask.stat()
    miniatures.save(sample.mask, 255 - miniatures.BINARY)
    os.utime(sample.mask, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the time does not change
    assert torch.equal(dataset[0]["mask"], 1 - before["mask"])
    larger = SegmentationDataset([sample], 24, 1, cache=Cache(tmp_path / "cache"))
    assert larger[0]["image"].shape == (3, 24, 24)
    of_labels = [sample._replace(encoding="labels")]
    as_labels = SegmentationDataset(of_labels, 16, 3, cache=Cache(tmp_path / "cache"))
    # 255 has no class in a mask of three classes. The entry for one class must not be used.
    assert set(as_labels[0]["mask"].unique().tolist()) == {0, IGNORED}


# --- classes and metrics of a run


def test_a_run_takes_classes_and_metrics_from_its_data_set():
    run = run_config(dataset="trans10k-v1")
    config = run.data
    assert (config.num_classes, config.class_names) == (3, ("things", "stuff"))
    assert config.metrics == ("foreground_accuracy", "foreground_miou", "index_mae", "mber")
    assert resolve(RunConfig.from_dict(run.to_dict())) == run
    assert run_config(dataset="sbu").data.num_classes == 1
    assert len(run_config(dataset="trans10k-v2").data.class_names) == 11
    with pytest.raises(UserError, match="trans10k-v2 has 12 classes, got num_classes 3"):
        run_config(dataset="trans10k-v2", num_classes=3)


def test_weights_of_rare_classes(tmp_path):
    """Shares of the pixels of the images that have a class: 7/8 and 1/4; the third is nowhere."""
    for name, row in {"a": [0, 0, 0, 1], "b": [0, 0, 0, 0], "c": [255] * 4}.items():
        Image.fromarray(np.array([row], np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("image,label\na.png,a.png\nb.png,b.png\nc.png,c.png\n")
    for split in ("val", "test"):
        Image.fromarray(np.zeros((1, 4), np.uint8)).save(tmp_path / f"{split}.png")
        (tmp_path / f"{split}.csv").write_text(f"image,label\n{split}.png,{split}.png\n")
    config = run_config(root=tmp_path, num_classes=3, training={"class_weights": "auto"})
    median = (7 / 8 + 1 / 4) / 2
    assert config.training.class_weights == pytest.approx((median * 8 / 7, median * 4, 1), abs=1e-4)


# --- embeddings in the cache


@pytest.mark.parametrize("name", ["vit_t", "sam2.1_t"])
def test_an_encoder_sees_an_image_once(tmp_path, tiny_vit, name):
    with small_models():
        encoder = build_model(name, 64, checkpoint="none").image_encoder
    calls, forward = [], encoder.forward
    encoder.forward = lambda images: calls.append(len(images)) or forward(images)
    images = torch.randn(3, 3, 64, 64, generator=torch.manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, dtype != torch.float32):
            expected = forward(images)
            kept = copy.copy(encoder)
            keep_embeddings(kept, Cache(tmp_path), "weights")
            found = [kept(images[:2]), kept(images), kept(images)][-1]
        pairs = zip(found, expected, strict=True) if name == "sam2.1_t" else [(found, expected)]
        for ours, whole in pairs:
            assert ours.dtype == whole.dtype
            torch.testing.assert_close(ours, whole, rtol=0.02, atol=0.02 * whole.abs().max())
    assert calls == [1] * 6  # one an image, in each precision


def test_a_run_with_embeddings_learns_the_same(clean_data, tiny_vit, tmp_path):
    common = ("--data", clean_data, *SHORT, "--method", "decoder-only", "--mixed-precision", "no")
    losses = []
    for own in ((), ("--cache", tmp_path / "cache", "--cache-embeddings")):
        run = tmp_path / f"run{len(own)}"
        succeed("train", *common, *own, "--output", run)
        losses.append([row.train_loss for row in read_rows(run / HISTORY, Epoch)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
