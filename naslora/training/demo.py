"""The demo: a small SAM learns the tissues of the MNI152 brain on a CPU, in minutes."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from naslora.adapter.config import NASLoRAConfig
from naslora.data.demo_data import write_mni152
from naslora.locks import locked
from naslora.results import RunResult
from naslora.sam.shipped import NONE
from naslora.training.run import check_output, train
from naslora.training.run_config import RunConfig
from naslora.training.search_config import SearchConfig

EPOCHS = 10
RANDOM = "random-encoder"  # folder of the second run


class DemoResults(NamedTuple):
    """The two runs of the demo: the content of metrics.json of each."""

    pretrained: RunResult
    """From the weights in the package."""
    random: RunResult
    """From a random encoder."""


def run_demo(output: Path, epochs: int, seed: int, resume: bool) -> DemoResults:
    """Writes the data to ``output/data`` and the run to ``output``.

    A second run, in ``output/random-encoder``, differs in one thing: its encoder is random. In both
    the encoder is a frozen ``vit_t``. The adapters and the decoder learn, at a rate that suits runs
    this short.

    Raises:
        UserError: as ``train``; nilearn, whose package holds the images, is not installed.
    """
    pretrained = RunConfig(
        dataset="mni152",
        root=output / "data",
        model="vit_t",
        image_size=256,
        num_classes=3,
        class_names=("grey matter", "white matter"),
        adapter=NASLoRAConfig(seed=seed),
        search=SearchConfig(
            epochs=epochs,
            search_start=epochs // 3,
            learning_rate=1e-3,
            mixed_precision="no",  # the scores of the README are the same on every CPU
        ),
    )
    random = dataclasses.replace(pretrained, checkpoint=Path(NONE))
    with locked(output):
        check_output(pretrained, output, resume)
        write_mni152(output / "data")
        return DemoResults(
            train(pretrained, output, resume), train(random, output / RANDOM, resume)
        )
