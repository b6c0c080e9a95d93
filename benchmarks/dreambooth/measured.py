"""Stored evaluations as numbers that tables ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.frame.summary import Difference, Spread, paired, spread

METRICS = ("clip_t", "clip_i", "dino_i", "subject")
TITLES = {"clip_t": "CLIP-T", "clip_i": "CLIP-I", "dino_i": "DINO-I", "subject": "subject"}


@dataclass(frozen=True)
class Variant:
    """What was done: one row of a table."""

    pair: str
    method: str = ""  # none is the bare model
    adaptation: str = ""
    rank: int = 0
    split: int = 0
    carry: str = "copy"
    retrained: bool = False
    space: str = ""  # of hybrid adaptation

    @property
    def label(self) -> str:
        if not self.method:
            return "bare"
        name = {"param": "parameter"}.get(self.adaptation, self.adaptation)
        if self.retrained:
            name += ", retrained on the target"
        elif self.carry != "copy":
            name += f", carried by {self.carry}"
        elif self.adaptation == "param":
            name += " (copy)"
        if self.split:
            name += f" {self.split} of {self.rank} in {self.space} space"
        return name


@dataclass(frozen=True)
class Measured:
    """One evaluation: its means over prompts and image seeds."""

    variant: Variant
    side: str
    seed: int
    subject: str
    means: Mapping[str, float]
    artifacts: str  # the cell's name
    learning_rate: float | None


def measured(records: Iterable[Mapping[str, Any]]) -> list[Measured]:
    """All evaluations among the records."""
    return [_one(record) for record in records if record["kind"] == "evaluation"]


def _one(record: Mapping[str, Any]) -> Measured:
    settings, rows = record["settings"], record["result"]["rows"]
    model, training = settings["model"], settings["training"]
    variant = Variant(model["pair"])
    if training is not None:
        adapting = training["adapting"]
        split = adapting["feature_rank"] if adapting["adaptation"] == "hybrid" else 0
        variant = Variant(
            model["pair"],
            adapting["method"],
            adapting["adaptation"],
            adapting["rank"],
            split,
            "copy" if settings["carry"] == "lorax" else settings["carry"],  # as LoRA-X is always carried
            settings["side"] == "target" and training["model"] == model,
            adapting["hybrid_space"] if split else "",
        )
    means = {
        metric: sum(float(row[metric]) for row in rows) / len(rows) for metric in METRICS if rows and metric in rows[0]
    }
    rate = None if training is None else float(training["learning_rate"])
    return Measured(variant, settings["side"], settings["seed"], settings["subject"], means, record["name"], rate)


def of(found: Iterable[Measured], **wanted: Any) -> list[Measured]:
    """Those whose variant or own fields have these values: `of(all, method="lora", side="target")`."""

    def matches(each: Measured) -> bool:
        return all(
            getattr(each if hasattr(each, name) else each.variant, name) == value for name, value in wanted.items()
        )

    return [each for each in found if matches(each)]


def by_split(found: list[Measured]) -> dict[tuple[str, int, str], dict[int, list[Measured]]]:
    """What Figure 7 shows: (pair, rank, space) -> how much of the rank is in that space -> the target's evaluations.

    The ends are what is called parameter and feature adaptation elsewhere; a single split between them is no figure. Subjects and
    seeds that some split lacks are left out, or a split would look better by having easier ones.
    """
    hybrids = grouped(
        of(found, adaptation="hybrid", side="target"),
        lambda each: (each.variant.pair, each.variant.rank, each.variant.space),
    )
    made: dict[tuple[str, int, str], dict[int, list[Measured]]] = {}
    for (pair, rank, space), some in hybrids.items():
        between = sorted({each.variant.split for each in some})
        variants = {0: Variant(pair, "lora", "param", rank), rank: Variant(pair, "lora", space, rank)}
        variants |= {split: Variant(pair, "lora", "hybrid", rank, split, space=space) for split in between}
        if len(between) > 1:
            made[pair, rank, space] = _in_common(
                {split: of(found, variant=variants[split], side="target") for split in sorted(variants)}
            )
    return made


def _in_common(splits: Mapping[int, list[Measured]]) -> dict[int, list[Measured]]:
    """What was measured, of the subjects and seeds that every split which was measured at all has."""
    places = [{(each.subject, each.seed) for each in own} for own in splits.values() if own]
    shared = set.intersection(*places)
    return {split: [each for each in own if (each.subject, each.seed) in shared] for split, own in splits.items()}


def over_seeds(found: Iterable[Measured], metric: str) -> Spread | None:
    """One value per seed, the mean over its subjects; None if nothing was measured."""
    by_seed: dict[int, list[float]] = {}
    for each in found:
        if metric in each.means:
            by_seed.setdefault(each.seed, []).append(each.means[metric])
    if not by_seed:
        return None
    return spread([sum(values) / len(values) for values in by_seed.values()])


def units(found: Iterable[Measured]) -> tuple[int, int]:
    """How many seeds and subjects."""
    own = list(found)
    return len({each.seed for each in own}), len({each.subject for each in own})


def difference(a: Iterable[Measured], b: Iterable[Measured], metric: str) -> Difference | None:
    """a - b over what both have: seeds and subjects."""
    sides: list[dict[tuple[int, str], float]] = [
        {(each.seed, each.subject): each.means[metric] for each in side if metric in each.means} for side in (a, b)
    ]
    return paired(sides[0], sides[1])


def text(value: Spread | Difference | None, digits: int = 3) -> str:
    """The number, or nothing."""
    return "" if value is None else value.text(digits)


def grouped(found: Iterable[Measured], key: Callable[[Measured], Any]) -> dict[Any, list[Measured]]:
    """Grouped, in the order of their first appearance."""
    groups: dict[Any, list[Measured]] = {}
    for each in found:
        groups.setdefault(key(each), []).append(each)
    return groups
