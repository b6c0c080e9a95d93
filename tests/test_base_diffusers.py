"""Bases of diffusers: components and pipelines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.base_models import check, edit_config, error_of, rename_tensors, saved
from tests.conftest import make_llama, make_unet
from xadapt.base import open_base


class TestDiffusers:
    @pytest.fixture
    def unet_folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        return saved(make_unet(), tmp_path / "unet")

    @pytest.fixture
    def pipeline(self, unet_folder: Path, tmp_path: Path) -> Path:
        saved(make_llama(), tmp_path / "text_encoder")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "LlamaForCausalLM"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    def test_a_folder(self, unet_folder: Path) -> None:
        base = open_base(unet_folder)
        check(base, make_unet())
        assert base.library == "diffusers"
        loaded = base.module(dtype=torch.float16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}

    def test_shards(self, unet_folder: Path) -> None:
        shutil.rmtree(unet_folder)
        check(open_base(saved(make_unet(), unet_folder, max_shard_size="100KB")), make_unet())
        assert (unet_folder / "diffusion_pytorch_model.safetensors.index.json").is_file()

    def test_old_attention_names(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
        saved(vae, tmp_path)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename(name: str) -> str:
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
            return name

        rename_tensors(tmp_path, rename, "diffusion_pytorch_model.safetensors")
        base = open_base(tmp_path)
        assert base.stored_name("decoder.mid_block.attentions.0.to_q.weight").endswith("query.weight")
        state = vae.state_dict()
        assert list(base.weights()) == list(state)
        assert all(torch.equal(base.weights()[name], state[name]) for name in state)

    def test_components(self, pipeline: Path) -> None:
        unet = open_base(pipeline, component="unet")
        check(unet, make_unet())
        assert unet.name == f"{pipeline}/unet"
        check(open_base(pipeline, component="text_encoder"), make_llama())

    def test_components_that_are_not_there(self, pipeline: Path) -> None:
        assert "Known: unet, text_encoder." in error_of(pipeline)
        assert "Did you mean 'unet'?" in error_of(pipeline, component="net")
        for component in ("vae", "scheduler", "safety_checker", "../elsewhere", "_class_name"):
            assert "no component" in error_of(pipeline, component=component)
        assert "leave component out" in error_of(pipeline / "unet", component="unet")

    def test_classes_that_diffusers_lacks(self, unet_folder: Path) -> None:
        for name in ("MyUNet", "StableDiffusionPipeline", "DDIMScheduler", 3, ["UNet2DConditionModel"]):
            edit_config(unet_folder, _class_name=name)
            assert "no model of diffusers" in error_of(unet_folder)
        edit_config(unet_folder, _class_name="MyUNet", auto_map={"AutoModel": "mine.MyUNet"})
        assert "trust_remote_code" in error_of(unet_folder)

    def test_a_pipeline_that_is_live(self, unet: nn.Module) -> None:
        class Pipeline:
            components = {"unet": unet, "scheduler": None}  # noqa: RUF012 (as diffusers has it)

        with pytest.raises(TypeError, match=r"pipeline\.unet"):
            open_base(Pipeline())
