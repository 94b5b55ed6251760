"""Steps of promptable training, and a semantic step of the same encoder beside them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench import models
from bench.models import PRECISIONS, Candidate, Setting
from naslora.sam.objects import PADDING, POSITIVE
from naslora.sam.precision import cast_frozen
from naslora.sam.prompts import PromptableSam, build_promptable
from naslora.sam.shipped import NONE
from naslora.training.interactive import InteractiveLoss

METHOD = "nas-pc-lora"
OBJECTS, CLICKS = 8, 4
# The clicks after the first prompt in six steps, as often as a run with --clicks 4 draws them.
RUN = [0, 0, 0, 1, 2, 3]
STEPS = {"first prompt": [0], "all prompts": [CLICKS - 1], "mean of a run": RUN}
"""What is timed, and the clicks in the steps of which it is the mean."""
SEMANTIC, PROMPTABLE = ("semantic", "semantic"), "promptable"


class Drawn(InteractiveLoss):
    """The loss with a number of clicks that is not drawn at random."""

    clicks = 0

    def corrections(self) -> int:
        return self.clicks


class Prompted(Candidate):
    """A promptable model as it trains on ``OBJECTS`` objects an image."""

    def __init__(self, model: PromptableSam, setting: Setting) -> None:
        super().__init__(METHOD, model, setting)
        self.masks = torch.zeros_like(self.masks)
        rows = setting.image_size // OBJECTS
        for number in range(OBJECTS):
            top = number * rows
            self.masks[:, top : top + rows, rows : rows * (2 + number % 5)] = number + 1
        self.interactive = Drawn(model, CLICKS, lambda: models.autocast(setting))

    def loss(self) -> Tensor:
        with models.autocast(self.setting):
            embeddings = self.model(self.images)
        return self.interactive(embeddings, self.masks)

    def steps(self, clicks: list[int]) -> None:
        for self.interactive.clicks in clicks:
            self.weight_step()


def candidates(setting: Setting) -> tuple[Candidate, Prompted]:
    """A semantic and a promptable model, with adapters."""
    untouched = models.untouched(setting)
    semantic = models.candidates(setting, [METHOD], untouched)[METHOD]
    model = build_promptable(setting.model, setting.image_size, NONE, attention="fused")
    model = models.adapted(METHOD, model.to(setting.device))
    if PRECISIONS[setting.precision] is not None:
        cast_frozen(model.image_encoder, PRECISIONS[setting.precision])
    return semantic, Prompted(model, setting)


def functions(semantic: Candidate, prompted: Prompted) -> dict[tuple[str, str], Callable[[], None]]:
    """What is timed. A call of a step's function makes as many steps as ``STEPS`` lists."""
    found: dict[tuple[str, str], Callable[[], None]] = {SEMANTIC: semantic.weight_step}
    for step, clicks in STEPS.items():
        found[PROMPTABLE, step] = partial(prompted.steps, clicks)
    return found


@torch.no_grad()
def gate(prompted: Prompted) -> str | None:
    """Why the promptable model must not be timed, or None: its decoder is held against
    segment_anything's."""
    model, device = prompted.model.eval(), prompted.images.device
    with models.autocast(prompted.setting):
        embedding = model(prompted.images[:1])
        point = torch.tensor([[[9.0, 9.0], [0.0, 0.0]]], device=device)
        label = torch.tensor([[POSITIVE, PADDING]], device=device)
        owner = torch.zeros(1, dtype=torch.long, device=device)
        ours = model.decode(embedding, owner, point, label, None, slice(1, 4))[0]
    sparse, dense = model.prompt_encoder((point[:, :1], label[:, :1]), None, None)
    places = model.prompt_encoder.get_dense_pe()
    theirs = model.mask_decoder(embedding.float(), places, sparse, dense, True)[0]
    error = float((ours - theirs).norm() / theirs.norm())
    tolerance = 1e-4 if prompted.setting.precision == "no" else 0.1
    return None if error < tolerance else f"masks differ from SAM's by {error:.1e} of their norm"
