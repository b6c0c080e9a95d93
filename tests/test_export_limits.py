"""Export where a plain LoRA is not the whole adapter: approximations that say so, reports, dtypes, and refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import xadapt
from tests.conftest import make_gpt2, make_llama, make_unet
from tests.feature_models import Mlp, OneLayer, adapted, load, mlp_batch
from xadapt import FullAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space
from xadapt.export import ExportReport
from xadapt.folding import Layer

pytestmark = [
    pytest.mark.usefixtures("two_threads"),
    # PEFT says of a constant beside a layer without bias that it could not be merged there; it is not.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    # PEFT 0.21.2 takes every lora_bias for a tensor that DeepSpeed has cut up.
    pytest.mark.filterwarnings(r"ignore:Adapter 'default'. \d LoRA tensor\(s\) have invalid shape"),
]

TARGETS = ["lin0", "lin1"]
OF_FULL_RANK: dict[str, Callable[[], PeftConfig]] = {
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
    "lokr": lambda: LoKrConfig(r=4, alpha=4, target_modules=TARGETS),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "full": lambda: FullAdaConfig(space="input", target_modules=TARGETS),
    "input dora": lambda: InputAdaConfig(r=4, use_dora=True, target_modules=TARGETS),
    "output loha": lambda: feature_space(LoHaConfig(r=4, alpha=4, target_modules=TARGETS), "output"),
}
every_full = pytest.mark.parametrize("name", OF_FULL_RANK)


def export(adapter: Any, base: nn.Module, out: Path, **options: Any) -> ExportReport:
    return xadapt.export_lora(adapter, base, out, **options)


def make_moved_unet() -> Any:
    unet = make_unet()
    for name, parameter in unet.named_parameters():
        if name.endswith("to_out.0.bias"):
            nn.init.normal_(parameter)
    return unet


def weight_updates(tuner: PeftModel) -> dict[str, Tensor]:
    bare, merged = Mlp(), copy.deepcopy(tuner).merge_and_unload()
    return {
        path: merged.get_submodule(path).weight.detach() - bare.get_submodule(path).weight.detach() for path in TARGETS
    }


@every_full
class TestOfFullRank:
    def test_without_a_rank_it_is_refused(self, name: str, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), OF_FULL_RANK[name]())
        with pytest.raises(ValueError, match=r"lin0: this adapter is no LoRA .* rank=… or energy=0.99 .*xadapt merge"):
            export(tuner, Mlp(), tmp_path / "lora")
        assert not list(tmp_path.iterdir())

    def test_at_full_rank_it_is_the_tuner(self, name: str, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), OF_FULL_RANK[name]())
        report = export(tuner, Mlp(), tmp_path / "lora", rank=64)
        assert all(layer.residual < 1e-5 for layer in report.layers)
        stock = load(Mlp(), report.out)
        torch.testing.assert_close(stock(mlp_batch()), tuner(mlp_batch()), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("options", [{"rank": 3}, {"energy": 0.9}])
    def test_the_residual_is_what_is_lost(self, name: str, options: dict[str, Any], tmp_path: Path) -> None:
        tuner = adapted(Mlp(), OF_FULL_RANK[name]())
        report = export(tuner, Mlp(), tmp_path / "lora", **options)
        tensors, updates = load_file(report.out / "adapter_model.safetensors"), weight_updates(tuner)
        assert not report.exact
        for layer in report.layers:
            b, a = (tensors[f"base_model.model.{layer.path}.lora_{side}.weight"] for side in "BA")
            update = updates[layer.path]
            values = torch.linalg.svdvals(update.double())
            lost = float((update - b @ a).double().norm() / update.double().norm())
            assert layer.rank == a.shape[0]
            assert layer.residual == pytest.approx(lost, rel=1e-3, abs=1e-5)
            best = float((values[layer.rank :].square().sum() / values.square().sum()).sqrt())
            assert lost <= 1.001 * best + 1e-5
            if "energy" in options:
                assert layer.residual**2 <= 0.1 + 1e-6


def test_a_lora_is_cut_only_where_it_is_longer(tmp_path: Path) -> None:
    config = LoraConfig(r=2, rank_pattern={"lin1": 6}, target_modules=TARGETS)
    report = export(adapted(Mlp(), config), Mlp(), tmp_path / "lora", rank=4)
    assert [(layer.path, layer.rank) for layer in report.layers] == [("lin0", 2), ("lin1", 4)]
    assert report.layers[0].residual == 0 < report.layers[1].residual


class TestBiases:
    def output_tuner(self) -> PeftModel:
        return adapted(Mlp(), OutputAdaConfig(r=2, target_modules=[*TARGETS, "head"]))

    def test_a_layer_without_bias_among_others(self, tmp_path: Path) -> None:
        tuner = self.output_tuner()
        report = export(tuner, Mlp(), tmp_path / "lora")
        assert report.exact
        assert torch.equal(
            load_file(report.out / "adapter_model.safetensors")["base_model.model.lin1.lora_B.bias"], torch.zeros(24)
        )
        torch.testing.assert_close(load(Mlp(), report.out)(mlp_batch()), tuner(mlp_batch()))

    def test_left_out_on_demand_and_reported(self, tmp_path: Path) -> None:
        tuner = self.output_tuner()
        report = export(tuner, Mlp(), tmp_path / "lora", drop_bias=True)
        bare, merged = Mlp(), copy.deepcopy(tuner).merge_and_unload()
        for layer in report.layers:
            bias = getattr(bare.get_submodule(layer.path), "bias", None)
            moved = 0.0 if bias is None else float((merged.get_submodule(layer.path).bias - bias).detach().norm())
            assert layer.dropped_bias == pytest.approx(moved, rel=1e-4, abs=1e-7)
        assert report.layers[1].dropped_bias == 0 < report.layers[0].dropped_bias
        assert not report.exact
        assert not any(name.endswith("bias") for name in load_file(report.out / "adapter_model.safetensors"))

    @pytest.mark.parametrize("config", [LoraConfig, OutputAdaConfig, InputAdaConfig])
    def test_the_adapter_s_own(self, config: Any, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), config(r=2, target_modules=["lin0", "head"], lora_bias=True))
        report = export(tuner, Mlp(), tmp_path / "lora")
        torch.testing.assert_close(load(Mlp(), report.out)(mlp_batch()), tuner(mlp_batch()))


class TestDtypes:
    def test_the_adapter_s_own_by_default(self, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        for dtype in (torch.bfloat16, torch.float32):
            adapter = xadapt.detach(tuner.to(dtype))
            report = export(adapter, Mlp().half(), tmp_path / str(dtype))
            assert report.dtype == str(dtype).removeprefix("torch.")
            assert {t.dtype for t in load_file(report.out / "adapter_model.safetensors").values()} == {dtype}

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_rounded_once(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """A half-precision base and a half-precision file, and the product between them in float32."""
        tuner = adapted(Mlp(), InputAdaConfig(r=2, target_modules=TARGETS))
        report = export(tuner, Mlp().to(dtype), tmp_path / "lora", dtype=dtype)
        tensors = load_file(report.out / "adapter_model.safetensors")
        adapter, weight = xadapt.detach(tuner).tensors, Mlp().to(dtype).lin1.weight.double()
        name = next(name for name in adapter if name.startswith("lin1.") and "lora_B" in name)
        exact = weight @ adapter[name].double() * (8 / 2)
        off = (tensors["base_model.model.lin1.lora_B.weight"].double() - exact).abs()
        assert bool((off <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.001 + 1e-6).all())

    def test_too_large_for_float16(self, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS), std=1e4)
        with pytest.raises(ValueError, match=r"lin0: .*above 65504.*bfloat16"):
            export(tuner, Mlp(), tmp_path / "lora", dtype=torch.float16)
        assert not list(tmp_path.iterdir())
        assert export(tuner, Mlp(), tmp_path / "lora", dtype=torch.bfloat16).exact

    def test_what_is_no_dtype_for_a_lora(self, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        with pytest.raises(ValueError, match=r"dtype=torch.int8: a LoRA is written in a floating-point dtype"):
            export(tuner, Mlp(), tmp_path / "lora", dtype=torch.int8)


class TestRefusals:
    """Each leaves nothing behind."""

    @pytest.fixture
    def refused(self, tmp_path: Path) -> Any:
        def check(adapter: Any, base: Any, match: str, out: str = "lora", **options: Any) -> None:
            with pytest.raises(ValueError, match=match):
                export(adapter, base, tmp_path / out, **options)
            assert not list(tmp_path.iterdir())

        return check

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("where", ["base", "adapter"])
    def test_numbers_that_are_none(self, bad: float, where: str, refused: Any) -> None:
        base, tuner = Mlp(), adapted(Mlp(), InputAdaConfig(r=2, target_modules=TARGETS))
        spoilt = base if where == "base" else tuner
        with torch.no_grad():
            name = next(n for n, _ in spoilt.named_parameters() if "lin1" in n and ("lora_B" in n or where == "base"))
            spoilt.get_parameter(name)[0, 0] = bad
        refused(tuner, base, r"lin1: the update of this layer holds NaN or infinity")

    def test_another_width(self, refused: Any) -> None:
        tuner = adapted(make_llama(), InputAdaConfig(r=2, target_modules=["q_proj"]))
        refused(tuner, make_llama(hidden_size=64), r"does not fit model.layers.0.self_attn.q_proj .*other widths")

    def test_a_lora_of_another_width(self, refused: Any) -> None:
        tuner = adapted(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        refused(tuner, make_llama(hidden_size=64), r"does not fit model.layers.0.self_attn.q_proj .*other widths")

    def test_another_depth(self, refused: Any) -> None:
        tuner = adapted(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        refused(tuner, make_llama(layers=1), r"tensors for layers that .* lacks: model.layers.1")
        refused(tuner, make_llama(layers=3), r"lacks tensors for layers .*: model.layers.2.self_attn.q_proj")

    def test_another_architecture(self, refused: Any) -> None:
        tuner = adapted(make_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
        refused(tuner, make_gpt2(), r"tensors for layers that .* lacks: model.layers.0.self_attn.q_proj")

    @pytest.mark.parametrize("config", [LoraConfig, InputAdaConfig])
    def test_dora_on_another_architecture(self, config: Any, refused: Any) -> None:
        tuner = adapted(make_llama(), config(r=2, use_dora=True, target_modules=["q_proj"]))
        refused(tuner, make_gpt2(), r"q_proj", rank=2)

    def test_whole_modules(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["head"]))
        refused(tuner, Mlp(), r"modules_to_save.*head.bias.*xadapt merge")

    def test_biases_of_the_base(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS, bias="all"))
        refused(tuner, Mlp(), r"bias='all'.*merge_and_unload")

    def test_layers_that_no_checkpoint_has(self, refused: Any) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
        refused(adapted(make_llama(), config), make_llama(), r"layers into the base .*layer_replication")

    def test_tokens_of_its_own(self, refused: Any) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2])
        refused(adapted(make_llama(), config), make_llama(), r"layers into the base .*embed_tokens", rank=2)

    def test_only_after_an_invocation(self, refused: Any) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[3], task_type="CAUSAL_LM")
        refused(adapted(make_llama(), config), make_llama(), r"PEFT cannot merge this kind of adapter", rank=2)

    def test_what_was_rescaled(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        tuner.base_model.model.lin0.scale_layer(0.5)
        refused(tuner, Mlp(), r"lin0 of adapter 'default' was rescaled")

    @pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
    def test_weights_of_another_number(self, weights: list[float], refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        refused(tuner, Mlp(), r"1 adapters and \d weights", weights=weights)

    @pytest.mark.parametrize("weights", [[float("nan")], [float("inf")], ["half"]])
    def test_weights_that_are_no_finite_numbers(self, weights: Any, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        refused(tuner, Mlp(), r"weights=\[.*\]: each is a finite number", weights=weights)

    @pytest.mark.parametrize("weights", [0.5, "0.5", [None]])
    def test_weights_that_are_no_list_of_numbers(self, weights: Any, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        match = r"each is a number" if isinstance(weights, list) else r"pass one weight for each adapter, weights=\["
        with pytest.raises(TypeError, match=match):
            export(tuner, Mlp(), tmp_path / "lora", weights=weights)
        assert not list(tmp_path.iterdir())

    def test_a_base_that_has_the_adapter_in_it(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        refused(tuner, tuner.get_base_model(), r"has adapters in it, at lin0, lin1: .*unload\(\) first")

    @pytest.mark.parametrize("options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}])
    def test_convolutions_that_a_stock_lora_does_not_follow(self, options: dict[str, Any], refused: Any) -> None:
        base = OneLayer(nn.Conv2d(6, 4, 3, **options))
        tuner = adapted(copy.deepcopy(base), OutputAdaConfig(r=2, target_modules=["layer"]))
        refused(tuner, base, rf"layer is a convolution with {list(options)[-1]}=.*xadapt merge")

    def test_a_convolution_with_groups(self, refused: Any) -> None:
        base = OneLayer(nn.Conv2d(6, 4, 3, groups=2))
        with pytest.warns(UserWarning, match="groups > 1"):
            tuner = adapted(copy.deepcopy(base), LoraConfig(r=2, target_modules=["layer"]))
        refused(tuner, base, r"layer: lora_A has rank 2 and lora_B has rank 1.*with groups")

    def test_a_bias_in_a_layout_that_has_none(self, refused: Any) -> None:
        tuner = adapted(make_moved_unet(), OutputAdaConfig(r=2, target_modules=["to_out.0"]))
        match = r"kohya layout cannot hold .*to_out.0 \(a bias\).*xadapt merge"
        refused(tuner, make_moved_unet(), match, out="lora.safetensors", layout="kohya")

    def test_what_is_no_layout(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        refused(tuner, Mlp(), r"layout='difusers' is no layout. Did you mean 'diffusers'", layout="difusers")

    def test_a_layout_for_pipelines(self, refused: Any) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        for layout in ("diffusers", "kohya"):
            refused(tuner, Mlp(), r"pass component=…, or write layout='peft'", layout=layout)

    def test_what_is_wrong_with_the_path_is_said_before_anything_is_calculated(
        self, refused: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Layer, "update", lambda *args: pytest.fail("calculated"))
        tuner = adapted(make_moved_unet(), LoraConfig(r=2, target_modules=["to_q"]))
        refused(tuner, make_moved_unet(), r"lora should end in .safetensors", layout="kohya")
        refused(tuner, make_moved_unet(), r" exists already", out="")

    def test_what_exists(self, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=TARGETS))
        export(tuner, Mlp(), tmp_path / "lora")
        with pytest.raises(ValueError, match=r"exists already; overwrite=True replaces"):
            export(tuner, Mlp(), tmp_path / "lora")
        export(tuner, Mlp(), tmp_path / "lora", overwrite=True)


def test_modules_that_are_saved_whole_do_not_hide_a_missing_layer(tmp_path: Path) -> None:
    """DoRA is attached to find out what it is; what it brings along whole is no part of that."""
    config = LoraConfig(r=2, use_dora=True, target_modules=TARGETS, modules_to_save=["head"])
    adapter = xadapt.detach(adapted(Mlp(), config))
    (first, second) = xadapt.folding.layers_of([adapter], xadapt.open_base(Mlp()))
    assert (first.path, second.path) == ("lin0", "lin1")
