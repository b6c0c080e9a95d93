"""Bases that are in memory already, and quantised ones on disk and live."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.base_models import check, edit_config, error_of, saved, tied_llama, why_absent
from tests.conftest import make_gpt2, make_llama, make_unet
from xadapt.base import open_base
from xadapt.checkpoint import Checkpoint


class TestLive:
    @pytest.mark.parametrize("make", [make_llama, make_gpt2, make_unet, tied_llama])
    def test_a_model(self, make: Callable[..., nn.Module]) -> None:
        of_diffusers = make.__name__ == "make_unet"
        if of_diffusers:
            pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        model = make()
        base = open_base(model)
        check(base, model)
        assert base.module() is model
        assert base.library == ("diffusers" if of_diffusers else "transformers")
        assert base.revision is None
        assert type(model).__name__ in base.name
        assert base.config

    def test_any_module(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        base = open_base(model)
        check(base, model.eval())
        assert base.library == "torch"
        assert base.config == {}
        assert "0.weight" in why_absent(base, "0.wieght")
        assert base.weights().get("x") is None

    def test_tied_weights(self) -> None:
        model = open_base(tied_llama())
        assert model.tied("lm_head.weight") == ("model.embed_tokens.weight",)
        linear = nn.Linear(2, 2)
        assert open_base(nn.Sequential(linear, linear)).tied("0.bias") == ("1.bias",)
        shared = nn.Linear(2, 2)
        shared.weight = nn.Parameter(linear.weight.data)  # another parameter, the same memory
        assert open_base(nn.Sequential(linear, shared)).tied("0.weight") == ("1.weight",)

    def test_never_loaded(self) -> None:
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        assert "never loaded" in why_absent(open_base(model), "weight")

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_offloaded(self, where: str, tmp_path: Path) -> None:
        from accelerate import cpu_offload, disk_offload

        model = make_llama()
        device = torch.device("cpu")
        if where == "disk":
            disk_offload(model, tmp_path, execution_device=device)
        else:
            cpu_offload(model, execution_device=device)
        assert model.lm_head.weight.is_meta
        weights, state = open_base(model).weights(), make_llama().state_dict()
        assert list(weights) == list(state)
        assert all(torch.equal(weights[name], state[name]) for name in weights)
        assert model.lm_head.weight.is_meta

    def test_options_that_say_nothing(self) -> None:
        with pytest.raises(ValueError, match="loaded already"):
            open_base(make_llama()).module(dtype=torch.float16)
        for options in ({"component": "unet"}, {"revision": "main"}, {"variant": "fp16"}, {"allow_pickle": True}):
            assert "is open already" in error_of(make_llama(), **options)

    def test_with_adapters(self) -> None:
        assert "unload()" in error_of(get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])))

    def test_that_cannot_be_copied(self) -> None:
        model: Any = nn.Linear(2, 2)
        model.handle = (i for i in range(3))
        with pytest.raises(ValueError, match="cannot be copied"):
            open_base(model).skeleton()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchao, about torch and about itself
class TestQuantised:
    @pytest.fixture(scope="class")
    def quantised(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        pytest.importorskip("torchao", reason="torchao is an extra: pip install xadapt[quant]")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        plain = saved(make_llama(hidden_size=128), tmp_path_factory.mktemp("plain"))
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32, device_map="cpu"
        )
        return saved(model, tmp_path_factory.mktemp("torchao"), max_shard_size="100KB")

    def test_torchao_on_disk_and_live(self, quantised: Path) -> None:
        base = open_base(quantised)
        live = open_base(base.module())
        original = make_llama(hidden_size=128).state_dict()
        assert list(base.weights()) == list(live.weights()) == list(original)
        for name, tensor in original.items():
            weight = base.weights()[name]
            assert type(weight) is torch.Tensor
            assert weight.dtype == torch.float32
            assert torch.equal(weight, live.weights()[name])
            assert (weight - tensor).norm() < 0.02 * tensor.norm()
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(base.weights()[q_proj], original[q_proj])
        assert base.stored_name("model.norm.weight") == "model.norm.weight"
        with pytest.raises(ValueError, match="several tensors"):
            base.stored_name(q_proj)
        assert all(parameter.is_meta for parameter in base.skeleton().parameters())

    def test_torchao_damaged(self, quantised: Path, tmp_path: Path) -> None:
        shutil.copytree(quantised, tmp_path, dirs_exist_ok=True)
        for shard in Checkpoint.open(tmp_path).shards:
            metadata = dict(Checkpoint.open(tmp_path).metadata(shard))
            for name, text in metadata.items():
                metadata[name] = text.replace('"block_size"', '"blocks"').replace('"Int8Tensor"', '"Int9Tensor"')
            save_file(load_file(shard), shard, metadata)
        assert "not stored as torchao would" in why_absent(open_base(tmp_path), "model.layers.0.mlp.up_proj.weight")

    @pytest.mark.skipif(
        tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20),
        reason="transformers before 5.20 de-quantises fp8 for a whole model only",
    )
    @pytest.mark.filterwarnings("ignore")
    def test_fp8_in_blocks(self, tmp_path: Path) -> None:
        saved(make_llama(hidden_size=128), tmp_path)
        tensors, quantised = load_file(tmp_path / "model.safetensors"), {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and tensor.shape[0] % 64 == 0 and tensor.shape[1] % 64 == 0:
                blocks = tensor.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
                scale = blocks.abs().amax((1, 3), keepdim=True) / 448
                quantised[name] = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
                quantised[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        assert len(quantised) == 16
        save_file(tensors | quantised, tmp_path / "model.safetensors", {"format": "pt"})
        left_alone = ["up_proj", "gate_proj", "down_proj", "lm_head"]
        fp8 = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": left_alone}
        base = open_base(edit_config(tmp_path, quantization_config=fp8 | {"dequantize": True}))
        loaded = base.module().state_dict()
        assert set(base.weights()) == set(tensors)
        for name, tensor in tensors.items():
            weight = base.weights()[name]
            torch.testing.assert_close(weight, loaded[name], rtol=0, atol=0)
            assert (weight - tensor).norm() < 0.05 * tensor.norm()

    def test_other_schemes_are_refused_by_name(self, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path)
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[q_proj] = tensors[q_proj].to(torch.int8)
        del tensors["model.layers.0.self_attn.k_proj.weight"]  # GPTQ and AWQ have a qweight instead
        save_file(tensors, tmp_path / "model.safetensors")
        edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        base = open_base(tmp_path)
        assert "bitsandbytes (8 bits)" in why_absent(base, q_proj)
        assert "bitsandbytes (8 bits)" in why_absent(base, "model.layers.0.self_attn.k_proj.weight")
        assert torch.equal(base.weights()["model.norm.weight"], tensors["model.norm.weight"])
