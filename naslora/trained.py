"""A finished run: loading its model, and evaluating, merging and exporting it.

``merge_run`` writes a folder that every function here takes instead of a run's:

merged.json               the configuration, the merge's report, validation scores before and after
model.safetensors         the whole merged model
left_out.safetensors      tensors of the SAM checkpoint that the model lacks, for export
"""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast, get_args

import torch
from segment_anything import SamPredictor

from naslora.adapter.io.merged_files import MERGED_CONFIG, load_merged, read_merged, save_merged
from naslora.adapter.merging.report import MergeMode, MergeReport
from naslora.choices import CALIBRATION_IMAGES, MAX_LOSS, Format, Part, Quantize, Tool
from naslora.data.dataset import SegmentationDataset
from naslora.data.images import Sample
from naslora.data.layouts import GROUP
from naslora.data.masks import IGNORED
from naslora.errors import UserError, warn
from naslora.files import read_metadata, read_safetensors, reading, replaced_folder, write_tensors
from naslora.locks import locked
from naslora.methods import find_method, load_adapter, merge
from naslora.metrics import image_scores
from naslora.records import to_json
from naslora.results import CONFIG, METRICS_JSON, SplitScores, adapter_folder
from naslora.sam.checkpoint import find_model
from naslora.sam.export import KEY, Description, check_new, export, read_description
from naslora.sam.hub import PREFIX, download
from naslora.sam.prompt_graphs import export_prompts
from naslora.sam.prompts import AnySam, PromptableSam, build_predictor
from naslora.sam.runtimes import ClassMap, load_class_map
from naslora.sam.segmentation import labels_of, mirror
from naslora.sam.shipped import NONE, shipped_file
from naslora.settings import Count, Rate, checked
from naslora.training.accelerator import in_float32, make_accelerator
from naslora.training.clicks import score_run
from naslora.training.resolve import read_config, resolve
from naslora.training.run_config import Resolution, RunConfig, mirror_axes, varied
from naslora.training.run_data import calibration, check_splits, find_splits, make_dataset
from naslora.training.run_model import build_frozen_model, build_run_model

LEFT_OUT = "left_out.safetensors"
SEMANTIC = "is a semantic model, which takes no prompts; train with --task promptable"


# ---- Loading -------------------------------------------------------------------------------------


def load_model(path: Path) -> tuple[AnySam, RunConfig]:
    """Loads the model of a run's folder, or of a folder that ``merge_run`` wrote.

    Returns:
        The model in evaluation mode, on the CPU, and the run's configuration, without its
        ``cache``: nothing is written to a folder because a file says so.

    Raises:
        UserError: the folder is neither, or a file in it is missing or damaged.
    """
    merged = (path / MERGED_CONFIG).exists()
    if not merged and not (path / CONFIG).exists():
        raise UserError(f"{path} is no run: it has neither {CONFIG} nor {MERGED_CONFIG}")
    with reading(path):
        if merged:
            stored = read_merged(path / MERGED_CONFIG)
            with reading(path / MERGED_CONFIG, "describes no merged model"):
                config = resolve(RunConfig.from_dict(stored.config))
            model = build_run_model(config, NONE)
            load_merged(model, path)
            if (path / LEFT_OUT).exists():
                model.left_out = read_safetensors(path / LEFT_OUT)
        else:
            config, adapter = read_config(path / CONFIG), adapter_folder(path)
            model = build_frozen_model(config)
            load_adapter(model, adapter)
    if not merged and not (path / METRICS_JSON).exists():
        warn(f"{path} is not finished: this is its model so far; train --resume continues it")
    return model.eval(), varied(config, "data", cache=None)  # a path that stands in a file


def load_predictor(path: Path, image_size: int | None = None) -> tuple[SamPredictor, RunConfig]:
    """Loads a model that takes prompts, as ``build_predictor``, on the GPU if there is one.

    Args:
        path: the folder of a promptable run or of its merged model, a file that ``export_run``
            wrote as safetensors, a checkpoint of SAM, such a file on the Hugging Face Hub, or the
            name of a model whose weights are in the package.
        image_size: side of the images in pixels, for what does not say it: a checkpoint or a name.
            None is 256 for ``vit_t``, 1024 for the others.

    Returns:
        The predictor, and its run's configuration; that of a file says no more than the file.

    Raises:
        UserError: as ``load_model`` and ``build_predictor``; the model takes no prompts, or is not
            known.
    """
    if str(path).startswith(PREFIX):
        path = download(str(path))
    if path.is_dir():
        model, config = load_model(path)
        if not isinstance(model, PromptableSam):
            raise UserError(f"{path} {SEMANTIC}")
        predictor = build_predictor(model)
    else:
        named = {"name": str(path), "checkpoint": NONE, "image_size": image_size}
        config, checkpoint = RunConfig.from_dict({"task": "promptable", "model": named}), None
        if path.exists() or shipped_file(str(path)) is None:
            with reading(path):
                config, checkpoint = _described(path, config), path
        config = resolve(config)
        predictor = build_predictor(config.model.name, config.model.image_size, checkpoint)
    predictor.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return predictor, config


def _described(path: Path, config: RunConfig) -> RunConfig:
    """The configuration with the model, and if it says them image size and data, of a file."""
    text = read_metadata(path).get(KEY) if path.suffix == ".safetensors" else None
    if text is None:
        name = find_model(path)
        if name is None:
            raise UserError("it is no checkpoint of SAM that is known")
        return varied(config, "model", name=name)
    held = read_description(text)
    if held.task == "semantic":
        raise UserError(f"{path} {SEMANTIC}")
    config = varied(config, "model", name=held.model, image_size=held.image_size)
    return varied(config, "data", intensity=held.intensity)


# ---- Evaluating ----------------------------------------------------------------------------------


def evaluate_run(
    path: Path,
    split: str = "test",
    data: Path | None = None,
    resolution: Resolution | None = None,
    metrics: Sequence[str] | None = None,
    flips: bool = False,
) -> SplitScores:
    """Scores a trained or merged model on a split of its own data, or of another CSV folder.

    ``path`` is a run's folder, or a merged model's. The other arguments are the options of
    ``naslora evaluate``.

    Raises:
        UserError: as ``load_model`` and ``find_splits``; there is no such split, a metric is not
            defined for these masks, or a promptable model gets ``flips``.
    """
    model, config = load_model(path)
    config = with_data(config, data)
    own = config.data.metrics if metrics is None else tuple(metrics)
    resolution = resolution or config.data.resolution
    config = resolve(varied(config, "data", resolution=resolution, metrics=own))
    if flips and config.task == "promptable":
        raise UserError(f"{path} is scored by clicks, which are not mirrored; drop --flips")
    samples = split_of(config, split)
    check_splits({split: samples}, config)
    merged = (path / MERGED_CONFIG).exists()
    if flips:
        mirror(model, mirror_axes(config))
    scores = evaluate_model(model, config, samples, float32=merged)
    return dataclasses.replace(scores, images=len(samples))


def with_data(config: RunConfig, root: Path | None) -> RunConfig:
    """A configuration with another CSV folder; None keeps its own data."""
    if root is None:
        return config
    return varied(config, "data", root=root, dataset="csv", split=None, group=GROUP)


def split_of(config: RunConfig, split: str) -> list[Sample]:
    """The samples of a split.

    Raises:
        UserError: as ``find_splits``, or there is no such split.
    """
    splits = find_splits(config)
    if split not in splits:
        raise UserError(f"split must be one of {', '.join(splits)}, got {split!r}")
    return splits[split]


def evaluate_model(
    model: AnySam, config: RunConfig, samples: list[Sample], float32: bool = False
) -> SplitScores:
    """Loss and metrics of a run's model on some samples, as ``evaluate``.

    ``float32`` replaces the run's precision, as ``in_float32``.
    """
    accelerator = make_accelerator(config.training)
    with in_float32(accelerator) if float32 else nullcontext():
        return score_run(
            model.to(accelerator.device),
            make_dataset(config, samples, "tested"),
            accelerator,
            config,
            config.data.metrics or (),
        )


# ---- Merging and exporting -----------------------------------------------------------------------


def merge_run(
    path: Path,
    mode: MergeMode,
    output: Path,
    max_error: float | None = None,
    images: int = CALIBRATION_IMAGES,
) -> tuple[MergeReport, SplitScores, SplitScores]:
    """Merges a run's trained model and writes it to a folder.

    Errors are measured on the run's validation images. Mode "calibrated" is fitted to, and
    measured on, training images.

    Arguments as the options of ``naslora merge``; ``path`` is a run's folder, and ``output`` must
    be new or empty.

    Returns:
        The merge's report, and the validation scores before and after it, in float32.

    Raises:
        UserError: as ``load_model`` and ``merge``; ``output`` is not empty; the error is too large.
    """
    checked("max_error", max_error, Rate | None)
    checked("images", images, Count)
    with locked(output, folder=False):
        check_new(output)
        model, config = load_model(path)
        find_method(config.method).require_merge()
        splits = find_splits(config)
        before = evaluate_model(model, config, splits["val"], float32=True)
        batches = calibration(config, splits, mode, model.pixel_mean.device, images)
        report = merge(model, mode, batches)
        after = evaluate_model(model, config, splits["val"], float32=True)
        if max_error is not None and report.max_update_error > max_error:
            raise UserError(
                f"merging with mode {mode!r} loses up to {report.max_update_error:.2e} of an "
                f"update, more than --max-error {max_error:g}; nothing was written"
            )
        with replaced_folder(output) as folder:
            scores = {"before": before, "after": after}
            details = {"report": report, "scores": scores, "config": config.to_dict()}
            save_merged(model, folder, to_json(details))
            if model.left_out:
                write_tensors(folder / LEFT_OUT, model.left_out)
        return report, before, after


def export_run(
    path: Path,
    file_format: Format,
    output: Path,
    part: Part = "model",
    quantize: Quantize | None = None,
    max_loss: float = MAX_LOSS,
    images: int = CALIBRATION_IMAGES,
) -> tuple[float, float] | None:
    """Writes a merged model for another runtime, as ``naslora.sam.export.export``.

    Arguments as the options of ``naslora export``. ``path`` may also be the folder of a run without
    anything to merge, and for annotation tools whatever ``load_predictor`` takes.

    Returns:
        The Dice on the validation images of the model and of what was written, with ``quantize``.

    Raises:
        UserError: as ``load_model`` and ``export``, or ``load_predictor`` and ``export_prompts``;
            the Dice falls by more than ``max_loss``.
    """
    if file_format in get_args(Tool):
        predictor, _ = load_predictor(path)
        with locked(output, folder=False):
            export_prompts(cast(PromptableSam, predictor.model), cast(Tool, file_format), output)
        return None
    model, config = load_model(path)
    names = Description.__annotations__.keys() & vars(config.data).keys()
    data = {name: getattr(config.data, name) for name in names}
    own, task = config.model, config.task
    held = Description(own.name, own.image_size, part=part, task=task, **data)
    if quantize is None:
        with locked(output, folder=False):
            export(model, held, file_format, output)
        return None
    if isinstance(model, PromptableSam) or part != "model":
        raise UserError("--quantize takes whole models that predict masks, whose Dice it compares")
    checked("images", images, Count)
    splits = find_splits(config)
    batches = list(calibration(config, splits, "calibrated", torch.device("cpu"), images))
    validation = make_dataset(config, splits["val"])
    with locked(output, folder=False), torch.no_grad():
        before = dice_of(lambda images: model(images).class_map(), validation)
        # Beside the output: a file that loses too much replaces nothing.
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}") as folder:
            trial = Path(folder, output.name)
            export(model, held, file_format, trial, quantize, batches)
            after = dice_of(load_class_map(trial)[0], validation)
            if before - after > max_loss:
                raise UserError(
                    f"in {quantize} the Dice on the validation images falls from {before:.4f} to "
                    f"{after:.4f}, by more than --max-loss {max_loss:g}; nothing was written"
                )
            for file in sorted(Path(folder).iterdir()):  # .bin before the .xml that needs it
                os.replace(file, output.with_name(file.name))
    return before, after


def dice_of(class_map: ClassMap, dataset: SegmentationDataset) -> float:
    """The mean Dice of a model on images, one by one, at the size at which it sees them."""
    found = []
    for item in iter(dataset):
        labels, truth = labels_of(class_map(item["image"][None])), item["mask"][None]
        found.append(image_scores(labels, truth, dataset.num_classes, IGNORED)["dice"].nanmean())
    return float(torch.stack(found).nanmean())
