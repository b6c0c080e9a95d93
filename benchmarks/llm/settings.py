"""What a preset of this driver says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from benchmarks.frame.cell import how
from benchmarks.frame.trackers import check_trackers

Recipe: TypeAlias = Literal["commonsense", "math", "code", "sorting"]
Suite: TypeAlias = Literal["paper", "lm-eval"]
Mode: TypeAlias = Literal[
    "lora", "input", "output", "hybrid-input", "hybrid-output", "dora", "dora-input", "dora-output"
]
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Rank and place of the adapters, the same for every mode."""

    rank: int
    alpha: float
    dropout: float = 0.0
    feature_rank: int = 1
    """The part of the rank that hybrid modes have in feature space."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How an adapter is trained."""

    batch: int
    epochs: float = 1.0
    max_steps: int = -1
    """Stop after so many steps; -1 for whole epochs."""
    scheduler: str = "linear"
    warmup: float = 0.0
    """Steps, or below 1 their share of all."""
    weight_decay: float = 0.0
    clip: float = 1.0
    length: int = 512
    """Longest example, in tokens; the rest is cut off."""
    validation: int = 120
    """Examples kept back, on which learning rates are compared."""
    evaluate_every: int = 0
    """Steps between two looks at them; 0 looks once, at the end."""
    keep_best: bool = False
    """Keep the adapter of the best look instead of the last."""
    optimizer: str = "adamw_torch"
    """A name that transformers knows: adamw_bnb_8bit needs bitsandbytes."""
    dtype: Dtype = "float32"
    """Of the frozen weights."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recipe to train by, with its adapter and schedule, and what the result is asked."""

    adapter: Adapter
    schedule: Schedule
    learning_rates: tuple[float, ...]
    """Each mode takes its best of these on the source's validation examples, with the first seed."""
    paper: tuple[str, ...] = ()
    """Evaluations by generation and answer extraction."""
    lm_eval: tuple[str, ...] = ()
    """Evaluations by lm-eval's own tasks."""
    hours: float = 0.0
    """Estimate of one training, for --plan."""
    evaluation_hours: float = 0.0
    """Estimate of one evaluation."""
    megabytes: float = 0.0
    """Estimate of one adapter on disk, in float32."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the data are. Results hold a hash of what was read. The hub's names belong to a cell's settings, a folder does not."""

    commonsense: str = how("")
    """A checkout of AGI-Edgerunners/LLM-Adapters, with ft-training_set/commonsense_170k.json and dataset/."""
    pissa: str = "fxmeng/pissa-dataset"
    gsm8k: str = "openai/gsm8k"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How the work is done, whatever comes out: no part of a cell's name."""

    micro_batch: int = 4
    gradient_checkpointing: bool = False
    training_processes: int = 1
    evaluation_processes: int = 1
    evaluation_batch: int = 8
    trackers: tuple[str, ...] = ()
    """Names that accelerate's log_with knows: tensorboard, wandb, trackio … Trainer has all of them but aim."""
    run_code: tuple[str, ...] = ()
    """Command that scores written code in a sandbox; {folder} and {dataset} are filled in. Empty: nothing is run."""
    backend: Literal["hf", "vllm"] = "hf"
    """What generates and scores for the suite lm-eval; vllm takes the adapter as an exported LoRA."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """How the models of the preset tiny are made."""

    pretrain_steps: int = 1000
    drift_steps: int | None = None
    """Of a sibling that is trained further; None for benchmarks/tiny's."""
    examples: int = 9600
    test_lines: int = 256


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A preset."""

    source: str
    targets: tuple[str, ...]
    source_revision: str | None = None
    target_revisions: tuple[str, ...] = ()
    modes: tuple[Mode, ...] = ("lora", "input", "output")
    retrain: tuple[Mode, ...] = ()
    """Modes that are also trained on each target, where that is affordable."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tasks: dict[Recipe, Task]
    limit: int | None = None
    """Questions of each evaluation; None for all."""
    data: Data = field(default_factory=Data)
    machine: Machine = field(default_factory=Machine)
    tiny: Tiny = field(default_factory=Tiny)

    def revisions(self) -> tuple[str | None, ...]:
        """One per target."""
        return self.target_revisions or (None,) * len(self.targets)


def check(settings: Settings) -> None:
    """What can be found out before hours have passed.

    Raises:
        ValueError: says what was given, what is allowed, what to type.
    """
    from benchmarks.llm.bases import check_base
    from benchmarks.llm.code_tasks import check_installed
    from benchmarks.llm.commonsense import check_folder
    from benchmarks.llm.suites import CODE, check_stock, check_tasks

    check_trackers(settings.machine.trackers)
    for name in ("tasks", "modes", "seeds", "targets"):
        if not getattr(settings, name):
            raise ValueError(f"{name} is empty; give one entry at least.")
    if settings.target_revisions and len(settings.target_revisions) != len(settings.targets):
        raise ValueError(
            f"{len(settings.target_revisions)} target_revisions for {len(settings.targets)} targets; give one each."
        )
    for recipe, task in settings.tasks.items():
        schedule, machine = task.schedule, settings.machine
        if not task.learning_rates:
            raise ValueError(f"tasks.{recipe}.learning_rates is empty; give one at least.")
        micro = min(machine.micro_batch, schedule.batch // machine.training_processes)
        if not micro or schedule.batch % (micro * machine.training_processes):
            raise ValueError(
                f"tasks.{recipe}.schedule.batch = {schedule.batch} cannot be split into micro_batch = {machine.micro_batch} on "
                f"{machine.training_processes} process(es). Give --machine.micro_batch a divisor of each process's share."
            )
        if schedule.keep_best and not schedule.evaluate_every:
            raise ValueError(
                f"tasks.{recipe}.schedule.keep_best needs looks to choose from: give evaluate_every some steps, or leave it out."
            )
        if any(mode.startswith("hybrid") for mode in settings.modes) and task.adapter.feature_rank > task.adapter.rank:
            raise ValueError(
                f"tasks.{recipe}.adapter.feature_rank = {task.adapter.feature_rank} of rank = {task.adapter.rank}; give a part of it."
            )
        check_tasks(task)
        code = [name for name in task.paper if name in CODE]
        if code:
            check_installed()
        if code and settings.limit is not None:
            raise ValueError(
                f"EvalPlus scores {', '.join(code)} as a whole, so limit = {settings.limit} does not go with it. Leave the limit "
                f"away, or {code[0]} out of tasks.{recipe}.paper."
            )
    strangers = [mode for mode in settings.retrain if mode not in settings.modes]
    if strangers:
        raise ValueError(f"retrain names {', '.join(strangers)}, whose learning rate is not chosen: add it to modes.")
    check_stock([name for task in settings.tasks.values() for name in task.lm_eval])
    if "commonsense" in settings.tasks:
        check_folder(settings.data.commonsense)
    check_base(settings.source, settings.source_revision)
    for name, revision in zip(settings.targets, settings.revisions(), strict=True):
        check_base(name, revision)
