"""Existing adapters carried along maps between two bases' features, which are learnt from unlabelled inputs without gradients."""

from .methods import ALIGNED as ALIGNED
from .methods import ALIGNED_INPUT as ALIGNED_INPUT
from .methods import ALIGNED_OUTPUT as ALIGNED_OUTPUT

__all__ = ["ALIGNED", "ALIGNED_INPUT", "ALIGNED_OUTPUT"]
