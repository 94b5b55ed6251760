"""Draws masks from a point and from a box, with the SAM in the package.

python examples/prompts.py                                          # a photograph of matplotlib's
python examples/prompts.py photo.jpg --point 320 200 --box 100 80 420 310 --output masks.png
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageDraw

from naslora.report.pictures import paint
from naslora.sam.prompts import build_predictor


def drawn(image, mask, box=None, point=None):
    """The image with the mask and its prompt, as (H, W, 3) uint8."""
    picture = Image.fromarray(paint(image, mask.astype(int), ["background", "mask"]))
    pen = ImageDraw.Draw(picture)
    if box is not None:
        pen.rectangle(box, outline="white", width=3)
    if point is not None:
        pen.circle(point, 7, fill="white", outline="black", width=2)
    return np.asarray(picture)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("image", nargs="?", default=get_sample_data("grace_hopper.jpg", False))
parser.add_argument("--point", type=int, nargs=2, default=(450, 120), help="x y, in pixels")
parser.add_argument("--box", type=int, nargs=4, default=(155, 20, 375, 150), help="x y x y")
parser.add_argument("--model", default="vit_t", help="as --model of naslora train")
parser.add_argument("--image-size", type=int, default=256, help="side that the model sees")
parser.add_argument("--checkpoint", help="for other models than vit_t")
parser.add_argument("--output", type=Path, default=Path("masks.png"), help="the picture")
args = parser.parse_args()

predictor = build_predictor(args.model, args.image_size, args.checkpoint)
image = np.array(Image.open(args.image).convert("RGB"))
predictor.set_image(image)
point, label = np.array([args.point]), np.array([1])
masks, scores, _ = predictor.predict(point, label)  # three masks, and their estimated IoU
of_point = masks[scores.argmax()]
of_box = predictor.predict(box=np.array(args.box), multimask_output=False)[0][0]
panels = [drawn(image, of_point, point=args.point), drawn(image, of_box, box=args.box)]
Image.fromarray(np.concatenate(panels, axis=1)).save(args.output)
for name, mask in (("point", of_point), ("box", of_box)):
    print(f"{name}: {mask.mean():.0%} of the image")
