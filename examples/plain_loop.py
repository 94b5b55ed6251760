"""Trains NAS-LoRA and SAM's mask decoder in a plain PyTorch loop.

python examples/plain_loop.py                                       # tiny, in seconds
python examples/plain_loop.py --checkpoint sam_vit_b_01ec64.pth --data DIR --epochs 20
"""

import torch
import torch.nn.functional as F
from model_and_data import arguments, build_sam, load_data

import naslora


def predict(sam, images):  # (B, 3, H, W) to logits (B, H, W)
    features = sam.image_encoder(sam.preprocess(images))
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    position = sam.prompt_encoder.get_dense_pe()
    masks, _ = sam.mask_decoder(features, position, sparse, dense, multimask_output=False)
    return F.interpolate(masks, images.shape[-2:], mode="bilinear")[:, 0]


def loss_fn(sam, batch):
    images, masks = batch
    return F.binary_cross_entropy_with_logits(predict(sam, images), masks)


args = arguments(__doc__, "runs/plain_loop")
torch.manual_seed(0)
sam = build_sam(args.checkpoint)
images, masks = load_data(args.data, sam.image_encoder.img_size)
batches = list(zip(images.split(2), masks.split(2), strict=True))
held_out, train = batches[::4], [batch for i, batch in enumerate(batches) if i % 4]

naslora.inject(sam, naslora.NASLoRAConfig(rank=3), train=("mask_decoder",))
naslora.print_trainable_parameters(sam)
optimizer = torch.optim.Adam(naslora.param_groups(sam, lr=1e-3))
search = naslora.AlphaSearch(sam, lr=1e-2, start=1)  # alpha rests in the first epoch

for epoch in range(args.epochs):
    sam.train()
    losses = []
    for batch in train:
        loss = loss_fn(sam, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for batch in held_out:
        search.step(batch, loss_fn, epoch)
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")

naslora.save_adapter(sam.eval(), args.output)
print(naslora.merge(sam, "exact", [images for images, _ in held_out], forward=predict))
