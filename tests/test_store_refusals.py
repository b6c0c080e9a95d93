"""Loading: every kind of damage is told plainly, and the base stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.store_files import TARGETS, Logits, edit_config, edit_tensors, refusal, stock_lora, trained
from xadapt.version import __version__


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return stock_lora(tmp_path / "adapter")


@pytest.fixture
def refused(llama: nn.Module, logits: Logits) -> Callable[..., str]:
    """`refused(folder)` is the message of the ValueError; it also checks that the base was left alone."""

    def check(folder: Path, model: nn.Module = llama, **options: object) -> str:
        return refusal(folder, model, logits, **options)

    return check


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
