"""From rows of single runs to tables, and to sentences that say what they show and what they do not."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.a4a.driver import Results, is_ablation, title
from benchmarks.a4a.settings import REGIMES, TARGETS

SCORES = {
    "similarity": "similarity",
    "retrieval": "retrieval",
    "prompt": "prompt followed",
    "loss": "loss",
}
SOURCE_TITLE = "SD1.5-like (source)"


@dataclass(frozen=True)
class Cell:
    """One score over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def text(self, digits: int = 2) -> str:
        spread = f" ± {self.std:.{digits}f}" if len(self.values) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


def pairs(results: Results) -> list[tuple[str, str]]:
    """The targets and regimes that there are, in their order."""
    return list(dict.fromkeys((row["target"], row["regime"]) for row in results["rows"]))


def methods(results: Results, target: str, regime: str, ablations: bool = False) -> list[str]:
    """The methods that were run there."""
    found = dict.fromkeys(row["method"] for row in select(results["rows"], target=target, regime=regime))
    return [method for method in found if is_ablation(method) == ablations]


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def cell(results: Results, score: str, **wanted: Any) -> Cell:
    """A score of the rows with these settings, seed by seed."""
    rows = sorted(select(results["rows"], **wanted), key=lambda row: row["seed"])
    return Cell(tuple(row[score] for row in rows))


def stops(results: Results, target: str, regime: str) -> list[int]:
    """At how many steps adapters were examined there."""
    return sorted({row["step"] for row in select(results["rows"], target=target, regime=regime)})


def heading(target: str, regime: str) -> str:
    return f"{TARGETS[target]} target, {REGIMES[regime]}"


def curves(results: Results, target: str, regime: str, score: str) -> dict[str, list[tuple[int, Cell]]]:
    """For each method its score by the number of samples seen."""
    batch = results["settings"]["batch"]
    return {
        method: [
            (step * batch, cell(results, score, target=target, regime=regime, method=method, step=step))
            for step in stops(results, target, regime)
        ]
        for method in methods(results, target, regime)
    }


def digits(score: str) -> int:
    return 4 if score == "loss" else 2


def table(results: Results, target: str, regime: str, ablations: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: similarity at every stop, and all other scores at the last one."""
    steps = stops(results, target, regime)
    batch = results["settings"]["batch"]
    shown = steps[-1:] if ablations else steps
    heads = ["method", *(f"similarity, {step * batch} samples" for step in shown)]
    heads += [*(SCORES[score] for score in ("retrieval", "prompt", "loss")), "learning rate", "parameters"]
    lines = []
    names = (["a4a"] if ablations else []) + methods(results, target, regime, ablations)
    for method in names:
        wanted = {"target": target, "regime": regime, "method": method}
        line = [title(method)]
        line += [cell(results, "similarity", **wanted, step=step).text() for step in shown]
        line += [
            cell(results, score, **wanted, step=steps[-1]).text(digits(score))
            for score in ("retrieval", "prompt", "loss")
        ]
        rate = next(row["rate"] for row in select(results["rates"], **wanted, chosen=True))
        size = select(results["rows"], **wanted)[0]["parameters"]
        lines.append([*line, f"{rate:g}", f"{size / 1000:.0f}k"])
    return heads, lines


def model_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """What the models do before anything is carried, and the source with the IP-Adapter that is carried."""
    heads = ["model", "adapter", *SCORES.values()]
    tuning = results["settings"]["tuning_seed"]
    rows = [row for row in results["models"] if row["seed"] != tuning]
    groups = dict.fromkeys((row["target"], row["method"]) for row in rows)
    lines = []
    for target, method in groups:
        own = select(rows, target=target, method=method)
        name = TARGETS.get(target, SOURCE_TITLE)
        kind = "its IP-Adapter, read back from the file" if method == "source" else title(method)
        scores = [Cell(tuple(row[score] for row in own)).text(digits(score)) for score in SCORES]
        lines.append([name, kind, *scores])
    return heads, lines


def difference(results: Results, score: str, ours: str, theirs: str, **wanted: Any) -> Cell:
    """Ours minus theirs, seed by seed."""
    pairs_of = (cell(results, score, **wanted, method=method).values for method in (ours, theirs))
    return Cell(tuple(a - b for a, b in zip(*pairs_of, strict=True)))


def verdict(gap: Cell, margin: float) -> str:
    """Ahead or behind only where every seed says so, and by more than the margin on average."""
    if gap.mean > margin and min(gap.values) > 0:
        return "ahead of"
    if gap.mean < -margin and max(gap.values) < 0:
        return "behind"
    return "level with"


MARGIN = 0.02  # of the similarity


def findings(results: Results) -> list[str]:
    """The tables in sentences, the ones that speak against A4A included."""
    if results["preset"] == "short":
        return ["A short run: a few steps of everything, to see that it runs. Its scores mean nothing."]
    said = [
        f'"Ahead" and "behind" below: in every seed, and by more than {MARGIN} of similarity on average; the numbers are the mean '
        "difference in similarity and its standard deviation over seeds."
    ]
    for target, regime in pairs(results):
        steps = stops(results, target, regime)
        batch = results["settings"]["batch"]
        for step in dict.fromkeys((steps[len(steps) // 2 - 1], steps[-1])):
            wanted = {"target": target, "regime": regime, "step": step}
            against = [
                f"{verdict(gap, MARGIN)} {title(other)} ({gap.mean:+.2f} ± {gap.std:.2f})"
                for other in methods(results, target, regime)
                if other != "a4a"
                for gap in (difference(results, "similarity", "a4a", other, **wanted),)
            ]
            said.append(f"{heading(target, regime)}, {step * batch} samples seen: A4A is {', '.join(against)}.")
    return [*said, _matters(results), *_ablations(results)]


def _matters(results: Results) -> str:
    """Whether the pretrained adapter itself, and not the mapping around it, makes the difference anywhere."""
    places = []
    for target, regime in pairs(results):
        for step in stops(results, target, regime):
            gap = difference(results, "similarity", "a4a", "random", target=target, regime=regime, step=step)
            if verdict(gap, MARGIN) == "ahead of":
                samples = step * results["settings"]["batch"]
                places.append(f"{heading(target, regime)}, {samples} samples ({gap.mean:+.2f} ± {gap.std:.2f})")
    if not places:
        return (
            "The pretrained adapter matters nowhere in this run: A4A around random weights of the same shape does as well at every "
            "point, so what A4A gains over scratch, where it gains, comes from the mapping and not from what is carried."
        )
    return f"The pretrained adapter itself matters (A4A ahead of A4A around random weights) at: {'; '.join(places)}."


def _ablations(results: Results) -> list[str]:
    sentences = []
    for target, regime in pairs(results):
        groups: dict[str, list[str]] = {"ahead of": [], "behind": [], "level with": []}
        step = stops(results, target, regime)[-1]
        for method in methods(results, target, regime, ablations=True):
            gap = difference(results, "similarity", method, "a4a", target=target, regime=regime, step=step)
            groups[verdict(gap, MARGIN)].append(f"{title(method)} ({gap.mean:+.2f} ± {gap.std:.2f})")
        said = [f"{where} it: {', '.join(names)}" for where, names in groups.items() if names]
        if said:
            sentences.append(f"Ablations of A4A ({heading(target, regime)}), {'; '.join(said)}.")
    return sentences


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
