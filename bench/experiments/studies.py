"""The studies of ``bench.experiments.study``: variants, data sets, seeds, columns of the table."""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from naslora.report.tables import reduce_known
from naslora.results import CLICK_SCORES, Epoch, RunResult
from naslora.sam.shipped import NONE
from naslora.study.summary import mean_and_spread
from naslora.training.resolve import LEARNING_TRAVEL

Settings = dict[str, dict[str, Any]]
"""Fields of RunConfig ("run"), of its data, model, adapter and training, and "fitted"."""
Numbers = dict[str, float | None]
"""The columns of a finished cell."""
Column = Callable[[RunResult, list[Epoch]], float | None]
"""A number of a finished run."""


def _dice(mode: str) -> Column:
    """Test Dice after a merge."""
    return lambda result, _: scores.dice if (scores := result.test_merged.get(mode)) else None


TRAINING: dict[str, Column] = {
    "loss, epochs 2-5": lambda _, history: statistics.mean(e.train_loss for e in history[2:6]),
    "last loss": lambda _, history: history[-1].train_loss,
    "test Dice": lambda result, _: result.test.dice,
    "test IoU": lambda result, _: result.test.iou,
    "Dice after center": _dice("center"),
    "entropy": lambda _, history: history[-1].entropy,
}

CALIBRATED = {"Dice after calibrated": _dice("calibrated")}
LAST_STEP: dict[str, Column] = {
    "Dice of the last step": lambda result, _: result.test_last and result.test_last.dice
}
# Medians over the epochs, because a pause of the machine spoils single ones.
SECONDS: dict[str, Column] = {
    "weights, s an epoch": lambda _, history: statistics.median(e.seconds_weights for e in history),
    "alpha, s an epoch": lambda _, history: reduce_known(
        statistics.median,
        (e.seconds_architecture if e.arch_loss is not None else None for e in history),
    ),
}


def _error(mode: str, held_out: bool = False) -> Column:
    """Mean over the layers of the update's relative error after a merge."""
    name = "held_out_error" if held_out else "update_error"

    def column(result: RunResult, _: list[Epoch]) -> float | None:
        return mean_and_spread([getattr(layer, name) for layer in result.merge[mode].layers])[0]

    return column


def _clicks(score: str, untouched: bool = False) -> Column:
    """A score of a promptable model, after training or before."""

    def column(result: RunResult, _: list[Epoch]) -> float | None:
        scores = result.untouched if untouched else result.test
        return mean_and_spread([(scores.metrics or {})[score]])[0] if scores else None

    return column


PROMPTS: dict[str, Column] = {
    name: _clicks(score, untouched=name.startswith("untouched"))
    for score in CLICK_SCORES
    for name in (score.removeprefix("IoU, "), f"untouched, {score.removeprefix('IoU, ')}")
}

MERGING: dict[str, Column] = {
    "before": lambda result, _: result.test.dice,
    "exact": _dice("exact"),
    "center": _dice("center"),
    "calibrated, 8": _dice("calibrated, 8"),
    "calibrated, 16": _dice("calibrated"),
    "error of exact": _error("exact"),
    "of center": _error("center"),
    "of calibrated, 8": _error("calibrated, 8", held_out=True),
    "of calibrated, 16": _error("calibrated", held_out=True),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """Variants, each trained on every data set with every seed."""

    common: Settings
    variants: dict[str, Settings]
    epochs: dict[str, int]
    """By data set."""
    seeds: int = 5
    """The number of seeds, which are counted from 0."""
    columns: dict[str, Column] = dataclasses.field(default_factory=lambda: TRAINING)
    few_images: int | None = None
    """If given, models are also merged with ``calibrated`` on this number of images."""
    train_images: int | None = None
    """If given, so many of the training images are used, evenly spread, and as large a part of the
    validation images."""
    merges: bool = True
    """Whether the models are merged and scored again."""
    test_images: int | None = None
    """If given, so many of the test images are scored, evenly spread."""
    of_data: dict[str, Settings] = dataclasses.field(default_factory=dict)
    """Settings of single data sets, beside ``common``."""
    reference: str | None = None
    """The variant from which the paired differences of the others are taken, in test Dice. Where
    names start with an encoder or a rate, and a comma, its name without them."""

    gains: tuple[tuple[str, str], ...] = ()
    """Pairs of columns whose differences the table gives with their intervals, too."""

    def reference_of(self, variant: str) -> str | None:
        """The variant from which a variant's paired difference is taken."""
        alike = f"{variant.partition(', ')[0]}, {self.reference}"
        return alike if alike in self.variants else self.reference


def joined(*parts: Settings) -> Settings:
    """Settings of all parts; the last one that gives a field decides."""
    found: Settings = {}
    for part in parts:
        for name, fields in part.items():
            found[name] = found.get(name, {}) | fields
    return found


def _adapter(method: str, **adapter: Any) -> Settings:
    return {"run": {"method": method}, "adapter": adapter}


# Plain LoRA in the fused kernels.
LORA = _adapter("nas-pc-lora", channel_ratio=0.0)

# Encoders: with convolutions, without, and without pre-trained weights.
ENCODERS: dict[str, dict[str, Any]] = {
    "MobileSAM": {"name": "mobile_sam"},
    "vit_t": {"name": "vit_t"},
    "random vit_t": {"name": "vit_t", "checkpoint": NONE},
}

METHODS = {
    "decoder only": _adapter("decoder-only"),
    "LoRA": LORA,
    "Conv-LoRA": _adapter("conv-lora"),
    "NAS-LoRA": _adapter("nas-lora"),
    "NAS-PC-LoRA": _adapter("nas-pc-lora"),
}


# The defaults with which all studies but "recipe" were made.
EARLIER_DEFAULTS: Settings = {
    "adapter": {"target": "qkv"},
    "training": {"learning_rate": 1e-4, "warmup": 0.0},
}
ENCODERS_AT_256 = joined(
    EARLIER_DEFAULTS,
    {"model": {"image_size": 256}, "training": {"learning_rate": 5e-4, "mixed_precision": "no"}},
)
# What was the default before the study "whole-sets": the start of the cell, and its rate.
UNIFORM: Settings = {"adapter": {"cell_init": "identity"}}
SLOW_CELL: Settings = {"training": {"cell_rate": 1.0}}


def _on_encoders(*methods: str) -> dict[str, Settings]:
    """Each method on each encoder, as variants."""
    return {
        f"{encoder}, {method}": joined({"model": model}, METHODS[method])
        for encoder, model in ENCODERS.items()
        for method in methods
    }


DEFAULT_RATE = METHODS | {"LoRA": _adapter("lora")}

SHUFFLED = "neighbours shuffled"
"""How the names of variants end whose cells see their tokens in a random order."""
FROZEN: Settings = {
    "adapter": {"cell_init": "kaiming"},
    "training": {"cell_rate": 0.0, "search_start": 1000},
}


def _rate(rate: float) -> Settings:
    return {"training": {"learning_rate": rate}}


def _controls(rate: float) -> dict[str, Settings]:
    """What the lead of NAS-PC-LoRA at a rate is: a higher rate of LoRA, or its neighbours."""
    variants: dict[str, Settings] = {
        "LoRA": LORA,
        "LoRA, rate x 1.5": joined(LORA, _rate(1.5 * rate)),
        "LoRA, rate x 2": joined(LORA, _rate(2 * rate)),
        "LoRA, lora_alpha 64": joined(LORA, {"adapter": {"lora_alpha": 64.0}}),
        "LoRA, lora_alpha 85": joined(LORA, {"adapter": {"lora_alpha": 85.0}}),
        "LoRA, lora_alpha 160": joined(LORA, {"adapter": {"lora_alpha": 160.0}}),
        "NAS-PC-LoRA": {},
        "annealed from the third epoch on": {"training": {"anneal_epochs": 4}},
        "cell's rate x 1": SLOW_CELL,
        "cell's rate x 0": {"training": {"cell_rate": 0.0}},
        "frozen random cell": FROZEN,
        SHUFFLED: {},
    }
    return {f"{rate:g}, {name}": joined(_rate(rate), own) for name, own in variants.items()}


# Where the adapter is, its rate, and how the rate changes.
TARGETS = ("qkv", "mlp", "qkv+mlp", "all")
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
FROM_LORA = joined(SLOW_CELL, {"adapter": {"skip_lead": 8.0}, "training": {"arch_data": "rotate"}})
# The loss of masks; the first is the default.
LOSSES: dict[str, dict[str, Any]] = {
    "bce, dice": {},
    "focal=20, dice": {"loss": "focal=20,dice=1"},
    "bce, focal_tversky": {"loss": "bce,focal_tversky"},
    "bce, lovasz": {"loss": "bce,lovasz"},
    "structure": {"loss": "structure"},
    "bce, dice, cldice": {"loss": "bce,dice,cldice"},
    "bce, dice, class weights": {"class_weights": "auto"},
}
BOTH = {"LoRA": LORA, "NAS-PC-LoRA": METHODS["NAS-PC-LoRA"]}
# What is changed of the defaults. "travel" is what the fitted rates of all steps add up to.
ONE_CHANGE: dict[str, Settings] = {
    "": {},
    "rate x 2": {"fitted": {"travel": 2 * LEARNING_TRAVEL}},
    "rate x 0.5": {"fitted": {"travel": LEARNING_TRAVEL / 2}},
    "qkv": {"adapter": {"target": "qkv"}},
    "mlp": {"adapter": {"target": "mlp"}},
    "ema 0.1": {"training": {"ema": 0.1}},
}

STUDIES = {
    # What the weights of vit_t in the package are worth, and whether NAS-PC-LoRA gains more over
    # LoRA on an encoder without convolutions.
    "pretrained": Study(
        common=joined(ENCODERS_AT_256, UNIFORM, SLOW_CELL),
        variants=_on_encoders("LoRA", "NAS-PC-LoRA"),
        epochs={"kvasir_seg": 6, "leaf_disease": 6},
        train_images=240,
        reference="LoRA",
    ),
    # All training images, all methods. CrackForest and CamVid were never tuned on.
    "whole-sets": Study(
        seeds=16,
        common=ENCODERS_AT_256,
        variants=_on_encoders(*METHODS)
        | {
            f"{name}, identity, x 1": joined({"model": model}, UNIFORM, SLOW_CELL)
            for name, model in ENCODERS.items()
        },
        epochs={"kvasir_seg": 6, "leaf_disease": 6, "crackforest": 15, "camvid": 6},
        columns=TRAINING | SECONDS,
        reference="LoRA",
    ),
    # The learning rate that a user gets who gives none, on few images: the model is not trained to
    # its end. And five times that rate, at which LoRA ends higher.
    "default-rate": Study(
        common=joined(ENCODERS_AT_256, {"model": ENCODERS["MobileSAM"]}, _rate(1e-4)),
        variants=DEFAULT_RATE
        | {
            f"rate x 5, {method}": joined(DEFAULT_RATE[method], _rate(5e-4))
            for method in ("LoRA", "Conv-LoRA", "NAS-PC-LoRA")
        },
        epochs={"kvasir_seg": 6, "leaf_disease": 6},
        columns=TRAINING | CALIBRATED | SECONDS,
        train_images=240,
        reference="LoRA",
    ),
    # Test Dice before and after merging, then the mean relative error of the layers' updates. That
    # of `calibrated` is on held-out tokens.
    "merging": Study(
        seeds=3,
        common=joined(
            EARLIER_DEFAULTS,
            {"model": {"image_size": 256}, "training": {"batch_size": 2, "arch_fraction": 1.0}},
        ),
        variants={
            f"{title}{', annealed' * (anneal > 0)}": {
                "model": model,
                "training": {"learning_rate": rate, "anneal_epochs": anneal},
            }
            for title, model, rate in (
                ("MobileSAM", ENCODERS["MobileSAM"], 5e-4),
                ("vit_t", ENCODERS["random vit_t"], 1e-3),
            )
            for anneal in (0, 6)
        },
        epochs={"he_nuclei": 24, "brain_deepgrey": 16},
        columns=MERGING,
        few_images=8,
    ),
    "controls": Study(
        common=joined({"model": {"name": "mobile_sam", "image_size": 256}}, EARLIER_DEFAULTS),
        variants=_controls(1e-4) | _controls(5e-4),
        epochs={"kvasir_seg": 6, "leaf_disease": 6},
        columns=TRAINING | CALIBRATED,
        train_images=240,
        reference="LoRA",
    ),
    # Whether the search finds plain LoRA where neighbours say nothing: from closer to LoRA, at
    # LoRA's rate, on images that the epoch's weight steps leave out.
    "search": Study(
        common={"model": {"name": "vit_t", "image_size": 256}, "adapter": {"target": "all"}},
        variants=BOTH | {"from LoRA": FROM_LORA},
        epochs={"kvasir_seg": 6, "crackforest": 15},
        columns=TRAINING | CALIBRATED,
        train_images=240,
        reference="LoRA",
    ),
    # Tuned on none of the sets of the final comparison but the first two. The outlines of 16 images
    # of nuclei, as evidence.md says, stand for thin structures.
    "recipe": Study(
        seeds=3,
        common={
            "model": {"name": "mobile_sam", "image_size": 256},
            "training": {"warmup": 0.1, "ema": 0.1},
        },
        of_data={"nuclei_outlines": {"model": {"image_size": 512}, "training": {"batch_size": 2}}},
        variants={
            f"{target}, {rate:g}, {method}": joined(
                settings, {"adapter": {"target": target}}, _rate(rate)
            )
            for target in TARGETS
            for rate in RATES
            for method, settings in BOTH.items()
        },
        epochs={"kvasir_seg": 6, "leaf_disease": 6, "nuclei_outlines": 16},
        columns=TRAINING | CALIBRATED | LAST_STEP,
        train_images=240,
    ),
    # `naslora train --data DIR`, and the settings that could be better, one changed at a time.
    # CrackForest and CamVid are for looking only: no default was chosen by them.
    "default-command": Study(
        seeds=3,
        common={"model": {"name": "vit_t"}},
        variants={
            f"{method}{name and f', {name}'}": joined(settings, own)
            for name, own in ONE_CHANGE.items()
            for method, settings in BOTH.items()
        }
        | {"from LoRA": FROM_LORA},
        epochs=dict.fromkeys(("kvasir_seg", "leaf_disease", "crackforest", "camvid"), 30),
        columns=TRAINING | SECONDS,
        train_images=240,
        reference="NAS-PC-LoRA",
    ),
    # SAM that stays SAM, against itself before training.
    "prompts": Study(
        seeds=3,
        common={"model": {"name": "mobile_sam", "image_size": 512}, "run": {"task": "promptable"}},
        variants={name: METHODS[name] for name in ("decoder only", "LoRA", "NAS-PC-LoRA")},
        epochs={"he_nuclei": 20, "leaf_disease": 6, "crackforest": 6, "kvasir_seg": 6},
        columns=PROMPTS,
        train_images=24,
        test_images=30,
        merges=False,
        gains=tuple((name, f"untouched, {name}") for name in ("1 click", "box")),
    ),
    # Whether 16 bits cost accuracy, and whether fused attention has a part in it.
    "precision": Study(
        seeds=6,
        common=joined({"model": {"name": "mobile_sam", "image_size": 256}}, METHODS["NAS-PC-LoRA"]),
        variants={
            "float32": {"training": {"mixed_precision": "no"}},
            "bfloat16": {"training": {"mixed_precision": "bf16"}},
            "bfloat16, stock attention": {
                "model": {"attention": "stock"},
                "training": {"mixed_precision": "bf16"},
            },
        },
        epochs={"kvasir_seg": 8, "leaf_disease": 8},
        columns={name: TRAINING[name] for name in ("last loss", "test Dice", "test IoU")},
        train_images=120,
        test_images=100,
        merges=False,
        reference="float32",
    ),
    # Which loss helps on thin foreground (cracks), small (leaves), and rare classes (CamVid).
    "losses": Study(
        seeds=3,
        common=joined(
            {"model": {"name": "vit_t", "image_size": 256}, "training": {"batch_size": 2}},
            LORA,
            _rate(1e-3),
        ),
        variants={name: {"training": training} for name, training in LOSSES.items()},
        epochs={"crackforest": 5, "leaf_disease": 5, "camvid": 5},
        columns={name: TRAINING[name] for name in ("test Dice", "test IoU")},
        train_images=16,
        test_images=16,
        merges=False,
        reference="bce, dice",
    ),
}
