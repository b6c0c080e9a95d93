"""A live model wears a detached adapter, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from tests.conftest import make_gpt2, make_llama
from tests.feature_models import adapted
from tests.weight_models import lora_on
from xadapt import InputAdaConfig
from xadapt.contract import Adapter, Kind
from xadapt.reading import detach
from xadapt.wearing import wearing
from xadapt_distil.attaching import attached

Logits = Callable[[nn.Module], Tensor]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_are_off_where_the_adapter_is(bias: str, logits: Logits) -> None:
    """PEFT leaves them on the model, disabled or taken off."""
    config = LoraConfig(r=2, target_modules=["c_attn"], bias=bias, fan_in_fan_out=True)
    trained = adapted(make_gpt2(), config, std=0.2)
    wanted, adapter = logits(trained), detach(trained)
    model = make_gpt2()
    bare = logits(model)
    for put_on in (wearing(model, adapter), attached(model, config, adapter)):
        with put_on as worn:
            for _ in range(2):
                torch.testing.assert_close(logits(worn), wanted)
                with worn.disable_adapter():
                    torch.testing.assert_close(logits(worn), bare)
        torch.testing.assert_close(logits(model), bare)
    assert not torch.allclose(wanted, bare)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        InputAdaConfig(r=2, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["lora", "dora", "modules_to_save", "input"],
)
def test_it_does_what_it_did_and_leaves_no_trace(config: LoraConfig, logits: Logits) -> None:
    trained = adapted(make_llama(), config, std=0.2)
    wanted, adapter = logits(trained), detach(trained)
    model = make_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bare = logits(make_llama())
    with wearing(model, adapter) as worn:
        torch.testing.assert_close(logits(worn), wanted)
        assert not any(parameter.requires_grad for parameter in worn.parameters())
        with worn.disable_adapter():
            torch.testing.assert_close(logits(worn), bare)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(model.eval()), bare)


def test_after_an_error_too() -> None:
    model = make_llama()
    with pytest.raises(KeyError), wearing(model, lora_on(make_llama(), ["q_proj"])):
        raise KeyError
    assert not any("lora" in name for name, _ in model.named_modules())


def test_what_does_not_fit_is_refused() -> None:
    adapter = lora_on(make_llama(), ["q_proj"])
    model = make_llama(hidden_size=64)
    names = model.state_dict().keys()
    with pytest.raises(ValueError, match="does not fit this base"), wearing(model, adapter):
        pass
    assert model.state_dict().keys() == names
    strange = Adapter(kind=Kind(name="ip_adapter"), config=None, tensors={})
    with pytest.raises(ValueError, match="kind 'ip_adapter' is none that PEFT"), wearing(make_llama(), strange):
        pass
