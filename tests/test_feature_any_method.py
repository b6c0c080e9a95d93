"""Every PEFT method that is hosted, in both spaces: it trains, comes back, merges, unmerges; the others say why not."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file
from torch import Tensor, nn

import xadapt
from tests.feature_models import (
    CONFIG,
    SPACES,
    Mlp,
    OneLayer,
    assert_same,
    attach,
    feature_layers,
    load,
    mlp_batch,
    train,
    weights,
)
from xadapt import InputAdaConfig, OutputAdaConfig, feature_space
from xadapt.peft_internals import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from xadapt_feature.hosts import HOSTS
from xadapt_feature.refusals import LORA_OPTIONS, PEFT_TYPES, WEIGHT_INITS

TARGETS = ["lin0", "lin1"]  # 16 → 32 with a bias, 32 → 24 without

# What a method needs to fit these widths; the others take r=4.
SETTINGS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, "init_r": 4, "target_r": 4},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 32, "random_loc_seed": 0},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2, "random_seed": 0},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"vector_length": 4, "num_vectors": 8, "topk": 2},
    "WAVEFT": {"n_frequency": 32, "random_loc_seed": 0},
}

# Those of them that do not start as the base.
NO_IDENTITY = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),  # PEFT's BOFT, where there is no CUDA
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor"),  # for the same reason
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # PEFT's SHiRA makes sparse tensors
]

every_method = pytest.mark.parametrize("method", HOSTS)
both_spaces = pytest.mark.parametrize("space", SPACES)


def peft_config(method: str, **options: Any) -> PeftConfig:
    """The PEFT method's own config, as a user of PEFT writes it."""
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
    takes_rank = "r" in {field.name for field in dataclasses.fields(cls)}
    settings = SETTINGS.get(method, {"r": 4} if takes_rank else {})
    return cls(**{"target_modules": TARGETS, **settings, **options})


def fresh(method: str, space: str) -> PeftModel:
    model = Mlp()
    torch.manual_seed(1)
    return attach(model, feature_space(peft_config(method), space)).eval()


def trained(method: str, space: str) -> PeftModel:
    model = fresh(method, space)
    train(model, mlp_batch(rows=16))
    return model


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@every_method
@both_spaces
class TestEveryMethod:
    def test_the_config_keeps_every_option_and_says_its_type(self, method: str, space: str) -> None:
        original = peft_config(method)
        before = copy.deepcopy(original)
        config = feature_space(original, space)
        assert isinstance(config, type(original))
        assert config.peft_type == f"{space.upper()}_ADA_{method}"
        assert config.space == space  # type: ignore[attr-defined]
        assert original == before
        for field in dataclasses.fields(original):
            if field.init and field.name not in ("peft_type", "peft_version"):
                assert getattr(config, field.name) == getattr(original, field.name), field.name

    def test_it_starts_as_the_base_unless_it_is_known_not_to(self, method: str, space: str) -> None:
        starts = torch.allclose(fresh(method, space)(mlp_batch()), Mlp()(mlp_batch()), atol=1e-5)
        assert starts == (method not in NO_IDENTITY)

    def test_it_trains(self, method: str, space: str) -> None:
        model, x = fresh(method, space), mlp_batch(rows=16)
        loss, base = model(x).pow(2).mean(), weights(Mlp())
        train(model, x, steps=40)  # DeLoRA's loss rises before it falls, also in PEFT
        assert model(x).pow(2).mean() < loss
        for name, parameter in model.base_model.model.named_parameters():
            bare = name.replace(".base_layer", "")
            if bare in base:
                assert not parameter.requires_grad
                assert torch.equal(parameter, base[bare])

    def test_saved_and_loaded(self, method: str, space: str, tmp_path: Path) -> None:
        model, x = trained(method, space), mlp_batch()
        model.save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            torch.manual_seed(99)  # nothing may hang on the seed of the one who loads
            loaded = load(Mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
            assert torch.equal(loaded(x), model(x))
            assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])

    def test_merge_unmerge_disable(self, method: str, space: str) -> None:
        model, x = trained(method, space), mlp_batch()
        before, expected, bare = weights(model), model(x), Mlp()(x)
        with model.disable_adapter():
            assert torch.equal(model(x), bare)
        model.merge_adapter()
        assert_close(model(x), expected)
        with model.disable_adapter():  # unmerges
            assert_close(model(x), bare)
        assert_same(model, before, atol=1e-6)
        assert_close(model(x), expected)
        plain = model.merge_and_unload(safe_merge=True)
        assert type(plain.lin0) is nn.Linear
        assert_close(plain(x), expected)

    def test_its_map_is_linear(self, method: str, space: str) -> None:
        """Φ(x) = x + Δx + c with nothing else to it, or Φ(I) would not say what it is."""
        (layer, _) = feature_layers(trained(method, space))
        x, y = torch.randn(2, 3, layer.features, generator=torch.Generator().manual_seed(0))
        zero = layer.phi(torch.zeros_like(x))
        assert_close(layer.phi(x + 2 * y) - zero, layer.phi(x) - zero + 2 * (layer.phi(y) - zero))

    def test_a_second_adapter(self, method: str, space: str) -> None:
        model, x = trained(method, space), mlp_batch()
        first = model(x)
        try:
            model.add_adapter("second", feature_space(peft_config(method), space))
        except ValueError as error:
            assert method == "ADALORA"  # takes one trainable adapter at a time
            assert "supports only 1 trainable adapter" in str(error)  # noqa: PT017
            return
        assert torch.equal(model(x), first)
        model.set_adapter("second")
        train(model, x)
        second = model(x)
        assert not torch.allclose(first, second, atol=1e-6)
        model.set_adapter("default")
        shares = method in ("UNILORA", "VBLORA")  # a bank of vectors for all adapters, which has been trained further
        assert shares or torch.equal(model(x), first)
        model.set_adapter("second")
        model.merge_adapter()
        assert_close(model(x), second)


DIAGONAL = {"IA3"}  # scales features one by one, by design


@every_method
@both_spaces
def test_it_moves_features_into_each_other(method: str, space: str) -> None:
    """What a method derives from its base weight may be next to nothing where that is an identity."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 32)
    model = attach(OneLayer(layer), feature_space(peft_config(method, target_modules=["layer"]), space))
    x, wanted = torch.randn(64, 32), torch.randn(32, 32) / 6
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        (model(x) - x @ wanted).square().mean().backward()
        optimizer.step()
    delta = feature_layers(model)[0].folded(["default"], torch.eye(32), None).matrix.tensor().detach()
    off_diagonal = delta - torch.diag(delta.diagonal())
    assert (off_diagonal.norm() > 0.2 * delta.norm()) == (method not in DIAGONAL)
    touched = (delta.abs().amax(1) > 1e-5).sum() / 32
    assert touched > 0.5, touched  # WaveFT's few frequencies leave some out, at random


class TestNames:
    """How the child that holds the hosted layer is called: transformers and PEFT's tuners go by parts of such names."""

    @every_method
    @both_spaces
    def test_it_starts_as_the_type_and_holds_no_prefix_of_pefts(self, method: str, space: str) -> None:
        (layer, _) = feature_layers(fresh(method, space))
        assert layer.phi_name.startswith(f"{space}_ada_{method.lower()}")
        stock = {t: prefix for t, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if "_ADA" not in t.value}
        assert not {t.value: prefix for t, prefix in stock.items() if prefix in layer.phi_name}

    @both_spaces
    def test_of_lora(self, space: str) -> None:
        (layer,) = feature_layers(attach(Mlp(), CONFIG[space](target_modules=["lin0"])))
        assert layer.phi_name == f"{space}_ada_phi"


class TestAdaLora:
    """Its tuner looks at the whole model: the orthogonality loss, the allocation of ranks, the resize on loading."""

    @pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT's, of each AdaLoRA that it loads
    @both_spaces
    def test_through_its_schedule(self, space: str, llama_like: Callable[..., nn.Module], tmp_path: Path) -> None:
        options: dict[str, Any] = {"init_r": 8, "target_r": 3, "tinit": 2, "tfinal": 3, "deltaT": 1, "total_step": 12}
        config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)
        model = attach(llama_like(), feature_space(config, space))
        ids = torch.arange(8)[None]
        tuner: Any = model.base_model

        bare_loss = model.get_base_model()(input_ids=ids, labels=ids).loss
        assert model(input_ids=ids, labels=ids).loss > bare_loss  # by the orthogonality loss

        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(1, 13):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            tuner.update_and_allocate(step)
        pattern = tuner.peft_config["default"].rank_pattern
        assert sum(map(sum, pattern.values())) == 3 * len(feature_layers(model))
        assert len({sum(kept) for kept in pattern.values()}) > 1

        model.eval()
        expected = model(ids).logits
        assert not torch.allclose(expected, llama_like()(ids).logits, atol=1e-3)
        xadapt.save(model, tmp_path / "adapter")
        shapes = {tensor.shape for tensor in load_file(tmp_path / "adapter/adapter_model.safetensors").values()}
        assert (8, 32) not in shapes  # resized to what was allocated
        for loaded in (xadapt.load(llama_like(), tmp_path / "adapter"), load(llama_like(), tmp_path / "adapter")):
            torch.testing.assert_close(loaded(ids).logits, expected)


class TestFeatureSpace:
    @both_spaces
    def test_a_lora_config_gives_the_config_of_the_space(self, space: str) -> None:
        config = feature_space(LoraConfig(r=3, lora_alpha=5, target_modules=["a"], use_rslora=True), space)
        assert type(config) is CONFIG[space]
        assert (config.r, config.lora_alpha, config.target_modules, config.use_rslora) == (3, 5, {"a"}, True)

    def test_options_are_added(self) -> None:
        config = feature_space(LoHaConfig(r=3, target_modules=["k", "v"]), "input", tie=r"[kv]$", r=5)
        assert (config.tie, config.r) == (r"[kv]$", 5)  # type: ignore[attr-defined]

    def test_tie_is_for_input_space(self) -> None:
        with pytest.raises(TypeError, match="unexpected keyword argument 'tie'"):
            feature_space(LoHaConfig(r=3, target_modules=["k"]), "output", tie="k")

    def test_a_misspelt_option(self) -> None:
        with pytest.raises(TypeError, match=r"InputLoHaConfig.*'alhpa'; Did you mean 'alpha'\?"):
            feature_space(LoHaConfig(target_modules=["k"]), "input", alhpa=3)

    def test_a_space_that_is_none(self) -> None:
        with pytest.raises(
            ValueError, match=r"space='in' is not a feature space; write space='input' or space='output'"
        ):
            feature_space(LoHaConfig(target_modules=["k"]), "in")

    @pytest.mark.parametrize("other", [{"r": 8}, "lora", None, LoHaConfig], ids=repr)
    def test_what_is_no_config(self, other: Any) -> None:
        with pytest.raises(TypeError, match=r"feature_space takes a PEFT config such as LoraConfig\(\.\.\.\), got"):
            feature_space(other, "input")

    def test_what_is_in_feature_space_already(self) -> None:
        for config in (InputAdaConfig(), OutputAdaConfig(), feature_space(LoHaConfig(), "input")):
            with pytest.raises(ValueError, match=rf"{type(config).__name__} acts in feature space already"):
                feature_space(config, "output")


class TestRefusals:
    @pytest.mark.parametrize("method", PEFT_TYPES)
    def test_a_method_without_such_a_form_is_named_with_the_reason(self, method: str) -> None:
        cls = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method)]
        config = cls.__new__(cls)  # some cannot be made without a whole set-up of their own
        config.peft_type = PeftType(method)
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            feature_space(config, "input")
        message = str(caught.value)
        assert message.startswith(f"{method} has no form in input space: {PEFT_TYPES[method]}.")
        assert "LOHA" in message

    def test_every_method_of_pefts_is_hosted_or_refused(self) -> None:
        ours = {f"{space}_ADA" for space in ("INPUT", "OUTPUT")} | {"HYBRID_ADA", "FULL_ADA", "LORAX"}
        stock = {str(t.value) for t in PEFT_TYPE_TO_CONFIG_MAPPING if not str(t.value).startswith(tuple(ours))}
        assert stock == {"LORA", *HOSTS, *PEFT_TYPES}

    @both_spaces
    @pytest.mark.parametrize("init", [*WEIGHT_INITS, "pissa_niter_4"])
    def test_an_initialisation_that_reads_the_weight(self, space: str, init: str) -> None:
        with pytest.raises(ValueError, match=rf"init_lora_weights='{init}' is refused in feature space: .*base weight"):
            CONFIG[space](target_modules=TARGETS, init_lora_weights=init)

    @both_spaces
    @pytest.mark.parametrize("option", LORA_OPTIONS)
    def test_an_option_that_means_nothing_on_the_identity(self, space: str, option: str) -> None:
        class Anything(dict):  # type: ignore[type-arg]
            """Some options are checked for attributes before we see them."""

            def __getattr__(self, name: str) -> Any:
                return None

        value: Any = Anything(a=1)
        with pytest.raises(ValueError, match=rf"{option} is refused in feature space: "):
            CONFIG[space](target_modules=TARGETS, **{option: value})
