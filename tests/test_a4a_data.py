"""Images and captions as A4A reads them, encoded as stock pipelines encode them, and kept."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image

from tests.a4a_models import SD15_WIDTHS, base_file, faceid_file, flat, ip_adapter, pixart_like, plus_file, sana_like
from tests.a4a_pipes import caption, make_target, picture, write_image_encoder, write_images, write_pipeline
from xadapt.base import LiveBase
from xadapt.siblings import Pair
from xadapt_a4a import IPAdapterSource, TrainA4A
from xadapt_a4a.data import CachedBatches, Encodable
from xadapt_a4a.encoding import centre
from xadapt_a4a.examples import examples_of

FAMILIES = ("sd15", "sdxl", "pixart", "sd3", "flux")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pipelines, the image encoder and five images, in one folder."""
    folder = tmp_path_factory.mktemp("world")
    for name in FAMILIES:
        write_pipeline(name, folder / name)
    write_image_encoder(folder / "encoder")
    write_images(folder / "images")
    return folder


def options(world: Path, name: str = "sdxl", **given: Any) -> TrainA4A:
    return TrainA4A(
        **{
            **{"steps": 2, "depth": 1, "batch_size": 2, "pipeline": str(world / name)},
            **{"image_encoder": str(world / "encoder"), "resolution": 16 if name == "flux" else 0, **given},
        }
    )


def encode(options: TrainA4A, target: Any, data: Any, file: Any = None) -> CachedBatches:
    source = IPAdapterSource.load(flat(file or base_file(SD15_WIDTHS)))
    batches: Any = options.batches(data, Pair(None, LiveBase(target)))
    assert isinstance(batches, Encodable)
    try:
        return batches.encoded(source, target, Accelerator())
    finally:
        AcceleratorState._reset_state()


def seen_by(target: Any, call: Any) -> dict[str, Any]:
    """What the target's forward is given in the first step of a call."""
    seen: list[dict[str, Any]] = []
    hook = target.register_forward_pre_hook(
        lambda module, inputs, kwargs: seen.append({**kwargs, "inputs": inputs}), with_kwargs=True
    )
    try:
        call()
    finally:
        hook.remove()
    return seen[0]


def flattened(batch: dict[str, Any], path: str = "") -> dict[str, torch.Tensor]:
    """The batch's tensors by path, without those of `empty_text`."""
    found: dict[str, torch.Tensor] = {}
    for name, value in batch.items():
        if isinstance(value, dict) and name != "empty_text":
            found |= flattened(value, f"{path}{name}.")
        elif isinstance(value, torch.Tensor):
            found[path + name] = value
    return found


class TestEncoding:
    @pytest.mark.parametrize("name", FAMILIES)
    def test_the_target_is_told_what_its_pipeline_tells_it(self, world: Path, tmp_path: Path, name: str) -> None:
        from diffusers import DiffusionPipeline

        target = make_target(name)
        Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")  # as large as the target wants: nothing is cut off
        (tmp_path / "a.txt").write_text("a red square")
        _, batch = next(encode(options(world, name), target, tmp_path).numbered(0, 1, 0))
        part = "unet" if name.startswith("sd1") or name == "sdxl" else "transformer"
        pipe = DiffusionPipeline.from_pretrained(world / name, **{part: target})
        pipe.set_progress_bar_config(disable=True)
        given: dict[str, Any] = {"prompt": "a red square", "num_inference_steps": 1, "output_type": "latent"}
        given |= {"height": 16, "width": 16} | ({"use_resolution_binning": False} if name == "pixart" else {})
        told = seen_by(target, lambda: pipe(**given))
        halves = 1 if name == "flux" else 2  # [negative; positive]
        texts, empties = flattened(batch), flattened(batch["empty_text"])
        assert empties.keys() <= texts.keys()
        for path, text in texts.items():
            if path in empties or path.endswith("time_ids"):
                parts = flattened(told)[path].chunk(halves)
                torch.testing.assert_close(text.to(parts[-1]), parts[-1])
                if halves == 2:
                    torch.testing.assert_close(empties.get(path, text).to(parts[0]), parts[0])
        for key in ("img_ids", "txt_ids"):
            if name == "flux":
                assert torch.equal(batch[key], told[key])
        noisy = told["inputs"][0] if told["inputs"] else told["hidden_states"]
        assert noisy.shape[1:] == batch["latents"].shape[1:]

    @pytest.mark.parametrize("name", FAMILIES)
    def test_it_trains(self, world: Path, name: str) -> None:
        target = make_target(name)
        chosen = options(world, name, text_drop=0.5)
        bases = Pair(None, LiveBase(target))
        learned: Any = chosen.fit(ip_adapter(), bases, chosen.batches(str(world / "images"), bases))
        assert len(learned.losses) == 2

    def test_latents_are_those_of_the_pipelines_own_image_to_image(self, world: Path) -> None:
        from diffusers import StableDiffusionXLImg2ImgPipeline

        target: Any = make_target("sdxl")
        pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(world / "sdxl", unet=target)
        batches = encode(options(world, batch_size=5), target, world / "images")
        _, batch = next(batches.numbered(0, 1, 0))
        wanted = []
        for number in range(5):
            values = pipe.image_processor.preprocess(centre(picture(number), 16).image)
            wanted.append(pipe.vae.encode(values).latent_dist.mode()[0] * pipe.vae.config.scaling_factor)
        for latents in batch["latents"]:
            assert min((latents - one).abs().max().item() for one in wanted) < 1e-5
        sizes = sorted(batch["added_cond_kwargs"]["time_ids"].tolist())
        # The picture is resized to a height of 16, and the middle of its width is cut out.
        assert sizes == sorted([20, 24 + 4 * n, 0, (round((24 + 4 * n) * 0.8) - 16) // 2, 16, 16] for n in range(5))

    @pytest.mark.parametrize("make_file", [base_file, plus_file])
    def test_images_are_embedded_as_diffusers_does_for_ip_adapters(self, world: Path, make_file: Any) -> None:
        from diffusers import StableDiffusionPipeline
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        encoder = CLIPVisionModelWithProjection.from_pretrained(world / "encoder")
        parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker"))
        pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
        pipe.__dict__.update(parts, image_encoder=encoder, feature_extractor=processor)
        hidden = make_file is plus_file
        with torch.no_grad():
            told = [pipe.encode_image(picture(number), "cpu", 1, hidden or None) for number in range(5)]
        batches = encode(options(world, batch_size=5), make_target("sdxl"), world / "images", make_file(SD15_WIDTHS))
        _, batch = next(batches.numbered(0, 1, 0))
        for embeds in batch["image_embeds"]:
            assert min((embeds - one[0][0]).abs().max().item() for one in told) < 1e-5
        if hidden:
            torch.testing.assert_close(batch["negative_image_embeds"], told[0][1])
        else:
            assert "negative_image_embeds" not in batch

    def test_what_cannot_be_encoded_is_refused(self, world: Path, tmp_path: Path) -> None:
        images, target = world / "images", make_target("sdxl")
        with pytest.raises(ValueError, match=r"pipeline='…'"):
            options(world, pipeline="").batches(images, Pair(None, LiveBase(target)))
        with pytest.raises(ValueError, match=r"image_encoder='…'"):
            options(world, image_encoder="").batches(images, Pair(None, LiveBase(target)))
        with pytest.raises(ValueError, match="no pipeline of UNet2DConditionModel: transformer is a PixArt"):
            encode(options(world, "pixart"), target, images)
        with pytest.raises(ValueError, match="what SanaTransformer2DModel is told beside the prompt is not known"):
            encode(options(world), sana_like(), images)
        wide = write_image_encoder(tmp_path / "wide", width=24)
        with pytest.raises(ValueError, match=r"wants `image_embeds` of width 16.*gives a width of 24"):
            encode(options(world, image_encoder=wide), target, images)
        with (
            pytest.raises(ValueError, match=r"insightface.*Embed the faces yourself"),
            pytest.warns(UserWarning, match="LoRA"),
        ):
            encode(options(world), target, images, faceid_file(SD15_WIDTHS))
        with pytest.raises(ValueError, match=r"resolution=15 .* write a multiple of 4: 16"):
            encode(options(world, resolution=15), target, images)
        with pytest.raises(ValueError, match="batch_size=0"):
            options(world, batch_size=0).batches(images, Pair(None, LiveBase(target)))
        with pytest.raises(TypeError, match="not encoded yet"):
            iter(options(world).batches(images, Pair(None, LiveBase(target))))


class TestCache:
    def test_what_is_encoded_once_is_not_encoded_again(self, world: Path, tmp_path: Path) -> None:
        target, chosen = make_target("sdxl"), options(world, cache=str(tmp_path))
        first = encode(chosen, target, world / "images")
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        assert len(files) == 6  # five samples and the empty prompt
        again = encode(chosen, target, world / "images")
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files
        (_, one), (_, other) = next(first.numbered(3, 1, 0)), next(again.numbered(3, 1, 0))
        assert torch.equal(one["latents"], other["latents"])
        encode(options(world, cache=str(tmp_path), resolution=32), target, world / "images")
        assert len(list(tmp_path.rglob("*.safetensors"))) == 12
        assert not list(tmp_path.rglob("*.tmp"))

    def test_every_pass_has_an_order_of_its_own_and_can_be_entered_anywhere(self, world: Path) -> None:
        batches = encode(options(world), make_target("sdxl"), world / "images")
        assert batches.samples == 5
        walked = [batch["latents"] for (_, batch), _ in zip(batches.numbered(0, 1, 0), range(8), strict=False)]
        entered = [(n, batch["latents"]) for (n, batch), _ in zip(batches.numbered(3, 2, 0), range(2), strict=False)]
        assert [number for number, _ in entered] == [3, 5]
        assert torch.equal(entered[0][1], walked[3])
        assert torch.equal(entered[1][1], walked[5])
        passes = [torch.cat(walked[start : start + 2]) for start in range(0, 8, 2)]
        assert any(not torch.equal(passes[0], other) for other in passes[1:])

    def test_a_run_goes_on_over_encoded_images(self, world: Path, tmp_path: Path) -> None:
        def learn(**given: Any) -> Any:
            chosen = options(world, "sd15", cache=str(tmp_path / "cache"), **given)
            bases = Pair(None, LiveBase(make_target("sd15")))
            return chosen.fit(ip_adapter(), bases, chosen.batches(world / "images", bases))

        whole = learn(steps=5)
        folder = {"checkpoints": str(tmp_path / "run"), "checkpoint_every": 3}
        learn(steps=3, **folder)
        assert learn(steps=5, **folder).losses == whole.losses
        written = json.loads((tmp_path / "run" / "checkpoint-00000005" / "training.json").read_text())
        assert written["settings"]["prediction"] == "v_prediction"  # as the pipeline's scheduler says

    def test_unreadable_images_are_left_out_counted_and_listed(
        self, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        images = write_images(tmp_path / "images", 4)
        (images / "1.png").write_bytes((images / "1.png").read_bytes()[:60])
        (images / "2.png").write_text("no image")
        chosen = options(world, cache=str(tmp_path / "cache"))
        with caplog.at_level(logging.WARNING, logger="xadapt"):
            batches = encode(chosen, make_target("sdxl"), images)
        assert [name for name, _ in batches.skipped] == ["1.png", "2.png"]
        assert batches.samples == 2
        assert "2 images cannot be read and are left out, 2 are trained on: 1.png (" in caplog.text
        listed = (tmp_path / "cache" / "skipped.txt").read_text().splitlines()
        assert [line.partition("\t")[0] for line in listed] == ["1.png", "2.png"]
        for path in images.glob("*.png"):
            path.write_text("no image")
        with pytest.raises(ValueError, match=r"None of the images can be read: 0\.png \(no image\)"):
            encode(chosen, make_target("sdxl"), images)


class TestExamples:
    def test_folders_in_three_forms_are_the_same(self, tmp_path: Path) -> None:
        beside = write_images(tmp_path / "beside", 3)
        lines, table = tmp_path / "lines", tmp_path / "table"
        rows = [{"file_name": f"{number}.png", "text": caption(number)} for number in range(3)]
        for folder in (lines, table):
            folder.mkdir()
            for number in range(3):
                picture(number).save(folder / f"{number}.png")
        (lines / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with (table / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text"])
            writer.writeheader()
            writer.writerows(rows)
        read = [
            [(one.name, one.content(), one.caption) for one in examples_of(path)] for path in (beside, lines, table)
        ]
        assert read[0] == read[1] == read[2]
        assert [one[2] for one in read[0]] == [caption(number) for number in range(3)]

    def test_shards_of_webdataset(self, world: Path, tmp_path: Path) -> None:
        texts = [("txt", caption(0).encode()), ("json", json.dumps({"prompt": caption(1)}).encode())]
        for shard, (suffix, text) in enumerate(texts):
            write_tar(tmp_path / f"{shard}.tar", [(f"x/{shard}.png", png(shard)), (f"x/{shard}.{suffix}", text)])
        for given in (tmp_path, str(tmp_path)):
            examples = examples_of(given)
            assert [(one.name, one.caption) for one in examples] == [
                ("0.tar:x/0", caption(0)),
                ("1.tar:x/1", caption(1)),
            ]
            assert [one.content() for one in examples] == [png(0), png(1)]
        assert encode(options(world), make_target("sdxl"), tmp_path).samples == 2
        assert len(list(examples_of(tmp_path / "0.tar"))) == 1

    def test_datasets(self, world: Path, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
        images = [{"bytes": png(number), "path": None} for number in range(4)]
        images[2] = {"bytes": b"broken", "path": None}
        columns = {"photo": images, "caption": [caption(number) for number in range(4)]}
        features = datasets.Features({"photo": datasets.Image(), "caption": datasets.Value("string")})
        dataset = datasets.Dataset.from_dict(columns, features=features)
        batches = encode(options(world), make_target("sdxl"), dataset)
        assert batches.samples == 3
        assert [name for name, _ in batches.skipped] == ["row 2"]
        dataset.save_to_disk(tmp_path / "saved")
        assert [one.caption for one in examples_of(tmp_path / "saved")] == columns["caption"]
        with pytest.raises(ValueError, match="several splits: train"):
            examples_of(datasets.DatasetDict({"train": dataset}))
        with pytest.raises(ValueError, match=r"no column 'captoin' for captions. Did you mean 'caption'"):
            examples_of(dataset, caption_column="captoin")
        with pytest.raises(ValueError, match="has no captions: none of text, caption, prompt"):
            examples_of(dataset.remove_columns("caption"))
        with pytest.raises(ValueError, match="no column of images"):
            examples_of(dataset.remove_columns("photo"))
        with pytest.raises(ValueError, match="is empty"):
            examples_of(dataset.select([]))
        nameless = dataset.cast_column("photo", datasets.Image()).add_column("text", [None] * 4)
        with pytest.raises(ValueError, match="Row 0 has no caption in 'text'"):
            list(examples_of(nameless))

    def test_a_dataset_without_captions_is_refused(self, tmp_path: Path) -> None:
        images = write_images(tmp_path / "images", 3)
        (images / "1.txt").unlink()
        with pytest.raises(
            ValueError, match=r"1 of the 3 images in .* have no caption: 1\.png\. Write it into NAME\.txt"
        ):
            examples_of(images)
        (images / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 3}')
        with pytest.raises(
            ValueError, match=r"none of text, caption, prompt is among file_name, label.*caption_column"
        ):
            examples_of(images)
        (images / "metadata.jsonl").write_text('{"text": "a"}')
        with pytest.raises(ValueError, match="row 1 of its metadata has no file_name"):
            examples_of(images)
        (images / "metadata.jsonl").write_text('{"text": "a"')
        with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1 is not JSON"):
            examples_of(images)
        write_tar(tmp_path / "a.tar", [("a.png", png(0)), ("b.png", png(1))])
        with pytest.raises(ValueError, match=r"a\.tar:a has no caption"):
            list(examples_of(tmp_path / "a.tar"))

    def test_what_is_no_data(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no images"):
            examples_of(tmp_path)
        with pytest.raises(ValueError, match="is not there"):
            examples_of(tmp_path / "nowhere")
        (tmp_path / "a.json").write_text("{}")
        with pytest.raises(ValueError, match="is no data to train on"):
            examples_of(tmp_path / "a.json")
        write_tar(tmp_path / "empty.tar", [("a.txt", b"text")])
        with pytest.raises(ValueError, match="hold no images"):
            list(examples_of(tmp_path / "empty.tar"))
        (tmp_path / "cut.tar").write_bytes((tmp_path / "empty.tar").read_bytes()[:700])
        with pytest.raises(ValueError, match="no whole tar file"):
            list(examples_of(tmp_path / "cut.tar"))
        with pytest.raises(TypeError, match="got int"):
            TrainA4A().batches(3, Pair(None, LiveBase(pixart_like())))

    def test_batches_that_are_ready_pass_through(self) -> None:
        ready = [{"latents": torch.ones(1)}]
        assert TrainA4A().batches(ready, Pair(None, LiveBase(pixart_like()))) is ready


def png(number: int) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, "png")
    return stream.getvalue()


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
