"""The fallback that trains: a fresh adapter on the target learns what the source's adapter changes, from unlabelled inputs."""

from .methods import DISTIL as DISTIL
from .methods import DISTIL_INPUT as DISTIL_INPUT
from .methods import DISTIL_OUTPUT as DISTIL_OUTPUT

__all__ = ["DISTIL", "DISTIL_INPUT", "DISTIL_OUTPUT"]
