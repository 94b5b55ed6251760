"""One optimizer step over all processes: the loss, its gradients, and their application.

Gradients are sums over the images of the global batch, divided by its size. So a step does not
depend on how many processes or forward passes share the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from naslora.methods import auxiliary_loss
from naslora.sam.segmentation import SegmentationOutput

Loss = Callable[[SegmentationOutput, Tensor], Tensor]


class Group(NamedTuple):
    """The parameters that one kind of step trains, and their optimizer."""

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    clip_norm: float
    """Largest norm of the group's gradients; 0 does not clip."""


def require_gradients(groups: Sequence[Group], among: Sequence[Group]) -> None:
    """Lets the parameters of ``groups`` require gradients, and no others of ``among``.

    An architecture step then computes no gradient for the weights, and a weight step none for
    alpha.
    """
    for group in among:
        for parameter in group.parameters:
            parameter.requires_grad_(any(group is chosen for chosen in groups))


def accumulate_gradients(
    model: nn.Module,
    batch: dict[str, Any] | None,
    size: int,
    loss: Loss,
    passes: int,
    accelerator: Accelerator,
) -> Tensor:
    """Adds up the gradients of this process's share of a batch.

    Args:
        model: images to a ``SegmentationOutput``.
        batch: ``image`` (b, 3, S, S) and ``mask`` (b, S, S); None if this process has no share.
        size: images of the whole batch, over all processes.
        loss: the mean loss of a forward pass; the method's auxiliary loss is added to it.
        passes: forward passes over which the share is spread.
        accelerator: the device, precision and loss scaling.

    Returns:
        This process's part of the batch's mean loss, a scalar without gradient.
    """
    device = accelerator.device
    total = torch.zeros((), device=device)
    if batch is None:
        return total
    parts = min(passes, len(batch["image"]))
    pairs = zip(batch["image"].chunk(parts), batch["mask"].chunk(parts), strict=True)
    for images, masks in pairs:
        with accelerator.autocast():
            output = model(images.to(device, non_blocking=True))
        value = loss(output, masks.to(device, non_blocking=True))
        extra = auxiliary_loss(model)
        value = (value if extra is None else value + extra) * (len(images) / size)
        accelerator.backward(value)
        total += value.detach()
    return total


def sum_over_processes(groups: Sequence[Group], loss: Tensor, accelerator: Accelerator) -> float:
    """Sums the groups' gradients, in place, and the loss over the processes, in one message."""
    if accelerator.num_processes > 1:
        parameters = [p for group in groups for p in group.parameters]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), loss.reshape(1)])
        sizes = [*(parameter.numel() for parameter in parameters), 1]
        *summed, loss = accelerator.reduce(flat, "sum").split(sizes)
        for parameter, grad in zip(parameters, summed, strict=True):
            parameter.grad = grad.view_as(parameter).to(parameter.dtype)
    return float(loss)


def apply_gradients(groups: Sequence[Group], scaler: torch.amp.GradScaler | None) -> None:
    """Clips the gradients, takes one step of each group's optimizer, and clears the gradients.

    Accelerate's own optimizers are not used: with fp16 they would end the loss scaling at the
    first of two groups.
    """
    for group in groups:
        if scaler:
            scaler.unscale_(group.optimizer)
        if group.clip_norm:
            nn.utils.clip_grad_norm_(group.parameters, group.clip_norm)
        if scaler:
            scaler.step(group.optimizer)
        else:
            group.optimizer.step()
        group.optimizer.zero_grad()
    if scaler:
        scaler.update()


def average_batch_norms(model: nn.Module, accelerator: Accelerator) -> None:
    """Gives every process the same batch-norm statistics: the mean of what each has counted."""
    if accelerator.num_processes > 1:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.training:
                for statistic in (module.running_mean, module.running_var):
                    if statistic is not None:
                        statistic.copy_(accelerator.reduce(statistic, "mean"))
