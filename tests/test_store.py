"""Loading: what stock PEFT wrote loads, and the weights of the base stay its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.store_files import TARGETS, Logits, edit_config, edit_tensors, refusal, stock_lora, trained


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stock_lora(tmp_path / "adapter")


class TestWhatLoads:
    def test_a_stock_lora(self, llama_like: Callable[..., nn.Module], tmp_path: Path, logits: Logits) -> None:
        model = trained(llama_like(), LoraConfig(r=4, target_modules=TARGETS))
        model.save_pretrained(tmp_path)
        loaded = xadapt.load(llama_like(), tmp_path)
        assert isinstance(loaded, PeftModel)
        assert not torch.allclose(logits(loaded), logits(llama_like()))
        torch.testing.assert_close(logits(loaded), logits(model))

    @pytest.mark.parametrize("name", ["InputAdaConfig", "OutputAdaConfig"])
    def test_an_adapter_in_feature_space(
        self, name: str, llama_like: Callable[..., nn.Module], tmp_path: Path, logits: Logits
    ) -> None:
        model = trained(llama_like(), getattr(xadapt, name)(r=4, target_modules=TARGETS))
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(logits(xadapt.load(llama_like(), tmp_path)), logits(model))

    def test_a_second_adapter_beside_the_first(self, folder: Path, llama: nn.Module, logits: Logits) -> None:
        model = xadapt.load(llama, folder, "first")
        first = logits(model)
        edit_tensors(folder, lambda tensors: {name: -2 * tensor for name, tensor in tensors.items()})
        assert xadapt.load(model, folder, "second") is model
        torch.testing.assert_close(logits(model), first)
        model.set_adapter("second")
        assert not torch.allclose(logits(model), first)

    def test_trainable_and_without_memory_for_a_second_copy(self, folder: Path, llama: nn.Module) -> None:
        model = xadapt.load(llama, folder, is_trainable=True, low_cpu_mem_usage=True, torch_device="cpu")
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trainable
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}

    def test_a_text_to_image_base(
        self, unet: nn.Module, tmp_path: Path, noise: Callable[[nn.Module], torch.Tensor]
    ) -> None:
        bare = noise(unet)
        model = trained(unet, LoraConfig(r=2, target_modules=["to_k", "to_v", "conv1"]))
        model.save_pretrained(tmp_path)
        adapted = noise(model)
        base = model.unload()
        torch.testing.assert_close(noise(base), bare)
        torch.testing.assert_close(noise(xadapt.load(base, tmp_path)), adapted)

    @pytest.mark.parametrize(
        ("method", "options"),
        [
            pytest.param(AdaLoraConfig, {"total_step": 10}, id="adalora"),
            pytest.param(IA3Config, {"feedforward_modules": ["v_proj"]}, id="ia3"),
            pytest.param(LoraConfig, {"use_dora": True}, id="dora"),
            pytest.param(LoraConfig, {"init_lora_weights": "pissa"}, id="reads-the-base-weight"),
            pytest.param(LoraConfig, {"modules_to_save": ["lm_head"]}, id="whole-modules"),
            pytest.param(LoraConfig, {"trainable_token_indices": [1, 2]}, id="token-rows"),
            pytest.param(LoraConfig, {"target_modules": ["embed_tokens"]}, id="embedding-saved-with-it"),
            pytest.param(LoraConfig, {"layer_replication": [[0, 2], [1, 2]]}, id="replicated"),
            pytest.param(VeraConfig, {"target_modules": ["q_proj"], "save_projection": False}, id="partly-saved"),
            pytest.param(VBLoRAConfig, {"num_vectors": 16, "vector_length": 4, "topk": 2}, id="shared"),
        ],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's advice on these options, not ours to test
    def test_whatever_stock_peft_loads(
        self,
        method: Callable[..., PeftConfig],
        options: dict[str, object],
        llama_like: Callable[..., nn.Module],
        tmp_path: Path,
        logits: Logits,
    ) -> None:
        torch.manual_seed(0)
        model = get_peft_model(llama_like(), method(**{"target_modules": TARGETS} | options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.eval().save_pretrained(tmp_path)
        adapted = logits(model)
        assert not torch.allclose(adapted, logits(llama_like()))
        torch.testing.assert_close(logits(xadapt.load(llama_like(), tmp_path)), adapted)

    @pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated without")  # nothing is merged here
    def test_on_a_quantised_base(self, folder: Path, llama: nn.Module, logits: Logits) -> None:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is an extra: pip install xadapt[quant]")
        torchao.quantize_(llama, torchao.Int8WeightOnlyConfig())
        weight = llama.get_submodule("model.layers.0.self_attn.q_proj").weight
        assert type(weight) is not nn.Parameter
        bare = logits(llama)
        edit_config(folder, r=2)
        assert "the base wants (2, 32), the adapter has (4, 32)" in refusal(folder, llama, logits)
        edit_config(folder, r=4)
        model = xadapt.load(llama, folder)
        assert not torch.allclose(logits(model), bare)
        assert model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer").weight is weight

    def test_a_prompt_which_touches_no_layer(self, llama: nn.Module, tmp_path: Path) -> None:
        from peft import PromptTuningConfig

        get_peft_model(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(tmp_path)
        assert xadapt.load(llama, tmp_path).active_peft_config.num_virtual_tokens == 3

    def test_a_base_that_cannot_be_copied_is_loaded_without_a_rehearsal(
        self, folder: Path, llama: nn.Module, logits: Logits
    ) -> None:
        bare = logits(llama)
        vars(llama)["handle"] = sys.stdout  # no deepcopy takes an open file
        assert not torch.allclose(logits(xadapt.load(llama, folder)), bare)

    def test_in_a_process_that_has_imported_nothing_yet(
        self, llama_like: Callable[..., nn.Module], tmp_path: Path, run_python: Callable[..., str]
    ) -> None:
        base = llama_like()
        base.save_pretrained(tmp_path / "base")
        trained(base, xadapt.InputAdaConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
        printed = run_python(
            "from transformers import AutoModelForCausalLM\n"
            "import xadapt\n"
            f"model = xadapt.load(AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r}), {str(tmp_path / 'adapter')!r})\n"
            "print(model.active_peft_config.peft_type.value)"
        )
        assert printed.split()[-1] == "INPUT_ADA"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
class TestWeightsOfTheBase:
    """An adapter in feature space leaves the base's weights alone, also where it adapts the embeddings."""

    @pytest.mark.parametrize("target_modules", [["embed_tokens"], ["lm_head"], ".*(lm_head|embed_tokens)"], ids=str)
    def test_are_not_saved(
        self, target_modules: object, llama_like: Callable[..., nn.Module], tmp_path: Path, logits: Logits
    ) -> None:
        config = xadapt.OutputAdaConfig(r=4, target_modules=target_modules)
        model = trained(llama_like(), config)
        model.save_pretrained(tmp_path / "peft")
        injected = llama_like()
        injected.add_adapter(xadapt.OutputAdaConfig(r=4, target_modules=target_modules))
        injected.save_pretrained(tmp_path / "transformers")
        for folder in (xadapt.save(model, tmp_path / "ours"), tmp_path / "peft", tmp_path / "transformers"):
            assert not [name for name in load_file(folder / "adapter_model.safetensors") if "base_layer" in name]
        torch.testing.assert_close(logits(xadapt.load(llama_like(), tmp_path / "ours")), logits(model))
        sibling = llama_like(seed=5)
        before = {name: tensor.clone() for name, tensor in sibling.state_dict().items()}
        carried = xadapt.load(sibling, tmp_path / "ours").unload()
        assert all(torch.equal(carried.state_dict()[name], tensor) for name, tensor in before.items())

    def test_are_saved_where_asked_for_and_refused_on_another_base(
        self, llama_like: Callable[..., nn.Module], tmp_path: Path, logits: Logits
    ) -> None:
        model = trained(llama_like(), xadapt.OutputAdaConfig(r=4, target_modules=["embed_tokens"]))
        xadapt.save(model, tmp_path / "adapter", save_embedding_layers=True)
        message = refusal(tmp_path / "adapter", llama_like(seed=5), logits)
        assert "holds the weights of its source's model.embed_tokens" in message
        assert "save_embedding_layers=False" in message
        for dtype in (torch.float32, torch.bfloat16):  # on its own base, rounded or not
            loaded = xadapt.load(llama_like().to(dtype), tmp_path / "adapter")
        again = xadapt.load(xadapt.load(llama_like(), tmp_path / "adapter"), tmp_path / "adapter", "second")
        assert list(again.peft_config) == ["default", "second"]
        torch.testing.assert_close(logits(again), logits(model))
        assert loaded.dtype == torch.bfloat16

    def test_are_saved_where_the_vocabulary_was_resized(
        self, llama_like: Callable[..., nn.Module], tmp_path: Path
    ) -> None:
        llama_like().save_pretrained(tmp_path / "base")
        base = llama_like().from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(70)
        model = get_peft_model(base, xadapt.OutputAdaConfig(r=4, target_modules=["embed_tokens"]))
        with pytest.warns(UserWarning, match="has been resized during finetuning"):
            xadapt.save(model, tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert "base_model.model.model.embed_tokens.base_layer.weight" in names
