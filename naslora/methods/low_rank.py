"""The configuration that LoRA, DoRA and Conv-LoRA share."""

from dataclasses import dataclass

from naslora.adapter.config import MethodConfig

OUTPUT_FIELDS = ("rank", "lora_alpha")
"""Fields that change the output of given trained tensors."""


@dataclass(frozen=True)
class LowRankConfig(MethodConfig):
    """The settings of a low-rank adapter.

    Raises:
        UserError: a value is out of its range. The message names the field.
    """

    rank: int = 3
    """LoRA rank r."""
    lora_alpha: float = 32.0
    """Numerator of the scaling s = lora_alpha / rank of the adapter's output."""
    target: str = r"(^|\.)attn\.qkv$"
    """Regular expression, searched in module names: the nn.Linear layers to adapt."""
    blocks: tuple[int, ...] | None = None
    """Which of the matching layers to adapt, counted from 0 in model order; None means all."""
    seed: int = 0
    """Seed of every random number that the method draws."""

    @property
    def scaling(self) -> float:
        """The factor s of the adapter's output."""
        return self.lora_alpha / self.rank
