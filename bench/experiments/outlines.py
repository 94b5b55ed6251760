"""A small data set of thin structures: the outlines of the nuclei of a data set of label images.

    python -m bench.experiments.outlines DSB_NUCLEI OUTPUT

The foreground is the pixels on both sides of a change of label. Few images, evenly spread, are
taken, because thin structures with many images are learned by every method.
"""

from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from scipy import ndimage

from naslora.data.layouts import read_csv
from naslora.records import write_rows

IMAGES = {"train": 16, "val": 10, "test": 60}
CROSS = ndimage.generate_binary_structure(2, 1)


def main(source: tyro.conf.Positional[Path], output: tyro.conf.Positional[Path]) -> None:
    """Writes train.csv, val.csv, test.csv and the masks.

    Args:
        source: a folder with such CSV files, whose masks number the objects of an image.
        output: the new folder.
    """
    (output / "masks").mkdir(parents=True)
    for split, samples in read_csv(source).items():
        count = IMAGES[split]
        rows = []
        for sample in (samples[i * len(samples) // count] for i in range(count)):
            mask = (output / "masks" / sample.mask.name).with_suffix(".png").resolve()
            labels = np.asarray(Image.open(sample.mask)).astype(int)
            edge = ndimage.morphological_gradient(labels, footprint=CROSS) > 0
            Image.fromarray(255 * edge.astype(np.uint8)).save(mask)
            rows.append({"image": str(sample.image.resolve()), "label": str(mask)})
        write_rows(output / f"{split}.csv", rows)


if __name__ == "__main__":
    tyro.cli(main)
