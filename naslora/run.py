"""A run's folder: from a configuration to a trained, evaluated, merged and reported model.

config.json            the whole configuration
best/                  adapter (and decoder) of the best epoch, as ``save_adapter`` writes it
last.pt                what --resume needs
history.csv            one row an epoch
operations.json        softmax(alpha) of every layer after every epoch
metrics.json           test metrics, merge errors, counts, times
report.html            all of it to look at
tensorboard/           the curves for TensorBoard
"""

import csv
import dataclasses
import functools
import io
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from naslora.cache import Cache
from naslora.checkpoint import load_adapter, read_safetensors
from naslora.config import NASLoRAConfig
from naslora.data import (
    Sample,
    SegmentationDataset,
    check_samples,
    hold_out,
    in_threads,
    list_images,
    read_image,
)
from naslora.datasets import DataSet, count_differences, find_dataset, load_splits
from naslora.errors import UserError
from naslora.evaluation import evaluate
from naslora.export import Description, Format, Part, Predict, export, load_exported
from naslora.files import read_json, replaced_file, write_json, write_text
from naslora.injection import arch_parameters
from naslora.merging import MergeReport, restore_merged, unmerge
from naslora.methods import (
    METHODS,
    MethodName,
    apply,
    check_merges,
    merge,
    merge_modes,
    searches,
    trainable_parameters,
)
from naslora.metrics import check_metrics, image_scores
from naslora.report import Panel, paint, write_report
from naslora.sam import checkpoint_blocks
from naslora.search import BEST, Search, SearchConfig, make_accelerator, quality
from naslora.segmentation import SamForSegmentation, build_model
from naslora_kernels import available_backends
from naslora_kernels.backends import ENVIRONMENT_VARIABLE

MERGED_CONFIG = "merged.json"
LEFT_OUT = "left_out.safetensors"  # what the SAM checkpoint has and the model has not
CALIBRATION_IMAGES = 16  # that mode `calibrated` is fitted to, unless told otherwise
Resolution = Literal["network", "original"]
PANELS = 6  # test images shown in the report


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result."""

    recipe: str | None = None
    """Where the other settings come from that are not given: a recipe that ships with naslora, such
    as `isic2017/nas-pc-lora`, or a YAML file."""
    data: Path | None = None
    """Folder with train.csv, val.csv and test.csv (columns image,label) and perhaps arch.csv."""
    dataset: str = "csv"
    """Layout of the data: `csv`, `folders` ({train,val,test}/{images,masks}), `mni152`, or a data
    set of the paper as it is distributed: `isic2017`, `kvasir`, `cvc-clinicdb`, `camouflage`
    (COD10K, CAMO, CHAMELEON), `sbu`, `leaf`, `roads`, `trans10k-v1`, `trans10k-v2`."""
    root: Path | None = None
    """Folder of the data set; `--data DIR` is short for `--dataset csv --root DIR`."""
    cache: Path | None = None
    """Folder in which decoded, resized images are kept for later epochs and runs."""
    model: str = "vit_b"
    """vit_b, vit_l, vit_h (SAM), mobile_sam (MobileSAM) or vit_t (small, trains on a CPU)."""
    checkpoint: Path | None = None
    """Pre-trained SAM checkpoint (.pth or .safetensors); without one the encoder is random."""
    image_size: int = 1024
    """Side to which images are resized, in pixels; a multiple of 16."""
    num_classes: int = 1
    """1 for binary masks, else the number of classes, the background (0) included; the paper's data
    sets know theirs."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes without the background, for tables and reports."""
    palette: tuple[str, ...] | None = None
    """One colour a class (#rrggbb) for masks that are colour images."""
    metrics: tuple[str, ...] | None = None
    """What the test images are scored by; the default is what is reported on the data set."""
    resolution: Resolution = "network"
    """Size at which the test images are scored: the model's, or each mask's original one."""
    method: MethodName = "nas-pc-lora"
    """How the encoder is fine-tuned; plain LoRA in the fused kernels is `nas-pc-lora` with a
    `--channel-ratio` of 0."""
    adapter: NASLoRAConfig = field(default_factory=NASLoRAConfig)
    search: SearchConfig = field(default_factory=SearchConfig)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        self._take_what_is_known(find_dataset(self.dataset))
        if self.resolution not in get_args(Resolution):
            raise UserError(f"resolution must be network or original, got {self.resolution!r}")
        foreground = max(self.num_classes - 1, 1)
        if self.class_names is not None and len(self.class_names) != foreground:
            raise UserError(
                f"class_names must name the {foreground} foreground classes, got "
                f"{len(self.class_names)}"
            )
        if self.data is not None and (self.root is not None or self.dataset != "csv"):
            raise UserError("give either --data DIR or --dataset NAME --root DIR, not both")

    def _take_what_is_known(self, dataset: DataSet) -> None:
        """Number and names of the classes, and the metrics, of a data set that has its own."""
        known = {}
        if dataset.class_names:
            binary = len(dataset.class_names) == 2
            count = 1 if binary else len(dataset.class_names)
            if self.num_classes not in (1, count):
                raise UserError(f"{self.dataset} has {count} classes, got {self.num_classes}")
            known["num_classes"] = count
            if self.class_names is None:
                known["class_names"] = dataset.class_names[1:]
        if self.metrics is None:
            known["metrics"] = dataset.metrics
        for name, value in known.items():
            object.__setattr__(self, name, value)
        check_metrics(self.metrics, self.num_classes)

    @property
    def searches(self) -> bool:
        """Whether the method has an alpha to search."""
        return searches(self.method, self.adapter)

    @property
    def foreground_names(self) -> list[str]:
        """The classes without the background."""
        count = max(self.num_classes - 1, 1)
        if self.class_names is not None:
            return list(self.class_names)
        return ["foreground"] if count == 1 else [f"class {k}" for k in range(1, count + 1)]

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-ready values; paths are absolute."""
        values = dataclasses.asdict(self)
        for name in ("data", "root", "cache", "checkpoint"):
            if values[name] is not None:
                values[name] = str(Path(values[name]).resolve())
        return json.loads(json.dumps(values))  # tuples become lists, as in the file

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunConfig":
        """The inverse of ``to_dict``.

        Raises:
            UserError: a field is unknown or out of range.
        """
        try:
            values = dict(values)
            for name in ("data", "root", "cache", "checkpoint"):
                values[name] = Path(values[name]) if values[name] is not None else None
            for name in ("class_names", "palette", "metrics"):
                values[name] = tuple(values[name]) if values[name] is not None else None
            values["adapter"] = NASLoRAConfig.from_dict(values["adapter"])
            values["search"] = SearchConfig(**values["search"])
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise UserError(f"this is no run configuration of this version: {error}") from error


def train(config: RunConfig, output: Path, resume: bool = False) -> dict[str, Any]:
    """Searches, evaluates, merges and reports; everything ends up in ``output``.

    What the user gave is checked before anything is written.

    Args:
        config: the run.
        output: the run's folder; must be new or empty unless ``resume``.
        resume: continue the run in ``output`` where its last checkpoint stands.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: something the user gave cannot work.
    """
    accelerator = make_accelerator(config.search)
    _check_start(config)
    check_output(config, output, resume)
    splits = find_splits(config)
    _check_together(accelerator, splits, config)
    model = build_adapted_model(config)
    counts = count_parameters(model)
    data = {
        name: make_dataset(
            config,
            split,
            flip=config.search.flip and name in ("train", "arch"),
            truth=config.resolution == "original" and name == "test",
        )
        for name, split in splits.items()
    }
    seed = config.adapter.seed
    search = Search(model, data, config.search, seed, output, config.foreground_names, accelerator)
    if resume:
        search.resume()
    if accelerator.is_main_process:
        write_json(output / "config.json", config.to_dict())
    search.run()
    load_adapter(model, output / BEST)
    metrics = _final_metrics(search, counts, config)
    if accelerator.is_main_process:
        _write_results(search, metrics, config, output)
    accelerator.wait_for_everyone()
    return metrics


def _check_start(config: RunConfig) -> None:
    """A recipe of the paper on an encoder without SAM's weights would train for days in vain."""
    has_weights = config.model != "vit_t" and config.method != "full"
    if config.recipe is not None and has_weights and config.checkpoint is None:
        raise UserError(
            f"recipe {config.recipe} starts from SAM's weights: give --checkpoint FILE, the "
            f"{config.model} checkpoint"
        )


def check_output(config: RunConfig, output: Path, resume: bool) -> None:
    """Refuses a folder that holds another run's results, or nothing to resume.

    Raises:
        UserError: ``output`` is not empty, or, with ``resume``, belongs to another configuration.
    """
    if resume and (output / "config.json").is_file():
        stored = RunConfig.from_dict(read_json(output / "config.json"))
        names = differing(stored.to_dict(), config.to_dict())
        if names:
            raise UserError(
                f"{output} was started with another configuration (it differs in "
                f"{', '.join(names)}); resume with the same one"
            )
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output")
    # The demo keeps its data inside the run's folder.
    own_data = output / "data" if config.root == output / "data" else None
    if output.is_dir() and any(path != own_data for path in output.iterdir()):
        advice = "" if resume else ", or add --resume to continue the run in it"
        what = "holds files, but no run" if resume else "exists and is not empty"
        raise UserError(f"{output} {what}; choose another --output{advice}")


def differing(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The fields in which two configurations differ, as the command line names them."""
    names = []
    for name, value in given.items():
        if isinstance(value, dict):
            names += differing(stored[name], value)
        elif stored[name] != value:
            names.append(name)
    return names


def find_splits(config: RunConfig) -> dict[str, list[Sample]]:
    """The samples of each split; ``arch`` is there exactly when the method searches with it."""
    root = config.data or config.root
    if root is None:
        raise UserError("no data: give --data DIR, or --dataset NAME --root DIR")
    splits = load_splits(config.dataset, root)
    differences = count_differences(config.dataset, splits)
    if differences and os.environ.get("RANK", "0") == "0":
        listed = ", ".join(differences)
        print(
            f"naslora: warning: {root} is not the paper's {config.dataset}: {listed}",
            file=sys.stderr,
        )
    if not config.searches or config.search.simultaneous:
        # Without alpha steps of their own these images are training images like the others.
        splits["train"] = splits["train"] + splits.pop("arch", [])
    elif config.search.arch_fraction == 0:
        splits.setdefault("arch", splits["train"])
    elif "arch" not in splits:
        fraction, seed = config.search.arch_fraction, config.adapter.seed
        splits["train"], splits["arch"] = hold_out(splits["train"], fraction, seed)
    return splits


def _check_together(
    accelerator: Accelerator, splits: dict[str, list[Sample]], config: RunConfig
) -> None:
    """The main process reads every sample for all; none goes on before, or without the others."""
    problem = None
    if accelerator.is_main_process:
        try:
            check_with_progress([sample for split in splits.values() for sample in split], config)
        except UserError as error:
            problem = str(error)
    for found in gather_object([problem]):
        if found is not None:
            raise UserError(found)


def check_with_progress(samples: Sequence[Sample], config: RunConfig) -> None:
    """Reads every sample once before a long run starts, so that a bad file shows now."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("checking the data", total=len(samples))

        def advance(done: int, _: int) -> None:
            progress.update(task, completed=done)

        if config.cache is None:
            check_samples(samples, config.num_classes, config.palette, advance)
        else:  # to fill the cache is to read everything once
            in_threads(make_dataset(config, samples).read, samples, advance)


def build_adapted_model(config: RunConfig) -> SamForSegmentation:
    """The model of a run before training: pre-trained weights, fresh adapter, decoder trainable.

    Raises:
        UserError: as ``build_model`` and ``apply``; the kernel backend cannot be used here.
    """
    _check_backend(config.adapter.backend or os.environ.get(ENVIRONMENT_VARIABLE) or None)
    seed = config.adapter.seed
    model = build_model(
        config.model, config.image_size, config.num_classes, config.checkpoint, seed
    )
    apply(config.method, model, config.adapter)
    if config.search.gradient_checkpointing:
        checkpoint_blocks(model.image_encoder)
    return model


def _check_backend(name: str | None) -> None:
    backends = available_backends()
    if name is None or (name in backends and backends[name] is None):
        return
    reason = f"cannot be used here: {backends[name]}" if name in backends else "does not exist"
    usable = ", ".join(known for known, reason in backends.items() if reason is None)
    raise UserError(f"backend {name!r} {reason}; choose one of {usable}, or give none")


def load_model(path: Path) -> tuple[SamForSegmentation, RunConfig]:
    """The trained model of a run's folder, or the merged one of a folder that ``merge_run`` wrote.

    Raises:
        UserError: the folder is neither, or a file in it is missing or damaged.
    """
    if (path / MERGED_CONFIG).is_file():
        return _load_merged(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is no run: it has neither config.json nor {MERGED_CONFIG}")
    config = RunConfig.from_dict(read_json(path / "config.json"))
    if not (path / BEST).is_dir():
        raise UserError(f"{path} has no trained model yet: {path / BEST} does not exist")
    _check_backend(config.adapter.backend or os.environ.get(ENVIRONMENT_VARIABLE) or None)
    model = build_model(
        config.model, config.image_size, config.num_classes, config.checkpoint, config.adapter.seed
    )
    load_adapter(model, path / BEST)
    return model.eval(), config


def evaluate_run(
    path: Path,
    split: str = "test",
    data: Path | None = None,
    resolution: Resolution | None = None,
) -> dict[str, Any]:
    """Metrics of a trained or merged model on a split of its own data, or of another CSV folder.

    Args:
        path: a run's folder, or a merged model's.
        split: which split.
        data: another CSV folder.
        resolution: other than the run's own.

    Returns:
        What ``naslora.evaluation.evaluate`` returns, and the number of ``images``.

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
    check_with_progress(splits[split], config)
    return {**evaluate_model(model, config, splits[split]), "images": len(splits[split])}


def evaluate_model(
    model: SamForSegmentation, config: RunConfig, samples: list[Sample]
) -> dict[str, Any]:
    """Loss and metrics of a run's model on some samples, as ``naslora.evaluation.evaluate``."""
    accelerator = make_accelerator(config.search)
    return evaluate(
        model.to(accelerator.device),
        make_dataset(config, samples, truth=config.resolution == "original"),
        accelerator,
        config.search.loss,
        config.foreground_names,
        config.search.batch_size,
        config.search.workers,
        config.metrics,
    )


def predict_run(path: Path, inputs: Sequence[Path], output: Path) -> list[Path]:
    """Segments images: writes a mask and an overlay for each, at the image's own size.

    Binary masks are 0/255, others class indices.

    Args:
        path: a run's folder, a merged model's, or a file that ``export_run`` wrote.
        inputs: image files, or folders of images.
        output: created if need be; NAME_mask.png and NAME_overlay.png.

    Returns:
        The masks that were written.

    Raises:
        UserError: as ``load_model`` and ``load_exported``; an image is missing or unreadable, or
            two have the same name.
    """
    images = [
        image for item in inputs for image in ([item] if item.is_file() else list_images(item))
    ]
    if not images:
        raise UserError(f"there are no images in {', '.join(map(str, inputs))}")
    repeated = [stem for stem, n in Counter(image.stem for image in images).items() if n > 1]
    if repeated:
        raise UserError(f"two images are called {repeated[0]!r}: their masks would collide")
    predict, config = _load_predictor(path)
    samples = [Sample(image, None, "input") for image in images]
    check_with_progress(samples, config)
    dataset = SegmentationDataset(samples, config.image_size, config.num_classes)
    written = []
    for sample, item in zip(dataset.samples, dataset, strict=True):
        labels = predict(item["image"][None])[0].numpy()
        picture = read_image(sample)
        mask = Image.fromarray(labels.astype(np.uint8)).resize(picture.size, Image.NEAREST)
        shown = mask.point(lambda value: 255 * value) if config.num_classes == 1 else mask
        target = output / f"{sample.image.stem}_mask.png"
        with replaced_file(target) as temporary:
            shown.save(temporary, format="PNG")
        with replaced_file(output / f"{sample.image.stem}_overlay.png") as temporary:
            names = ["background", *config.foreground_names]
            overlay = paint(np.asarray(picture), np.asarray(mask), names)
            Image.fromarray(overlay).save(temporary, format="PNG")
        written.append(target)
    return written


def _load_predictor(path: Path) -> tuple[Predict, RunConfig]:
    """What a folder or an exported file predicts with: (B, 3, S, S) images to (B, S, S) labels."""
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
    return functools.partial(_predict, model), config


def export_run(path: Path, file_format: Format, output: Path, part: Part = "model") -> None:
    """Writes a merged model for another runtime, as ``naslora.export.export``.

    Args:
        path: a merged model's folder, or that of a run that has nothing to merge.
        file_format: onnx, safetensors or torch-export.
        output: the file.
        part: "model", images to class scores, or "encoder", images to SAM's image embedding.

    Raises:
        UserError: as ``load_model`` and ``export``.
    """
    model, config = load_model(path)
    names = tuple(config.foreground_names)
    held = Description(config.model, config.image_size, config.num_classes, names, part)
    export(model, held, file_format, output)


def merge_run(
    path: Path,
    mode: str,
    output: Path,
    max_error: float | None = None,
    images: int = CALIBRATION_IMAGES,
) -> tuple[MergeReport, dict[str, Any]]:
    """Merges a run's trained model and writes it: merged.json and model.safetensors.

    Errors are measured on the run's validation images; mode "calibrated" is fitted to, and
    measured on, training images.

    Args:
        path: a run's folder.
        mode: as in ``naslora.merge``.
        output: must be new or empty.
        max_error: refuse if a layer's relative error of the update is larger.
        images: how many training images to fit to.

    Returns:
        The merge's report, and the validation scores ``before`` and ``after`` it.

    Raises:
        UserError: as ``load_model`` and ``merge``; ``output`` is not empty; the error is too large.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not empty; choose another --output")
    model, config = load_model(path)
    check_merges(model)
    splits = find_splits(config)
    scores = {"before": evaluate_model(model, config, splits["val"])}
    report = merge(model, mode, calibration(config, splits, mode, model.pixel_mean.device, images))
    scores["after"] = evaluate_model(model, config, splits["val"])
    if max_error is not None and report.max_update_error > max_error:
        raise UserError(
            f"merging with mode {mode!r} loses up to {report.max_update_error:.2e} of an update, "
            f"more than --max-error {max_error:g}; nothing was written"
        )
    with replaced_file(output / "model.safetensors") as temporary:
        state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
        save_file(state, temporary)
    if model.left_out:
        with replaced_file(output / LEFT_OUT) as temporary:
            save_file({k: v.contiguous() for k, v in model.left_out.items()}, temporary)
    description = {"report": report.to_dict(), "scores": scores, "config": config.to_dict()}
    write_json(output / MERGED_CONFIG, description)
    return report, scores


def _load_merged(path: Path) -> tuple[SamForSegmentation, RunConfig]:
    stored = read_json(path / MERGED_CONFIG)
    try:
        config = RunConfig.from_dict(stored["config"])
        names = [layer["name"] for layer in stored["report"]["layers"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path / MERGED_CONFIG} describes no merged model: {error}") from error
    model = build_model(config.model, config.image_size, config.num_classes)
    tensors = read_safetensors(path / "model.safetensors")
    restore_merged(model, names, tensors)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} does not hold a whole merged model: {reason}") from error
    if (path / LEFT_OUT).is_file():
        model.left_out = read_safetensors(path / LEFT_OUT)
    # TinyViT caches its attention biases in evaluation mode; a change of mode drops the cache.
    model.train()
    return model.eval(), config


def count_parameters(model: SamForSegmentation) -> dict[str, int]:
    """Numbers of parameters: frozen, decoder, adapter (what the method trains in the encoder, but
    for alpha) and architecture (alpha)."""
    architecture = sum(p.numel() for p in arch_parameters(model))
    adapter = sum(p.numel() for p in trainable_parameters(model)) - architecture
    decoder = sum(p.numel() for p in model.mask_decoder.parameters())
    everything = sum(p.numel() for p in model.parameters())
    return {
        "frozen": everything - decoder - adapter - architecture,
        "decoder": decoder,
        "adapter": adapter,
        "architecture": architecture,
    }


def make_dataset(
    config: RunConfig, samples: list[Sample], flip: bool = False, truth: bool = False
) -> SegmentationDataset:
    """The samples as the run's model sees them; ``truth`` as in ``SegmentationDataset``."""
    return SegmentationDataset(
        samples,
        config.image_size,
        config.num_classes,
        config.palette,
        flip=flip,
        seed=config.adapter.seed,
        cache=None if config.cache is None else Cache(config.cache),
        truth=truth,
    )


def image_batches(
    config: RunConfig, samples: list[Sample], device: torch.device
) -> Iterator[Tensor]:
    """(B, 3, S, S) batches of a split's images, in order."""
    dataset = make_dataset(config, samples)
    size = config.search.batch_size
    for start in range(0, len(dataset), size):
        items = [dataset[i]["image"] for i in range(start, min(start + size, len(dataset)))]
        yield torch.stack(items).to(device)


def _final_metrics(search: Search, counts: dict[str, int], config: RunConfig) -> dict[str, Any]:
    """Metrics of the best epoch: on the test split, and again after each way of merging."""
    started = time.perf_counter()
    best = max(search.history, key=quality)
    metrics: dict[str, Any] = {
        "test": search.evaluate("test", config.metrics),
        "val": {name: best[f"val_{name}"] for name in ("loss", "dice", "iou", "accuracy")},
        "best_epoch": best["epoch"],
        "trainable_parameters": sum(counts.values()) - counts["frozen"],
        "parameters": counts,
        "images": {split: len(data) for split, data in search.data.items()},
    }
    modes = merge_modes(config.method, config.adapter)
    if modes:
        metrics |= {"test_merged": {}, "merge": {}}
        samples = {split: data.samples for split, data in search.data.items()}
        for mode in modes:
            batches = calibration(config, samples, mode, search.accelerator.device)
            try:
                report = merge(search.model, mode, batches)
            except UserError as error:  # too few images for the mode; the others still tell
                metrics["merge"][mode] = {"refused": str(error)}
                continue
            metrics["test_merged"][mode] = search.evaluate("test", config.metrics)
            if mode == "center" and config.search.anneal_epochs:
                metrics["annealing"] = _annealing(search)
            metrics["merge"][mode] = report.to_dict()
            unmerge(search.model)
    training = sum(sum(record["seconds"].values()) for record in search.history)
    metrics["seconds"] = training + time.perf_counter() - started
    return metrics


def calibration(
    config: RunConfig,
    splits: dict[str, list[Sample]],
    mode: str,
    device: torch.device,
    images: int = CALIBRATION_IMAGES,
) -> Iterator[Tensor]:
    """What a way of merging is fitted to - training images, evenly spread - or measured on."""
    if mode != "calibrated":
        return image_batches(config, splits["val"], device)
    train = splits["train"] + splits.get("arch", [])
    train = list(dict.fromkeys(train))  # an arch split may be the training images again
    indices = np.linspace(0, len(train) - 1, min(images, len(train))).round().astype(int)
    return image_batches(config, [train[int(i)] for i in indices], device)


def _annealing(search: Search) -> dict[str, Any]:
    """Validation scores of the best epoch before, of every epoch while, and of the best epoch after
    the cell gave up its neighbours, and of the model merged with `center`."""
    names = ("epoch", "spatial", "val_loss", "val_dice", "val_iou")
    epochs = {"before": [], "during": [], "after": []}
    for record in search.history:
        part = {0.0: "after", 1.0: "before"}.get(record["spatial"], "during")
        epochs[part].append({name: record[name] for name in names})
    merged = search.evaluate("val")
    return {
        "before": max(epochs["before"], key=quality, default=None),
        "during": epochs["during"],
        "after": max(epochs["after"], key=quality),
        "merged": {f"val_{name}": merged[name] for name in ("loss", "dice", "iou")},
    }


def _write_results(
    search: Search, metrics: dict[str, Any], config: RunConfig, output: Path
) -> None:
    operations = search.operation_history()
    write_text(output / "history.csv", _history_csv(search.history))
    if operations is not None:
        write_json(output / "operations.json", operations)
    write_json(output / "metrics.json", metrics)
    write_report(
        output / "report.html",
        config=config.to_dict(),
        metrics=metrics,
        history=search.history,
        operations=operations,
        panels=_panels(search, config),
        class_names=["background", *config.foreground_names],
    )


def _history_csv(history: list[dict[str, Any]]) -> str:
    rows = [
        {**record, **{f"seconds_{name}": s for name, s in record["seconds"].items()}}
        for record in history
    ]
    text = io.StringIO()
    columns = [name for name in rows[0] if name != "seconds"]
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _panels(search: Search, config: RunConfig) -> list[Panel]:
    """A few test images, evenly spread over the split."""
    dataset = search.data["test"]
    indices = np.linspace(0, len(dataset) - 1, min(PANELS, len(dataset))).round().astype(int)
    panels = []
    for item in (dataset[int(i)] for i in indices):
        labels = _predict(search.model, item["image"][None])[0].numpy()
        scores = image_scores(
            torch.from_numpy(labels)[None], item["mask"][None], config.num_classes
        )
        dice = float(scores["dice"].nanmean())
        panels.append(
            Panel(
                name=item["name"],
                image=(255 * item["image"]).round().byte().permute(1, 2, 0).numpy(),
                truth=item["mask"].numpy(),
                prediction=labels,
                dice=None if math.isnan(dice) else dice,
            )
        )
    return panels


@torch.no_grad()
def _predict(model: SamForSegmentation, images: Tensor) -> Tensor:
    """(B, S, S) labels of (B, 3, S, S) images, on the CPU."""
    model.eval()
    return model(images.to(model.pixel_mean.device)).labels().cpu()
