"""Every number of the benchmark that somebody may want to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.tiny.denoiser_settings import DenoiserSettings

SPACES = ("lora", "input", "output")

SIBLINGS = {  # name -> heading of its row, in the order of the table
    "reparam": "inner basis",
    "rot": "rotated stream",
    "smooth": "channel scales",
    "vlight": "drift, short",
    "light": "drift, longer",
    "mid": "drift, format",
    "prune": "pruned heads",
    "student": "distilled",
    "int4": "4-bit weights",
}
EXPLANATIONS = {  # name -> what was done to the source
    "reparam": "re-parameterised inside its blocks: V against O and q against k rotated, MLP channels permuted; same function",
    "rot": "norm gains folded into the weights and the residual stream rotated; same function",
    "smooth": "a scale per channel, between 1/2 and 2, moved from the norms into the weights; same function",
    "vlight": "trained on at a small learning rate, half of the lines in a new format",
    "light": "the same, longer and at a higher rate",
    "mid": "the same until the new format is learned",
    "prune": "one attention head in four cut from each layer, then trained to heal",
    "student": "the middle one of three layers dropped, the rest distilled from the source",
    "int4": "weights rounded to 4 bits, 32 to a group",
}

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
ALL_LINEAR = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the adapters sit, at which rank, and the learning rate of each space, tuned on the source."""

    part: str
    target_modules: tuple[str, ...]
    rank: int
    learning_rates: Mapping[str, float]


# The learning rates are those that the full run chose on the source of seed 0 (results/full.json).
QV = Placement(
    part="q, v at rank 8",
    target_modules=ATTENTION,
    rank=8,
    learning_rates={"lora": 2e-2, "input": 2e-2, "output": 2e-2},
)
ALL = Placement(
    part="all linear layers at rank 4",
    target_modules=ALL_LINEAR,
    rank=4,
    learning_rates={"lora": 1e-2, "input": 2e-2, "output": 1e-2},
)


@dataclass(frozen=True, kw_only=True)
class LmSettings:
    """The language-model part."""

    hidden: int = 64
    layers: int = 3
    heads: int = 4
    feed_forward: int = 128
    pretrain_steps: int = 1000
    pretrain_batch: int = 64
    pretrain_learning_rate: float = 3e-3
    drift_batch: int = 32
    vlight: tuple[int, float] = (200, 1e-4)  # steps and learning rate of the continued training
    light: tuple[int, float] = (300, 3e-4)
    mid: tuple[int, float] = (600, 1e-3)
    prune: tuple[int, float] = (200, 3e-4)  # healing
    student: tuple[int, float] = (400, 1e-3)  # distillation
    adapt_steps: int = 300
    adapt_batch: int = 32
    eval_lines: int = 512
    calibration_lines: int = 128
    clearly: float = 3.0  # per-layer choice: one side must have moved this many times as far as the other
    rounding: float = 0.1  # and a relative distance below this counts as this
    siblings: tuple[str, ...] = tuple(SIBLINGS)
    placements: tuple[Placement, ...] = (QV,)
    learning_rate_grid: tuple[float, ...] = ()  # empty: take the learning rates of the placements as they are


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One preset of the whole benchmark."""

    preset: str
    seeds: tuple[int, ...] = (0,)
    lm: LmSettings = field(default_factory=LmSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings.demo)


DEMO = Settings(preset="demo")
FULL = Settings(
    preset="full",
    seeds=(0, 1, 2),
    lm=LmSettings(
        placements=(replace(QV, learning_rates={}), replace(ALL, learning_rates={})),
        learning_rate_grid=(3e-3, 1e-2, 2e-2, 4e-2),
    ),
    denoiser=DenoiserSettings.full(),
)
SHORT = Settings(
    preset="short",
    lm=LmSettings(
        pretrain_steps=60,
        vlight=(5, 1e-4),
        light=(5, 3e-4),
        mid=(5, 1e-3),
        prune=(5, 3e-4),
        student=(5, 1e-3),
        adapt_steps=20,
        eval_lines=64,
        calibration_lines=32,
    ),
    denoiser=DenoiserSettings.short(),
)
PRESETS = {settings.preset: settings for settings in (DEMO, FULL, SHORT)}


def with_learning_rates(placement: Placement, learning_rates: Mapping[str, float]) -> Placement:
    """The placement, at other learning rates."""
    return replace(placement, learning_rates=dict(learning_rates))
