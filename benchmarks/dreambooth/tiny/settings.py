"""How large the tiny world is, and how long its models are trained."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TinySettings:
    """The makings of tiny pipelines, data and judges."""

    seed: int = 0
    """Of all that is made. The seeds of an experiment are those of its trainings, as with models that are loaded."""
    autoencoder_steps: int = 4000
    clip_steps: int = 600
    classifier_steps: int = 1500
    pretrain_steps: int = 2400
    pretrain_batch: int = 40
    pretrain_learning_rate: float = 2e-3
    distil_steps: int = 300
    distil_batch: int = 32
    teacher_steps: int = 12
    """Steps of the teacher over the whole range of noise; from less noise fewer."""
    teacher_guidance: float = 3.0
    images_per_subject: int = 5
    scenes: int = 2000
    """Drawings that a source is trained on; a multiple of 250."""
    pool: int = 256
    """Endpoints of the teacher for each step that the target takes."""
    world_hours: float = 0.0
    pair_hours: float = 0.0
    """Measured once, for --plan."""
