"""The paper's data sets, read from small copies of their folders, and the cache."""

import multiprocessing
import os
import shutil
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from miniatures import check_samples
from PIL import ExifTags, Image
from run_configs import run_config

from naslora.data.cache import Cache
from naslora.data.dataset import SegmentationDataset
from naslora.data.datasets import DATASETS, count_differences, load_splits
from naslora.data.images import Sample
from naslora.data.masks import IGNORED, read_mask
from naslora.errors import UserError
from naslora.training.resolve import resolve
from naslora.training.run_config import RunConfig

V2_CLASSES = np.where(miniatures.CLASSES == 2, 11, miniatures.CLASSES)


def tree(root: Path, name: str) -> Path:
    miniatures.TREES[name](root)
    return root


def error_of(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert {split: len(samples) for split, samples in splits.items()} == dict(
        zip(("train", "val", "test"), sizes, strict=True)
    )
    config = run_config(dataset=name, root=tmp_path).data
    samples = [sample for split in splits.values() for sample in split]
    check_samples(samples, config.num_classes)
    expected = {
        "trans10k-v1": miniatures.CLASSES,
        "trans10k-v2": V2_CLASSES,
    }.get(name, miniatures.DISC)
    for sample in samples:
        mask = read_mask(sample, config.num_classes)
        # The compression of a JPEG mask may change pixels at the edge of the disc.
        wrong = (mask != expected).mean()
        assert wrong < 0.02 if sample.mask.suffix == ".jpg" else wrong == 0


def test_isic_ignores_superpixels_and_pairs_by_name(tmp_path):
    for sample in load_splits("isic2017", tree(tmp_path, "isic2017"))["train"]:
        assert sample.mask.stem == f"{sample.image.stem}_segmentation"
        assert sample.image.suffix == ".jpg"


def test_polyp_sets_share_a_training_folder_and_take_their_own_images(tmp_path):
    tree(tmp_path, "kvasir")
    kvasir, cvc = (load_splits(name, tmp_path) for name in ("kvasir", "cvc-clinicdb"))
    assert all(s.image.stem.startswith("cju") for split in kvasir.values() for s in split)
    assert all(s.image.stem.isdigit() for split in cvc.values() for s in split)
    assert [s.image.parent.parent.name for s in kvasir["test"] + cvc["test"]] == [
        "Kvasir",
        "CVC-ClinicDB",
    ]


def test_the_joint_polyp_set_scores_each_set_on_its_own(tmp_path):
    miniatures.pranet(tmp_path)
    joint = load_splits("polyp", tmp_path)
    assert [sample.group for sample in joint["test"]] == ["Kvasir-SEG", "CVC-ClinicDB"]
    assert {sample.group for sample in joint["train"] + joint["val"]} == {None}
    apart = [load_splits(name, tmp_path) for name in ("kvasir", "cvc-clinicdb")]
    assert joint["train"] == apart[0]["train"] + apart[1]["train"]


def test_drawn_splits_are_the_same_every_time_and_lie_apart(tmp_path):
    tree(tmp_path, "sbu")
    first, second = load_splits("sbu", tmp_path), load_splits("sbu", tmp_path)
    assert first == second
    assert not {s.image for s in first["train"]} & {s.image for s in first["val"]}


def test_groups_of_test_images(tmp_path):
    tree(tmp_path / "cod", "camouflage")
    groups = [s.group for s in load_splits("camouflage", tmp_path / "cod")["test"]]
    assert groups == ["CAMO", "CHAMELEON", "CHAMELEON", "COD10K"]
    tree(tmp_path / "v1", "trans10k-v1")
    splits = load_splits("trans10k-v1", tmp_path / "v1")
    assert [s.group for s in splits["test"]] == ["easy", "hard"]
    assert {s.group for s in splits["train"]} == {None}


def test_folders_in_another_case_are_found(tmp_path):
    tree(tmp_path, "sbu")
    (tmp_path / "SBU-Test").rename(tmp_path / "sbu-test")
    assert len(load_splits("sbu", tmp_path)["test"]) == 2


# --- the paper's counts


def test_counts_are_checked_against_the_paper(tmp_path):
    differences = count_differences(
        "camouflage", load_splits("camouflage", tree(tmp_path, "camouflage"))
    )
    assert differences == [
        "9 train images instead of 3636",
        "1 val images instead of 404",
        "1 CAMO images instead of 250",
        "2 CHAMELEON images instead of 76",
        "1 COD10K images instead of 2026",
    ]
    assert count_differences("csv", {"train": [], "val": [], "test": []}) == []


# Appendix B. Kvasir: 1000 images, CVC-ClinicDB: 612, 90 % of each for training. COD10K and CAMO:
# 3040 and 1000 for training. SBU: 4085 for training. Leaf disease: 498 for training, 90 for test.
@pytest.mark.parametrize(
    "name, train, test",
    [
        ("isic2017", 2000 + 150, 600),
        ("kvasir", 900, 100),
        ("cvc-clinicdb", 550, 62),
        ("camouflage", 3040 + 1000, 2026 + 250 + 76),
        ("sbu", 4085, 638),
        ("leaf", 498, 90),
        ("roads", 1107 + 13, 48),
        ("trans10k-v1", 6000, 4428),
        ("trans10k-v2", 6000, 4428),
    ],
)
def test_the_expected_counts_add_up_to_the_papers(name, train, test):
    counts = dict(DATASETS[name].counts)
    assert counts.pop("train") + counts.pop("val") == train
    assert sum(counts.values()) == test


def test_a_paper_sized_list_is_split_as_expected():
    # The splits that are drawn at random, from lists of the paper's length.
    from naslora.data.paper_sets import split_polyps, with_validation

    def sizes(splits):
        return [len(splits[split]) for split in ("train", "val", "test")]

    def samples(count):
        return [Sample(Path(f"{i}.png"), None, "") for i in range(count)]

    def expected(name):
        return [DATASETS[name].counts[split] for split in ("train", "val", "test")]

    assert sizes(split_polyps(samples(1000), 100 / 1000)) == expected("kvasir")
    assert sizes(split_polyps(samples(612), 62 / 612)) == expected("cvc-clinicdb")
    assert sizes(with_validation(samples(900), samples(100), 0.2)) == expected("kvasir")
    assert sizes(with_validation(samples(4085), samples(638), 0.1)) == expected("sbu")
    assert sizes(with_validation(samples(498), samples(90), 0.1)) == expected("leaf")
    assert sizes(with_validation(samples(4040), [], 0.1))[:2] == [3636, 404]


# --- error messages


@pytest.mark.parametrize("name", miniatures.TREES)
def test_a_wrong_layout_lists_what_was_looked_for_and_what_was_found(tmp_path, name):
    miniatures.picture(tmp_path / "photos/a.jpg")
    message = error_of(load_splits, name, tmp_path)
    assert f"{tmp_path}: looked for the folders " in message
    assert message.endswith("missing; found photos")


def test_half_a_data_set_is_refused_by_name(tmp_path):
    tree(tmp_path, "camouflage")
    shutil.rmtree(tmp_path / "TestDataset/CHAMELEON")
    message = error_of(load_splits, "camouflage", tmp_path)
    missing = "TestDataset/CHAMELEON/Imgs, TestDataset/CHAMELEON/GT missing"
    assert missing in message and "found TestDataset/CAMO, TestDataset/COD10K" in message


def test_images_without_masks_and_masks_without_images_are_named(tmp_path):
    tree(tmp_path, "isic2017")
    masks = tmp_path / "ISIC-2017_Training_Part1_GroundTruth"
    (masks / "ISIC_0000001_segmentation.png").unlink()
    message = error_of(load_splits, "isic2017", tmp_path)
    assert "1 of 4 files without mask: ISIC_0000001.jpg" in message
    miniatures.save(masks / "ISIC_0000001_segmentation.png", miniatures.BINARY)
    miniatures.save(masks / "ISIC_9999999_segmentation.png", miniatures.BINARY)
    message = error_of(load_splits, "isic2017", tmp_path)
    assert "1 of 5 files without image: ISIC_9999999_segmentation.png" in message


def test_two_files_that_differ_in_case_are_named(tmp_path):
    tree(tmp_path, "sbu")
    miniatures.picture(tmp_path / "SBU-Test/ShadowImages/LSSD1.jpg")
    message = error_of(load_splits, "sbu", tmp_path)
    assert "LSSD1.jpg and lssd1.jpg differ only in their suffix or in case" in message


def test_an_unreadable_file_is_named(tmp_path):
    tree(tmp_path, "roads")
    path = tmp_path / "tiff/val_labels/val_0_15.tif"
    path.write_bytes(path.read_bytes()[:60])
    message = error_of(check_samples, load_splits("roads", tmp_path)["val"], 1)
    assert str(path) in message and "tiff/val" in message


def test_unknown_colours_of_trans10k_are_named(tmp_path):
    tree(tmp_path, "trans10k-v1")
    path = tmp_path / "train/masks/1_mask.png"
    miniatures.save(path, np.full((*miniatures.SIZE, 3), 7, np.uint8))
    message = error_of(check_samples, load_splits("trans10k-v1", tmp_path)["train"], 3)
    assert str(path) in message and "means 7.0; expected 0 (background), 85 (things)" in message


# --- encodings of binary masks


def threshold(path: Path) -> np.ndarray:
    return read_mask(Sample(path, path, "x", "threshold"), 1)


def test_threshold_reads_greys_bits_and_palettes(tmp_path):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    miniatures.save(tmp_path / "grey.png", grey)
    assert threshold(tmp_path / "grey.png").tolist() == [[0, 0, 1, 1]]
    miniatures.save(tmp_path / "bits.png", np.array([[0, 1]], np.uint8))
    assert threshold(tmp_path / "bits.png").tolist() == [[0, 1]]
    miniatures.save(tmp_path / "one.png", np.array([[False, True]]))
    assert threshold(tmp_path / "one.png").tolist() == [[0, 1]]
    miniatures.save(tmp_path / "deep.png", np.array([[0, 32000, 33000, 65535]], np.uint16))
    assert threshold(tmp_path / "deep.png").tolist() == [[0, 0, 1, 1]]
    indices = Image.fromarray(np.array([[0, 1]], np.uint8))
    # A palette with dark red, as class colours have it, and one with black and white exchanged.
    for palette, expected in ((b"\0\0\0\x80\0\0", [[0, 1]]), (b"\xff\xff\xff\0\0\0", [[1, 0]])):
        indices.putpalette(palette)
        indices.save(tmp_path / "palette.png")
        assert threshold(tmp_path / "palette.png").tolist() == expected


def test_a_rotated_photograph_is_compared_upright_with_its_mask(tmp_path):
    tree(tmp_path, "sbu")
    sample = load_splits("sbu", tmp_path)["test"][0]
    with Image.open(sample.image) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned.save(sample.image, exif=exif)
    check_samples([sample], 1)


# --- the cache


def dataset_of(root: Path, cache: Path | None, **options) -> SegmentationDataset:
    samples = load_splits("sbu", root)["train"]
    return SegmentationDataset(samples, 16, 1, cache=cache and Cache(cache), **options)


def items_equal(first, second) -> bool:
    return all(torch.equal(first[key], second[key]) for key in ("image", "mask"))


def test_the_cache_changes_no_pixel_and_is_used(tmp_path, monkeypatch):
    tree(tmp_path, "sbu")
    plain = list(dataset_of(tmp_path, None, flip=True))
    first = list(dataset_of(tmp_path, tmp_path / "cache", flip=True))
    monkeypatch.setattr(SegmentationDataset, "resize", None)  # decoding would fail now
    second = list(dataset_of(tmp_path, tmp_path / "cache", flip=True))
    for a, b, c in zip(plain, first, second, strict=True):
        assert items_equal(a, b) and items_equal(a, c)
    assert len(list((tmp_path / "cache").iterdir())) == len(plain)


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
    as_labels = SegmentationDataset(
        [sample._replace(encoding="labels")], 16, 3, cache=Cache(tmp_path / "cache")
    )
    # 255 has no class in a mask of three classes. The entry for one class must not be used.
    assert set(as_labels[0]["mask"].unique().tolist()) == {0, IGNORED}


def test_a_damaged_entry_is_created_again(tmp_path):
    tree(tmp_path, "sbu")
    dataset = dataset_of(tmp_path, tmp_path / "cache")
    expected = dataset[0]
    (entry,) = (tmp_path / "cache").iterdir()
    for damage in (b"", entry.read_bytes()[:200]):
        entry.write_bytes(damage)
        assert items_equal(dataset[0], expected)
        assert len(entry.read_bytes()) > 200


def test_errors_are_not_cached_and_sizes_are_still_checked(tmp_path):
    tree(tmp_path, "sbu")
    dataset = dataset_of(tmp_path, tmp_path / "cache")
    list(dataset)
    first, *_ = dataset.samples
    miniatures.save(first.mask, np.zeros((5, 5), np.uint8))
    for _ in range(2):
        assert "must be the same" in error_of(dataset.__getitem__, 0)


def _read_all(root: Path, cache: Path, start) -> None:
    dataset = dataset_of(root, cache)
    start.wait()
    list(dataset)


def test_processes_share_a_cache(tmp_path):
    tree(tmp_path, "sbu")
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    arguments = (tmp_path, tmp_path / "cache", start)
    processes = [context.Process(target=_read_all, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 9 and all(entry.suffix == ".npy" for entry in entries)
    for plain, cached in zip(
        dataset_of(tmp_path, None), dataset_of(tmp_path, tmp_path / "cache"), strict=True
    ):
        assert items_equal(plain, cached)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be created" in error_of(Cache, tmp_path / "file/cache")


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
    with pytest.raises(UserError, match=r"metrics: expected one of .*, got \['speed'\]"):
        run_config(metrics=["speed"])
    with pytest.raises(UserError, match="'s_alpha' is defined for binary masks only"):
        run_config(num_classes=3, metrics=("s_alpha",))
