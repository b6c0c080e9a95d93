"""The baselines beside A4A, in the same trainer: IP-Adapters on the target itself, mapping layer by layer, a random source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.a4a_models import (
    SD15_WIDTHS,
    base_file,
    batch_for,
    faceid_plus_file,
    flat,
    pixart_like,
    plus_file,
    run,
    sd15_like,
    sdxl_like,
)
from tests.test_a4a_model import REAL, real_sd15
from xadapt_a4a import A4AModel
from xadapt_a4a.objective import objective_of
from xadapt_a4a.scratch import IPAdapterModel, layer_ids
from xadapt_a4a.source import IPAdapterSource
from xadapt_a4a.targets import find_attention_layers
from xadapt_a4a.training import train
from xadapt_a4a.upgraded import LayerwiseMapping, layer_pairs

BASE = {"image_embed_dim": 16, "num_image_text_embeds": 4}


def fresh(target: Any, context: int, init: str = "copy") -> IPAdapterModel:
    torch.manual_seed(0)
    return IPAdapterModel.fresh(target, "base", {**BASE, "cross_attention_dim": context}, init=init)


def losses(model: Any, target: Any, groups: Any, steps: int = 3) -> list[float]:
    return train(
        model,
        target,
        [batch_for(target)],
        objective_of(target),
        optimizer=torch.optim.AdamW(groups),
        steps=steps,
        generator=torch.Generator().manual_seed(0),
        image_drop=0.1,
    )


class TestFromScratch:
    @pytest.mark.parametrize(("make", "context"), [(sd15_like, 24), (sdxl_like, 40), (pixart_like, 48)])
    def test_it_has_every_layer_and_learns_in_the_same_loop(self, make: Any, context: int) -> None:
        target = make()
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        model = fresh(target, context)
        assert model.source.adapter_dims == tuple(layer.width for layer in find_attention_layers(target))
        kept = model.source.to_k_ip[0].weight.clone()
        losses(model, target, model.param_groups(1e-3))
        assert not torch.equal(model.source.to_k_ip[0].weight, kept)
        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())

    def test_the_loss_falls(self) -> None:
        target = pixart_like()
        model = fresh(target, 48)
        found = losses(model, target, model.param_groups(1e-2), steps=60)
        assert sum(found[-10:]) < 0.95 * sum(found[:10])

    def test_the_official_init_is_the_targets_own_keys_and_values(self) -> None:
        target = sdxl_like()
        model, plain = fresh(target, 40), fresh(target, 40, init="plain")
        for layer, to_k, to_v in zip(
            find_attention_layers(target), model.source.to_k_ip, model.source.to_v_ip, strict=True
        ):
            assert torch.equal(to_k.weight, layer.module.to_k.weight)
            assert torch.equal(to_v.weight, layer.module.to_v.weight)
        assert not torch.equal(plain.source.to_k_ip[0].weight, model.source.to_k_ip[0].weight)

    def test_one_group_has_every_parameter(self) -> None:
        model = fresh(pixart_like(), 48)
        (group,) = model.param_groups(0.5)
        assert group["lr"] == 0.5
        assert {id(one) for one in group["params"]} == {id(one) for one in model.parameters()}

    def test_weights_that_cannot_be_copied_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"is \(48, 48\) where the adapter needs \(48, 20\).*init='plain'"):
            fresh(pixart_like(), 20)
        with pytest.raises(ValueError, match="init='copy' or init='plain'"):
            fresh(pixart_like(), 48, init="zeros")

    def test_other_image_projections(self) -> None:
        kinds = [("plus", plus_file(SD15_WIDTHS)), ("faceid_plus", faceid_plus_file(SD15_WIDTHS))]
        for kind, file in kinds:
            options = IPAdapterSource.load(flat(file)).options
            model = IPAdapterModel.fresh(sd15_like(), kind, options, faceid_plus_v2=kind == "faceid_plus")
            assert model.source.kind.name == kind


class TestRealSizes:
    """On the meta device: what the baselines cost on the models that people have."""

    @pytest.mark.parametrize(("name", "context", "millions"), [("sdxl", 2048, 349), ("pixart", 1152, 79)])
    def test_from_scratch(self, name: str, context: int, millions: int) -> None:
        options = {"image_embed_dim": 1024, "cross_attention_dim": context, "num_image_text_embeds": 4}
        with torch.device("meta"):
            model = IPAdapterModel.fresh(REAL[name](), "base", options)
        assert sum(one.numel() for one in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.5)

    def test_the_file_for_sd15_is_as_large_as_the_published_one(self) -> None:
        options = {"image_embed_dim": 1024, "cross_attention_dim": 768, "num_image_text_embeds": 4}
        with torch.device("meta"):
            model = IPAdapterModel.fresh(real_sd15(), "base", options)
        names = {**model.source.image_proj.state_dict(), **dict(model.named_parameters())}
        assert len(names) == 4 + 4 + 2 * 16  # the image projection's four under both names
        in_half_precision = sum(2 * one.numel() for one in model.parameters())
        assert in_half_precision / 1e6 == pytest.approx(44.6, abs=0.1)  # ip-adapter_sd15.safetensors
        assert list(model.config["layer_ids"]) == list(range(1, 32, 2))


class TestOnItsOwnTarget:
    def test_it_equals_diffusers_own_processors(self, tmp_path: Path) -> None:
        """With the same file, the target computes what it does with the IP-Adapter loaded by diffusers."""
        target, file = sd15_like(), base_file(SD15_WIDTHS)
        adapter = IPAdapterModel.from_ip_adapter(flat(file), target)
        embeds = torch.randn(2, 16)
        with torch.no_grad(), adapter.attached(target, adapter.encode(embeds), 1.0, guidance=False):
            ours = run(target)
        stock = sd15_like()
        stock._load_ip_adapter_weights([file], low_cpu_mem_usage=False)
        with torch.no_grad():
            theirs = run_with_embeds(stock, embeds)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours, run(target), atol=1e-3)

    def test_another_models_adapter_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"7 layers of widths \[32, 64\], PixArt.* 3 of \[48\].*A4AModel"):
            IPAdapterModel.from_ip_adapter(flat(base_file(SD15_WIDTHS)), pixart_like())

    def test_a_file_in_the_published_layout_comes_back_and_is_a_source(self, tmp_path: Path) -> None:
        target = sd15_like()
        model = fresh(target, 24, init="plain")
        path = tmp_path / "ip-adapter.safetensors"
        model.save_ip_adapter(path)
        assert [one.name for one in tmp_path.iterdir()] == [path.name]
        again = IPAdapterModel.from_ip_adapter(path, target)
        embeds = torch.randn(2, 16)
        for ours, theirs in zip(model.encode(embeds).positive, again.encode(embeds).positive, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
        carried = A4AModel.from_ip_adapter(path, pixart_like())
        assert torch.equal(carried.source.to_k_ip[3].weight, model.source.to_k_ip[3].weight)

    def test_layers_have_their_numbers_among_all_processors(self) -> None:
        target = sd15_like()
        assert layer_ids(target, find_attention_layers(target)) == [1, 3, 5, 7, 9, 11, 13]
        pixart = pixart_like()
        assert layer_ids(pixart, find_attention_layers(pixart)) == [1, 3, 5]

    def test_kinds_whose_layout_cannot_be_written_are_named(self) -> None:
        model = IPAdapterModel.from_ip_adapter(flat(plus_file(SD15_WIDTHS)), sd15_like())
        with pytest.raises(ValueError, match="kind 'base', this is 'plus'"):
            model.published()

    def test_save_and_open(self, tmp_path: Path) -> None:
        model = fresh(pixart_like(), 48)
        model.save_pretrained(tmp_path)
        again = IPAdapterModel.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
        assert again.config["ip_adapter"] == "from scratch, init=copy"


class TestLayerByLayer:
    def test_first_goes_to_first_and_last_to_last(self) -> None:
        assert layer_pairs(16, 28)[:3] == [0, 1, 1]
        assert (layer_pairs(16, 28)[0], layer_pairs(16, 28)[-1]) == (0, 15)
        assert layer_pairs(16, 16) == list(range(16))
        assert layer_pairs(4, 1) == [0]

    def test_a_layer_sees_its_own_source_layer_and_no_other(self) -> None:
        torch.manual_seed(0)
        mapping = LayerwiseMapping(4 * 3, 6 * 3, 8, tokens=3)
        reference = torch.randn(2, 12, 8)
        changed = reference.clone()
        changed[:, 3:6] += 1  # the second layer's rows
        moved = (mapping(changed) != mapping(reference)).any(-1).any(0).view(6, 3).any(1)
        assert moved.tolist() == [number == 1 for number in layer_pairs(4, 6)]

    def test_it_learns(self) -> None:
        target = pixart_like()
        torch.manual_seed(0)
        model = A4AModel.from_ip_adapter(flat(base_file(SD15_WIDTHS)), target, mapping="layerwise")
        found = losses(model, target, model.param_groups(1e-2, 1e-2, 1e-3), steps=60)
        assert sum(found[-10:]) < 0.95 * sum(found[:10])


class TestRandomSource:
    def test_only_the_source_is_new_and_its_shape_the_same(self) -> None:
        torch.manual_seed(0)
        model = A4AModel.from_ip_adapter(flat(base_file(SD15_WIDTHS)), pixart_like(), depth=1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.randomize_source()
        after = model.state_dict()
        assert {name: tensor.shape for name, tensor in after.items()} == {n: t.shape for n, t in before.items()}
        new = {name for name in after if not torch.equal(after[name], before[name])}
        assert {name.partition(".")[0] for name in new} == {"source"}
        assert {name for name in after if name.startswith("source.to_")} <= new
        assert model.config["ip_adapter"] == "random weights"

    def test_of_faceid_plus_version_2_the_shortcut_stays(self) -> None:
        file = flat(faceid_plus_file(SD15_WIDTHS))
        model = A4AModel.from_ip_adapter(file, pixart_like(), depth=1, faceid_plus_v2=True)
        model.randomize_source()
        assert model.source.image_proj.shortcut


@pytest.mark.parametrize(
    "options",
    [
        {"mapping": "linear"},
        {"mapping": "layerwise"},
        {"coupling_ratio": 0.5},
        {"coupling_ratio": 2.0},
        {"projection": "interpolate", "alignment": "pool"},
        {"depth": 1},
        {"share": "layer"},
    ],
)
def test_every_ablation_gets_gradients_everywhere(options: dict[str, Any]) -> None:
    target = pixart_like()
    model = A4AModel.from_ip_adapter(flat(base_file(SD15_WIDTHS)), target, **{"depth": 2, **options})
    before = {name: one.clone() for name, one in model.named_parameters()}
    losses(model, target, model.param_groups(1e-3, 1e-3, 1e-3))
    still = {name for name, one in model.named_parameters() if torch.equal(one, before[name])}
    if options.get("mapping") == "layerwise":  # source layers that no target layer takes
        taken = set(layer_pairs(len(SD15_WIDTHS), 3))
        still -= {f"source.to_{x}_ip.{number}.weight" for x in "kv" for number in range(7) if number not in taken}
    # A key's bias moves all scores of a query alike, and softmax takes that out; so do linear maps that end in one.
    assert {name for name in still if not (name.startswith("key_branch") and name.endswith("bias"))} == set()


def run_with_embeds(target: Any, embeds: torch.Tensor) -> torch.Tensor:
    """`a4a_models.run` for a U-Net with diffusers' own IP-Adapter on it."""
    generator = torch.Generator().manual_seed(7)
    sample, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 24, generator=generator)
    output: torch.Tensor = target(
        sample,
        timestep=torch.full((2,), 500),
        encoder_hidden_states=text,
        added_cond_kwargs={"image_embeds": [embeds[:, None]]},
        return_dict=False,
    )[0]
    return output
