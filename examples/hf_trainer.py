"""Trains Hugging Face's SamModel with its Trainer; the search is a callback.

python examples/hf_trainer.py                                       # tiny, in seconds
python examples/hf_trainer.py --checkpoint facebook/sam-vit-base --data DIR --epochs 20
"""

import torch
import torch.nn.functional as F
from model_and_data import SIZE, arguments, load_data
from torch.utils.data import DataLoader
from transformers import SamConfig, SamModel, Trainer, TrainingArguments

import naslora
from naslora.integrations import AlphaCallback
from naslora.integrations.hub import from_pretrained

MEAN, STD = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]


def build_model(checkpoint):
    if checkpoint:
        return SamModel.from_pretrained(checkpoint)
    small = {"image_size": SIZE, "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2}
    blocks = {"num_hidden_layers": 2, "global_attn_indexes": [1], "window_size": 3}
    vision = {**small, **blocks, "output_channels": 32, "num_pos_feats": 16}
    prompt = {"image_size": SIZE, "hidden_size": 32, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = SamConfig(
        vision_config={**vision, "initializer_range": 0.1},
        prompt_encoder_config=prompt,
        mask_decoder_config=decoder,
        initializer_range=0.1,
    )
    return SamModel(config)


def mask_loss(outputs, labels, num_items_in_batch=None):
    logits = F.interpolate(outputs.pred_masks[:, 0, :1], labels.shape[-2:], mode="bilinear")
    return F.binary_cross_entropy_with_logits(logits[:, 0], labels)


def loss_fn(model, batch):
    labels = batch["labels"]
    return mask_loss(model(**{k: v for k, v in batch.items() if k != "labels"}), labels)


args = arguments(__doc__, "runs/hf_trainer")
torch.manual_seed(0)
model = build_model(args.checkpoint)
size = model.config.vision_config.image_size
box = torch.tensor([[0.0, 0.0, size, size]])  # the prompt: the whole image
samples = [
    {"pixel_values": (image - MEAN) / STD, "labels": mask, "input_boxes": box}
    for image, mask in zip(*load_data(args.data, size), strict=True)
]
held_out, train = samples[::4], [sample for i, sample in enumerate(samples) if i % 4]

naslora.inject(model, naslora.NASLoRAConfig(rank=3), train=("mask_decoder",))
settings = TrainingArguments(
    output_dir=args.output,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=2,
    logging_strategy="epoch",
    save_strategy="no",
    remove_unused_columns=False,
    label_names=["labels"],
    report_to=[],
    use_cpu=not args.checkpoint,
)
search = AlphaCallback(DataLoader(held_out, batch_size=2), loss_fn, lr=1e-2, start=1)
optimizer = torch.optim.AdamW(naslora.param_groups(model, lr=1e-3))
options = {"train_dataset": train, "compute_loss_func": mask_loss, "callbacks": [search]}
trainer = Trainer(model, settings, optimizers=(optimizer, None), **options)
trainer.train()
trainer.save_model()  # the model under its original names, and the adapter
again = from_pretrained(SamModel, args.output).eval()
batch = {k: v[None].to(model.device) for k, v in held_out[0].items() if k != "labels"}
difference = again.to(model.device)(**batch).pred_masks - model.eval()(**batch).pred_masks
print(f"after loading, the outputs differ by at most {difference.abs().max():.1e}")
