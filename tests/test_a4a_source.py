"""Published IP-Adapter files in their real key layouts: what they mean in diffusers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    faceid_file,
    faceid_plus_file,
    flat,
    full_file,
    plus_file,
    sd15_like,
    sdxl_like,
)
from xadapt_a4a import IPAdapterSource, find_attention_layers
from xadapt_a4a.files import read_ip_adapter

LAYOUTS: dict[str, tuple[Callable[..., Any], tuple[int, ...], int]] = {  # the file, embeddings of 2 images, N
    "base": (base_file, (2, 16), 4),
    "full": (full_file, (2, 257, 16), 257),
    "plus": (plus_file, (2, 9, 16), 6),
    "faceid": (lambda widths: faceid_file(widths, lora=False), (2, 16), 4),
    "faceid_plus": (faceid_plus_file, (2, 16), 4),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def embeddings(layout: str) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(3)
    clip = torch.randn(2, 9, 20) if layout == "faceid_plus" else None
    return torch.randn(*LAYOUTS[layout][1]), clip


class TestPublishedLayouts:
    @every_layout
    def test_features_are_those_that_diffusers_computes(self, layout: str) -> None:
        build, _, tokens = LAYOUTS[layout]
        unet, state_dict = sd15_like(), build(SD15_WIDTHS)
        source = IPAdapterSource.load(state_dict)
        unet._load_ip_adapter_weights([state_dict], low_cpu_mem_usage=False)
        image, clip = embeddings(layout)
        projection = unet.encoder_hid_proj.image_projection_layers[0]
        if clip is not None:
            projection.clip_embeds = clip[:, None]
        with torch.no_grad():
            (native,) = unet.encoder_hid_proj([image[:, None]])
            features = source(image, clip)
        processors = [p for p in unet.attn_processors.values() if hasattr(p, "to_k_ip")]
        assert len(features) == len(processors) == len(SD15_WIDTHS)
        for (key, value), processor in zip(features, processors, strict=True):
            assert torch.equal(key, processor.to_k_ip[0](native).flatten(1, 2))
            assert torch.equal(value, processor.to_v_ip[0](native).flatten(1, 2))
            assert key.shape[:2] == (2, tokens)

    def test_sdxl_files_have_other_widths_and_nothing_else(self) -> None:
        unet = sdxl_like()
        widths = [layer.width for layer in find_attention_layers(unet)]
        state_dict = base_file(widths, context=40, embed=20)
        source = IPAdapterSource.load(state_dict)
        unet._load_ip_adapter_weights([state_dict], low_cpu_mem_usage=False)
        image = torch.randn(2, 20)
        (native,) = unet.encoder_hid_proj([image[:, None]])
        processors = [p for p in unet.attn_processors.values() if hasattr(p, "to_k_ip")]
        for (key, _), processor in zip(source(image), processors, strict=True):
            assert torch.equal(key, processor.to_k_ip[0](native).flatten(1, 2))

    @every_layout
    def test_kind_tokens_and_widths_are_read_from_the_file(self, layout: str) -> None:
        build, shape, tokens = LAYOUTS[layout]
        source = IPAdapterSource.load(build(SD15_WIDTHS))
        assert source.kind.name == layout
        assert source.num_tokens == tokens
        assert source.embed_dim == shape[-1]
        assert source.adapter_dims == tuple(SD15_WIDTHS)
        rebuilt = IPAdapterSource(layout, source.options, source.adapter_dims)
        assert {n: t.shape for n, t in rebuilt.state_dict().items()} == {
            n: t.shape for n, t in source.state_dict().items()
        }

    def test_layers_are_ordered_by_number_not_as_strings(self) -> None:
        widths = [8 * (index + 1) for index in range(7)]  # ids 1 … 13: as strings, 11 stands before 3
        state_dict = base_file(widths)
        state_dict["ip_adapter"] = dict(sorted(state_dict["ip_adapter"].items(), reverse=True))
        assert IPAdapterSource.load(state_dict).adapter_dims == tuple(widths)

    def test_safetensors_and_bin_and_dicts_are_the_same(self, tmp_path: Path) -> None:
        state_dict = plus_file(SD15_WIDTHS)
        save_file(flat(state_dict), tmp_path / "ip.safetensors")
        torch.save(state_dict, tmp_path / "ip.bin")
        read = [
            IPAdapterSource.load(state_dict),
            IPAdapterSource.load(flat(state_dict)),
            IPAdapterSource.load(tmp_path / "ip.safetensors"),
            IPAdapterSource.load(str(tmp_path / "ip.bin"), allow_pickle=True),
        ]
        for other in read[1:]:
            for name, tensor in read[0].state_dict().items():
                assert torch.equal(tensor, other.state_dict()[name])

    def test_read_tensors_keep_the_published_names(self) -> None:
        state_dict = flat(base_file(SD15_WIDTHS))
        assert read_ip_adapter(state_dict).flat().keys() == state_dict.keys()

    def test_half_precision_files_become_float32(self) -> None:
        source = IPAdapterSource.load({n: t.half() for n, t in flat(base_file(SD15_WIDTHS)).items()})
        assert source.dtype == torch.float32

    def test_loras_for_its_own_base_are_left_out_with_a_warning(self) -> None:
        with pytest.warns(UserWarning, match="56 LoRA tensors"):
            source = IPAdapterSource.load(faceid_file(SD15_WIDTHS))
        assert source.kind.name == "faceid"

    def test_faceid_plus_version_2_adds_the_face_tokens(self) -> None:
        image, clip = embeddings("faceid_plus")
        first, second = (
            IPAdapterSource.load(faceid_plus_file(SD15_WIDTHS), shortcut=shortcut) for shortcut in (False, True)
        )
        with torch.no_grad():
            assert not torch.allclose(first.tokens(image, clip), second.tokens(image, clip))
        assert first.image_proj.clip_embeds is None


def broken(**changes: Any) -> dict[str, Any]:
    tensors: dict[str, Any] = flat(base_file(SD15_WIDTHS))
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


class TestBadFiles:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "no IP-Adapter.*'image_proj' and 'ip_adapter'.*nothing"),
            ({"lora.down.weight": torch.ones(2, 2)}, "no IP-Adapter.*lora.down.weight"),
            ({"image_proj.proj.weight": torch.ones(8, 2)}, "no tensors under 'ip_adapter'"),
            ({"image_proj_model.proj.weight": torch.ones(8, 2)}, "training checkpoint.*Rename"),
            (broken(extra=torch.ones(1)), "holds extra, which no IP-Adapter holds"),
            (broken(ip_adapter__1__to_q_ip__weight=torch.ones(1)), "ip_adapter.1.to_q_ip.weight, which no"),
            (broken(ip_adapter__3__to_v_ip__weight=None), "3.to_k_ip.weight but no to_v_ip"),
            (broken(ip_adapter__3__to_v_ip__weight=torch.ones(5)), r"shape \(5,\)"),
            (broken(ip_adapter__3__to_v_ip__weight=torch.ones(5, 24)), r"layer 3 has a k of shape \(64, 24\)"),
            (
                broken(image_proj__proj__weight=torch.full((96, 16), torch.nan)),
                "NaN or infinity: image_proj.proj.weight",
            ),
            (
                broken(ip_adapter__3__to_v_ip__weight=None, ip_adapter__3__to_k_ip__weight=None),
                "lacks layers.*3 not there",
            ),
            (broken(image_proj__proj__weight=[1.0]), "are no tensors"),
            (broken(image_proj__norm__weight=torch.ones(5)), "no image projection that diffusers can read"),
            (broken(image_proj__surprise=torch.ones(5)), "no image projection that diffusers can read"),
        ],
    )
    def test_what_is_no_ip_adapter_is_refused(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            IPAdapterSource.load(given)

    def test_groups_of_two_adapters_are_refused(self) -> None:
        mixed = {**base_file(SD15_WIDTHS), "ip_adapter": base_file(SD15_WIDTHS, context=40)["ip_adapter"]}
        with pytest.raises(ValueError, match="tokens of width 40, but image_proj makes them 24"):
            IPAdapterSource.load(mixed)

    def test_tokens_that_depend_on_the_time_step_are_refused(self) -> None:
        given = broken(image_proj__time_embedding__linear_1__weight=torch.ones(2, 2))
        with pytest.raises(ValueError, match=r"SD3.5"):
            IPAdapterSource.load(given)

    def test_pickles_need_the_flag_and_never_run_code(self, tmp_path: Path) -> None:
        torch.save(base_file(SD15_WIDTHS), tmp_path / "ip.bin")
        with pytest.raises(ValueError, match="allow_pickle=True"):
            IPAdapterSource.load(tmp_path / "ip.bin")
        torch.save({"image_proj": Path("evil")}, tmp_path / "evil.bin")
        with pytest.raises(ValueError, match="cannot be read as a file of tensors"):
            IPAdapterSource.load(tmp_path / "evil.bin", allow_pickle=True)

    def test_files_that_are_missing_or_cut_short(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not there"):
            IPAdapterSource.load(tmp_path / "none.safetensors")
        with pytest.raises(ValueError, match="a folder; name the file"):
            IPAdapterSource.load(tmp_path)
        save_file(flat(base_file(SD15_WIDTHS)), tmp_path / "ip.safetensors")
        (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ip.safetensors").read_bytes()[:-100])
        with pytest.raises(ValueError, match="damaged or cut short"):
            IPAdapterSource.load(tmp_path / "cut.safetensors")
        with pytest.raises(TypeError, match="not int"):
            IPAdapterSource.load(3)

    def test_version_2_is_for_faceid_plus_only(self) -> None:
        with pytest.raises(ValueError, match="kind 'base'"):
            IPAdapterSource.load(base_file(SD15_WIDTHS), shortcut=True)


class TestBadEmbeddings:
    @pytest.mark.parametrize(
        ("layout", "shape", "message"),
        [
            ("base", (2, 17), "wants `image_embeds` of width 16.*got a width of 17"),
            ("base", (2, 9, 16), r"\(images, width\); got \(2, 9, 16\)"),
            ("plus", (2, 16), r"`hidden_states\[-2\]` of width 16.*got \(2, 16\)"),
            ("full", (2, 9, 16), "all 257 rows.*got 9 rows"),
            ("faceid", (2, 512), "insightface.*got a width of 512"),
            ("base", (0, 16), "no image at all"),
        ],
    )
    def test_other_embeddings_are_refused_by_the_encoder_wanted(
        self, layout: str, shape: tuple[int, ...], message: str
    ) -> None:
        source = IPAdapterSource.load(LAYOUTS[layout][0](SD15_WIDTHS))
        with pytest.raises(ValueError, match=message):
            source.tokens(torch.ones(*shape))

    def test_the_real_encoders_are_named(self) -> None:
        source = IPAdapterSource.load(base_file([8], embed=1024))
        with pytest.raises(ValueError, match="OpenCLIP ViT-H/14"):
            source.tokens(torch.ones(1, 1280))

    def test_missing_images_and_nan(self) -> None:
        source = IPAdapterSource.load(base_file(SD15_WIDTHS))
        with pytest.raises(TypeError, match="got NoneType"):
            source.tokens(None)
        with pytest.raises(ValueError, match="image_embeds hold NaN"):
            source.tokens(torch.full((1, 16), torch.nan))
        with pytest.raises(ValueError, match="clip_embeds are for FaceID-plus"):
            source.tokens(torch.ones(1, 16), torch.ones(1, 9, 20))

    def test_faceid_plus_wants_both(self) -> None:
        source = IPAdapterSource.load(faceid_plus_file(SD15_WIDTHS))
        with pytest.raises(TypeError, match="also wants clip_embeds"):
            source.tokens(torch.ones(1, 16))
        with pytest.raises(ValueError, match=r"for 1 images; got \(1, 9, 21\)"):
            source.tokens(torch.ones(1, 16), torch.ones(1, 9, 21))
