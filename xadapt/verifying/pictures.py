"""What a pipeline draws with a component of it replaced: the same prompts and the same noise for each."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xadapt.base import CheckpointBase
from xadapt.contract import Base
from xadapt.data.amount import Amount
from xadapt.opening import pipeline_of

EDGE = 256  # pixels of a picture in a report
STEPS = 20


@dataclass(frozen=True)
class Painter:
    """A pipeline on disk, of which one component is live."""

    pipeline: Any
    component: str
    prompts: tuple[str, ...]
    seed: int

    @classmethod
    def of(cls, base: Base, prompts: Sequence[str], amount: Amount) -> Painter:
        """The pipeline that a base is a component of.

        Raises:
            ValueError: it is in none, or the pipeline cannot be loaded.
        """
        if not isinstance(base, CheckpointBase) or pipeline_of(base) is None:
            raise ValueError(
                f"prompts are drawn by a pipeline, and {base.name} is a component of none: pass the pipeline's folder and component=…."
            )
        import diffusers

        library: Any = diffusers

        component = base.folder.name
        try:
            pipeline = library.DiffusionPipeline.from_pretrained(
                base.folder.parent, local_files_only=True, **{component: base.module()}
            )
        except Exception as error:  # any part of a pipeline can be missing or damaged in its own way
            raise ValueError(
                f"The pipeline of {base.name} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline, component, tuple(prompts), amount.seed)

    def draw(self, network: nn.Module) -> tuple[str, ...]:
        """A picture for each prompt, as data URIs of PNGs."""
        setattr(self.pipeline, self.component, network)
        drawn = []
        for prompt in self.prompts:
            generator = torch.Generator().manual_seed(self.seed)
            picture = self.pipeline(prompt, num_inference_steps=STEPS, generator=generator).images[0]
            picture.thumbnail((EDGE, EDGE))
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            drawn.append("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode())
        return tuple(drawn)
