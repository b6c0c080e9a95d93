"""The things that are timed: denoising steps, the first step, training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.a4a_cost.models import EMBED, Shape, inputs, ip_adapter
from xadapt_a4a import A4AModel
from xadapt_a4a.scratch import IPAdapterModel
from xadapt_a4a.targets import find_attention_layers

Step = Callable[[], Any]


class Bench:
    """One target, one source and a number of tokens: everything that takes turns. The batch is 2, as guidance has it."""

    def __init__(self, shape: Shape, source: Shape, tokens: int, device: str, dtype: torch.dtype) -> None:
        self.shape, self.tokens, self.device, self.dtype = shape, tokens, device, dtype
        self.target = shape.build(device, dtype)
        self.source = source.build(device, dtype)
        self.call = inputs(shape, self.target, 2, device, dtype)
        self.source_call = inputs(source, self.source, 2, device, dtype)
        self.embeds = torch.randn(1, EMBED, generator=torch.Generator().manual_seed(3)).to(device, dtype)
        context: Any = self.source.config
        self.file = ip_adapter(self.source, tokens, context.cross_attention_dim)
        flat = {f"{group}.{name}": one for group, tensors in self.file.items() for name, one in tensors.items()}
        self.adapter = A4AModel.from_ip_adapter(flat, self.target).eval()
        nn.Module.to(self.adapter, device, dtype)  # diffusers' own `to` comments on each call

    def denoising(self) -> dict[str, Step]:
        """One step each: bare, A4A with the maps in place, the native IP-Adapter, both models as X-Adapter runs them."""
        carried, stock = self.shape.build(self.device, self.dtype), self.shape.build(self.device, self.dtype)
        self.attachment = self.adapter.attach(carried, self.adapter.encode(self.embeds))
        steps: dict[str, Step] = {
            "bare": lambda: self._run(self.target, self.call),
            "a4a": lambda: self._run(carried, self.call),
        }
        if (
            self.shape.kind == "pixart"
        ):  # diffusers has no IP-Adapter for it: ours does what its processors do, at each step
            native = self._scratch(stock)

            def inline() -> Any:
                with native.attached(stock, native.encode(self.embeds)):
                    return self._run(stock, self.call)

            steps["native"] = inline
        else:
            steps["native"] = self._stock(stock, self.shape, self.call)
        source = self._stock(self.source, None, self.source_call)

        def both() -> None:
            source()
            self._run(self.target, self.call)

        return {**steps, "both models": both}

    def first(self) -> dict[str, Step]:
        """What comes before the first step: encoding the reference and putting the maps in place."""

        def prepare() -> None:
            with self.adapter.attached(self.target, self.adapter.encode(self.embeds)):
                pass

        return {"mapping": prepare, "bare": lambda: self._run(self.target, self.call)}

    def training(self) -> dict[str, Step]:
        """A whole step of the optimiser: A4A, and an IP-Adapter from scratch, on one target."""
        scratch = self._scratch(self.target)
        return {
            "a4a": self._training_step(self.adapter, self.adapter.param_groups()),
            "scratch": self._training_step(scratch, scratch.param_groups()),
        }

    def parameters(self) -> dict[str, int]:
        """Trainable numbers of both."""
        sizes = {"a4a": self.adapter, "scratch": self._scratch(self.target)}
        return {name: sum(one.numel() for one in model.parameters()) for name, model in sizes.items()}

    def _scratch(self, target: nn.Module) -> IPAdapterModel:
        keys: Any = find_attention_layers(target)[0].module.to_k
        options = {
            "image_embed_dim": EMBED,
            "cross_attention_dim": keys.in_features,
            "mult": 2,
            "num_tokens": self.tokens,
        }
        model = IPAdapterModel.fresh(target, "faceid", options)
        nn.Module.to(model, self.device, self.dtype)
        return model

    def _stock(self, model: Any, shape: Shape | None, call: dict[str, Any]) -> Step:
        """diffusers' own IP-Adapter on the model, which projects the tokens at each step."""
        file = ip_adapter(model, self.tokens, model.config.cross_attention_dim) if shape else self.file
        model._load_ip_adapter_weights([file], low_cpu_mem_usage=False)
        nn.Module.to(model, self.device, self.dtype)
        both = torch.cat([torch.zeros_like(self.embeds), self.embeds])[:, None]
        conditions = {**call.get("added_cond_kwargs", {}), "image_embeds": [both]}
        return lambda: self._run(model, {**call, "added_cond_kwargs": conditions})

    def _training_step(self, adapter: Any, groups: list[dict[str, Any]]) -> Step:
        optimizer = torch.optim.AdamW(groups)
        latents = self.call["hidden_states" if self.shape.kind == "pixart" else "sample"]
        goal = torch.zeros_like(latents)
        embeds = self.embeds.expand(2, -1)

        def step() -> None:
            with adapter.attached(self.target, adapter.bank(adapter(embeds)), guidance=False):
                made = self.target(**self.call)[0][:, : goal.shape[1]]
                F.mse_loss(made.float(), goal.float()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    @staticmethod
    @torch.no_grad()
    def _run(model: nn.Module, call: dict[str, Any]) -> Any:
        return model(**call)[0]
