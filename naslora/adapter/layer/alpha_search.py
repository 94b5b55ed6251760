"""The search in a training loop of one's own: kinds of parameters, and steps of alpha.

The loop trains the weights as it trains any model. ``AlphaSearch.step`` then takes a step of the
architecture parameters alpha on other images (paper, Algorithm 1, first order).
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer, optimizer

from naslora.adapter.io.wrappers import unwrap
from naslora.adapter.layer.config import Alpha
from naslora.adapter.layer.modules import adapter_layers, arch_parameters, cell_parameters
from naslora.errors import UserError, listing
from naslora.settings import Index, checked

NO_ALPHA = (
    "the loss of loss_fn does not depend on alpha; compute it with the model that loss_fn is "
    "given, with gradients on"
)
CELL_RATE = 10.0
"""The default rate of the cells' weights, as a multiple of the other weights' rate. An operation
starts with a small share of the mixture, so its weights have to move further to be felt."""
Loss = Callable[[nn.Module, Any], Tensor]
"""Takes the model and a batch. Returns the loss, a scalar."""


def weight_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Everything trainable except alpha: adapters' weights and the trained parts of the host."""
    alphas = {id(alpha) for alpha in arch_parameters(model)}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in alphas]


def param_groups(
    model: nn.Module,
    lr: float,
    alpha_lr: float | None = None,
    weight_decay: float = 0.0,
    cell_rate: float = CELL_RATE,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: the weights, the cells' weights, and alpha if it has a rate.

    A loop that sets the rate itself has to keep the multiple: the cells' group has the entry
    ``cell_rate``. ``group["lr"] = lr * group.get("cell_rate", 1)``. Schedulers of torch keep it.
    If all groups are set to one rate, a warning says so once.

    Args:
        model: an adapted model.
        lr: learning rate of the weights.
        alpha_lr: learning rate of alpha; None leaves alpha to an ``AlphaSearch``.
        weight_decay: of the weights. The cells and alpha have none: Adam scales the decay up to
            the size of their small gradients, and the search would be undone.
        cell_rate: learning rate of the cells' weights, as a multiple of ``lr``.

    Returns:
        The group of the weights without the cells'; the cells', if the model has cells; alpha's,
        if ``alpha_lr`` is given and the model has alpha.
    """
    cells = [parameter for parameter in cell_parameters(model) if parameter.requires_grad]
    own = {id(parameter) for parameter in cells}
    weights = [p for p in weight_parameters(model) if id(p) not in own]
    groups = [{"params": weights, "lr": lr, "weight_decay": weight_decay}]
    if cells:
        own_entries = {"lr": cell_rate * lr, "weight_decay": 0.0, "cell_rate": cell_rate}
        groups.append(CellGroup(groups[0], params=cells, **own_entries))
    alphas = arch_parameters(model)
    if alpha_lr is not None and alphas:
        groups.append({"params": alphas, "lr": alpha_lr, "weight_decay": 0.0})
    return groups


class CellGroup(dict[str, Any]):
    """The cells' group of an optimizer. It warns, once, if its rate is set to that of the others.

    ``others`` is the group of the other weights.
    """

    others: dict[str, Any] | None = None  # also in copies, which are filled before it is set

    def __init__(self, others: dict[str, Any], **entries: Any) -> None:
        super().__init__(entries)
        self.others = others

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        if key != "lr" or self.others is None or self.get("cell_rate", 1) == 1:
            return
        if value and value == self.others["lr"]:
            self.others = None
            warnings.warn(
                f"the cells' weights have been set to the rate of the others, {float(value):g}, "
                f"and lose their factor of {self['cell_rate']:g}: set every group to "
                "lr * group.get('cell_rate', 1)",
                stacklevel=2,
            )


def print_trainable_parameters(model: nn.Module) -> None:
    """Prints how many parameters train and how many there are, in PEFT's words."""
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    share = 100 * trainable / total if total else 0.0
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")


class AlphaAdam(torch.optim.Adam):
    """The optimizer of an ``AlphaSearch``."""


class AlphaSearch:
    """Steps of alpha beside a training loop of one's own.

    It has its own Adam, and only that moves alpha: steps of other optimizers leave alpha as it was.
    A step changes neither the weights nor their gradients. It runs the model below its wrappers
    (DistributedDataParallel, torch.compile) and averages alpha's gradients over the processes
    itself, so DistributedDataParallel needs no ``find_unused_parameters``. Every process must call
    ``step`` equally often.

    The loss is scaled by a power of two before the backward pass, as with fp16 it has to be. With
    other dtypes that changes nothing. A step whose gradients are not finite is skipped.

    Args:
        model: an adapted model, in wrappers or not.
        lr: learning rate of alpha.
        start: when the search starts: an epoch if ``step`` is given epochs, else a number of calls.
        betas: of Adam.

    Attributes:
        calls: how often ``step`` was called.
        optimizer: the Adam of alpha.
        required: whether alpha requires gradients between the steps, too. It does if there is a
            process group, because DistributedDataParallel may wait for them.

    Raises:
        UserError: the model has no alpha, or an argument is out of range.
    """

    def __init__(
        self, model: nn.Module, lr: float, start: int = 0, betas: tuple[float, float] = (0.5, 0.999)
    ) -> None:
        lr, start = checked("lr", lr, Alpha), checked("start", start, Index)
        self.model = unwrap(model)
        self.alphas = arch_parameters(self.model)
        if not self.alphas:
            raise UserError("the model has no alpha to search; inject NAS-LoRA with a cell first")
        if any(hasattr(alpha, "full_tensor") for alpha in self.alphas):
            raise UserError(
                "AlphaSearch cannot train sharded parameters (fully_shard); give alpha a group of "
                "the weights' optimizer: param_groups(model, lr, alpha_lr)"
            )
        self.start = start
        self.calls = 0
        self.optimizer = AlphaAdam(self.alphas, lr=lr, betas=betas)
        self._scaler = torch.amp.GradScaler(self.alphas[0].device.type)
        self._message: Any = None
        self.required = processes() > 0
        self._hold_in_other_optimizers()
        self.rest()

    def step(self, batch: Any, loss_fn: Loss, epoch: int | None = None) -> float | None:
        """Takes a step of alpha on a batch.

        Args:
            batch: what ``loss_fn`` takes; images that the weights do not train on, if possible.
            loss_fn: takes the bare model and the batch, and returns the loss, a scalar. Autocast
                belongs into it.
            epoch: the current epoch; None counts the calls instead.

        Returns:
            The loss, averaged over the processes; None before ``start``.

        Raises:
            UserError: the loss is no scalar tensor, or does not depend on alpha.
        """
        now = self.calls if epoch is None else epoch
        self.calls += 1
        self.rest()  # DistributedDataParallel fills the gradients in the steps of the weights, too
        if now < self.start:
            return None
        with self._alpha_alone():
            # Autocast could return copies of the weights that still require gradients.
            torch.clear_autocast_cache()
            loss = loss_fn(self.model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise UserError(f"loss_fn must return a scalar tensor, got {got}")
            if loss.requires_grad:
                self._scaler.scale(loss).backward()
            if all(alpha.grad is None for alpha in self.alphas):
                names = [name for name, layer in adapter_layers(self.model) if not layer.called]
                idle = f"; the model has never called {listing(names)}, which are adapted"
                raise UserError(NO_ALPHA + (idle if names else ""))
            mean = self._average(loss.detach())
            self._scaler.step(self.optimizer)
            self._scaler.update()
        return mean

    def rest(self) -> None:
        """Drops alpha's gradients. Between the steps alpha requires none, unless ``required``."""
        for alpha in self.alphas:
            alpha.grad = None
            alpha.requires_grad_(self.required)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, the scale of the loss, and the number of calls."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "calls": self.calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        self.calls = state["calls"]

    def _hold_in_other_optimizers(self) -> None:
        """Restores alpha after every step of another optimizer, as long as this object lives."""
        alphas: list[Tensor] = [*self.alphas]
        before = [alpha.detach().clone() for alpha in alphas]

        @torch.no_grad()
        def copy(to: list[Tensor], source: list[Tensor], stepping: Optimizer, *_: Any) -> None:
            if not isinstance(stepping, AlphaAdam):
                torch._foreach_copy_(to, source)

        keep, restore = partial(copy, before, alphas), partial(copy, alphas, before)
        for handle in (
            optimizer.register_optimizer_step_pre_hook(keep),
            optimizer.register_optimizer_step_post_hook(restore),
        ):
            weakref.finalize(self, handle.remove)

    @contextmanager
    def _alpha_alone(self) -> Iterator[None]:
        """Lets alpha require gradients, and nothing else, while the body runs."""
        weights = weight_parameters(self.model)
        for parameter in weights:
            parameter.requires_grad_(False)
        for alpha in self.alphas:
            alpha.requires_grad_(True)
        try:
            yield
        finally:
            for parameter in weights:
                parameter.requires_grad_(True)
            self.rest()

    def _average(self, loss: Tensor) -> float:
        """Averages alpha's gradients, in place, and the loss over the processes, in one message."""
        if processes() > 1:
            grads = [torch.zeros_like(a) if a.grad is None else a.grad for a in self.alphas]
            flat = torch.cat([part.flatten().to(self.alphas[0]) for part in (*grads, loss)])
            # Kept, so that the group's thread need not free it, which takes Python's lock. A
            # DistributedDataParallel that outlives its group holds the lock and waits for it.
            self._message = distributed.all_reduce(flat, async_op=True)
            self._message.wait()
            flat /= processes()
            *means, loss = flat.split([*(grad.numel() for grad in grads), 1])
            for alpha, mean in zip(self.alphas, means, strict=True):
                alpha.grad = mean.view_as(alpha).to(alpha)
        return float(loss)


def processes() -> int:
    """The number of processes of the process group; 0 without one."""
    grouped = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if grouped else 0


# ---- Hosts that train the weights themselves -----------------------------------------------------


class EpochSearch:
    """Alpha steps at the end of an epoch, for hosts that train the weights themselves.

    Args:
        held_out: batches that the weights do not train on, read anew each epoch: a DataLoader or a
            list. With several processes each one reads its own, and all must yield equally many.
        loss_fn: the loss of a batch.
        lr: Adam's rate for alpha.
        start: the first epoch with alpha steps, counted from 0.
        seed: seed of the channels that ``channel_selection="resample"`` draws each epoch.

    Attributes:
        losses: by epoch, the mean loss of its alpha steps.

    Raises:
        UserError: ``held_out`` can be read only once.
    """

    search: AlphaSearch

    def __init__(
        self,
        held_out: Iterable[Any],
        loss_fn: Loss,
        *,
        lr: float = 1e-2,
        start: int = 0,
        seed: int = 0,
    ) -> None:
        if iter(held_out) is held_out:
            raise UserError(
                "held_out must be readable once an epoch, such as a DataLoader or a list, got "
                f"{type(held_out).__name__}, which ends after one pass"
            )
        self.held_out, self.loss_fn = held_out, loss_fn
        self.lr, self.start, self.seed = lr, start, seed
        self.losses: dict[int, float] = {}

    def attach(self, model: nn.Module) -> None:
        """Starts the search of a model, once, and freezes its alpha.

        Raises:
            UserError: the model has no alpha.
        """
        if not hasattr(self, "search") or self.search.model is not model:
            self.search = AlphaSearch(model, self.lr, self.start)
        self.search.required = False  # also with a process group: the host wraps the model later
        self.search.rest()

    def search_epoch(self, model: nn.Module, epoch: int, move: Callable[[Any], Any]) -> None:
        """Takes one alpha step on each held-out batch, from epoch ``start`` on. Epochs are counted
        from 0. ``move`` puts a batch on the device of the model, which is that of ``attach``.

        Raises:
            UserError: there are no held-out batches.
        """
        if epoch < self.start:
            return
        training, losses = model.training, []
        model.train()
        for batch in self.held_out:
            losses.append(self.search.step(move(batch), self.loss_fn, epoch) or 0.0)
        model.train(training)
        if not losses:
            raise UserError("held_out yielded no batches")
        self.losses[epoch] = sum(losses) / len(losses)
