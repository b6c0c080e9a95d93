"""How well generated digits show the concept: a classifier and a distance, both made from real images of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tiny.denoiser_world import TRAINING_IMAGES, concept_images


@dataclass(frozen=True)
class Judge:
    """Knows real images of the concept, and nothing else."""

    classifier: Any
    test_images: Tensor  # (497, 1, 8, 8), not seen by the classifier nor by any denoiser

    @classmethod
    def trained(cls) -> Judge:
        """A judge trained on the images that the denoisers are trained on too."""
        from sklearn.svm import SVC  # type: ignore[import-untyped]  # scikit-learn has no types

        images, labels = concept_images(slice(TRAINING_IMAGES))
        classifier = SVC(C=10.0).fit(images.flatten(1).numpy(), labels.numpy())
        return cls(classifier, concept_images(slice(TRAINING_IMAGES, None))[0])

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images (n, 1, 8, 8) taken for the digit that was asked for. Digits in other styles get about 0.1."""
        return float((self.classifier.predict(images.flatten(1).numpy()) == labels.numpy()).mean())

    def distance(self, images: Tensor) -> float:
        """Fréchet distance to real images, in pixels."""
        return frechet_distance(images.flatten(1), self.test_images.flatten(1))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½) of two samples (n, features) and (m, features)."""
    a, b = a.double(), b.double()
    covariances = a.T.cov(), b.T.cov()
    # Σ_a Σ_b has the eigenvalues of a positive semi-definite matrix; what is below zero is rounding.
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    spread = covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + spread)


def contact_sheet(images: Tensor, labels: Tensor, per_digit: int = 2) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The first images of each digit side by side, one row per repetition: (8 · per_digit, 80) grey levels."""
    rows = [torch.stack([images[labels == digit][row, 0] for digit in range(10)]) for row in range(per_digit)]
    tiles = torch.stack(rows)  # (per_digit, 10, 8, 8)
    sheet = tiles.permute(0, 2, 1, 3).reshape(8 * per_digit, 80)
    return ((sheet.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).numpy()
