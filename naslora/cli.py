"""The command line, ``naslora COMMAND``: each command is a function of this file.

The docstring of a command is its help, also of its options. A command imports the modules that run
it, so that help and short commands import none of them.
"""

import contextlib
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

import naslora
from naslora import choices
from naslora.adapter.merging.report import MergeMode
from naslora.allocator import keep_freed_memory
from naslora.arguments import deferred, meant, parse
from naslora.data.rasters import OutputConfig
from naslora.errors import UserError, one_line
from naslora.exits import guarded
from naslora.locks import locked
from naslora.methods import MethodName
from naslora.records import to_json
from naslora.sam.instance_config import InstanceConfig
from naslora.sam.shipped import describe_shipped
from naslora.study.design import Design, Launch
from naslora.training.run_config import MetricName, Resolution, RunConfig
from naslora_kernels import available_backends, build_info

T = TypeVar("T")
# Without a name, the headings of the help are those of the fields: "data options".
Flat = Annotated[T, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="")]
Positional = tyro.conf.Positional
OUTPUT = tyro.conf.arg(help="Folder for the results; new or empty.")
RESUME = tyro.conf.arg(help="Continue the interrupted run in --output, with the same arguments.")
TRUST = tyro.conf.arg(help="Load a .pt2 file, although it can run any code on this machine.")
RUN = tyro.conf.arg(metavar="RUN", help="Folder of a run, or of a merged model.")


def main() -> None:
    """Runs a command, as ``guarded``."""
    known = commands().items()
    guarded(_run, [name for name, own in known if "resume" in inspect.signature(own).parameters])


def commands() -> dict[str, Callable[..., None]]:
    """The functions of this file that are commands, by their names."""
    own = [f for f in globals().values() if inspect.isfunction(f) and f.__module__ == __name__]
    return {f.__name__: f for f in own if f not in (main, commands, _run)}


def _run(arguments: list[str]) -> None:
    named = commands()
    name = arguments[0] if arguments else "--help"
    if name in named:
        command = parse(named[name], arguments[1:])
        keep_freed_memory()
        command()
    elif name == "--version":
        print(f"naslora {naslora.__version__}")
    elif name in ("-h", "--help"):
        streams = contextlib.redirect_stdout(sys.stdout if arguments else sys.stderr)
        with streams, contextlib.suppress(SystemExit):
            tyro.extras.subcommand_cli_from_dict(
                {name: deferred(command, RunConfig()) for name, command in named.items()},
                prog="naslora",
                description="Fine-tune the Segment Anything Model with NAS-LoRA.",
                args=["--help"],
            )
        raise SystemExit(0 if arguments else 2)
    else:
        raise UserError(f"there is no command {name}; {meant(name, named)}see naslora --help")


def demo(
    output: Annotated[Path, OUTPUT],
    epochs: int = choices.DEMO_EPOCHS,
    seed: int = 0,
    resume: Annotated[bool, RESUME] = False,
    random: bool = False,
) -> None:
    """Segment grey and white matter of the MNI152 brain: train, test, merge, report.

    Args:
        epochs: Epochs of training.
        seed: Seed of the run.
        random: Start from random weights, not from those in the package.
    """
    from naslora.report.run_report import print_summary
    from naslora.training.run import run_demo

    print_summary(run_demo(output, epochs, seed, resume, random), output)


def train(
    config: Flat[RunConfig],
    output: Annotated[Path, OUTPUT],
    resume: Annotated[bool, RESUME] = False,
    tracker: tuple[choices.Tracker, ...] = ("tensorboard",),
) -> None:
    """Fine-tune SAM on your images, then test, merge and report.

    Args:
        tracker: Experiment trackers that get the numbers of every epoch.
    """
    from naslora.report.run_report import print_summary
    from naslora.training import run

    print_summary(run.train(config, output, resume, tracker), output)


def compare(
    config: Flat[RunConfig],
    methods: tuple[MethodName, ...],
    design: Flat[Design],
    launch: Flat[Launch],
    output: Annotated[Path, OUTPUT],
    seeds: tuple[int, ...] = (0,),
    resume: bool = False,
) -> None:
    """Train several methods under one recipe; write tables and a report of quality and cost.

    Args:
        methods: The methods, one a row.
        seeds: Seeds of each method's runs.
        resume: Keep the finished runs in --output, and continue the others.
    """
    from naslora.study import compare as studies

    with locked(output):
        studies.compare(config, methods, seeds, output, resume, design, launch)
    print(f"look at {output / 'report.html'}")


def ablate(
    name: Annotated[choices.AblationName, Positional, tyro.conf.arg(metavar="WHAT")],
    config: Flat[RunConfig],
    launch: Flat[Launch],
    output: Annotated[Path, OUTPUT],
    seeds: tuple[int, ...] = (0, 1, 2),
    resume: bool = False,
) -> None:
    """Vary operations, rank, blocks, the start of alpha or the channel ratio; write the table.

    Args:
        name: The setting to vary.
        seeds: Seeds of each row's runs.
        resume: Keep the finished runs in --output, also those of other ablations.
    """
    from naslora.study import compare as studies

    with locked(output):
        table = studies.ablate(name, config, seeds, output, resume, launch)
    print(table, end="")


def evaluate(
    path: Annotated[Path, Positional, RUN],
    search: Flat[InstanceConfig],
    split: str = "test",
    data: Path | None = None,
    resolution: Resolution | None = None,
    metrics: tuple[MetricName, ...] | None = None,
    flips: bool = False,
    instances: bool = False,
    objects: choices.ObjectSource | None = None,
) -> None:
    """Print a model's metrics on a split as JSON.

    Args:
        split: The split to score.
        data: Another CSV data folder; default: the run's own data.
        resolution: Size to score at: the model's, or each mask's; default: the run's setting.
        metrics: Further metrics, as in train --help-all; default: the run's own.
        flips: Average an image's scores with those of its mirror images.
        instances: Score the objects that predict --instances finds: AP50, AP from 50 to 95, and
            panoptic quality. The model may also be one that predict --instances takes.
        objects: What an object is, for --instances, as in train --help-all.
    """
    scores: object
    if instances:
        from naslora.instances import evaluate_instances

        scores = evaluate_instances(path, split, data, objects, search)
    else:
        from naslora import trained

        scores = trained.evaluate_run(path, split, data, resolution, metrics, flips)
    print(json.dumps(to_json(scores), indent=2))


def analyse(
    runs: Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="RUN")],
    output: Annotated[Path, OUTPUT],
    images: int = 100,
) -> None:
    """Compare a run's encoder with the frozen one and a random one; show convergence by seed.

    Args:
        runs: Run folders that differ only in their seed.
        images: Test images to measure encoders on.
    """
    from naslora.study import analysis

    with locked(output, folder=False):
        analysis.analyse(runs, output, images)
    print(f"look at {output / 'report.html'}")


def predict(
    path: Annotated[Path, Positional, tyro.conf.arg(metavar="MODEL")],
    inputs: Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="IMAGE")],
    search: Flat[InstanceConfig],
    outputs: Flat[OutputConfig],
    output: Path,
    skip_errors: bool = False,
    tiles: choices.TileSize | None = None,
    overlap: float = choices.OVERLAP,
    trust: Annotated[bool, TRUST] = False,
    overwrite: bool = False,
    batch_size: int = 1,
    resume: bool = False,
    instances: bool = False,
) -> None:
    """Segment images; write a mask and an overlay for each.

    Args:
        path: Folder of a run or of a merged model, or an exported file.
        inputs: Images, or folders.
        output: Folder for masks and overlays.
        skip_errors: Go on past images that cannot be read, list them at the end, and exit with 1.
        tiles: Side of overlapping tiles, in an image's pixels, for large images; auto takes the
            windows of --crop, or else --image-size. Without it images are segmented whole.
        overlap: Share of a tile that neighbours have in common, at most 0.5.
        overwrite: Replace masks and overlays that exist.
        batch_size: Whole images at once.
        resume: Leave out the images that manifest.csv lists as done.
        instances: Find every object with a promptable model, or with SAM: write label images, in
            which each object has its number, and instances.json, with their masks and scores.
    """
    from naslora import prediction

    errors: list[UserError] = []
    on_error = errors.append if skip_errors else None
    written = prediction.predict_run(
        path,
        inputs,
        output,
        on_error,
        tiles,
        overlap,
        trust,
        overwrite,
        search if instances else None,
        outputs,
        batch_size,
        resume,
    )
    kinds = "masks and overlays" if outputs.overlays else "masks"
    print(f"wrote {len(written)} {kinds} to {output}")
    for error in errors:
        print(f"naslora: skipped: {one_line(str(error))}", file=sys.stderr)
    if errors:
        raise SystemExit(1)


def annotate(
    path: Annotated[Path, Positional, tyro.conf.arg(metavar="MODEL")],
    inputs: Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="IMAGE")],
    search: Flat[InstanceConfig],
    output: Path,
    port: int = 8080,
    browser: bool = True,
) -> None:
    """Label objects by clicks on a local page; save them as a data set for train.

    Args:
        path: Folder of a promptable run or of its merged model, an exported file, a checkpoint of
            SAM, or vit_t.
        inputs: Images, or folders.
        output: Folder of the data set, new or with images labelled before.
        port: Port of the page.
        browser: Open the page in your browser.
    """
    from naslora import annotate

    annotate.annotate(path, inputs, output, port, search, browser)


def merge(
    path: Annotated[Path, Positional, tyro.conf.arg(metavar="RUN")],
    output: Annotated[Path, OUTPUT],
    mode: MergeMode = "exact",
    max_error: float | None = None,
    images: int = choices.CALIBRATION_IMAGES,
) -> None:
    """Fold the trained adapters into the weights and write the model.

    Args:
        path: Folder of a run.
        mode: exact: no loss, a small convolution stays. center: plain SAM layers, only the cell's
            centre taps. calibrated: plain SAM layers, fitted to training images.
        max_error: Refuse if a layer's relative error of the update is larger than this.
        images: Number of training images that mode calibrated is fitted to.
    """
    from naslora import trained

    print(f"scoring the validation images, merging ({mode}), and scoring again", file=sys.stderr)
    report, before, after = trained.merge_run(path, mode, output, max_error, images)
    print(report)
    if before.dice is not None and after.dice is not None:
        print(f"Dice on the validation images: {before.dice:.4f} before, {after.dice:.4f} after")
    print(f"wrote {output / 'model.safetensors'}")


def export(
    path: Annotated[Path, Positional, tyro.conf.arg(metavar="MERGED")],
    output: Path,
    format: choices.Format = "onnx",
    part: choices.Part = "model",
    quantize: choices.Quantize | None = None,
    max_loss: float = choices.MAX_LOSS,
    images: int = choices.CALIBRATION_IMAGES,
) -> None:
    """Write a merged model for another runtime.

    Args:
        path: Folder of a merged model.
        output: The file: .onnx, .xml, .safetensors or .pt2; for others a folder.
        format: onnx, openvino, torch-export: images to class scores. tensorrt: ONNX for trtexec.
            coreml: a .mlpackage folder, for one image at a time. safetensors: the state dict that
            the model's original code loads. huggingface: the folder that transformers loads. These
            two need a model merged with center or calibrated. x-anylabeling, samexporter: a folder
            with SAM's encoder and its decoder of prompts, for annotation tools.
        part: The whole model, or the image encoder alone.
        quantize: For onnx and openvino. int8: compute with 8 bits, fitted to training images.
            float16: store the weights in 16 bits, which halves the file.
        max_loss: Refuse if --quantize loses more Dice on the validation images.
        images: Number of training images that int8 is fitted to.
    """
    from naslora import trained

    dice = trained.export_run(path, format, output, part, quantize, max_loss, images)
    if dice is not None:
        print(f"Dice on the validation images: {dice[0]:.4f} before, {dice[1]:.4f} in {quantize}")
    print(f"wrote {output}")


def benchmark(
    paths: Annotated[tuple[Path, ...], Positional, tyro.conf.arg(metavar="MODEL")],
    output: Annotated[Path, OUTPUT],
    data: Path | None = None,
    images: int = 32,
    batch_size: int = 1,
    trust: Annotated[bool, TRUST] = False,
) -> None:
    """Compare models and runtimes on this machine: speed, latency, memory and Dice.

    Args:
        paths: Folders of runs or merged models; exported files.
        data: A CSV data folder; default: the data of the first folder.
        images: Number of test images.
        batch_size: Images at once.
    """
    from naslora import benchmark

    with locked(output):
        print(benchmark.benchmark(paths, output, data, images, batch_size, trust))
    print(f"look at {output / 'benchmark.png'}")


def models() -> None:
    """List the models, the --checkpoint of each, image sizes, and the licences of the weights."""
    from naslora.sam.families import FAMILIES

    for family in FAMILIES:
        sizes = f"image sizes are multiples of {family.multiple}"
        print(f"{family.title}: {sizes}; {family.licence}; {family.home}")
        for name in family.models:
            print(f"  {name:<14}{family.weights.get(name, 'its weights are in the package')}")


def info() -> None:
    """Print versions, compiled parts, usable kernel backends, and the weights in the package."""
    found = {
        "build": build_info(),
        "backends": available_backends(),
        "weights": describe_shipped(),
    }
    print(json.dumps(found, indent=2))
