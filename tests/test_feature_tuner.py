"""Several adapters on one model: what PEFT users do with a LoRA they do with an adapter in feature space."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn

from tests.feature_models import (
    CONFIG,
    SPACES,
    Mlp,
    OneLayer,
    adapted,
    assert_same,
    attach,
    base_layer,
    every_case,
    feature_layers,
    features_for,
    mlp_batch,
    randomise,
    train,
    weights,
    with_second,
)

TARGETS = ["lin0", "lin1"]
both_spaces = pytest.mark.parametrize("space", SPACES)


def two_adapters(space: str) -> PeftModel:
    """Adapters "default" and "second" of different rank and scaling; "default" is active."""
    first = CONFIG[space](r=2, lora_alpha=4, target_modules=TARGETS)
    return with_second(adapted(Mlp(), first), CONFIG[space](r=3, lora_alpha=2, target_modules=TARGETS))


def alone(space: str, name: str, x: Tensor | None = None) -> Tensor:
    """The output with one of `two_adapters` active."""
    model = two_adapters(space)
    model.set_adapter(name)
    return model(mlp_batch() if x is None else x).detach()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@both_spaces
class TestTraining:
    def test_only_the_adapter_trains_and_it_changes_the_output(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS))
        x, before = mlp_batch(), weights(model)
        bare = model(x)
        torch.testing.assert_close(bare, Mlp()(x))
        phi = f"{space}_ada_phi"
        assert trainable(model) == {
            f"base_model.model.{layer}.{phi}.lora_{m}.default.weight" for layer in TARGETS for m in "AB"
        }
        losses = train(model, x)
        assert losses[-1] < losses[0]
        assert not torch.allclose(model(x), bare)
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed == trainable(model)

    def test_the_number_of_parameters_is_that_of_the_features_adapted(self, space: str) -> None:
        model = attach(Mlp(), CONFIG[space](r=2, target_modules=TARGETS))
        widths = (16, 32) if space == "input" else (32, 24)
        assert model.get_nb_trainable_parameters()[0] == sum(2 * 2 * width for width in widths)

    def test_one_seed_gives_one_adapter(self, space: str) -> None:
        states = []
        for _ in range(2):
            model = Mlp()
            torch.manual_seed(7)
            states.append(attach(model, CONFIG[space](r=2, target_modules=TARGETS)).state_dict())
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name])


@both_spaces
class TestSeveralAdapters:
    def test_each_does_its_own_thing(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        outputs: dict[str, Tensor] = {}
        for name in ("default", "second", "default"):
            model.set_adapter(name)
            assert model.active_adapters == [name]
            assert all(f".{name}." in parameter for parameter in trainable(model))
            outputs.setdefault(name, model(x))
            assert torch.equal(model(x), outputs[name])
        assert not torch.allclose(outputs["default"], outputs["second"])

    def test_an_adapter_does_not_change_the_one_before(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, lora_alpha=4, target_modules=TARGETS))
        assert torch.equal(model(mlp_batch()), alone(space, "default"))

    def test_active_together_they_add(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        model.base_model.set_adapter(["default", "second"])
        (layer, _) = feature_layers(model)
        delta = {n: layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in ("default", "second")}
        assert layer.scaling == {"default": 4 / 2, "second": 2 / 3}
        phi = torch.eye(layer.features) + delta["default"] + delta["second"]
        weight, bias = layer.base_layer.weight, layer.base_layer.bias
        expected = x @ (weight @ phi).T + bias if space == "input" else (x @ weight.T + bias) @ phi.T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_disable_adapter_shows_the_base(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        active = model(x)
        with model.disable_adapter():
            assert torch.equal(model(x), Mlp()(x))
            assert not trainable(model)
        assert torch.equal(model(x), active)
        assert trainable(model)

    def test_disable_adapter_shows_the_base_of_a_merged_model_too(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        model.merge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(model(x), Mlp()(x), rtol=1e-5, atol=1e-6)

    def test_delete_adapter(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        with pytest.warns(UserWarning, match="Setting active adapter to second"):
            model.delete_adapter("default")
        assert list(model.peft_config) == ["second"]
        assert not any(".default." in name for name in model.state_dict())
        assert torch.equal(model(x), alone(space, "second"))
        # The name is free again.
        with_second(model, CONFIG[space](r=1, target_modules=["lin0"]), name="default")
        model.set_adapter("default")
        assert not torch.allclose(model(x), alone(space, "second"))

    def test_adapters_of_different_layers(self, space: str) -> None:
        model = adapted(Mlp(), CONFIG[space](r=2, target_modules=["lin0"]))
        with_second(model, CONFIG[space](r=2, target_modules=["head"]))
        model.set_adapter("second")
        x = mlp_batch()
        only = with_second(
            adapted(Mlp(), CONFIG[space](r=2, target_modules=["head"])), CONFIG[space](r=2, target_modules=["head"])
        )
        only.set_adapter("second")
        torch.testing.assert_close(model(x), only(x))

    def test_a_row_at_a_time(self, space: str) -> None:
        """Mixed-batch inference: one adapter, or none, per row."""
        model, x = two_adapters(space), mlp_batch(rows=4)
        names = ["second", "__base__", "default", "second"]
        mixed = model(x, adapter_names=names)
        for row, name in enumerate(names):
            expected = Mlp()(x) if name == "__base__" else alone(space, name, x)
            torch.testing.assert_close(mixed[row], expected[row], rtol=1e-5, atol=1e-5)

    def test_a_row_at_a_time_is_refused_while_merged(self, space: str) -> None:
        model = two_adapters(space)
        model.merge_adapter()
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters"):
            model(mlp_batch(rows=2), adapter_names=["default", "second"])

    def test_status_says_what_is(self, space: str) -> None:
        model = two_adapters(space)
        status = model.get_model_status()
        assert status.base_model_type == "Mlp"
        assert status.peft_types == {name: f"{space.upper()}_ADA" for name in ("default", "second")}
        assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
        assert status.available_adapters == ["default", "second"]
        assert status.num_adapter_layers == 2
        model.merge_adapter()
        for layer in model.get_layer_status():
            assert layer.merged_adapters == ["default"]
            assert layer.requires_grad == {"default": True, "second": False}
        with model.disable_adapter():
            assert not any(layer.enabled for layer in model.get_layer_status())

    def test_set_requires_grad(self, space: str) -> None:
        model = two_adapters(space)
        model.set_requires_grad("default", requires_grad=False)
        assert not trainable(model)
        model.set_requires_grad(["default", "second"])
        assert {name.split(".")[-2] for name in trainable(model)} == {"default", "second"}


@pytest.mark.parametrize(("name", "space"), every_case())
def test_a_row_at_a_time_on_every_layer(name: str, space: str) -> None:
    config = CONFIG[space](r=2, target_modules=["layer"])
    model = with_second(adapted(OneLayer(base_layer(name)), config), CONFIG[space](r=3, target_modules=["layer"]))
    x = features_for(base_layer(name), batch=3)
    mixed = model(x, adapter_names=["second", "__base__", "default"])
    model.set_adapter("second")
    torch.testing.assert_close(mixed[0], model(x)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[1], base_layer(name)(x)[1])
    model.set_adapter("default")
    torch.testing.assert_close(mixed[2], model(x)[2], rtol=1e-5, atol=1e-5)


class TestWeightedAdapter:
    """`add_weighted_adapter` combines Φ − I as it combines ΔW: ours and a LoRA of equal A, B give the same A, B."""

    KINDS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "linear": {},
        "cat": {},
        "svd": {"svd_rank": 4},
        "ties": {"density": 0.5},
        "ties_svd": {"density": 0.5},
        "dare_linear": {"density": 0.7},
        "dare_linear_svd": {"density": 0.7},
        "dare_ties": {"density": 0.7},
        "magnitude_prune": {"density": 0.5},
        "magnitude_prune_svd": {"density": 0.5},
    }

    def model(self, config: Callable[..., Any]) -> PeftModel:
        """Two adapters of rank 2 on a square linear, where LoRA's A and B have the shapes of ours."""
        torch.manual_seed(0)
        model = adapted(OneLayer(nn.Linear(8, 8)), config(r=2, lora_alpha=3, target_modules=["layer"]))
        return with_second(model, config(r=2, lora_alpha=5, target_modules=["layer"]))

    def delta(self, model: PeftModel, name: str = "mix") -> Tensor:
        layer = model.base_model.model.layer
        return (layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight).detach()

    @pytest.mark.parametrize("kind", KINDS)
    @both_spaces
    def test_as_lora_does(self, space: str, kind: str) -> None:
        deltas = []
        for config in (CONFIG[space], LoraConfig):
            model = self.model(config)
            torch.manual_seed(3)  # DARE drops at random
            model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "mix", kind, **self.KINDS[kind])  # type: ignore[arg-type]
            deltas.append(self.delta(model))
        torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("kind", ["cat", "svd"])
    @both_spaces
    def test_the_exact_ones_are_the_weighted_sum_of_phi_minus_identity(self, space: str, kind: str) -> None:
        model = self.model(CONFIG[space])
        expected = 0.7 * self.delta(model, "default") - 1.5 * self.delta(model, "second")
        model.add_weighted_adapter(["default", "second"], [0.7, -1.5], "mix", kind, **self.KINDS[kind])  # type: ignore[arg-type]
        torch.testing.assert_close(self.delta(model), expected, rtol=1e-4, atol=1e-5)
        # and it is an adapter like any other
        model.set_adapter("mix")
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
        out = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)


class TestScale:
    @both_spaces
    def test_rescale_adapter_scale_and_back(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        before = model(x)
        with rescale_adapter_scale(model, 0):
            torch.testing.assert_close(model(x), Mlp()(x))
        with rescale_adapter_scale(model, 0.5):
            half = model(x)
        assert torch.equal(model(x), before)
        smaller = adapted(Mlp(), CONFIG[space](r=2, lora_alpha=2, target_modules=TARGETS))
        torch.testing.assert_close(half, smaller(x), rtol=1e-5, atol=1e-5)

    @both_spaces
    def test_set_scale_as_on_a_lora_layer(self, space: str) -> None:
        model, x = two_adapters(space), mlp_batch()
        before = model(x)
        for layer in feature_layers(model):
            layer.set_scale("default", 0.5)  # relative to the adapter's own scaling
        half = model(x)
        smaller = adapted(Mlp(), CONFIG[space](r=2, lora_alpha=2, target_modules=TARGETS))
        torch.testing.assert_close(half, smaller(x), rtol=1e-5, atol=1e-5)
        for layer in feature_layers(model):
            layer.set_scale("default", 1.0)
            layer.scale_layer(3.0)
            layer.unscale_layer()
        assert torch.equal(model(x), before)


@both_spaces
def test_inject_adapter_in_model_keeps_the_models_class(space: str) -> None:
    model, x = Mlp(), mlp_batch()
    same = inject_adapter_in_model(CONFIG[space](r=2, target_modules=TARGETS), model)
    assert same is model
    torch.testing.assert_close(model(x), Mlp()(x))
    randomise(model)
    assert not torch.allclose(model(x), Mlp()(x))


@both_spaces
def test_unload_gives_the_base_back(space: str) -> None:
    base = two_adapters(space).unload()
    assert_same(base, weights(Mlp()))
    assert not feature_layers(base)
