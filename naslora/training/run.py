"""A run: from a configuration to a trained, evaluated, merged and reported model, in one folder.

config.json            the whole configuration
adapter/               adapter (and decoder) of the kept epoch, as ``save_adapter`` writes it
data.json              checksums of the images and masks, which --resume compares
last.pt                everything that --resume needs
history.csv            one row an epoch
operations.json        softmax(alpha) of every layer after every epoch
metrics.json           test metrics, merge errors, counts, times
test_images.csv        Dice of every test image, before and after merging
report.html            all of it to look at; written last
tensorboard/           the curves for TensorBoard, if it is among the trackers
trackers.json          by which other trackers continue a resumed run
"""

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from naslora import results
from naslora.adapter.merging.merged import unmerge
from naslora.adapter.merging.report import MergeMode
from naslora.choices import Tracker
from naslora.data.demo_data import write_mni152
from naslora.errors import UserError, one_line, warn
from naslora.files import file_checksum, is_temporary, write_json
from naslora.locks import locked
from naslora.methods import METHODS, load_adapter, merge, merge_modes
from naslora.records import write_record, write_rows
from naslora.report.page import Pictures
from naslora.report.pictures import Merged, Panel
from naslora.report.run_report import write_report
from naslora.results import MergeResult, RunResult, SplitScores
from naslora.sam.families import find_family
from naslora.sam.shipped import NONE, SHIPPED, SHIPPED_SIZE
from naslora.training.accelerator import (
    check_shared,
    in_float32,
    in_main_process,
    lost_processes,
    make_accelerator,
)
from naslora.training.clicks import score_run
from naslora.training.example_images import labels_of_image, panels_of, prompted_pictures
from naslora.training.resolve import read_config, resolve
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, TrainConfig, differing
from naslora.training.run_data import calibration, prepare_data
from naslora.training.run_model import (
    build_adapted_model,
    build_frozen_model,
    count_parameters,
    frozen_dtype,
)
from naslora.training.trackers import check_trackers, log, tracked
from naslora.training.trainer import Trainer

DEMO_WINDOW = 64  # pixels of a slice, which the network sees enlarged to 256
FEW_IMAGES = 5
LEARNED = 0.05  # Dice of the test images; where it is lower, a note advises what to try


def train(
    config: RunConfig,
    output: Path,
    resume: bool = False,
    trackers: Sequence[Tracker] = ("tensorboard",),
) -> RunResult:
    """Searches, evaluates, merges and reports; everything ends up in ``output``.

    What the user gave is checked before anything is written.

    Args:
        config: the run.
        output: the run's folder; must be new or empty unless ``resume``.
        resume: continue the run in ``output`` from its last checkpoint.
        trackers: where the numbers of every epoch go, besides ``output``; may be empty.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: something the user gave cannot work, a tracker is not installed or fails, or
            another process uses ``output``.
        LostProcessError: another process of the run ended, or did not answer in time.
    """
    config = resolve(config)
    accelerator = make_accelerator(config.training)
    check_trackers(trackers)
    with lost_processes(), ExitStack() as stack:
        in_main_process(accelerator, lambda: stack.enter_context(locked(output)))
        check_output(config, output, resume)
        data, contents = prepare_data(config, accelerator, output / results.DATA)
        trainer = Trainer(build_adapted_model(config), data, config, output, accelerator)
        if accelerator.is_main_process:
            _warn(config, bool(trainer.alphas))
        if resume:
            trainer.resume()
        values = config.to_dict()
        if accelerator.is_main_process:
            write_json(output / results.CONFIG, values)
            write_json(output / results.DATA, dict(contents))
        check_shared(output / results.DATA, accelerator)
        stack.enter_context(tracked(accelerator, trackers, output, values, trainer.epoch + 1))
        trainer.run()
        result, pictures = _final_result(trainer)
        log(accelerator, _tracked_scores(result), trainer.epoch)
        if accelerator.is_main_process:
            _write_results(trainer, result, pictures)
        accelerator.wait_for_everyone()
        return result


def run_demo(output: Path, epochs: int, seed: int, resume: bool, random: bool) -> RunResult:
    """The demo: a small SAM learns the tissues of the MNI152 brain on a CPU, in minutes.

    Writes the data to ``output/data`` and the run to ``output``. The model is the pre-trained
    ``vit_t`` in the package, or one with a random encoder and decoder. The encoder stays frozen;
    the adapters and the decoder learn, at a rate that suits a run this short. A token of the
    encoder covers 16 pixels, more than the folds of the brain are wide. So the network sees
    enlarged windows of the slices.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: as ``train``; nilearn, whose package holds the images, is not installed.
    """
    config = RunConfig(
        seed=seed,
        data=DataConfig(
            dataset="mni152",
            root=output / "data",
            crop=DEMO_WINDOW,
            num_classes=3,
            class_names=("grey matter", "white matter"),
        ),
        model=ModelConfig("vit_t", checkpoint=NONE if random else None, image_size=256),
        training=TrainConfig(
            epochs=epochs,
            learning_rate=1e-3,
            mixed_precision="no",  # so that CPUs differ by rounding alone
        ),
    )
    with locked(output):
        check_output(resolve(config), output, resume)
        write_mni152(output / "data")
        return train(config, output, resume)


def _warn(config: RunConfig, searches: bool) -> None:
    """Says what the encoder starts from. Warns of settings that work, but may be an oversight."""
    model, training = config.model, config.training
    shipped = str(model.checkpoint).startswith(SHIPPED)
    origin = "the weights in the package" if shipped else str(model.checkpoint)
    if model.checkpoint == NONE:
        origin = "random weights"
    elif find_family(model.name).new_decoder:
        origin += " (its decoder from random weights, unless the file has one)"
    size = f"{model.image_size} x {model.image_size} pixels"
    print(f"{model.name} starts from {one_line(origin)}, at {size}", file=sys.stderr)
    if config.task == "promptable" and config.data.num_classes > 1:
        print(
            "each connected part of a class is an object; classes are not learned", file=sys.stderr
        )
    if shipped and model.image_size != SHIPPED_SIZE:
        warn(
            f"the weights of {model.name} were made for images of {SHIPPED_SIZE} pixels; their "
            f"position embeddings are resized to {model.image_size} pixels"
        )
    start = training.search_start
    if searches and start >= training.epochs and not training.simultaneous:
        warn(
            f"alpha is not trained: --search-start {start} is not among the "
            f"{training.epochs} epochs, which are counted from 0"
        )


def check_output(config: RunConfig, output: Path, resume: bool) -> None:
    """Refuses a folder that holds another run's results, or nothing to resume.

    Raises:
        UserError: ``output`` is not empty, or, with ``resume``, belongs to another configuration.
    """
    if resume and (output / results.CONFIG).is_file():
        stored = read_config(output / results.CONFIG)
        names = differing(stored.to_dict(), config.to_dict())
        if names:
            raise UserError(
                f"{output} was started with another configuration (it has "
                f"{', '.join(names)}); resume with the same one"
            )
        return
    # The demo keeps its data inside the run's folder.
    root = config.data.root
    own_data = "data" if root and root.resolve() == (output / "data").resolve() else None
    if output.is_dir() and any(
        path.name != own_data and not is_temporary(path) for path in output.iterdir()
    ):
        advice = "" if resume else ", or add --resume to continue the run in it"
        what = "holds files, but no run" if resume else "exists and is not empty"
        raise UserError(f"{output} {what}; choose another --output{advice}")


# ---- The results --------------------------------------------------------------------------------


def _final_result(trainer: Trainer) -> tuple[RunResult, list[Panel | Pictures]]:
    """Scores the kept epoch on the test split, and again after each way of merging.

    Returns:
        The result, and the worst and best test images for the report; none but in the main process.
    """
    config, accelerator, data = trainer.run_config, trainer.accelerator, trainer.data
    metrics, counts = config.data.metrics or (), count_parameters(trainer.model)
    last = trainer.evaluate("test", metrics) if trainer.average else None
    if frozen_dtype(config.training) != torch.float32:
        # Merging adds the update to the frozen weights, so it needs all their digits.
        trainer.model = build_frozen_model(config).to(accelerator.device)
    load_adapter(trainer.model, results.adapter_folder(trainer.directory))
    started = time.perf_counter()
    if accelerator.is_main_process:
        print("scoring the test images", file=sys.stderr)
    kept = results.kept_epoch(trainer.history, config.training.keep)
    test = trainer.evaluate("test", metrics)
    modes = merge_modes(config.method, config.adapter)
    float32 = None
    if modes and config.training.mixed_precision != "no":
        with in_float32(accelerator):
            float32 = trainer.evaluate("test", metrics)
    untouched = None
    prompted: list[Pictures] = []
    panels: dict[int, Panel] = {}
    if config.task == "promptable":
        sam = build_frozen_model(config).to(accelerator.device)
        untouched = score_run(sam, data["test"], accelerator, config, metrics)
        prompted = prompted_pictures(trainer, {"untouched": sam, "fine-tuned": trainer.model}, test)
    elif accelerator.is_main_process:
        panels = panels_of(trainer, float32 or test)
    merges, merged, annealed = _merged_scores(trainer, modes, panels)
    result = RunResult(
        test=test,
        val=SplitScores(kept.val_loss, kept.val_dice, kept.val_iou, kept.val_accuracy),
        untouched=untouched,
        test_last=last,
        kept_epoch=kept.epoch,
        trainable_parameters=counts.trainable,
        parameters=counts,
        images={split: len(own.samples) for split, own in data.items()},
        test_float32=float32,
        test_merged=merged,
        merge=merges,
        annealed=annealed,
        seconds=sum(epoch.seconds for epoch in trainer.history) + time.perf_counter() - started,
        weights=config.model.checkpoint,
        notes=_notes(trainer, test),
    )
    return result, [*prompted, *panels.values()]


def _merged_scores(
    trainer: Trainer, modes: Sequence[MergeMode], panels: dict[int, Panel]
) -> tuple[dict[str, MergeResult], dict[str, SplitScores], SplitScores | None]:
    """Merges in each way, scores the test images, and adds their predictions to the panels.

    The last result is the validation scores after annealing, None without.
    """
    config, accelerator = trainer.run_config, trainer.accelerator
    merges: dict[str, MergeResult] = {}
    merged: dict[str, SplitScores] = {}
    annealed = None
    samples = {split: own.samples for split, own in trainer.data.items()}
    for mode in modes:
        if accelerator.is_main_process:
            print(f"merging ({mode}), and scoring the test images again", file=sys.stderr)
        batches = calibration(config, samples, mode, accelerator.device)
        try:
            report = merge(trainer.model, mode, batches)
        except UserError as error:  # for example too few images for the mode; the others go on
            merges[mode] = MergeResult(refused=str(error))
            continue
        with in_float32(accelerator):
            merged[mode] = trainer.evaluate("test", config.data.metrics or ())
        for index, panel in panels.items():
            dice = (merged[mode].image_dice or {index: None})[index]
            panel.merged[mode] = Merged(labels_of_image(trainer, index), dice)
        if mode == "center" and config.training.anneal_epochs:
            annealed = trainer.evaluate("val")
        merges[mode] = MergeResult(report.mode, report.source, report.layers, report.warning)
        unmerge(trainer.model)
    return merges, merged, annealed


def _notes(trainer: Trainer, test: SplitScores) -> list[str]:
    """What a reader of the scores should know: a random encoder, a run that learned nothing."""
    config, losses = trainer.run_config, [epoch.train_loss for epoch in trainer.history]
    lowest, dice, epochs = min(losses), test.dice, config.training.epochs
    random = config.model.checkpoint == NONE and not METHODS[config.method].trains_encoder
    poor = dice is not None and dice < LEARNED
    rose = losses[-1] > 1.5 * lowest
    level = not rose and len(losses) > 1 and losses[-1] >= losses[0]
    stopped = trainer.epoch < epochs
    few = min(len(trainer.data["val"]), len(trainer.data["test"])) < FEW_IMAGES
    notes = {
        "The image encoder has random, frozen weights: give --checkpoint FILE for good "
        "scores.": random,
        f"The model finds next to nothing (Dice {dice or 0:.4f}): train longer (--epochs), with "
        "another --learning-rate, and check the masks and --num-classes.": poor,
        f"The training loss rose from {lowest:.3f} in epoch {losses.index(lowest) + 1} to "
        f"{losses[-1]:.4g}: lower --learning-rate.": rose,
        f"The training loss did not fall ({losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in "
        "the last): try another --learning-rate, or more --epochs.": level,
        f"Training stopped after epoch {trainer.epoch} of {epochs}: the validation Dice did not "
        f"rise for {config.training.patience} epochs (--patience).": stopped,
        f"Scores of fewer than {FEW_IMAGES} images say little; use more.": few,
    }
    return [note for note, holds in notes.items() if holds]


def _tracked_scores(result: RunResult) -> dict[str, float]:
    """The known test scores by name, for experiment trackers."""
    merged = {f"test_{mode}": scores for mode, scores in result.test_merged.items()}
    return {
        f"{split}_{name}": value
        for split, scores in {"test": result.test, **merged}.items()
        for name in ("dice", "iou", "accuracy")
        if (value := getattr(scores, name)) is not None
    }


def _write_results(
    trainer: Trainer, result: RunResult, pictures: Sequence[Panel | Pictures]
) -> None:
    """Writes history.csv, operations.json, test_images.csv, metrics.json and, last, report.html."""
    output, operations = trainer.directory, trainer.operation_history()
    write_rows(output / results.HISTORY, trainer.history)
    if operations is not None:
        write_record(output / results.OPERATIONS_JSON, operations)
    # The Dice of each image, before and after each way of merging.
    scores = {"dice": result.test, "dice_float32": result.test_float32}
    scores |= {f"dice_{mode}": merged for mode, merged in result.test_merged.items()}
    dice = {title: own.image_dice for title, own in scores.items() if own and own.image_dice}
    rows = [
        {"image": name, **{title: values[index] for title, values in dice.items()}}
        for index, name in enumerate(trainer.data["test"].names)
    ]
    write_rows(output / results.TEST_IMAGES, rows)
    checksum = file_checksum(output / results.HISTORY)
    write_record(output / results.METRICS_JSON, replace(result, history_sha256=checksum))
    write_report(
        output / results.REPORT,
        config=trainer.run_config.to_dict(),
        result=result,
        history=trainer.history,
        operations=operations,
        panels=pictures,
        class_names=["background", *trainer.run_config.data.class_names],
    )
