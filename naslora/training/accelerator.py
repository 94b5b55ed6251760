"""The processes, device and precision of a run."""

import os

import torch
from accelerate import Accelerator

from naslora.errors import UserError
from naslora.training.search_config import SearchConfig


def make_accelerator(config: SearchConfig) -> Accelerator:
    """Joins the processes of a run, and sets its device and precision.

    Raises:
        UserError: fp16 without a GPU, or Accelerate joins fewer processes than were launched.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise UserError("mixed precision fp16 needs a GPU; use bf16 or no on a CPU")
    # Without cpu=True Accelerate does not join processes that have no GPU.
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise UserError(
            f"{launched} processes were launched, but Accelerate joins {accelerator.num_processes} "
            f"on {accelerator.device.type}; launch one"
        )
    return accelerator
