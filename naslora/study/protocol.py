"""The protocol of a comparison: what is tuned and tested on which images. It is fixed first.

protocol.json   everything that was decided; a resumed comparison must have the same
protocol.md     the same in words
images.csv      the images, with their group and their fold, or their split of the data
lists/FOLD/     train.csv, val.csv and test.csv of a fold
    inner-N/    the same for the runs that tune: their test images are of the fold's other images
"""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from naslora.data.datasets import DATASETS, draw_folds, group_members, load_all, write_splits
from naslora.data.images import Sample
from naslora.data.layouts import Splits
from naslora.errors import UserError
from naslora.files import read_json, write_json, write_text
from naslora.records import as_csv
from naslora.study.design import Design, parse_grid
from naslora.study.differences import LEVEL, RESAMPLES
from naslora.trained import with_data
from naslora.training.run_config import DataConfig, RunConfig, differing
from naslora.training.run_data import find_splits, slicing_of

LORA = "lora"
"""The method that others are compared with, if it is among them."""
PROTOCOL = "protocol.json"
IMAGES = "images.csv"
VALIDATION_FOLDS = 10
"""One of so many parts of the images that a drawn run trains on are its validation images."""


class Fold(NamedTuple):
    """Test images, and the data of the runs that they test. None of these runs trains on them."""

    name: str
    """fold-1, ...; empty for the data's own test images."""
    data: DataConfig
    """Of the runs that are tested."""
    inner: Sequence[DataConfig] = ()
    """Of the runs that tune, whose test images are others of the fold's training images."""


class Images(NamedTuple):
    """The images of a comparison."""

    folds: list[Fold]
    lists: dict[Path, Splits]
    """The splits of the folds' data, by folder."""
    samples: dict[str, list[Sample]]
    """All images, by fold, or by split of the data."""
    groups: list[str] | None
    """The group of each test image, fold by fold; None if each image is one of its own."""


# ---- Which images --------------------------------------------------------------------------------


def find_images(config: RunConfig, design: Design, output: Path) -> Images:
    """Draws the folds, and the images of the runs that tune. They do not depend on the runs' seeds.

    Their lists will be in ``output``, the comparison's folder. The recipe is resolved.

    Raises:
        UserError: the data cannot be found, are too few, or have splits of their own.
    """
    data, count, trials = config.data, design.folds, design.inner_folds if design.tune else 0
    most = 1 if count is None else count - 1
    if design.tune and (trials > most or count == 2):
        raise UserError(
            "to tune, --folds must be 3 or more (one is tested, one tunes, the others train), and "
            f"--inner-folds at most {most}"
        )
    if count is None:
        if trials and not DATASETS[data.dataset].drawable:
            raise UserError(f"--tune takes --dataset csv or folders, got {data.dataset}")
        parts = find_splits(config)
        trained = parts["train"] + parts.get("arch", [])
        tested, others = {"": parts["test"]}, {"": [parts["val"], trained]}
    else:
        if data.root is None or data.split is not None:
            raise UserError("--folds draws from the images of --data DIR, without --split")
        how = slicing_of(data)
        drawn = draw_folds(load_all(data.dataset, data.root, "--folds", data.group, how), count)
        tested = parts = {f"fold-{k + 1}": fold for k, fold in enumerate(drawn)}
        others = {name: drawn[k + 1 :] + drawn[:k] for k, name in enumerate(tested)}
    folds, lists = [], {}

    def listed(folder: Path, test: list[Sample], parts: list[list[Sample]]) -> DataConfig:
        """The same data, read from lists in a folder."""
        lists[folder] = _splits(test, parts)
        return with_data(config, folder).data

    for name, test in tested.items():
        folder, rest = output / "lists" / name, others[name]
        own = data if count is None else listed(folder, test, rest)
        inner = [
            listed(folder / f"inner-{k + 1}", rest[k], rest[:k] + rest[k + 1 :])
            for k in range(trials)
        ]
        folds.append(Fold(name, own, inner))
    order = [sample for test in tested.values() for sample in test]
    groups = [sample.group or str(sample.image) for sample in order] if count else None
    return Images(folds, lists, parts, groups)


def _splits(test: list[Sample], parts: Sequence[list[Sample]]) -> Splits:
    """The images of ``parts``, of which some are for validation, beside the test images."""
    rest = [sample for part in parts for sample in part]
    count = min(VALIDATION_FOLDS, len(group_members(rest)))
    val, *train = draw_folds(rest, max(count, 2))
    return {"train": [sample for part in train for sample in part], "val": val, "test": test}


# ---- The files -----------------------------------------------------------------------------------


def make_protocol(
    config: RunConfig, methods: Sequence[str], seeds: Sequence[int], design: Design, images: Images
) -> dict[str, Any]:
    """Everything that is decided before a comparison runs, JSON-ready; the recipe is resolved."""
    return {
        "methods": [*methods],
        "seeds": [*seeds],
        "tune": [*itertools.chain(*design.tune)],
        "trials": len(parse_grid(design.tune)) if design.tune else 0,
        "folds": design.folds,
        "inner_folds": design.inner_folds,
        "images": [len(part) for part in images.samples.values()],
        "images_sha256": hashlib.sha256(_images_csv(images).encode()).hexdigest(),
        "metric": "dice",
        "margin": design.margin,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "recipe": config.to_dict(),
    }


def _images_csv(images: Images) -> str:
    rows = (
        {"image": str(sample.image), "label": str(sample.mask), "group": sample.group, "part": part}
        for part, samples in images.samples.items()
        for sample in samples
    )
    return as_csv([*rows])


def check_protocol(protocol: Mapping[str, Any], output: Path) -> None:
    """Refuses another protocol than that of the comparison in ``output``, if there is one.

    One that neither tunes nor draws folds may get other methods and seeds.
    """
    if not (output / PROTOCOL).is_file():
        return
    free = () if protocol["tune"] or protocol["folds"] else ("methods", "seeds")
    given = {name: value for name, value in protocol.items() if name not in free}
    names = differing(read_json(output / PROTOCOL), given)
    if names:
        raise UserError(
            f"{output} was started with another protocol (it has {', '.join(names)}); resume with "
            "the same one, or start another comparison"
        )


def write_protocol(protocol: Mapping[str, Any], images: Images, output: Path) -> None:
    """Writes the protocol and the lists of images."""
    for folder, splits in images.lists.items():
        write_splits(folder, splits)
    write_text(output / IMAGES, _images_csv(images))
    write_json(output / PROTOCOL, {**protocol})
    lines = "".join(f"- {line}\n" for line in in_words(protocol))
    write_text(output / "protocol.md", f"Written before the first run.\n\n{lines}")


def in_words(protocol: Mapping[str, Any]) -> list[str]:
    """The protocol in sentences."""
    p = {n: " ".join(map(str, v)) if isinstance(v, list) else v for n, v in protocol.items()}
    tested, where = "The data's own test images are tested.", "the validation images"
    if p["folds"]:
        tested = f"Every image is tested once, by runs that train on other folds ({p['images']})."
        where = f"{p['inner_folds']} of the other folds"
    tuned = (
        f"Tuned: {p['tune']}. Each method has {p['trials']} trials a fold, with the first seed. A "
        f"trial is scored on {where}, which it does not train on, and never sees the test images. "
        "The highest Dice is chosen, of equal ones the first."
    )
    return [
        f"Methods: {p['methods']}. Seeds: {p['seeds']}.",
        f"{tested} All images are in {IMAGES} (SHA-256 {p['images_sha256']}).",
        tuned if p["tune"] else "Nothing is tuned.",
        "The score is the mean Dice of the test images. Differences are from "
        f"{LORA}, or else from the first method. The {LEVEL:.0%} interval over the images is a "
        f"percentile bootstrap of {RESAMPLES} resamples of the images, or of their groups.",
        "Equivalence: two one-sided t-tests (TOST) over the images against a difference of "
        f"{p['margin']:g}, at {1 - LEVEL:.0%}.",
        f"All other settings are in {PROTOCOL}.",
    ]
