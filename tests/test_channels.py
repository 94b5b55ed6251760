"""Images of other channels than RGB: files, windows, the widened stem, and runs."""

import itertools

import numpy as np
import pytest
import tifffile
import torch
from conftest import SHORT, SIZE, TRAIN, error_of, refusal, scores_of, succeed
from miniatures import as_tiff
from PIL import Image
from safetensors.torch import load_file
from timm.models import adapt_input_conv

from naslora.data.contents import read_contents
from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Sample, open_picture
from naslora.data.layouts import read_csv
from naslora.data.picture import Intensity
from naslora.files import read_json
from naslora.sam.encoders import set_channels, stem
from naslora.sam.families import FAMILIES
from naslora.sam.runtimes import load_class_map
from naslora.sam.segmentation import build_model

rng = np.random.default_rng(0)
TWELVE = rng.integers(0, 65536, (70, 53, 12), dtype=np.uint16)
PLANES = np.moveaxis(TWELVE, 2, 0)
FULL = Intensity("window", 0, 65535)
TILED = {"tile": (16, 32)}
BANDS = {"photometric": "minisblack", "planarconfig": "separate"}
CHUNKY = {"photometric": "minisblack", "planarconfig": "contig"}
DEFLATE = {"compression": "zlib"}


def opened(path, channels=None, intensity=FULL, further=()):
    sample = Sample(path, None, "here", further=tuple(further))
    return open_picture(sample, intensity, channels=channels)


# --- files


@pytest.mark.parametrize(
    "values, options",
    [
        (TWELVE, CHUNKY),
        (TWELVE, CHUNKY | DEFLATE | {"rowsperstrip": 9}),
        (TWELVE, CHUNKY | DEFLATE | TILED),
        (PLANES, BANDS),
        (PLANES, BANDS | DEFLATE | TILED),
        (PLANES, {"photometric": "minisblack"}),  # pages
        (PLANES, {"photometric": "minisblack", **DEFLATE, "rowsperstrip": 9}),
        (PLANES, None),
        (TWELVE, None),
    ],
)
def test_windows_of_twelve_channels(tmp_path, values, options):
    path = tmp_path / ("a.npy" if options is None else "a.tif")
    np.save(path, values) if options is None else tifffile.imwrite(path, values, **options)
    picture, expected = opened(path, 12), np.rint(TWELVE / 257).astype(np.uint8)
    assert np.array_equal(picture.rows(), expected)
    for top, left in itertools.product((0, 15, 60), (0, 31, 50)):
        window = picture.rows(top, top + 10, left, left + 3)
        assert np.array_equal(window, expected[top : top + 10, left : left + 3])
    assert "has 12 channels, and the run has 4" in error_of(opened, path, 4)


def test_a_fourth_channel_that_is_called_transparency(tmp_path):
    four = TWELVE[..., :4].astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", four, photometric="rgb", extrasamples=["unassalpha"])
    assert np.array_equal(opened(tmp_path / "a.tif", 4).rows(), four)
    assert np.array_equal(opened(tmp_path / "a.tif", 3).rows(), four[..., :3])


def test_several_files_of_one_image(tmp_path):
    rgb, deep = TWELVE[..., :3].astype(np.uint8), TWELVE[..., 3]
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    tifffile.imwrite(tmp_path / "stack.tif", np.moveaxis(rgb, 2, 0)[:2], photometric="minisblack")
    Image.fromarray(deep).save(tmp_path / "deep.png")
    Image.fromarray(rgb[:5]).save(tmp_path / "small.png")
    rows = "image,image2,image3,label\nrgb.png,grey.png,stack.tif,grey.png\n"
    (tmp_path / "train.csv").write_text(rows)
    (sample,) = read_csv(tmp_path)["train"]
    expected = np.concatenate([rgb, rgb[..., :1], rgb[..., :2]], axis=2)
    assert np.array_equal(open_picture(sample, channels=6).rows(), expected)
    parts = {"deep.png": "types (uint8, uint16)", "small.png": "parts of 53x5 and 53x70 pixels"}
    for name, message in parts.items():
        further = [tmp_path / name]
        assert message in error_of(opened, tmp_path / "rgb.png", 4, further=further)


def test_a_channel_of_nan(tmp_path):
    values = TWELVE[..., :2].astype(np.float32)
    values[..., 1] = np.nan
    np.save(tmp_path / "a.npy", values)
    Image.fromarray(np.zeros((70, 53), np.uint8)).save(tmp_path / "m.png")
    samples = [Sample(tmp_path / "a.npy", tmp_path / "m.png", "here")]
    dataset = SegmentationDataset(samples, 16, 1, intensity=FULL, channels=2)
    assert "a.npy has only NaN in channel 2" in error_of(list, read_contents(dataset))


# --- the stem


def test_every_family_has_a_stem_of_three_colours():
    for family in FAMILIES:
        with torch.device("meta"):
            encoder = family.build_encoder(next(iter(family.models)), family.image_size)
        first = stem(encoder)
        assert first.in_channels == 3 and first.stride[0] > 1, family.title


@pytest.mark.parametrize("name", ["vit_t", "mobile_sam"])
@pytest.mark.parametrize("channels", [1, 2, 12])
def test_equal_channels_give_what_greys_gave(tiny_sam, name, channels):
    model = build_model(name, 64, checkpoint="none").eval()
    grey = torch.rand(1, 1, 64, 64)
    mean, std = float(model.pixel_mean.mean()), float(model.pixel_std.mean())
    with torch.no_grad():
        set_channels(model, [mean] * 3, [std] * 3)
        before, weight = model(grey.expand(1, 3, 64, 64)).masks, stem(model.image_encoder).weight
        set_channels(model, [mean] * channels, [std] * channels)
        after = model(grey.expand(1, channels, 64, 64)).masks
    assert torch.equal(stem(model.image_encoder).weight, adapt_input_conv(channels, weight.data))
    if channels != 2:  # of which blue has no part
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)  # sums in another order


# --- runs


def with_channels(data, folder, count):
    """The images of ``data`` as float TIFF files of ``count`` bands, some of them noise."""

    def bands(pixels):
        places = [pixels[..., 0] * (k % 2) for k in range(1, count + 1)]
        return np.stack([grey + rng.normal(size=grey.shape) for grey in places])

    return as_tiff(data, folder, bands, **BANDS)


@pytest.mark.parametrize("extra", [(), ("--tiles", "auto")])
def test_three_channels_are_the_ordinary_run(tiny_sam, clean_data, tmp_path, extra):
    """Also by tiles; and with the statistics stated, which take the way of other channels."""
    colours = ("0.485", "0.456", "0.406"), ("0.229", "0.224", "0.225")
    stated = ("--channel-mean", *colours[0], "--channel-std", *colours[1])
    crop = ("--crop", SIZE) if extra else ()
    named = ("--channels", "red", "green", "blue", *stated)
    for name, options in {"plain": (), "three": ("--channels", 3), "named": named}.items():
        arguments = ("train", "--data", clean_data, *SHORT, *crop, *options)
        succeed(*arguments, "--output", tmp_path / name)
        image = clean_data / "images/test0.png"
        output = tmp_path / f"of {name}"
        succeed("predict", tmp_path / name, image, *extra, "--output", output)
    for file in ("{}/adapter/adapter_model.safetensors", "of {}/test0_mask.png"):
        contents = {(tmp_path / file.format(name)).read_bytes() for name in ("plain", "three")}
        assert len(contents) == 1, file
    names = ("plain", "three", "named")
    scores = [read_json(tmp_path / name / "metrics.json")["test"] for name in names]
    assert scores[0] == scores[1]
    # float32 of 123.675 / 255
    assert scores[2]["loss"] == pytest.approx(scores[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("count, options", [(2, ()), (12, ("--crop", 24, "--augment", "natural"))])
def test_a_run_on_channels(tiny_sam, clean_data, tmp_path, count, options):
    """Trained, scored, merged, exported and predicted with; the stem has been trained."""
    data = with_channels(clean_data, tmp_path / "data", count)
    run, merged = tmp_path / "run", tmp_path / "merged"
    shown = ("--shown", "channel 1", 2, 2) if count == 2 else ()
    window = ("--intensity", "window", -3, 255)
    arguments = ("train", "--data", data, *TRAIN, "--channels", count, *shown, *window, *options)
    succeed(*arguments, "--output", run)
    config = read_json(run / "config.json")["data"]
    assert len(config["channels"]) == len(config["channel_mean"]) == count
    noise = 255 / 258  # of a band of noise around 0 in the window
    assert config["channel_mean"][1] == pytest.approx(1 - noise, abs=0.002)
    assert config["channel_std"][1] == pytest.approx(1 / 258, rel=0.2)
    assert config["shown"] == [f"channel {k}" for k in ((1, 2, 2) if count == 2 else (1, 2, 3))]
    succeed("merge", run, "--output", merged)
    assert scores_of(run)["loss"] == pytest.approx(scores_of(merged)["loss"], rel=1e-3)
    trained = load_file(run / "adapter/adapter_model.safetensors")
    assert trained["image_encoder.patch_embed.proj.weight"].shape[1] == count
    image, masks, models = data / "images/test0.tif", [], [merged]
    if count == 2:  # once, because tracing takes seconds
        models.append(tmp_path / "model.onnx")
        succeed("export", merged, "--format", "onnx", "--output", models[1])
        assert load_class_map(models[1], trust=True)[1].channels == tuple(config["channels"])
    for model in models:
        output = tmp_path / f"of {model.name}"
        succeed("predict", model, image, "--trust", "--tiles", 24, "--output", output)
        masks.append(np.asarray(Image.open(output / "test0_mask.png")))
        assert Image.open(output / "test0_overlay.jpg").mode == "RGB"
    assert (masks[0] == masks[-1]).mean() > 0.99  # where rounding decides
    output = ("--output", tmp_path / "no.safetensors")
    refused = refusal("export", merged, "--format", "safetensors", *output)
    assert f"the model has {count} channels" in refused
    refused = refusal("predict", run, clean_data / "images/test0.png", *output)
    assert f"has 3 channels, and the run has {count}" in refused


def test_several_files_are_predicted_from_a_csv(tiny_sam, clean_data, tmp_path):
    for split in ("train", "val", "test"):
        rows = [line.split(",") for line in (clean_data / f"{split}.csv").read_text().split()[1:]]
        lines = [f"{clean_data}/{i},{clean_data}/{i},{clean_data}/{m}" for i, m in rows]
        (tmp_path / f"{split}.csv").write_text("\n".join(["image,image2,label", *lines]))
    arguments = ("--data", tmp_path, *SHORT, "--channels", 6, "--output", tmp_path / "run")
    succeed("train", *arguments, "--cache", tmp_path / "cache")
    succeed("predict", tmp_path / "run", tmp_path / "test.csv", "--output", tmp_path / "out")
    assert (tmp_path / "out/test0_mask.png").exists()
