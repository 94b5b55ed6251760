"""A server of masks: POST an image to /predict, get a PNG mask. GET /health tells if it is ready.

pip install 'naslora[serve]'
python examples/serve.py mine.onnx --port 8000
curl -F image=@photo.jpg 127.0.0.1:8000/predict > mask.png

Requests that arrive together are computed as one batch. Larger images than --largest are refused.
"""

import argparse
import io
import multiprocessing
import signal
from pathlib import Path

import litserve
import numpy as np
import torch
from fastapi import HTTPException, Response
from PIL import Image

from naslora.predictor import make_predictor
from naslora.sam.segmentation import labels_of


class Masks(litserve.LitAPI):
    def __init__(self, model, **options):
        super().__init__(**options)
        self.path = model

    def setup(self, device):
        self.predictor = make_predictor(self.path)

    def decode_request(self, request):
        try:
            image = Image.open(request["image"].file).convert("RGB")
        except Exception as error:
            raise HTTPException(400, f"no image: {error}") from error
        return self.predictor.image_of(np.asarray(image)), image.size

    def batch(self, inputs):
        images, sizes = zip(*inputs, strict=True)
        return torch.stack(images), sizes

    def predict(self, batch):
        # One image comes without a batch's dimension if batching is off.
        images, sizes = batch
        single = images.dim() == 3
        labels = labels_of(self.predictor.class_map(images[None] if single else images))
        return (labels[0], sizes) if single else list(zip(labels, sizes, strict=True))

    def unbatch(self, output):
        return output

    def encode_response(self, output):
        labels, size = output
        factor = 255 if self.predictor.config.data.num_classes == 1 else 1
        mask = Image.fromarray((labels * factor).numpy().astype(np.uint8))
        file = io.BytesIO()
        mask.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")


def stop(*_):
    """Ends the workers as well: LitServe leaves them to themselves unless it is interrupted."""
    raise SystemExit if multiprocessing.parent_process() else KeyboardInterrupt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a folder or a file, as for naslora predict")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=4, help="most images at once")
    parser.add_argument("--largest", type=int, default=16_000_000, help="most bytes of a request")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, stop)
    api = Masks(args.model, max_batch_size=args.batch, batch_timeout=0.02)
    server = litserve.LitServer(api, accelerator="cpu", max_payload_size=args.largest)
    server.run(port=args.port, host="127.0.0.1", generate_client_file=False)
