"""The named targets, in every family and for every method that adapts linears."""

import re

import pytest
import torch
from adapted_models import named
from conftest import error_of
from segment_anything.modeling.transformer import TwoWayTransformer
from torch import nn

from bench.families import HOSTS, images
from naslora import NASLoRAConfig, inject
from naslora.adapter.layer.modules import adapter_layers
from naslora.adapter.layer.targets import find_targets, target_name

LINEARS = {  # of a block, by the start of the family's title
    "SAM (": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "SAM-HQ": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "MobileSAM": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "SAM 2": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    "SAM 3": (*(f"attention.{name}_proj" for name in "qkvo"), "mlp.fc1", "mlp.fc2"),
    "SamModel": ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2"),
    "Sam2Model": ("attn.qkv", "attn.proj", "mlp.proj_in", "mlp.proj_out"),
}
CHOSEN = {"qkv": ("qkv", "q_", "k_", "v_"), "mlp": ("lin1", "fc1", "proj_in")}
CHOSEN |= {"qkv+mlp": CHOSEN["qkv"] + CHOSEN["mlp"], "all": ("",)}
OBLONG = (64, 96)


def built(family: str, size=(64, 64)) -> nn.Module:
    torch.manual_seed(0)
    return next(host for host in HOSTS if host.title.startswith(family)).build(*size).eval()


@pytest.mark.parametrize("family", LINEARS)
def test_layers_of_a_name(family):
    encoder, linears = built(family), LINEARS[family]
    firsts = find_targets(encoder, NASLoRAConfig(re.escape(linears[0])))
    blocks = [name.removesuffix(linears[0]) for name in firsts]
    for target, chosen in CHOSEN.items():
        names = list(find_targets(encoder, NASLoRAConfig(target=target)))
        ends = [linear for linear in linears if any(part in linear for part in chosen)]
        assert names == [block + end for block in blocks for end in ends]
        assert target_name(names) == target
        last = NASLoRAConfig(target=target, blocks=(len(blocks) - 1,))
        assert list(find_targets(encoder, last)) == names[-len(ends) :]


def test_a_name_leaves_the_decoder_alone_and_stands_for_all_its_layers():
    decoder = named(transformer=TwoWayTransformer(1, 8, 2, 16))
    sam = named(image_encoder=built("SAM ("), mask_decoder=decoder)
    assert not any("decoder" in name for name in inject(sam, NASLoRAConfig(target="all")))
    attention = named(attn=named(qkv=nn.Linear(8, 24)))
    line = error_of(inject, attention, NASLoRAConfig(target="qkv+mlp"))
    assert "a part of target 'qkv+mlp'" in line


@pytest.mark.parametrize("family", ["SAM (", "MobileSAM", "SAM 2"])
def test_the_mlp_sees_images_and_the_attention_its_windows(family):
    encoder, seen = built(family, OBLONG), {}
    inject(encoder, NASLoRAConfig(target="all"))
    for name, layer in adapter_layers(encoder):
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: seen.update({name: layer.split(inputs[0])[1].shape})
        )
    encoder(images(OBLONG))
    for name, (batch, height, width, _) in seen.items():
        whole = batch == 2 and 2 * width == 3 * height
        assert whole or (height == width and ".mlp." not in name), name
    assert len(seen) % 4 == 0
