"""Opening the models: from a folder, from the hub, or, for names that begin with tiny/, from the cell that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.frame.advice import advice_for
from benchmarks.frame.cell import Cell

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from benchmarks.frame.worker import Worker

TINY = "tiny/"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A model. `made` are the settings of one that is made on the spot, which a seed belongs to."""

    name: str
    revision: str | None = None
    made: Made | None = None

    def cells(self) -> tuple[Cell, ...]:
        """The cells that make it."""
        if self.made is None:
            return ()
        from benchmarks.llm.tiny import TinyModel

        return (TinyModel(which=self.name.removeprefix(TINY), made=self.made),)

    def where(self, worker: Worker) -> str:
        """Folder or hub id."""
        made = self.cells()
        return str(worker.artifacts(made[0]) / "model") if made else self.name

    def label(self) -> str:
        """What tells it from the others: two revisions of one model are two bases."""
        return self.title() if self.made is None else f"{self.name}, seed {self.made.seed}"

    def title(self) -> str:
        """Its name in the tables: that of all its seeds."""
        return titled(self.name, self.revision)


def titled(name: str, revision: str | None) -> str:
    """`name`, or `name at revision`."""
    return name if revision is None else f"{name} at {revision}"


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a tiny model depends on."""

    seed: int
    pretrain_steps: int
    drift_steps: int | None


def load(base: Base, dtype: str, worker: Worker) -> tuple[PreTrainedModel, Any]:
    """The model, in evaluation mode on this process's device, and its tokenizer with a padding token, padding left."""
    import warnings

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # PEFT 0.21 asks transformers 5 whether gradient checkpointing is on, by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    where = base.where(worker)
    model: Any = AutoModelForCausalLM.from_pretrained(where, revision=base.revision, dtype=getattr(torch, dtype))
    tokenizer: Any = AutoTokenizer.from_pretrained(where, revision=base.revision)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token_id = _padding(tokenizer)
    tokenizer.padding_side = "left"
    return model.to(device()).eval(), tokenizer


def device() -> Any:
    """The accelerator of this process, if there is one. torchrun says which."""
    import os

    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_base(name: str, revision: str | None = None) -> None:
    """Say early that a model is missing or gated. Only its config is read."""
    from transformers import AutoConfig

    if name.startswith(TINY):
        from benchmarks.llm.tiny import check_which

        check_which(name.removeprefix(TINY))
        return
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} holds no config.json. Give the folder of a transformers checkpoint, or a hub id.")
    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        advice = advice_for(error)
        raise ValueError(f"the model {titled(name, revision)} cannot be opened. {advice or error}") from error


def _padding(tokenizer: Any) -> int:
    """Llama 3 brings a token for padding, under a name that is no padding token; others pad with the end of a text."""
    reserved = tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    known = reserved is not None and reserved != tokenizer.unk_token_id
    return reserved if known else tokenizer.eos_token_id
