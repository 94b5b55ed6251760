"""What the examples share: a SAM, images with masks, and the options that replace the tiny ones."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from segment_anything import modeling, sam_model_registry

SIZE = 64  # of the synthetic images, in pixels


def arguments(description, output, hosts=()):
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", help="of SAM ViT-B; without it the SAM is tiny and random")
    parser.add_argument("--data", type=Path, help="folder of images/ and masks/, equal file names")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", default=output)
    if hosts:
        parser.add_argument("--host", choices=hosts, default=hosts[0])
    return parser.parse_args()


def build_sam(checkpoint=None, masks=3):
    """SAM ViT-B from a checkpoint, or a SAM with 4 x 4 tokens on images of 64 x 64 pixels."""
    if checkpoint:
        return sam_model_registry["vit_b"](checkpoint=checkpoint)
    encoder = modeling.ImageEncoderViT(
        SIZE, 16, embed_dim=32, depth=2, num_heads=2, out_chans=32, use_rel_pos=True, window_size=3
    )
    transformer = modeling.TwoWayTransformer(1, embedding_dim=32, num_heads=2, mlp_dim=64)
    return modeling.Sam(
        encoder,
        modeling.PromptEncoder(32, (4, 4), (SIZE, SIZE), mask_in_chans=4),
        modeling.MaskDecoder(
            transformer_dim=32, transformer=transformer, num_multimask_outputs=masks
        ),
    )


def load_data(folder=None, size=SIZE):
    """Images (N, 3, size, size) in 0..255 and masks (N, size, size) in {0, 1}.

    Without a folder: bright squares on noise. In files, every mask value above 127 is the object.
    """
    if folder is None:
        masks = torch.zeros(16, size, size)
        for mask in masks:
            top, left = torch.randint(0, size // 2, (2,)).tolist()
            mask[top : top + size // 2, left : left + size // 2] = 1
        return 150 * masks[:, None] + 50 * torch.rand(16, 3, size, size), masks
    files = sorted((folder / "images").iterdir())
    images = [np.array(Image.open(f).convert("RGB").resize((size, size))) for f in files]
    masks = [Image.open(folder / "masks" / f.name).convert("L").resize((size, size)) for f in files]
    pixels = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float()
    return pixels, torch.tensor(np.stack([np.array(mask) > 127 for mask in masks])).float()
