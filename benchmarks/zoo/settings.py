"""Every number of the zoo that somebody may want to change. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from benchmarks.tiny.denoiser_settings import DenoiserSettings
from benchmarks.tiny.settings import LmSettings

SPACES = ("lora", "input", "output")

LM_SIBLINGS = {  # name -> (heading, what was done to the source), in the order of the tables
    "reparam": ("inner basis", "V against O and q against k rotated, MLP channels permuted; same function"),
    "rot": ("rotated stream", "norm gains folded, the residual stream rotated; same function"),
    "smooth": ("channel scales", "a factor per channel moved from the norms into the weights; same function"),
    "both": ("both bases", "inner basis and residual stream rotated; same function"),
    "scaled": ("layer scales", "a factor per layer moved from q to k, from V to O, from up to down; same function"),
    "gains": ("norm gains", "each norm's gains changed at random, then trained on a little to heal"),
    "vlight": ("drift, short", "trained on at a small learning rate, half of the lines in a new format"),
    "light": ("drift, longer", "the same, longer and at a higher rate"),
    "mid": ("drift, format", "the same until the new format is learned"),
    "prune": ("pruned heads", "one attention head in four cut from each layer, then trained on to heal"),
    "student": ("distilled", "the middle one of three layers dropped, the rest distilled from the source"),
    "cut": ("pruned depth", "the last of three layers dropped, then trained on to heal"),
    "int4": ("4-bit weights", "weights rounded to 4 bits, 32 to a group"),
    "merged": ("LoRA merged in", "a LoRA for a fifth new task merged into the weights"),
    "deeper": ("deeper", "two blocks inserted that do nothing at first, then trained on"),
    "wider": ("wider", "96 features instead of 64; distilled from the source, from scratch"),
    "narrower": ("narrower", "48 features instead of 64; distilled from the source, from scratch"),
    "indep": ("independent", "the same shape and data, another seed"),
}
DENOISER_SIBLINGS = {
    "reparam": ("inner basis", "values rotated against to_out, queries against keys, in every head; same function"),
    "drift": ("drift", "trained on, three styles of four only"),
    "lcm": ("4-step distilled", "consistency distillation of the guided source"),
    "student": ("distilled", "the middle one of three blocks dropped, the rest distilled from the source"),
    "indep": ("independent", "another seed; shares the table of words"),
}
DENOISER_TASKS = {"name": "a new name for a style", "new": "a style never drawn"}


@dataclass(frozen=True, kw_only=True)
class LmZoo:
    """The language-model part. `tiny`: shape of the source, pre-training, and how the siblings of `benchmarks.tiny` are made."""

    tiny: LmSettings = field(default_factory=lambda: LmSettings(pretrain_steps=900))
    siblings: tuple[str, ...] = tuple(LM_SIBLINGS)
    tasks: tuple[str, ...] = ("D", "X", "T", "I")
    spaces: tuple[str, ...] = SPACES
    rank: int = 8
    target_modules: tuple[str, ...] = ("self_attn.q_proj", "self_attn.v_proj")
    adapt_steps: int = 150
    adapt_batch: int = 32
    retrain_steps: int = 120
    learning_rate_grid: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    tuning_seed: int = 100  # of a source of its own, on which the learning rates are chosen
    score_lines: int = 256  # that learning rates are judged on
    test_lines: int = 1024  # that adapters are scored on
    old_lines: int = 160
    calibration_lines: int = 128  # of the old tasks, and as many of the new one
    distil_lines: int = 512  # of the new task alone, for methods that train
    distil: tuple[int, float] = (200, 2e-2)  # steps and learning rate; the adapters have fewer steps, at the same rate
    trust_lines: int = 128
    gains: tuple[int, float] = (150, 3e-4)  # steps and learning rate after the change
    cut: tuple[int, float] = (300, 1e-3)
    deeper: tuple[int, float] = (300, 1e-3)
    distilled: tuple[int, float] = (700, 3e-3)  # wider and narrower, from scratch
    hidden: Mapping[str, int] = field(default_factory=lambda: {"wider": 96, "narrower": 48})


@dataclass(frozen=True, kw_only=True)
class DenoiserZoo:
    """The denoiser part. Its learning rates are those that `benchmarks.tiny` chose on its sources."""

    tiny: DenoiserSettings = field(default_factory=lambda: DenoiserSettings(adapt_steps=200))
    siblings: tuple[str, ...] = tuple(DENOISER_SIBLINGS)
    tasks: tuple[str, ...] = tuple(DENOISER_TASKS)
    spaces: tuple[str, ...] = SPACES
    drift: tuple[int, float] = (200, 2e-3)
    images_per_digit: int = 60  # that adapters are scored on; the old styles on the fewer of `tiny`
    calibration_batches: int = 4  # of the old styles, and as many of the new one
    distil_batches: int = 32  # of the new one alone, for methods that train
    distil: tuple[int, float] = (400, 3e-2)  # of 200 or 400 steps at 1e-2 or 3e-2 the best on two siblings of seed 1
    trust_batches: int = 4
    batch: int = 32


@dataclass(frozen=True, kw_only=True)
class Halves:
    """The half that thresholds are fitted on. What they are worth is read off cells of which neither sibling nor task is in it."""

    lm_siblings: tuple[str, ...] = (
        *("reparam", "smooth", "scaled", "vlight", "mid"),
        *("student", "int4", "deeper", "wider"),
    )
    lm_tasks: tuple[str, ...] = ("D", "T")
    denoiser_siblings: tuple[str, ...] = ("drift", "student")
    denoiser_tasks: tuple[str, ...] = ("name",)

    def fitted(self, part: str, sibling: str, task: str) -> bool:
        """Whether the cell is in the half that is fitted on."""
        return sibling in getattr(self, f"{part}_siblings") and task in getattr(self, f"{part}_tasks")

    def held_out(self, part: str, sibling: str, task: str) -> bool:
        """Whether neither its sibling nor its task is."""
        return sibling not in getattr(self, f"{part}_siblings") and task not in getattr(self, f"{part}_tasks")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One preset of the zoo."""

    preset: str
    seeds: tuple[int, ...] = (0,)
    lm: LmZoo = field(default_factory=LmZoo)
    denoiser: DenoiserZoo = field(default_factory=DenoiserZoo)
    halves: Halves = field(default_factory=Halves)


FULL = Settings(preset="full", seeds=(0, 1, 2))
_TINY = LmSettings(
    pretrain_steps=3,
    pretrain_batch=16,
    drift_batch=8,
    vlight=(1, 1e-4),
    light=(1, 3e-4),
    mid=(1, 1e-3),
    prune=(1, 3e-4),
)
SHORT = Settings(
    preset="short",
    lm=LmZoo(
        tiny=_TINY,
        siblings=("vlight", "wider"),
        tasks=("D",),
        spaces=("lora", "input"),
        adapt_steps=2,
        adapt_batch=4,
        retrain_steps=2,
        learning_rate_grid=(1e-2,),
        score_lines=8,
        test_lines=8,
        old_lines=8,
        distil_lines=64,
        distil=(2, 1e-2),
        trust_lines=8,
        gains=(1, 3e-4),
        cut=(1, 1e-3),
        deeper=(1, 1e-3),
        distilled=(1, 1e-3),
    ),
    denoiser=DenoiserZoo(
        tiny=replace(DenoiserSettings.short(), pretrain_steps=3, distil_steps=2, adapt_steps=2, images_per_digit=1),
        siblings=("reparam",),
        tasks=("name",),
        spaces=("lora",),
        images_per_digit=1,
        drift=(1, 1e-3),
        distil_batches=2,
        distil=(2, 1e-2),
        trust_batches=1,
        batch=8,
    ),
)
PRESETS = {settings.preset: settings for settings in (FULL, SHORT)}
