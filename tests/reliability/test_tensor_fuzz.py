"""Random damage behind checksums that match: the tensors of a checkpoint, and last.pt."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch.utils._pytree import tree_map

from naslora.errors import UserError
from naslora.results import kept_epoch
from naslora.sam.checkpoint import load_sam_checkpoint
from naslora.sam.segmentation import SamForSegmentation
from naslora.training import resuming
from naslora.training.accelerator import make_accelerator
from naslora.training.resolve import read_config
from naslora.training.run_data import prepare_data
from naslora.training.run_model import build_adapted_model
from naslora.training.trainer import Trainer
from reliability.conftest import fuzz, spoil

EXAMPLES = [pytest.param(30, id="few"), pytest.param(3000, marks=pytest.mark.campaign, id="many")]
# What a file can hold in place of a tensor t.
TENSORS = {
    "scalar": lambda t: torch.tensor(1.0),
    "flat": lambda t: t.flatten(),
    "more axes": lambda t: t[None],
    "less axes": lambda t: t.sum(0),
    "none of axis 0": lambda t: t[:0],
    "none of the last axis": lambda t: t[..., :0],
    "double": lambda t: t.repeat(2, *[1] * (t.dim() - 1)),
    "large": lambda t: torch.zeros(1, 200, 200, t.shape[-1]),
    "transposed": lambda t: t.mT,
    "parameter": lambda t: torch.nn.Parameter(t),
    "sparse": torch.Tensor.to_sparse,
    "csr": lambda t: t.reshape(len(t), -1).to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten()]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "meta": lambda t: t.to("meta"),
    "negative bit": lambda t: torch.complex(t, t).conj().imag,
    "terabytes": lambda t: torch.zeros(1).expand(1 << 40),
    "terabytes of this shape": lambda t: torch.zeros(1).expand(t.shape),
    "terabytes of tokens": lambda t: torch.zeros(1).expand(1, 1 << 20, 1 << 20, t.shape[-1]),
    "storage": torch.Tensor.untyped_storage,
    **{str(v): lambda t, v=v: torch.full_like(t, v) for v in (torch.nan, torch.inf, 1e39, -1.0)},
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (torch.half, torch.double, torch.int8, torch.bool, torch.complex64)
    },
    "float8": lambda t: t.to(torch.float8_e8m0fnu),
    "uint16": lambda t: t.abs().to(torch.uint16),
}
OTHERS = [None, True, -1, 1 << 70, 1.5, float("nan"), "two", b"", [], [1], {}, {"a": 1}, (1, 2)]


def damaged(tensor, draw):
    """A value in place of a tensor; None where the tensor cannot become that."""
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(OTHERS))
    try:
        return TENSORS[draw(st.sampled_from(sorted(TENSORS)))](tensor)
    except (RuntimeError, IndexError, TypeError):
        return None


def finite(tensors):
    return all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point())


@pytest.mark.parametrize("examples", EXAMPLES)
def test_checkpoints(tiny_vit, tmp_path, examples):
    model = SamForSegmentation("vit_t", 32)
    head = {"mask_decoder.iou_prediction_head.layers.0.weight": torch.zeros(4, 4)}
    whole = {**model.state_dict(), **head}
    whole = {name: tensor.clone() for name, tensor in whole.items()}
    path = tmp_path / "sam.pth"
    path.touch()

    def check(data):
        stored = dict(whole)
        name = data.draw(st.sampled_from(sorted(stored)))
        stored[name] = damaged(stored[name], data.draw)
        with mock.patch("torch.load", lambda *args, **options: stored):
            try:
                load_sam_checkpoint(model, path)
            except UserError as error:
                assert "\n" not in str(error) and "sam.pth" in str(error)
                loaded = model.state_dict()
                assert all(loaded[n].equal(whole[n]) for n in loaded)
        assert finite(model.state_dict().values())
        model.load_state_dict({n: v for n, v in whole.items() if n not in head})

    fuzz(examples, check, data=st.data())


@pytest.mark.parametrize("examples", EXAMPLES)
def test_last(clean_world, tiny_sam, fresh_accelerate, examples):
    config = read_config(clean_world / "run/config.json")
    accelerator = make_accelerator(config.training)
    splits, _ = prepare_data(config, accelerator)
    model = build_adapted_model(config)
    trainer = Trainer(model, splits, config, clean_world / "run", accelerator)
    whole = torch.load(clean_world / "run/last.pt", weights_only=True)
    start = copy.deepcopy(trainer.model.state_dict())

    def check(data):
        def other(part):
            if isinstance(part, torch.Tensor):
                return damaged(part, data.draw)
            return data.draw(st.sampled_from([*OTHERS, torch.ones(2)]))

        stored = tree_map(lambda leaf: leaf, whole)  # a copy of the containers
        spoil(data.draw, stored, other)
        with mock.patch.object(resuming, "read_torch", lambda path: stored):
            try:
                trainer.resume()
            except UserError as error:
                message = str(error)
                assert "\n" not in message and message.startswith("cannot resume from")
                assert trainer.epoch == 0 and not trainer.history
                assert not any(group.optimizer.state for group in trainer.groups)
            else:
                trains_on(trainer)
        trainer.model.load_state_dict(start)
        trainer.epoch, trainer.history = 0, []
        trainer.operations = trainer.operations[:1]
        for group in trainer.groups:
            group.optimizer.state.clear()

    fuzz(examples, check, data=st.data())


def trains_on(trainer):
    """Takes a step, and reads what the next epoch and the report read."""
    for group in trainer.groups:
        for parameter in group.parameters:
            parameter.grad = torch.ones_like(parameter)
        group.optimizer.step()
        group.optimizer.zero_grad()
    assert finite(trainer.model.state_dict().values())
    assert kept_epoch(trainer.history, "best") in trainer.history
    assert trainer.operation_history() is not None
