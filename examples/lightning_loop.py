"""Trains NAS-LoRA and SAM's mask decoder in Lightning, with the search as a callback.

python examples/lightning_loop.py                                   # tiny, in seconds
python examples/lightning_loop.py --checkpoint sam_vit_b_01ec64.pth --data DIR --epochs 20
"""

import lightning
import torch
import torch.nn.functional as F
from model_and_data import arguments, build_sam, load_data
from torch.utils.data import DataLoader, TensorDataset, random_split

import naslora
from naslora.integrations.lightning import AlphaCallback


class Segmenter(lightning.LightningModule):
    """SAM without prompts."""

    def __init__(self, checkpoint=None):
        super().__init__()
        self.sam = build_sam(checkpoint)
        naslora.inject(self.sam, naslora.NASLoRAConfig(rank=3), train=("mask_decoder",))

    def forward(self, images):  # (B, 3, H, W) to logits (B, H, W)
        features = self.sam.image_encoder(self.sam.preprocess(images))
        sparse, dense = self.sam.prompt_encoder(points=None, boxes=None, masks=None)
        position = self.sam.prompt_encoder.get_dense_pe()
        masks, _ = self.sam.mask_decoder(features, position, sparse, dense, multimask_output=False)
        return F.interpolate(masks, images.shape[-2:], mode="bilinear")[:, 0]

    def loss(self, batch):
        images, masks = batch
        return F.binary_cross_entropy_with_logits(self(images), masks)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self):
        loss = self.trainer.callback_metrics["loss"]
        print(f"epoch {self.current_epoch}: loss {loss:.4f}")

    def configure_optimizers(self):
        return torch.optim.Adam(naslora.param_groups(self, lr=1e-3))


args = arguments(__doc__, "runs/lightning")
lightning.seed_everything(0, verbose=False)
model = Segmenter(args.checkpoint)
data = TensorDataset(*load_data(args.data, model.sam.image_encoder.img_size))
train, held_out = random_split(data, (0.8, 0.2))
search = AlphaCallback(
    DataLoader(held_out, batch_size=2),
    lambda model, batch: model.loss(batch),
    lr=1e-2,
    start=1,  # alpha rests in the first epoch
)
trainer = lightning.Trainer(
    max_epochs=args.epochs,
    callbacks=[search],
    accelerator="auto" if args.checkpoint else "cpu",
    logger=False,
    enable_progress_bar=False,
    enable_checkpointing=False,
)
trainer.fit(model, DataLoader(train, batch_size=2, shuffle=True))
naslora.save_adapter(model.sam, args.output)
