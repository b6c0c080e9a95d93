"""The methods that carry an adapter by weights alone: what every method must do, then what each of them says it does."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from tests.conftest import make_gpt2, make_llama, make_unet
from tests.language_models import adapted_llama
from tests.test_every_method import assert_same, trained_adapter
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.contract import Adapter, Kind, Method, Transfer
from xadapt.folding import layers_of
from xadapt.reading import detach
from xadapt_feature import INPUT_ADA, OUTPUT_ADA
from xadapt_weight import COPY, LORA_X, PINV_INPUT, PINV_OUTPUT, PROLORA

METHODS = (PINV_INPUT, PINV_OUTPUT, LORA_X, PROLORA)
LORA = COPY.writes
Logits = Callable[[nn.Module], Tensor]

# PEFT says so of every LoRA on embeddings.
embeddings = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
every_pair = pytest.mark.parametrize(
    ("method", "kind"),
    [(method, kind) for method in METHODS for kind in method.reads],
    ids=lambda value: value.name,
)


def lora_on(model: nn.Module, targets: list[str], rank: int = 2, **options: Any) -> Adapter:
    """A LoRA with random tensors; `model` is used up."""
    config = LoraConfig(r=rank, lora_alpha=3, target_modules=targets, **options)
    LORA.attach(model, config)
    generator = torch.Generator().manual_seed(5)
    names = {
        n: t.shape for n, t in LORA.tensors(model).items() if ".lora_" in n
    }  # with embeddings, PEFT adds their weight
    tensors = {n: torch.randn(shape, generator=generator) * 0.2 for n, shape in names.items()}
    return Adapter(kind=LORA, config=config, tensors=tensors)


def updates_on(adapter: Adapter, model: nn.Module) -> dict[str, Tensor]:
    """What an adapter adds to each weight of a model, by path."""
    base = open_base(model)
    weights = base.weights()
    return {layer.path: layer.update(weights).matrix.tensor() for layer in layers_of([adapter], base)}


def biases_on(adapter: Adapter, model: nn.Module) -> dict[str, Tensor | None]:
    base = open_base(model)
    weights = base.weights()
    return {layer.path: layer.update(weights).bias for layer in layers_of([adapter], base)}


def errors_of(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    assert found.keys() == wanted.keys()
    return {path: float((found[path] - wanted[path]).norm() / wanted[path].norm()) for path in wanted}


def attach(model: nn.Module, adapter: Adapter) -> PeftModel:
    peft = get_peft_model(model, adapter.config).eval()
    named = {f"base_model.model.{name}": tensor for name, tensor in adapter.tensors.items()}
    assert not set_peft_model_state_dict(peft, named).unexpected_keys
    return peft


class Watched:
    """A base whose network must not be loaded, and that remembers what was read."""

    def __init__(self, base: CheckpointBase | LiveBase) -> None:
        self._base, self.name = base, base.name
        self.read: list[str] = []

    def weights(self) -> Mapping[str, Tensor]:
        return _WatchedWeights(self._base.weights(), self.read)

    def modules(self) -> Mapping[str, nn.Module]:
        return self._base.modules()

    def skeleton(self) -> nn.Module:
        return self._base.skeleton()

    def module(self) -> nn.Module:
        raise AssertionError("the network was loaded")


class _WatchedWeights(Mapping[str, Tensor]):
    def __init__(self, weights: Mapping[str, Tensor], read: list[str]) -> None:
        self._weights, self._read = weights, read

    def __getitem__(self, name: str) -> Tensor:
        self._read.append(name)
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


class TestEveryMethod:
    @every_method
    def test_it_can_be_listed_and_its_options_are_fields(self, method: Method) -> None:
        assert method.name.isidentifier()
        assert "\n" not in method.summary
        for option in dataclasses.fields(method.build):
            assert option.kw_only
            assert option.default is not dataclasses.MISSING
        with pytest.raises(TypeError, match="no_such_option"):
            method.build(**{"no_such_option": 1})

    @every_pair
    def test_it_carries_an_adapter_and_changes_neither_base(self, method: Method, kind: Kind) -> None:
        adapter = trained_adapter(kind, make_llama())
        before = copy.deepcopy(dict(adapter.tensors))
        source, target = open_base(make_llama()), open_base(make_llama(seed=1))
        weights = [{name: base.weights()[name].clone() for name in base.weights()} for base in (source, target)]

        step = method.build()
        assert isinstance(step, Transfer)
        moved = step.transfer(adapter, source, target)

        assert moved.kind == method.writes
        assert all(torch.isfinite(tensor).all() for tensor in moved.tensors.values())
        assert_same(adapter.tensors, before)
        for base, was in zip((source, target), weights, strict=True):
            assert_same({name: base.weights()[name] for name in base.weights()}, was)
        fresh = make_llama(seed=1)
        method.writes.attach(fresh, moved.config)
        assert {n: t.shape for n, t in method.writes.tensors(fresh).items()} == {
            n: t.shape for n, t in moved.tensors.items()
        }

    @every_method
    def test_its_evidence_names_each_layer(self, method: Method) -> None:
        step = method.build()
        assert step.evidence == {}
        adapter = lora_on(make_llama(), ["q_proj", "down_proj"])
        step.transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1)))
        assert len(step.evidence) == 4
        assert "model.layers.0.mlp.down_proj" in step.evidence
        assert all(0 <= error < 2 for error in step.evidence.values())
        assert step == method.build(), "the evidence is no option"

    @every_method
    def test_tensors_keep_the_adapter_s_dtype(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        half = {name: tensor.bfloat16() for name, tensor in adapter.tensors.items()}
        bases = [open_base(make_llama(seed).bfloat16()) for seed in (0, 1)]
        moved = method.build().transfer(dataclasses.replace(adapter, tensors=half), *bases)
        assert {tensor.dtype for tensor in moved.tensors.values()} == {torch.bfloat16}

    @every_method
    def test_of_two_ranks_each_layer_keeps_its_own(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 5})
        target = make_llama(seed=1)
        moved = method.build().transfer(adapter, open_base(make_llama()), open_base(target))
        fresh = make_llama(seed=1)
        moved.kind.attach(fresh, moved.config)
        assert {n: t.shape for n, t in moved.kind.tensors(fresh).items()} == {
            n: t.shape for n, t in moved.tensors.items()
        }

    @every_method
    def test_it_streams_the_adapted_layers_from_disk(self, method: Method, tmp_path: Path) -> None:
        """Each tensor once, and no network is loaded."""
        bases = []
        for seed in (0, 1):
            make_llama(seed).save_pretrained(tmp_path / str(seed))
            bases.append(Watched(open_base(tmp_path / str(seed))))
        adapter = lora_on(make_llama(), ["q_proj", "up_proj"])
        moved = method.build().transfer(adapter, *bases)
        live = method.build().transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1)))
        assert_same(moved.tensors, live.tensors)
        adapted = [f"model.layers.{i}.{name}.weight" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")]
        assert bases[0].read == adapted
        assert bases[1].read == (adapted if method in (LORA_X, PROLORA) else [])

    @every_method
    def test_what_it_writes_runs_in_peft_saved_and_loaded(self, method: Method, logits: Logits, tmp_path: Path) -> None:
        """With options under which nothing is lost, on the source itself: the logits are the LoRA's."""
        adapter = lora_on(make_llama(), ["q_proj"])
        exact = {PINV_INPUT.name: {"ridge": 0}, PINV_OUTPUT.name: {"ridge": 0}}.get(method.name, {"energy": 1.0})
        moved = method.build(**exact).transfer(adapter, open_base(make_llama()), open_base(make_llama()))
        attach(make_llama(), moved).save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
        wanted = logits(attach(make_llama(), adapter))
        assert not torch.allclose(wanted, logits(make_llama()), atol=1e-3)
        torch.testing.assert_close(logits(loaded), wanted, rtol=1e-3, atol=1e-4)


class TestPseudoInverse:
    def test_on_the_source_it_does_what_the_lora_does_where_the_weight_allows_it(self) -> None:
        """The evidence is the error that one measures. W (out, in) of full rank: exact inside if out ≤ in."""
        adapter = lora_on(make_llama(), ["q_proj", "k_proj", "down_proj", "up_proj"])
        wanted = updates_on(adapter, make_llama())
        for method, exact in ((PINV_INPUT, ("q", "k", "down")), (PINV_OUTPUT, ("q", "up"))):
            step = method.build(ridge=0)
            moved = step.transfer(adapter, open_base(make_llama()), open_base(make_llama()))
            errors = errors_of(updates_on(moved, make_llama()), wanted)
            for path, error in errors.items():
                assert step.evidence[path] == pytest.approx(error, abs=1e-3), path
                assert (error < 1e-3) == path.endswith(tuple(f".{name}_proj" for name in exact)), path

    def test_it_modulates_the_target_s_weight(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        source, target = make_llama(), make_llama(seed=1)
        moved = PINV_INPUT.build(ridge=0).transfer(adapter, open_base(source), open_base(target))
        path = "model.layers.1.self_attn.q_proj"
        delta = updates_on(adapter, source)[path]
        weight, other = (model.get_submodule(path).weight.detach() for model in (source, target))
        found = updates_on(moved, target)[path]
        torch.testing.assert_close(found, other @ torch.linalg.pinv(weight) @ delta, rtol=1e-3, atol=1e-3)

    def test_of_an_input_adapter_read_as_output_and_back_little_is_lost(self) -> None:
        adapter = trained_adapter(INPUT_ADA.writes, make_llama())
        bases = open_base(make_llama()), open_base(make_llama())
        there = PINV_OUTPUT.build(ridge=0).transfer(adapter, *bases)
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
        held = PINV_OUTPUT.build(ridge=0.01).transfer(adapter, *bases)
        for bias in biases_on(held, model).values():
            assert bias is None or bias.abs().max() < 1e-4
        loose = PINV_OUTPUT.build(ridge=0.01, hold_bias=False).transfer(adapter, *bases)
        assert any(bias is not None and bias.abs().max() > 1e-2 for bias in biases_on(loose, model).values())
        assert not loose.config.lora_bias

    @pytest.mark.filterwarnings("ignore:.*lora_B.bias:UserWarning")  # PEFT takes it for a sharded matrix
    def test_a_bias_that_the_lora_moves_is_moved(self) -> None:
        model = make_gpt2()
        adapter = lora_on(copy.deepcopy(model), ["mlp.c_proj"], fan_in_fan_out=True, lora_bias=True)
        wanted = biases_on(adapter, model)
        for method in (PINV_INPUT, PINV_OUTPUT):
            moved = method.build(ridge=0).transfer(adapter, open_base(model), open_base(model))
            for path, bias in biases_on(moved, model).items():
                torch.testing.assert_close(bias, wanted[path], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("method", [PINV_INPUT, PINV_OUTPUT], ids=lambda method: method.name)
    def test_convolutions(self, method: Method) -> None:
        adapter = lora_on(make_unet(), ["conv1", "to_k", "proj_in"])
        step = method.build()
        moved = step.transfer(adapter, open_base(make_unet()), open_base(make_unet(seed=1)))
        fresh = make_unet(seed=1)
        moved.kind.attach(fresh, dataclasses.replace(moved.config, lora_bias=False))
        expected = {n: t.shape for n, t in moved.kind.tensors(fresh).items()}
        assert expected == {n: t.shape for n, t in moved.tensors.items() if not n.endswith("lora_B.bias")}
        assert step.evidence["mid_block.resnets.0.conv1"] < 1

    def test_the_target_s_other_side_may_have_another_width(self) -> None:
        """Input features of one width are enough for an input adapter."""
        target = make_llama(seed=1)
        for layer in target.model.layers:
            layer.self_attn.k_proj = nn.Linear(32, 8, bias=False)
        adapter = lora_on(make_llama(), ["k_proj"])
        moved = PINV_INPUT.build().transfer(adapter, open_base(make_llama()), open_base(target))
        assert updates_on(moved, target)["model.layers.0.self_attn.k_proj"].shape == (8, 32)
        with pytest.raises(ValueError, match=r"k_proj → .*another number of key-value heads \(16 × 32 .*8 × 32"):
            PINV_OUTPUT.build().transfer(adapter, open_base(make_llama()), open_base(target))


class TestSubspaces:
    def test_lora_x_on_the_whole_space_is_the_copy(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "down_proj"])
        step = LORA_X.build(energy=1.0)
        target = make_llama(seed=1)
        moved = step.transfer(adapter, open_base(make_llama()), open_base(target))
        errors = errors_of(updates_on(moved, target), updates_on(adapter, target))
        for path, error in errors.items():
            lost = 0 if path.endswith("q_proj") else 1  # down_proj is (32, 48): not all of its inputs
            assert (error > 1e-4) == bool(lost), path
            assert step.evidence[path] == pytest.approx(error, abs=1e-4)

    def test_lora_x_s_update_lies_in_the_target_s_subspaces(self) -> None:
        target = make_llama(seed=1)
        adapter = lora_on(make_llama(), ["q_proj"], rank=4)
        moved = LORA_X.build(rank=8).transfer(adapter, open_base(make_llama()), open_base(target))
        path = "model.layers.0.self_attn.q_proj"
        u, _, vh = torch.linalg.svd(target.get_submodule(path).weight.detach())
        u, v = u[:, :8], vh[:8].T
        wanted = u @ u.T @ updates_on(adapter, target)[path] @ v @ v.T
        torch.testing.assert_close(updates_on(moved, target)[path], wanted, rtol=1e-3, atol=1e-4)

    def test_prolora_with_cross_terms_is_the_copy_between_equal_bases(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj", "v_proj"])
        step = PROLORA.build(rank=5, cross_terms=True)
        moved = step.transfer(adapter, open_base(make_llama()), open_base(make_llama()))
        wanted = updates_on(adapter, make_llama())
        assert max(errors_of(updates_on(moved, make_llama()), wanted).values()) < 1e-4
        assert max(step.evidence.values()) < 1e-4

    @embeddings
    @pytest.mark.parametrize("method", [LORA_X, PROLORA], ids=lambda method: method.name)
    def test_convolutions_and_embeddings(self, method: Method) -> None:
        unet, llama = lora_on(make_unet(), ["conv1", "to_k"]), lora_on(make_llama(), ["embed_tokens", "q_proj"])
        for adapter, make in ((unet, make_unet), (llama, make_llama)):
            moved = method.build().transfer(adapter, open_base(make()), open_base(make(seed=1)))
            fresh = make(seed=1)
            moved.kind.attach(fresh, moved.config)
            assert {n: t.shape for n, t in moved.kind.tensors(fresh).items() if ".lora_" in n} == {
                n: t.shape for n, t in moved.tensors.items()
            }


class TestOtherBases:
    @every_method
    def test_pruned_depth_is_aligned(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        target = make_llama(seed=1, layers=3)
        moved = method.build().transfer(adapter, open_base(make_llama()), open_base(target))
        assert {name.split(".")[2] for name in moved.tensors} == {"0", "2"}
        assert updates_on(moved, target).keys() == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)}

    @every_method
    def test_layers_without_a_counterpart_are_named(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        with pytest.raises(
            ValueError, match=r"1 of the adapter's 2 layers .*\n.*layers\.1\.self_attn\.q_proj: .*blocks"
        ):
            method.build().transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1, layers=1)))

    @every_method
    def test_other_widths_are_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        with pytest.raises(ValueError, match=r"q_proj.*32 × 32 in the source, 64 × 64 in the target"):
            method.build().transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1, hidden_size=64)))

    @every_method
    def test_modules_to_save_are_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        adapter.config.modules_to_save = ["lm_head"]
        full = dataclasses.replace(adapter, tensors={**adapter.tensors, "lm_head.weight": torch.zeros(64, 32)})
        with pytest.raises(ValueError, match=r"modules_to_save.*lm_head\.weight"):
            method.build().transfer(full, open_base(make_llama()), open_base(make_llama(seed=1)))

    @every_method
    def test_an_update_of_full_rank_is_refused(self, method: Method) -> None:
        adapter = lora_on(make_llama(), ["q_proj"], use_dora=True)
        tensors = {n: t.abs() + 1 if "magnitude" in n else t for n, t in adapter.tensors.items()}
        with pytest.raises(ValueError, match="xadapt export --rank"):
            method.build().transfer(
                dataclasses.replace(adapter, tensors=tensors), open_base(make_llama()), open_base(make_llama(seed=1))
            )

    @embeddings
    def test_an_embedding_has_no_form_in_feature_space(self) -> None:
        adapter = lora_on(make_llama(), ["embed_tokens"])
        with pytest.raises(ValueError, match="embed_tokens is an embedding"):
            PINV_INPUT.build().transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1)))

    @every_method
    def test_a_base_with_nan_is_refused(self, method: Method) -> None:
        broken = make_llama()
        with torch.no_grad():
            broken.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
        adapter = lora_on(make_llama(), ["q_proj"])
        with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.weight of the base holds NaN"):
            method.build().transfer(adapter, open_base(broken), open_base(broken))

    @pytest.mark.parametrize("method", [PINV_OUTPUT, LORA_X, PROLORA], ids=lambda method: method.name)
    def test_an_input_adapter_tied_over_layers_is_read(self, method: Method) -> None:
        model = adapted_llama("tied")
        adapter = detach(model)
        bases = open_base(make_llama()), open_base(make_llama())
        step = method.build(**({"ridge": 0} if method is PINV_OUTPUT else {"energy": 1.0}))
        moved = step.transfer(adapter, *bases)
        errors = errors_of(updates_on(moved, make_llama()), updates_on(adapter, make_llama()))
        assert all(error < 1e-3 for path, error in errors.items() if path.endswith("q_proj"))

    def test_evidence_of_a_transfer_that_failed_is_gone(self) -> None:
        step = LORA_X.build()
        adapter = lora_on(make_llama(), ["q_proj"])
        step.transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1)))
        with pytest.raises(ValueError, match="cannot be carried"):
            step.transfer(adapter, open_base(make_llama()), open_base(make_llama(seed=1, hidden_size=64)))
        assert step.evidence == {}


class TestOptions:
    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            (PINV_INPUT, {"ridge": -1}, "ridge=-1: a number from 0 on"),
            (PINV_INPUT, {"ridge": float("nan")}, "ridge=nan"),
            (PINV_OUTPUT, {"precision": "half"}, "precision='float32' or precision='float64'"),
            (PINV_OUTPUT, {"precision": "float32", "ridge": 0}, "ridge=0 in float32"),
            (LORA_X, {"rank": 0}, "rank=0: a rank is a positive integer"),
            (PROLORA, {"rank": 3, "energy": 0.9}, "pass one of them"),
        ],
    )
    def test_wrong_ones_are_refused(self, method: Method, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            method.build(**options)

    def test_single_precision_is_enough_with_a_ridge(self) -> None:
        adapter = lora_on(make_llama(), ["q_proj"])
        found = [
            PINV_OUTPUT.build(precision=precision).transfer(adapter, open_base(make_llama()), open_base(make_llama()))
            for precision in ("float32", "float64")
        ]
        for name, tensor in found[0].tensors.items():
            torch.testing.assert_close(tensor, found[1].tensors[name], rtol=1e-3, atol=1e-4)

    def test_importing_the_methods_imports_no_torch(self, run_python: Callable[..., str]) -> None:
        assert run_python("import sys, xadapt_weight; print('torch' in sys.modules)").strip() == "False"


def test_output_ada_is_what_pinv_output_writes() -> None:
    assert PINV_OUTPUT.writes is OUTPUT_ADA.writes
    assert PINV_INPUT.writes is INPUT_ADA.writes
