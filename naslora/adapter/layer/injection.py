"""Puts NAS-LoRA or another method into an existing model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from naslora.adapter.io.base_state import override_save_pretrained
from naslora.adapter.layer.applied import RECORD, Applied, applied, find_method, image_encoder
from naslora.adapter.layer.calls import watch
from naslora.adapter.layer.config import MethodConfig, NASLoRAConfig, TargetConfig
from naslora.adapter.layer.grid import place_hint
from naslora.adapter.layer.layer import NASLoRALinear, layer_generator
from naslora.adapter.layer.modules import (
    NAMED,
    keep_frozen,
    replace_module,
    undone_on_error,
)
from naslora.adapter.layer.targets import compiled, find_targets, with_names
from naslora.errors import UserError
from naslora.settings import Seed, checked


def inject(
    model: nn.Module,
    config: NASLoRAConfig | None = None,
    *,
    train: str | Sequence[str] = (),
    seed: int = 0,
) -> list[str]:
    """Replaces the matching nn.Linear layers by ``NASLoRALinear``, in place; freezes all else.

    Frozen batch norms stay in evaluation mode from then on, also after ``model.train()``. Norms
    that are made trainable later follow the next ``model.train()``. A layer's random
    numbers come from ``seed`` and its name: the same model, configuration and seed give the same
    adapter on every device.

    Args:
        model: any model whose target layers see (B, H, W, C) or (B, N, C) token grids.
        config: what to inject where; None for the defaults.
        train: what is trained beside the adapter, such as ``("mask_decoder",)``: names of modules
            or parameters, ends of names that follow a dot, or regular expressions that match a
            whole name. The frozen weights of adapted layers stay frozen.
        seed: of every random number.

    Returns:
        The names of the replaced layers, in model order.

    Raises:
        UserError: an argument of a wrong type, no layer matches, a match is no nn.Linear, a block
            index is out of range, there is no such preset, a pattern of ``train`` matches nothing,
            or the model has NAS-LoRA layers already. The model is then unchanged.
    """
    config = checked("config", NASLoRAConfig() if config is None else config, NASLoRAConfig)
    if hasattr(model, NAMED):
        raise UserError("the model has NAS-LoRA layers already; add_adapter adds another adapter")
    patterns = (train,) if isinstance(train, str) else checked("train", train, tuple[str, ...])
    seed = checked("seed", seed, Seed)
    with undone_on_error(model):
        adapted = build_layers(model, config, seed)
        frozen = {p for layer in adapted.values() for p in layer.base.parameters()}
        modules, trained = _trained(model, patterns, frozen)
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    for name, layer in adapted.items():
        layer.train(model.training)
        replace_module(model, name, layer)
    keep_frozen(model, modules)
    override_save_pretrained(model)
    watch(model, list(adapted))
    return list(adapted)


def build_layers(model: nn.Module, config: NASLoRAConfig, seed: int) -> dict[str, NASLoRALinear]:
    """New layers around the targets, by the targets' names. The model is not changed, except that
    the targets are frozen."""
    config, layers = with_names(config, model), {}
    for name, base in find_targets(model, config).items():
        layers[name] = layer = NASLoRALinear(base, config, layer_generator(seed, name))
        place_hint(model, name, layer, config.prefix_tokens)
    return layers


def _trained(
    model: nn.Module, patterns: Sequence[str], frozen: set[nn.Parameter]
) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """The modules and parameters that patterns of ``train`` select, without those in ``frozen``."""
    named: dict[str, Any] = {**dict(model.named_modules()), **dict(model.named_parameters())}
    modules: list[nn.Module] = []
    parameters: list[nn.Parameter] = []
    for pattern in patterns:
        whole = compiled("train", pattern)
        chosen = [
            part
            for name, part in named.items()
            if name == pattern or name.endswith(f".{pattern}") or (name and whole.fullmatch(name))
        ]
        inside = [part for part in chosen if isinstance(part, nn.Module)]
        found = [p for part in inside for p in part.parameters()]
        found += [part for part in chosen if isinstance(part, nn.Parameter)]
        found = [p for p in found if p not in frozen and p.is_floating_point()]
        if not found:
            children = ", ".join(name for name, _ in model.named_children())
            raise UserError(
                f"train: {pattern!r} matches no module with parameters to train; the model's "
                f"parts are: {children or 'none'}"
            )
        modules += inside
        parameters += found
    return modules, parameters


# ---- Methods -------------------------------------------------------------------------------------


def apply(name: str, model: nn.Module, config: MethodConfig | None = None, seed: int = 0) -> None:
    """Freezes the image encoder and adds what a method trains, in place.

    Args:
        name: one of ``naslora.methods.METHODS``.
        model: a model with an ``image_encoder`` (or, as Hugging Face names it, ``vision_encoder``),
            of which nothing else changes; or the encoder.
        config: the method's own configuration; None for its defaults.
        seed: of every random number.

    Raises:
        UserError: an unknown name, another method's configuration, a model that has a method
            already, or an encoder that the method does not support. The model is then unchanged.
    """
    method, seed = find_method(name), checked("seed", seed, Seed)
    config, present, encoder = method.checked(config), applied(model), image_encoder(model)
    if present is not None:
        raise UserError(f"the model has a method already: {present.method.name}")
    if isinstance(config, TargetConfig):
        config = with_names(config, encoder)
    with undone_on_error(encoder):
        before = {id(tensor) for tensor in encoder.state_dict(keep_vars=True).values()}
        modules = set(encoder.modules())
        encoder.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            method.add(encoder, config, seed)
        for module in set(encoder.modules()) - modules:
            module.training = encoder.training
        keep_frozen(encoder)
        setattr(encoder, RECORD, Applied(method, config, tuple(_own_tensors(encoder, before))))
    override_save_pretrained(model)


def _own_tensors(encoder: nn.Module, before: set[int]) -> list[str]:
    """Names in the state dict of new tensors, trained ones, and statistics of norms that train."""

    def trains(buffer: str) -> bool:
        own = list(encoder.get_submodule(buffer.rpartition(".")[0]).parameters(recurse=False))
        return bool(own) and all(parameter.requires_grad for parameter in own)

    state = encoder.state_dict(keep_vars=True)
    statistics = {name for name, _ in encoder.named_buffers() if trains(name)}
    return [
        name
        for name, tensor in state.items()
        if id(tensor) not in before or tensor.requires_grad or name in statistics
    ]
