"""What a configuration leaves open, filled in from the data, the model's files and the machine."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
from msgspec import Meta

from naslora.choices import Precision
from naslora.data.datasets import DATASETS, load_splits
from naslora.data.images import Sample
from naslora.data.layouts import OPTIONAL_SPLIT
from naslora.data.masks import IGNORED, read_mask
from naslora.data.picture import parse_intensity
from naslora.errors import UserError
from naslora.files import read_json
from naslora.methods import find_method
from naslora.metrics import METRICS, check_metrics
from naslora.sam.families import find_family, side_of
from naslora.sam.hub import PREFIX, pinned
from naslora.sam.losses import WEIGHED, parse_terms
from naslora.sam.shipped import NONE, SHIPPED, shipped_version
from naslora.settings import checked
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, TrainConfig
from naslora.training.run_data import make_dataset, slicing_of
from naslora.training.step import factor, fitted_rate

LEARNING_TRAVEL = 0.2
"""What the weights' rates of all steps add up to, if no rate is given: about how far Adam moves a
weight whose gradient keeps its sign."""
LEARNING_BOUNDS = 1e-4, 2e-3
"""Of the rate that is fitted so."""
PROMPTABLE_BOUNDS = 1e-4, 3e-4
"""The same with `--task promptable`, whose decoder starts as SAM's and not from a part of it."""
MOST_CHANNELS = 512
STATISTICS_IMAGES = 256
SMALLEST_STD = 1 / 255
"""Of a constant channel."""


def resolve(config: RunConfig, fit: bool = True) -> RunConfig:
    """The configuration with everything that its data, its model and this machine decide.

    These are the number and the names of the classes, the metrics, the resolution, the checkpoint,
    the image size, the precision, the learning rate, the number of epochs, and that in which
    the search starts. Paths become absolute. The result is its own result. Steps, rate, class
    weights and channels are fitted to the training images, unless ``fit`` is False, because folds
    are not drawn yet.

    Raises:
        UserError: settings contradict each other or the data set, or its files cannot be read.
    """
    find_method(config.method).checked(config.adapter)
    if config.task == "promptable":
        check_promptable(config.data)
        for name in ("loss", "class_weights"):
            if getattr(config.training, name) != getattr(TrainConfig, name):
                raise UserError(
                    f"{name} needs --task semantic: SAM's own loss trains single objects"
                )
    if config.data.cache_embeddings:
        _check_embeddings(config)
    data = replace(config.data, **_data(config.data))
    model = replace(config.model, **_model(config.model))
    training = config.training
    balanced = training.class_weights == "auto"
    measured = len(data.channels) not in (0, 3) and data.channel_mean is None
    open_rate = training.steps is not None or training.learning_rate is None
    if fit and data.root and (open_rate or balanced or measured):
        how = slicing_of(data)
        splits = load_splits(data.dataset, data.root, data.class_names, data.split, data.group, how)
        samples = splits["train"] + splits.get(OPTIONAL_SPLIT, [])
        bounds = PROMPTABLE_BOUNDS if config.task == "promptable" else LEARNING_BOUNDS
        training = _fitted(training, len(samples), bounds)
        if balanced:
            training = replace(training, class_weights=_balance(data, samples))
        if measured:
            whole = replace(config, data=data, model=model)
            data = replace(data, **_statistics(whole, samples))
    _check_loss(training, data.num_classes)
    training = replace(training, **_training(training))
    return replace(config, data=data, model=model, training=training)


def read_config(path: Path) -> RunConfig:
    """Reads config.json of a run.

    Raises:
        UserError: the file is missing or damaged, a field is unknown or out of range, or as
            ``resolve``.
    """
    values = read_json(path)
    try:
        return resolve(RunConfig.from_dict(values))
    except UserError as error:
        raise UserError(f"{path} is no configuration of this version: {error}") from error


def check_promptable(data: DataConfig) -> None:
    """Refuses what promptable runs do not have: windows cut objects, and so do tiles. SAM's
    predictor takes RGB."""
    for name in ("crop", "resolution", "channels", "neighbours"):
        value = getattr(data, name)
        if value not in (None, "network", (), 0):
            raise UserError(f"{name} {value} needs --task semantic; drop --{name}")


def _check_embeddings(config: RunConfig) -> None:
    """Refuses embeddings that would not come back in the next epoch."""
    data, training = config.data, config.training
    if data.cache is None:
        raise UserError("cache_embeddings needs a folder: --cache DIR")
    if config.method != "decoder-only":
        raise UserError(
            f"cache_embeddings needs a frozen encoder, which --method {config.method} changes; "
            "choose decoder-only"
        )
    changes = "crop" if data.crop else f"augment {training.augment}"
    if data.crop or training.augment not in ("none", "flip", "dihedral"):
        raise UserError(
            f"cache_embeddings needs images that come back, and --{changes} gives new ones in "
            "every epoch; choose --augment flip or dihedral, without --crop"
        )


def _data(data: DataConfig) -> dict[str, Any]:
    if data.intensity is not None:
        parse_intensity(data.intensity)
    count, names, metrics = _classes(data)
    check_metrics(metrics, count)
    if data.ignore_index is not None:
        _check_ignore_index(data, data.ignore_index, max(count, 2), metrics)
    return {
        "root": data.root and Path(os.path.abspath(data.root)),
        **_channels(data),
        "cache": data.cache and Path(os.path.abspath(data.cache)),
        "num_classes": count,
        "class_names": names,
        "metrics": metrics,
        "resolution": data.resolution or ("network" if data.crop is None else "tiles"),
    }


def _channels(data: DataConfig) -> dict[str, Any]:
    """Names of the channels, and those that pictures show."""
    names, shown = data.channels, data.shown
    if data.neighbours and not names:
        names = tuple(f"slice {k:+d}" for k in range(-data.neighbours, data.neighbours + 1))
        shown = shown or 3 * (names[data.neighbours],)
    if len(names) == 1 and names[0].isdigit():
        count = checked("channels", int(names[0]), Annotated[int, Meta(ge=1, le=MOST_CHANNELS)])
        names = tuple(f"channel {number}" for number in range(1, count + 1))
    if len({*names}) < len(names):
        raise UserError(f"channels must have different names, got {' '.join(names)}")
    for field, values in (("channel_mean", data.channel_mean), ("channel_std", data.channel_std)):
        if values is not None and (len(values) != len(names) or data.channel_mean is None):
            raise UserError(f"{field} needs --channels and a value for each, got {len(values)}")
    if names:
        numbers = {str(number): name for number, name in enumerate(names, 1)}
        wanted = shown or [names[min(i, len(names) - 1)] for i in range(3)]
        shown = tuple(numbers.get(name, name) for name in wanted)  # type: ignore[assignment]
    unknown = {*(shown or ())} - {*names}
    if unknown:
        raise UserError(f"shown must be among the channels {' '.join(names)}, got {min(unknown)}")
    return {"channels": names, "shown": shown}


def _statistics(config: RunConfig, samples: list[Sample]) -> dict[str, Any]:
    """Mean and standard deviation of each channel of the training images, as the model sees them.

    Of more than ``STATISTICS_IMAGES`` they are those of as many, evenly spread.
    """
    dataset = make_dataset(config, samples[:: -(-len(samples) // STATISTICS_IMAGES)])
    images = [item["image"].double() for item in iter(dataset)]
    mean = torch.stack([image.mean((1, 2)) for image in images]).mean(0)
    square = torch.stack([(image**2).mean((1, 2)) for image in images]).mean(0)
    std = (square - mean**2).clamp(min=SMALLEST_STD**2).sqrt()
    return {"channel_mean": tuple(mean.tolist()), "channel_std": tuple(std.tolist())}


def _classes(data: DataConfig) -> tuple[int, tuple[str, ...], tuple[str, ...]]:
    """Number and names of the classes, and the metrics."""
    dataset, count, names = DATASETS[data.dataset], data.num_classes, data.class_names
    known = dataset.class_names[1:]
    if dataset.categories is not None:
        known = names
        if not names and data.root is not None:
            known = tuple(dataset.categories(data.root))
    if known:
        own = 1 if len(known) == 1 else len(known) + 1
        if count not in (1, own):
            raise UserError(f"{data.dataset} has {own} classes, got num_classes {count}")
        count, names = own, names or known
    foreground = max(count - 1, 1)
    if not names:
        one = foreground == 1
        names = ("foreground",) if one else tuple(f"class {k + 1}" for k in range(foreground))
    if len(names) != foreground:
        raise UserError(
            f"class_names must name the {foreground} foreground classes, got {len(names)}"
        )
    return count, names, dataset.metrics if data.metrics is None else data.metrics


def _check_ignore_index(
    data: DataConfig, index: int, classes: int, metrics: tuple[str, ...]
) -> None:
    if data.dataset == "coco":
        raise UserError(
            "ignore_index is a label in mask files, and coco has no mask files; drop it"
        )
    if data.palette is not None and index != classes:
        raise UserError(
            f"ignore_index must be {classes} with --palette, the number of its last colour, got "
            f"{index}"
        )
    if index < classes or classes > IGNORED:
        raise UserError(
            f"ignore_index must be none of the {classes} classes 0 to {classes - 1}, and there may "
            f"be at most {IGNORED} classes, got {index}"
        )
    for name in metrics:
        if METRICS[name].of_map == "saliency":
            raise UserError(
                f"metric {name!r} cannot leave out pixels; choose others with --metrics, or drop "
                "--ignore-index"
            )


def _model(model: ModelConfig) -> dict[str, Any]:
    """Its image size, and its checkpoint: ``NONE``, what ``shipped_version`` returns, a name on the
    Hub with its commit, or a path."""
    given, size, own = model.checkpoint, side_of(model.name), shipped_version(model.name)
    if given is None:
        family = find_family(model.name)
        named = family.weights.get(model.name)
        if own is None and named is not None:
            raise UserError(
                f"model {model.name} needs its weights: give --checkpoint {named}, which downloads "
                f"them, or a FILE, from {family.home}; --checkpoint {NONE} starts from random "
                "weights, and vit_t needs no file"
            )
        given = own or NONE
    elif given.startswith(f"{SHIPPED} ") and given != own:
        raise UserError(
            f"the run started from the weights of {model.name} in another version of naslora "
            f"({given}, here {own}); use that version"
        )
    elif given.startswith(PREFIX):
        given = pinned(given)
    elif given not in (NONE, own):
        given = os.path.abspath(given)
    return {"checkpoint": given, "image_size": model.image_size or size}


def _fitted(config: TrainConfig, images: int, bounds: tuple[float, float]) -> TrainConfig:
    """Turns ``steps`` into epochs, and fits the learning rate within bounds if it is None."""
    own, rate, epochs = -(-images // config.batch_size), config.learning_rate, config.epochs
    if config.steps is not None:
        epochs = max(1, round(config.steps / own))
    if rate is None:
        steps = epochs * own
        factors = (factor(config.schedule, step / steps, config.warmup) for step in range(steps))
        rate = fitted_rate(LEARNING_TRAVEL, factors, *bounds)
    return replace(config, epochs=epochs, steps=None, learning_rate=rate)


def _training(training: TrainConfig) -> dict[str, Any]:
    """Its precision and the start of the search."""
    precision = training.mixed_precision or _precision()
    frozen, fraction = training.frozen_precision, training.arch_fraction
    start = training.epochs // 3 if training.search_start is None else training.search_start
    if frozen not in (None, "no", precision):
        raise UserError(
            f"frozen_precision {frozen} needs mixed_precision {frozen}, got {precision}"
        )
    if fraction == 1 and training.arch_data in ("rotate", "hold-out"):
        raise UserError(
            f"arch_fraction 1 leaves no images for the weights with arch_data {training.arch_data}"
        )
    if training.anneal_epochs > training.epochs:
        raise UserError(
            f"anneal_epochs must be at most epochs, {training.epochs}, got {training.anneal_epochs}"
        )
    if training.patience and (training.keep != "best" or training.anneal_epochs):
        raise UserError(
            "patience stops after the best epoch: give --keep best, and no --anneal-epochs, which "
            "anneals in the last ones"
        )
    return {"mixed_precision": precision, "search_start": start}


def _check_loss(training: TrainConfig, classes: int) -> None:
    terms, weights, expected = parse_terms(training.loss), training.class_weights, max(classes, 2)
    if isinstance(weights, tuple) and not (
        len(weights) == expected and all(0 <= w < math.inf for w in weights) and any(weights)
    ):
        raise UserError(
            f"class_weights must be {expected} numbers from 0 on, one for each class with the "
            f"background first, and not all 0, got {' '.join(f'{w:g}' for w in weights)}"
        )
    weighed = {"boundary_weight": training.boundary_weight, "class_weights": weights}
    for name, value in weighed.items():
        if value and not {*terms} & {*WEIGHED} and (classes == 1 or name == "boundary_weight"):
            raise UserError(
                f"{name} weighs the pixels of {' and '.join(WEIGHED)}, and --loss {training.loss} "
                f"has neither; add one, or drop {name}"
            )


def _balance(data: DataConfig, samples: Sequence[Sample]) -> tuple[float, ...]:
    """Weights by the median frequency (Eigen and Fergus, 2015): the median over the classes of
    their shares of pixels, divided by the own share, in the images that have the class. 1 for a
    class that no image has."""
    classes = max(data.num_classes, 2)
    counts = np.zeros((len(samples), classes))
    for own, sample in zip(counts, samples, strict=True):
        labels = read_mask(sample, data.num_classes, data.palette, data.ignore_index)
        own += np.bincount(labels.ravel(), minlength=IGNORED + 1)[:classes]
    pixels = ((counts > 0) * counts.sum(1, keepdims=True)).sum(0)
    shares = np.divide(counts.sum(0), pixels, out=np.full(classes, np.nan), where=pixels > 0)
    weights = np.nan_to_num(np.nanmedian(shares) / shares, nan=1.0)
    return tuple(round(float(weight), 4) for weight in weights)


def _precision() -> Precision:
    """The precision of ``accelerate launch``, or else the one that is fast on this machine."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched:
        return cast(Precision, checked("ACCELERATE_MIXED_PRECISION", launched, Precision))
    fast = not torch.accelerator.is_available() and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "no"
