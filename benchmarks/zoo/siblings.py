"""The siblings of the tiny language model: those of `benchmarks.tiny`, and others in shape, scale and history."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.tiny.drifted import DRIFTED, KEPT_BY_STUDENT
from benchmarks.tiny.pretrain import fit
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.settings import LmSettings
from benchmarks.tiny.siblings import EXACT, reparam, rot
from benchmarks.tiny.tasks import PAD
from benchmarks.zoo.settings import LM_SIBLINGS, LmZoo
from benchmarks.zoo.tasks import VOCABULARY, new_lines, old_lines

INDEPENDENT = 500  # added to the seed
Make = Callable[[LlamaForCausalLM, LmZoo, int, Reporter], LlamaForCausalLM]


def llama(settings: LmSettings, *, hidden: int | None = None, layers: int | None = None) -> LlamaForCausalLM:
    """A fresh model over the zoo's vocabulary; its MLP is twice as wide as its stream."""
    hidden = hidden or settings.hidden
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=hidden,
            intermediate_size=hidden * settings.feed_forward // settings.hidden,
            num_hidden_layers=layers or settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=32,
            tie_word_embeddings=False,
            use_cache=False,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=None,
        ),
        attn_implementation="eager",
    )


def pretrain(settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """A source: trained from scratch on the old tasks in the plain format."""
    torch.manual_seed(seed)
    model = llama(settings.tiny)
    steps, rate = settings.tiny.pretrain_steps, settings.tiny.pretrain_learning_rate
    _train(model, settings.tiny.pretrain_batch, (steps, rate), seed, f"pre-training, seed {seed}", progress)
    return model.eval()


def make_sibling(
    name: str, source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter
) -> LlamaForCausalLM:
    """The sibling of that name; `source` stays as it is."""
    if name in EXACT:
        return EXACT[name](source, torch.Generator().manual_seed(seed + 3000))
    if name in MADE_HERE:
        return MADE_HERE[name](source, settings, seed, progress)
    return DRIFTED[name](source, settings.tiny, seed, progress)


def both(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Inner bases and the residual stream changed at once."""
    generator = torch.Generator().manual_seed(seed + 3000)
    return rot(reparam(source, generator), generator)


@torch.no_grad()
def scaled(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """A factor per layer, log-uniform between 1/2 and 2, moved from the first to the second of each pair below."""
    model, generator = copy.deepcopy(source), torch.Generator().manual_seed(seed + 3000)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for first, second in (
            (attention.q_proj, attention.k_proj),
            (attention.v_proj, attention.o_proj),
            (mlp.up_proj, mlp.down_proj),
        ):
            factor = float(torch.exp2(2 * torch.rand((), generator=generator) - 1))
            first.weight.mul_(factor)
            second.weight.div_(factor)
    return model


def gains(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Each norm's gains times 2^n, n normal with deviation 1/2 per channel: another function, then healed."""
    model, generator = copy.deepcopy(source), torch.Generator().manual_seed(seed + 3000)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(torch.exp2(0.5 * torch.randn(parameter.shape, generator=generator)))
    _heal(model, "gains", settings, seed, progress)
    return model


def student(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Drop the middle layer and distil the source into what is left."""
    model = _with_layers(source, settings, list(KEPT_BY_STUDENT))
    _train(model, settings.tiny.drift_batch, settings.tiny.student, seed + 1000, _title("student"), progress, source)
    return model


def cut(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Drop the last layer and heal on the data."""
    model = _with_layers(source, settings, range(settings.tiny.layers - 1))
    _heal(model, "cut", settings, seed, progress)
    return model


def deeper(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """A block that does nothing at first between each two of the source's, and then training of the whole."""
    torch.manual_seed(seed + 3000)
    order: list[int | None] = [0]
    for index in range(1, settings.tiny.layers):
        order += [None, index]
    model = _with_layers(source, settings, order)
    _heal(model, "deeper", settings, seed, progress)
    return model


def merged(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """A LoRA for the fifth new task on the layers that the zoo's adapters sit on, merged."""
    torch.manual_seed(seed + 3000)
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, target_modules=paths(source, settings.target_modules)
    )
    model = get_peft_model(copy.deepcopy(source), config)
    fit(
        model,
        lambda generator: new_lines("Z", settings.adapt_batch, generator),
        steps=settings.adapt_steps,
        learning_rate=1e-2,
        seed=seed + 3000,
        title=_title("merged"),
        progress=progress,
    )
    done: Any = model.merge_and_unload()
    return done.requires_grad_(True)


def other_width(name: str) -> Make:
    """Of another width, from scratch, on the source's distributions."""

    def make(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
        torch.manual_seed(seed + 3000)
        model = llama(settings.tiny, hidden=settings.hidden[name])
        _train(
            model, settings.tiny.drift_batch, settings.distilled, seed + 1000, _title(name), progress, teacher=source
        )
        return model

    return make


def indep(source: LlamaForCausalLM, settings: LmZoo, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Another seed."""
    return pretrain(settings, seed + INDEPENDENT, progress)


MADE_HERE: dict[str, Make] = {
    "both": both,
    "scaled": scaled,
    "gains": gains,
    "student": student,
    "cut": cut,
    "merged": merged,
    "deeper": deeper,
    "wider": other_width("wider"),
    "narrower": other_width("narrower"),
    "indep": indep,
}


def paths(model: torch.nn.Module, target_modules: Sequence[str]) -> list[str]:
    """The paths of the layers whose names end so."""
    return [name for name, _ in model.named_modules() if name.endswith(tuple(target_modules))]


def _with_layers(source: LlamaForCausalLM, settings: LmZoo, order: Sequence[int | None]) -> LlamaForCausalLM:
    """These blocks of the source, in this order; None is a fresh one that adds nothing to the stream yet."""
    model = llama(settings.tiny, layers=len(order))
    for layer, index in zip(model.model.layers, order, strict=True):
        if index is not None:
            layer.load_state_dict(source.model.layers[index].state_dict())
            continue
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    rest: dict[str, Tensor] = {name: t for name, t in source.state_dict().items() if ".layers." not in name}
    model.load_state_dict(rest, strict=False)
    return model


def _heal(model: LlamaForCausalLM, name: str, settings: LmZoo, seed: int, progress: Reporter) -> None:
    _train(model, settings.tiny.drift_batch, getattr(settings, name), seed + 1000, _title(name), progress)


def _train(
    model: Any,
    batch: int,
    training: tuple[int, float],
    seed: int,
    title: str,
    progress: Reporter,
    teacher: LlamaForCausalLM | None = None,
) -> None:
    steps, rate = training
    fit(
        model,
        lambda generator: old_lines(batch, generator),
        steps=steps,
        learning_rate=rate,
        seed=seed,
        title=title,
        progress=progress,
        teacher=teacher,
    )


def _title(name: str) -> str:
    return f"making the sibling: {LM_SIBLINGS[name][0]}"
