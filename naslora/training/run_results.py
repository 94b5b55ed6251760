"""The results of a run: the kept epoch scored, merged in every way, scored again, reported."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from naslora.adapter.merging.merged import unmerge
from naslora.errors import UserError
from naslora.files import file_checksum
from naslora.methods import merge, merge_modes
from naslora.records import write_record, write_rows
from naslora.report.pictures import Panel
from naslora.report.run_report import write_report
from naslora.results import (
    HISTORY,
    METRICS_JSON,
    OPERATIONS_JSON,
    REPORT,
    TEST_IMAGES,
    Annealing,
    AnnealingState,
    Epoch,
    MergeResult,
    ParameterCounts,
    RunResult,
    SplitScores,
    kept_epoch,
)
from naslora.training.run_config import RunConfig
from naslora.training.run_data import calibration
from naslora.training.run_examples import Examples
from naslora.training.trainer import Trainer


def final_result(
    trainer: Trainer, counts: ParameterCounts, config: RunConfig
) -> tuple[RunResult, list[Panel]]:
    """Scores the kept epoch on the test split, and again after each way of merging.

    Args:
        trainer: a finished trainer whose model holds the kept epoch's adapter.
        counts: the model's parameters.
        config: the run.

    Returns:
        The result, and the worst and best test images for the report; none but in the main process.
    """
    started = time.perf_counter()
    kept = kept_epoch(trainer.history, config.training.keep)
    test = trainer.evaluate("test", config.data.metrics or ())
    main = trainer.accelerator.is_main_process
    examples = (
        Examples(trainer.model, trainer.data["test"], test, trainer.accelerator) if main else None
    )
    merges = _try_merges(trainer, config, examples)
    training = sum(epoch.seconds.total for epoch in trainer.history)
    result = RunResult(
        test=test,
        val=SplitScores(kept.val_loss, kept.val_dice, kept.val_iou, kept.val_accuracy),
        kept_epoch=kept.epoch,
        trainable_parameters=counts.trainable,
        parameters=counts,
        images={split: len(data) for split, data in trainer.data.items()},
        test_merged=merges[0] if merges else None,
        merge=merges[1] if merges else None,
        annealing=merges[2] if merges else None,
        seconds=training + time.perf_counter() - started,
    )
    return result, examples.panels if examples else []


def tracked_scores(result: RunResult) -> dict[str, float]:
    """The known test scores by name, for experiment trackers."""
    merged = {f"test_{mode}": scores for mode, scores in (result.test_merged or {}).items()}
    return {
        f"{split}_{name}": value
        for split, scores in {"test": result.test, **merged}.items()
        for name in ("dice", "iou", "accuracy")
        if scores is not None and (value := getattr(scores, name)) is not None
    }


def _try_merges(
    trainer: Trainer, config: RunConfig, examples: Examples | None
) -> tuple[dict[str, SplitScores], dict[str, MergeResult], Annealing | None] | None:
    """Merges in every way, scores each, and takes it back; None if the method cannot be merged."""
    modes = merge_modes(config.method, config.adapter)
    if not modes:
        return None
    scores: dict[str, SplitScores] = {}
    results: dict[str, MergeResult] = {}
    annealing = None
    samples = {split: data.samples for split, data in trainer.data.items()}
    for mode in modes:
        batches = calibration(config, samples, mode, trainer.accelerator.device)
        try:
            report = merge(trainer.model, mode, batches)
        except UserError as error:  # for example too few images for the mode; the others go on
            results[mode] = MergeResult(refused=str(error))
            continue
        scores[mode] = trainer.evaluate("test", config.data.metrics or ())
        if examples is not None:
            examples.add_merged(mode, trainer.model, scores[mode])
        if mode == "center" and config.training.anneal_epochs:
            annealing = _annealing(trainer)
        results[mode] = MergeResult(report.mode, report.source, report.layers, report.warning)
        unmerge(trainer.model)
    return scores, results, annealing


def _annealing(trainer: Trainer) -> Annealing:
    """What annealing cost; the model is merged with mode ``center`` now."""

    def state(epoch: Epoch) -> AnnealingState:
        scores = epoch.val_loss, epoch.val_dice, epoch.val_iou
        return AnnealingState(epoch.epoch, epoch.spatial, *scores)

    def kept(spatial: float) -> Epoch | None:
        epochs = [epoch for epoch in trainer.history if epoch.spatial == spatial]
        return kept_epoch(epochs, trainer.config.keep) if epochs else None

    before, after = kept(spatial=1), kept(spatial=0)
    assert after is not None  # the last epoch of annealing has no share of the neighbours left
    merged = trainer.evaluate("val")
    return Annealing(
        before=None if before is None else state(before),
        during=[state(epoch) for epoch in trainer.history if 0 < epoch.spatial < 1],
        after=state(after),
        merged=AnnealingState(val_loss=merged.loss, val_dice=merged.dice, val_iou=merged.iou),
    )


def write_results(
    trainer: Trainer, result: RunResult, panels: list[Panel], config: RunConfig, output: Path
) -> None:
    """Writes history.csv, operations.json, test_images.csv, metrics.json and, last, report.html."""
    operations = trainer.operation_history()
    write_rows(output / HISTORY, trainer.history)
    if operations is not None:
        write_record(output / OPERATIONS_JSON, operations)
    write_rows(output / TEST_IMAGES, _image_rows(trainer.data["test"].names, result))
    checksum = file_checksum(output / HISTORY)
    write_record(output / METRICS_JSON, dataclasses.replace(result, history_sha256=checksum))
    write_report(
        output / REPORT,
        config=config.to_dict(),
        result=result,
        history=trainer.history,
        operations=operations,
        panels=panels,
        class_names=["background", *config.data.class_names],
    )


def _image_rows(names: Sequence[str], result: RunResult) -> list[dict[str, str | float | None]]:
    """The rows of test_images.csv: the Dice of each image, before and after each way of merging."""
    scores = {"dice": result.test} | {
        f"dice_{mode}": merged for mode, merged in (result.test_merged or {}).items()
    }
    columns = {
        title: own.image_dice for title, own in scores.items() if own is not None and own.image_dice
    }
    return [
        {"image": name} | {title: dice[index] for title, dice in columns.items()}
        for index, name in enumerate(names)
    ]
