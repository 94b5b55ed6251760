"""SAM's attention without the matrix of its logits: replaced in place, and restored.

segment_anything and Hugging Face compute the logits of all pairs of tokens, add two terms to them
that depend on relative positions, and keep several matrices of that size for the backward.
``fuse_attention`` gives their attention modules a subclass of their own class, whose forward calls
``naslora_kernels.rel_pos_attention``. It is set as ``__class__``: the object, its children, hooks,
names in the state dict and ``isinstance`` stay as they are. Layers inside it are called as modules,
whether they are adapted, merged or neither.

Nothing here imports segment_anything, transformers or timm. Classes are known by their names.
"""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.windows import has_hooks, partition, unpartition
from naslora.errors import UserError, listing
from naslora_kernels import rel_pos_attention

Attention = Literal["fused", "stock"]
"""How the image encoder computes attention: in the fused operator, or in its package's code."""

# ---- Replacing and restoring ---------------------------------------------------------------------


def fuse_attention(model: nn.Module) -> list[str]:
    """Makes the image encoder's attention faster and smaller in memory, in place.

    The outputs are the same up to rounding. Modules, their names and the state dict stay the same,
    so it can be called before or after ``inject``, ``load_adapter`` and ``merge``. Call it before
    ``fully_shard``. While a model is exported or traced, PyTorch's own
    operator of attention computes, which other runtimes fuse.

    Known are the attentions of segment_anything and its copies (SAM-HQ, MobileSAM), of Hugging
    Face's SamModel, SamHQModel and Sam2Model, of TinyViT in timm and MobileSAM, and of timm's Hiera
    (SAM 2). Other modules with a layer ``qkv`` and "Attention" in the name of their class are left
    alone, and a warning names them. Hugging Face's modules return None as attention weights, as its
    SDPA attention does. Blocks of segment_anything and its copies no longer project the padding of
    their windows.

    Args:
        model: a SAM, its image encoder, or a model around it.

    Returns:
        The names of the fused modules in model order, including those that were fused before.

    Raises:
        UserError: the model has no attention that is known. It is then unchanged.
    """
    known = {module: mixin for module in model.modules() if (mixin := _mixin(module)) is not None}
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and "qkv" in module._modules
        if module not in known and not isinstance(module, FusedAttention)
    ]
    attentions = [module for module, mixin in known.items() if issubclass(mixin, FusedAttention)]
    if not attentions and not _fused(model):
        found = f"; it has {listing(unknown, 3)}" if unknown else ""
        raise UserError(
            "the model has no attention that can be fused: none of segment_anything, SAM-HQ, "
            f"MobileSAM, TinyViT, SAM 2 or Hugging Face's SamModel{found}"
        )
    fused_class: Any = _fused_class
    for module, mixin in known.items():
        module.__class__ = fused_class(mixin, type(module))
    if unknown:
        described = listing(unknown, 3)
        warnings.warn(f"attention that is not known stays as it is: {described}", stacklevel=2)
    return list(_fused(model))


def unfuse_attention(model: nn.Module) -> list[str]:
    """Undoes ``fuse_attention``: every module has its own class and forward again.

    Returns:
        The names of the restored modules in model order; empty if none was fused.

    Raises:
        UserError: ``fully_shard`` was called on an attention itself. The model is then unchanged.
    """
    fused = _fused(model)
    for name, module in fused.items():
        if type(module) is not _fused_class(module.mixin, module.host_class):
            raise UserError(f"{name} is sharded; call unfuse_attention before fully_shard")
    modules: list[Any] = [module for module in model.modules() if isinstance(module, Fused)]
    for module in modules:
        # A block that was sharded keeps its class. Around a stock attention it computes as stock.
        if type(module) is _fused_class(module.mixin, module.host_class):
            module.__class__ = module.host_class
    return list(fused)


def _fused(model: nn.Module) -> dict[str, Any]:
    return {n: module for n, module in model.named_modules() if isinstance(module, FusedAttention)}


# ---- The forwards --------------------------------------------------------------------------------


class Fused(nn.Module):
    """Mixed into the class of a module. A subclass has the forward of one kind of module."""

    host_class: type[nn.Module]
    mixin: "type[Fused]"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced: Any = super().__reduce_ex__(protocol)
        return _rebuild, (self.mixin, self.host_class), reduced[2]


class FusedAttention(Fused):
    """The same for attentions."""


class FusedBlock(Fused):
    """segment_anything's transformer block, which does not project the padding of its windows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        size, attention = self.window_size, self.attn
        padded = size > 0 and (x.shape[1] % size or x.shape[2] % size)
        ours = isinstance(attention, _SegmentAnything) and not has_hooks(attention)
        if not padded or not ours or traced():
            return self.host_class.forward(self, x)
        x = x + _over_windows(attention, self.norm1(x), size)
        return x + self.mlp(self.norm2(x))


class _SegmentAnything(FusedAttention):
    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return _over_grid(self, x, self.num_heads)


class _HuggingFace(FusedAttention):
    def forward(
        self: Any, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) to the same, and None instead of attention weights."""
        drops = self.training and self.dropout > 0
        if traced() or output_attentions or drops:
            return self.host_class.forward(self, hidden_states, output_attentions)
        return _over_grid(self, hidden_states, self.num_attention_heads), None


class _Hiera(FusedAttention):
    """SAM 2's attention in timm."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same, or half of H and W where the queries are pooled."""
        if traced():
            return self.host_class.forward(self, x)
        return _pooled_attention(self, x, self.num_heads, self.q_pool)


class _HuggingFaceHiera(FusedAttention):
    """Without a product of queries and keys that transformers computes and does not use."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As ``_Hiera``."""
        if traced() or kwargs:
            return self.host_class.forward(self, hidden_states, **kwargs)
        stride = self.query_stride
        pool = functools.partial(F.max_pool2d, kernel_size=stride) if stride else None
        return _pooled_attention(self, hidden_states, self.num_attention_heads, pool)


class _TinyViT(FusedAttention):
    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        if traced():
            return self.host_class.forward(self, x)
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.num_heads, -1)
        widths = [self.key_dim, self.key_dim, qkv.shape[-1] - 2 * self.key_dim]
        q, k, v = (part.transpose(1, 2) for part in qkv.split(widths, -1))  # (B, heads, N, d)
        o = _dot_product_attention(q, k, v, self.scale, self._bias(x))
        return self.proj(o.transpose(1, 2).flatten(2))

    def _bias(self: Any, x: Tensor) -> Tensor:
        """The learned bias of each head and pair of tokens, (heads, N, N)."""
        if hasattr(self, "get_attention_biases"):  # timm
            return self.get_attention_biases(x.device)
        if self.training:
            return self.attention_biases[:, self.attention_bias_idxs]
        return self.ab  # MobileSAM computes it when the mode changes


def traced() -> bool:
    """Whether a graph is recorded that other runtimes execute, which lack the fused operator."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


SMALL_WINDOW = 1024
"""Keys up to which ``_dot_product_attention`` keeps the matrix of its weights on CPUs."""


def _dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale q kᵀ + bias) v, for windows of any size.

    On CPUs in 16 bits forward and backward of PyTorch's fused kernel take 2 to 5 times the time of
    plain products with windows of 7 x 7 to 14 x 14 tokens, and 1.4 times with 32 x 32. Plain ones
    round as the code that is replaced does, which keeps the logits in 16 bits, too.

    Args:
        q: (B, heads, N, d).
        k: (B, heads, M, d).
        v: (B, heads, M, e).
        scale: factor of the logits.
        bias: (heads, N, M).

    Returns:
        (B, heads, N, e).
    """
    if q.device.type == "cpu" and q.dtype.itemsize == 2 and k.shape[2] <= SMALL_WINDOW:
        with torch.autocast("cpu", enabled=False):  # which computes softmax in float32
            logits = (q * scale) @ k.transpose(2, 3)
            if bias is not None:
                logits += bias
            return torch.softmax(logits, -1) @ v
    # PyTorch's fused kernel for CPUs takes masks of four dimensions only.
    mask = None if bias is None else bias[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _pooled_attention(
    attention: Any, x: Tensor, heads: int, pool: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """Attention of which the queries may be pooled, as SAM 2 defines it.

    Args:
        attention: has ``scale``, ``qkv`` and ``proj``.
        x: (B, H, W, C), an image or windows of it.
        heads: number of heads.
        pool: makes (B, C, H, W) queries fewer.

    Returns:
        (B, H, W, C), or H and W as they are after ``pool``.
    """
    batch, height, width, _ = x.shape
    qkv = attention.qkv(x).reshape(batch, height * width, 3, heads, -1)
    q, k, v = qkv.unbind(2)  # each (B, N, heads, d)
    if pool is not None:
        maps = pool(q.reshape(batch, height, width, -1).permute(0, 3, 1, 2))
        height, width = maps.shape[2:]
        q = maps.flatten(2).transpose(1, 2).unflatten(2, (heads, -1))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    o = _dot_product_attention(q, k, v, attention.scale)
    return attention.proj(o.transpose(1, 2).reshape(batch, height, width, -1))


def _over_grid(attention: Any, x: Tensor, heads: int) -> Tensor:
    """Attention with decomposed relative positions, as segment_anything defines it.

    Args:
        attention: has ``qkv``, ``proj``, and what ``_attended`` reads.
        x: (B, H, W, C), an image or windows of it.
        heads: number of heads.

    Returns:
        (B, H, W, C).
    """
    return attention.proj(_attended(attention, attention.qkv(x), heads))


def _over_windows(attention: Any, x: Tensor, size: int) -> Tensor:
    """The same in windows of images whose edge SAM pads with zeros.

    Linear layers do not compute the padding: it is the bias before the attention, and dropped after
    it.

    Args:
        attention: as in ``_over_grid``.
        x: (B, H, W, C) images.
        size: side of the windows, in tokens.

    Returns:
        (B, H, W, C).
    """
    o = _attended(attention, _in_windows(attention.qkv, x, size), attention.num_heads)
    grid = x.shape[1], x.shape[2]
    if type(attention.proj) is nn.Linear:
        return attention.proj(unpartition(o, size, grid))
    return unpartition(attention.proj(o), size, grid)


def _in_windows(layer: nn.Module, x: Tensor, size: int) -> Tensor:
    """``layer`` on the windows of images. A layer that is watched sees the windows themselves."""
    if not has_hooks(layer):
        if type(layer) is nn.Linear:
            return partition(layer(x), size, layer.bias)
        if isinstance(layer, NASLoRALinear):
            return layer.in_windows(x, size)
    return layer(partition(x, size))


def _attended(attention: Any, qkv: Tensor, heads: int) -> Tensor:
    """What the heads gather, before the last projection.

    Args:
        attention: has ``scale``, ``use_rel_pos``, ``rel_pos_h``, ``rel_pos_w``.
        qkv: (B, H, W, 3 C), queries, keys and values of an image or of windows.
        heads: number of heads.

    Returns:
        (B, H, W, C).
    """
    grid = height, width = qkv.shape[1], qkv.shape[2]
    qkv = qkv.flatten(1, 2).unflatten(-1, (3, heads, -1))  # (B, H * W, 3, heads, d)
    # Split in the layout of the projection, so that the backward joins the gradients in one pass.
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, heads, H * W, d)
    if attention.use_rel_pos:
        by_row = q.unflatten(2, grid)  # (B, heads, H, W, d)
        table_h = relative_positions(attention.rel_pos_h, height)
        table_w = relative_positions(attention.rel_pos_w, width)
        rel_h = torch.einsum("bnhwc,hck->bnhwk", by_row, table_h).flatten(2, 3)
        rel_w = torch.einsum("bnhwc,wck->bnhwk", by_row, table_w).flatten(2, 3)
        if traced():
            bias = (rel_h[..., None] + rel_w[..., None, :]).flatten(3)
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=attention.scale)
        else:
            o = rel_pos_attention(q, k, v, rel_h, rel_w, grid, scale=attention.scale)
    else:
        o = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    o = o.transpose(1, 2)
    if traced():  # the decomposed operator's result lies in memory in another way
        o = o.clone(memory_format=torch.contiguous_format)
    return o.flatten(2).unflatten(1, grid)


def relative_positions(table: Tensor, size: int) -> Tensor:
    """The embeddings of the distances between all queries and keys of one axis.

    Args:
        table: (L, d), one row for each distance from -(L - 1) / 2 to (L - 1) / 2. It is
            interpolated if L is not 2 size - 1.
        size: tokens along the axis.

    Returns:
        (size, d, size), by query, feature and key.
    """
    distances = 2 * size - 1
    if table.shape[0] != distances:
        table = F.interpolate(table.t()[None], size=distances, mode="linear")[0].t()
    # The distance of key j to query i is in row i - j + size - 1.
    if traced():  # Core ML has no unfold
        place = torch.arange(size, device=table.device)
        return table[place[:, None] - place + size - 1].transpose(1, 2)
    return table.unfold(0, size, 1).flip(2)  # one launch, no indices


# ---- Recognising ---------------------------------------------------------------------------------


class _Form(NamedTuple):
    """One kind of module: where its class is defined, and what an instance consists of."""

    classes: str
    """A regular expression that matches the class's module and name."""
    children: frozenset[str]
    """The names of its children. The fused forward would leave out a further one."""
    parameters: frozenset[str]
    """The names that its own parameters can have."""
    mixin: type[Fused]
    names: frozenset[str] | None = None
    """If given, what the class's forward may refer to: a copy that refers to more computes more."""


_LINEAR = frozenset({"qkv", "proj"})
_TABLES = frozenset({"rel_pos_h", "rel_pos_w"})
_NONE: frozenset[str] = frozenset()
_BLOCK = frozenset({"norm1", "attn", "norm2", "mlp"})
_FORMS = (
    _Form(
        r"(.+\.)?modeling\.image_encoder\.Attention",
        _LINEAR,
        _TABLES,
        _SegmentAnything,
        _LINEAR
        | _TABLES
        | {"shape", "reshape", "num_heads", "permute", "unbind", "scale", "transpose", "softmax"}
        | {"use_rel_pos", "add_decomposed_rel_pos", "view"},
    ),
    _Form(
        r"(.+\.)?modeling\.image_encoder\.Block",
        _BLOCK,
        _NONE,
        FusedBlock,
        _BLOCK | {"window_size", "shape", "window_partition", "window_unpartition"},
    ),
    _Form(
        r"transformers\.models\.(sam|sam_hq)\.modeling_\1\.Sam(HQ)?Vision(Sdpa)?Attention",
        _LINEAR,
        _TABLES,
        _HuggingFace,
    ),
    *(
        _Form(r"timm\.models\.hieradet_sam2\.MultiScaleAttention", children, _NONE, _Hiera)
        for children in (_LINEAR, _LINEAR | {"q_pool"})
    ),
    _Form(
        r"transformers\.models\.sam2\.modeling_sam2\.Sam2MultiScaleAttention",
        _LINEAR,
        _NONE,
        _HuggingFaceHiera,
    ),
    _Form(
        r"(timm\.models\.tiny_vit|(.+\.)?modeling\.tiny_vit_sam)\.Attention",
        _LINEAR | {"norm"},
        frozenset({"attention_biases"}),
        _TinyViT,
    ),
)


def _mixin(module: nn.Module) -> type[Fused] | None:
    """What makes a module fused; None if it is fused already, or not known."""
    kind: Any = type(module)
    replaced = kind.forward.__module__ != kind.__module__ or "forward" in vars(module)
    if replaced or isinstance(module, Fused):
        return None
    for form in _FORMS:
        if (
            re.fullmatch(form.classes, f"{kind.__module__}.{kind.__name__}")
            and {*module._modules} == form.children
            and {*module._parameters} <= form.parameters
            and (form.names is None or {*kind.forward.__code__.co_names} <= form.names)
        ):
            return form.mixin
    return None


@functools.cache
def _fused_class(mixin: Any, host_class: Any) -> Any:
    """The subclass. It has the name of ``host_class``, so the model is printed as before."""
    names = {"__module__": host_class.__module__, "__qualname__": host_class.__qualname__}
    own = {"__doc__": host_class.__doc__, "host_class": host_class, "mixin": mixin}
    return type(host_class.__name__, (mixin, host_class), {**names, **own})


def _rebuild(mixin: Any, host_class: Any) -> Any:
    """An empty fused attention, whose state ``copy`` and ``pickle`` fill in."""
    fused = _fused_class(mixin, host_class)
    return fused.__new__(fused)
