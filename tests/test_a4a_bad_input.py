"""A4A and IP-Adapter files as detached adapters, and what is refused when they do not belong together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.a4a_models import SD15_WIDTHS, base_file, batch_for, flat, ip_adapter, pixart_like, run, sd15_like, sdxl_like
from xadapt.base import LiveBase
from xadapt.contract import Adapter
from xadapt.siblings import Pair
from xadapt.version import __version__
from xadapt_a4a import A4A_KIND, IP_ADAPTER, A4AModel, TrainA4A
from xadapt_a4a.folders import read_a4a, read_ip_adapter_file, write_a4a
from xadapt_a4a.versions import check_version

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def learned() -> Adapter:
    target = pixart_like()
    bases = Pair(None, LiveBase(target))
    return (
        TrainA4A(steps=1, depth=1).fit(ip_adapter(), bases, [batch_for(target)]).transfer(ip_adapter(), bases).adapter
    )


@pytest.fixture
def folder(learned: Adapter, tmp_path: Path) -> Path:
    write_a4a(learned, tmp_path / "a4a")
    return tmp_path / "a4a"


class TestFiles:
    def test_an_ip_adapter_file_there_and_back(self, tmp_path: Path) -> None:
        path = tmp_path / "ip-adapter_sd15.safetensors"
        tensors = flat(base_file(SD15_WIDTHS))
        save_file(tensors, path)
        adapter = IP_ADAPTER.read(path, False)
        assert adapter.kind is IP_ADAPTER
        IP_ADAPTER.write(adapter, tmp_path / "out")
        written = load_file(tmp_path / "out" / "ip-adapter.safetensors")
        assert written.keys() == tensors.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())

    def test_pickles_need_the_flag(self, tmp_path: Path) -> None:
        path = tmp_path / "ip-adapter_sd15.bin"
        torch.save(base_file(SD15_WIDTHS), path)
        with pytest.raises(ValueError, match="allow_pickle=True"):
            read_ip_adapter_file(path)
        assert read_ip_adapter_file(path, allow_pickle=True).tensors.keys() == flat(base_file(SD15_WIDTHS)).keys()

    def test_an_a4a_folder_is_what_the_model_opens(self, learned: Adapter, folder: Path) -> None:
        back = A4A_KIND.read(folder, False)
        assert back.kind is A4A_KIND
        assert back.config == learned.config | {"ip_adapter": ""}
        assert all(torch.equal(back.tensors[name], tensor) for name, tensor in learned.tensors.items())
        target = pixart_like()
        model = A4AModel.from_pretrained(folder)
        plain = run(target)
        with model.attached(target, model.encode(torch.ones(2, 16)), guidance=False):
            assert not torch.equal(run(target), plain)
        assert model.config["ip_adapter_fingerprint"]
        assert model.config["target_fingerprint"]

    def test_the_file_it_comes_from_is_recorded(self, tmp_path: Path) -> None:
        path = tmp_path / "ip-adapter_sd15.safetensors"
        save_file(flat(base_file(SD15_WIDTHS)), path)
        target = pixart_like()
        bases = Pair(None, LiveBase(target))
        adapter = read_ip_adapter_file(path)
        moved = TrainA4A(steps=1, depth=1).fit(adapter, bases, [batch_for(target)]).transfer(adapter, bases).adapter
        assert moved.config["ip_adapter"] == "ip-adapter_sd15.safetensors"
        assert moved.config["xadapt_version"] == __version__

    def test_each_kind_knows_its_own(self, folder: Path, tmp_path: Path) -> None:
        ours, other, pickled = tmp_path / "ip.safetensors", tmp_path / "lora.safetensors", tmp_path / "ip-adapter.bin"
        save_file(flat(base_file(SD15_WIDTHS)), ours)
        save_file({"lora.weight": torch.ones(1)}, other)
        pickled.write_bytes(b"")
        (tmp_path / "broken.safetensors").write_bytes(b"x")
        assert [IP_ADAPTER.recognises(path) for path in (ours, other, pickled, folder)] == [True, False, True, False]
        assert not IP_ADAPTER.recognises(tmp_path / "broken.safetensors")
        assert [A4A_KIND.recognises(path) for path in (ours, folder, tmp_path)] == [False, True, False]


class TestDamaged:
    def test_folders_that_hold_none(self, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"is no A4A adapter: it has no config\.json"):
            read_a4a(tmp_path)
        (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
        with pytest.raises(ValueError, match="holds 'UNet2DConditionModel', no A4A adapter"):
            read_a4a(tmp_path)
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"safetensors is damaged or not there"):
            read_a4a(folder)
        (folder / WEIGHTS).unlink()
        with pytest.raises(ValueError, match=r"safetensors is damaged or not there"):
            read_a4a(folder)

    def test_folders_of_a_newer_version(self, folder: Path) -> None:
        change_config(folder, xadapt_version="99.1")
        with pytest.raises(ValueError, match=rf"written by xadapt 99\.1, and this is {__version__}.*--upgrade"):
            read_a4a(folder)
        with pytest.raises(ValueError, match=r"written by xadapt 99\.1"):
            A4AModel.from_pretrained(folder)
        check_version("", "an old one")
        check_version("0.0.1", "an old one")
        with pytest.raises(ValueError, match="which is no version"):
            check_version("new", "one")

    def test_weights_that_are_not_the_configs(self, learned: Adapter, folder: Path) -> None:
        change_config(folder, depth=2)
        with pytest.raises(ValueError, match=r"lacks key_branch\.mapping.*its config is of another adapter"):
            read_a4a(folder)
        change_config(folder, depth=1, unknown=3)
        with pytest.raises(ValueError, match=r"has a config that is not one of an A4A adapter: .*unknown"):
            read_a4a(folder)
        name = next(iter(learned.tensors))
        with pytest.raises(ValueError, match="its config says"):
            write_a4a(replace(learned, tensors={**learned.tensors, name: torch.ones(1)}), folder)
        broken = {**learned.tensors, name: torch.full_like(learned.tensors[name], torch.nan)}
        with pytest.raises(ValueError, match="1 tensors hold NaN or infinity"):
            write_a4a(replace(learned, tensors=broken), folder)
        with pytest.raises(ValueError, match="holds adapters of kind 'a4a', not 'ip_adapter'"):
            write_a4a(ip_adapter(), folder)

    def test_nothing_is_filled_at_random(self, learned: Adapter, folder: Path) -> None:
        """What diffusers would only warn of."""
        change_config(folder, depth=2)
        with pytest.raises(ValueError, match=r"weights are not those of its config: missing keys key_branch\.mapping"):
            A4AModel.from_pretrained(folder)
        change_config(folder, depth=1)
        name = next(iter(learned.tensors))
        broken = {**learned.tensors, name: torch.full_like(learned.tensors[name], torch.nan)}
        save_file(broken, folder / WEIGHTS)
        with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity"):
            A4AModel.from_pretrained(folder)
        save_file({**learned.tensors, "foreign": torch.ones(1)}, folder / WEIGHTS)
        with pytest.raises(ValueError, match="unexpected keys foreign"):
            A4AModel.from_pretrained(folder)


class TestBelonging:
    """The rest of what can be given wrongly, each said at once and with nothing changed."""

    def test_an_a4a_adapter_on_another_target(self, folder: Path) -> None:
        model, other = A4AModel.from_pretrained(folder), sdxl_like()
        with pytest.raises(ValueError, match="This adapter is for PixArtTransformer2DModel"):
            model.attach(other, model.encode(torch.ones(1, 16)))

    def test_maps_of_an_adapter_that_has_been_trained_since(self, folder: Path) -> None:
        model, target = A4AModel.from_pretrained(folder), pixart_like()
        bank = model.encode(torch.ones(1, 16))
        with torch.no_grad():
            next(model.parameters()).add_(1)
        with pytest.raises(ValueError, match="before its weights changed"):
            model.attach(target, bank)

    def test_targets_that_take_none(self) -> None:
        no_attention = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match="has no attention layer"):
            fit(no_attention, [{}])

    def test_a_target_with_an_ip_adapter_of_diffusers(self) -> None:
        target: Any = sd15_like()
        target._load_ip_adapter_weights([base_file(SD15_WIDTHS)])
        with pytest.raises(ValueError, match=r"unload_ip_adapter\(\) first"):
            fit(target, [batch_for(target)])

    def test_random_latents(self) -> None:
        with pytest.raises(ValueError, match="images with captions, not from random latents"):
            TrainA4A().batches("random", Pair(None, LiveBase(pixart_like())))

    def test_embeddings_of_another_encoder(self) -> None:
        target = pixart_like()
        with pytest.raises(ValueError, match=r"wants `image_embeds` of width 16.*got a width of 24"):
            fit(target, [{**batch_for(target), "image_embeds": torch.ones(4, 24)}])

    def test_images_that_are_missing_or_no_numbers(self) -> None:
        target = pixart_like()
        batch = batch_for(target)
        with pytest.raises(ValueError, match="image_embeds missing"):
            fit(target, [{name: value for name, value in batch.items() if name != "image_embeds"}])
        with pytest.raises(ValueError, match="image_embeds hold NaN or infinity"):
            fit(target, [{**batch, "image_embeds": torch.full((4, 16), torch.nan)}])

    def test_a_failed_fit_leaves_the_target_as_it_was(self) -> None:
        target: Any = pixart_like()
        target.train()
        before = run(target.eval())
        target.train()
        processors = dict(target.attn_processors)
        with pytest.raises(ValueError, match="hold NaN"):
            fit(target, [{**batch_for(target), "latents": torch.full((4, 4, 8, 8), torch.inf)}], checkpointing=True)
        assert target.training
        assert not target.is_gradient_checkpointing
        assert all(parameter.requires_grad for parameter in target.parameters())
        assert target.attn_processors == processors
        assert torch.equal(run(target.eval()), before)


def fit(target: Any, batches: list[dict[str, Any]], **options: Any) -> Any:
    return TrainA4A(steps=2, depth=1, **options).fit(ip_adapter(), Pair(None, LiveBase(target)), batches)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
