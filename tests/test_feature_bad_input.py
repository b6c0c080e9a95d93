"""What the tuners refuse: in words that help, and with the model left as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    VeraConfig,
    inject_adapter_in_model,
)
from torch import Tensor, nn

from tests.feature_models import (
    CONFIG,
    SPACES,
    Mlp,
    OneLayer,
    adapted,
    assert_same,
    attach,
    feature_layers,
    mlp_batch,
    weights,
)
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space

Attach = Callable[[], Any]
OTHER = {"input": "output", "output": "input"}
both_spaces = pytest.mark.parametrize("space", SPACES)
every_config = pytest.mark.parametrize(
    "config", [InputAdaConfig, OutputAdaConfig, HybridAdaConfig, FullAdaConfig], ids=lambda c: c.__name__
)


def refused(attach: Attach, model: nn.Module, error: type[Exception] = ValueError) -> str:
    """The message; and nothing about the model has changed: names, values, what trains, its adapters."""

    def state() -> tuple[Any, ...]:
        return (
            [(name, type(module)) for name, module in model.named_modules()],
            [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
            list(getattr(model, "peft_config", ())),
        )

    before, held = state(), weights(model)
    with pytest.raises(error) as caught:
        attach()
    assert state() == before
    assert_same(model, held)
    return str(caught.value)


class TestConfig:
    @every_config
    def test_a_misspelt_field(self, config: Any) -> None:
        with pytest.raises(TypeError, match=rf"{config.__name__}.*'target_module'; Did you mean 'target_modules'\?"):
            config(target_module=["q_proj"])

    @every_config
    def test_a_field_that_is_like_no_other_is_told_which_there_are(self, config: Any) -> None:
        with pytest.raises(TypeError, match=rf"{config.__name__}.*'zzz'; Known: .*target_modules.* and \d+ more\.$"):
            config(zzz=1)

    @pytest.mark.parametrize("rank", [0, -1, True, 2.0, "8", None], ids=repr)
    @pytest.mark.parametrize("config", [InputAdaConfig, OutputAdaConfig, HybridAdaConfig])
    def test_a_rank_that_is_none(self, config: Any, rank: Any) -> None:
        with pytest.raises(ValueError, match=rf"^r={rank!r}: a rank is a positive integer, for example r=8\.$"):
            config(r=rank)
        with pytest.raises(
            ValueError, match=rf"rank_pattern\['q'\]={rank!r}: .*, for example rank_pattern\['q'\]=8\.$"
        ):
            config(rank_pattern={"q": rank})

    @pytest.mark.parametrize(
        ("config", "option", "says"),
        [
            (InputAdaConfig, "rank", r"Did you mean 'r'\?$"),
            (InputAdaConfig, "alpha", r"Did you mean 'lora_alpha'\?$"),
            (InputAdaConfig, "space", r"InputAdaConfig is for input space\. For output space use OutputAdaConfig, or"),
            (OutputAdaConfig, "space", r"OutputAdaConfig is for output space\. For input space use InputAdaConfig, or"),
            (OutputAdaConfig, "tie", r"tie is for input space only, .*: InputAdaConfig has it\.$"),
        ],
    )
    def test_an_option_that_goes_by_another_name_or_class(self, config: Any, option: str, says: str) -> None:
        with pytest.raises(TypeError, match=rf"{config.__name__}.*{option!r}; {says}"):
            config(**{option: "k"})


@both_spaces
class TestLayers:
    def test_no_layer_matches(self, space: str) -> None:
        model = Mlp()
        message = refused(lambda: attach(model, CONFIG[space](target_modules=["nope"])), model)
        assert "Target modules {'nope'} not found in the base model" in message
        assert f"Layers here that {space} adaptation can act on: lin0, lin1, head." in message

    def test_every_layer_is_excluded(self, space: str) -> None:
        config = CONFIG[space](target_modules=["lin0"], exclude_modules=["lin0"])
        model = Mlp()
        assert "exclude_modules" in refused(lambda: attach(model, config), model)

    def test_no_layer_is_named_and_the_architecture_is_unknown(self, space: str) -> None:
        model = Mlp()
        assert "target_modules" in refused(lambda: attach(model, CONFIG[space]()), model)

    @pytest.mark.parametrize("options", [{"r": 40}, {"r": 2, "rank_pattern": {"lin1": 40}}], ids=str)
    def test_a_rank_above_the_width(self, space: str, options: dict[str, Any]) -> None:
        """In lin1 alone it would be found only after lin0 has been replaced."""
        model = Mlp()
        config = CONFIG[space](target_modules=["lin0", "lin1"], **options)
        message = refused(lambda: attach(model, config), model)
        assert "r=40 is above the layer's width (" in message
        assert "Use r <= " in message

    def test_a_rank_above_an_embedding_s_width(self, space: str) -> None:
        """It has many rows, but they are no features."""
        model = OneLayer(nn.Embedding(100, 8))
        config = OutputAdaConfig(r=9, target_modules=["layer"])
        assert "r=9 is above the layer's width (100 in, 8 out). Use r <= 8" in refused(
            lambda: attach(model, config), model
        )

    @pytest.mark.parametrize(
        ("config", "says"),
        [
            (LoHaConfig(r=40), "r=40"),
            (LoHaConfig(r=2, rank_pattern={"lin1": 40}), "r=40"),
            (VeraConfig(r=40), "r=40"),
            (HRAConfig(r=40), "r=40"),
            (AdaLoraConfig(init_r=40, target_r=4, total_step=10), "init_r=40"),
            (AdaLoraConfig(init_r=4, target_r=40, total_step=10), "target_r=40"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_a_hosted_method_s_rank_above_the_width(self, space: str, config: PeftConfig, says: str) -> None:
        model = Mlp()
        made = feature_space(config, space, target_modules=["lin0", "lin1"])
        assert f"{says} is above the layer's width (" in refused(lambda: attach(model, made), model)

    @pytest.mark.parametrize("rank", [0, -2], ids=repr)
    @pytest.mark.parametrize("cls", [LoHaConfig, VeraConfig, HRAConfig], ids=lambda c: c.__name__)
    def test_a_hosted_method_s_rank_that_is_none(self, space: str, cls: Any, rank: int) -> None:
        with pytest.raises(ValueError, match=rf"^r={rank}: a rank is a positive integer, for example r=8\.$"):
            feature_space(cls(r=rank), space)
        with pytest.raises(ValueError, match=rf"^init_r={rank}: a rank is a positive integer"):
            feature_space(AdaLoraConfig(init_r=rank, total_step=10), space)

    def test_a_rank_above_the_features_adapted_is_told(self, space: str) -> None:
        """It works, but a smaller one says the same."""
        name, width = ("lin0", 16) if space == "input" else ("lin1", 24)
        with pytest.warns(UserWarning, match=rf"{name}: r=30 is above the {width} {space} features it adapts"):
            attach(Mlp(), CONFIG[space](r=30, target_modules=[name]))

    @pytest.mark.parametrize(
        ("layer", "says"),
        [
            (lambda: nn.LayerNorm(4), "LayerNorm is no layer that can be adapted in feature space: nn.Linear"),
            (lambda: nn.LSTM(4, 4), "LSTM is no layer"),
            (lambda: nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d is no layer"),
            (lambda: nn.Bilinear(4, 4, 4), "Bilinear is no layer"),
            (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention is no layer"),
            (lambda: nn.Conv2d(4, 4, 3, groups=2), "groups=2.*leave it out with exclude_modules"),
            (lambda: nn.Embedding(5, 4, max_norm=1.0), "max_norm|reads token ids"),
        ],
    )
    def test_layers_on_which_it_cannot_act(self, space: str, layer: Callable[[], nn.Module], says: str) -> None:
        """The layer before it could be adapted, and is not."""
        model = nn.Sequential(nn.Linear(4, 4), layer())
        config = CONFIG[space](r=2, target_modules=["0", "1"])
        message = refused(lambda: attach(model, config), model)
        assert message.startswith("1: ")
        assert re.search(says, message)

    def test_multihead_attention_does_not_call_its_projection(self, space: str) -> None:
        model = nn.TransformerEncoderLayer(8, 2, 16)
        config = CONFIG[space](r=2, target_modules=["linear1", "out_proj"])
        message = refused(lambda: attach(model, config), model)
        assert "self_attn.out_proj belongs to nn.MultiheadAttention, which reads its weight without calling" in message
        assert "exclude_modules" in message
        without = CONFIG[space](r=2, target_modules="all-linear", exclude_modules=["out_proj"])
        assert len(feature_layers(attach(model, without))) == 2

    def test_a_bare_parameter(self, space: str) -> None:
        with pytest.raises(ValueError, match="target_parameters is refused in feature space: a bare parameter has no"):
            CONFIG[space](target_modules=["lin0"], target_parameters=["weight"])

    def test_what_the_hosted_method_refuses_half_way(self, space: str) -> None:
        """C³A wants a width that its block divides: 16 and 32 are, 24 is not. The layers before it come back."""
        model = Mlp()
        options: dict[str, Any] = {"block_size": 16, "target_modules": ["lin0", "lin1", "head"]}
        config = feature_space(C3AConfig(**options), space)
        assert "block" in refused(lambda: attach(model, config), model)

    def test_a_second_adapter_that_fails_half_way(self, space: str) -> None:
        model = adapted(Mlp(), feature_space(C3AConfig(block_size=8, target_modules=["lin0", "lin1", "head"]), space))
        expected = model(mlp_batch())
        config = feature_space(C3AConfig(block_size=16, target_modules=["lin0", "lin1", "head"]), space)
        refused(lambda: model.add_adapter("second", config), model)
        assert torch.equal(model(mlp_batch()), expected)
        model.add_adapter("second", feature_space(C3AConfig(block_size=4, target_modules=["lin0"]), space))

    def test_shared_tensors_of_a_refused_adapter_go_too(self, space: str) -> None:
        vera = feature_space(VeraConfig(r=4, target_modules=["lin0"]), space)
        model = adapted(Mlp(), vera)
        refused(
            lambda: model.add_adapter("second", feature_space(VeraConfig(r=4, target_modules=["no"]), space)), model
        )

    def test_ctrl_c_while_it_is_attached(self, space: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, made = Mlp(), 0
        original = nn.init.kaiming_uniform_

        def interrupt(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal made
            made += 1
            if made == 4:  # the first layer is done
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(nn.init, "kaiming_uniform_", interrupt)
        config = CONFIG[space](r=2, target_modules=["lin0", "lin1"])
        refused(lambda: attach(model, config), model, KeyboardInterrupt)
        assert made == 4


class TestSpacesOfLayers:
    def test_an_embedding_has_no_input_space(self) -> None:
        model = OneLayer(nn.Embedding(5, 4))
        message = refused(lambda: attach(model, InputAdaConfig(r=2, target_modules=["layer"])), model)
        assert "reads token ids, not features" in message
        assert "OutputAdaConfig" in message

    def test_input_space_wants_zero_padding(self) -> None:
        model = OneLayer(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))
        message = refused(lambda: attach(model, InputAdaConfig(r=2, target_modules=["layer"])), model)
        assert "padding_mode='reflect' has no input adaptation here, only zero padding has; use OutputAda" in message
        attach(model, OutputAdaConfig(r=2, target_modules=["layer"]))


@both_spaces
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT's, at every second injection
class TestTwoKindsOnOneModel:
    """Through `PeftModel.add_adapter` PEFT refuses; what it lets through, the layers refuse."""

    @pytest.mark.parametrize("other", ["space", "lora"])
    def test_add_adapter(self, space: str, other: str) -> None:
        second = LoraConfig if other == "lora" else CONFIG[OTHER[space]]
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["lin0"]))
        message = refused(lambda: model.add_adapter("second", second(r=2, target_modules=["lin0"])), model)
        assert f"{space.upper()}_ADA" in message

    def test_add_adapter_to_a_lora(self, space: str) -> None:
        model = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin0"]))
        refused(lambda: model.add_adapter("second", CONFIG[space](r=2, target_modules=["lin0"])), model)

    @pytest.mark.parametrize("kind", ["hybrid", "full"])
    def test_one_type_two_spaces(self, space: str, kind: str) -> None:
        def config(space: str) -> Any:
            if kind == "full":
                return FullAdaConfig(space=space, target_modules=["lin0"])
            return HybridAdaConfig(space=space, r=4, feature_r=2, target_modules=["lin0"])

        model = adapted(Mlp(), config(space))
        message = refused(lambda: model.add_adapter("second", config(OTHER[space])), model)
        assert f"lin0 carries an adapter in {space} space, and this one is for {OTHER[space]} space" in message
        assert "Merge or unload the first" in message

    @pytest.mark.parametrize("other", ["space", "loha", "hybrid"])
    def test_injected(self, space: str, other: str) -> None:
        """k_proj alone could be adapted; it is not either."""
        targets = ["lin0", "lin1"]
        config = {
            "space": CONFIG[OTHER[space]](r=2, target_modules=targets),
            "loha": feature_space(LoHaConfig(r=2, target_modules=targets), space),
            "hybrid": HybridAdaConfig(space=space, r=4, feature_r=2, target_modules=targets),
        }[other]
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["lin1"])).base_model.model
        message = refused(lambda: inject_adapter_in_model(config, model, "second"), model)
        assert "lin1 carries an adapter" in message
        assert "Merge or unload" in message

    def test_on_top_of_a_lora(self, space: str) -> None:
        model = adapted(Mlp(), LoraConfig(r=2, target_modules=["lin1"])).base_model.model
        config = CONFIG[space](r=2, target_modules=["lin0", "lin1"])
        message = refused(lambda: inject_adapter_in_model(config, model, "second"), model)
        assert "lin1 already carries a lora adapter. Merge or unload it first; HybridAdaConfig" in message

    def test_a_lora_on_top(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["lin0", "lin1"])).base_model.model
        before, expected = weights(model), model(mlp_batch())
        with pytest.raises(ValueError, match=rf"carries an adapter in {space} space, so 'second'.* cannot be added"):
            inject_adapter_in_model(LoraConfig(r=2, target_modules=["lin0", "lin1"]), model, "second")
        assert_same(model, before)
        assert torch.equal(model(mlp_batch()), expected)

    @pytest.mark.parametrize("other", [LoHaConfig, HRAConfig, IA3Config, OFTConfig], ids=lambda c: c.__name__)
    @pytest.mark.parametrize("how", ["injected", "through transformers"])
    def test_another_tuner_s_layer_around_it(
        self, space: str, other: Any, how: str, llama: Any, logits: Callable[[nn.Module], Tensor]
    ) -> None:
        llama.add_adapter(CONFIG[space](r=2, target_modules=["q_proj"], init_lora_weights=False), "first")
        before, held = logits(llama), weights(llama)
        options: dict[str, Any] = {"feedforward_modules": []} if other is IA3Config else {}
        config = other(target_modules=["q_proj"], **options)
        with pytest.raises(ValueError, match=rf"carries an adapter in {space} space cannot be wrapped in another one"):
            inject_adapter_in_model(config, llama, "second") if how == "injected" else llama.add_adapter(config, "b")
        assert_same(llama, held)
        assert torch.equal(logits(llama), before)

    def test_a_copy_of_the_model_is_no_wrapper(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["lin0"]))
        assert torch.equal(copy.deepcopy(model)(mlp_batch()), model(mlp_batch()))
        assert torch.equal(nn.Sequential(model.base_model.model)(mlp_batch()), model(mlp_batch()))

    def test_through_transformers(self, space: str, llama: Any, logits: Callable[[nn.Module], Tensor]) -> None:
        llama.add_adapter(CONFIG[space](r=2, target_modules=["q_proj"]), "first")
        other = CONFIG[OTHER[space]](r=2, target_modules=["k_proj", "q_proj"])
        before = logits(llama)
        message = refused(lambda: llama.add_adapter(other, "second"), llama)
        assert "self_attn.q_proj carries an adapter in" in message
        assert torch.equal(logits(llama), before)
        llama.add_adapter(CONFIG[space](r=2, target_modules=["k_proj", "q_proj"]), "second")  # the name is still free


def test_a_bad_name_of_a_good_kind_is_no_loss(llama: Any) -> None:
    """A first adapter that transformers could not add leaves a model to which another one can be added."""
    refused(lambda: llama.add_adapter(InputAdaConfig(r=2, target_modules=["q_proj", "norm"])), llama)
    llama.add_adapter(InputAdaConfig(r=2, target_modules=["q_proj"]))
    assert len(feature_layers(llama)) == 2


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_that_is_there_is_not_lost_to_one_of_its_name() -> None:
    model = adapted(Mlp(), InputAdaConfig(r=2, target_modules=["lin0"])).base_model.model
    before, expected = weights(model), model(mlp_batch())
    with pytest.raises(ValueError, match="carries an adapter in input space"):
        inject_adapter_in_model(OutputAdaConfig(r=2, target_modules=["lin0"]), model)
    assert_same(model, before)
    assert torch.equal(model(mlp_batch()), expected)
