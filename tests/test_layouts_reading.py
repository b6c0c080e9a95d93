"""LoRA files as others write them: what is read adds to every weight what stock loaders add, and nothing gets lost."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from diffusers import FluxPipeline, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers

from tests.conftest import make_llama, make_unet
from tests.feature_models import randomise
from tests.layout_models import (
    assert_same,
    deltas,
    live_deltas,
    make_clip,
    make_pipeline,
    random_lora,
)
from xadapt.layouts import LoraFile, PlainLora, minimal_config, read_lora, write_diffusers, write_peft

ATTN1 = "down_blocks_0_attentions_0_transformer_blocks_0_attn1"


def kohya_layer(name: str, inputs: int, outputs: int, rank: int = 4, alpha: float | None = 2.0) -> dict[str, Tensor]:
    layer = {
        f"{name}.lora_down.weight": torch.randn(rank, inputs),
        f"{name}.lora_up.weight": torch.randn(outputs, rank),
    }
    return layer if alpha is None else {**layer, f"{name}.alpha": torch.tensor(alpha)}


def to_kohya(lora: PlainLora, prefix: str, rename: Callable[[str], str] = str) -> dict[str, Tensor]:
    """As sd-scripts names and writes a LoRA: every layer its own alpha."""
    tensors = {}
    for path, layer in lora.layers().items():
        name = f"{prefix}_{rename(path).replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = layer["lora_A.weight"]
        tensors[f"{name}.lora_up.weight"] = layer["lora_B.weight"]
        tensors[f"{name}.alpha"] = torch.tensor(lora.scaling(path) * layer["lora_A.weight"].shape[0])
    return tensors


def clip_name(path: str) -> str:
    return path if path.startswith("text_") else f"text_model.{path}"


def to_sgm(path: str) -> str:
    """A layer of the SDXL-like U-Net of layout_models (two blocks of two layers) in SDXL's own code."""
    path = re.sub(r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)",
                  lambda m: f"input_blocks.{int(m[1]) * 3 + int(m[3]) + 1}.{int(m[2] == 'attentions')}", path)  # fmt: skip
    path = re.sub(r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)",
                  lambda m: f"output_blocks.{int(m[1]) * 3 + int(m[3])}.{int(m[2] == 'attentions')}", path)  # fmt: skip
    path = path.replace("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op")
    path = path.replace("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv")
    path = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle_block.{int(m[1]) * 2}", path)
    path = path.replace("mid_block.attentions.0", "middle_block.1")
    for ours, theirs in (("conv1", "in_layers.2"), ("conv2", "out_layers.3"), ("time_emb_proj", "emb_layers.1"),
                         ("conv_shortcut", "skip_connection"), ("time_embedding.linear_1", "time_embed.0"),
                         ("time_embedding.linear_2", "time_embed.2"), ("add_embedding.linear_1", "label_emb.0.0"),
                         ("add_embedding.linear_2", "label_emb.0.2"), ("conv_in", "input_blocks.0.0"),
                         ("conv_out", "out.2")):  # fmt: skip
        path = path.replace(ours, theirs)
    return path


def read(tensors: dict[str, Tensor], tmp_path: Path, **options: Any) -> LoraFile:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    return read_lora(tmp_path / "lora.safetensors", **options)


def modules_of(pipeline: Any, *names: str) -> dict[str, list[str]]:
    return {name: [path for path, _ in getattr(pipeline, name).named_modules()] for name in names}


class TestKohya:
    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_as_diffusers_loads_it(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        rename, te = (to_sgm, "te1") if family == "sdxl" else (str, "te")
        tensors = to_kohya(random_lora(pipeline.unet, alpha=3.0), "lora_unet", rename)
        tensors |= to_kohya(random_lora(pipeline.text_encoder, alpha=2.0), f"lora_{te}", clip_name)
        names = ["unet", "text_encoder"]
        if family == "sdxl":
            tensors |= to_kohya(random_lora(pipeline.text_encoder_2, ".*(_proj|fc1)", alpha=2.0), "lora_te2", clip_name)
            names.append("text_encoder_2")
        file = read(tensors, tmp_path, modules=modules_of(pipeline, *names))
        assert (file.layout, file.not_understood, sorted(file.components)) == ("kohya", (), sorted(names))
        pipeline.load_lora_weights(dict(tensors))
        for name in names:
            assert_same(deltas(file.components[name]), live_deltas(getattr(pipeline, name)))

    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_alphas_that_differ(self, family: str, tmp_path: Path) -> None:
        """diffusers 0.42 forgets those of attention layers and text encoders; sd-scripts does not, and neither do we."""
        pipeline = make_pipeline(family)
        lora, text = random_lora(pipeline.unet), random_lora(pipeline.text_encoder)
        rename = to_sgm if family == "sdxl" else str
        tensors = to_kohya(lora, "lora_unet", rename) | to_kohya(text, "lora_te1", clip_name)
        file = read(tensors, tmp_path, modules=modules_of(pipeline, "unet", "text_encoder"))
        assert_same(deltas(file.components["unet"]), deltas(lora), 1e-7)
        assert_same(deltas(file.components["text_encoder"]), deltas(text), 1e-7)
        assert file.components["unet"].config == lora.config

    def test_no_alpha_is_no_scaling(self, tmp_path: Path) -> None:
        file = read(kohya_layer(f"lora_unet_{ATTN1}_to_q", 16, 16, alpha=None), tmp_path)
        (path,) = file.components["unet"].layers()
        assert (path, file.components["unet"].scaling(path)) == (f"{ATTN1_PATH}.to_q", 1.0)

    def test_flux_as_diffusers_reads_it(self, tmp_path: Path) -> None:
        tensors = {
            **kohya_layer("lora_unet_double_blocks_3_img_attn_qkv", 16, 48, rank=6, alpha=2.0),
            **kohya_layer("lora_unet_double_blocks_3_txt_mlp_0", 16, 64, rank=3),
            **kohya_layer("lora_unet_single_blocks_37_linear1", 16, 21504, rank=8, alpha=4.0),
            **kohya_layer("lora_unet_single_blocks_37_modulation_lin", 16, 48),
            **kohya_layer("lora_te1_text_model_encoder_layers_0_self_attn_k_proj", 24, 24),
        }
        file = read(tensors, tmp_path)
        assert sorted(file.components) == ["text_encoder", "transformer"]
        stock = FluxPipeline.lora_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
        added = deltas(file.components["transformer"])
        assert len(added) == 3 + 1 + 4 + 1
        expected = {}
        for path in added:
            a, b = (stock[f"transformer.{path}.lora_{side}.weight"] for side in "AB")
            expected[path] = b @ a
        assert_same(added, expected)

    def test_flux_outside_the_blocks(self, tmp_path: Path) -> None:
        """diffusers' converter forgets their component, and the last layers' alphas."""
        tensors = kohya_layer("lora_unet_img_in", 16, 16) | kohya_layer("lora_unet_final_layer_linear", 16, 16)
        tensors |= kohya_layer("lora_unet_final_layer_adaLN_modulation_1", 16, 32)
        lora = read(tensors, tmp_path).components["transformer"]
        assert {path: lora.scaling(path) for path in lora.layers()} == {
            "x_embedder": 0.5,
            "proj_out": 0.5,
            "norm_out.linear": 0.5,
        }
        shift, scale = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"].chunk(2)
        assert torch.equal(lora.tensors["norm_out.linear.lora_B.weight"], torch.cat([scale, shift]))

    def test_dora(self, tmp_path: Path) -> None:
        tensors, name = kohya_layer(f"lora_unet_{ATTN1}_to_q", 16, 12), f"lora_unet_{ATTN1}_to_q.dora_scale"
        lora = read({**tensors, name: torch.ones(12, 1)}, tmp_path).components["unet"]
        assert lora.config.use_dora
        assert lora.tensors[f"{ATTN1_PATH}.to_q.lora_magnitude_vector"].shape == (12,)
        for scale in (torch.ones(1, 16), torch.ones(7, 1)):  # per input; of another layer
            with pytest.raises(ValueError, match=r"4 of 4 tensors.*dora_scale"):
                read({**tensors, name: scale}, tmp_path)
        plain = kohya_layer(f"lora_unet_{ATTN1}_to_k", 16, 12)
        mixed = read({**tensors, name: torch.ones(12, 1), **plain}, tmp_path, partial=True)
        assert list(mixed.components["unet"].layers()) == [f"{ATTN1_PATH}.to_k"]
        assert name in mixed.not_understood

    @pytest.mark.parametrize(
        "name",
        [
            "lora_unet_joint_blocks_0_x_block_attn_qkv",  # SD3, which diffusers does not convert
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "lora_unet_blocks_0_self_attn_q",  # Wan
            "lora_unet_add_embedding_linear_1",  # diffusers makes "add.embedding.linear" of it
            "lora_unet_double_blocks_19_img_attn_qkv",
            "lora_unet_single_blocks_0_linear1",  # of another width than FLUX
            "lora_prior_unet_to_q",
        ],
    )
    def test_what_is_not_understood_is_listed(self, name: str, tmp_path: Path) -> None:
        strange = kohya_layer(name, 16, 48)
        tensors = kohya_layer(f"lora_unet_{ATTN1}_to_q", 16, 16) | strange | {"extra.weight": torch.ones(2)}
        with pytest.raises(ValueError, match=f"4 of 7 tensors.*{name}.*partial=True"):
            read(tensors, tmp_path)
        file = read(tensors, tmp_path, partial=True)
        assert file.not_understood == tuple(sorted([*strange, "extra.weight"]))
        assert len(file.components["unet"].tensors) == 2
        with pytest.raises(ValueError, match="no LoRA of a layout"):
            read(strange, tmp_path, partial=True)

    def test_both_spellings_in_one_file(self, tmp_path: Path) -> None:
        """diffusers would drop those of SDXL's own code."""
        sgm = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
        tensors = kohya_layer(sgm, 16, 16) | kohya_layer("lora_unet_conv_in", 16, 16)
        other = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
        assert len(read(tensors, tmp_path).components["unet"].layers()) == 2
        with pytest.raises(ValueError, match="holds that layer twice"):
            read(tensors | kohya_layer(other, 16, 16), tmp_path)

    def test_another_base(self, tmp_path: Path) -> None:
        tensors = to_kohya(random_lora(make_unet(), ".*to_q"), "lora_unet")
        with pytest.raises(ValueError, match="24 of 24 tensors"):
            read(tensors, tmp_path, modules={"unet": ["conv_in"]})


ATTN1_PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


class TestDiffusers:
    def test_as_stock_diffusers_saves_it(self, tmp_path: Path) -> None:
        pipeline = make_pipeline("sd15")
        config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "conv1"], alpha_pattern={"conv1": 3})
        text_config = LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "fc1"], use_rslora=True)
        for model, one in ((pipeline.unet, config), (pipeline.text_encoder, text_config)):
            model.add_adapter(one)
            randomise(model, std=0.1)
        StableDiffusionPipeline.save_lora_weights(
            tmp_path,
            unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
            text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
            unet_lora_adapter_metadata=config.to_dict(),
            text_encoder_lora_adapter_metadata=text_config.to_dict(),
        )
        file = read_lora(tmp_path, modules=modules_of(pipeline, "unet", "text_encoder"))
        for name in ("unet", "text_encoder"):
            assert_same(deltas(file.components[name]), live_deltas(getattr(pipeline, name)))
        assert set(file.components["unet"].config.target_modules) == {"to_q", "conv1"}

    def test_without_metadata_there_is_no_scaling(self, tmp_path: Path) -> None:
        lora = random_lora(make_unet(), ".*to_q")
        tensors = {f"unet.{name}": tensor for name, tensor in lora.tensors.items()}
        file = read(tensors, tmp_path)
        unet = make_unet()
        unet.load_lora_adapter(dict(tensors), prefix="unet")
        assert_same(deltas(file.components["unet"]), live_deltas(unet))

    def test_older_spellings(self, tmp_path: Path) -> None:
        lora, text = random_lora(make_unet(), f"{ATTN1_PATH}.*"), random_lora(make_clip(True), ".*(q_proj|fc1)")
        middle = {f"text_encoder.{k}": v for k, v in convert_state_dict_to_diffusers(dict(text.tensors)).items()}
        middle |= {f"unet.{k.replace('lora_A', 'lora.down').replace('lora_B', 'lora.up')}": v
                   for k, v in lora.tensors.items()}  # fmt: skip
        oldest = {}
        for name, tensor in lora.tensors.items():
            layer, _, side = name.removeprefix(ATTN1_PATH).removesuffix(".weight").rpartition(".lora_")
            layer = layer.replace(".to_out.0", ".to_out").replace(".", ".processor.")
            oldest[f"unet.{ATTN1_PATH}{layer}_lora.{'down' if side == 'A' else 'up'}.weight"] = tensor
        for tensors in (middle, oldest):
            file = read(tensors, tmp_path)
            assert file.components["unet"].tensors.keys() == lora.tensors.keys()
        assert read(middle, tmp_path).components["text_encoder"].tensors.keys() == text.tensors.keys()

    def test_alphas_beside_the_layers(self, tmp_path: Path) -> None:
        lora = random_lora(make_unet(), ".*to_q")
        tensors = {f"unet.{name}": tensor for name, tensor in lora.tensors.items()}
        tensors |= {f"unet.{p}.alpha": torch.tensor(float(a)) for p, (_, a) in lora.ranks_and_alphas().items()}
        assert_same(deltas(read(tensors, tmp_path).components["unet"]), deltas(lora))
        with pytest.raises(ValueError, match=r"1 of \d+ tensors.*unet.gone.alpha"):
            read({**tensors, "unet.gone.alpha": torch.tensor(1.0)}, tmp_path)

    def test_no_component(self, tmp_path: Path) -> None:
        unet = make_unet()
        unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=["to_q"]))
        randomise(unet, std=0.1)
        unet.save_lora_adapter(tmp_path)
        assert_same(deltas(read_lora(tmp_path).components[""]), live_deltas(unet))


class TestPeft:
    @pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
    def test_folder(self, options: dict[str, Any], tmp_path: Path) -> None:
        model = get_peft_model(make_llama(), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **options))
        randomise(model, std=0.1)
        model.save_pretrained(tmp_path)
        for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
            file = read_lora(path, modules={"": [name for name, _ in make_llama().named_modules()]})
            assert file.layout == "peft"
            assert file.components[""].config.task_type == "CAUSAL_LM"
            assert_same(deltas(file.components[""]), live_deltas(model.base_model.model))

    def test_refusals(self, tmp_path: Path) -> None:
        get_peft_model(make_llama(), LoHaConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "loha")
        with pytest.raises(ValueError, match="'LOHA', no plain LoRA"):
            read_lora(tmp_path / "loha")
        write_peft(random_lora(make_llama(), ".*q_proj"), tmp_path / "lora")
        config = tmp_path / "lora" / "adapter_config.json"
        text = json.loads(config.read_text())
        for change, message in (
            ({"init_lora_weights": "pissa"}, "changes the base's weights"),
            ({"target_parameters": ["w"]}, "target_parameters"),
            ({"r": 3, "rank_pattern": {}}, "but its config says 3"),
            ({"r": "x"}, "cannot be used"),
            ({"r": float("inf")}, "cannot be used"),
            ({"rank_pattern": {"(": 2}}, "cannot be used"),
        ):
            config.write_text(json.dumps({**text, **change}))
            with pytest.raises(ValueError, match=message):
                read_lora(tmp_path / "lora")
        config.write_text("{")
        with pytest.raises(ValueError, match="is not JSON"):
            read_lora(tmp_path / "lora")
        config.unlink()
        with pytest.raises(ValueError, match=r"no adapter_config\.json"):
            read_lora(tmp_path / "lora")


class TestBadFiles:
    NAME = f"lora_unet_{ATTN1}_to_q"

    @pytest.mark.parametrize("end", ["hada_w1_a", "lokr_w1", "diff"])
    def test_other_methods(self, end: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is no LoRA, but (LoHa|LoKr|a full difference)"):
            read({f"{self.NAME}.{end}": torch.ones(2, 2), f"{self.NAME}.alpha": torch.tensor(1.0)}, tmp_path)

    def test_layers(self, tmp_path: Path) -> None:
        whole = kohya_layer(self.NAME, 16, 16)
        for change, message in (
            ({f"{self.NAME}.lora_up.weight": torch.ones(16, 3)}, "make no LoRA"),
            ({f"{self.NAME}.lora_up.weight": torch.full((16, 4), torch.inf)}, "NaN or infinity"),
            ({f"{self.NAME}.alpha": torch.ones(3)}, "should be one number"),
            ({f"{self.NAME}.lora_up.weight": torch.ones(16, 4, dtype=torch.int8)}, "floating point"),
        ):
            with pytest.raises(ValueError, match=message):
                read({**whole, **change}, tmp_path)
        for end, present in (("up", "lora_A"), ("down", "lora_B")):
            half = {name: tensor for name, tensor in whole.items() if f"lora_{end}" not in name}
            with pytest.raises(ValueError, match=f"{present}.weight but no lora_"):
                read(half, tmp_path)
        with pytest.raises(ValueError, match="but no lora_B"):
            read({"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, tmp_path)

    def test_files(self, tmp_path: Path) -> None:
        path = write_diffusers({"unet": random_lora(make_unet(), ".*to_q")}, tmp_path / "lora.safetensors")
        whole = path.read_bytes()
        for cut in (4, 40, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match="damaged or cut short"):
                read_lora(path)
        header = b'{"a.lora_A.weight":{"dtype":"F32","shape":[1,1],"data_offsets":[0,4]}'
        header += header.replace(b"{", b",", 1) + b"}"
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(ValueError, match="twice in its header"):
            read_lora(path)
        save_file({"unet.a.lora_A.weight": torch.ones(1, 1)}, path, metadata={"lora_adapter_metadata": "{"})
        with pytest.raises(ValueError, match="is not JSON"):
            read_lora(path)
        with pytest.raises(ValueError, match="is not there"):
            read_lora(tmp_path / "gone")
        save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"holds lora\.safetensors, other\.safetensors"):
            read_lora(tmp_path)

    def test_pickles(self, tmp_path: Path) -> None:
        path = tmp_path / "lora.bin"
        torch.save(kohya_layer(self.NAME, 16, 16), path)
        with pytest.raises(ValueError, match="is a pickle"):
            read_lora(path)
        assert len(read_lora(path, allow_pickle=True).components["unet"].tensors) == 2
        torch.save({"a": nn.Linear(2, 2)}, path)
        with pytest.raises(ValueError, match="tensors alone"):
            read_lora(path, allow_pickle=True)
        torch.save([1], path)
        with pytest.raises(ValueError, match="no LoRA file"):
            read_lora(path, allow_pickle=True)

    def test_without_diffusers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "diffusers.loaders.lora_pipeline", None)
        with pytest.raises(ValueError, match=r"pip install 'xadapt\[diffusers\]'"):
            read(kohya_layer(self.NAME, 16, 16), tmp_path)
        plain = {"unet.conv_in.lora_A.weight": torch.ones(2, 2), "unet.conv_in.lora_B.weight": torch.ones(2, 2)}
        assert read(plain, tmp_path).components

    def test_a_plain_lora_of_strange_names(self) -> None:
        with pytest.raises(ValueError, match=r"No LoRA tensors: a\.weight"):
            PlainLora(minimal_config({"a": (1, 1)}), {"a.weight": torch.ones(1)}).layers()


def test_half_precision_comes_as_it_is(tmp_path: Path) -> None:
    tensors = kohya_layer("lora_unet_double_blocks_0_img_attn_qkv", 16, 48, rank=3, alpha=1.0)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    lora = read(tensors, tmp_path).components["transformer"]
    assert {tensor.dtype for tensor in lora.tensors.values()} == {torch.bfloat16}
    assert torch.equal(
        lora.tensors["transformer_blocks.0.attn.to_k.lora_B.weight"],
        tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][16:32],
    )
    assert load_file(tmp_path / "lora.safetensors")
