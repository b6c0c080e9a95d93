"""How well a target with an adapter does: its loss on unseen references, and what the judge says of the images it makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.a4a import world
from benchmarks.a4a.adapt import Place
from benchmarks.a4a.judge import Judge, follows, retrieval, similarity
from benchmarks.a4a.pretrain import denoising_loss
from xadapt_a4a.objective import predict


@dataclass(frozen=True)
class Exam:
    """Held-out references, each asked for in several scenes; the same for every adapter, seed and target."""

    references: int
    prompts: int  # per reference
    sampling_steps: int
    guidance: float
    losses: int  # samples that the loss is taken over
    seed: int = 909

    def loss(self, adapter: Any, place: Place) -> float:
        """The denoising loss at λ = 1 on identities that no training has seen."""
        generator = torch.Generator().manual_seed(self.seed)
        total, chunk = 0.0, 128
        for _ in range(self.losses // chunk):
            drawn = world.draw(chunk, generator)
            seen = world.render(drawn.identities, world.some_scenes(chunk, generator), generator)
            conditions = place.text(world.prompts(drawn.scenes))
            with torch.no_grad(), attached(adapter, place, place.encoder(seen), guidance=False):
                total += (
                    float(denoising_loss(place.target, drawn.images, conditions, place.objective, generator)) * chunk
                )
        return total / (self.losses // chunk * chunk)

    def asked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """References (m, 9), their pictures (m, 3, 8, 8), and which of them (n) is asked for in which scene (n)."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        drawn = world.draw(self.references, generator)
        which = torch.arange(self.references).repeat_interleave(self.prompts)
        scenes = world.some_scenes(len(which), generator)
        return drawn.identities, drawn.images, which, scenes

    def generate(self, adapter: Any, place: Place, scale: float = 1.0) -> Tensor:
        """Images (n, 3, 8, 8) of what is asked, by DDIM with guidance; the reference is encoded once."""
        _, pictures, which, scenes = self.asked()
        prompts = torch.cat([world.blank_prompts(len(scenes)), world.prompts(scenes)])
        with attached(adapter, place, place.encoder(pictures)[which], guidance=True, scale=scale):
            return sample(place, place.text(prompts), len(scenes), self)

    def scores(self, images: Tensor, judge: Judge) -> dict[str, float]:
        """Of generated images: similarity to the reference, retrieval of it among all, prompt following."""
        references, _, which, scenes = self.asked()
        with torch.no_grad():
            found, logits = judge(images)
        return {
            "similarity": similarity(found, references[which]),
            "retrieval": retrieval(found, references, which),
            "prompt": follows(logits, scenes),
        }


def attached(adapter: Any, place: Place, embeds: Tensor, *, guidance: bool, scale: float = 1.0) -> Any:
    """The adapter on the target with the references of these embeddings (n, width)."""
    if adapter is None:
        from contextlib import nullcontext

        return nullcontext()
    return adapter.attached(place.target, adapter.encode(embeds), scale, guidance=guidance)


@torch.no_grad()
def sample(place: Place, conditions: dict[str, Any], count: int, exam: Exam) -> Tensor:
    """Images (count, 3, 8, 8) for conditions laid out [negative; positive]."""
    from diffusers import DDIMScheduler

    schedule: Any = place.objective.schedule
    scheduler: Any = DDIMScheduler.from_config(
        schedule.config, prediction_type=place.objective.prediction, clip_sample=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(exam.sampling_steps)
    x = torch.randn(count, 3, world.SIDE, world.SIDE, generator=torch.Generator().manual_seed(exam.seed + 2))
    target: nn.Module = place.target
    for time in scheduler.timesteps:
        untold, told = predict(target, torch.cat([x, x]), time.expand(2 * count), conditions).chunk(2)
        x = scheduler.step(untold + exam.guidance * (told - untold), time, x).prev_sample
    return x.clamp(-1, 1)
