"""The tables: each pair as it was measured, and the paper's tables with its numbers beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.dreambooth.measured import (
    METRICS,
    TITLES,
    Measured,
    Variant,
    by_split,
    difference,
    grouped,
    measured,
    of,
    over_seeds,
    text,
    units,
)
from benchmarks.dreambooth.settings import Settings, TrainingSettings
from benchmarks.dreambooth.subjects import chosen
from benchmarks.frame.published import Published, published
from benchmarks.frame.tables import Table

PAPER_METRICS = ("clip_t", "clip_i", "dino_i")


def tables(settings: Settings, records: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per pair, the split of the rank, the learning rates, and the paper's tables that the preset names."""
    found = chosen_rates_only(settings, measured(records))
    own = [pair_table(name, rows) for name, rows in grouped(found, lambda each: each.variant.pair).items()]
    splits = split_tables(found)
    rates = rate_table(settings, found)
    paper = [paper_table(number, settings, found) for number in settings.tables]
    return [*paper, *own, *splits, *rates]


def chosen_rates_only(settings: Settings, found: list[Measured]) -> list[Measured]:
    """Without the learning rates that were tried and not taken: what is measured on the target tells which were."""

    def what(each: Measured) -> tuple[Any, ...]:
        return each.variant, each.learning_rate, each.subject, each.seed

    taken = {what(each) for each in found if each.side == "target"}
    several = {pair.name for pair in settings.pairs if len(pair.learning_rates) > 1}
    return [
        each
        for each in found
        if each.variant.pair not in several
        or each.side == "target"
        or each.learning_rate is None
        or what(each) in taken
    ]


def pair_table(pair: str, found: list[Measured]) -> Table:
    """Source and target of one pair: mean ± std over seeds, and the difference to the plain copy on the target."""
    metrics = [metric for metric in METRICS if any(metric in each.means for each in found)]
    last = "subject" if "subject" in metrics else "dino_i"
    columns = ["method", "rank", "adaptation"]
    columns += [f"{side}: {TITLES[metric]}" for side in ("source", "target") for metric in metrics]
    columns.append(f"target {TITLES[last]} − copy [95 %]")
    rows = []
    for variant, own in sorted(grouped(found, lambda each: each.variant).items(), key=lambda pair: row_order(pair[0])):
        copy = of(found, variant=Variant(pair, variant.method, "param", variant.rank), side="target")
        cells = [text(over_seeds(of(own, side=side), metric)) for side in ("source", "target") for metric in metrics]
        against = None
        if variant.method and variant.label != "parameter (copy)":
            against = difference(of(own, side="target"), copy, last)
        fewer = "" if not variant.method or units(own) == units(found) else f" ({counted(own)})"
        rows.append([variant.method, str(variant.rank or ""), variant.label + fewer, *cells, text(against)])
    notes = [f"{counted(found)} where a row says nothing else; ± is the standard deviation over seeds."]
    notes.append("Brackets: bootstrap over pairs of seed and subject. Source and target get the same noise.")
    return Table(f"{pair}: source and target", columns, rows, notes)


def counted(found: Sequence[Measured]) -> str:
    """In words."""
    seeds, subjects = units(found)
    return f"{seeds} seed{'s' * (seeds > 1)}, {subjects} subject{'s' * (subjects > 1)}"


def row_order(variant: Variant) -> tuple[Any, ...]:
    methods = ("", "lora", "dora", "loha", "lokr")
    adaptations = ("", "param", "input", "output", "hybrid", "lora-x")
    return (
        methods.index(variant.method),
        variant.rank,
        adaptations.index(variant.adaptation),
        variant.space,
        variant.split,
        variant.carry != "copy",
        variant.carry,
        variant.retrained,
    )


def split_tables(found: list[Measured]) -> list[Table]:
    """Figure 7: the target's scores by how much of the rank is in feature space."""
    made = []
    for (pair, rank, space), splits in by_split(found).items():
        metrics = [metric for metric in METRICS if any(metric in each.means for own in splits.values() for each in own)]
        rows = [
            [f"{split} of {rank}", *(text(over_seeds(own, metric)) for metric in metrics)]
            for split, own in splits.items()
        ]
        columns = [f"rank in {space} space", *(TITLES[metric] for metric in metrics)]
        note = "Figure 7 of the paper is a drawing without numbers; it says that a quarter in output space has the best CLIP-T."
        made.append(Table(f"Figure 7: {pair}, target, by the split of the rank (Eq. 6)", columns, rows, [note]))
    return made


def rate_table(settings: Settings, found: list[Measured]) -> list[Table]:
    """Which learning rates were chosen, where there was a choice."""
    several = {pair.name: pair.learning_rates for pair in settings.pairs if len(pair.learning_rates) > 1}
    rows, edges = [], []
    trained = [each for each in found if each.variant.pair in several and each.side == "target" and each.variant.method]
    modes = grouped(trained, lambda each: (each.variant.pair, each.variant.method, each.variant.adaptation))
    for (pair, method, adaptation), own in modes.items():
        taken = sorted({each.learning_rate for each in own if each.learning_rate is not None})
        grid = ", ".join(f"{rate:g}" for rate in several[pair])
        if {min(several[pair]), max(several[pair])} & {*taken}:
            edges.append(" ".join([pair, method, adaptation]))
        rows.append([pair, method, adaptation, ", ".join(f"{rate:g}" for rate in taken), grid])
    if not rows:
        return []
    by = " and ".join(TITLES[metric] for metric in settings.tuning.by)
    count = max(1, len(settings.tuning.subjects))
    note = (
        f"By the mean of {by} of the source's images, seed {settings.tuning.seed}, {count} subject{'s' * (count > 1)}."
    )
    notes = [note, *([f"At an edge of the grid, so a better one may lie beyond: {'; '.join(edges)}."] if edges else [])]
    return [Table("Learning rates", ["pair", "method", "adaptation", "chosen", "of"], rows, notes)]


def paper_table(number: str, settings: Settings, found: list[Measured]) -> Table:
    """A table of the paper: published, ours, and the difference, for each metric."""
    columns = ["pair", "method", "adaptation", "rank", "side"]
    for metric in PAPER_METRICS:
        columns += [f"{TITLES[metric]}: paper", "ours", "difference"]
    rows = []
    groups: dict[tuple[Any, ...], list[Published]] = {}
    for each in published(number):
        groups.setdefault((each.model_pair, each.base_method, each.adaptation, each.rank, each.side), []).append(each)
    for (pair, method, adaptation, rank, side), some in groups.items():
        own_rank = rank or settings.ranks[method]
        cells = []
        for metric in PAPER_METRICS:
            value = next((each for each in some if each.metric == metric), None)
            cells += _compared(value, _ours(found, pair, method, adaptation, own_rank, side, metric))
        rows.append([pair, method, adaptation, str(own_rank), side, *cells])
    rows += _left_out(found, rows)
    notes = [
        *_smaller(settings),
        "The paper does not say sampler, steps, guidance or which CLIP; compare differences between rows before single numbers.",
        "An empty cell: not run.",
    ]
    return Table(f"Table {number} of the paper", columns, rows, notes)


def _left_out(found: list[Measured], printed: list[list[str]]) -> list[list[str]]:
    """Rows that the paper does not print: the bare models, and what training on the target gives."""
    rows = []
    for pair, side in dict.fromkeys((row[0], row[4]) for row in printed):
        methods = {row[1] for row in printed}
        for variant, own in grouped(of(found, pair=pair, side=side), lambda each: each.variant).items():
            if not variant.method or (variant.retrained and variant.method in methods):
                cells = [cell for metric in PAPER_METRICS for cell in ("", text(over_seeds(own, metric)), "")]
                rows.append([pair, variant.method, variant.label, str(variant.rank or ""), side, *cells])
    return rows


def _smaller(settings: Settings) -> list[str]:
    """Where a preset is less than the paper's, so that nobody takes a difference for one of method."""
    trained, paper = settings.training, TrainingSettings()
    subjects = len(chosen(settings.subjects_file, settings.subjects))
    wanted = {
        f"{subjects} subjects, not 30": subjects != 30,
        f"{settings.prompts} prompts, not 25": settings.prompts not in (None, 25),
        f"{len(settings.image_seeds)} images per prompt, not 5": len(settings.image_seeds) != 5,
        f"{trained.steps} steps, not {paper.steps}": trained.steps != paper.steps,
        f"{trained.batch} images in a batch, not {paper.batch}": trained.batch != paper.batch,
        f"{trained.resolution} pixels, not {paper.resolution}": trained.resolution != paper.resolution,
    }
    apart = [words for words, smaller in wanted.items() if smaller]
    return [f"Ours: {', '.join(apart)}."] if apart else []


def _ours(
    found: list[Measured], pair: str, method: str, adaptation: str, rank: int, side: str, metric: str
) -> tuple[float, str] | None:
    """The mean and how it is written; of `input_minus_param`, the paired difference."""

    def own(name: str) -> list[Measured]:
        if name == "lora-x":  # at a rank of its own, and carried by its own transfer
            return of(found, pair=pair, adaptation=name, side=side)
        return of(found, variant=Variant(pair, method, name, rank), side=side)

    first, minus, second = adaptation.partition("_minus_")
    if minus:
        between = difference(own(first), own(second), metric)
        return None if between is None else (between.mean, between.text(3))
    value = over_seeds(own(adaptation), metric)
    return None if value is None else (value.mean, value.text(3))


def _compared(paper: Published | None, ours: tuple[float, str] | None) -> list[str]:
    printed = ""
    if paper is not None and paper.value is not None:
        printed = f"{paper.value:.3f}" + (f" ± {paper.std:.3f}" if paper.std is not None else "")
    if ours is None:
        return [printed, "", ""]
    apart = f"{ours[0] - paper.value:+.3f}" if paper is not None and paper.value is not None else ""
    return [printed, ours[1], apart]
