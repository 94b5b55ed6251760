"""Models inside wrappers: the names and tensors of the model itself.

``DistributedDataParallel``, ``DataParallel``, ``AveragedModel`` and ``torch.compile`` put a model
into an attribute of a wrapper, so its tensors get names such as ``module.neck.weight``. What is
saved carries the names of the bare model. ``fully_shard`` (FSDP2) keeps the names and shards the
tensors; what is saved is gathered. Gathering is collective: every process must take part.
"""

import sys
from collections.abc import Mapping
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

    Entries that are no tensors are left out. Sharded tensors stay so. ``keep_vars`` is that of
    ``torch.nn.Module.state_dict``.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # importing it takes time
    state: dict[str, Any] = {}
    for name, path in bare_paths(model).items():
        module = model.get_submodule(name)
        if fsdp and isinstance(module, fsdp.FSDPModule):
            module.reshard()  # what is written into parameters gathered for a forward is lost
        if holder(module) is None:
            module._save_to_state_dict(state, f"{path}." if path else "", keep_vars)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies values, by names of ``bare_state``, into the tensors of these names, in place.

    Sharded tensors take their own part. TinyViT caches its attention biases in evaluation mode; a
    change of mode drops the cache.
    """
    state: dict[str, Any] = bare_state(model)
    with torch.no_grad():
        for name, source in tensors.items():
            target = state[name]
            if is_sharded(target):
                from torch.distributed.tensor import distribute_tensor  # takes time, too

                # Every process has the values, so nothing is sent.
                source = source.to(target.device, target.dtype)
                mesh, placements = target.device_mesh, target.placements
                source = distribute_tensor(source, mesh, placements, src_data_rank=None)
            target.copy_(source)
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
    """Whether any of the model's tensors is a DTensor, as ``fully_shard`` makes them."""
    return any(is_sharded(tensor) for tensor in bare_state(model).values())


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The tensor in one piece, detached. Collective if it is sharded."""
    whole: Any = tensor
    return (whole.full_tensor() if is_sharded(whole) else whole).detach()


def writes_together(model: nn.Module) -> bool:
    """Whether the model's processes hold it together, so that the first one writes for all.

    Every process that saves an unsharded model writes.
    """
    return sharded(model) and distributed.is_initialized()
