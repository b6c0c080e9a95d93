"""Loading: what stock PEFT wrote loads; every kind of damage is told plainly, and the base stays as it was."""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
from torch import nn

import xadapt
from xadapt.version import __version__

Logits = Callable[[nn.Module], torch.Tensor]
TARGETS = ["q_proj", "v_proj"]


def trained(base: nn.Module, config: object) -> PeftModel:
    """An adapter that does something: every tensor of it random."""
    model = get_peft_model(base, config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def folder(llama_like: Callable[..., nn.Module], tmp_path: Path) -> Path:
    """A stock LoRA of the tiny Llama, saved by PEFT."""
    trained(llama_like(), LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.fixture
def refused(llama: nn.Module, logits: Logits) -> Callable[..., str]:
    """`refused(folder)` is the message of the ValueError; it also checks that the base was left alone."""

    def check(folder: Path, model: nn.Module = llama, **options: object) -> str:
        before, modules = logits(model), [name for name, _ in model.named_modules()]
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is what the tests are about)
            xadapt.load(model, folder, **options)
        assert torch.equal(logits(model), before)
        assert [name for name, _ in model.named_modules()] == modules
        assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
        return str(caught.value)

    return check


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
    def test_on_a_quantised_base(
        self, folder: Path, llama: nn.Module, logits: Logits, refused: Callable[..., str]
    ) -> None:
        torchao = pytest.importorskip("torchao.quantization", reason="torchao is an extra: pip install xadapt[quant]")
        torchao.quantize_(llama, torchao.Int8WeightOnlyConfig())
        weight = llama.get_submodule("model.layers.0.self_attn.q_proj").weight
        assert type(weight) is not nn.Parameter
        bare = logits(llama)
        edit_config(folder, r=2)
        assert "the base wants (2, 32), the adapter has (4, 32)" in refused(folder)
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


class TestTheFolder:
    def test_not_there(self, tmp_path: Path, refused: Callable[..., str]) -> None:
        assert "is not there" in refused(tmp_path / "adaptor")

    def test_a_file(self, folder: Path, refused: Callable[..., str]) -> None:
        assert "is a file" in refused(folder / "adapter_config.json")

    def test_without_a_config(self, folder: Path, refused: Callable[..., str]) -> None:
        (folder / "adapter_config.json").unlink()
        message = refused(folder)
        assert "no adapter_config.json" in message
        assert "adapter_model.safetensors" in message  # what it holds instead

    def test_config_is_no_json(self, folder: Path, refused: Callable[..., str]) -> None:
        (folder / "adapter_config.json").write_text('{"peft_type": "LO')
        assert "is not JSON" in refused(folder)

    def test_config_is_no_text(self, folder: Path, refused: Callable[..., str]) -> None:
        (folder / "adapter_config.json").write_bytes(b"\xff\xfe\x00")
        assert "is not JSON" in refused(folder)

    @pytest.mark.parametrize("content", ["{}", "[]", '{"peft_type": 3}'])
    def test_config_names_no_type(self, content: str, folder: Path, refused: Callable[..., str]) -> None:
        (folder / "adapter_config.json").write_text(content)
        assert "names no peft_type" in refused(folder)

    def test_unknown_type(self, folder: Path, refused: Callable[..., str]) -> None:
        edit_config(folder, peft_type="INPUT_ADDA")
        message = refused(folder)
        assert "No installed plug-in reads adapters of type 'INPUT_ADDA'" in message
        assert "Did you mean 'INPUT_ADA'?" in message
        assert "LORA" in message
        assert "install that package" in message

    def test_unknown_member_of_a_known_family(self, folder: Path, refused: Callable[..., str]) -> None:
        edit_config(folder, peft_type="INPUT_ADA_NOSUCHMETHOD")
        assert "No installed plug-in reads adapters of type 'INPUT_ADA_NOSUCHMETHOD'" in refused(folder)

    def test_a_subfolder_is_part_of_the_folder(self, folder: Path, refused: Callable[..., str]) -> None:
        assert "folder/subfolder" in refused(folder.parent, subfolder="adapter")


class TestTheVersion:
    @pytest.mark.parametrize("version", ["999.0.0", f"{__version__.split('.')[0]}.999.0", "1000.1.0.dev3"])
    def test_newer_is_refused(self, version: str, folder: Path, refused: Callable[..., str]) -> None:
        edit_config(folder, xadapt_version=version)
        message = refused(folder)
        assert f"written by xadapt {version}" in message
        assert "pip install -U xadapt" in message

    @pytest.mark.parametrize("version", ["0.0.1", __version__, __version__ + ".post9", None])
    def test_older_and_equal_load(
        self, version: str | None, llama_like: Callable[..., nn.Module], tmp_path: Path
    ) -> None:
        get_peft_model(llama_like(), xadapt.InputAdaConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
        edit_config(tmp_path, xadapt_version=version)
        assert isinstance(xadapt.load(llama_like(), tmp_path), PeftModel)

    @pytest.mark.parametrize("version", ["new", 3])
    def test_no_version_at_all(self, version: object, folder: Path, refused: Callable[..., str]) -> None:
        edit_config(folder, xadapt_version=version)
        assert "which is no version" in refused(folder)


class TestTheFields:
    @pytest.fixture
    def ours(self, llama_like: Callable[..., nn.Module], tmp_path: Path) -> Path:
        trained(llama_like(), xadapt.InputAdaConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "ours")
        return tmp_path / "ours"

    @pytest.mark.parametrize(("field", "meant"), [("tyi", "tie"), ("lora_alhpa", "lora_alpha")])
    def test_unknown_ones_are_refused(self, field: str, meant: str, ours: Path, refused: Callable[..., str]) -> None:
        edit_config(ours, **{field: 1})
        message = refused(ours)
        assert f"has a field {field!r}, which InputAdaConfig does not have. Did you mean {meant!r}?" in message

    @pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")  # PEFT's advice
    def test_those_of_a_newer_peft_are_its_own_to_judge(self, ours: Path, llama: nn.Module) -> None:
        edit_config(ours, peft_version="999.0.0", option_of_tomorrow=None)
        assert isinstance(xadapt.load(llama, ours), PeftModel)


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
        self, llama_like: Callable[..., nn.Module], tmp_path: Path, refused: Callable[..., str], logits: Logits
    ) -> None:
        model = trained(llama_like(), xadapt.OutputAdaConfig(r=4, target_modules=["embed_tokens"]))
        xadapt.save(model, tmp_path / "adapter", save_embedding_layers=True)
        message = refused(tmp_path / "adapter", llama_like(seed=5))
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


class TestTheTensors:
    def test_missing(self, folder: Path, refused: Callable[..., str]) -> None:
        (folder / "adapter_model.safetensors").unlink()
        assert "no adapter_model.safetensors" in refused(folder)

    def test_pickle_only(self, folder: Path, refused: Callable[..., str]) -> None:
        path = folder / "adapter_model.safetensors"
        torch.save(load_file(path), folder / "adapter_model.bin")
        path.unlink()
        message = refused(folder)
        assert "pickle" in message
        assert "save_pretrained" in message

    def test_cut_short(self, folder: Path, refused: Callable[..., str]) -> None:
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        assert "damaged or cut short" in refused(folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, value: float, folder: Path, refused: Callable[..., str]) -> None:
        def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"][3, 2] = value
            return tensors

        edit_tensors(folder, spoil)
        message = refused(folder)
        assert "1 of 8 tensors" in message
        assert "layers.1.self_attn.v_proj.lora_B" in message

    def test_of_a_wider_base(
        self, folder: Path, llama_like: Callable[..., nn.Module], refused: Callable[..., str]
    ) -> None:
        message = refused(folder, llama_like(hidden_size=64))
        assert "layers.0.self_attn.q_proj.lora_A.weight: the base wants (4, 64), the adapter has (4, 32)" in message

    def test_of_a_wider_base_in_feature_space(
        self, llama_like: Callable[..., nn.Module], tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        trained(llama_like(), xadapt.InputAdaConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path)
        message = refused(tmp_path, llama_like(hidden_size=64))
        assert "the base wants (4, 64), the adapter has (4, 32)" in message
        assert "layers.0.self_attn.q_proj" in message

    def test_of_a_deeper_base(
        self, folder: Path, llama_like: Callable[..., nn.Module], refused: Callable[..., str]
    ) -> None:
        message = refused(folder, llama_like(layers=1))
        assert "layers that this base lacks" in message
        assert "layers.1.self_attn.q_proj" in message

    def test_of_a_shallower_base(
        self, folder: Path, llama_like: Callable[..., nn.Module], refused: Callable[..., str]
    ) -> None:
        message = refused(folder, llama_like(layers=3))
        assert "lacks tensors for layers" in message
        assert "layers.2.self_attn.q_proj" in message

    def test_of_another_architecture(self, folder: Path, gpt2: nn.Module, refused: Callable[..., str]) -> None:
        assert "not found in the base model" in refused(folder, gpt2)

    def test_misfit_beside_a_good_adapter(
        self, folder: Path, llama_like: Callable[..., nn.Module], tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        wide = llama_like(hidden_size=64)
        trained(wide, LoraConfig(r=4, target_modules=TARGETS)).save_pretrained(tmp_path / "wide")
        model = xadapt.load(llama_like(hidden_size=64), tmp_path / "wide", "good")
        assert "the base wants (4, 64)" in refused(folder, model, adapter_name="bad")
        assert list(model.peft_config) == ["good"]


class TestTheCall:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
    @pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
    def test_cuda_is_absent(self, device: object, folder: Path, refused: Callable[..., str]) -> None:
        assert "no CUDA device" in refused(folder, torch_device=device)

    def test_no_device(self, folder: Path, refused: Callable[..., str]) -> None:
        assert "'cuda:1'" in refused(folder, torch_device="gpu0")

    def test_adapter_name_is_taken(self, folder: Path, llama: nn.Module, refused: Callable[..., str]) -> None:
        model = xadapt.load(llama, folder)
        assert "has an adapter 'default' already" in refused(folder, model)


@pytest.mark.parametrize("model", ["gpt2", None, nn.Linear], ids=repr)
def test_what_is_no_model(model: object, folder: Path) -> None:
    with pytest.raises(TypeError, match=r"load\(\) takes the base itself, an nn\.Module, got .*from_pretrained"):
        xadapt.load(model, folder)
