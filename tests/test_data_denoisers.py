"""Pictures, noise and conditioning as batches for denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data_models import with_vae
from xadapt.base import open_base
from xadapt.data import Amount, open_data
from xadapt.data.denoisers import random_times


class TestDenoisers:
    def test_random_inputs_run_and_repeat(self, unet: Any) -> None:
        base = open_base(unet)
        found = open_data("random", base, base, Amount(samples=3, batch=2))
        assert found.random
        assert [batch["sample"].shape for batch in found] == [(2, 4, 8, 8), (1, 4, 8, 8)]
        for batch in found:
            assert unet(**batch).sample.shape == batch["sample"].shape
        again = open_data("random", base, base, Amount(samples=3, batch=2))
        for one, other in zip(found, again, strict=True):
            torch.testing.assert_close(one["sample"], other["sample"])

    @pytest.mark.parametrize("family", ["sdxl", "pixart", "sd3", "flux"])
    def test_what_other_families_take(self, family: str) -> None:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        network = _network(family)
        base = open_base(network)
        (batch,) = open_data("random", base, base, Amount(samples=2))
        with torch.no_grad():
            result = network(**batch)[0]
        assert result.shape[0] == 2
        assert torch.isfinite(result).all()

    def test_a_folder_of_pictures_needs_a_vae(self, tmp_path: Path, unet: Any) -> None:
        from PIL import Image

        Image.new("RGB", (9, 9)).save(tmp_path / "one.png")
        base = open_base(unet)
        with pytest.raises(ValueError, match="is in none that has one"):
            open_data(tmp_path, base, base)

    def test_pictures_become_latents(self, tmp_path: Path, unet: Any) -> None:
        from PIL import Image

        base = open_base(with_vae(tmp_path / "pipe", unet), component="unet")
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "one.png")
        found = open_data(tmp_path / "pictures", base, base)
        assert not found.random
        (batch,) = found
        assert batch["sample"].shape == (1, 4, 8, 8)

    def test_pictures_that_are_none(self, tmp_path: Path, unet: Any) -> None:
        base = open_base(with_vae(tmp_path / "pipe", unet), component="unet")
        (tmp_path / "pictures").mkdir()
        with pytest.raises(ValueError, match="holds no picture"):
            open_data(tmp_path / "pictures", base, base)
        (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"broken\.png is no picture"):
            open_data(tmp_path / "pictures", base, base)

    def test_a_dataset_of_pictures(self, tmp_path: Path, unet: Any) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
        from PIL import Image

        base = open_base(with_vae(tmp_path / "pipe", unet), component="unet")
        (tmp_path / "pictures").mkdir()
        pictures = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue", "green")]
        for number, picture in enumerate(pictures):
            picture.save(tmp_path / "pictures" / f"{number}.png")
        rows = datasets.Dataset.from_dict({"label": [0, 1, 2], "image": pictures})
        (found,) = open_data(rows, base, base)
        (wanted,) = open_data(tmp_path / "pictures", base, base)
        torch.testing.assert_close(found["sample"], wanted["sample"])
        with pytest.raises(ValueError, match=r"a column of pictures \(datasets\.Image\); this one has 'label'"):
            open_data(rows.remove_columns("image"), base, base)
        with pytest.raises(ValueError, match="The data is empty: the dataset has no row"):
            open_data(rows.select([]), base, base)

    def test_flow_matching_and_flux_see_the_pictures(self, tmp_path: Path) -> None:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        from PIL import Image

        base = open_base(with_vae(tmp_path / "pipe", _network("flux"), "transformer"), component="transformer")
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "one.png")
        seen = {}
        for colour in ("red", "white"):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "pictures" / "one.png")
            (batch,) = open_data(tmp_path / "pictures", base, base)
            assert batch["hidden_states"].shape == (1, 64, 16)
            with torch.no_grad():
                assert torch.isfinite(base.module()(**batch)[0]).all()
            seen[colour] = batch
        red, white = (seen[colour]["hidden_states"] for colour in ("red", "white"))
        assert not torch.allclose(red, white)
        (tmp_path / "pipe" / "scheduler").mkdir()
        (tmp_path / "pipe" / "scheduler" / "scheduler_config.json").write_text(
            '{"_class_name": "FlowMatchEulerDiscreteScheduler"}'
        )
        (flow,) = open_data(tmp_path / "pictures", base, base)
        generator = torch.Generator().manual_seed(0)
        share = random_times(1, generator) / 1000
        torch.testing.assert_close(flow["timestep"], share)
        vae: Any = open_base(tmp_path / "pipe", component="vae").module()
        with torch.no_grad():
            clean = vae.encode(torch.ones(1, 3, 32, 32)).latent_dist.mean * vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=generator)
        wanted = (1 - share) * clean + share * noise
        first = wanted[0, :, :2, :2].flatten()  # of the first patch: all channels, row by row
        torch.testing.assert_close(flow["hidden_states"][0, 0], first)


def _network(family: str) -> Any:
    import diffusers

    torch.manual_seed(0)
    if family == "sdxl":
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=24,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 20,
        ).eval()
    if family == "pixart":
        return diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            sample_size=8,
            cross_attention_dim=16,
            caption_channels=12,
            use_additional_conditions=False,
            in_channels=4,
            out_channels=8,
        ).eval()
    if family == "sd3":
        return diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            caption_projection_dim=16,
            pooled_projection_dim=12,
            out_channels=4,
        ).eval()
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()
