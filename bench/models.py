"""Whole models of every method on the same frozen weights, and the steps that are timed of them.

The names of candidates are a method, or ``untouched``, and how its model differs from what
``naslora train`` runs: ``STOCK``, ``COMPILED``, ``ON`` and the target, or ``MERGED`` and the mode.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from naslora import NASLoRAConfig, arch_parameters
from naslora.errors import UserError
from naslora.methods import (
    METHODS,
    apply,
    auxiliary_loss,
    configure,
    merge,
    merge_modes,
    searches,
    trainable_parameters,
)
from naslora.sam.attention import fuse_attention
from naslora.sam.precision import cast_frozen
from naslora.sam.segmentation import SamForSegmentation, build_model
from naslora.sam.shipped import NONE
from naslora.sam.vits import VITS
from naslora.training.evaluation import loss_of
from naslora.training.run_config import TrainConfig

UNTOUCHED = "untouched"
MOST_INPUTS = 1280  # of a layer, in ViT-H
STOCK = " stock attention"  # segment_anything's own code; all others are on fused attention
COMPILED = " compiled"
FLOOR = "frozen linear layers"
ON = " on "
MERGED = " merged "
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SEARCH = TrainConfig()
# Adapters end in a zero matrix and gates start level. Small random values stand for trained ones:
# every gradient is then due, every merge changes something, and every expert gets its windows.
SPREAD = 0.02


@dataclass(frozen=True)
class Setting:
    """What a comparison of methods runs on."""

    model: str
    image_size: int
    batch: int
    precision: str = "no"
    device: str = "cpu"

    def __str__(self) -> str:
        kind = "" if self.precision == "no" else f" {self.precision}"
        return f"{self.model} {self.image_size}px x{self.batch}{kind}"


class Candidate:
    """One method's model, as it trains."""

    def __init__(self, method: str, model: SamForSegmentation, setting: Setting) -> None:
        self.method, self.model, self.setting = method, model, setting
        self.images, self.masks = batch(setting)
        self.alpha = arch_parameters(model)
        ours = {id(parameter) for parameter in self.alpha}
        adapter = [p for p in trainable_parameters(model) if id(p) not in ours]
        self.weights = [*model.mask_decoder.parameters(), *adapter]

    @cached_property
    def weight_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.weights, 1e-4)

    @cached_property
    def alpha_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.alpha, 3e-4, betas=(0.5, 0.999))

    def loss(self) -> Tensor:
        with autocast(self.setting):
            output = self.model(self.images)
        loss = loss_of(SEARCH)(output, self.masks)
        extra = auxiliary_loss(self.model)
        return loss if extra is None else loss + extra

    def weight_step(self) -> None:
        """What ``naslora.training.trainer`` does with one batch in an epoch's weight steps."""
        self._require_gradients(self.weights)
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.weights, SEARCH.clip_norm)
        self.weight_optimizer.step()
        self.weight_optimizer.zero_grad()

    def architecture_step(self) -> None:
        """The same in its architecture steps: only alpha requires gradients."""
        self._require_gradients(self.alpha)
        self.loss().backward()
        self.alpha_optimizer.step()
        self.alpha_optimizer.zero_grad()

    def gradients(self) -> tuple[Tensor, ...]:
        """The loss and all its gradients, for the gate."""
        parameters = [*self.weights, *self.alpha]
        self._require_gradients(parameters)
        torch.manual_seed(0)
        loss = self.loss()
        # Zero for the experts of Conv-LoRA that no window chose.
        grads = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return loss.detach(), *grads

    def _require_gradients(self, parameters: list[Tensor]) -> None:
        chosen = {id(parameter) for parameter in parameters}
        for parameter in (*self.weights, *self.alpha):
            parameter.requires_grad_(id(parameter) in chosen)
        self.model.train()


def batch(setting: Setting, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random images (B, 3, S, S) in [0, 1] and labels (B, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    size = (setting.batch, 3, setting.image_size, setting.image_size)
    images = torch.rand(size, generator=generator)
    return images.to(setting.device), (images[:, 0] > 0.5).long().to(setting.device)


def autocast(setting: Setting) -> torch.autocast:
    dtype = PRECISIONS[setting.precision]
    return torch.autocast(setting.device, dtype, enabled=dtype is not None)


def untouched(setting: Setting) -> SamForSegmentation:
    """SAM as it came, on stock attention, with random weights."""
    model = build_model(setting.model, setting.image_size, checkpoint=NONE)
    return model.to(setting.device).eval()


def with_fused_attention(base: SamForSegmentation) -> SamForSegmentation:
    """A copy of ``base`` on fused attention. It shares no weights: one of both may be cast."""
    model = copy.deepcopy(base)
    fuse_attention(model.image_encoder)
    return model


def adapted(method: str, base: SamForSegmentation, **config: object) -> SamForSegmentation:
    """``base`` with a method applied, as if trained a little; big frozen tensors are shared.

    The methods adapt every attn.qkv, as in the paper, unless ``config`` says otherwise.

    Raises:
        UserError: the method does not fit.
    """
    model = sharing_copy(base, share=not METHODS[method].trains_encoder)
    apply(method, model, configure(method, NASLoRAConfig(**{"target": "qkv"} | config)))
    fill_zeros(trainable_parameters(model))
    return model


def sharing_copy(model: nn.Module, share: bool = True) -> nn.Module:
    """A copy, which with ``share`` shares the encoder's weight matrices."""
    shared = [p for p in model.image_encoder.parameters() if share and p.dim() > 1]
    return copy.deepcopy(model, {id(p): p for p in shared})


@torch.no_grad()
def fill_zeros(parameters: Iterable[Tensor]) -> None:
    """Gives parameters that start at zero small random values."""
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters:
        if parameter.dim() > 1 and not parameter.any():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(SPREAD * values)


def candidates(
    setting: Setting, names: Iterable[str], base: SamForSegmentation
) -> dict[str, Candidate]:
    """Models that train, by name. A method that does not fit the encoder is left out.

    ``names`` are those of ``training_names``; ``base`` is the untouched model, on stock attention.
    """
    fused = with_fused_attention(base)
    found = {}
    for name in names:
        method, layers = parse(name)
        try:
            model = adapted(method, base if name.endswith(STOCK) else fused, **layers)
        except UserError:
            continue
        if PRECISIONS[setting.precision] is not None and not name.endswith(STOCK):
            cast_frozen(model.image_encoder, PRECISIONS[setting.precision])  # as naslora train does
        if name.endswith(COMPILED):
            # Blocks of a kind share one compilation, which that of the whole encoder would repeat.
            # The random numbers are eager mode's, by which Conv-LoRA chooses: the gate compares.
            for block in model.image_encoder.blocks:
                block.compile(dynamic=False, options={"fallback_random": True})
        found[name] = Candidate(method, model, setting)
    return found


def floor(base: SamForSegmentation, setting: Setting) -> Callable[[], None]:
    """What the encoder's frozen linear layers alone take: outputs, and gradients of inputs.

    The padding of a plain ViT's windows is left out.
    """
    dtype, tokens = PRECISIONS[setting.precision] or torch.float32, 0
    if hasattr(base.image_encoder, "blocks"):
        tokens = setting.batch * (setting.image_size // base.family.patch) ** 2
    works = []

    def add(layer: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        rows = tokens or inputs[0].shape[:-1].numel()
        x, grad = (torch.randn(rows, t.shape[-1], device=t.device) for t in (inputs[0], output))
        works.append([t.to(dtype) for t in (layer.weight.detach(), x, grad)])

    layers = [m for m in base.image_encoder.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        base(batch(setting)[0])
    for hook in hooks:
        hook.remove()

    def run() -> None:
        for weight, x, grad in works:
            nn.functional.linear(x, weight)
            grad @ weight

    return run


def parse(name: str) -> tuple[str, dict[str, str]]:
    """The method of a candidate that trains, and the field of its configuration that is changed."""
    method, on, target = name.removesuffix(STOCK).removesuffix(COMPILED).partition(ON)
    return method, {"target": target} if on else {}


def training_names(
    methods: Sequence[str],
    stock: Sequence[str],
    compiled: Sequence[str] = (),
    targets: Sequence[str] = (),
) -> list[str]:
    """All that train.

    Args:
        methods: which methods.
        stock: which of them are also on stock attention.
        compiled: which of them also go through ``torch.compile``.
        targets: what those that adapt linear layers also adapt.
    """
    linear = [m for m in methods if m in METHODS and hasattr(METHODS[m].config, "target")]
    chosen = {"": methods, STOCK: stock, COMPILED: compiled}
    chosen |= {ON + target: linear for target in targets}
    return [method + how for method in methods for how in chosen if method in chosen[how]]


def training_steps(name: str) -> tuple[str, ...]:
    """What is timed of a candidate that trains."""
    return ("weights", "architecture", "epoch") if searches(parse(name)[0]) else ("weights",)


def inference_names(methods: Iterable[str]) -> list[str]:
    """All that can be timed without training: untouched models, methods, methods merged."""
    names = [UNTOUCHED + STOCK, UNTOUCHED]
    for method in methods:
        modes = merge_modes(method)
        names += [method, *(method + MERGED + mode for mode in modes)]
    return names


def inference_models(
    methods: Iterable[str], base: SamForSegmentation, setting: Setting
) -> dict[str, nn.Module]:
    """Models by name: ``base``, which is untouched and on stock attention, and the same on fused
    attention; every method before merging, and after each of its ways to merge."""
    # Calibrated merging wants four tokens for each input of a layer.
    tokens = setting.batch * (setting.image_size // base.family.patch) ** 2
    batches = math.ceil(4 * VITS[setting.model].width / tokens)
    calibration = [batch(setting, seed)[0] for seed in range(batches)]
    # So often that the widest layer of the largest model may be fitted to them.
    enough = calibration * math.ceil(MOST_INPUTS / (batches * tokens))
    fused = with_fused_attention(base)
    models = {UNTOUCHED + STOCK: base, UNTOUCHED: fused}
    for name in inference_names(methods)[len(models) :]:
        method, _, mode = name.partition(MERGED)
        if mode and method in models:
            models[name] = sharing_copy(models[method])
            merge(models[name], mode, enough if mode == "calibrated" else calibration)
        elif not mode:
            with contextlib.suppress(UserError):
                models[name] = adapted(method, fused)
    return {name: model.eval() for name, model in models.items()}


@torch.no_grad()
def inference(model: nn.Module, setting: Setting, images: Tensor) -> Tensor:
    """Images in, mask logits out."""
    with autocast(setting):
        return model(images).masks


# ---- The gate ----------------------------------------------------------------------------------


def gate_training(found: dict[str, Candidate], base: SamForSegmentation) -> str | None:
    """Why these models must not be timed, or None.

    Each is held against the same method and weights in float32 without anything of ours: on stock
    attention, with the reference backend, not compiled. Twelve layers of float32 in another order
    differ by 1e-4 or so. In 16 bits the reference's own small gradients differ by up to 0.2, so
    there each error may be 0.25, or twice that of the reference in the same precision, its frozen
    weights included.
    """

    @functools.lru_cache(maxsize=1)  # the candidates of a method follow one another
    def expected(name: str, setting: Setting) -> tuple[tuple[Tensor, ...], list[float]]:
        """The loss and the gradients, and how much each may differ."""
        method, layers = parse(name)
        plain = adapted(method, base, backend="reference", **layers)
        exact = Candidate(method, plain, replace(setting, precision="no")).gradients()
        if setting.precision == "no":
            return exact, [1e-3] * len(exact)
        plain = copy.deepcopy(plain)  # its weights are those of ``base``, and are cast now
        cast_frozen(plain.image_encoder, PRECISIONS[setting.precision])
        rounded = Candidate(method, plain, setting).gradients()
        return exact, [max(0.25, 2 * error) for error in _errors(rounded, exact, setting)]

    for name, candidate in found.items():
        if name == candidate.method + STOCK and not candidate.alpha:
            continue  # it is the reference
        plain = name.removesuffix(STOCK).removesuffix(COMPILED)
        exact, tolerances = expected(plain, candidate.setting)
        errors = _errors(candidate.gradients(), exact, candidate.setting)
        for i, (error, tolerance) in enumerate(zip(errors, tolerances, strict=True)):
            if not error < tolerance:
                what = "loss" if i == 0 else f"gradient {i - 1} of {tuple(exact[i].shape)}"
                return f"{name}: the {what} differs from the reference by {error:.1e} of its norm"
    return None


def _errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], setting: Setting) -> list[float]:
    # Some gradients are zero except for rounding, such as those of keys' biases before a softmax.
    share = 1e-5 if setting.precision == "no" else 1e-4
    rounding = share * torch.cat([value.flatten() for value in exact]).norm()
    return [
        float((value - expected).norm() / (expected.norm() + rounding))
        for value, expected in zip(found, exact, strict=True)
    ]


def gate_inference(models: dict[str, nn.Module], setting: Setting, images: Tensor) -> str | None:
    """Why these models must not be timed, or None: fused attention and exact merges change nothing
    but rounding."""
    tolerance = 1e-4 if setting.precision == "no" else 0.1
    outputs = {name: inference(model, setting, images) for name, model in models.items()}
    for name, output in outputs.items():
        method, _, mode = name.partition(MERGED)
        same = method if mode == "exact" else UNTOUCHED + STOCK if name == UNTOUCHED else None
        if same is not None:
            error = (output - outputs[same]).norm() / outputs[same].norm()
            if not error < tolerance:
                return f"{name} differs from {same} by {error:.1e} of its norm"
    return None
