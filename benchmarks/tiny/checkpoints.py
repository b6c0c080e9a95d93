"""Real checkpoints and a user's text file: opening, splitting, padding, the loss per token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import xadapt
from benchmarks.tiny.tasks import IGNORE, Batch

Reader = Callable[[str], Tensor]  # a line of text -> its token ids


def open_checkpoint(checkpoint: str, *, dtype: str, device: str, length: int) -> tuple[PreTrainedModel, Reader]:
    """A causal language model (folder or hub id) and the reader of its tokenizer. Never runs code from the checkpoint.

    Raises:
        ValueError: it cannot be opened; the message says what was tried.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=getattr(torch, dtype), trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{checkpoint} could not be opened as a causal language model with its tokenizer: {error}\n"
            "Give a folder with config.json, model.safetensors and the tokenizer's files, or the id of such a model."
        ) from error
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def read(line: str) -> Tensor:
        return torch.tensor((tokenizer(line)["input_ids"] + ending)[:length])

    return model.to(device).eval(), read


@contextmanager
def carried(folder: Path, base: PreTrainedModel) -> Iterator[PeftModel]:
    """`base` with the adapter of `folder` on it; without it again afterwards.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    model = xadapt.load(base, folder, torch_device=base.device)
    try:
        yield model.eval()
    finally:
        model.unload()


def read_lines(path: Path) -> list[str]:
    """The non-empty lines of a text file; at least ten, so that each of the three splits has one."""
    if not path.is_file():
        raise ValueError(f"--text {path}: no such file. Give a text file with one example per line.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < 10:
        raise ValueError(
            f"--text {path} has {len(lines)} non-empty lines; at least 10 are needed: 8 to train on, 1 to choose the "
            "learning rate, 1 to measure."
        )
    return lines


def split(lines: Sequence[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Shuffled into lines to train on (80 %), to choose the learning rate (10 %), and to measure (10 %)."""
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [lines[index] for index in order]
    tenth = len(lines) // 10
    return shuffled[2 * tenth :], shuffled[:tenth], shuffled[tenth : 2 * tenth]


def pad(ids: Sequence[Tensor], device: torch.device) -> Batch:
    """Lines of different lengths as one batch. Padding stands at the end, so a causal model needs no mask for it."""
    length = max(len(line) for line in ids)
    tokens, labels = torch.zeros(len(ids), length, dtype=torch.long), torch.full((len(ids), length), IGNORE)
    for row, line in enumerate(ids):
        tokens[row, : len(line)] = line
        labels[row, : len(line)] = line
    return Batch(tokens.to(device), labels.to(device))


@torch.no_grad()
def loss_on(lines: Sequence[Tensor], model: torch.nn.Module, batch: int, device: torch.device) -> float:
    """Cross-entropy per token over all lines together."""
    total, count = 0.0, 0
    for start in range(0, len(lines), batch):
        part = pad(lines[start : start + batch], device)
        logits = model(input_ids=part.tokens).logits[:, :-1].flatten(0, 1).float()
        wanted = part.labels[:, 1:].flatten()
        total += float(cross_entropy(logits, wanted, ignore_index=IGNORE, reduction="sum"))
        count += int((wanted != IGNORE).sum())
    return total / max(count, 1)


def check_device(device: str) -> None:
    """Refuse CUDA where there is none, before anything is loaded."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device here. Leave --device out to run on the CPU.")
