"""A finished run: loading its model, and evaluating, predicting, merging and exporting it.

``merge_run`` writes a folder that every function here takes instead of a run's:

merged.json               the configuration, the merge's report, validation scores before and after
model.safetensors         the whole merged model
left_out.safetensors      tensors of the SAM checkpoint that the model lacks, for export
"""

import dataclasses
import functools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision.transforms.v2 import functional as transforms

from naslora.adapter.merge_report import MergeMode, MergeReport
from naslora.adapter.merged_files import (
    MERGED_CONFIG,
    MERGED_WEIGHTS,
    load_merged,
    merged_state,
)
from naslora.adapter.storage import WEIGHTS_NAME
from naslora.data.contents import warnings_about
from naslora.data.dataset import SegmentationDataset
from naslora.data.layouts import list_images
from naslora.data.masks import Sample, read_image
from naslora.errors import UserError, listing
from naslora.files import (
    read_json,
    read_safetensors,
    replaced_file,
    replaced_folder,
    tensor_names,
    write_tensors,
)
from naslora.locks import locked
from naslora.methods import check_merges, load_adapter, merge
from naslora.records import write_record
from naslora.report.pictures import paint
from naslora.results import BEST, CONFIG, SplitScores
from naslora.sam.export import Description, Format, Part, Predict, export, load_exported
from naslora.sam.segmentation import SamForSegmentation, build_model, predict_labels
from naslora.training.accelerator import make_accelerator
from naslora.training.evaluation import evaluate
from naslora.training.run_config import Resolution, RunConfig, read_config
from naslora.training.run_data import (
    CALIBRATION_IMAGES,
    calibration,
    check_with_progress,
    find_splits,
    make_dataset,
)
from naslora.training.run_model import build_frozen_model

LEFT_OUT = "left_out.safetensors"


@dataclass(frozen=True)
class MergeScores:
    """Scores on the validation images before and after a merge."""

    before: SplitScores
    after: SplitScores


# ---- Loading -------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[SamForSegmentation, RunConfig]:
    """Loads the model of a run's folder, or of a folder that ``merge_run`` wrote.

    Returns:
        The model in evaluation mode, on the CPU, and the run's configuration.

    Raises:
        UserError: the folder is neither, or a file in it is missing or damaged.
    """
    if (path / MERGED_CONFIG).is_file():
        return _load_merged(path)
    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is no run: it has neither {CONFIG} nor {MERGED_CONFIG}")
    config = read_config(path / CONFIG)
    if not (path / BEST).is_dir():
        raise UserError(f"{path} has no trained model yet: {path / BEST} does not exist")
    model = build_frozen_model(config)
    # Files of 0.1.0 do not list the tensors of the mask decoder, which every run trains.
    decoder = {name for name, tensor in model.named_parameters() if tensor.requires_grad}
    missing = decoder - tensor_names(path / BEST / WEIGHTS_NAME)
    if missing:
        raise UserError(
            f"{path / BEST / WEIGHTS_NAME} lacks {len(missing)} tensors of the mask decoder: "
            f"{listing(missing, 3)}; use another copy"
        )
    load_adapter(model, path / BEST)
    return model.eval(), config


def _load_merged(path: Path) -> tuple[SamForSegmentation, RunConfig]:
    stored = read_json(path / MERGED_CONFIG)
    try:
        config = RunConfig.from_dict(stored["config"])
    except (KeyError, TypeError, UserError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path / MERGED_CONFIG} describes no merged model: {reason}") from error
    model = build_model(
        config.model, config.image_size, config.num_classes, attention=config.attention
    )
    load_merged(model, path)
    if (path / LEFT_OUT).is_file():
        model.left_out = read_safetensors(path / LEFT_OUT)
    return model.eval(), config


# ---- Evaluating ----------------------------------------------------------------------------------


def evaluate_run(
    path: Path,
    split: str = "test",
    data: Path | None = None,
    resolution: Resolution | None = None,
) -> SplitScores:
    """Scores a trained or merged model on a split of its own data, or of another CSV folder.

    Args:
        path: a run's folder, or a merged model's.
        split: the name of the split.
        data: another CSV folder; None takes the run's own data.
        resolution: the size at which images are scored; None takes the run's own setting.

    Raises:
        UserError: as ``load_model`` and ``find_splits``, or there is no such split.
    """
    model, config = load_model(path)
    if data is not None:
        config = dataclasses.replace(config, data=data, dataset="csv", root=None)
    if resolution is not None:
        config = dataclasses.replace(config, resolution=resolution)
    splits = find_splits(config)
    if split not in splits:
        raise UserError(f"split must be one of {', '.join(splits)}, got {split!r}")
    samples = splits[split]
    for warning in warnings_about({split: check_with_progress(samples, config)}):
        print(f"naslora: warning: {warning}", file=sys.stderr)
    return dataclasses.replace(evaluate_model(model, config, samples), images=len(samples))


def evaluate_model(
    model: SamForSegmentation, config: RunConfig, samples: list[Sample]
) -> SplitScores:
    """Loss and metrics of a run's model on some samples, as ``evaluate``."""
    accelerator = make_accelerator(config.search)
    return evaluate(
        model.to(accelerator.device),
        make_dataset(config, samples, truth=config.resolution == "original"),
        accelerator,
        config.search.loss,
        config.foreground_names,
        config.search.batch_size,
        config.search.workers,
        config.metrics or (),
    )


# ---- Predicting ----------------------------------------------------------------------------------


MASK_ENDING, OVERLAY_ENDING = "_mask.png", "_overlay.png"
# The text entry of PNG files that ``predict_run`` writes, by which it knows them.
_SOFTWARE = ("Software", "naslora predict")


def predict_run(
    path: Path,
    inputs: Sequence[Path],
    output: Path,
    on_error: Callable[[UserError], None] | None = None,
) -> list[Path]:
    """Segments images: writes a mask and an overlay for each, at the image's own size.

    Binary masks are 0/255, others class indices. Images are read one after another, so that the
    memory depends on the largest of them only: about 8 bytes a pixel.

    Args:
        path: a run's folder, a merged model's, or a file that ``export_run`` wrote.
        inputs: image files, or folders of images. Masks and overlays of an earlier call in such a
            folder are no images.
        output: created if needed; gets NAME_mask.png and NAME_overlay.png.
        on_error: called with the error of an image that cannot be read; the other images are
            segmented. If None, every image is read before the first mask is written, and the
            first error is raised.

    Returns:
        The masks that were written.

    Raises:
        UserError: as ``load_model`` and ``load_exported``; an image is missing or unreadable, two
            have the same name, or a mask or an overlay would overwrite an input.
    """
    images = _find_images(inputs)
    _check_targets(images, output)
    with locked(output):
        return _predict(path, images, output, on_error)


def _predict(
    path: Path,
    images: list[Path],
    output: Path,
    on_error: Callable[[UserError], None] | None,
) -> list[Path]:
    predict, config = _load_predictor(path)
    samples = [Sample(image, None, "input") for image in images]
    if on_error is None:
        check_with_progress(samples, config)
    dataset = SegmentationDataset(samples, config.image_size, config.num_classes)
    names = ["background", *config.foreground_names]
    written = []
    for sample in samples:
        try:
            picture = read_image(sample)
        except UserError as error:
            if on_error is None:
                raise
            on_error(error)
            continue
        image = transforms.to_dtype(dataset.resize_image(picture), torch.float32, scale=True)
        labels = predict(image[None])[0].numpy().astype(np.uint8)
        mask = Image.fromarray(labels).resize(picture.size, Image.Resampling.NEAREST)
        pixels = np.asarray(picture)
        del picture  # a large image counts
        overlay = Image.fromarray(paint(pixels, np.asarray(mask), names))
        del pixels
        shown = mask.point(lambda value: 255 * value) if config.num_classes == 1 else mask
        written.append(output / f"{sample.image.stem}{MASK_ENDING}")
        _save_png(shown, written[-1])
        _save_png(overlay, output / f"{sample.image.stem}{OVERLAY_ENDING}")
    return written


def _find_images(inputs: Sequence[Path]) -> list[Path]:
    if not inputs:
        raise UserError("there is nothing to segment: give at least one IMAGE, a file or a folder")
    images = [
        image
        for item in inputs
        for image in (
            [item] if item.is_file() else [i for i in list_images(item) if not _is_own(i)]
        )
    ]
    if not images:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}")
    repeated = [stem for stem, n in Counter(image.stem for image in images).items() if n > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]!r}: their masks would collide")
    return images


def _is_own(image: Path) -> bool:
    """Returns whether ``predict_run`` wrote a file."""
    if not image.name.endswith((MASK_ENDING, OVERLAY_ENDING)):
        return False
    try:
        with Image.open(image) as opened:
            return opened.info.get(_SOFTWARE[0]) == _SOFTWARE[1]
    except Exception:  # Pillow raises many kinds; the check of the images reports it
        return False


def _check_targets(images: Sequence[Path], output: Path) -> None:
    """Refuses to overwrite an input."""
    resolved = {image.resolve() for image in images}
    for image in images:
        for ending in (MASK_ENDING, OVERLAY_ENDING):
            target = output / f"{image.stem}{ending}"
            if target.resolve() in resolved:
                raise UserError(
                    f"{target} is an input, and the prediction for {image} would overwrite it; "
                    "choose another --output"
                )


def _save_png(image: Image.Image, path: Path) -> None:
    text = PngInfo()
    text.add_text(*_SOFTWARE)
    with replaced_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def _load_predictor(path: Path) -> tuple[Predict, RunConfig]:
    """Loads a folder or an exported file as a function: (B, 3, S, S) images to (B, S, S) labels."""
    if path.is_file():
        predict, held = load_exported(path)
        return predict, RunConfig(
            model=held.model,
            image_size=held.image_size,
            num_classes=held.num_classes,
            class_names=held.class_names,
        )
    model, config = load_model(path)
    model.to(make_accelerator(config.search).device)
    return functools.partial(predict_labels, model), config


# ---- Merging and exporting -----------------------------------------------------------------------


def merge_run(
    path: Path,
    mode: MergeMode,
    output: Path,
    max_error: float | None = None,
    images: int = CALIBRATION_IMAGES,
) -> tuple[MergeReport, MergeScores]:
    """Merges a run's trained model and writes it to a folder.

    Errors are measured on the run's validation images. Mode "calibrated" is fitted to, and
    measured on, training images.

    Args:
        path: a run's folder.
        mode: as in ``naslora.merge``.
        output: must be new or empty.
        max_error: the merge is refused if a layer's relative error of the update is larger.
        images: number of training images that mode "calibrated" is fitted to.

    Returns:
        The merge's report, and the validation scores before and after it.

    Raises:
        UserError: as ``load_model`` and ``merge``; ``output`` is not empty; the error is too large.
    """
    if max_error is not None and not max_error >= 0:
        raise UserError(f"max_error must be a number of at least 0, got {max_error}")
    if images < 1:
        raise UserError(f"images must be at least 1, got {images}")
    with locked(output, folder=False):
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output} exists and is not empty; choose another --output")
        return _merge(path, mode, output, max_error, images)


def _merge(
    path: Path, mode: MergeMode, output: Path, max_error: float | None, images: int
) -> tuple[MergeReport, MergeScores]:
    model, config = load_model(path)
    check_merges(model)
    splits = find_splits(config)
    before = evaluate_model(model, config, splits["val"])
    report = merge(model, mode, calibration(config, splits, mode, model.pixel_mean.device, images))
    scores = MergeScores(before, evaluate_model(model, config, splits["val"]))
    if max_error is not None and report.max_update_error > max_error:
        raise UserError(
            f"merging with mode {mode!r} loses up to {report.max_update_error:.2e} of an update, "
            f"more than --max-error {max_error:g}; nothing was written"
        )
    _write_merged(model, report, scores, config, output)
    return report, scores


def _write_merged(
    model: SamForSegmentation,
    report: MergeReport,
    scores: MergeScores,
    config: RunConfig,
    output: Path,
) -> None:
    """Writes the folder of a merged model, which appears when all its files are written."""
    description = {"report": report.to_dict(), "scores": scores, "config": config.to_dict()}
    with replaced_folder(output) as folder:
        write_tensors(folder / MERGED_WEIGHTS, merged_state(model))
        if model.left_out:
            write_tensors(folder / LEFT_OUT, model.left_out)
        write_record(folder / MERGED_CONFIG, description)


def export_run(path: Path, file_format: Format, output: Path, part: Part = "model") -> None:
    """Writes a merged model for another runtime, as ``naslora.sam.export.export``.

    Args:
        path: a merged model's folder, or that of a run without anything to merge.
        file_format: onnx, safetensors or torch-export.
        output: the file.
        part: "model", images to class scores, or "encoder", images to SAM's image embedding.

    Raises:
        UserError: as ``load_model`` and ``export``.
    """
    model, config = load_model(path)
    names = tuple(config.foreground_names)
    held = Description(config.model, config.image_size, config.num_classes, names, part)
    with locked(output, folder=False):
        export(model, held, file_format, output)
