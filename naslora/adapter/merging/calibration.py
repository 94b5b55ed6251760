"""Calibrated merging: a linear layer fitted, on calibration images, to the output of a cell.

A layer's update is s W_d y. y has r numbers a token, which the cell computes from the token and its
neighbours. Neighbouring tokens are alike, so the token's own input x predicts much of y:
y ~ G x + g by ridge regression, and s W_d G and s W_d g fold into the frozen weight and bias.

- Layers are fitted one after the other. A layer's inputs come from the model with the layers before
  it merged; its targets are what the unmerged model computed. So later layers correct errors of
  earlier ones.
- The penalty pulls G to the cell's centre taps (mode "center"), not to zero. With little data the
  result is that of "center". With more it moves away as far as held-out tokens agree.
- Only sums of products are kept: (C_in + r + 1)^2 numbers in float64 for each of a few groups of
  tokens, and r numbers a token for the targets. The groups are the folds of a cross-validation that
  chooses the penalty. They are consecutive in the stream of tokens, so that few tokens have a
  neighbour in another group.

The images pass once through the unmerged model, then once for every layer, up to that layer. What
lies before a layer's block is not computed again: see ``Inputs``. So a layer costs about half a
block. The only assumption on the model is that it calls its layers.
"""

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from naslora.adapter.layer.cell import PaperCell
from naslora.adapter.layer.layer import NASLoRALinear
from naslora.adapter.layer.modules import replace_module
from naslora.errors import UserError

FOLDS = 4
# Relative to the mean variance of a layer's inputs. The last one keeps the centre taps.
PENALTIES = tuple(10.0**k for k in range(-8, 4))
CHUNK = 4096  # tokens converted to float64 at a time

Layer = TypeVar("Layer", bound=nn.Module)
Forward = Callable[[Any, Any], Any]
"""Takes the model and a batch, and runs the model on the batch. What it returns is not used."""


class Calibration(NamedTuple):
    """Calibration batches, and how the model takes one."""

    batches: list[Any]
    """The batches, which are used more than once."""
    forward: Forward | None
    """Feeds a batch; None calls ``model(batch)``."""


class Fit(NamedTuple):
    """y ~ G x + g for one layer. The last three fields are those of a ``LayerError``."""

    linear_map: Tensor
    """(r, C_in) float64: G."""
    offset: Tensor
    """(r,) float64: g; zero where the layer has no bias."""
    tokens: int
    """Number of tokens of the calibration images that the layer saw."""
    regularisation: float
    """The penalty, relative to the mean variance of the inputs."""
    held_out_error: float
    """Relative error of the update on tokens held out from the fit, over all folds."""


class Moments:
    """Sums of products of v = (x, y, 1) over tokens, in float64, for each of FOLDS groups.

    ``tokens`` is how many will be added in all. x has size ``c_in``, y ``rank``.

    Attributes:
        sums: (FOLDS, C_in + r + 1, C_in + r + 1).
    """

    def __init__(self, tokens: int, c_in: int, rank: int, device: torch.device) -> None:
        size = c_in + rank + 1
        self.sums = torch.zeros(FOLDS, size, size, dtype=torch.float64, device=device)
        self.bounds = [round(tokens * fold / FOLDS) for fold in range(FOLDS + 1)]
        self.seen = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds the next tokens: x (T, C_in), y (T, r)."""
        for fold in range(FOLDS):
            first = max(self.bounds[fold] - self.seen, 0)
            last = min(self.bounds[fold + 1] - self.seen, len(x))
            for start in range(first, last, CHUNK):
                part = slice(start, min(start + CHUNK, last))
                v = torch.cat([x[part].double(), y[part].double()], 1)
                v = torch.cat([v, v.new_ones(len(v), 1)], 1)
                self.sums[fold] += v.T @ v
        self.seen += len(x)


def fit(moments: Moments, prior: Tensor, decoder: Tensor, bias: bool) -> Fit:
    """Ridge regression of y on x on all tokens, with the penalty chosen by cross-validation.

    The penalty pulls to ``prior``, (r, C_in). Its held-out error is least, measured in the outputs
    of ``decoder``, (C_out, r) W_d. Without ``bias`` the offset g is zero.
    """
    rank, c_in = prior.shape
    metric = decoder.double().T @ decoder.double()
    total = moments.sums.sum(0)
    held_out = torch.zeros(len(PENALTIES), dtype=torch.float64, device=total.device)
    for fold in moments.sums:
        for i, (linear_map, offset) in enumerate(_solve(total - fold, prior, bias)):
            residual = torch.cat([-linear_map, torch.eye(rank).to(total), -offset[:, None]], 1)
            held_out[i] += ((residual @ fold @ residual.T) * metric).sum()
    updates = (total[c_in:-1, c_in:-1] * metric).sum()
    best = int(held_out.argmin())
    [(linear_map, offset)] = _solve(total, prior, bias, PENALTIES[best : best + 1])
    error = float((held_out[best].clamp(min=0) / updates).sqrt()) if updates > 0 else 0.0
    return Fit(linear_map, offset, int(total[-1, -1]), PENALTIES[best], error)


def _solve(
    sums: Tensor, prior: Tensor, bias: bool, penalties: Sequence[float] = PENALTIES
) -> Iterator[tuple[Tensor, Tensor]]:
    """(G, g) for each penalty: prior + the ridge regression of y - prior x."""
    c_in = prior.shape[1]
    moments = sums[:c_in] / sums[-1, -1]
    means = sums[:-1, -1] / sums[-1, -1] if bias else torch.zeros_like(sums[:-1, -1])
    mean, target = means[:c_in], means[c_in:] - prior @ means[:c_in]
    covariance = moments[:, :c_in] - torch.outer(mean, mean)
    products = moments[:, c_in:-1] - moments[:, :c_in] @ prior.T - torch.outer(mean, target)
    variance = covariance.diagonal().mean().clamp(min=1e-300)
    for penalty in penalties:
        regular = covariance.clone()
        regular.diagonal().add_(penalty * variance)
        difference = torch.cholesky_solve(products, torch.linalg.cholesky(regular)).T  # (r, C_in)
        yield prior + difference, target - difference @ mean


def calibration_batches(
    calibration: Iterable[Any] | None, forward: Forward | None
) -> Calibration | None:
    """The arguments of ``merge``; None if no batches are given.

    Raises:
        UserError: ``calibration`` is no iterable of batches or yields nothing, ``forward`` is no
            function, or there is nothing to feed.
    """
    if forward is not None and not callable(forward):
        kind = type(forward).__name__
        raise UserError(f"forward must be a function of the model and a batch, got {kind}")
    if calibration is None:
        if forward is not None:
            raise UserError("forward feeds calibration batches: give calibration as well")
        return None
    if isinstance(calibration, (str, bytes, Tensor, Mapping)) or not (
        hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")
    ):
        kind = type(calibration).__name__
        raise UserError(f"calibration must be an iterable of batches such as [batch], got a {kind}")
    batches = list(calibration)
    if not batches:
        raise UserError("calibration yielded no batches")
    return Calibration(batches, forward)


def calibrate(
    model: nn.Module, layers: Mapping[str, NASLoRALinear], batches: Calibration
) -> tuple[dict[str, Fit], dict[str, nn.Module]]:
    """Fits every layer, each with the layers before it merged. The model is unchanged at the end.

    Returns:
        The fits and the merged layers, by name.

    Raises:
        UserError: a batch does not fit the model, no batch reaches some layer, or a value is not
            finite.
    """
    names = {layer: name for name, layer in layers.items()}
    targets: dict[NASLoRALinear, dict[int, Tensor]] = {layer: {} for layer in names}
    calls: Counter[nn.Module] = Counter()  # in the order of the first calls

    def keep_target(batch: int, layer: NASLoRALinear, x: Tensor) -> None:
        targets[layer].setdefault(batch, layer.mixed(x).reshape(-1, layer.rank))

    with ExitStack() as stack:
        for module in {*_units(model, names), *names}:
            hook = module.register_forward_pre_hook(lambda called, _: calls.update([called]))
            stack.enter_context(hook)
        feed(model, batches, keep_target, layers)
    fits: dict[str, Fit] = {}
    merged: dict[str, nn.Module] = {}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(replace_module, model, name, layer)
        inputs = Inputs(model, batches)
        stack.callback(inputs.compute_all)
        before = None
        for called, count in calls.items():
            if len(fits) == len(layers):
                break
            if isinstance(called, NASLoRALinear):
                name = names[called]
                moments = inputs.moments(name, called, targets[called])
                # Without centre taps the penalty pulls to what needs no fit.
                paper = isinstance(called.cell, PaperCell)
                prior = called.bypass() if paper else called.pointwise()
                fits[name] = own = fit(moments, prior, called.lora_B, called.bias is not None)
                merged[name] = called.folded(own.linear_map, own.offset)
                replace_module(model, name, merged[name])
            elif count == len(batches.batches):
                if before is not None:
                    inputs.keep(before)
                before = called
    return fits, merged


def _units(module: nn.Module, layers: Container[nn.Module]) -> Iterator[nn.Module]:
    """Blocks of adapted layers, which are what a ModuleList holds, and the modules around them."""
    for name, child in module.named_children():
        if not any(part in layers for part in child.modules()):
            yield child
        elif child not in layers:
            inner = list(_units(child, layers))
            blocks = any(part in layers for unit in inner for part in unit.modules())
            yield from [child] if name.isdigit() and not blocks else inner


class Inputs:
    """The inputs of the layers in turn, without computing again what lies before a layer's block.

    Modules that are finished give again what they gave before. The outputs of the last one are
    kept. Those before give NaN, which needs no memory: where the model has connections around the
    last one, NaN is what reaches the layer, and from then on all modules compute again.
    """

    def __init__(self, model: nn.Module, batches: Calibration) -> None:
        self.model, self.batches = model, batches
        self._keeps = True
        self._kept: list[Any] = []
        self._forwards: dict[nn.Module, dict[str, Any]] = {}

    def moments(self, name: str, layer: NASLoRALinear, targets: Mapping[int, Tensor]) -> Moments:
        """The sums over a layer's inputs and its targets, (tokens, r) for each batch.

        Raises:
            UserError: a value is not finite.
        """
        tokens = sum(len(y) for y in targets.values())
        moments = Moments(tokens, layer.in_features, layer.rank, layer.base.weight.device)

        def add(batch: int, layer: NASLoRALinear, x: Tensor) -> None:
            moments.add(x.reshape(-1, layer.in_features), targets[batch])
            raise _Reached

        feed(self.model, self.batches, add, {name: layer})
        if moments.sums.isfinite().all():
            return moments
        if self._keeps:
            self.compute_all()
            return self.moments(name, layer, targets)
        raise UserError(
            f"layer {name} meets values that are not finite on the calibration images; look for "
            "bad images, or merge in float32"
        )

    def keep(self, module: nn.Module) -> None:
        """Keeps the outputs of the module that the model calls next, once a batch."""
        outputs: list[Any] = []
        calls = itertools.count()

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            outputs.append(output)
            raise _Reached

        if self._keeps:
            with module.register_forward_hook(keep):
                feed(self.model, self.batches, lambda *_: None, {})
        if outputs and all(isinstance(output, Tensor) for output in outputs):
            self._kept[:] = [own.new_full((), math.nan).expand_as(own) for own in self._kept]
            own_forward = {k: v for k, v in vars(module).items() if k == "forward"}
            self._kept, self._forwards[module] = outputs, own_forward
            # Models add to what they get in place.
            module.forward = lambda *_, **__: outputs[next(calls) % len(outputs)].clone()

    def compute_all(self) -> None:
        """Lets all modules compute, from now on."""
        for module, own_forward in self._forwards.items():
            del module.forward
            vars(module).update(own_forward)
        self._forwards, self._kept, self._keeps = {}, [], False


class _Reached(Exception):
    """Ends a forward pass where the rest of it is not needed."""


def feed(
    model: nn.Module,
    batches: Calibration,
    observe: Callable[[int, Layer, Tensor], None],
    layers: Mapping[str, Layer],
) -> None:
    """Feeds the batches in evaluation mode and passes each input of a layer to ``observe``.

    ``observe`` is called with the batch's index, the layer and its input, before the layer
    computes. It must not call the layer, only its ``forward``. The modules' modes are restored at
    the end.

    Raises:
        UserError: a batch does not fit the model, or no batch reaches some layer.
    """
    index, reached = 0, set()

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        reached.add(layer)
        observe(index, layer, inputs[0])

    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_pre_hook(hook) for layer in layers.values()]
    try:
        model.eval()
        # Compiled code skips new hooks. If nothing is compiled, the import would take seconds.
        compiled = "torch._dynamo" in sys.modules
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, torch.no_grad():
            for index, batch in enumerate(batches.batches):
                _feed_one(model, batch, index, batches.forward)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    unseen = [name for name, layer in layers.items() if layer not in reached]
    if unseen:
        raise UserError(f"no calibration batch reached the layers {', '.join(unseen[:4])}")


def _feed_one(model: nn.Module, batch: Any, index: int, forward: Forward | None) -> None:
    # A model that takes other arguments raises one of the last three. Those of the user's own
    # function keep their traceback.
    wrong: tuple[type[Exception], ...] = (RuntimeError, ValueError)
    if forward is None:
        wrong = (*wrong, TypeError, AttributeError, KeyError)
    try:
        forward(model, batch) if forward else model(batch)
    except _Reached:
        pass
    except (UserError, torch.OutOfMemoryError):
        raise
    except wrong as error:
        kind = type(batch).__name__
        shape = f" of shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else f", a {kind},"
        reason = str(error).strip().split("\n")[0]
        advice = "" if forward else "; forward=lambda model, batch: ... feeds batches otherwise"
        raise UserError(
            f"calibration batch {index + 1}{shape} does not fit the model: {reason}{advice}"
        ) from error
