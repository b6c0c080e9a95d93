"""LoRA files in kohya's layout: stock diffusers loads them; and what each component is called in an exported file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

from diffusers import AuraFlowTransformer2DModel, FluxPipeline

from tests.conftest import make_llama, make_unet
from tests.layout_models import (
    adaptable,
    assert_same,
    deltas,
    live_deltas,
    loras_for,
    make_clip,
    make_flux,
    make_pipeline,
    random_lora,
)
from tests.test_integration_diffusers import make_sd3
from xadapt import export_lora
from xadapt.layouts import PlainLora, minimal_config, read_lora, write_kohya, write_peft


def rebased(lora: PlainLora, tensors: dict[str, Tensor], **options: Any) -> PlainLora:
    return PlainLora(minimal_config(lora.ranks_and_alphas(), **options), tensors)


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
