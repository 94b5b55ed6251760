"""The demo: a small SAM learns the tissues of the MNI152 brain on a CPU, in minutes."""

from pathlib import Path

from naslora.adapter.config import NASLoRAConfig
from naslora.data.demo_data import write_mni152
from naslora.locks import locked
from naslora.results import RunResult
from naslora.sam.shipped import NONE
from naslora.training.run import check_output, train
from naslora.training.run_config import RunConfig
from naslora.training.search_config import SearchConfig

EPOCHS = 24  # in four minutes on two cores


def run_demo(output: Path, epochs: int, seed: int, resume: bool) -> RunResult:
    """Writes the data to ``output/data`` and the run to ``output``.

    The encoder is a ``vit_t`` with random, frozen weights, because those in the package scored less
    on these slices (docs/experiments.md). The adapters and the decoder learn, at a rate that suits
    a run this short.

    Returns:
        The content of metrics.json.

    Raises:
        UserError: as ``train``; nilearn, whose package holds the images, is not installed.
    """
    config = RunConfig(
        dataset="mni152",
        root=output / "data",
        model="vit_t",
        checkpoint=Path(NONE),
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
    with locked(output):
        check_output(config, output, resume)
        write_mni152(output / "data")
        return train(config, output, resume)
