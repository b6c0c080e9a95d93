"""Quantised bases: trained through, saved, reloaded and merged by PEFT's own backend for them. Real kernels, on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import xadapt
from tests.conftest import make_llama
from tests.feature_models import adapted
from tests.language_models import CONFIGS, TARGETS, loss_and_gradients, losses_in_training, outputs
from xadapt import InputAdaConfig, OutputAdaConfig
from xadapt_feature import FeatureLayer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the backends, about torch and about themselves
    pytest.mark.filterwarnings("ignore:Merge lora module to .* rounding errors:UserWarning"),
]


def torchao_int8() -> Any:
    pytest.importorskip("torchao", reason="torchao is an extra: pip install xadapt[quant]")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bitsandbytes_int8() -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not among the extras: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


# Not bitsandbytes' 4 bits: on a CPU it repacks the weight at the first evaluation, after which neither a gradient nor
# PEFT's merge is right, with LoRA either.
ROUNDING = 0.1  # what 8 bits may do, as a share of what the adapter does
every_backend = pytest.mark.parametrize(
    "backend", [torchao_int8, bitsandbytes_int8], ids=lambda backend: backend.__name__
)
every_config = pytest.mark.parametrize("name", CONFIGS)

Quantise = Callable[[], nn.Module]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_llama(hidden_size=128).save_pretrained(folder)
    return folder


@pytest.fixture
def quantised(backend: Callable[[], Any], checkpoint: Path) -> Quantise:
    config = backend()

    def load() -> nn.Module:
        options = {"quantization_config": copy.deepcopy(config), "dtype": torch.float32, "device_map": "cpu"}
        model: nn.Module = AutoModelForCausalLM.from_pretrained(checkpoint, **options).eval()
        return model

    return load


@every_backend
@every_config
class TestQuantised:
    def test_trained_through(self, name: str, quantised: Quantise) -> None:
        base = quantised()
        bare = outputs(base)
        model = get_peft_model(base, CONFIGS[name]())
        assert all(layer.quantization_backend for layer in model.modules() if isinstance(layer, FeatureLayer))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        torch.testing.assert_close(outputs(model), bare)
        losses = losses_in_training(model)
        assert losses[-1] < losses[0] - 0.1
        with model.disable_adapter():
            torch.testing.assert_close(outputs(model), bare)

    def test_the_gradients_are_those_of_the_base_before_quantisation(
        self, name: str, quantised: Quantise, checkpoint: Path
    ) -> None:
        plain = adapted(AutoModelForCausalLM.from_pretrained(checkpoint), CONFIGS[name](), std=0.1)
        _, expected = loss_and_gradients(plain)
        _, gradients = loss_and_gradients(adapted(quantised(), CONFIGS[name](), std=0.1))
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            assert (gradients[key] - gradient).norm() < ROUNDING * gradient.norm(), key

    def test_saved_and_reloaded(self, name: str, quantised: Quantise, tmp_path: Path) -> None:
        model = adapted(quantised(), CONFIGS[name](), std=0.1)
        model.save_pretrained(tmp_path)
        assert torch.equal(outputs(PeftModel.from_pretrained(quantised(), tmp_path)), outputs(model))
        assert torch.equal(outputs(xadapt.load(quantised(), tmp_path)), outputs(model))

    def test_merged_and_unmerged(self, name: str, quantised: Quantise) -> None:
        base = quantised()
        bare = outputs(base)
        model = adapted(base, CONFIGS[name](), std=0.1)
        unmerged = outputs(model)
        effect = (unmerged - bare).norm()

        def near(expected: torch.Tensor) -> bool:
            return bool((outputs(model) - expected).norm() < ROUNDING * effect)

        layer = next(layer for layer in model.modules() if isinstance(layer, FeatureLayer))
        kind = type(layer.get_base_layer().weight)
        model.merge_adapter()
        assert type(layer.get_base_layer().weight) is kind
        assert near(unmerged)
        model.unmerge_adapter()
        assert near(unmerged)
        with model.disable_adapter():
            assert near(bare)
        model = model.merge_and_unload(safe_merge=True)
        assert near(unmerged)
        assert not any(isinstance(module, FeatureLayer) for module in model.modules())


def dynamically_quantised(checkpoint: Path, config: PeftConfig) -> PeftModel:
    """int8 activations too: on a CPU, torchao's kernel for them has no gradient."""
    pytest.importorskip("torchao", reason="torchao is an extra: pip install xadapt[quant]")
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    quantisation = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    return get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantisation), config)


def test_a_base_without_a_gradient_is_told_in_input_space(checkpoint: Path) -> None:
    model = dynamically_quantised(checkpoint, InputAdaConfig(r=4, target_modules=TARGETS))
    assert outputs(model).isfinite().all()
    with pytest.raises(ValueError, match=r"no gradient back to its input.*use OutputAdaConfig"):
        loss_and_gradients(model)


def test_a_base_without_a_gradient_is_enough_in_output_space(checkpoint: Path) -> None:
    model = dynamically_quantised(checkpoint, OutputAdaConfig(r=4, target_modules=TARGETS))
    losses = losses_in_training(model)
    assert losses[-1] < losses[0] - 0.1
