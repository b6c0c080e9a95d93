"""Export of whole models: stock PEFT with the exported LoRA says what the tuner says there."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, DeloraConfig, HRAConfig, LoraConfig, MissConfig, PeftConfig
from torch import Tensor, nn

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.exporting import ADAPTERS, assert_close, examples, exported, quiet
from tests.feature_models import Mlp, adapted, load, mlp_batch, randomise, with_second
from xadapt import InputAdaConfig, OutputAdaConfig

pytestmark = quiet


LANGUAGE_MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (make_llama, ["q_proj", "k_proj", "v_proj", "down_proj"]),
    "gpt2": (make_gpt2, ["c_attn", "c_fc"]),
}


PATTERNS: dict[str, dict[str, Any]] = {  # of the first and the last of those
    "plain": {},
    "patterns": {"rank_pattern": {"{first}": 2, r"1\.\w+\.{last}": 3}, "alpha_pattern": {"{last}": 5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"{last}": 1}},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model", LANGUAGE_MODELS)
@pytest.mark.parametrize("patterns", PATTERNS)
def test_language_models(adapter: str, model: str, patterns: str, logits: Callable[[nn.Module], Tensor]) -> None:
    make, targets = LANGUAGE_MODELS[model]
    text = json.dumps(PATTERNS[patterns]).replace("{first}", targets[0]).replace("{last}", targets[-1])
    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": targets, **json.loads(text)}
    if adapter == "hybrid":  # takes no patterns
        options = {"feature_r": 1} | {name: value for name, value in options.items() if not name.endswith("_pattern")}
    tuner = adapted(make(), ADAPTERS[adapter](**options), std=0.1)
    tensors, config, stock = exported(tuner, make())
    assert_close(logits(stock), logits(tuner))
    assert config["target_modules"] == sorted(targets)
    assert not config["use_rslora"]
    assert not any(name.endswith("lora_B.bias") for name in tensors)  # a fresh base's biases are zero
    assert not config["lora_bias"]


@given(
    model=st.sampled_from(sorted(LANGUAGE_MODELS)),
    adapter=st.sampled_from(sorted(ADAPTERS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    options=st.fixed_dictionaries(
        {"r": st.integers(2, 5), "lora_alpha": st.integers(1, 9), "use_rslora": st.booleans()},
    ),
)
@settings(examples, max_examples=15)
def test_the_merged_checkpoint_is_the_exported_lora(
    model: str, adapter: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    make, targets = LANGUAGE_MODELS[model]
    options = options | ({"feature_r": 1} if adapter == "hybrid" else {})
    detached = xadapt.detach(adapted(make(), ADAPTERS[adapter](target_modules=targets, **options), std=0.1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cast(Any, make().to(dtype)).save_pretrained(folder / "base")
        xadapt.merge(detached, folder / "base", folder / "merged")
        report = xadapt.export_lora(detached, folder / "base", folder / "lora")
        stock = cast(Any, load(make().to(dtype).float(), report.out)).merge_and_unload()
        merged = xadapt.open_base(folder / "merged").weights()
        assert len(report.layers) > 0
        for path, tensor in stock.state_dict().items():
            assert merged[path].dtype == dtype
            eps = max(0.502 * torch.finfo(dtype).eps, 1e-6)
            torch.testing.assert_close(merged[path].float(), tensor, rtol=eps, atol=1e-6)


@pytest.mark.parametrize("adapter", ["lora", "input", "output", "hybrid"])
def test_biases_of_a_language_model(adapter: str, logits: Callable[[nn.Module], Tensor]) -> None:
    """GPT-2's, which training has moved; h.1's is made zero again, and `lora_bias` is for all layers or none."""
    base = make_gpt2()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias"):
                parameter.normal_() if ".0." in name else parameter.zero_()
    options: dict[str, Any] = {"feature_r": 2, "space": "output"} if adapter == "hybrid" else {}
    config = ADAPTERS[adapter](r=4, target_modules=["c_attn", "mlp.c_proj"], **options)
    tuner = adapted(copy.deepcopy(base), config, std=0.1)
    tensors, written, stock = exported(tuner, base)
    assert_close(logits(stock), logits(tuner))
    moved = adapter in ("output", "hybrid")
    assert written["lora_bias"] == moved
    biases = {name: bool(tensor.any()) for name, tensor in tensors.items() if name.endswith("lora_B.bias")}
    assert set(biases.values()) == ({True, False} if moved else set())


def test_embeddings(logits: Callable[[nn.Module], Tensor]) -> None:
    """Untied, in the output space."""
    base = make_gpt2()
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.clone())
    base.config.tie_word_embeddings = False
    tuner = adapted(copy.deepcopy(base), OutputAdaConfig(r=2, target_modules=["wte", "wpe", "c_attn"]), std=0.1)
    tensors, _, stock = exported(tuner, base)
    assert "base_model.model.transformer.wte.lora_embedding_A" in tensors
    assert_close(logits(stock), logits(tuner))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_several_with_weights(adapter: str) -> None:
    options: dict[str, Any] = {"feature_r": 1} if adapter == "hybrid" else {}
    one = adapted(Mlp(), ADAPTERS[adapter](r=2, lora_alpha=3, target_modules=["lin0", "lin1"], **options))
    other = adapted(Mlp(), LoraConfig(r=3, target_modules=["lin1", "head"]), seed=5)
    tensors, config, stock = exported([one, other], Mlp(), weights=[0.5, -2])
    assert config["r"] + len(config["rank_pattern"]) > 0
    assert tensors["base_model.model.lin1.lora_A.weight"].shape[0] == 2 + 3
    merged = Mlp()
    for model, weight in ((one, 0.5), (other, -2)):
        bare, plain = Mlp(), copy.deepcopy(model).merge_and_unload()
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                parameter.add_(weight * (plain.get_parameter(name) - bare.get_parameter(name)))
    assert_close(stock(mlp_batch()), merged(mlp_batch()))


def test_two_active_adapters_are_passed_one_by_one(tmp_path: Path) -> None:
    first = OutputAdaConfig(r=2, target_modules=["lin0", "lin1"])
    model = with_second(adapted(Mlp(), first), OutputAdaConfig(r=3, target_modules=["lin0", "lin1"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Choose one adapter"):
        xadapt.export_lora(model, Mlp(), tmp_path / "lora")
    both = [xadapt.detach(model, name) for name in ("default", "second")]
    _, _, stock = exported(both, Mlp())
    assert_close(stock(mlp_batch()), model(mlp_batch()))


def test_tied(logits: Callable[[nn.Module], Tensor]) -> None:
    config = InputAdaConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], tie=r"(layers\.\d+)\.self_attn")
    tuner = adapted(make_llama(), config, std=0.1)
    tensors, _, stock = exported(tuner, make_llama())
    assert len(tensors) == 2 * 2 * 3  # each layer has its own now
    assert_close(logits(stock), logits(tuner))


def test_another_base_than_the_tuner_s(logits: Callable[[nn.Module], Tensor]) -> None:
    """What export is for: the weights of the target count, not those of the source."""
    source = adapted(make_llama(), InputAdaConfig(r=4, target_modules=["q_proj", "down_proj"]), std=0.1)
    carried = adapted(make_llama(seed=9), InputAdaConfig(r=4, target_modules=["q_proj", "down_proj"]), std=0.1)
    _, _, stock = exported(source, make_llama(seed=9))
    assert_close(logits(stock), logits(carried))


def test_nothing_that_is_given_changes() -> None:
    base, tuner = make_gpt2(), adapted(make_gpt2(), OutputAdaConfig(r=2, target_modules=["c_attn"]))
    kept = [{n: t.clone() for n, t in model.state_dict().items()} for model in (base, tuner)]
    exported(tuner, base)
    for model, before in zip((base, tuner), kept, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any("lora" in name for name in base.state_dict())


def test_a_second_export_is_the_same_bytes(tmp_path: Path) -> None:
    tuner = adapted(make_llama(), OutputAdaConfig(r=2, target_modules=["q_proj", "o_proj"]))
    files = []
    for name in ("one", "two"):
        xadapt.export_lora(tuner, make_llama(), tmp_path / name)
        files.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert files[0] == files[1]


LOW_RANK_BY_ITS_NUMBERS: dict[str, Callable[[], PeftConfig]] = {
    "hra": lambda: HRAConfig(r=4, target_modules=["q_proj"]),
    "miss": lambda: MissConfig(r=4, target_modules=["q_proj"]),
    "delora": lambda: DeloraConfig(r=4, target_modules=["q_proj"]),
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=4, total_step=10, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", LOW_RANK_BY_ITS_NUMBERS)
def test_what_is_low_rank_by_its_numbers_is_exact(
    name: str, tmp_path: Path, logits: Callable[[nn.Module], Tensor]
) -> None:
    """PEFT merges it into a weight; that the difference has a low rank is seen in it alone."""
    tuner = adapted(make_llama(), LOW_RANK_BY_ITS_NUMBERS[name](), std=0.1)
    with pytest.raises(ValueError, match=r"no LoRA by its form, but .* has rank 4 here: rank=4 would keep"):
        xadapt.export_lora(tuner, make_llama(), tmp_path / "lora")
    report = xadapt.export_lora(tuner, make_llama(), tmp_path / "lora", rank=4)
    assert report.exact
    assert report.as_dict()["exact"]
    assert 0 < max(layer.residual for layer in report.layers) <= 1e-5
    assert_close(logits(load(make_llama(), report.out)), logits(tuner))
    assert not xadapt.export_lora(tuner, make_llama(), tmp_path / "less", rank=3).exact


class TestDtype:
    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64])
    def test_what_loaders_do_not_read(self, dtype: torch.dtype, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
        with pytest.raises(ValueError, match=r"floating-point dtype that loaders read: torch.float32, .*torch.float64"):
            xadapt.export_lora(tuner, Mlp(), tmp_path / "lora", dtype=dtype)

    @pytest.mark.parametrize("dtype", ["bfloat16", 16])
    def test_what_is_none(self, dtype: Any, tmp_path: Path) -> None:
        tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
        with pytest.raises(TypeError, match=rf"dtype={dtype!r} is no torch.dtype; pass one of torch.float32, "):
            xadapt.export_lora(tuner, Mlp(), tmp_path / "lora", dtype=dtype)

    def test_an_8_bit_adapter_is_written_in_float32(self) -> None:
        adapter = xadapt.detach(adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"])))
        eight = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in adapter.tensors.items()}
        small = xadapt.contract.Adapter(kind=adapter.kind, config=adapter.config, tensors=eight)
        tensors, _, _ = exported(small, Mlp())
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_nothing_of_the_base_is_read_for_a_stock_lora(tmp_path: Path) -> None:
    """So it says nothing of NaN there: as stock PEFT, on a base that is as broken without it."""
    base = Mlp()
    with torch.no_grad():
        base.lin0.weight[0, 0] = torch.nan
    report = xadapt.export_lora(adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"])), base, tmp_path / "lora")
    assert report.exact


def test_a_name_is_for_layouts_that_have_names(tmp_path: Path) -> None:
    tuner = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
    with pytest.raises(ValueError, match=r"name='unet': layout='peft' names no component; leave name out"):
        xadapt.export_lora(tuner, Mlp(), tmp_path / "lora", name="unet")
    with pytest.raises(ValueError, match=r"no names for the component 'vae': pass name=… with one of unet, "):
        xadapt.export_lora(tuner, Mlp(), tmp_path / "lora", layout="diffusers", component="vae")


def test_a_zero_adapter_on_biased_layers_needs_no_bias() -> None:
    tuner = adapted(make_gpt2(), OutputAdaConfig(r=2, target_modules=["c_attn"]))
    randomise(cast(Any, tuner), std=0.0)
    _, config, _ = exported(tuner, make_gpt2())
    assert config["lora_bias"] is False
