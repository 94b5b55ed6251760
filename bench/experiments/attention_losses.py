"""50 weight steps on stock and on fused attention, in bf16 beside float32: the losses.

python -m bench.experiments.attention_losses DATA mobile_sam.safetensors --save losses.csv

Each step takes two training images of DATA/kvasir_seg, at 256 x 256 pixels, with adapters on every
attn.qkv. ViT-B has random weights.
"""

from pathlib import Path

import torch
import tyro

from bench.models import Candidate, Setting, adapted, with_fused_attention
from naslora.data.dataset import SegmentationDataset as Dataset
from naslora.data.layouts import read_rows
from naslora.records import write_rows
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import build_model
from naslora.sam.shipped import NONE

STEPS, BATCH, SIZE = 50, 2, 256
FORMS = {"float32": ("no", False), "bf16, stock": ("bf16", False), "bf16, fused": ("bf16", True)}


def losses(name: str, checkpoint: str | Path, images: Dataset, form: str) -> list[float]:
    """The loss before each step. ``form`` is one of ``FORMS``; float32 is on stock attention."""
    precision, fused = FORMS[form]
    torch.manual_seed(0)
    base = build_model(name, SIZE, checkpoint=checkpoint)
    model = adapted("nas-pc-lora", with_fused_attention(base) if fused else base)
    if fused:  # as naslora train does
        cast_frozen(model.image_encoder, torch.bfloat16)
    candidate, found = Candidate("nas-pc-lora", model, Setting(name, SIZE, BATCH, precision)), []
    for step in range(STEPS):
        items = [images[BATCH * step + i] for i in range(BATCH)]
        candidate.images = torch.stack([item["image"] for item in items])
        candidate.masks = torch.stack([item["mask"] for item in items])
        with torch.no_grad():
            found.append(float(candidate.loss()))
        candidate.weight_step()
    return found


def main(data: tyro.conf.Positional[Path], weights: tyro.conf.Positional[Path], save: Path) -> None:
    """Writes a row for each step, and prints the mean distance to float32.

    Args:
        data: folder of the data sets' folders.
        weights: MobileSAM's checkpoint.
        save: CSV file.
    """
    samples = read_rows(data / "kvasir_seg" / "train.csv")[: STEPS * BATCH]
    images = Dataset(samples, num_classes=1, image_size=SIZE)
    rows = []
    for name, checkpoint in (("mobile_sam", weights), ("vit_b", NONE)):
        found = {form: torch.tensor(losses(name, checkpoint, images, form)) for form in FORMS}
        for step, values in enumerate(zip(*found.values(), strict=True), 1):
            numbers = {form: f"{value:.5f}" for form, value in zip(FORMS, values, strict=True)}
            rows.append({"model": name, "step": step, **numbers})
        for form, values in found.items():
            apart = (values - found["float32"]).abs().mean()
            print(f"{name}, {form}: {apart:.4f}; last ten steps {values[-10:].mean():.3f}")
    write_rows(save, rows)


if __name__ == "__main__":
    tyro.cli(main)
