"""Whatever the user calls data, as batches; and what is said where it is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_llama
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.data import Amount, open_data
from xadapt.data.batches import token_batches
from xadapt.data.counting import counting, samples_counting, with_neutral
from xadapt.data.denoisers import random_times

WORDS = [*"abcdefghij", "hello", "world", "<unk>"]


def with_tokenizer(folder: Path, words: list[str] = WORDS, template: str | None = None) -> Path:
    """A tiny Llama with a tokenizer that cuts at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    make_llama().save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<unk>")
    if template:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> CheckpointBase | LiveBase:
    return open_base(with_tokenizer(tmp_path_factory.mktemp("data") / "llama"))


class TestTexts:
    def test_a_text_file(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "lines.txt").write_text("a b c\n\nhello world\n")
        found = open_data(tmp_path / "lines.txt", base, base)
        (batch,) = found
        assert batch["input_ids"].tolist() == [[0, 1, 2], [10, 11, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
        assert found.said.endswith("2 samples, 5 tokens")
        assert found.rows == 5

    def test_jsonl_with_text(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a b"}\n{"text": "c"}\n')
        assert open_data(tmp_path / "rows.jsonl", base, base).rows == 3

    def test_messages_are_written_out_by_the_chat_template(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        row = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a b"}]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[10, 0, 1]]

    def test_of_prompts_with_completions_the_answers_count(self, base: Any, tmp_path: Path) -> None:
        rows = [{"prompt": "a b", "completion": " c"}, {"prompt": "hello", "completion": " world d"}]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = open_data(tmp_path / "rows.jsonl", base, base)
        (batch,) = found
        end = WORDS.index("<unk>")
        assert batch["input_ids"].tolist() == [[0, 1, 2, end], [10, 11, 3, end]]
        assert batch["labels"].tolist() == [[-100, -100, 2, end], [-100, 11, 3, end]]
        assert found.said.endswith("2 samples, 8 tokens, 5 of them in answers")
        counted = counting(batch)
        assert counted is not None
        assert counted.tolist() == [[False, True, True, False], [True, True, True, False]]

    def test_an_end_that_is_there_is_not_written_again(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": " b <unk>"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["input_ids"].tolist() == [[0, 1, WORDS.index("<unk>")]]

    def test_a_completion_is_more_than_a_text_beside_it(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"text": "a b c d", "prompt": "a", "completion": " b"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["labels"][0, :2].tolist() == [-100, 1]

    def test_prompts_without_answers_are_texts(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a b"}')
        (batch,) = open_data(tmp_path / "rows.jsonl", base, base)
        assert batch["input_ids"].tolist() == [[0, 1]]
        assert "labels" not in batch

    def test_some_prompts_leave_no_room(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(
            '{"prompt": "a b c", "completion": " d"}\n{"prompt": "a", "completion": " d"}'
        )
        found = open_data(tmp_path / "rows.jsonl", base, base, Amount(max_tokens=3))
        assert found.said.endswith("2 of them in answers (1 of the prompts leave no room for one: max_tokens=3)")

    def test_prompts_that_leave_no_room_for_an_answer(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"prompt": "a b c", "completion": " d"}')
        with pytest.raises(ValueError, match="With max_tokens=3 nothing of an answer is left"):
            open_data(tmp_path / "rows.jsonl", base, base, Amount(max_tokens=3))

    def test_of_a_conversation_the_last_answer_counts(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['role'][0] }} {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        turns = [{"role": "b", "content": "hello"}, {"role": "assistant", "content": "c d"}]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}))
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[1, 10, 0, 2, 3]]
        assert batch["labels"].tolist() == [[-100, -100, -100, 2, 3]]

        both = {"prompt": turns[:1], "completion": turns[1:]}
        (tmp_path / "rows.jsonl").write_text(json.dumps(both))
        (again,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert torch.equal(again["labels"], batch["labels"])

    def test_who_asks_last_is_to_be_answered(self, tmp_path: Path) -> None:
        template = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}j {% endif %}"
        there = open_base(with_tokenizer(tmp_path / "chat", template=template))
        (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}')
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[10, 9]]

    def test_the_template_writes_the_start_token_and_nobody_else(self, tmp_path: Path) -> None:
        from tokenizers.processors import TemplateProcessing

        template = "j {% for m in messages %}{{ m['content'] }} {% endfor %}"
        folder = with_tokenizer(tmp_path / "chat", template=template)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="j $A", special_tokens=[("j", 9)])
        tokenizer.save_pretrained(folder)
        there = open_base(folder)
        rows = '{"messages": [{"role": "user", "content": "a"}]}\n{"text": "a"}'
        (tmp_path / "rows.jsonl").write_text(rows)
        (batch,) = open_data(tmp_path / "rows.jsonl", there, there)
        assert batch["input_ids"].tolist() == [[9, 0], [9, 0]]

    def test_messages_without_a_chat_template(self, base: Any, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
        with pytest.raises(ValueError, match="no tokenizer of the two models has a chat template"):
            open_data(tmp_path / "rows.jsonl", base, base)

    def test_a_dataset(self, base: Any) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
        found = datasets.Dataset.from_list([{"text": "a b"}, {"text": "c d"}])
        assert open_data(found, base, base).rows == 4

    def test_how_much(self, base: Any) -> None:
        found = open_data(["a b c d"] * 5, base, base, Amount(samples=3, max_tokens=2, batch=2))
        assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 2), (1, 2)]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", b"", "is empty: it has no line of text"),
            ("blank.txt", b"\n\n", "is empty"),
            ("bytes.txt", b"fine\n\xff\xfe\n", "line 2 is no text in UTF-8"),
            ("rows.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
            ("rows.jsonl", b'{"text": "a"}\n\n{"question": "b"}\n', r"line 3 has the fields 'question' and no text"),
            ("rows.jsonl", b'{"messages": [{"content": "b"}]}\n', "line 1 has the fields 'messages'"),
            ("rows.jsonl", b'{"prompt": "b", "completion": " "}', "line 1 has a completion that is empty"),
            ("rows.jsonl", b"[1]\n", "line 1 is list"),
        ],
    )
    def test_what_cannot_be_read(self, base: Any, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_data(tmp_path / name, base, base)

    def test_nothing_there(self, base: Any, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is not there"):
            open_data(tmp_path / "gone.txt", base, base)
        with pytest.raises(ValueError, match="is a folder, and a language model reads text"):
            open_data(tmp_path, base, base)


class TestTokenizers:
    def test_tokenizers_that_differ_are_refused_with_what_differs(self, base: Any, tmp_path: Path) -> None:
        other = open_base(with_tokenizer(tmp_path / "other", [*WORDS[1:], WORDS[0]]))
        with pytest.raises(
            ValueError, match=r"The tokenizers differ: 'b a' is \['b', 'a'\] \[1, 0\] for .* from token 0 on"
        ):
            open_data(["b a"], base, other)

    def test_tokenizers_may_differ_where_the_data_is_not(self, base: Any, tmp_path: Path) -> None:
        other = open_base(with_tokenizer(tmp_path / "more", [*WORDS, "new"]))
        assert open_data(["b a"], base, other).rows == 2

    def test_no_tokenizer(self) -> None:
        live = open_base(make_llama())
        with pytest.raises(ValueError, match=r"has a tokenizer beside it\. Pass tokenizer=…, or token ids"):
            open_data(["a"], live, live)

    def test_a_tokenizer_of_ones_own(self, base: Any) -> None:
        from xadapt.data.tokenizing import tokenizer_of

        live = open_base(make_llama())
        assert open_data(["a b"], live, live, tokenizer=tokenizer_of(base)).rows == 2

    def test_ids_above_the_vocabulary(self, tmp_path: Path) -> None:
        there = open_base(with_tokenizer(tmp_path / "big", [f"w{n}" for n in range(99)] + ["<unk>"]))
        with pytest.raises(ValueError, match=r"token id 98, and .* has a vocabulary of 64"):
            open_data(["w98"], there, there)


class TestTensors:
    def test_token_ids(self, base: Any) -> None:
        found = open_data(torch.arange(30).reshape(3, 10), base, base, Amount(batch=2, max_tokens=4))
        assert [batch["input_ids"].shape for batch in found] == [(2, 4), (1, 4)]

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.rand(2, 3), "integers .samples, length."),
            (torch.arange(3), "integers .samples, length."),
            (torch.zeros(0, 3).long(), "is empty"),
            (torch.full((1, 2), -1), "start at 0"),
            (torch.full((1, 2), 64), "vocabulary of 64"),
        ],
    )
    def test_what_is_no_token_ids(self, base: Any, ids: torch.Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            open_data(ids, base, base)

    def test_batches_as_given(self, base: Any) -> None:
        given = [{"input_ids": torch.ones(2, 3).long()}]
        assert list(open_data(iter(given), base, base)) == given

    def test_batches_that_are_none(self, base: Any) -> None:
        with pytest.raises(ValueError, match="is empty"):
            open_data([], base, base)
        with pytest.raises(ValueError, match="its batches hold no tensor"):
            open_data([{}], base, base)
        with pytest.raises(TypeError, match="not int"):
            open_data([1], base, base)
        with pytest.raises(ValueError, match="Batch 0 of the data holds NaN or infinity in 'inputs_embeds'"):
            open_data([{"inputs_embeds": torch.full((1, 2, 3), float("nan"))}], base, base)
        with pytest.raises(TypeError, match="data=int"):
            open_data(3, base, base)

    def test_padding(self) -> None:
        (batch,) = token_batches([[1, 2], [3]], 8)
        assert batch["input_ids"].tolist() == [[1, 2], [3, 0]]

    @pytest.mark.parametrize("name", ["samples", "max_tokens", "batch"])
    def test_an_amount_is_positive(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name}=0: a positive integer"):
            Amount(**{name: 0})


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

        base = open_base(_pipeline(tmp_path / "pipe", unet), component="unet")
        (tmp_path / "pictures").mkdir()
        Image.new("RGB", (9, 9), "red").save(tmp_path / "pictures" / "one.png")
        found = open_data(tmp_path / "pictures", base, base)
        assert not found.random
        (batch,) = found
        assert batch["sample"].shape == (1, 4, 8, 8)

    def test_pictures_that_are_none(self, tmp_path: Path, unet: Any) -> None:
        base = open_base(_pipeline(tmp_path / "pipe", unet), component="unet")
        (tmp_path / "pictures").mkdir()
        with pytest.raises(ValueError, match="holds no picture"):
            open_data(tmp_path / "pictures", base, base)
        (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"broken\.png is no picture"):
            open_data(tmp_path / "pictures", base, base)

    def test_a_dataset_of_pictures(self, tmp_path: Path, unet: Any) -> None:
        datasets = pytest.importorskip("datasets", reason="datasets is an extra: pip install xadapt[data]")
        from PIL import Image

        base = open_base(_pipeline(tmp_path / "pipe", unet), component="unet")
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

        base = open_base(_pipeline(tmp_path / "pipe", _network("flux"), "transformer"), component="transformer")
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


def _pipeline(folder: Path, network: Any, name: str = "unet") -> Path:
    from diffusers import AutoencoderKL

    network.save_pretrained(folder / name)
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    vae.save_pretrained(folder / "vae")
    index = {
        "_class_name": "StableDiffusionPipeline",
        name: ["diffusers", type(network).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


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


class TestWhatCounts:
    def test_of_neutral_inputs_nothing_does(self) -> None:
        data, neutral = ([{"input_ids": torch.full((1, 3), fill)}] for fill in (0, 10))
        one, other = with_neutral(data, neutral)
        assert one is data[0]
        counted = counting(other)
        assert counted is not None
        assert not counted.any()
        assert "labels" not in neutral[0]

    def test_of_denoisers_by_the_sample(self) -> None:
        (batch,) = with_neutral(
            [],
            [{"timestep": torch.zeros(1), "sample": torch.zeros(4, 2), "encoder_hidden_states": torch.zeros(4, 3, 2)}],
        )
        counted = samples_counting(batch, 4)
        assert counted is not None
        assert counted.tolist() == [False] * 4
        assert samples_counting({"labels": torch.tensor([-100, 0])}, 2).tolist() == [False, True]  # type: ignore[union-attr]  # given
        with pytest.raises(ValueError, match="labels are one for each sample"):
            samples_counting(batch, 3)

    def test_padding_and_what_labels_leave_out_do_not_count(self) -> None:
        ids, mask = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0, 1, 1, 1]])
        labels = torch.tensor([[0, 0, -100, 0]])
        assert counting({"input_ids": ids}) is None
        assert counting({"input_ids": ids, "attention_mask": mask}).tolist() == [[False, True, True, True]]  # type: ignore[union-attr]  # given
        found = counting({"input_ids": ids, "attention_mask": mask, "labels": labels})
        assert found is not None
        assert found.tolist() == [[False, False, True, False]]
