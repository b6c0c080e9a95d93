"""Export: the plain LoRA that an adapter is on a base says what the tuner says there, and so does each fold by itself."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, DeloraConfig, HRAConfig, LoraConfig, MissConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.feature_models import Mlp, OneLayer, adapted, features_for, load, mlp_batch, randomise, with_second
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig
from xadapt.attached import attach, updates_of
from xadapt.folding import layers_of
from xadapt.update import to_stored

examples = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
quiet = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")  # PEFT's word on every Conv1D it adapts
pytestmark = [
    quiet,
    # PEFT says of a constant beside a layer without bias that it could not be merged there; it is not.
    pytest.mark.filterwarnings(r"ignore:`lora_bias=True` was passed but the targeted layer"),
]

LAYERS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "linear": lambda i, o, bias: nn.Linear(i, o, bias=bias),
    "Conv1D": lambda i, o, bias: Conv1D(o, i),
    "embedding": lambda i, o, bias: nn.Embedding(i, o),
    "conv 1x1": lambda i, o, bias: nn.Conv2d(i, o, 1, bias=bias),
    "conv 3x3": lambda i, o, bias: nn.Conv2d(i, o, 3, padding=1, bias=bias),
    "conv strided": lambda i, o, bias: nn.Conv2d(i, o, (3, 2), stride=2, bias=bias),
    "conv1d": lambda i, o, bias: nn.Conv1d(i, o, 3, padding=2, bias=bias),
}
ADAPTERS = {"lora": LoraConfig, "input": InputAdaConfig, "output": OutputAdaConfig, "hybrid": HybridAdaConfig}


@dataclass(frozen=True)
class Case:
    """One layer with one adapter."""

    layer: str
    adapter: str
    widths: tuple[int, int]
    bias: bool
    dtype: torch.dtype
    options: dict[str, Any]

    def base(self) -> OneLayer:
        torch.manual_seed(7)
        layer = LAYERS[self.layer](*self.widths, self.bias)
        if isinstance(layer, Conv1D):
            nn.init.normal_(layer.bias)
        return OneLayer(layer).to(self.dtype).eval()

    def tuner(self) -> PeftModel:
        """On the base as it is, in a precision that shows differences."""
        config = ADAPTERS[self.adapter](target_modules=["layer"], **self.options)
        return adapted(self.base().to(self.precision), config)

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def _has_adapter(layer: str, adapter: str) -> bool:
    return (layer, adapter) != ("embedding", "input") and (adapter != "hybrid" or layer in ("linear", "Conv1D"))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    adapter = draw(st.sampled_from(sorted(ADAPTERS)))
    layer = draw(st.sampled_from([name for name in LAYERS if _has_adapter(name, adapter)]))
    widths = draw(st.tuples(st.integers(4, 20), st.integers(4, 20)))
    options: dict[str, Any] = {
        "r": draw(st.integers(1, 3)),
        "lora_alpha": draw(st.sampled_from([1, 2, 0.5, 7])),
        "use_rslora": draw(st.booleans()),
    }
    if adapter == "hybrid":
        options |= {"r": options["r"] + 1, "feature_r": 1, "space": draw(st.sampled_from(["input", "output"]))}
    elif draw(st.booleans()):
        options["alpha_pattern"] = {"layer": 3}
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return Case(layer, adapter, widths, draw(st.booleans()), dtype, options)


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


class TestOneLayer:
    @given(case=cases())
    @examples
    def test_export_is_the_tuner_on_this_base(self, case: Case) -> None:
        base, tuner = case.base(), case.tuner()
        x = features_for(base.layer)
        x = x.to(case.precision) if x.is_floating_point() else x
        tensors, config, stock = exported(tuner, base)
        assert config["peft_type"] == "LORA"
        assert_close(stock(x), tuner(x))
        assert {tensor.dtype for tensor in tensors.values()} == {case.precision}

    @given(case=cases())
    @examples
    def test_without_a_model_as_with_peft_s_layers(self, case: Case) -> None:
        """The detached route, which knows the factors, against the attached one, which asks PEFT."""
        base, adapter = xadapt.open_base(case.base()), xadapt.detach(case.tuner())
        (layer,) = layers_of([adapter], base)
        assert adapter.kind.updates(adapter.config, adapter.tensors) is not None
        one = layer.update(base.weights())
        (fold,) = updates_of(attach(base.skeleton(), adapter.config, adapter.tensors)).values()
        weights = base.weights()
        other = fold(to_stored(layer.module, weights["layer.weight"]), weights.get("layer.bias"))
        assert one.matrix.tensor().dtype == other.matrix.tensor().dtype == case.precision
        assert_close(one.matrix.tensor(), other.matrix.tensor())
        assert (one.bias is None) == (other.bias is None)
        if one.bias is not None and other.bias is not None:
            assert_close(one.bias, other.bias)

    @given(case=cases())
    @examples
    def test_the_update_added_to_the_weight_is_the_tuner(self, case: Case) -> None:
        base, tuner = case.base(), case.tuner()
        opened = xadapt.open_base(base)
        (layer,) = layers_of([xadapt.detach(tuner)], opened)
        update = layer.update(opened.weights())
        x = features_for(base.layer)
        x = x.to(case.precision) if x.is_floating_point() else x
        merged = base.to(case.precision)
        with torch.no_grad():
            added = update.matrix.tensor().view(layer.shape)
            merged.layer.weight += to_stored(merged.layer, added)
            if update.bias is not None:
                merged.layer.bias += update.bias
        assert_close(merged(x), tuner(x))

    @given(case=cases())
    @examples
    def test_the_rank_is_the_adapter_s(self, case: Case) -> None:
        """No larger, but for an input adaptation before a kernel: each of its positions has products of its own."""
        opened, adapter = xadapt.open_base(case.base()), xadapt.detach(case.tuner())
        (layer,) = layers_of([adapter], opened)
        positions = 1
        for size in layer.shape[2:]:
            positions *= size
        factor = positions if case.adapter == "input" else 1
        assert layer.update(opened.weights()).matrix.rank == factor * case.options["r"]


@pytest.mark.parametrize("adapter", ["lora", "input", "output"])
@pytest.mark.parametrize("layer", ["linear", "conv 3x3"])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_export_is_linear_in_a_and_in_b(adapter: str, layer: str, side: str, tmp_path: Path) -> None:
    case = Case(layer, adapter, (6, 5), True, torch.float32, {"r": 2, "lora_alpha": 3})
    base, detached = case.base(), xadapt.detach(case.tuner())

    def update(change: Callable[[Tensor], Tensor]) -> Tensor:
        tensors = {n: change(t) if side in n else t for n, t in detached.tensors.items()}
        changed = xadapt.contract.Adapter(kind=detached.kind, config=detached.config, tensors=tensors)
        (found,) = layers_of([changed], xadapt.open_base(base))
        made = found.update(xadapt.open_base(base).weights())
        return torch.cat([made.matrix.tensor().flatten(), made.bias if made.bias is not None else torch.zeros(5)])

    noise = torch.randn(1)
    one, other = update(lambda t: t), update(lambda t: t.flip(1))
    assert_close(update(lambda t: 2 * t + noise * t.flip(1)), 2 * one + noise * other)


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
