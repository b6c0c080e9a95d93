"""Every number of the offline run that somebody may want to change. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TARGETS = {"pixart": "PixArt-like", "sdxl": "SDXL-like"}
REGIMES = {"many": "ever new references", "few": "few references"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to bring a reference to the target, and the learning rates that are tried for it."""

    title: str
    maker: str  # "a4a", "random" (A4A around a random source) or "scratch"
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    """Learning rates relative to the one that is tuned."""

    train_source: bool = True


# The paper's ratio of the three groups of rates; Sec. 3.4.
_PAPER = {"lr1": 1.0, "lr2": 0.1, "lr3": 0.1}

MAIN: Mapping[str, Method] = {
    "a4a": Method(title="A4A", maker="a4a", rates=_PAPER),
    "random": Method(title="A4A, random source", maker="random", rates=_PAPER),
    "layerwise": Method(title="layer by layer", maker="a4a", options={"mapping": "layerwise"}, rates=_PAPER),
    "scratch": Method(title="IP-Adapter*, plain init", maker="scratch", options={"init": "plain"}),
    "scratch copy": Method(title="IP-Adapter*, official init", maker="scratch", options={"init": "copy"}),
}

ABLATIONS: Mapping[str, Method] = {
    "frozen": Method(title="source frozen", maker="a4a", rates=_PAPER, train_source=False),
    "random frozen": Method(title="random source, frozen", maker="random", rates=_PAPER, train_source=False),
    "half": Method(title="coupling space × 0.5", maker="a4a", options={"coupling_ratio": 0.5}, rates=_PAPER),
    "double": Method(title="coupling space × 2", maker="a4a", options={"coupling_ratio": 2.0}, rates=_PAPER),
    "no training": Method(
        title="training-free projection and alignment",
        maker="a4a",
        options={"projection": "interpolate", "alignment": "pool"},
        rates=_PAPER,
    ),
    "linear": Method(title="linear mapping", maker="a4a", options={"mapping": "linear"}, rates=_PAPER),
    "depth 1": Method(title="R = 1", maker="a4a", options={"depth": 1}, rates=_PAPER),
    "depth 4": Method(title="R = 4", maker="a4a", options={"depth": 4}, rates=_PAPER),
    "one rate": Method(title="one learning rate for all", maker="a4a", rates={"lr1": 1.0, "lr2": 1.0, "lr3": 1.0}),
    "per layer": Method(title="projection, alignment per layer", maker="a4a", options={"share": "layer"}, rates=_PAPER),
}

METHODS: Mapping[str, Method] = {**MAIN, **ABLATIONS}


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    """How a tiny model is trained before any adapter."""

    steps: int
    batch: int = 32
    learning_rate: float = 6e-3


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """The offline run. The defaults are those of the committed results."""

    preset: str = "tiny"
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each has models, adapters and data of its own."""

    tuning_seed: int = 100
    targets: tuple[str, ...] = tuple(TARGETS)
    regimes: tuple[str, ...] = tuple(REGIMES)
    main: tuple[str, ...] = tuple(MAIN)
    ablations: tuple[str, ...] = tuple(ABLATIONS)
    ablation_target: str = "pixart"
    ablation_regime: str = "few"

    pretraining: Mapping[str, Pretraining] = field(
        default_factory=lambda: {
            "sd15": Pretraining(steps=400),
            "sdxl": Pretraining(steps=800),
            "pixart": Pretraining(steps=1600, learning_rate=4e-3),  # it learns the most slowly of the three
        }
    )
    source_steps: int = 1200
    source_learning_rate: float = 5e-3
    batch: int = 16
    text_drop: float = 0.1
    image_drop: float = 0.05
    weight_decay: float = 0.01

    embedding: int = 64
    encoder_depth: int = 2
    encoder_gain: float = 1.0
    """How hard the embeddings are to decode: a linear map finds 75 % of the identities' variance in them, a small network 82 %;
    with a gain of 2 it is 43 % and 62 %."""

    few: int = 64
    """References in the regime "few"."""

    depth: int = 2  # R, where a method does not say otherwise
    head_dim: int = 16
    stops: Mapping[str, tuple[int, ...]] = field(
        default_factory=lambda: {"pixart": (50, 150, 250), "sdxl": (50, 100, 200)}
    )
    """The numbers of training steps at which adapters are examined."""

    learning_rate_grid: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    tuning_steps: Mapping[str, int] = field(default_factory=lambda: {"pixart": 60, "sdxl": 50})

    judge_steps: int = 1000
    exam_references: int = 32
    exam_prompts: int = 2
    exam_losses: int = 512
    sampling_steps: int = 10
    guidance: float = 2.0
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    """The λ of the sweep."""

    @classmethod
    def short(cls) -> TinySettings:
        """A few steps of everything, to see that it runs. Its scores mean nothing."""
        return cls(
            preset="short",
            seeds=(0,),
            regimes=("few",),
            ablations=("frozen", "half", "no training", "linear", "depth 1", "one rate"),
            pretraining={name: Pretraining(steps=3, batch=4) for name in ("sd15", "sdxl", "pixart")},
            source_steps=2,
            stops={"pixart": (1, 2), "sdxl": (1, 2)},
            tuning_steps={"pixart": 1, "sdxl": 1},
            learning_rate_grid=(1e-3, 3e-3),
            few=8,
            judge_steps=5,
            exam_references=3,
            exam_prompts=2,
            exam_losses=128,
            sampling_steps=2,
            scales=(0.0, 1.0),
        )
