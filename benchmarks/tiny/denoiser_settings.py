"""Every number of the denoiser part that somebody may want to change. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PART = "denoiser"
COLUMNS = {"copy": "LoRA", "input": "input", "output": "output", "tied": "tied input"}  # copy: the LoRA as it is
ADAPTERS = tuple(COLUMNS)
SIBLINGS = {  # name -> heading of its row, in the order of the table
    "lcm": "4-step distilled",
    "student": "distilled, a layer less",
    "indep": "independent",
}
CHECKS = {  # checks of what the result rests on: name -> (heading on the source, heading on the independent model)
    "one word": ("source, name of one token", "independent, name of one token"),
    "held out": ("source, concept held out", "independent, concept held out"),
}
HEADINGS = SIBLINGS | {
    f"{name}: {model}": heading
    for name, headings in CHECKS.items()
    for model, heading in zip(("source", "indep"), headings, strict=True)
}


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings:
    """The denoiser part. The defaults are those of the demo."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    pretrain_steps: int = 1100
    pretrain_batch: int = 24
    pretrain_learning_rate: float = 6e-3
    blank_share: float = 0.1  # of the prompts in pre-training; guidance needs a model that can do without
    rank: int = 4
    adapt_images: int = 200
    adapt_steps: int = 300
    adapt_batch: int = 16
    # Those that the full run chose most often on the source (results/full.json).
    learning_rates: Mapping[str, float] = field(
        default_factory=lambda: {"copy": 1e-2, "input": 1e-2, "output": 1e-2, "tied": 1e-2}
    )
    learning_rate_grid: tuple[float, ...] = ()  # empty: take the learning rates above as they are
    siblings: tuple[str, ...] = ("indep",)
    checks: tuple[str, ...] = ()
    distil_steps: int = 400
    sampling_steps: int = 10
    guidance: float = 2.0
    images_per_digit: int = 10

    @classmethod
    def demo(cls) -> DenoiserSettings:
        """One to two minutes on one core."""
        return cls()

    @classmethod
    def full(cls) -> DenoiserSettings:
        """The committed results: learning rates chosen on the source, every sibling, every check, more images."""
        return cls(
            learning_rate_grid=(3e-3, 1e-2, 3e-2),
            siblings=tuple(SIBLINGS),
            checks=tuple(CHECKS),
            images_per_digit=20,
        )

    @classmethod
    def short(cls) -> DenoiserSettings:
        """A few steps of everything, to see that it runs. Its scores mean nothing."""
        return cls(pretrain_steps=10, adapt_steps=3, sampling_steps=2, images_per_digit=2)
