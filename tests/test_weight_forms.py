"""What each of the methods that carry an adapter by weights alone says it does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import make_gpt2, make_llama, make_unet
from tests.test_every_method import trained_adapter
from tests.weight_models import biases_on, errors_in, errors_of, lora_on, updates_on
from xadapt.base import open_base
from xadapt.contract import Method
from xadapt.siblings import Pair
from xadapt_feature import INPUT_ADA
from xadapt_weight import LORA_X, PINV_INPUT, PINV_OUTPUT, PROLORA

METHODS = (PINV_INPUT, PINV_OUTPUT, LORA_X, PROLORA)
Logits = Callable[[nn.Module], Tensor]

# PEFT says so of every LoRA on embeddings.
embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_pair = pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in METHODS for kind in method.reads],
    ids=lambda value: value.name,
)


class TestPseudoInverse:
    def test_on_the_source_it_does_what_the_lora_does_where_the_weight_allows_it(self) -> None:
        """The evidence is the error that one measures. W (out, in) of full rank: exact inside if out ≤ in."""
        adapter = lora_on(make_llama(), ["q_proj", "k_proj", "down_proj", "up_proj"])
        wanted = updates_on(adapter, make_llama())
        for method, exact in ((PINV_INPUT, ("q", "k", "down")), (PINV_OUTPUT, ("q", "up"))):
            carried = method.build(ridge=0).transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama())))
            errors = errors_of(updates_on(carried.adapter, make_llama()), wanted)
            for path, error in errors.items():
                assert errors_in(carried)[path] == pytest.approx(error, abs=1e-3), path
                assert (error < 1e-3) == path.endswith(tuple(f".{name}_proj" for name in exact)), path

    def test_it_modulates_the_target_s_weight(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        source, target = make_llama(), make_llama(seed=1)
        moved = PINV_INPUT.build(ridge=0).transfer(adapter, Pair(open_base(source), open_base(target))).adapter
        path = "model.layers.1.self_attn.q_proj"
        delta = updates_on(adapter, source)[path]
        weight, other = (model.get_submodule(path).weight.detach() for model in (source, target))
        found = updates_on(moved, target)[path]
        torch.testing.assert_close(found, other @ torch.linalg.pinv(weight) @ delta, rtol=1e-3, atol=1e-3)

    def test_of_an_input_adapter_read_as_output_and_back_little_is_lost(self) -> None:
        adapter = trained_adapter(INPUT_ADA.writes, make_llama())
        bases = open_base(make_llama()), open_base(make_llama())
        there = PINV_OUTPUT.build(ridge=0).transfer(adapter, Pair(*bases)).adapter
        errors = errors_of(updates_on(there, make_llama()), updates_on(adapter, make_llama()))
        assert all(error < 1e-3 for path, error in errors.items() if "q_proj" in path)

    def test_a_bias_that_the_lora_left_alone_stays(self) -> None:
        """GPT-2's layers have biases, and store W transposed."""
        model = make_gpt2()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_()
        adapter = lora_on(copy.deepcopy(model), ["attn.c_attn"], fan_in_fan_out=True)
        bases = open_base(model), open_base(model)
        held = PINV_OUTPUT.build(ridge=0.01).transfer(adapter, Pair(*bases)).adapter
        for bias in biases_on(held, model).values():
            assert bias is None or bias.abs().max() < 1e-4
        loose = PINV_OUTPUT.build(ridge=0.01, hold_bias=False).transfer(adapter, Pair(*bases)).adapter
        assert any(bias is not None and bias.abs().max() > 1e-2 for bias in biases_on(loose, model).values())
        assert not loose.config.lora_bias

    @pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning")  # PEFT takes it for a sharded matrix
    def test_a_bias_that_the_lora_moves_is_moved(self) -> None:
        model = make_gpt2()
        adapter = lora_on(copy.deepcopy(model), ["mlp.c_proj"], fan_in_fan_out=True, lora_bias=True)
        wanted = biases_on(adapter, model)
        for method in (PINV_INPUT, PINV_OUTPUT):
            moved = method.build(ridge=0).transfer(adapter, Pair(open_base(model), open_base(model))).adapter
            for path, bias in biases_on(moved, model).items():
                torch.testing.assert_close(bias, wanted[path], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("method", [PINV_INPUT, PINV_OUTPUT], ids=lambda method: method.name)
    def test_convolutions(self, method: Method) -> None:
        adapter = lora_on(make_unet(), ["conv1", "to_k", "proj_in"])
        carried = method.build().transfer(adapter, Pair(open_base(make_unet()), open_base(make_unet(seed=1))))
        moved = carried.adapter
        fresh = make_unet(seed=1)
        moved.kind.attach(fresh, dataclasses.replace(moved.config, lora_bias=False))
        expected = {n: t.shape for n, t in moved.kind.tensors(fresh).items()}
        assert expected == {n: t.shape for n, t in moved.tensors.items() if not n.endswith("lora_B.bias")}
        assert errors_in(carried)["mid_block.resnets.0.conv1"] < 1

    def test_the_target_s_other_side_may_have_another_width(self) -> None:
        """Input features of one width are enough for an input adapter."""
        target = make_llama(seed=1)
        for layer in target.model.layers:
            layer.self_attn.k_proj = nn.Linear(32, 8, bias=False)
        adapter = lora_on(make_llama(), ["k_proj"])
        moved = PINV_INPUT.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target))).adapter
        assert updates_on(moved, target)["model.layers.0.self_attn.k_proj"].shape == (8, 32)
        with pytest.raises(ValueError, match=r"k_proj: → .*another number of key-value heads \(16 × 32 .*8 × 32"):
            PINV_OUTPUT.build().transfer(adapter, Pair(open_base(make_llama()), open_base(target)))


class TestSubspaces:
    def test_lora_x_on_the_whole_space_is_the_copy(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "down_proj"])
        target = make_llama(seed=1)
        carried = LORA_X.build(energy=1.0).transfer(adapter, Pair(open_base(make_llama()), open_base(target)))
        errors = errors_of(updates_on(carried.adapter, target), updates_on(adapter, target))
        for path, error in errors.items():
            lost = 0 if path.endswith("q_proj") else 1  # down_proj is (32, 48): not all of its inputs
            assert (error > 1e-4) == bool(lost), path
            assert errors_in(carried)[path] == pytest.approx(error, abs=1e-4)

    def test_lora_x_s_update_lies_in_the_target_s_subspaces(self) -> None:
        target = make_llama(seed=1)
        adapter = lora_on(make_llama(), ["q_proj"], rank=4)
        moved = LORA_X.build(rank=8).transfer(adapter, Pair(open_base(make_llama()), open_base(target))).adapter
        path = "model.layers.0.self_attn.q_proj"
        u, _, vh = torch.linalg.svd(target.get_submodule(path).weight.detach())
        u, v = u[:, :8], vh[:8].T
        wanted = u @ u.T @ updates_on(adapter, target)[path] @ v @ v.T
        torch.testing.assert_close(updates_on(moved, target)[path], wanted, rtol=1e-3, atol=1e-4)

    def test_prolora_with_cross_terms_is_the_copy_between_equal_bases(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        step = PROLORA.build(rank=5, cross_terms=True)
        carried = step.transfer(adapter, Pair(open_base(make_llama()), open_base(make_llama())))
        wanted = updates_on(adapter, make_llama())
        assert max(errors_of(updates_on(carried.adapter, make_llama()), wanted).values()) < 1e-4
        assert max(errors_in(carried).values()) < 1e-4

    @embeddings
    @pytest.mark.parametrize("method", [LORA_X, PROLORA], ids=lambda method: method.name)
    def test_convolutions_and_embeddings(self, method: Method) -> None:
        unet, llama = lora_on(make_unet(), ["conv1", "to_k"]), lora_on(make_llama(), ["embed_tokens", "q_proj"])
        for adapter, make in ((unet, make_unet), (llama, make_llama)):
            moved = method.build().transfer(adapter, Pair(open_base(make()), open_base(make(seed=1)))).adapter
            fresh = make(seed=1)
            moved.kind.attach(fresh, moved.config)
            assert {n: t.shape for n, t in moved.kind.tensors(fresh).items() if ".lora_" in n} == {
                n: t.shape for n, t in moved.tensors.items()
            }
