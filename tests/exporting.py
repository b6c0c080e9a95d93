"""What the tests of export share: the adapters, and an export beside stock PEFT's model with it."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

import xadapt
from tests.feature_models import load
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig

examples = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
quiet = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),  # PEFT's word on every Conv1D it adapts
    # PEFT says of a constant beside a layer without bias that it could not be merged there; it is not.
    pytest.mark.filterwarnings(r"ignore:`lora_bias=True` was passed but the targeted layer"),
]
ADAPTERS = {"lora": LoraConfig, "input": InputAdaConfig, "output": OutputAdaConfig, "hybrid": HybridAdaConfig}


def assert_close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    assert one.shape == other.shape
    assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


def exported(adapter: Any, base: Any, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any], PeftModel]:
    """Its tensors, its config, and stock PEFT's model with it."""
    with tempfile.TemporaryDirectory() as folder:
        report = xadapt.export_lora(adapter, base, Path(folder, "lora"), **options)
        assert report.exact
        config = json.loads((report.out / "adapter_config.json").read_text())
        precise = torch.promote_types(next(base.parameters()).dtype, torch.float32)
        stock = load(copy.deepcopy(base).to(precise), report.out)
        return load_file(report.out / "adapter_model.safetensors"), config, stock
