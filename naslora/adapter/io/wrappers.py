"""Models inside wrappers: their bare names, and their tensors in one piece.

``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` and ``torch.compile`` put a model
into an attribute of a wrapper, so its tensors get names such as ``module.neck.weight``. What is
saved carries the names of the bare model. ``fully_shard`` (FSDP2) keeps the names and shards the
tensors; what is saved or merged is gathered. Gathering is collective: every process must take part.
"""

import copy
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from naslora.errors import UserError

# The attribute in which each kind of wrapper holds its model.
HOLDERS = ("_orig_mod", "_checkpoint_wrapped_module")
HOLDER = "module"
HELD_IN_MODULE = (DistributedDataParallel, DataParallel, AveragedModel)
# Libraries whose wrappers hold a model in ``module``: ModelEmaV2 and V3, DeepSpeedEngine.
LIBRARIES = ("timm", "deepspeed")


def holder(module: nn.Module) -> str | None:
    """The attribute in which a wrapper holds its model; None if the module is no wrapper."""
    children = module._modules
    for name in HOLDERS:
        if name in children:
            return name
    library = type(module).__module__.partition(".")[0]
    wraps = isinstance(module, HELD_IN_MODULE) or (library in LIBRARIES and len(children) == 1)
    return HOLDER if wraps and HOLDER in children else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it. Wrappers of its submodules stay."""
    while (name := holder(model)) is not None:
        model = model.get_submodule(name)
    return model


def bare_paths(model: nn.Module) -> dict[str, str]:
    """The names of all submodules, mapped to their names in the model without any wrappers.

    Raises:
        UserError: a part is inside FSDP1, which flattens its parameters.
    """
    paths = {"": ""}
    holders = {"": holder(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__name__ == "FullyShardedDataParallel":
            raise UserError("FullyShardedDataParallel flattens parameters: use fully_shard (FSDP2)")
        if name:
            parent, _, child = name.rpartition(".")
            wrapped = child == holders[parent]
            paths[name] = paths[parent] if wrapped else f"{paths[parent]}.{child}".lstrip(".")
            holders[name] = holder(module)
    return paths


def bare_state(model: nn.Module, keep_vars: bool = False) -> dict[str, Tensor]:
    """The state dict under the names of the bare model, without the wrappers' own tensors.

    Entries that are no tensors are left out.

    Args:
        model: the model, in wrappers or not.
        keep_vars: as in ``torch.nn.Module.state_dict``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = bare_paths(model)
    state = {}
    for name, tensor in model.state_dict(keep_vars=keep_vars).items():
        path, _, leaf = name.rpartition(".")
        while path not in paths:  # hooks of some wrappers drop their own part of the name
            path, _, part = path.rpartition(".")
            leaf = f"{part}.{leaf}"
        own = leaf in modules[path]._buffers or leaf in modules[path]._parameters
        if not (own and holder(modules[path])) and isinstance(tensor, Tensor):
            state[f"{paths[path]}.{leaf}".lstrip(".")] = tensor
    return state


def matching_name(name: str, known: Collection[str]) -> str:
    """A name from a file as the model knows it. Files may hold the names of wrappers, too.

    Args:
        name: the name.
        known: the names that the bare model has.

    Returns:
        The name without the wrappers' parts if the model has that name, else ``name``.
    """
    if name in known:
        return name
    parts = name.split(".")
    for parents in ((*HOLDERS, HOLDER), HOLDERS):
        shorter = ".".join(part for part in parts if part not in parents)
        if shorter in known:
            return shorter
    return name


def drop_caches(model: nn.Module) -> None:
    """Makes a model forget what it computed from old weights.

    TinyViT caches its attention biases in evaluation mode; a change of mode drops the cache.
    """
    training = {module: module.training for module in model.modules()}
    model.train()
    for module, mode in training.items():
        if module.training != mode:
            module.train(mode)


# ---- Sharded tensors -----------------------------------------------------------------------------


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` manages a part of the model, or any of its tensors is a DTensor."""
    tensors = (*model.parameters(), *model.buffers())
    return bool(_managed(model)) or any(is_sharded(tensor) for tensor in tensors)


def _managed(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes time
    return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)] if fsdp else []


def reshard(model: nn.Module) -> None:
    """Frees the gathered parameters that FSDP keeps after a forward pass.

    Values that are written into them would be lost.
    """
    for module in _managed(model):
        module.reshard()


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The tensor in one piece, detached. Collective if it is sharded."""
    whole: Any = tensor
    return (whole.full_tensor() if is_sharded(whole) else whole).detach()


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copies values in place. A sharded target takes its own part of ``source``."""
    into: Any = target
    if is_sharded(into):
        from torch.distributed.tensor import distribute_tensor  # loads much of torch.distributed

        # Every process has the values, so nothing is sent.
        whole = source.to(into.device, into.dtype)
        source = distribute_tensor(whole, into.device_mesh, into.placements, src_data_rank=None)
    into.copy_(source)


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Yields whether this process writes files. The processes of a sharded model leave together.

    Every process that saves an unsharded model writes.
    """
    together = sharded(model) and distributed.is_initialized()
    try:
        yield not together or distributed.get_rank() == 0
    finally:
        if together:
            distributed.barrier()


def unsharded(model: nn.Module) -> nn.Module:
    """A copy of a sharded model with gathered tensors, outside FSDP; any other model as it is.

    The copy shares the tensors that are not sharded. Collective if the model is sharded.
    """
    if not sharded(model):
        return model
    reshard(model)
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): _like(tensor) for tensor in tensors}
    managed = _managed(model)
    for module in managed:  # their classes refuse to be copied
        plain = type(module).__mro__[type(module)._orig_cls_mro_index]
        memo[id(module)] = object.__new__(plain)
    for module in managed:
        vars(memo[id(module)]).update(copy.deepcopy(_without_fsdp(vars(module)), memo))
    return copy.deepcopy(model, memo)


def _without_fsdp(attributes: dict[str, Any]) -> dict[str, Any]:
    """A module's attributes without the state of FSDP, and without the hooks that gather."""
    kept = {n: v for n, v in attributes.items() if not n.startswith("__composable_api_state_key")}
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = kept[name].items()
        kept[name] = OrderedDict((key, hook) for key, hook in hooks if not _is_of_fsdp(hook))
    return kept


def _is_of_fsdp(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")


def _like(tensor: Tensor) -> Tensor:
    """The tensor itself; a sharded one in one piece, and a parameter if it is one."""
    if not is_sharded(tensor):
        return tensor
    whole = gathered(tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(whole, requires_grad=tensor.requires_grad)
    return whole
