"""Distils a SAM's image encoder into a plain ViT, as was done for the weights in the package.

    python -m bench.experiments.distill --teacher mobile_sam --checkpoint mobile_sam.safetensors \\
        --photographs DIR --also KVASIR LEAF --output runs/distill

The student learns to give the teacher's embedding of random crops of images, which need no masks.
The prompt encoder and the mask decoder are the teacher's. The held-out photographs are scored after
every pass over the images, with the mean of the student's weights: ``OUTPUT/history.csv`` has the
cosine similarity of their embeddings to the teacher's. ``OUTPUT/MODEL.safetensors`` has the weights
with the highest one. It is a checkpoint that ``naslora train --checkpoint`` loads.

An embedding of the teacher is computed once for every crop and kept in ``OUTPUT/teacher``. Every
random choice is a function of the seed, the epoch and the image, so that ``--resume`` continues an
interrupted run as if it had not been interrupted.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
import tyro

from bench.experiments.distillation import Distillation, Pass, Settings
from naslora.errors import UserError
from naslora.exits import fail, refusal, signals
from naslora.files import is_temporary, read_json, write_json
from naslora.locks import locked
from naslora.report.tables import Table, markdown_table
from naslora.training.run_config import differing

CONFIG = "config.json"


def distill(
    settings: tyro.conf.OmitArgPrefixes[Settings], output: Path, resume: bool = False
) -> None:
    """Distils a SAM's image encoder into a plain ViT, and prints the passes as Markdown.

    Args:
        settings: the distillation.
        output: folder for the results; new or empty.
        resume: continue the interrupted distillation in the output, with the same arguments.

    Raises:
        UserError: as ``Distillation``; the output is not empty, or was started with other settings.
    """
    with locked(output):
        _check_output(settings, output, resume)
        distillation = Distillation(settings, output)
        write_json(output / CONFIG, _as_json(settings))
        distillation.resume()
        distillation.run()
    print(_table(distillation.history))


def _table(history: list[Pass]) -> str:
    """The passes in Markdown."""
    rows = [[str(p.views), f"{p.loss:.3f}", f"{p.similarity:.3f}"] for p in history]
    return markdown_table(Table(["views", "loss", "similarity"], rows))


def _as_json(settings: Settings) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return json.loads(json.dumps(values, default=lambda path: str(path.resolve())))


def _check_output(settings: Settings, output: Path, resume: bool) -> None:
    if resume and (output / CONFIG).is_file():
        names = differing(read_json(output / CONFIG), _as_json(settings))
        if names:
            raise UserError(
                f"{output} was started with other settings (it has {', '.join(names)}); resume "
                "with the same ones"
            )
    elif output.is_dir() and any(not is_temporary(path) for path in output.iterdir()):
        raise UserError(f"{output} is not empty; choose another --output, or add --resume")


def main() -> None:
    """Runs the command. What the user or the machine refuses becomes one line of text."""
    try:
        with signals():
            tyro.cli(distill)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("interrupted; --resume continues the distillation", 130, kind="")
    except (MemoryError, RuntimeError, OSError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        fail(reason)


if __name__ == "__main__":
    if os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    main()
