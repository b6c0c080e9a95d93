"""From a preset to its cells: learning rates first, where there is a choice, then everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from benchmarks.dreambooth.adapters import LORAX, Adapting
from benchmarks.dreambooth.cells import Evaluation, Model, Training
from benchmarks.dreambooth.settings import Experiment, Pair, PeftMethod, Sampling, Settings, Side
from benchmarks.dreambooth.subjects import Subject, chosen
from benchmarks.dreambooth.tiny.cells import TinyPair, TinyWorld
from benchmarks.frame.cell import Cell, Result
from benchmarks.frame.settings import did_you_mean
from benchmarks.frame.sweep import Finished

PEFT_ALPHA = 8.0
SIZES = {"lora": 1.0, "dora": 1.0, "loha": 2.0, "lokr": 0.01}
"""Of an adapter beside a LoRA of the same rank: LoHa has two products; LoKr's factors are small at any rank."""


def stages(settings: Settings, finished: Finished) -> Iterator[Sequence[Cell]]:
    """The trainings among which a learning rate is chosen, by their images on the source; then all cells."""
    maker = Maker(settings)
    modes = {mode_of(pair, adapting): (pair, adapting) for _, pair, adapting in adaptings(settings)}
    candidates = {
        mode: maker.candidates(pair, adapting)
        for mode, (pair, adapting) in modes.items()
        if len(pair.learning_rates) > 1
    }
    if candidates:
        yield [cell for by_rate in candidates.values() for group in by_rate.values() for cell in group]
    rates: dict[Mode, float] = {}  # without the modes of which every rate has failed
    for mode, (pair, _) in modes.items():
        by_rate = candidates.get(mode)
        rate = best_rate(by_rate, finished, settings.tuning.by) if by_rate else pair.learning_rates[0]
        if rate is not None:
            rates[mode] = rate
    yield [cell for experiment in settings.experiments for cell in maker.cells(experiment, rates)]


def best_rate(candidates: dict[float, list[Evaluation]], finished: Finished, by: Sequence[str]) -> float | None:
    """The rate with the best images, as the mean over its subjects; None if none has all of them.

    In a plan, where nothing has run yet, the first stands for it.
    """
    found: dict[float, float] = {}
    for rate, group in candidates.items():
        results = [result for cell in group if (result := finished.result(cell))]
        if len(results) == len(group):
            found[rate] = sum(quality(result, by) for result in results) / len(results)
    if not found:
        return next(iter(candidates)) if finished.planning else None
    return max(found, key=lambda rate: found[rate])


Mode = tuple[str, str, str]


def mode_of(pair: Pair, adapting: Adapting) -> Mode:
    """What has a learning rate of its own."""
    return pair.name, adapting.method, adapting.adaptation


def quality(result: Result, by: Sequence[str]) -> float:
    """The mean of these metrics over the images of an evaluation."""
    rows = result["rows"]
    return sum(float(row[metric]) for row in rows for metric in by) / (len(rows) * len(by))


def adaptings(settings: Settings) -> Iterator[tuple[Experiment, Pair, Adapting]]:
    """What is trained, for each experiment and pair.

    Raises:
        ValueError: an experiment names a pair that the preset does not describe.
    """
    pairs = {pair.name: pair for pair in settings.pairs}
    for experiment in settings.experiments:
        for name in experiment.pairs:
            if name not in pairs:
                raise ValueError(
                    f"an experiment names the pair {name!r}{did_you_mean(name, pairs)} Pairs of the preset: {', '.join(pairs)}."
                )
            for method in experiment.methods:
                for adapting in _of_method(settings, experiment, pairs[name], method):
                    yield experiment, pairs[name], adapting


def _of_method(settings: Settings, experiment: Experiment, pair: Pair, method: PeftMethod) -> Iterator[Adapting]:
    for rank in experiment.ranks or (settings.ranks[method],):
        alpha = float(rank) if settings.alpha == "rank" else PEFT_ALPHA
        plain = Adapting(method=method, adaptation="param", rank=rank, alpha=alpha, targets=pair.targets)
        for adaptation in experiment.adaptations:
            if adaptation != "hybrid":
                yield replace(plain, adaptation=adaptation)
                continue
            for split in experiment.splits or (rank // 2,):
                if split == 0:  # the ends are what is called otherwise in the other tables
                    yield plain
                elif split == rank:
                    yield replace(plain, adaptation=experiment.hybrid_space)
                else:
                    yield replace(plain, adaptation="hybrid", feature_rank=split, hybrid_space=experiment.hybrid_space)


@dataclass(frozen=True)
class Maker:
    """Makes the cells of a preset."""

    settings: Settings

    def subjects(self, names: tuple[str, ...]) -> list[Subject]:
        return chosen(self.settings.subjects_file, names or self.settings.subjects)

    def made(self, pair: Pair) -> TinyPair | None:
        if self.settings.models == "loaded":
            return None
        tiny = self.settings.tiny
        world = TinyWorld(settings=tiny, hours=tiny.world_hours)
        return TinyPair(
            world=world,
            family=pair.family,
            settings=tiny,
            target_sampling=pair.target_sampling,
            hours=tiny.pair_hours,
        )

    def model(self, pair: Pair, side: Side) -> Model:
        name, revision = (
            (pair.source, pair.source_revision) if side == "source" else (pair.target, pair.target_revision)
        )
        return Model(pair=pair.name, family=pair.family, name=name, revision=revision)

    def training(
        self, pair: Pair, adapting: Adapting, subject: Subject, seed: int, rate: float, side: Side = "source"
    ) -> Training:
        return Training(
            model=self.model(pair, side),
            made=self.made(pair),
            images=self.settings.images,
            subject=subject.name,
            class_word=subject.class_word,
            compute=self.settings.compute,
            forward_seconds=pair.forward_seconds,
            adapting=adapting,
            learning_rate=rate,
            optimizer=pair.optimizer,
            settings=self.settings.training,
            guidance=pair.train_guidance if side == "source" else pair.target_sampling.guidance,
            text_length=pair.text_length,
            seed=seed,
            megabytes=pair.megabytes_per_rank * adapting.rank * SIZES[adapting.method],
        )

    def evaluation(
        self, pair: Pair, subject: Subject, side: Side, training: Training | None, seed: int, carry: str = "copy"
    ) -> Evaluation:
        settings = self.settings
        sampling: Sampling = pair.source_sampling if side == "source" else pair.target_sampling
        templates = subject.prompts[: settings.prompts]
        token = settings.training.unique_token if training is not None else None  # it means nothing to a bare model
        return Evaluation(
            model=self.model(pair, side),
            made=self.made(pair),
            images=settings.images,
            subject=subject.name,
            class_word=subject.class_word,
            compute=settings.compute,
            forward_seconds=pair.forward_seconds,
            training=training,
            side=side,
            carry=carry,
            prompts=tuple(subject.prompt(each) for each in templates),
            told=tuple(subject.prompt(each, token) for each in templates) if token else (),
            image_seeds=settings.image_seeds,
            sampling=sampling,
            resolution=settings.training.resolution,
            judge=settings.judge,
            seed=seed if training is not None else 0,
        )

    def candidates(self, pair: Pair, adapting: Adapting) -> dict[float, list[Evaluation]]:
        """The source's images for every learning rate of the grid, one cell per subject of the tuning."""
        tuning = self.settings.tuning
        subjects = self.subjects(tuning.subjects or (self.subjects(())[0].name,))
        found: dict[float, list[Evaluation]] = {rate: [] for rate in pair.learning_rates}
        for subject, rate in product(subjects, found):
            training = self.training(pair, adapting, subject, tuning.seed, rate)
            found[rate].append(self.evaluation(pair, subject, "source", training, tuning.seed))
        return found

    def cells(self, experiment: Experiment, rates: dict[Mode, float]) -> Iterator[Cell]:
        """Bare models, adapters on both sides, what transfers make of them, and what training on the target does."""
        wanted = [(pair, adapting) for of, pair, adapting in adaptings(self.settings) if of is experiment]
        for (pair, adapting), subject, seed in product(wanted, self.subjects(experiment.subjects), experiment.seeds):
            sides: tuple[Side, Side] = ("source", "target")
            for side in sides:
                yield self.evaluation(pair, subject, side, None, seed)
            rate = rates.get(mode_of(pair, adapting))
            if rate is None:
                continue
            training = self.training(pair, adapting, subject, seed, rate)
            for side in sides:
                carry = LORAX if side == "target" and adapting.adaptation == "lora-x" else "copy"
                yield self.evaluation(pair, subject, side, training, seed, carry)
            if adapting.adaptation == "param" and adapting.method == "lora":
                for method in experiment.transfers:
                    yield self.evaluation(pair, subject, "target", training, seed, method)
            if adapting.adaptation == "param" and experiment.retrained:
                again = self.training(pair, adapting, subject, seed, rate, "target")
                yield self.evaluation(pair, subject, "target", again, seed)
