"""The A4A model: what is saved, what is trained, and the sizes of the real thing."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    faceid_plus_file,
    flat,
    pixart_like,
    plus_file,
    run,
    sd15_like,
    sdxl_like,
)
from xadapt_a4a import A4AModel, Bank

SD15_REAL = [*[320] * 2, *[640] * 2, *[1280] * 2, *[1280] * 3, *[640] * 3, *[320] * 3, 1280]


def make(target: nn.Module, state_dict: Any = None, **options: Any) -> A4AModel:
    torch.manual_seed(0)
    return A4AModel.from_ip_adapter(state_dict or base_file(SD15_WIDTHS), target, **{"depth": 2, **options})


def embeds(batch: int = 2) -> Tensor:
    return torch.randn(batch, 16, generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> A4AModel:
    """The saved model with its weights where an allocator puts them: those of a mapped file are aligned otherwise, which
    matrix products show in the last bit."""
    return copy.deepcopy(A4AModel.from_pretrained(folder))


class TestFiles:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"share": "layer"},
            {"coupling_ratio": 0.5},
            {"coupling_ratio": 2},
            {"coupling_width": 48},
            {"projection": "interpolate", "alignment": "pool"},
            {"mapping": "linear"},
        ],
    )
    def test_saved_and_loaded_it_computes_the_same_bits(self, tmp_path: Path, options: dict[str, Any]) -> None:
        adapter = make(sdxl_like(), **options).eval()
        adapter.save_pretrained(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
        loaded = opened(tmp_path)
        expected, found = adapter.encode(embeds()), loaded.encode(embeds())
        for (key, value), (other_key, other_value) in zip(expected.positive, found.positive, strict=True):
            assert torch.equal(key, other_key)
            assert torch.equal(value, other_value)
        assert found.adapter == expected.adapter

    def test_every_kind_of_source_comes_back(self, tmp_path: Path) -> None:
        for name, state_dict, image, options in (
            ("plus", plus_file(SD15_WIDTHS), (torch.ones(1, 9, 16), None), {}),
            ("id", faceid_plus_file(SD15_WIDTHS), (embeds(1), torch.ones(1, 9, 20)), {"faceid_plus_v2": True}),
        ):
            adapter = make(pixart_like(), state_dict, **options).eval()
            adapter.save_pretrained(tmp_path / name)
            loaded = opened(tmp_path / name)
            with torch.no_grad():
                assert torch.equal(adapter(*image)[0][0], loaded(*image)[0][0])

    def test_the_config_says_where_it_comes_from(self, tmp_path: Path) -> None:
        save_file(flat(base_file(SD15_WIDTHS)), tmp_path / "ip-adapter_sd15.safetensors")
        target = sdxl_like()
        config = A4AModel.from_ip_adapter(tmp_path / "ip-adapter_sd15.safetensors", target, depth=1).config
        assert config.ip_adapter == "ip-adapter_sd15.safetensors"
        assert config.target_class == "UNet2DConditionModel"
        assert config.target_fingerprint
        assert config.target_fingerprint == make(sdxl_like()).config.target_fingerprint
        assert config.target_fingerprint != make(sdxl_like(seed=1)).config.target_fingerprint
        assert (
            config.ip_adapter_fingerprint != make(target, base_file(SD15_WIDTHS, seed=3)).config.ip_adapter_fingerprint
        )

    def test_options_are_checked(self) -> None:
        for options, message in (
            ({"share": "all"}, "share='width'"),
            ({"max_rows": 10}, "max_rows=52"),
            ({"depth": 0}, "depth=0"),
            ({"coupling_ratio": 0.3}, "0.5, 1 or 2"),
        ):
            with pytest.raises(ValueError, match=message):
                make(pixart_like(layers=6), **options)
        with pytest.raises(TypeError, match="deepness"):
            make(sd15_like(), deepness=3)

    def test_a_bank_is_saved_whole(self, tmp_path: Path) -> None:
        target = sd15_like()
        adapter = make(target).eval()
        bank = adapter.encode(embeds())
        bank.save(tmp_path / "face.safetensors")
        loaded = Bank.load(tmp_path / "face.safetensors")
        assert [file.name for file in tmp_path.iterdir()] == ["face.safetensors"]
        with torch.no_grad():
            with adapter.attached(target, bank, guidance=False):
                expected = run(target)
            with adapter.attached(target, loaded, guidance=False):
                assert torch.equal(run(target), expected)
        with pytest.raises(ValueError, match="computed by another adapter"):
            make(target, base_file(SD15_WIDTHS, seed=3)).attach(target, loaded)

    def test_files_that_hold_no_bank(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read as a saved bank"):
            Bank.load(tmp_path / "none.safetensors")
        save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match="no bank of maps"):
            Bank.load(tmp_path / "a.safetensors")
        bank = make(sd15_like()).eval().encode(embeds())
        bank._map(lambda tensor: tensor * torch.nan).save(tmp_path / "nan.safetensors")
        with pytest.raises(ValueError, match="NaN or infinity"):
            Bank.load(tmp_path / "nan.safetensors")


class TestGradients:
    def backward(self, target: nn.Module, adapter: A4AModel) -> dict[str, Tensor]:
        adapter.zero_grad()
        with adapter.attached(target, adapter.encode(embeds()), guidance=False):
            run(target).square().mean().backward()
        return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("make_target", [sd15_like, sdxl_like, pixart_like])
    def test_they_reach_all_of_the_adapter_and_none_of_the_target(self, make_target: Any) -> None:
        target = make_target().requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        adapter = make(target).train()
        gradients = self.backward(target, adapter)
        assert gradients.keys() == dict(adapter.named_parameters()).keys()
        assert not [name for name, gradient in gradients.items() if not gradient.any()]
        assert all(parameter.grad is None for parameter in target.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())

    @pytest.mark.parametrize("make_target", [sd15_like, pixart_like])
    def test_checkpointing_gives_the_same_gradients(self, make_target: Any) -> None:
        target = make_target().requires_grad_(False).train()
        adapter = make(target).train()
        expected = self.backward(target, adapter)
        target.enable_gradient_checkpointing()
        for name, gradient in self.backward(target, adapter).items():
            assert torch.equal(gradient, expected[name]), name

    def test_a_backward_after_the_block_is_refused_under_checkpointing(self) -> None:
        """It would run with the maps of the next block: gradients that are wrong, and nobody told."""
        target = sd15_like().requires_grad_(False).train()
        target.enable_gradient_checkpointing()
        adapter = make(target).train()
        bank = adapter.encode(embeds())
        with (
            pytest.raises(RuntimeError, match="inside the `with` block"),
            adapter.attached(target, bank, guidance=False),
        ):
            run(target)
        with torch.no_grad(), adapter.attached(target, bank, guidance=False):
            run(target)

    def test_evaluation_keeps_no_graph(self) -> None:
        adapter = make(sd15_like())
        assert adapter.train().encode(embeds()).requires_grad
        assert not adapter.train().encode(embeds()).detach().requires_grad
        assert not adapter.eval().encode(embeds()).requires_grad

    def test_groups_of_learning_rates_are_disjoint_and_complete(self) -> None:
        adapter = make(sd15_like())
        groups = adapter.param_groups(1.0, 2.0, 3.0)
        assert {group["name"]: group["lr"] for group in groups} == {"mapping": 1.0, "projection": 2.0, "source": 3.0}
        grouped = [id(p) for group in groups for p in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == {id(p) for p in adapter.parameters()}
        assert [group["name"] for group in adapter.param_groups(train_pta=False)] == ["mapping", "projection"]
        assert not any(p.requires_grad for p in adapter.source.parameters())


class TestRealSizes:
    """On the meta device: layers, widths and numbers of parameters of the models that people have."""

    def base(self) -> dict[str, Tensor]:
        return on_meta(base_file(SD15_REAL, context=768, embed=1024))

    def test_layers(self) -> None:
        from xadapt_a4a import find_attention_layers

        assert [layer.width for layer in find_attention_layers(real_sd15())] == SD15_REAL
        widths = [layer.width for layer in find_attention_layers(real_sdxl())]
        assert (len(widths), widths.count(640), widths.count(1280)) == (70, 10, 60)
        assert [layer.width for layer in find_attention_layers(real_pixart())] == [1152] * 28

    @pytest.mark.parametrize(
        ("target", "options", "millions"),
        [
            ("sdxl", {}, 191.0),
            ("pixart", {}, 188.6),
            ("sdxl", {"coupling_ratio": 0.5}, 67),
            ("sdxl", {"coupling_ratio": 2.0}, 674),
            ("sdxl", {"depth": 1}, 73.0),
            ("sdxl", {"depth": 2}, 112.4),
            ("sdxl", {"share": "layer"}, 425.5),
            ("pixart", {"share": "layer"}, 294.6),
        ],
    )
    def test_parameters(self, target: str, options: dict[str, Any], millions: float) -> None:
        with torch.device("meta"):
            adapter = make(REAL[target](), self.base(), **{"depth": 4, **options})
        assert count(adapter) == pytest.approx(millions, abs=0.5 if millions % 1 == 0 else 0.06)

    def test_parts(self) -> None:
        with torch.device("meta"):
            adapter = make(real_sdxl(), self.base(), depth=4)
        branch = adapter.key_branch
        assert branch.projection.dim == 1280
        assert branch.mapping.learnable.shape == (1, 280, 1280)
        assert branch.mapping.blocks[0].heads == 20
        assert count(adapter.source) == pytest.approx(22.3, abs=0.06)
        assert 2 * count(branch.projection) == pytest.approx(5.74, abs=0.006)
        assert 2 * count(branch.alignment) == pytest.approx(4.92, abs=0.006)
        maps = adapter(torch.empty(2, 1024, device="meta"))
        assert [key.shape for key, _ in maps] == [(2, 4, width) for width in adapter.config.target_dims]

    @pytest.mark.parametrize(("target", "millions"), [("sdxl", 220.0), ("pixart", 216.3)])
    def test_plus(self, target: str, millions: float) -> None:
        with torch.device("meta"):
            adapter = make(REAL[target](), on_meta(real_plus()), depth=4)
        assert adapter.source.num_tokens == 16
        assert count(adapter) == pytest.approx(millions, abs=0.06)

    def test_full_face_is_refused(self) -> None:
        full = {"image_proj": {}, "ip_adapter": base_file(SD15_REAL, context=768)["ip_adapter"]}
        sizes = {"proj.0": (1280, 1280), "proj.2": (768, 1280), "proj.3": (768,)}
        for name, size in sizes.items():
            full["image_proj"] |= {f"{name}.weight": torch.empty(*size), f"{name}.bias": torch.empty(size[0])}
        with torch.device("meta"), pytest.raises(ValueError, match=r"4112 \+ 17990 = 22102 rows"):
            make(real_sdxl(), on_meta(full))


@cache
def real_sdxl() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@cache
def real_pixart() -> Any:
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        return PixArtTransformer2DModel(sample_size=128, use_additional_conditions=True)


@cache
def real_sd15() -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


REAL = {"sdxl": real_sdxl, "pixart": real_pixart}


def real_plus() -> dict[str, dict[str, Tensor]]:
    """ip-adapter-plus_sd15: 4 layers of 12 heads, width 768, 16 tokens."""
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, 16, 768)}
    for name, size in {"proj_in": (768, 1280), "proj_out": (768, 768), "norm_out": (768,)}.items():
        shapes |= {f"{name}.weight": size, f"{name}.bias": size[:1]}
    for layer in range(4):
        for norm in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{layer}.{norm}.{part}": (768,) for part in ("weight", "bias")}
        shapes |= {
            f"layers.{layer}.0.to_q.weight": (768, 768),
            f"layers.{layer}.0.to_kv.weight": (1536, 768),
            f"layers.{layer}.0.to_out.weight": (768, 768),
            f"layers.{layer}.1.1.weight": (3072, 768),
            f"layers.{layer}.1.3.weight": (768, 3072),
        }
    image_proj = {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
    return {"image_proj": image_proj, "ip_adapter": base_file(SD15_REAL, context=768)["ip_adapter"]}


def on_meta(state_dict: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in flat(state_dict).items()}


def count(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6
