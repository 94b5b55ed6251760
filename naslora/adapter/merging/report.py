"""The ways of merging, and what a merge reports."""

from dataclasses import dataclass
from typing import Literal, get_args

MergeMode = Literal["exact", "center", "calibrated"]
MODES: tuple[MergeMode, ...] = get_args(MergeMode)


@dataclass(frozen=True)
class LayerError:
    """Distance of one merged layer from the layer it replaces, as relative Frobenius norms."""

    name: str
    update_error: float
    """|merged - layer| / |the adapter's part of the layer's output|."""
    output_error: float
    """|merged - layer| / |the layer's output|."""
    tokens: int | None = None
    """Number of tokens the layer was fitted on. This and the next two are None in modes that fit
    nothing."""
    regularisation: float | None = None
    """The penalty of the fit, relative to the mean variance of the layer's inputs."""
    held_out_error: float | None = None
    """Relative error of the update on tokens held out from the fit, with the layers before this one
    merged too. It estimates the error on new images."""


@dataclass(frozen=True)
class MergeReport:
    """The errors of a merge, layer by layer."""

    mode: str
    source: str
    """The inputs on which errors were measured: "calibration images" or "white noise". Neighbouring
    tokens of white noise are unrelated, so its errors are close to the largest possible."""
    layers: list[LayerError]
    warning: str | None = None
    """A reason not to trust the result; None if there is none."""

    @property
    def max_update_error(self) -> float:
        """The largest relative error of an update."""
        return max(layer.update_error for layer in self.layers)

    @property
    def mean_update_error(self) -> float:
        """The mean relative error of the updates."""
        return sum(layer.update_error for layer in self.layers) / len(self.layers)

    def __str__(self) -> str:
        text = (
            f"merged {len(self.layers)} layers with mode {self.mode!r}: relative error of the "
            f"update {self.mean_update_error:.2e} on average, {self.max_update_error:.2e} at most "
            f"(on {self.source})"
        )
        tokens = [layer.tokens for layer in self.layers if layer.tokens is not None]
        errors = [e for e in (layer.held_out_error for layer in self.layers) if e is not None]
        if tokens and errors:
            held_out = sum(errors) / len(errors)
            text += f"; {held_out:.2e} on held-out tokens, of at least {min(tokens):,} a layer"
        return text
