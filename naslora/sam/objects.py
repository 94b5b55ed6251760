"""SAM's prompt encoder and mask decoder for many objects of several images at once.

The results are those of segment_anything's modules, whose weights are used, up to rounding. They
cost about half. An object has few tokens and its image many. So where SAM projects all of an
image's tokens to the width of a head, here the projection moves to the object's tokens: q·(W k) is
(Wᵀ q)·k, and W (sum of p v) is the sum of p (W v).
"""

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam
from segment_anything.modeling.transformer import Attention
from torch import Tensor

PADDING, NEGATIVE, POSITIVE, TOP_LEFT, BOTTOM_RIGHT = range(-1, 4)
"""Labels of points: nothing, off the object, on the object, and the corners of a box."""


def decode(
    model: Sam,
    embeddings: Tensor,
    owners: Tensor,
    points: Tensor,
    labels: Tensor,
    masks: Tensor | None,
    wanted: slice,
) -> tuple[Tensor, Tensor]:
    """Predicts masks of N objects of B images, as SAM's predictor.

    SAM adds a point with the label ``PADDING`` to points without a box; give it, too.

    Args:
        model: the SAM whose prompt encoder and mask decoder are used.
        embeddings: (B, 256, g, g) image embeddings.
        owners: (N,) int64, the image of each object.
        points: (N, P, 2), x and y in pixels, of clicks and of corners of boxes.
        labels: (N, P) int64.
        masks: (N, 1, 4g, 4g) logits of the last prediction; None if there is none.
        wanted: which of the four mask tokens: 0 for one mask, 1 to 3 for three.

    Returns:
        (N, Q, 4g, 4g) mask logits, and (N, Q) estimates of their IoU.
    """
    decoder, prompts = model.mask_decoder, _encode_points(model.prompt_encoder, points, labels)
    if masks is None:
        dense = model.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1)
    else:
        dense = model.prompt_encoder.mask_downscaling(masks)  # (N, 256, g, g)
    transformer, grid = decoder.transformer, embeddings.shape[-1]
    own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    start = torch.cat([own.expand(len(prompts), -1, -1), prompts], 1)  # (N, T, 256)
    maps: list[Tensor] = [embeddings, dense, model.prompt_encoder.get_dense_pe()]
    if torch.is_autocast_enabled(embeddings.device.type):  # a sum with float32 would be float32
        maps = [part.to(torch.get_autocast_dtype(part.device.type)) for part in maps]
    images, dense, places = map(_rows, maps)
    # index_select has a faster backward than an index.
    image, tokens = images.index_select(0, owners) + dense, start  # (N, g², 256)
    for index, layer in enumerate(transformer.layers):
        # The first layer has nothing but the prompts' own places.
        placed = tokens + start if index else tokens
        attended = layer.self_attn(placed, placed, tokens)
        tokens = layer.norm1(tokens + attended if index else attended)
        placed = image + places
        attention = layer.cross_attn_token_to_image
        tokens = layer.norm2(tokens + _to_image(attention, tokens + start, placed, image))
        tokens = layer.norm3(tokens + layer.mlp(tokens))
        attention = layer.cross_attn_image_to_token
        image = layer.norm4(_plus_tokens(image, attention, placed, tokens + start, tokens))
    attention = transformer.final_attn_token_to_image
    seen = _to_image(attention, tokens + start, image + places, image)
    tokens = transformer.norm_final_attn(tokens + seen)
    chosen = range(decoder.num_mask_tokens)[wanted]
    weights = [decoder.output_hypernetworks_mlps[i](tokens[:, 1 + i]) for i in chosen]
    scores = decoder.iou_prediction_head(tokens[:, 0])[:, wanted]
    return _draw(decoder, image, torch.stack(weights, -1), grid), scores


def _encode_points(encoder: PromptEncoder, points: Tensor, labels: Tensor) -> Tensor:
    """(N, P, 256) of (N, P, 2) points and their (N, P) labels."""
    tables = [encoder.not_a_point_embed, *encoder.point_embeddings]
    table = torch.cat([embedding.weight for embedding in tables])  # (5, 256)
    places = encoder.pe_layer.forward_with_coords(points + 0.5, encoder.input_image_size)
    return places * (labels != PADDING)[..., None] + table[labels + 1]


def _rows(maps: Tensor) -> Tensor:
    """(B, C, h, w) to (B, h w, C)."""
    return maps.flatten(2).transpose(1, 2)


def _heads(attention: Attention, projected: Tensor) -> Tensor:
    """(N, T, heads d) to (N, T, heads, d)."""
    return projected.unflatten(-1, (attention.num_heads, -1))


def _to_image(attention: Attention, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of (N, T, C) tokens to (N, P, C) keys and values of the image: (N, T, C)."""
    query = _heads(attention, attention.q_proj(tokens))  # (N, T, h, d)
    heads, width = query.shape[2:]
    to_keys = attention.k_proj.weight.unflatten(0, (heads, width))
    # The bias of the keys adds the same to all of a row, so it is none.
    query = torch.einsum("nthd,hdc->nhtc", query / width**0.5, to_keys).flatten(1, 2)
    share = (query @ keys.transpose(1, 2)).softmax(-1)  # (N, h T, P)
    seen = (share @ values).unflatten(1, (heads, -1))  # (N, h, T, C)
    to_values = attention.v_proj.weight.unflatten(0, (heads, width))
    seen = torch.einsum("nhtc,hdc->nthd", seen, to_values).flatten(2) + attention.v_proj.bias
    return attention.out_proj(seen)


def _plus_tokens(
    image: Tensor, attention: Attention, queries: Tensor, tokens: Tensor, values: Tensor
) -> Tensor:
    """The (N, P, C) image plus the attention of its queries to (N, T, C) tokens."""
    key = _heads(attention, attention.k_proj(tokens))  # (N, T, h, d)
    heads, width = key.shape[2:]
    key = key / width**0.5
    to_queries = attention.q_proj.weight.unflatten(0, (heads, width))
    bias = attention.q_proj.bias.unflatten(0, (heads, width))
    offset = torch.einsum("nthd,hd->nht", key, bias).flatten(1)[..., None]  # (N, h T, 1)
    key = torch.einsum("nthd,hdc->nhtc", key, to_queries).flatten(1, 2)
    scores = torch.baddbmm(offset, key, queries.transpose(1, 2))  # (N, h T, P)
    share = scores.unflatten(1, (heads, -1)).softmax(2).flatten(1, 2)
    value = _heads(attention, attention.v_proj(values))
    out = attention.out_proj.weight.unflatten(1, (heads, width))  # (C, h, d)
    value = torch.einsum("nthd,chd->nhtc", value, out).flatten(1, 2)
    value = value + attention.out_proj.bias / heads  # the shares of each head add up to 1
    return torch.baddbmm(image, share.transpose(1, 2), value)


def _draw(decoder: MaskDecoder, image: Tensor, weights: Tensor, grid: int) -> Tensor:
    """(N, Q, 4g, 4g) masks of (N, g², 256) image tokens and (N, 32, Q) weights of channels.

    A transposed convolution whose stride is its kernel's size makes 2 x 2 pixels of each.
    """
    first, norm, activation, second, _ = decoder.output_upscaling
    maps = _enlarged(first, image)  # (N, g², 2, 2, 64)
    maps = activation(F.layer_norm(maps, maps.shape[-1:], norm.weight, norm.bias, norm.eps))
    maps = activation(_enlarged(second, maps))  # (N, g², 2, 2, 2, 2, 32)
    masks = maps.flatten(1, -2) @ weights  # (N, 16 g², Q)
    masks = masks.view(len(image), grid, grid, 2, 2, 2, 2, -1)
    return masks.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(len(image), -1, 4 * grid, 4 * grid)


def _enlarged(convolution: torch.nn.ConvTranspose2d, maps: Tensor) -> Tensor:
    """(..., C) to (..., 2, 2, C'): rows, columns and channels."""
    kernel = convolution.weight.permute(2, 3, 1, 0)  # (2, 2, C', C)
    assert convolution.bias is not None
    bias = convolution.bias.repeat(kernel.shape[:2].numel())
    return F.linear(maps, kernel.flatten(0, 2), bias).unflatten(-1, kernel.shape[:3])
