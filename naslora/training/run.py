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
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from naslora.choices import Tracker
from naslora.errors import UserError, one_line, warn
from naslora.files import is_temporary, write_json
from naslora.locks import locked
from naslora.methods import load_adapter
from naslora.results import CONFIG, DATA, RunResult, adapter_folder
from naslora.sam.families import find_family
from naslora.sam.shipped import NONE, SHIPPED_SIZE
from naslora.training.accelerator import (
    check_shared,
    in_main_process,
    lost_processes,
    make_accelerator,
)
from naslora.training.resolve import SHIPPED, read_config, resolve
from naslora.training.run_config import RunConfig, differing
from naslora.training.run_data import prepare_data
from naslora.training.run_model import (
    build_adapted_model,
    build_frozen_model,
    count_parameters,
    frozen_dtype,
)
from naslora.training.run_results import final_result, tracked_scores, write_results
from naslora.training.trackers import check_trackers, log, tracked
from naslora.training.trainer import Trainer


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
        data, contents = prepare_data(config, accelerator, output / DATA if resume else None)
        model = build_adapted_model(config)
        counts = count_parameters(model)
        trainer = Trainer(model, data, config, output, accelerator)
        if accelerator.is_main_process:
            _warn(config, bool(trainer.alphas))
        if resume:
            trainer.resume()
        values = config.to_dict()
        if accelerator.is_main_process:
            write_json(output / CONFIG, values)
            write_json(output / DATA, dict(contents))
        check_shared(output / DATA, accelerator)
        stack.enter_context(tracked(accelerator, trackers, output, values, trainer.epoch + 1))
        trainer.run()
        last = trainer.evaluate("test", config.data.metrics or ()) if trainer.average else None
        if frozen_dtype(config.training) != torch.float32:
            # Merging adds the update to the frozen weights, so it needs all their digits.
            trainer.model = build_frozen_model(config).to(accelerator.device)
        load_adapter(trainer.model, adapter_folder(output))
        result, panels = final_result(trainer, counts)
        result = replace(result, test_last=last)
        log(accelerator, tracked_scores(result), trainer.epoch)
        if accelerator.is_main_process:
            write_results(trainer, result, panels, output)
        accelerator.wait_for_everyone()
        return result


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
    if resume and (output / CONFIG).is_file():
        stored = read_config(output / CONFIG)
        names = differing(stored.to_dict(), config.to_dict())
        if names:
            raise UserError(
                f"{output} was started with another configuration (it has "
                f"{', '.join(names)}); resume with the same one"
            )
        return
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file; choose another --output")
    # The demo keeps its data inside the run's folder.
    root = config.data.root
    own_data = "data" if root and root.resolve() == (output / "data").resolve() else None
    if output.is_dir() and any(
        path.name != own_data and not is_temporary(path) for path in output.iterdir()
    ):
        advice = "" if resume else ", or add --resume to continue the run in it"
        what = "holds files, but no run" if resume else "exists and is not empty"
        raise UserError(f"{output} {what}; choose another --output{advice}")
