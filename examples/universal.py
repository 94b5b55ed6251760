"""Trains EoMT-DINOv3 or Mask2Former with Hugging Face's Trainer; the search is a callback.

python examples/universal.py --host eomt                            # tiny, in seconds
python examples/universal.py --host mask2former --checkpoint FOLDER --data DIR --epochs 20
"""

import torch
import transformers
from model_and_data import SIZE, arguments, load_data
from transformers import Trainer, TrainingArguments

import naslora
from naslora.integrations import AlphaCallback

MEAN, STD = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
HEADS = {
    "eomt": ("query", "upscale_block", "mask_head", "class_predictor"),
    "mask2former": ("pixel_level_module.decoder", "transformer_module", "class_predictor"),
}


def build_model(host, checkpoint):
    name = {"eomt": "EomtDinov3", "mask2former": "Mask2Former"}[host]
    kind = getattr(transformers, f"{name}ForUniversalSegmentation")
    if checkpoint:
        return kind.from_pretrained(checkpoint, num_labels=1, ignore_mismatched_sizes=True)
    tiny = {"num_labels": 1, "num_queries": 5, "train_num_points": 256, "num_attention_heads": 2}
    if host == "eomt":
        tiny |= {"image_size": SIZE, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
        tiny |= {"num_hidden_layers": 3, "num_blocks": 1, "num_upscale_blocks": 1}
    else:
        stages = {"depths": [1] * 4, "num_heads": [2] * 4, "out_indices": [1, 2, 3, 4]}
        swin = transformers.SwinConfig(image_size=SIZE, embed_dim=16, window_size=4, **stages)
        tiny |= {"backbone_config": swin, "feature_size": 32, "mask_feature_size": 32}
        tiny |= {"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 2}
    return kind(getattr(transformers, f"{name}Config")(**tiny))


def collate(samples):
    images, masks = zip(*samples, strict=True)
    classes = [torch.tensor([0])] * len(masks)
    labels = {"mask_labels": [mask[None] for mask in masks], "class_labels": classes}
    return {"pixel_values": torch.stack(images), **labels}


args = arguments(__doc__, "runs/universal", hosts=tuple(HEADS))
torch.manual_seed(0)
model = build_model(args.host, args.checkpoint)
prefix, blocks, size = 0, None, 384 if args.checkpoint else SIZE
if args.host == "eomt":  # in the last blocks queries stand among the tokens, so these stay frozen
    prefix, size = model.num_prefix_tokens, model.config.image_size
    blocks = tuple(range(model.config.num_hidden_layers - model.config.num_blocks))
images, masks = load_data(args.data, size)
samples = list(zip((images - MEAN) / STD, masks, strict=True))
held_out, train = samples[::4], [sample for i, sample in enumerate(samples) if i % 4]

config = naslora.NASLoRAConfig(target="qkv", blocks=blocks, prefix_tokens=prefix)
naslora.inject(model, config, train=HEADS[args.host])
settings = TrainingArguments(
    output_dir=args.output,
    num_train_epochs=args.epochs,
    per_device_train_batch_size=2,
    logging_strategy="epoch",
    save_strategy="no",
    remove_unused_columns=False,
    report_to=[],
    use_cpu=not args.checkpoint,
)
batches = torch.utils.data.DataLoader(held_out, batch_size=2, collate_fn=collate)
search = AlphaCallback(batches, lr=1e-2, start=1)  # the model's own loss
optimizer = torch.optim.AdamW(naslora.param_groups(model, lr=1e-3))
options = {"train_dataset": train, "data_collator": collate, "callbacks": [search]}
Trainer(model, settings, optimizers=(optimizer, None), **options).train()
naslora.save_adapter(model, args.output)
image = held_out[0][0][None].to(model.device)
adapted = model.eval()(pixel_values=image).masks_queries_logits
naslora.merge(model, "exact")
difference = model(pixel_values=image).masks_queries_logits - adapted
print(f"after merging, the outputs differ by at most {difference.abs().max():.1e}")
