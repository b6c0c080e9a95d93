"""Siblings whose function has changed: continued training, a pruned head, a distilled student, rounded weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from benchmarks.tiny.pretrain import fit, tiny_llama
from benchmarks.tiny.progress import Reporter
from benchmarks.tiny.settings import SIBLINGS, LmSettings
from benchmarks.tiny.tasks import TASKS, Batch, join, make_batch

KEPT_BY_STUDENT = {0: 0, 2: 1}  # source layer -> student layer; the middle one is dropped


def drifted(
    name: str, source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter
) -> LlamaForCausalLM:
    """The sibling of that name. `source` is left as it is."""
    return DRIFTED[name](source, settings, seed, progress)


def continued(name: str) -> Callable[[LlamaForCausalLM, LmSettings, int, Reporter], LlamaForCausalLM]:
    """Continued training, half on the plain format, half on the instruction format."""

    def train(source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter) -> LlamaForCausalLM:
        model = copy.deepcopy(source)
        _train(model, name, settings, seed, progress, instruction=True)
        return model

    return train


def prune(source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Cut the head that writes least in each layer, then train a little to heal.

    A head whose q, k, v rows and o columns are all zero receives no gradient, so it stays cut without a mask.
    """
    model = copy.deepcopy(source)
    size = model.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            written = attention.o_proj.weight.unflatten(1, (-1, size)).norm(dim=(0, 2))
            head = int(written.argmin())
            rows = slice(head * size, (head + 1) * size)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                projection.weight[rows] = 0.0
            attention.o_proj.weight[:, rows] = 0.0
    _train(model, "prune", settings, seed, progress)
    return model


def student(source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Drop the middle layer and distil the source into what is left."""
    model = tiny_llama(settings, layers=len(KEPT_BY_STUDENT))
    state = source.state_dict()
    for theirs, ours in KEPT_BY_STUDENT.items():
        model.model.layers[ours].load_state_dict(source.model.layers[theirs].state_dict())
    rest = {name: tensor for name, tensor in state.items() if ".layers." not in name}
    model.load_state_dict(rest, strict=False)
    _train(model, "student", settings, seed, progress, teacher=source)
    return model


@torch.no_grad()
def int4(source: LlamaForCausalLM, settings: LmSettings, seed: int, progress: Reporter) -> LlamaForCausalLM:
    """Round the weights of all layers to 4 bits: symmetric, to nearest, one scale per 32 inputs of a row."""
    model = copy.deepcopy(source)
    for module in model.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            groups = module.weight.unflatten(1, (-1, 32))
            scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
            module.weight.copy_(((groups / scale).round() * scale).flatten(1))
    return model


DRIFTED: dict[str, Callable[[LlamaForCausalLM, LmSettings, int, Reporter], LlamaForCausalLM]] = {
    "vlight": continued("vlight"),
    "light": continued("light"),
    "mid": continued("mid"),
    "prune": prune,
    "student": student,
    "int4": int4,
}


def _train(
    model: LlamaForCausalLM,
    name: str,
    settings: LmSettings,
    seed: int,
    progress: Reporter,
    *,
    instruction: bool = False,
    teacher: LlamaForCausalLM | None = None,
) -> None:
    keywords = "".join(TASKS)
    steps, learning_rate = getattr(settings, name)

    def draw(generator: torch.Generator) -> Batch:
        if not instruction:
            return make_batch(keywords, settings.drift_batch, generator)
        plain = make_batch(keywords, settings.drift_batch // 2, generator)
        return join(
            plain, make_batch(keywords, settings.drift_batch - settings.drift_batch // 2, generator, instruction=True)
        )

    fit(
        model,
        draw,
        steps=steps,
        learning_rate=learning_rate,
        seed=seed + 1000,  # other lines than in pre-training
        title=f"making the sibling: {SIBLINGS[name]}",
        progress=progress,
        teacher=teacher,
    )
