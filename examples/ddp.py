"""Trains NAS-LoRA in two processes or more, with DistributedDataParallel.

Neither stage needs find_unused_parameters: AlphaSearch runs the module inside the wrapper and
averages alpha's gradients over the processes itself.

    torchrun --nproc-per-node 2 examples/ddp.py                         # tiny, in seconds
    torchrun --nproc-per-node 8 examples/ddp.py --checkpoint sam_vit_b_01ec64.pth --data DIR
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_and_data import arguments, build_sam, load_data
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import naslora


class Segmenter(nn.Module):
    """SAM as a module of images alone, because the wrapper calls ``forward``."""

    def __init__(self, sam):
        super().__init__()
        self.sam = sam

    def forward(self, images):  # (B, 3, H, W) to logits (B, H, W)
        features = self.sam.image_encoder(self.sam.preprocess(images))
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = self.sam.prompt_encoder.get_dense_pe()
        masks, _ = self.sam.mask_decoder(features, position, sparse, dense, multimask_output=False)
        return F.interpolate(masks, images.shape[-2:], mode="bilinear")[:, 0]


def loss_fn(model, batch):
    images, masks = (tensor.to(device) for tensor in batch)
    return F.binary_cross_entropy_with_logits(model(images), masks)


args = arguments(__doc__, "runs/ddp")
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, world = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # equal models and equal splits in all processes
model = Segmenter(build_sam(args.checkpoint))
images, masks = load_data(args.data, model.sam.image_encoder.img_size)
batches = list(zip(images.split(2), masks.split(2), strict=True))
held_out, train = batches[::4], [batch for i, batch in enumerate(batches) if i % 4]
held_out, train = (part[: len(part) // world * world][rank::world] for part in (held_out, train))

# All of the decoder except its IoU head: this loss gives it no gradient, which
# DistributedDataParallel does not accept.
decoder = ("transformer", "output_upscaling", "output_hypernetworks_mlps")
trained = [f"mask_decoder.{part}" for part in decoder]
naslora.inject(model, naslora.NASLoRAConfig(rank=3), train=trained)
model = DistributedDataParallel(model.to(device))
optimizer = torch.optim.Adam(naslora.param_groups(model, lr=1e-3))
search = naslora.AlphaSearch(model, lr=1e-2, start=1)

for epoch in range(args.epochs):
    model.train()
    losses = []
    for batch in train:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for batch in held_out:
        search.step(batch, loss_fn, epoch)
    if rank == 0:
        print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}", flush=True)
if rank == 0:
    naslora.save_adapter(model, args.output)  # under the names of the module inside the wrapper
# The wrapper holds the group as well. Were it the last, the process could wait for ever.
del model
dist.destroy_process_group()
