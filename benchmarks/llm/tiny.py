"""The models and the data of the preset tiny: benchmarks/tiny's Llama and its siblings as checkpoints with a tokenizer.

Nothing else of this driver knows that they are small.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.frame.cell import Cell, Estimate, Result
from benchmarks.llm.bases import Base, Made, load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from benchmarks.frame.worker import Worker
    from benchmarks.tiny.settings import LmSettings

SOURCE = "source"
LINES_SEED, TEST_SEED = 2000, 5000
TASKS = {"sort_descending": "D", "pretrained": "CRSHWMPL"}  # evaluation -> the keywords of its lines
CHOICES, TRIES = 4, 50


@dataclass(frozen=True, kw_only=True)
class TinyModel(Cell):
    """A checkpoint: the source, trained from scratch, or one of its siblings."""

    which: str
    made: Made

    def needs(self) -> tuple[Cell, ...]:
        return () if self.which == SOURCE else (TinyModel(which=SOURCE, made=self.made),)

    def estimate(self) -> Estimate:
        return Estimate(hours=0.01, megabytes=1.0)

    def describe(self) -> str:
        return f"{self.which}, seed {self.made.seed}"

    def run(self, worker: Worker) -> Result:
        from benchmarks.tiny.lm import make_sibling
        from benchmarks.tiny.pretrain import pretrain
        from benchmarks.tiny.progress import Silent
        from benchmarks.tiny.tasks import PAD, STOP

        settings = self._settings()
        if self.which == SOURCE:
            model: Any = pretrain(settings, self.made.seed, Silent())
        else:
            source: Any = load(Base(name=f"tiny/{SOURCE}", made=self.made), "float32", worker)[0]
            model = make_sibling(self.which, source.cpu(), settings, self.made.seed, Silent())
        for config in (model.config, model.generation_config):
            config.eos_token_id, config.pad_token_id = STOP, PAD
        model.save_pretrained(worker.out / "model")
        tokenizer().save_pretrained(worker.out / "model")
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def _settings(self) -> LmSettings:
        from benchmarks.tiny.settings import LmSettings

        settings: dict[str, Any] = {"pretrain_steps": self.made.pretrain_steps}
        if self.made.drift_steps is not None and hasattr(LmSettings, self.which):
            _, learning_rate = getattr(LmSettings, self.which)
            settings[self.which] = (self.made.drift_steps, learning_rate)
        return LmSettings(**settings)


def check_which(which: str) -> None:
    """Raises ValueError where there is no such sibling."""
    from benchmarks.frame.settings import did_you_mean
    from benchmarks.tiny.settings import SIBLINGS

    known = [SOURCE, *(name for name in SIBLINGS if name != "student")]  # a layer less: no adapter fits unrenumbered
    if which not in known:
        raise ValueError(f"no model tiny/{which}{did_you_mean(which, known)} There are {', '.join(known)}.")


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, in the order of benchmarks/tiny; the full stop ends a text."""
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from benchmarks.tiny.tasks import CODE, PAD, STOP, VOCABULARY

    backend = Tokenizer(WordLevel(CODE, unk_token=VOCABULARY[PAD]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=VOCABULARY[PAD],
        eos_token=VOCABULARY[STOP],
        clean_up_tokenization_spaces=False,
    )


def lines(keywords: str, count: int, seed: int) -> list[tuple[str, str]]:
    """(question, answer) without the full stop: ("R31415>", "51413")."""
    import torch

    from benchmarks.tiny.tasks import decode, make_batch

    batch = make_batch(keywords, count, torch.Generator().manual_seed(seed))
    texts = [decode(tokens).rstrip(".") for tokens in batch.tokens]
    return [(f"{question}>", answer) for question, _, answer in (text.partition(">") for text in texts)]


def training_examples(count: int, test_lines: int = 4096) -> list[tuple[str, str]]:
    """Lines of the new task, none of which is asked in an evaluation of up to `test_lines` lines."""
    asked = {question for question, _ in lines(TASKS["sort_descending"], test_lines, TEST_SEED)}
    drawn = lines(TASKS["sort_descending"], count + count // 4 + 100, LINES_SEED)
    return [line for line in drawn if line[0] not in asked][:count]


def questions(task: str, count: int) -> list[dict[str, Any]]:
    """`question`, `answer`, and for the suite lm-eval `choices` with the `label` of the right one."""
    pick = random.Random(TEST_SEED)
    found = []
    for question, answer in lines(TASKS[task], count, TEST_SEED):
        choices = [answer, *_wrong(answer, pick)]
        pick.shuffle(choices)
        found.append({"question": question, "answer": answer, "choices": choices, "label": choices.index(answer)})
    return found


def _wrong(answer: str, pick: random.Random) -> list[str]:
    """The answer's digits in other orders: chance digits would give themselves away. Where there are too few, chance digits too."""
    found: list[str] = []
    attempt = 0
    while len(found) < CHOICES - 1:
        digits = pick.sample(answer, len(answer)) if attempt < TRIES else pick.choices("0123456789", k=len(answer))
        if (candidate := "".join(digits)) not in (answer, *found):
            found.append(candidate)
        attempt += 1
    return found
