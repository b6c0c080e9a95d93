"""The judge: a small network that has learnt on real images which identity and which scene an image shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.a4a import world


class Judge(nn.Module):
    """Reads identity and scene off an image."""

    def __init__(self, width: int = 192) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * world.SIDE**2, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, world.IDENTITY + len(world.SCENES)),
        )

    @classmethod
    def trained(cls, steps: int, seed: int = 4321) -> Judge:
        """Trained on real images alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            judge = cls()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(steps):
            real = world.draw(128, generator)
            identities, scenes = judge(real.images)
            loss = F.mse_loss(identities, real.identities) + 0.1 * F.cross_entropy(scenes, real.scenes)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            rates.step()
        return judge.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Identities (n, 9) and logits of the scenes (n, 16) of images (n, 3, 8, 8)."""
        found: Tensor = self.body(images)
        return found[:, : world.IDENTITY], found[:, world.IDENTITY :]


def similarity(found: Tensor, wanted: Tensor) -> float:
    """Mean cosine of identities (n, 9), whose mean over the world is 0: 1 for the same, 0 for strangers."""
    return float(F.cosine_similarity(found, wanted).mean())


def retrieval(found: Tensor, references: Tensor, which: Tensor) -> float:
    """The share of identities found (n, 9) whose nearest among the references (m, 9) is the one asked for, (n)."""
    return float((torch.cdist(found, references).argmin(dim=1) == which).float().mean())


def follows(logits: Tensor, scenes: Tensor) -> float:
    """The share of images that show the scene asked for."""
    return float((logits.argmax(dim=1) == scenes).float().mean())
