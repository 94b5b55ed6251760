"""The demo: a small SAM learns the tissues of the MNI152 brain on a CPU, in minutes."""

from pathlib import Path

from naslora.data.demo_data import write_mni152
from naslora.locks import locked
from naslora.results import RunResult
from naslora.sam.shipped import NONE
from naslora.training.resolve import resolve
from naslora.training.run import check_output, train
from naslora.training.run_config import DataConfig, ModelConfig, RunConfig, TrainConfig

WINDOW = 64  # pixels of a slice, which the network sees enlarged to 256


def run_demo(output: Path, epochs: int, seed: int, resume: bool, random: bool) -> RunResult:
    """Writes the data to ``output/data`` and the run to ``output``.

    The model is the pre-trained ``vit_t`` in the package, or one with a random encoder and decoder.
    The encoder stays frozen; the adapters and the decoder learn, at a rate that suits a run this
    short. A token of the encoder covers 16 pixels, more than the folds of the brain are wide. So
    the network sees enlarged windows of the slices.

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
            crop=WINDOW,
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
