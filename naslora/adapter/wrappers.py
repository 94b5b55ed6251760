"""Models inside wrappers: DistributedDataParallel, DataParallel, AveragedModel, torch.compile."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

COMPILED = "_orig_mod"  # where torch.compile's module holds the model; its class loads the compiler


def unwrap(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            model = model.module
        elif COMPILED in model._modules:
            model = model.get_submodule(COMPILED)
        else:
            return model
