"""One adapted layer: its output is the formula written out, and the fast way computes what PEFT's code computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from tests.feature_models import (
    CONFIG,
    SPACES,
    TOLERANCE,
    OneLayer,
    adapted,
    base_layer,
    every_case,
    feature_layers,
    features_for,
    with_second,
)
from xadapt_feature import FeatureLayer

LINEARS = [(name, space) for name in ("linear", "linear without bias", "wide linear") for space in SPACES]


def make(name: str, space: str, dtype: torch.dtype = torch.float32, **options: Any) -> FeatureLayer:
    """An adapted layer with random A and B."""
    config = CONFIG[space](r=2, lora_alpha=3, target_modules=["layer"], **options)
    model = adapted(OneLayer(base_layer(name).to(dtype)), config, autocast_adapter_dtype=dtype != torch.float64)
    (layer,) = feature_layers(model)
    return layer.to(torch.float64) if dtype == torch.float64 else layer


def factors(layer: FeatureLayer, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def by_hand(layer: nn.Module, a: Tensor, b: Tensor, s: float, space: str) -> Callable[[Tensor], Tensor]:
    """The table of the architecture: W(x + sBAx) + b in input space, (I + sBA)(Wx + b) in output space."""

    def phi(z: Tensor) -> Tensor:  # along the last axis
        return z + s * (z @ a.T) @ b.T

    def on_channels(z: Tensor) -> Tensor:
        return phi(z.movedim(1, -1)).movedim(-1, 1)

    def base(x: Tensor) -> Tensor:
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", getattr(layer, "bias", None))
        if isinstance(layer, nn.Embedding):
            return weight[x]
        if isinstance(layer, Conv1D):
            return x @ weight + cast(Tensor, bias)
        if isinstance(layer, nn.Linear):
            y = x @ weight.T
            return y if bias is None else y + bias
        conv = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}[type(layer)]  # type: ignore[index]
        return conv(x, weight, bias, layer.stride, layer.padding, layer.dilation)

    act = on_channels if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else phi
    return (lambda x: base(act(x))) if space == "input" else (lambda x: act(base(x)))


def assert_close(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> None:
    tolerance = 2 * TOLERANCE[dtype or one.dtype]
    torch.testing.assert_close(one.to(other.dtype), other, rtol=tolerance, atol=tolerance)


def results(run: Callable[[Tensor], Tensor], x: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """The output, and the gradients of one fixed function of it with respect to x, A and B."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y = run(x)
    weighting = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).to(y)
    wanted = [*parameters, x] if x.requires_grad else list(parameters)
    return [y.detach(), *torch.autograd.grad((y * weighting).sum(), wanted)]


@pytest.mark.parametrize(("name", "space"), every_case())
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_output_and_all_gradients_are_those_of_the_formula(name: str, space: str, training: bool) -> None:
    layer = make(name, space).train(training)
    a, b = factors(layer)
    x = features_for(layer.base_layer)
    formula = by_hand(layer.base_layer, a, b, 3 / 2, space)
    for actual, expected in zip(results(layer, x, (a, b)), results(formula, x, (a, b)), strict=True):
        assert_close(actual, expected)
    assert not torch.allclose(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("name", "space"), every_case())
def test_a_fresh_adapter_changes_nothing(name: str, space: str) -> None:
    layer = make(name, space)
    nn.init.zeros_(factors(layer)[1])
    x = features_for(layer.base_layer)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize(("name", "space"), every_case())
def test_two_active_adapters_add(name: str, space: str) -> None:
    config = CONFIG[space](r=2, lora_alpha=3, target_modules=["layer"])
    other = CONFIG[space](r=3, lora_alpha=2, target_modules=["layer"])
    model = with_second(adapted(OneLayer(base_layer(name)), config), other)
    model.base_model.set_adapter(["default", "second"])
    (layer,) = feature_layers(model)
    (a1, b1), (a2, b2) = factors(layer), factors(layer, "second")
    together = by_hand(layer.base_layer, torch.cat([a1, a2]), torch.cat([3 / 2 * b1, 2 / 3 * b2], dim=1), 1.0, space)
    x = features_for(layer.base_layer)
    assert_close(layer(x), together(x))


class TestFused:
    """The common case runs in one autograd function; everything about it is as in PEFT's own code."""

    @pytest.mark.parametrize(("name", "space"), LINEARS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_values_and_gradients_are_those_of_pefts_code(self, name: str, space: str, dtype: torch.dtype) -> None:
        layer = make(name, space, dtype)
        a, b = factors(layer)
        x = features_for(layer.base_layer, batch=16).to(dtype)
        assert layer.fused(x) is not None
        slow = results(lambda z: layer.adapted(z, layer.base_layer, {}), x, (a, b))
        fast = results(layer, x, (a, b))
        for one, other in zip(fast, slow, strict=True):
            assert one.dtype == other.dtype
            scale = max(1.0, other.abs().max().item())
            assert_close(one / scale, other / scale, dtype)

    @pytest.mark.parametrize(("name", "space"), [*LINEARS, *(("Conv1D", space) for space in SPACES)])
    @pytest.mark.parametrize("rows", [1, 40])
    def test_gradcheck_of_both_backward_passes(self, name: str, space: str, rows: int) -> None:
        layer = make(name, space, torch.float64)
        a, b = (p.detach().clone().requires_grad_() for p in factors(layer))
        x = torch.randn(rows, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        prefix = f"{layer.phi_name}.lora_"

        def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            return torch.func.functional_call(
                layer, {f"{prefix}A.default.weight": a, f"{prefix}B.default.weight": b}, (x,)
            )

        assert torch.autograd.gradcheck(run, (x.requires_grad_(), a, b))
        assert torch.autograd.gradgradcheck(run, (x, a, b))

    @pytest.mark.parametrize(("name", "space"), LINEARS)
    @pytest.mark.parametrize("frozen", ["x", "a", "b", "ab"])
    def test_only_what_is_asked_for_gets_a_gradient(self, name: str, space: str, frozen: str) -> None:
        layer = make(name, space)
        a, b = factors(layer)
        x = features_for(layer.base_layer).requires_grad_()
        tensors = {"x": x, "a": a, "b": b}
        expected = dict(zip("xab", torch.autograd.grad(layer(x).sum(), [x, a, b]), strict=True))
        for one in frozen:
            tensors[one].requires_grad_(False)
        layer(x).sum().backward()
        for one, tensor in tensors.items():
            if one in frozen:
                assert tensor.grad is None
            else:
                assert_close(cast(Tensor, tensor.grad), expected[one])

    @pytest.mark.parametrize(("name", "space"), LINEARS)
    def test_in_mixed_dtypes(self, name: str, space: str) -> None:
        """A base in bf16 with the adapter in fp32, as PEFT makes it: the adapter's gradients come in fp32."""
        layer = make(name, space)
        layer.base_layer.to(torch.bfloat16)
        a, b = factors(layer)
        assert a.dtype == torch.float32
        x = features_for(layer.base_layer).to(torch.bfloat16)
        fast = results(layer, x, (a, b))
        slow = results(lambda z: layer.adapted(z, layer.base_layer, {}), x, (a, b))
        assert [t.dtype for t in fast] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
        for one, other in zip(fast, slow, strict=True):
            scale = max(1.0, other.abs().max().item())
            assert_close(one / scale, other / scale, torch.bfloat16)

    @pytest.mark.parametrize(("name", "space"), LINEARS)
    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
    def test_under_autocast(self, name: str, space: str, base: torch.dtype) -> None:
        layer = make(name, space)
        layer.base_layer.to(base)
        a, b = factors(layer)
        x = features_for(layer.base_layer)

        def in_autocast(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            def wrapped(z: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return run(z)

            return wrapped

        fast = results(in_autocast(layer), x, (a, b))
        slow = results(in_autocast(lambda z: layer.adapted(z, layer.base_layer, {})), x, (a, b))
        for one, other in zip(fast[1:], slow[1:], strict=True):
            assert one.dtype == other.dtype
        for one, other in zip(fast, slow, strict=True):
            scale = max(1.0, other.float().abs().max().item())
            assert_close(one.float() / scale, other.float() / scale, torch.bfloat16)

    @pytest.mark.parametrize("space", SPACES)
    @pytest.mark.parametrize("shape", [(6,), (1, 6), (0, 6), (2, 0, 6), (2, 3, 4, 6)])
    def test_any_leading_shape(self, space: str, shape: tuple[int, ...]) -> None:
        layer = make("linear", space)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert layer.fused(x) is not None
        assert layer(x).shape == (*shape[:-1], 5)
        assert_close(layer(x), by_hand(layer.base_layer, *factors(layer), 3 / 2, space)(x))

    @pytest.mark.parametrize("space", SPACES)
    def test_x_is_not_written_to(self, space: str) -> None:
        layer = make("linear", space)
        x = features_for(layer.base_layer)
        before = x.clone()
        layer(x).sum().backward()
        assert torch.equal(x, before)

    @pytest.mark.parametrize("space", SPACES)
    def test_an_x_that_is_no_contiguous_block(self, space: str) -> None:
        layer = make("linear", space)
        x = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
        assert_close(layer(x), by_hand(layer.base_layer, *factors(layer), 3 / 2, space)(x))

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}], ids=str)
    def test_what_is_not_the_common_case_goes_through_pefts_code(self, options: dict[str, Any]) -> None:
        layer = make("linear", "input", **options).train()
        assert layer.fused(features_for(layer.base_layer)) is None

    @pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own forward mode uses it
    @pytest.mark.parametrize("space", SPACES)
    def test_under_torch_func_and_forward_mode(self, space: str) -> None:
        layer = make("linear", space, torch.float64)
        x, t = torch.randn(2, 4, 6, dtype=torch.float64)
        assert layer.fused(x) is not None
        parameters = {name: p.detach() for name, p in layer.named_parameters() if "lora_" in name}

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return cast(Tensor, torch.func.functional_call(layer, parameters, (x,))).square().sum()

        by_func = torch.func.grad(loss)(parameters, x)
        loss(dict(layer.named_parameters()), x).backward()
        for name, gradient in by_func.items():
            torch.testing.assert_close(gradient, layer.get_parameter(name).grad)
        rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for name, gradient in rows.items():
            torch.testing.assert_close(gradient.sum(0), by_func[name])
        forward: Any = layer.forward
        expected = layer(x + t) - layer(x)
        bias = forward(torch.zeros_like(t))
        torch.testing.assert_close(torch.func.jvp(forward, (x,), (t,))[1], expected)
        torch.testing.assert_close(expected, layer(t) - bias)
        with torch.autograd.forward_ad.dual_level():
            y = layer(torch.autograd.forward_ad.make_dual(x, t))
            torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected)

    def test_a_hook_on_the_adapters_matrices_is_called(self) -> None:
        layer = make("linear", "input")
        seen = []
        layer.lora_A["default"].register_forward_hook(lambda *args: seen.append(args))
        layer(features_for(layer.base_layer))
        assert len(seen) == 1

    def test_a_hook_on_the_base_layer_is_called(self) -> None:
        for space in SPACES:
            layer = make("linear", space)
            seen: list[Tensor] = []
            layer.base_layer.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out))
            layer(features_for(layer.base_layer))
            assert len(seen) == 1

    @pytest.mark.parametrize("space", SPACES)
    def test_a_base_that_trains_gets_its_gradients(self, space: str) -> None:
        layer = make("linear", space)
        base = layer.base_layer.requires_grad_()
        x = features_for(base)
        parameters = (base.weight, base.bias, *factors(layer))
        formula = by_hand(base, *factors(layer), 3 / 2, space)
        for actual, expected in zip(results(layer, x, parameters), results(formula, x, parameters), strict=True):
            assert_close(actual, expected)


@pytest.mark.parametrize(("name", "space"), every_case())
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(name: str, space: str, reentrant: bool) -> None:
    layer = make(name, space, lora_dropout=0.3 if name == "linear" else 0.0).train()
    a, b = factors(layer)
    x = features_for(layer.base_layer)
    if reentrant and not x.is_floating_point():
        pytest.skip("re-entrant checkpointing wants an input that requires a gradient")
    gradients = []
    for run in (layer, lambda z: checkpoint(layer, z, use_reentrant=reentrant)):
        torch.manual_seed(0)  # of the dropout
        leaf = x.clone().requires_grad_(x.is_floating_point())
        layer.zero_grad()
        cast(Tensor, run(leaf)).pow(2).sum().backward()
        gradients.append([a.grad, b.grad, leaf.grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is None or torch.equal(plain, cast(Tensor, checkpointed))
