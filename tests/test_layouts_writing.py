"""LoRA files we write: stock PEFT and stock diffusers load them, and add to every weight what the LoRA adds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from diffusers import AuraFlowTransformer2DModel, FluxPipeline

from tests.conftest import make_gpt2, make_llama, make_unet
from tests.feature_models import randomise
from tests.layout_models import (
    adaptable,
    assert_same,
    deltas,
    live_deltas,
    make_clip,
    make_flux,
    make_pipeline,
    random_lora,
)
from tests.test_integration_diffusers import make_sd3
from xadapt import export_lora
from xadapt.layouts import PlainLora, minimal_config, read_lora, write_diffusers, write_kohya, write_peft

COMPONENTS = {
    "sd15": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
CLIP_LAYERS = r".*(_proj|fc1)"  # text_projection among them
Writer = Callable[..., Path]


def loras_for(pipeline: Any, family: str) -> dict[str, PlainLora]:
    return {
        component: random_lora(getattr(pipeline, component), CLIP_LAYERS if "text" in component else ".*")
        for component in COMPONENTS[family]
    }


def rebased(lora: PlainLora, tensors: dict[str, Tensor], **options: Any) -> PlainLora:
    return PlainLora(minimal_config(lora.ranks_and_alphas(), **options), tensors)


class TestPeft:
    @pytest.mark.parametrize("make", [make_llama, make_unet, make_clip])
    def test_stock_peft_loads_it(self, make: Callable[[], nn.Module], tmp_path: Path) -> None:
        lora = random_lora(make())
        folder = write_peft(lora, tmp_path / "lora")
        model = PeftModel.from_pretrained(make(), folder)
        assert_same(live_deltas(model.base_model.model), deltas(lora))

    def test_it_is_what_peft_writes(self, tmp_path: Path) -> None:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], use_dora=True)
        model = get_peft_model(make_llama(), config)
        randomise(model, std=0.1)
        model.save_pretrained(tmp_path / "stock")
        lora = read_lora(tmp_path / "stock").components[""]
        write_peft(lora, tmp_path / "ours")
        stock, ours = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("stock", "ours"))
        assert stock.keys() == ours.keys()
        assert all(torch.equal(stock[name], ours[name]) for name in stock)
        one, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("stock", "ours"))
        differ = {key for key in one if one[key] != other[key]}
        assert differ <= {"target_modules"}  # full paths: no base was given to shorten them by

    def test_embeddings_and_conv1d(self, tmp_path: Path, logits: Callable[[nn.Module], Tensor]) -> None:
        config = LoraConfig(r=4, lora_alpha=3, target_modules=["wte", "c_attn"], fan_in_fan_out=True)
        model = get_peft_model(make_gpt2(), config)
        randomise(model, std=0.1)
        model.eval().save_pretrained(tmp_path / "stock", save_embedding_layers=False)
        names = [name for name, _ in make_gpt2().named_modules()]
        lora = read_lora(tmp_path / "stock", modules={"": names}).components[""]
        assert set(lora.config.target_modules) == {"wte", "c_attn"}
        again = PeftModel.from_pretrained(make_gpt2(), write_peft(lora, tmp_path / "ours"))
        assert torch.allclose(logits(again), logits(model), atol=1e-6)

    def test_targets_that_miss_a_layer(self, tmp_path: Path) -> None:
        lora = random_lora(make_llama(), ".*(q|v)_proj")
        config = minimal_config(lora.ranks_and_alphas())
        config.target_modules = ["q_proj"]
        with pytest.raises(ValueError, match=r"do not match 2 layers.*v_proj"):
            write_peft(PlainLora(config, lora.tensors), tmp_path / "lora")

    def test_a_rank_the_config_does_not_say(self, tmp_path: Path) -> None:
        lora = random_lora(make_llama(), ".*q_proj")
        with pytest.raises(ValueError, match="its config says 9"):
            write_peft(PlainLora(LoraConfig(r=9, target_modules=["q_proj"]), lora.tensors), tmp_path / "lora")


class TestDiffusers:
    @pytest.mark.parametrize("family", COMPONENTS)
    def test_stock_diffusers_loads_it(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        loras = loras_for(pipeline, family)
        pipeline.load_lora_weights(write_diffusers(loras, tmp_path / "lora.safetensors"))
        for component, lora in loras.items():
            assert_same(live_deltas(getattr(pipeline, component)), deltas(lora))

    @pytest.mark.parametrize("family", COMPONENTS)
    def test_we_read_it_back(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        loras = loras_for(pipeline, family)
        modules = {name: [path for path, _ in getattr(pipeline, name).named_modules()] for name in loras}
        file = read_lora(write_diffusers(loras, tmp_path / "lora.safetensors"), modules=modules)
        assert (file.layout, file.not_understood) == ("diffusers", ())
        for component, lora in loras.items():
            assert_same(deltas(file.components[component]), deltas(lora), 1e-12)
            assert file.components[component].config == lora.config

    def test_one_component_loads_by_its_own_method(self, tmp_path: Path) -> None:
        lora, unet = random_lora(make_unet()), make_unet()
        write_diffusers({"unet": lora}, tmp_path / "lora.safetensors")
        unet.load_lora_adapter(tmp_path, weight_name="lora.safetensors", prefix="unet")
        assert_same(live_deltas(unet), deltas(lora))

    def test_a_text_encoder_s_mlp_alone(self, tmp_path: Path) -> None:
        """In PEFT's own spelling diffusers could not tell what it is."""
        pipeline = make_pipeline("sd15")
        lora = random_lora(pipeline.text_encoder, ".*fc2")
        pipeline.load_lora_weights(write_diffusers({"text_encoder": lora}, tmp_path / "lora.safetensors"))
        assert_same(live_deltas(pipeline.text_encoder), deltas(lora))

    @pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape")  # PEFT 0.21 of every lora_B.bias
    def test_biases_and_dora_of_a_unet(self, tmp_path: Path, noise: Callable[[nn.Module], Tensor]) -> None:
        for number, options in enumerate(({"lora_bias": True}, {"use_dora": True})):
            model, other = make_unet(), make_unet()
            config = LoraConfig(r=4, lora_alpha=2, target_modules=["proj_in", "to_out.0", "conv1"], **options)
            peft_model = get_peft_model(model, config)
            randomise(peft_model, std=0.1)
            peft_model.save_pretrained(tmp_path / str(number))
            lora = read_lora(tmp_path / str(number)).components[""]
            write_diffusers({"unet": lora}, tmp_path / f"{number}.safetensors")
            other.load_lora_adapter(tmp_path, weight_name=f"{number}.safetensors", prefix="unet")
            assert torch.allclose(noise(other), noise(peft_model.eval()), atol=1e-5)

    def test_refusals(self, tmp_path: Path) -> None:
        def layer(path: str, *extra: str) -> PlainLora:
            names = ("lora_A.weight", "lora_B.weight", *extra)
            config = minimal_config({path: (2, 2)}, use_dora="lora_magnitude_vector" in extra)
            return PlainLora(config, {f"{path}.{name}": torch.ones(2, 2) for name in names})

        target = tmp_path / "lora.safetensors"
        t5 = "encoder.block.0.layer.0.SelfAttention.q"
        with pytest.raises(ValueError, match=r"1 layers.*SelfAttention.q \(diffusers loads only CLIP.*xadapt merge"):
            write_diffusers({"text_encoder_2": layer(t5)}, target)
        with pytest.raises(ValueError, match="DoRA"):
            write_diffusers({"text_encoder": layer("encoder.layers.0.mlp.fc1", "lora_magnitude_vector")}, target)
        with pytest.raises(ValueError, match=r"got 'text_encoder_3'; it has a place for unet"):
            write_diffusers({"text_encoder_3": layer(t5)}, target)
        with pytest.raises(ValueError, match="no components"):
            write_diffusers({}, target)
        assert not list(tmp_path.iterdir())


class TestKohya:
    @pytest.mark.parametrize("family", ["sd15", "sdxl"])
    def test_stock_diffusers_loads_it(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        loras = loras_for(pipeline, family)
        pipeline.load_lora_weights(write_kohya(loras, tmp_path / "lora.safetensors"))
        for component, lora in loras.items():
            assert_same(live_deltas(getattr(pipeline, component)), deltas(lora))
        file = read_lora(tmp_path / "lora.safetensors")
        assert (file.layout, file.not_understood) == ("kohya", ())
        assert_same(deltas(file.components["unet"]), deltas(loras["unet"]))

    def test_names(self, tmp_path: Path) -> None:
        one, two = random_lora(make_clip(), ".*q_proj"), random_lora(make_clip(True), "text_projection|.*fc1")
        first = load_file(write_kohya({"text_encoder": one}, tmp_path / "1.safetensors"))
        assert {name.split("_layers")[0] for name in first} == {"lora_te_text_model_encoder"}
        both = load_file(write_kohya({"text_encoder": one, "text_encoder_2": two}, tmp_path / "2.safetensors"))
        starts = {name.split("_layers")[0].split(".")[0] for name in both}
        assert starts == {"lora_te1_text_model_encoder", "lora_te2_text_model_encoder", "lora_te2_text_projection"}
        assert all(tensor.dim() == 0 for name, tensor in both.items() if name.endswith(".alpha"))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_kept_where_it_does_not_round(self, dtype: torch.dtype, tmp_path: Path) -> None:
        lora = random_lora(make_unet())  # among the alphas are 2 and 4, and 3
        lora = rebased(lora, {name: tensor.to(dtype) for name, tensor in lora.tensors.items()})
        tensors = load_file(write_kohya({"unet": lora}, tmp_path / "lora.safetensors"))
        dtypes = {tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha")}
        assert dtypes == {dtype, torch.float32}
        assert_same(deltas(read_lora(tmp_path / "lora.safetensors").components["unet"]), deltas(lora), 1e-7)

    def test_one_alpha_costs_no_precision(self, tmp_path: Path) -> None:
        """alpha / rank * rank misses some alphas by their last bit."""
        tensors = {
            f"conv_{end}.lora_{side}.weight": torch.randn(*shape, dtype=torch.bfloat16)
            for end, rank in (("in", 49), ("out", 103))
            for side, shape in (("A", (rank, 4)), ("B", (4, rank)))
        }
        lora = PlainLora(minimal_config({"conv_in": (49, 1), "conv_out": (103, 1)}), tensors)
        written = load_file(write_kohya({"unet": lora}, tmp_path / "lora.safetensors"))
        assert torch.equal(written["lora_unet_conv_in.lora_up.weight"], tensors["conv_in.lora_B.weight"])
        assert torch.equal(written["lora_unet_conv_out.lora_up.weight"], tensors["conv_out.lora_B.weight"])
        assert {tensor.dtype for name, tensor in written.items() if "alpha" not in name} == {torch.bfloat16}

    def test_the_text_encoder_of_flux(self, tmp_path: Path) -> None:
        pipeline = make_pipeline("flux")
        lora = random_lora(pipeline.text_encoder)
        pipeline.load_lora_weights(write_kohya({"text_encoder": lora}, tmp_path / "lora.safetensors"))
        assert_same(live_deltas(pipeline.text_encoder), deltas(lora))

    def flux(self, dtype: torch.dtype = torch.float32, alpha: float | None = None, left_out: str = "x") -> PlainLora:
        """A LoRA of FLUX's real width, on one block of either kind."""
        shapes = adaptable(make_flux(3072, device="meta"))
        table, tensors = {}, {}
        for number, (path, (outputs, inputs)) in enumerate(shapes.items()):
            if "blocks." in path and left_out not in path:
                rank = 2 + number % 3
                tensors[f"{path}.lora_A.weight"] = torch.randn(rank, inputs).to(dtype)
                tensors[f"{path}.lora_B.weight"] = torch.randn(outputs, rank).to(dtype)
                table[path] = (rank, alpha or float(number % 4 + 1))
        return PlainLora(minimal_config(table), tensors)

    @pytest.mark.parametrize("left_out", ["x", "to_k", "proj_mlp"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_flux(self, dtype: torch.dtype, left_out: str, tmp_path: Path) -> None:
        lora = self.flux(dtype, left_out=left_out)
        path = write_kohya({"transformer": lora}, tmp_path / "lora.safetensors")
        stock: dict[str, Tensor] = FluxPipeline.lora_state_dict(path)
        read = read_lora(path).components["transformer"]
        for layer in {name.rpartition(".lora_")[0].removeprefix("transformer.") for name in stock}:
            a, b = (stock[f"transformer.{layer}.lora_{side}.weight"].double() for side in "AB")
            ours = read.tensors[f"{layer}.lora_A.weight"].double(), read.tensors[f"{layer}.lora_B.weight"].double()
            if f"{layer}.lora_A.weight" not in lora.tensors:
                assert not b.any()
                assert not ours[1].any()
                continue
            given = lora.tensors[f"{layer}.lora_A.weight"].double(), lora.tensors[f"{layer}.lora_B.weight"].double()
            x = torch.randn(a.shape[1], 3, dtype=torch.float64)
            expected = lora.scaling(layer) * given[1] @ (given[0] @ x)
            assert_same({layer: read.scaling(layer) * ours[1] @ (ours[0] @ x)}, {layer: expected}, 1e-6)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # diffusers multiplies by alpha in bf16
            assert_same({layer: b @ (a @ x)}, {layer: expected}, tolerance)

    def test_flux_trained_on_the_fused_layer(self, tmp_path: Path) -> None:
        """It goes back as it came, not at three times the rank."""
        name = "lora_unet_double_blocks_0_img_attn_qkv"
        given = {f"{name}.lora_down.weight": torch.randn(4, 3072), f"{name}.lora_up.weight": torch.randn(9216, 4)}
        save_file({**given, f"{name}.alpha": torch.tensor(2.0)}, tmp_path / "1.safetensors")
        write_kohya(read_lora(tmp_path / "1.safetensors").components, tmp_path / "2.safetensors")
        one, other = (load_file(tmp_path / f"{number}.safetensors") for number in (1, 2))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_refusals(self, tmp_path: Path) -> None:
        target = tmp_path / "lora.safetensors"
        lora = random_lora(make_flux(), "x_embedder|.*to_q")
        with pytest.raises(ValueError, match=r"transformer.x_embedder \(outside the blocks.*xadapt merge"):
            write_kohya({"transformer": lora}, target)
        with pytest.raises(ValueError, match=r"16 → 16 is not FLUX's 3072 → 3072"):  # SD3's layers have FLUX's names
            write_kohya({"transformer": random_lora(make_flux(), ".*to_q")}, target)
        unet = random_lora(make_unet(), ".*to_out.0")
        biases = {
            name.replace("A.weight", "B.bias"): torch.ones(16) for name in unet.tensors if name.endswith("A.weight")
        }
        with pytest.raises(ValueError, match=r"to_out.0 \(a bias\).*diffusers"):
            write_kohya({"unet": rebased(unet, {**unet.tensors, **biases}, lora_bias=True)}, target)
        with pytest.raises(ValueError, match="no layer of a Stable Diffusion U-Net"):
            write_kohya({"unet": random_lora(make_llama(), ".*q_proj")}, target)
        assert not list(tmp_path.iterdir())


class TestNamesOfAnExport:
    """Which component it is: from the pipeline the base lies in, from its class, or said."""

    @pytest.fixture
    def first_name(self, tmp_path: Path) -> Callable[..., str]:
        def export(base: Any, make: Callable[[], nn.Module], targets: str = r".*q_proj", **options: Any) -> str:
            folder = tmp_path / "adapter"
            write_peft(random_lora(make(), targets), folder, overwrite=True)
            report = export_lora(folder, base, tmp_path / "lora.safetensors", overwrite=True, **options)
            return min(load_file(report.out))

        return export

    @pytest.fixture
    def sdxl(self, tmp_path: Path) -> Path:
        make_pipeline("sdxl").save_pretrained(tmp_path / "sdxl")
        return tmp_path / "sdxl"

    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_a_text_encoder_with_projection_may_be_the_second(
        self, layout: str, first_name: Callable[..., str], tmp_path: Path
    ) -> None:
        make_clip(True).save_pretrained(tmp_path / "bare")
        second = {"diffusers": "text_encoder_2.", "kohya": "lora_te2_"}[layout]
        for base in (make_clip(True), tmp_path / "bare"):
            options: dict[str, Any] = {"base": base, "make": lambda: make_clip(True), "layout": layout}
            with pytest.raises(ValueError, match=r"CLIPTextModelWithProjection .*name='text_encoder_2' or name='text_"):
                first_name(**options)
            assert first_name(**options, name="text_encoder_2").startswith(second)
            assert first_name(**options, component="text_encoder_2").startswith(second)

    @pytest.mark.parametrize("layout", ["diffusers", "kohya"])
    def test_a_folder_in_a_pipeline_tells(self, layout: str, first_name: Callable[..., str], sdxl: Path) -> None:
        second = {"diffusers": "text_encoder_2.", "kohya": "lora_te2_"}[layout]
        for base, options in ((sdxl / "text_encoder_2", {}), (sdxl, {"component": "text_encoder_2"})):
            assert first_name(base, lambda: make_clip(True), layout=layout, **options).startswith(second)

    def test_kohya_counts_the_text_encoders_of_some_pipelines(
        self, first_name: Callable[..., str], sdxl: Path, tmp_path: Path
    ) -> None:
        make_pipeline("sd15").save_pretrained(tmp_path / "sd15")
        make_clip().save_pretrained(tmp_path / "bare")
        for base in (tmp_path / "bare", make_clip()):
            for options in ({}, {"component": "text_encoder"}):
                with pytest.raises(ValueError, match=r"pass name='text_encoder' for SD1.5, name='text_encoder_1' for"):
                    first_name(base, make_clip, layout="kohya", **options)
            assert first_name(base, make_clip, layout="kohya", name="text_encoder").startswith("lora_te_text")
            assert first_name(base, make_clip, layout="kohya", name="text_encoder_1").startswith("lora_te1_text")
            assert first_name(base, make_clip, layout="diffusers").startswith("text_encoder.text_model")
        for pipeline, start in ((tmp_path / "sd15", "lora_te_text"), (sdxl, "lora_te1_text")):
            assert first_name(pipeline, make_clip, layout="kohya", component="text_encoder").startswith(start)
            assert first_name(pipeline / "text_encoder", make_clip, layout="kohya").startswith(start)

    @pytest.mark.parametrize("family", ["sdxl", "flux"])
    def test_the_first_of_two_loads_alone(self, family: str, tmp_path: Path) -> None:
        pipeline = make_pipeline(family)
        lora = random_lora(pipeline.text_encoder)
        pipeline.load_lora_weights(write_kohya({"text_encoder_1": lora}, tmp_path / "lora.safetensors"))
        assert_same(live_deltas(pipeline.text_encoder), deltas(lora))

    def test_kohya_knows_flux_by_its_class(self, first_name: Callable[..., str]) -> None:
        """AuraFlow's layers have names and widths of FLUX's; SD3's have the names."""
        with torch.device("meta"):
            aura = AuraFlowTransformer2DModel(
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                joint_attention_dim=64,
                pos_embed_max_size=16,
            )
        for model in (aura, make_sd3()):
            with pytest.raises(
                ValueError, match=rf"FLUX's transformer alone, and this one is of class {type(model).__name__}"
            ):
                first_name(model, lambda model=model: model, r".*attn\.to_q", layout="kohya")
        flux = make_flux(3072, device="meta")
        flux.transformer_blocks[0].attn.to_q = nn.Linear(3072, 3072)
        name = first_name(flux, lambda: flux, r"transformer_blocks.*attn\.to_q", layout="kohya")
        assert name.startswith("lora_unet_double_blocks_0_img_attn_qkv")


class TestPlaces:
    @pytest.mark.parametrize("write", [write_diffusers, write_kohya])
    def test_files(self, write: Writer, tmp_path: Path) -> None:
        loras = {"unet": random_lora(make_unet(), ".*to_q")}
        target = tmp_path / "new" / "lora.safetensors"
        write(loras, target)
        before = target.read_bytes()
        with pytest.raises(ValueError, match="overwrite=True"):
            write(loras, target)
        with pytest.raises(ValueError, match=r"end in \.safetensors"):
            write(loras, tmp_path / "lora.bin")
        write({"unet": random_lora(make_unet(), ".*to_k")}, target, overwrite=True)
        assert target.read_bytes() != before
        assert [entry.name for entry in target.parent.iterdir()] == ["lora.safetensors"]

    def test_folders(self, tmp_path: Path) -> None:
        lora, other = random_lora(make_llama(), ".*q_proj"), random_lora(make_llama(), ".*v_proj")
        write_peft(lora, tmp_path / "lora")
        (tmp_path / "lora" / "README.md").write_text("mine")
        with pytest.raises(ValueError, match="exists already"):
            write_peft(other, tmp_path / "lora")
        write_peft(other, tmp_path / "lora", overwrite=True)
        assert_same(deltas(read_lora(tmp_path / "lora").components[""]), deltas(other))
        assert (tmp_path / "lora" / "README.md").read_text() == "mine"
        (tmp_path / "else").mkdir()
        with pytest.raises(ValueError, match="only an adapter folder"):
            write_peft(other, tmp_path / "else", overwrite=True)

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_failure_leaves_nothing(self, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lora = random_lora(make_unet(), ".*to_q")
        target = tmp_path / "lora.safetensors"
        if overwrite:
            write_diffusers({"unet": lora}, target)
        before = {entry: entry.read_bytes() for entry in tmp_path.iterdir()}

        def full(*_: Any) -> None:
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "replace", full)
        for write in (write_diffusers, write_kohya):
            with pytest.raises(OSError, match="No space"):
                write({"unet": lora}, target, overwrite=overwrite)
        with pytest.raises(OSError, match="No space"):
            write_peft(lora, tmp_path / "folder")
        assert {entry: entry.read_bytes() for entry in tmp_path.iterdir()} == before

    def test_metadata_says_no_more_than_it_must(self, tmp_path: Path) -> None:
        path = write_diffusers({"unet": random_lora(make_unet(), ".*to_q", alpha=4)}, tmp_path / "lora.safetensors")
        with safe_open(path, framework="pt") as file:
            metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["unet.target_modules"] == ["to_q"]
        assert "unet.peft_version" not in metadata
