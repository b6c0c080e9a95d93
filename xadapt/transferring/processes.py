"""Several processes that learn one transfer together, as `accelerate launch` starts them."""

from __future__ import annotations

import torch


def writes() -> bool:
    """Whether this process puts down what all have learnt: each has the same, and two writers would be in each other's way."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not together or torch.distributed.get_rank() == 0
