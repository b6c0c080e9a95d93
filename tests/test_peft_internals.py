"""What we rely on inside PEFT is there and behaves: a release that moves it fails here, not in a training run."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraModel
from peft.utils import PeftType as PublicPeftType
from torch import nn

from tests.feature_models import Mlp, OneLayer
from xadapt import peft_internals
from xadapt.peft_internals import (
    HOTSWAPPABLE,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    BaseTuner,
    BaseTunerLayer,
    LoraLinear,
    NoMatchingPeftModuleError,
    PeftType,
    check_adapters_to_merge,
    check_mamba,
    get_pattern_key,
    get_quantization_kwargs,
    include_all_linear,
    onload_layer,
    register_peft_method,
    resolve_quantization_backend,
    warn_of_shards,
)
from xadapt_feature.hosts import HOSTS


def lora(*targets: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Mlp(), LoraConfig(r=2, target_modules=list(targets) or ["lin0"], **options))  # type: ignore[arg-type]


def test_every_name_is_there() -> None:
    for name in peft_internals.__all__:
        assert hasattr(peft_internals, name), name


def test_nothing_else_reaches_inside() -> None:
    """Other files import from PEFT's public packages only: peft, peft.utils."""
    here = Path(inspect.getfile(peft_internals)).parent
    for path in (*here.rglob("*.py"), *(here.parent / "methods").rglob("*.py")):
        if path.name == "peft_internals.py":
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            words = line.split()
            if words[:1] in (["from"], ["import"]) and words[1].split(".")[0] == "peft":
                assert words[1] in ("peft", "peft.utils"), f"{path.name}: {line}"


class TestRegistering:
    def test_types_map_to_configs_and_tuners(self) -> None:
        assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] is LoraModel
        for method in HOSTS:
            assert issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)], PeftConfig)
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method)]
            assert issubclass(tuner, BaseTuner)
            assert issubclass(tuner.tuner_layer_cls, BaseTunerLayer)
            assert isinstance(tuner.prefix, str)

    def test_the_enum_is_the_public_one_and_ours_are_members(self) -> None:
        assert PeftType is PublicPeftType
        for name in ("INPUT_ADA", "OUTPUT_ADA", "HYBRID_ADA", "FULL_ADA", "INPUT_ADA_LOHA", "OUTPUT_ADA_LOHA"):
            member = PeftType(name)
            assert member in list(PeftType)
            assert member == name  # a string too: it is written into adapter_config.json
            assert member in PEFT_TYPE_TO_CONFIG_MAPPING
            assert member in PEFT_TYPE_TO_TUNER_MAPPING

    def test_a_name_is_registered_once(self) -> None:
        with pytest.raises(KeyError, match="input_ada"):
            register_peft_method(
                name="input_ada",
                config_cls=PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("INPUT_ADA")],
                model_cls=PEFT_TYPE_TO_TUNER_MAPPING[PeftType("INPUT_ADA")],
            )

    def test_hotswapping_goes_by_the_type(self) -> None:
        assert "lora_alpha" in HOTSWAPPABLE[PeftType.LORA] or "use_dora" in HOTSWAPPABLE[PeftType.LORA]
        assert HOTSWAPPABLE[PeftType("INPUT_ADA")] == HOTSWAPPABLE[PeftType.LORA]


class TestTuner:
    def test_create_and_replace_takes_what_we_hand_it(self) -> None:
        names = ("adapter_name", "target", "target_name", "parent", "current_key")
        for method in ("LORA", *HOSTS):
            parameters = inspect.signature(PEFT_TYPE_TO_TUNER_MAPPING[PeftType(method)]._create_and_replace).parameters
            given = list(parameters)[1:]  # without self; the config comes first and is called differently
            assert tuple(given[1:5]) == names[:4], method
            assert "current_key" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values()), method

    @pytest.mark.parametrize(
        "name",
        [
            "inject_adapter",
            "merge_adapter",
            "merge_and_unload",
            "_pre_injection_hook",
            "_check_new_adapter_config",
            "_prepare_adapter_config",
            "_check_target_module_exists",
            "_remap_adapter_state_dict_for_load",
            "_get_adapter_state_dict",
            "get_model_config",
        ],
    )
    def test_what_we_override_or_call_is_there(self, name: str) -> None:
        assert callable(getattr(BaseTuner, name))

    def test_lora_s_weighted_adapters_go_through_one_method(self) -> None:
        assert callable(LoraModel._svd_generalized_task_arithmetic_weighted_adapter)

    def test_all_linear_becomes_names(self, llama: nn.Module) -> None:
        config = include_all_linear(LoraConfig(target_modules="all-linear"), llama)
        assert "q_proj" in {str(name).rpartition(".")[-1] for name in config.target_modules}
        assert not any("lm_head" in str(name) for name in config.target_modules)
        other = LoraConfig(target_modules=["a"])
        assert include_all_linear(other, llama) is other

    def test_the_rule_of_rank_pattern(self) -> None:
        assert get_pattern_key(["lin1", "other"], "blocks.0.lin1") == "lin1"
        assert get_pattern_key(["lin1"], "blocks.0.lin0") == "blocks.0.lin0"
        assert get_pattern_key([], "lin0") == "lin0"

    def test_no_match_is_an_error_of_its_own(self) -> None:
        assert issubclass(NoMatchingPeftModuleError, ValueError)
        with pytest.raises(NoMatchingPeftModuleError):
            lora("nope")

    def test_layers_that_mamba_reads_without_a_call(self) -> None:
        class Config:
            model_type = "mamba"

        model = nn.Module()
        model.config = Config()  # type: ignore[assignment]
        config = LoraConfig(target_modules=["out_proj"])
        config.peft_type = PeftType.LORA
        with pytest.raises(ValueError, match="out_proj"):
            check_mamba(config, model, "out_proj")
        check_mamba(config, model, "in_proj")


class TestLayer:
    def test_a_lora_layer_keeps_its_state_where_we_look(self) -> None:
        layer: Any = lora(lora_dropout=0.5).base_model.model.lin0  # type: ignore[union-attr]
        assert type(layer) is LoraLinear
        assert isinstance(layer, BaseTunerLayer)
        assert type(layer.lora_A["default"]) is nn.Linear
        assert type(layer.lora_B["default"]) is nn.Linear
        assert isinstance(layer.lora_dropout["default"], nn.Dropout)
        assert layer.scaling == {"default": 4.0}
        assert layer.lora_variant == {}
        assert layer._active_adapter == ["default"] or layer._active_adapter == "default"
        assert layer._disable_adapters is False
        assert layer._get_available_adapters() == {"default"}
        assert isinstance(layer.adapter_layer_names, tuple)
        assert isinstance(layer.other_param_names, tuple)
        assert type(lora().base_model.model.lin0.lora_dropout["default"]) is nn.Identity  # type: ignore[union-attr]

    def test_a_variant_is_recorded(self) -> None:
        layer: Any = lora(use_dora=True).base_model.model.lin0  # type: ignore[union-attr]
        assert "default" in layer.lora_variant

    def test_layer_classes_take_virtual_subclasses(self) -> None:
        """Our layers pose as PEFT's: its loops ask with isinstance."""

        class Posing:
            pass

        class Hosted(BaseTunerLayer):
            pass

        Hosted.register(Posing)
        assert isinstance(Posing(), Hosted)
        assert isinstance(Posing(), BaseTunerLayer)

    def test_what_is_left_to_merge(self) -> None:
        layer: Any = lora().base_model.model.lin0  # type: ignore[union-attr]
        assert check_adapters_to_merge(layer) == ["default"]
        layer.merge()
        with pytest.warns(UserWarning, match="already merged"):
            assert check_adapters_to_merge(layer) == []
        with pytest.raises(TypeError, match="list of strings"):
            check_adapters_to_merge(layer, "default")  # type: ignore[arg-type]

    def test_onloading_does_nothing_where_nothing_is_offloaded(self) -> None:
        layer = lora().base_model.model.lin0  # type: ignore[union-attr]
        before = {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()}  # type: ignore[union-attr]
        with onload_layer(layer):
            pass
        assert {name: tensor.data_ptr() for name, tensor in layer.state_dict().items()} == before  # type: ignore[union-attr]

    def test_get_base_layer_goes_to_the_bottom(self) -> None:
        inner = lora().base_model.model.lin0  # type: ignore[union-attr]
        outer: Any = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["layer"]), OneLayer(inner))
        assert outer.layer.base_layer is inner
        assert type(outer.layer.get_base_layer()) is nn.Linear


class TestQuantisation:
    def test_a_plain_layer_has_no_backend(self) -> None:
        kwargs = get_quantization_kwargs(Mlp())
        assert isinstance(kwargs, dict)
        assert resolve_quantization_backend(nn.Linear(2, 2), **kwargs) is None

    def test_a_backend_reads_and_writes(self) -> None:
        for name in ("get_base_weight", "set_base_weight"):
            assert callable(getattr(peft_internals.QuantizationBackend, name))


def test_the_warning_of_sharded_saving_is_about_shards() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shards({"a.lora_A.weight": torch.zeros(2, 4), "a.lora_B.weight": torch.zeros(4, 2)}, "default")
    with pytest.warns(UserWarning, match="shards"):
        warn_of_shards({"a.lora_A.weight": torch.zeros(0)}, "default")
