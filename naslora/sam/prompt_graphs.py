"""ONNX graphs of a promptable SAM for annotation tools: its encoder, and its decoder of prompts.

Names and shapes are those of samexporter. Tools differ in how they resize images, which the graphs
follow.
"""

import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from segment_anything.utils.onnx import SamOnnxModel
from torch import Tensor, nn

from naslora.choices import Tool
from naslora.files import replaced_folder, write_text
from naslora.sam.decoder import EMBED_DIM
from naslora.sam.export import Description, check_merged, check_new, quiet, write_onnx
from naslora.sam.prompts import PromptableSam

FRAME = 1024
"""Longer side of the images and of the points' coordinates, in pixels, of samexporter."""
MOST_POINTS = 4096
LARGEST_PICTURE = 1 << 16


class ImageEncoder(nn.Module):
    """Maps an image as samexporter passes it to the embedding, (1, 256, g, g).

    It is (H, W, 3) RGB in [0, 255] with sides of at most ``FRAME`` pixels. It is padded to a
    square, as SAM does, and resized to S.
    """

    def __init__(self, model: PromptableSam) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_image: Tensor) -> Tensor:
        height, width, _ = input_image.shape
        image = (input_image.permute(2, 0, 1) - self.model.pixel_mean) / self.model.pixel_std
        image = F.pad(image, (0, FRAME - width, 0, FRAME - height))[None]
        return self.model.image_encoder(_resized(image, self.model.image_size))


class PromptDecoder(SamOnnxModel):
    """Maps an embedding and prompts to the mask that SAM would choose.

    Points are in pixels of the image as ``ImageEncoder`` takes it, of ``FRAME`` pixels for
    samexporter. Labels are 1 (object), 0 (background), 2 and 3 (corners of a box), and behind them
    -1 (no point). As in segment_anything's predictor, one such point goes with clicks and none with
    a box, whatever the tool passes. One click chooses the best of SAM's three masks, several clicks
    or a box the fourth.
    """

    def __init__(self, model: PromptableSam, tool: Tool) -> None:
        super().__init__(model, return_single_mask=True)
        self.tool = tool

    @torch.no_grad()
    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decodes prompts.

        Args:
            image_embeddings: (1, 256, g, g).
            point_coords: (1, N, 2) x and y in pixels.
            point_labels: (1, N) float32.
            mask_input: (1, 1, T/4, T/4) logits of an earlier mask, for images of T pixels.
            has_mask_input: (1,) 1 if the mask counts, else 0.
            orig_im_size: (2,) height and width of the masks to return.

        Returns:
            The logits (1, 1, H, W) of the mask, its estimated IoU (1, 1), and (1, 1, T/4, T/4).
        """
        side, frame = self.img_size, mask_input.shape[-1]
        given = (point_labels >= 0).sum()
        (count,) = _numbers((given + (point_labels < 2).all())[None], MOST_POINTS)
        labels = F.pad(point_labels, (0, 1), value=-1.0)[:, :count]
        points = F.pad(point_coords * (side / (4 * frame)), (0, 0, 0, 1))[:, :count]
        sparse = self._embed_points(points, labels)
        own = self.model.prompt_encoder.mask_input_size[0]  # 4g
        dense = self._embed_masks(_resized(mask_input, own), has_mask_input)
        masks, scores = self.model.mask_decoder.predict_masks(
            image_embeddings=image_embeddings,
            image_pe=self.model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )  # (1, 4, 4g, 4g), (1, 4)
        first = torch.arange(4) == 0
        best = torch.where(first == (given > 1), scores, -torch.inf).argmax(1)
        chosen = masks[:, best]
        whole = self.mask_postprocessing(chosen, orig_im_size)
        return whole, scores[:, best], _resized(chosen, frame)

    def mask_postprocessing(self, masks: Tensor, orig_im_size: Tensor) -> Tensor:
        """(1, 1, 4g, 4g) to (1, 1, H, W)."""
        masks = _resized(masks, self.img_size)
        if self.tool == "samexporter":
            filled = self.resize_longest_image_size(orig_im_size, self.img_size)
            rows, columns = _numbers(filled, self.img_size)
            masks = masks[..., :rows, :columns]
        whole = _numbers(orig_im_size, LARGEST_PICTURE)
        return F.interpolate(masks, whole, mode="bilinear", align_corners=False)


def _numbers(tensor: Tensor, most: int) -> list[int]:
    """The numbers in a tensor, each from 1 to ``most``, as sizes that ``torch.export`` follows."""
    numbers = tensor.to(torch.int64).tolist()
    for number in numbers:
        torch._check(number >= 1)
        torch._check(number <= most)
    return numbers


def _resized(maps: Tensor, side: int) -> Tensor:
    """(B, C, h, h) maps as (B, C, side, side)."""
    if maps.shape[-1] == side:
        return maps
    return F.interpolate(
        maps, (side, side), mode="bilinear", align_corners=False, antialias=maps.shape[-1] > side
    )


def export_prompts(model: PromptableSam, tool: Tool, path: Path) -> None:
    """Writes the two graphs and the configuration file that X-AnyLabeling loads to a folder.

    The folder, ``path``, is new or empty. Its name is that of the model.

    Raises:
        UserError: the model has adapters, the folder is not empty, or a package is missing.
    """
    check_merged(model)
    check_new(path)
    model, size = model.cpu().float().eval(), model.image_size
    name = re.sub(r"[^\w.-]+", "-", path.resolve().name, flags=re.ASCII)
    grid = model.prompt_encoder.image_embedding_size
    # X-AnyLabeling resizes without keeping the aspect ratio, and normalises.
    encoder: nn.Module = model.image_encoder
    frame, image, varied = size, torch.zeros(1, 3, size, size), dict[int, Any]()
    config: dict[str, Any] = {"type": "sam_med2d", "name": name, "display_name": name}
    if tool == "samexporter":
        encoder, frame, image = ImageEncoder(model), FRAME, torch.zeros(FRAME // 2, FRAME, 3)
        varied = {i: torch.export.Dim(side, min=2, max=FRAME) for i, side in enumerate("hw")}
        config |= {"type": "segment_anything", "max_width": FRAME, "max_height": 682}
    number = {1: torch.export.Dim("number", min=1, max=MOST_POINTS)}
    # Examples by name, each with its dimensions that vary.
    prompts: dict[str, tuple[Tensor, dict[int, Any]]] = {
        "image_embeddings": (torch.zeros(1, EMBED_DIM, *grid), {}),
        "point_coords": (torch.full((1, 3, 2), 8.0), number),
        "point_labels": (torch.tensor([[0.0, 1.0, -1.0]]), number),
        "mask_input": (torch.zeros(1, 1, frame // 4, frame // 4), {}),
        "has_mask_input": (torch.zeros(1), {}),
        "orig_im_size": (torch.tensor([150.0, 225.0]), {}),
    }
    masks = ("masks", "iou_predictions", "low_res_masks")
    graphs: Any = (
        ("encoder", encoder, {"input_image": (image, varied)}, ["image_embeddings"]),
        ("decoder", PromptDecoder(model, tool), prompts, masks),
    )
    held = Description(model.name, size, 1, (), "encoder", task="promptable")
    with replaced_folder(path) as folder, torch.no_grad():
        for part, module, inputs, outputs in graphs:
            example, dynamic = zip(*inputs.values(), strict=True)
            module(*example)  # as in export.py: fills TinyViT's cache before the trace
            with quiet():
                program = torch.export.export(module.eval(), example, dynamic_shapes=dynamic)
            file = config[f"{part}_model_path"] = f"{name}.{part}.onnx"
            write_onnx(program, held, folder / file, tuple(inputs), outputs, old=True)
        text = yaml.safe_dump({**config, "input_size": frame}, sort_keys=False)
        write_text(folder / f"{name}.yaml", text)
