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
from typing import Any, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from naslora.errors import UserError, listing
from naslora.sam.attend import (
    dot_product_attention,
    over_grid,
    over_windows,
    pooled_attention,
    traced,
)

Attention = Literal["fused", "stock"]
"""How the image encoder computes attention: in the fused operator, or in its package's code."""

# ---- Replacing and restoring ---------------------------------------------------------------------


def fuse_attention(model: nn.Module) -> list[str]:
    """Makes the image encoder's attention faster and smaller in memory, in place.

    The outputs are the same up to rounding. Modules, their names and the state dict stay the same,
    so it can be called before or after ``inject``, ``load_adapter`` and ``merge``. Call it before
    ``fully_shard``. While a model is exported or traced, PyTorch's own operator of attention
    computes, which other runtimes fuse.

    Known are the attentions of segment_anything and its copies (SAM-HQ, MobileSAM), of Hugging
    Face's SamModel, SamHQModel and Sam2Model, of TinyViT in timm and MobileSAM, and of timm's Hiera
    (SAM 2). Other modules with a layer ``qkv`` and "Attention" in the name of their class are left
    alone, and a warning names them. Hugging Face's modules return None as attention weights, as its
    SDPA attention does. Blocks with windows no longer project the padding of these.

    The model is a SAM, its image encoder, or a model around it.

    Returns:
        The names of the fused modules in model order, including those that were fused before.

    Raises:
        UserError: the model has no attention that is known. It is then unchanged.
    """
    known = {module: kind for module in model.modules() if (kind := _fused_kind(module))}
    unknown = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower() and "qkv" in module._modules
        if module not in known and not isinstance(module, FusedAttention)
    ]
    if not _fused(model) and not any(issubclass(kind, FusedAttention) for kind in known.values()):
        found = f"; it has {listing(unknown, 3)}" if unknown else ""
        raise UserError(
            "the model has no attention that can be fused: none of segment_anything, SAM-HQ, "
            f"MobileSAM, TinyViT, SAM 2 or Hugging Face's SamModel{found}"
        )
    for module, kind in known.items():
        module.__class__ = kind
    if unknown:
        described = listing(unknown, 3)
        warnings.warn(f"attention that is not known stays as it is: {described}", stacklevel=2)
    return _fused(model)


def unfuse_attention(model: nn.Module) -> list[str]:
    """Undoes ``fuse_attention``: every module has its own class and forward again.

    Returns the names of the restored modules in model order; empty if none was fused.

    Raises:
        UserError: ``fully_shard`` was called on an attention itself. The model is then unchanged.
    """
    fused: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, Fused)}
    # A block that was sharded keeps its class. Around a stock attention it computes as stock.
    ours = {n: m for n, m in fused.items() if type(m) is _fused_class(m.mixin, m.host_class)}
    names = _fused(model)
    for name in names:
        if name not in ours:
            raise UserError(f"{name} is sharded; call unfuse_attention before fully_shard")
    for module in ours.values():
        module.__class__ = module.host_class
    return names


def _fused(model: nn.Module) -> list[str]:
    return [name for name, own in model.named_modules() if isinstance(own, FusedAttention)]


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
    """A transformer block of SAM, which does not project the padding of its windows."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        x = x.contiguous()  # the patch embedding leaves features apart, and every sum would, too
        size, attention = self.window_size, self.attn
        padded = size > 0 and (x.shape[1] % size or x.shape[2] % size)
        ours = isinstance(attention, (_SegmentAnything, _HuggingFace))
        # Who watches a layer sees whole windows.
        watched = ours and any(
            getattr(part, f"_{kind}_hooks")
            for part in (attention, attention.qkv, attention.proj)
            for kind in ("forward_pre", "forward", "backward_pre", "backward")
        )
        if not padded or not ours or watched or attention.drops or traced():
            return self.host_class.forward(self, x)
        prefix = "" if hasattr(self, "norm1") else "layer_"  # Hugging Face's
        norm1, norm2 = (getattr(self, f"{prefix}norm{i}") for i in (1, 2))
        x = x + over_windows(attention, norm1(x), size)
        return x + self.mlp(norm2(x))


class _SegmentAnything(FusedAttention):
    drops = False

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        return over_grid(self, x)


class _HuggingFace(FusedAttention):
    @property
    def num_heads(self: Any) -> int:
        """As segment_anything calls it."""
        return self.num_attention_heads

    @property
    def drops(self: Any) -> bool:
        """Whether it drops weights at random, which the fused operator does not."""
        return self.training and self.dropout > 0

    def forward(
        self: Any, hidden_states: Tensor, output_attentions: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, H, W, C) to the same, and None instead of attention weights."""
        if traced() or output_attentions or self.drops:
            return self.host_class.forward(self, hidden_states, output_attentions)
        return over_grid(self, hidden_states), None


class _Hiera(FusedAttention):
    """SAM 2's attention in timm."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same, or half of H and W where the queries are pooled."""
        if traced():
            return self.host_class.forward(self, x)
        return pooled_attention(self, x, self.num_heads, self.q_pool)


class _HuggingFaceHiera(FusedAttention):
    """Without a product of queries and keys that transformers computes and does not use."""

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """As ``_Hiera``."""
        if traced() or kwargs:
            return self.host_class.forward(self, hidden_states, **kwargs)
        stride = self.query_stride
        pool = functools.partial(F.max_pool2d, kernel_size=stride) if stride else None
        return pooled_attention(self, hidden_states, self.num_attention_heads, pool)


class _TinyViT(FusedAttention):
    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, N, C) to the same."""
        if traced():
            return self.host_class.forward(self, x)
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(batch, tokens, self.num_heads, -1)
        widths = [self.key_dim, self.key_dim, qkv.shape[-1] - 2 * self.key_dim]
        q, k, v = (part.transpose(1, 2) for part in qkv.split(widths, -1))  # (B, heads, N, d)
        o = dot_product_attention(q, k, v, self.scale, self._bias(x))
        return self.proj(o.transpose(1, 2).flatten(2))

    def _bias(self: Any, x: Tensor) -> Tensor:
        """The learned bias of each head and pair of tokens, (heads, N, N)."""
        if hasattr(self, "get_attention_biases"):  # timm
            return self.get_attention_biases(x.device)
        if self.training:
            return self.attention_biases[:, self.attention_bias_idxs]
        return self.ab  # MobileSAM computes it when the mode changes


# ---- Recognising ---------------------------------------------------------------------------------


class _Form(NamedTuple):
    """One kind of module: where its class is defined, and what an instance consists of."""

    classes: str
    """A regular expression that matches the class's module and name."""
    parts: frozenset[str]
    """The names that its children and parameters can have. The fused forward would leave out a
    further one."""
    mixin: Any
    """A subclass of ``Fused``."""
    names: frozenset[str] | None = None
    """If given, what the class's forward may refer to: a copy that refers to more computes more."""


_LINEAR = frozenset({"qkv", "proj"})
_TABLES = _LINEAR | {"rel_pos_h", "rel_pos_w"}
_BLOCK = frozenset({"norm1", "layer_norm1", "attn", "norm2", "layer_norm2", "mlp"})
_SAM, _HF = r"(.+\.)?modeling\.image_encoder", r"transformers\.models\.(sam|sam_hq)\.modeling_\1"
_SAM_ATTENTION = "shape reshape num_heads permute unbind scale transpose softmax view use_rel_pos"
_SAM_BLOCK = "window_size shape window_partition window_unpartition"
_FORMS = (
    _Form(
        rf"{_SAM}\.Attention",
        _TABLES,
        _SegmentAnything,
        _TABLES | {*_SAM_ATTENTION.split(), "add_decomposed_rel_pos"},
    ),
    _Form(rf"{_SAM}\.Block", _BLOCK, FusedBlock, _BLOCK | {*_SAM_BLOCK.split()}),
    _Form(rf"{_HF}\.Sam(HQ)?Vision(Sdpa)?Attention", _TABLES, _HuggingFace),
    _Form(rf"{_HF}\.Sam(HQ)?VisionLayer", _BLOCK, FusedBlock),
    _Form(r"timm\.models\.hieradet_sam2\.MultiScaleAttention", _LINEAR | {"q_pool"}, _Hiera),
    _Form(r"transformers\.models\.sam2\..+\.Sam2MultiScaleAttention", _LINEAR, _HuggingFaceHiera),
    _Form(
        r"(timm\.models\.tiny_vit|(.+\.)?modeling\.tiny_vit_sam)\.Attention",
        _LINEAR | {"norm", "attention_biases"},
        _TinyViT,
    ),
)


def _fused_kind(module: nn.Module) -> Any:
    """The class that makes a module fused; None if it is fused already, or not known."""
    kind: Any = type(module)
    replaced = kind.forward.__module__ != kind.__module__ or "forward" in vars(module)
    if replaced or isinstance(module, Fused):
        return None
    for form in _FORMS:
        if (
            re.fullmatch(form.classes, f"{kind.__module__}.{kind.__name__}")
            and {*module._modules, *module._parameters} <= form.parts
            and (form.names is None or {*kind.forward.__code__.co_names} <= form.names)
        ):
            return _fused_class(form.mixin, kind)
    return None


@functools.cache
def _fused_class(mixin: Any, host_class: Any) -> Any:
    """The subclass. It has the name of ``host_class``, so the model is printed as before."""
    kept = ("__module__", "__qualname__", "__doc__")
    own = {name: getattr(host_class, name) for name in kept}
    own |= {"host_class": host_class, "mixin": mixin}
    return type(host_class.__name__, (mixin, host_class), own)


def _rebuild(mixin: Any, host_class: Any) -> Any:
    """An empty fused attention, whose state ``copy`` and ``pickle`` fill in."""
    fused = _fused_class(mixin, host_class)
    return fused.__new__(fused)
