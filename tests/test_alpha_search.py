"""The search in a training loop of one's own: parameters, steps of alpha, processes."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from adapted_models import adapted_layer, build_encoder, named, tokens
from conftest import in_two_processes
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from naslora import (
    AlphaSearch,
    NASLoRAConfig,
    UserError,
    arch_parameters,
    inject,
    param_groups,
    weight_parameters,
)
from naslora.adapter.layer.modules import cell_parameters


def squares(model, batch):
    return model(batch).square().mean()


def trainable(**options) -> nn.Sequential:
    """An adapted layer, and a head that trains beside it."""
    model = layers()
    inject(model, NASLoRAConfig(target="qkv", **options), train="head")
    with torch.no_grad():
        model.qkv.lora_B.normal_(std=0.1)
    return model


def batch(seed: int = 0) -> torch.Tensor:
    return tokens(2, 4, 4, 16, seed=seed)


# ---- What trains ---------------------------------------------------------------------------------


def test_train_names_what_stays_trainable():
    model = build_encoder()
    inject(model, train=("neck", "blocks.1.norm1", r"blocks\.\d\.norm2", "pos_embed"))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    ours = {n for n in names if ".attn." in n or ".mlp." in n}
    assert not any(".base." in name for name in ours)
    parts = {name.rpartition(".")[0] for name in names - ours - {"pos_embed"}}
    assert parts == {
        "neck.0", "neck.1", "neck.2", "neck.3",
        "blocks.1.norm1", "blocks.0.norm2", "blocks.1.norm2",
    }  # fmt: skip
    assert "pos_embed" in names


def test_adapted_layers_in_a_trained_part_keep_their_frozen_weights():
    model = build_encoder()
    inject(model, NASLoRAConfig(target="qkv"), train="blocks")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(".base." in name for name in trained)
    assert "blocks.0.attn.proj.weight" in trained


def layers() -> nn.Sequential:
    """A layer to adapt and a head."""
    torch.manual_seed(0)
    return named(qkv=nn.Linear(16, 12), head=nn.Linear(12, 4))


QKV = NASLoRAConfig(target="qkv")
# Arguments and options of inject, and the line.
BAD_CALLS = [
    ((layers(), "r=3"), {}, "config: expected a NASLoRAConfig, got"),
    ((layers(),), {"train": 3}, "train: expected list, got 3"),
    ((layers(), QKV), {"train": ["["]}, "train is no regular expression"),
    *(((layers(), QKV), {"train": ("head", pattern)},
       f"train: '{pattern}' matches no module .* qkv, head")
      for pattern in ("decoder", "hea", "ead", "qkv", "head.0")),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "options", "message"), BAD_CALLS)
def test_inject_refuses_what_it_cannot_take(arguments, options, message):
    with pytest.raises(UserError, match=message):
        inject(*arguments, **options)
    assert isinstance(arguments[0].qkv, nn.Linear)
    assert all(parameter.requires_grad for parameter in arguments[0].parameters())


def test_kinds_of_parameters():
    model = trainable()
    alphas = arch_parameters(model)
    weights = weight_parameters(model)
    assert len(weights) + len(alphas) == sum(p.requires_grad for p in model.parameters())
    assert not {id(p) for p in weights} & {id(p) for p in alphas}
    first, cells, second = param_groups(model, 1e-3, alpha_lr=1e-2, weight_decay=0.1)
    assert (first["lr"], first["weight_decay"]) == (1e-3, 0.1)
    assert (cells["lr"], cells["weight_decay"]) == (1e-2, 0.0)
    assert {id(p) for p in first["params"] + cells["params"]} == {id(p) for p in weights}
    assert len(first["params"]) + len(cells["params"]) == len(weights)
    assert [id(p) for p in cells["params"]] == [id(p) for p in cell_parameters(model)]
    assert (second["lr"], second["weight_decay"]) == (1e-2, 0.0)
    assert [id(p) for p in second["params"]] == [id(p) for p in alphas]
    assert len(param_groups(model, 1e-3)) == 2
    assert len(param_groups(trainable(channel_ratio=0), 1e-3, alpha_lr=1e-2)) == 1
    torch.optim.AdamW(param_groups(model, 1e-3, 1e-2))


@pytest.mark.parametrize(
    ("rates", "warned"),
    [
        (lambda group, step: 1e-3 / (step + 1), True),
        (lambda group, step: group.get("cell_rate", 1) * 1e-3 / (step + 1), False),
        (lambda group, step: group["lr"] / 2, False),
        (lambda group, step: 0.0, False),
    ],
    ids=["one rate for all", "as documented", "scaled", "zero"],
)
def test_a_loop_that_sets_one_rate_for_all_groups_is_told_once(rates, warned):
    optimizer = copy.deepcopy(torch.optim.AdamW(param_groups(trainable(), 1e-3)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = rates(group, step)
    assert [("lose their factor of 10" in str(w.message)) for w in caught] == [True] * warned


# ---- Steps of alpha ------------------------------------------------------------------------------


def test_a_step_moves_alpha_alone():
    model = trainable()
    squares(model, batch(1)).backward()
    weights = weight_parameters(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = [p.grad.clone() for p in weights]
    loss = AlphaSearch(model, lr=0.01).step(batch(), squares)
    assert loss == pytest.approx(squares(model, batch()).item(), rel=0.1)
    after = dict(model.named_parameters())
    assert {n for n, p in before.items() if not p.equal(after[n])} == {"qkv.alpha"}
    assert all(torch.equal(p.grad, g) for p, g in zip(weights, gradients, strict=True))
    assert all(p.requires_grad for p in weights)
    assert model.qkv.alpha.grad is None and not model.qkv.alpha.requires_grad


def test_steps_are_those_of_plain_adam():
    model = trainable()
    twin = copy.deepcopy(model)
    search = AlphaSearch(model, lr=0.01)
    optimizer = torch.optim.Adam(arch_parameters(twin), lr=0.01, betas=(0.5, 0.999))
    for seed in range(3):
        loss = squares(twin, batch(seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert search.step(batch(seed), squares) == loss.item()
        assert torch.equal(model.qkv.alpha, twin.qkv.alpha)


def test_the_search_starts_late():
    model = trainable()
    search = AlphaSearch(model, lr=0.01, start=2)
    assert [search.step(batch(), squares) is None for _ in range(3)] == [True, True, False]
    search = AlphaSearch(model, lr=0.01, start=2)
    assert search.step(batch(), squares, epoch=1) is None
    assert search.step(batch(), squares, epoch=2) is not None


@pytest.mark.parametrize("processes", [0, 1])
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "kind",
    [
        lambda weights: torch.optim.AdamW(weights, lr=0.1, weight_decay=0.5),
        lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda weights: torch.optim.LBFGS(weights, lr=0.1, max_iter=2),
    ],
    ids=["AdamW", "SGD", "LBFGS"],
)
def test_alpha_moves_in_the_steps_of_its_search_alone(kind, start, processes, request):
    """Whoever else holds it, with a gradient and momentum from before the search."""
    if processes:  # DistributedDataParallel may wait for alpha's gradient, so it gets one
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        request.addfinalizer(distributed.destroy_process_group)
    model = trainable()
    weights, alpha = kind(model.parameters()), model.qkv.alpha

    def closure():
        weights.zero_grad()
        (loss := squares(model, batch(1))).backward()
        return loss

    weights.step(closure)
    closure()
    search = AlphaSearch(model, lr=0.01, start=start)
    assert alpha.grad is None and alpha.requires_grad == bool(processes)
    for step in range(4):
        before, head = alpha.detach().clone(), model.head.weight.detach().clone()
        weights.step(closure)
        assert torch.equal(alpha, before) and not torch.equal(model.head.weight, head)
        search.step(batch(), squares)
        assert torch.equal(alpha, before) == (step < start)
        assert alpha.grad is None and model.head.weight.grad is not None


def test_an_error_restores_the_weights():
    model = trainable()
    search = AlphaSearch(model, lr=0.01)
    required = [p.requires_grad for p in model.parameters()]

    def fails(model, batch):
        assert [n for n, p in model.named_parameters() if p.requires_grad] == ["qkv.alpha"]
        raise RuntimeError("bad image")

    with pytest.raises(RuntimeError, match="bad image"):
        search.step(batch(), fails)
    assert [p.requires_grad for p in model.parameters()] == required


@pytest.mark.parametrize(
    ("make", "options", "loss_fn", "message"),
    [
        (trainable, {}, lambda model, x: model(x), "loss_fn must return a scalar tensor"),
        (trainable, {}, lambda model, x: squares(model, x).detach(), "does not depend on alpha"),
        (trainable, {"lr": 0}, squares, "lr: expected float > 0.0"),
        (lambda: trainable(channel_ratio=0), {}, squares, "has no alpha to search"),
    ],
)
def test_what_cannot_search_is_refused(make, options, loss_fn, message):
    with pytest.raises(UserError, match=message):
        AlphaSearch(make(), **{"lr": 0.01, **options}).step(batch(), loss_fn)


def test_a_resumed_search_goes_on():
    model = trainable()
    search = AlphaSearch(model, lr=0.01, start=1)
    for seed in range(3):
        search.step(batch(seed), squares)
    twin = copy.deepcopy(model)
    resumed = AlphaSearch(twin, lr=0.5, start=1)
    resumed.load_state_dict(copy.deepcopy(search.state_dict()))
    for one, own in ((search, model), (resumed, twin)):
        one.step(batch(7), squares)
        assert one.calls == 4 and own.qkv.alpha.isfinite().all()
    assert torch.equal(model.qkv.alpha, twin.qkv.alpha)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_gradients_survive_16_bit(dtype):
    """Without a scaled loss, fp16 rounds all gradients of this loss to zero."""
    model = trainable()
    before = model.qkv.alpha.detach().clone()
    search = AlphaSearch(model, lr=0.01)

    def tiny(model, x):
        with torch.autocast("cpu", dtype):
            return model(x).square().mean() * 1e-3

    for _ in range(5):
        search.step(batch(), tiny)
    assert model.qkv.alpha.isfinite().all() and (model.qkv.alpha - before).abs().min() > 1e-3


@pytest.mark.parametrize(
    "wrap",
    [
        DataParallel,
        AveragedModel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: torch.compile(DataParallel(model), backend="eager"),
    ],
    ids=["DataParallel", "AveragedModel", "compile", "both"],
)
def test_wrappers_are_looked_through(wrap):
    wrapped = wrap(trainable())
    (alpha,) = arch_parameters(wrapped)
    before = alpha.detach().clone()
    train(wrapped, wrapped, lambda x: x)
    assert not torch.equal(alpha, before)


def test_accelerate(fresh_accelerate):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = trainable()
    optimizer = torch.optim.AdamW(param_groups(model, 1e-2))
    prepared, optimizer = accelerator.prepare(model, optimizer)
    search = AlphaSearch(prepared, lr=0.01)
    before = model.qkv.alpha.detach().clone()
    for seed in range(2):
        accelerator.backward(squares(prepared, batch(seed)))
        optimizer.step()
        optimizer.zero_grad()
        assert search.step(batch(seed), squares) is not None
    assert not torch.equal(model.qkv.alpha, before)


# ---- Two processes -------------------------------------------------------------------------------


def train(model, wrapped, share, steps=3) -> tuple[list[float], AlphaSearch]:
    """Steps of the weights, then of alpha, on the images that ``share`` takes of a batch."""
    weights = torch.optim.SGD(weight_parameters(wrapped), lr=0.1)
    search = AlphaSearch(wrapped, lr=0.01, start=1)
    losses = []
    for step in range(steps):
        squares(wrapped, share(batch(step))).backward()
        weights.step()
        weights.zero_grad()
        loss = search.step(share(batch(10 + step)), squares)
        losses.append(float("nan") if loss is None else loss)
    assert all(p.grad is None for p in arch_parameters(model))
    return losses, search


def worker(rank: int, compiled: bool, options: dict, folder: Path) -> None:
    model = trainable()
    wrapped = DistributedDataParallel(model, **options)
    if compiled:
        wrapped = torch.compile(wrapped, backend="eager")
    losses, _ = train(model, wrapped, lambda x: x[rank : rank + 1])
    torch.save((losses, model.state_dict()), folder / f"{rank}.pt")


@pytest.mark.parametrize(
    ("compiled", "options"),
    [
        (False, {"gradient_as_bucket_view": True}),
        pytest.param(False, {"static_graph": True}, marks=pytest.mark.campaign),
        pytest.param(True, {"gradient_as_bucket_view": True}, marks=pytest.mark.campaign),
    ],
    ids=["gradient_as_bucket_view", "static_graph", "compiled"],
)
def test_two_processes_agree_with_one(compiled, options, tmp_path):
    """Both stages under DistributedDataParallel, without ``find_unused_parameters``."""
    in_two_processes(worker, tmp_path, compiled, options, tmp_path)
    (losses, state), (other_losses, other) = (torch.load(tmp_path / f"{r}.pt") for r in (0, 1))
    model = trainable()
    expected, _ = train(model, model, lambda x: x)
    torch.testing.assert_close(losses, other_losses, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0, equal_nan=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], other[name])
        # Sums over images in another order; Adam's first steps divide by their own size.
        torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5)


# ---- 16 bit, tracing -----------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["linear", "paper"])
@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda model: model.half(), torch.float16),
        (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    ],
    ids=["half", "to"],
)
def test_the_adapter_stays_float32(preset, cast, dtype):
    """The silent loss: after ``model.half()`` training was NaN at the second step."""
    model = adapted_layer(preset=preset)
    layer = model.qkv
    before = {n: p.clone() for n, p in layer.state_dict().items() if not n.startswith("base.")}
    parameters = [id(p) for p in model.parameters()]
    cast(model)
    assert layer.base.weight.dtype == layer.base.bias.dtype == dtype
    after = layer.state_dict()
    assert all(after[n].dtype == p.dtype and after[n].equal(p) for n, p in before.items())
    assert [id(p) for p in model.parameters()] == parameters
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for seed in range(3):
        loss = model(tokens(2, 4, 4, 16, dtype=dtype, seed=seed)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(tensor.isfinite().all() for tensor in layer.state_dict().values())
