"""Trains SAM on several classes the way SAMed does: cross-entropy and Dice on low-resolution masks.

One mask of SAM's decoder stands for one class; warm-up and polynomial decay of the rate. Classes
here: 0 the background, 1 the upper and 2 the lower half of the object.

    python examples/samed_style.py                                      # tiny, in seconds
    python examples/samed_style.py --checkpoint sam_vit_b_01ec64.pth --data DIR --epochs 20
"""

import torch
import torch.nn.functional as F
from model_and_data import arguments, build_sam, load_data

import naslora

CLASSES = 3


def predict(sam, images):  # (B, 3, H, W) to logits (B, CLASSES, H / 4, W / 4)
    features = sam.image_encoder(sam.preprocess(images))
    sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
    position = sam.prompt_encoder.get_dense_pe()
    return sam.mask_decoder(features, position, sparse, dense, multimask_output=True)[0]


def loss_fn(sam, batch):
    images, labels = batch
    logits = predict(sam, images)
    small = F.interpolate(labels[:, None].float(), logits.shape[-2:])[:, 0].long()
    target = F.one_hot(small, CLASSES).permute(0, 3, 1, 2)
    found = logits.softmax(1)
    overlap = (found * target).sum((0, 2, 3))
    dice = 1 - (2 * overlap + 1e-5) / (found.square() + target).sum((0, 2, 3)).add(1e-5)
    return 0.2 * F.cross_entropy(logits, small) + 0.8 * dice.mean()


def factor(step):  # of the learning rate
    return (step + 1) / WARMUP if step < WARMUP else (1 - (step - WARMUP) / steps) ** 0.9


args = arguments(__doc__, "runs/samed_style")
torch.manual_seed(0)
sam = build_sam(args.checkpoint, masks=CLASSES)
images, masks = load_data(args.data, sam.image_encoder.img_size)
lower = torch.arange(masks.shape[1])[:, None] >= masks.shape[1] // 2
labels = (masks * (1 + lower.int())).long()
batches = list(zip(images.split(2), labels.split(2), strict=True))
held_out, train = batches[::4], [batch for i, batch in enumerate(batches) if i % 4]

naslora.inject(sam, naslora.NASLoRAConfig(rank=4), train=("mask_decoder",))
groups = naslora.param_groups(sam, lr=5e-3, weight_decay=0.1)  # without alpha
optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
WARMUP, steps = 3, args.epochs * len(train)
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
search = naslora.AlphaSearch(sam, lr=1e-2, start=args.epochs // 4)

for epoch in range(args.epochs):
    sam.train()
    losses = []
    for batch in train:
        loss = loss_fn(sam, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    for batch in held_out:
        search.step(batch, loss_fn, epoch)
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
naslora.save_adapter(sam, args.output)
