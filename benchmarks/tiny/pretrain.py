"""The source model: a Llama with 126k parameters, trained from scratch; and the one training loop of this benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.settings import LmSettings
from benchmarks.tiny.tasks import IGNORE, PAD, TASKS, VOCABULARY, Batch, make_batch

Draw = Callable[[torch.Generator], Batch]


def tiny_llama(settings: LmSettings, *, layers: int | None = None) -> LlamaForCausalLM:
    """A fresh model in transformers' own class, so that everything here runs on code that users run."""
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=settings.hidden,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=layers or settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=32,
            tie_word_embeddings=False,  # the rotated sibling changes the two tables differently
            use_cache=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        ),
        attn_implementation="eager",
    )


def pretrain(settings: LmSettings, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """The source: trained on the eight tasks in the plain format."""
    torch.manual_seed(seed)
    model = tiny_llama(settings)
    fit(
        model,
        lambda generator: make_batch("".join(TASKS), settings.pretrain_batch, generator),
        steps=settings.pretrain_steps,
        learning_rate=settings.pretrain_learning_rate,
        seed=seed,
        title="pre-training the source",
        progress=progress,
    )
    return model


def fit(
    model: PreTrainedModel | torch.nn.Module,
    draw: Draw,
    *,
    steps: int,
    learning_rate: float | Mapping[str, float],
    seed: int,
    title: str,
    progress: Reporter,
    teacher: PreTrainedModel | None = None,
) -> None:
    """Train whatever of `model` asks for gradients: AdamW, short warm-up, linear decay; on labels, or on a teacher's distributions.

    `learning_rate` may be a mapping: the rate of the parameters whose name contains the key.
    """
    generator = torch.Generator().manual_seed(seed)
    rates = learning_rate if isinstance(learning_rate, Mapping) else {"": learning_rate}
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in named]
    groups = [{"params": [p for name, p in named if key in name], "rate": rate} for key, rate in rates.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    model.train()
    for step in progress.track(title, steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * schedule(step, steps)
        batch = draw(generator)
        logits = model(input_ids=batch.tokens).logits
        if teacher is None:
            loss = answer_loss(logits, batch.labels)
        else:
            with torch.no_grad():
                wanted = teacher(input_ids=batch.tokens).logits
            loss = (
                kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


def schedule(step: int, steps: int) -> float:
    """Learning-rate factor: up over the first 5 % of the steps, then straight down to zero."""
    warm_up = max(1, steps // 20)
    return min(1.0, (step + 1) / warm_up) * (1.0 - step / steps)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answer characters. Shapes (lines, length, vocabulary) and (lines, length)."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)
