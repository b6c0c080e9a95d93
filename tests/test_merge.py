"""Merging writes the base's checkpoint again, file for file, with the adapter in its weights and nothing else changed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoHaConfig, LoraConfig, OFTConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.feature_models import adapted
from tests.merge_models import (
    TARGETS,
    files_in,
    header_of,
    index_of,
    make_adapter,
    make_checkpoint,
    merged_by_peft,
    tensors_of,
)
from xadapt import FullAdaConfig, HybridAdaConfig, InputAdaConfig, OutputAdaConfig, feature_space
from xadapt.folding import Layer
from xadapt.merge_files import WorkFolder

pytestmark = pytest.mark.usefixtures("two_threads")
Logits = Callable[[nn.Module], Tensor]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"v_proj": 2}),
    "input": lambda: InputAdaConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "output": lambda: OutputAdaConfig(r=4, target_modules=TARGETS),
    "hybrid": lambda: HybridAdaConfig(r=4, feature_r=2, target_modules=TARGETS),
    "full": lambda: FullAdaConfig(space="output", target_modules=TARGETS),
    "tied": lambda: InputAdaConfig(r=4, target_modules=TARGETS, tie=r"(layers\.\d+)\.self_attn"),
    "dora": lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "loha": lambda: LoHaConfig(r=4, alpha=4, target_modules=TARGETS),
    "oft": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS),
    "input dora": lambda: InputAdaConfig(r=4, use_dora=True, target_modules=TARGETS),
    "output loha": lambda: feature_space(LoHaConfig(r=4, alpha=4, target_modules=TARGETS), "output"),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "base")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "merged"


def load_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_as_peft_merges(name: str, base: Path, out: Path, tmp_path: Path, logits: Logits) -> None:
    adapter = make_adapter(tmp_path / "adapter", CONFIGS[name]())
    xadapt.merge(adapter, base, out)
    expected = merged_by_peft(load_model(base), adapter)
    for key, tensor in load_model(out).state_dict().items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    tuner = xadapt.load(load_model(base), adapter)
    torch.testing.assert_close(logits(load_model(out)), logits(tuner), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(load_model(out)), logits(load_model(base)), rtol=0, atol=2e-5)


class TestTheFolder:
    def test_is_the_base_s_file_for_file(self, base: Path, out: Path, tmp_path: Path) -> None:
        xadapt.merge(make_adapter(tmp_path / "adapter"), base, out)
        assert files_in(out) == files_in(base)
        assert len(list(base.glob("*.safetensors"))) > 2
        for name in files_in(base):
            if name.endswith(".safetensors"):
                assert header_of(out / name) == header_of(base / name)
            else:
                assert (out / name).read_bytes() == (base / name).read_bytes()
        assert {"config.json", "generation_config.json", "tokenizer.json", "extra/notes.txt"} <= files_in(out)
        assert {path.name for path in tmp_path.iterdir()} == {"base", "merged", "adapter"}

    def test_only_adapted_tensors_change(self, base: Path, out: Path, tmp_path: Path) -> None:
        plan = xadapt.merge(make_adapter(tmp_path / "adapter"), base, out)
        before, after = tensors_of(base), tensors_of(out)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {f"{layer}.weight" for layer in plan.layers}
        assert len(changed) == 6
        assert index_of(out) == index_of(base)

    def test_with_all_there_is_in_one_file(self, out: Path, tmp_path: Path, logits: Logits) -> None:
        base, adapter = make_checkpoint(tmp_path / "one", shards=False), make_adapter(tmp_path / "adapter")
        xadapt.merge(adapter, base, out)
        torch.testing.assert_close(logits(load_model(out)), logits(xadapt.load(load_model(base), adapter)))

    def test_weights_in_other_formats_stay_behind(self, base: Path, out: Path, tmp_path: Path) -> None:
        others = {"pytorch_model.bin", "model.fp16.safetensors", "model.gguf", "original/consolidated.00.pth"}
        kept = {"2_Dense/model.safetensors", "2_Dense/config.json", ".gitattributes"}
        hidden = {".git/objects/ab", ".cache/huggingface/download/x.lock"}
        for name in others | kept | hidden:
            (base / name).parent.mkdir(exist_ok=True, parents=True)
            (base / name).write_bytes(b"12345")
        plan = xadapt.merge(make_adapter(tmp_path / "adapter"), base, out)
        assert {str(file.path) for file in plan.files if file.action == "left out"} == others
        assert files_in(out) == files_in(base) - others - hidden

    def test_links_are_followed(self, base: Path, out: Path, tmp_path: Path, logits: Logits) -> None:
        """As in the Hub's cache: snapshots/<commit>/model.safetensors → ../../blobs/<hash>."""
        linked = tmp_path / "snapshot"
        linked.mkdir()
        for number, path in enumerate(sorted(base.iterdir())):
            target = path.rename(tmp_path / f"blob{number}")
            (linked / path.name).symlink_to(target)
        adapter = make_adapter(tmp_path / "adapter")
        xadapt.merge(adapter, linked, out)
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert (out / "extra" / "notes.txt").read_text() == "x"
        torch.testing.assert_close(logits(load_model(out)), logits(xadapt.load(load_model(linked), adapter)))


class TestThePlan:
    def test_writes_nothing_and_is_true(self, base: Path, out: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter")
        (base / "pytorch_model.bin").write_bytes(b"123")
        before = files_in(tmp_path)
        plan = xadapt.plan_merge(adapter, base, out)
        assert files_in(tmp_path) == before
        assert xadapt.merge(adapter, base, out) == plan
        written = {path.relative_to(out): path.stat().st_size for path in out.rglob("*") if path.is_file()}
        assert {file.path: file.size for file in plan.files if file.action != "left out"} == written
        assert plan.bytes_written == sum(written.values())
        assert plan.bytes_changed == sum(tensors_of(base)[f"{layer}.weight"].nbytes for layer in plan.layers)
        for file in plan.files:
            changes = (base / file.path).suffix == ".safetensors"
            assert file.action == ("merge" if changes else "left out" if file.path.suffix == ".bin" else "copy")
        assert json.loads(json.dumps(plan.as_dict()))["bytes_changed"] == plan.bytes_changed

    def test_reads_no_weight_of_the_base(self, base: Path, out: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter")
        for file in base.glob("*.safetensors"):
            data = file.read_bytes()
            file.write_bytes(header_of(file) + b"\xff" * (len(data) - len(header_of(file))))  # NaN throughout
        assert xadapt.plan_merge(adapter, base, out).layers


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", ["lora", "input", "output", "dora"])
    def test_once(self, dtype: torch.dtype, name: str, out: Path, tmp_path: Path) -> None:
        """The same as merging in float32 and rounding that; a hair's breadth beside a tie it may fall the other way."""
        adapter = make_adapter(tmp_path / "adapter", CONFIGS[name]())
        base = make_checkpoint(tmp_path / "half", make_llama(seed=4).to(dtype))
        xadapt.merge(adapter, base, out)
        exact = merged_by_peft(load_model(base).float(), adapter)
        for key, tensor in tensors_of(out).items():
            assert tensor.dtype == dtype
            differ = tensor != exact[key].to(dtype)
            assert differ.float().mean() < 0.01
            off = (tensor.double() - exact[key].double()).abs()
            assert bool((off <= 0.502 * torch.finfo(dtype).eps * exact[key].double().abs() + 1e-7).all())

    def test_several_adapters_are_rounded_together(self, out: Path, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "half", make_llama(seed=4).bfloat16())
        one = make_adapter(tmp_path / "one", CONFIGS["input"]())
        other = make_adapter(tmp_path / "other", CONFIGS["loha"]())
        xadapt.merge([one, other], base, out, weights=[0.5, -1])
        bare = load_model(base).float().state_dict()
        parts = [merged_by_peft(load_model(base).float(), adapter) for adapter in (one, other)]
        for key, tensor in tensors_of(out).items():
            exact = bare[key] + 0.5 * (parts[0][key] - bare[key]) - (parts[1][key] - bare[key])
            torch.testing.assert_close(tensor.float(), exact, rtol=0.502 * 2**-7, atol=1e-6)

    def test_those_that_peft_merges_and_plain_ones_add_up(self, base: Path, out: Path, tmp_path: Path) -> None:
        """DoRA needs the base's weights as data where a LoRA needs their shapes only."""
        configs = {
            "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
            "lora": LoraConfig(r=2, target_modules=["q_proj"]),
        }
        folders = [make_adapter(tmp_path / name, config) for name, config in configs.items()]
        bare, alone = tensors_of(base), []
        for folder in folders:
            xadapt.merge(folder, base, out / folder.name)
            alone.append(tensors_of(out / folder.name))
        xadapt.merge(folders, base, out / "both")
        for name, tensor in tensors_of(out / "both").items():
            expected = bare[name] + sum(merged[name] - bare[name] for merged in alone)
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)


class TestWholeModules:
    def test_take_the_base_s_place(self, base: Path, out: Path, tmp_path: Path, logits: Logits) -> None:
        for name, config in {"lora": LoraConfig, "dora": lambda **o: LoraConfig(use_dora=True, **o)}.items():
            adapter = make_adapter(tmp_path / name, config(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
            xadapt.merge(adapter, base, out / name)
            saved = load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
            assert torch.equal(tensors_of(out / name)["lm_head.weight"], saved)
            tuner = xadapt.load(load_model(base), adapter)
            torch.testing.assert_close(logits(load_model(out / name)), logits(tuner), rtol=1e-4, atol=1e-5)

    def test_of_several_adapters_are_refused(self, base: Path, out: Path, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = make_adapter(tmp_path / "adapter", config)
        with pytest.raises(ValueError, match=r"brings lm_head.weight along whole: that cannot be added up"):
            xadapt.merge([adapter, adapter], base, out)

    def test_count_whole(self, base: Path, out: Path, tmp_path: Path) -> None:
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = make_adapter(tmp_path / "adapter", config)
        for merge in (xadapt.plan_merge, xadapt.merge):
            with pytest.raises(ValueError, match=r"lm_head.weight along whole .*cannot count weights=\[0.5\]: leave"):
                merge(adapter, base, out, weights=[0.5])
        assert not out.exists()
        xadapt.merge(adapter, base, out, weights=[1])

    def test_that_are_too_large_for_the_base_s_dtype(self, out: Path, tmp_path: Path) -> None:
        base = make_checkpoint(tmp_path / "half", make_llama(seed=4).half())
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapter = make_adapter(tmp_path / "adapter", config, std=1e6)
        file = adapter / "adapter_model.safetensors"
        save_file({n: t * (1.0 if "lm_head" in n else 1e-9) for n, t in load_file(file).items()}, file)
        with pytest.raises(ValueError, match=r"lm_head.weight with the adapter in it .*float16"):
            xadapt.merge(adapter, base, out)
        assert not out.exists()


class TestNaN:
    """A stock LoRA's update is asked of the adapter alone, so its sum with the weight has to be looked at."""

    def spoilt(self, base: Path, layer: str) -> Path:
        file = base / index_of(base)[f"model.layers.0.self_attn.{layer}.weight"]
        tensors = load_file(file)
        tensors[f"model.layers.0.self_attn.{layer}.weight"][0, 0] = torch.nan
        save_file(tensors, file, metadata={"format": "pt"})
        return base

    @pytest.mark.parametrize("name", ["lora", "input", "dora"])
    def test_in_what_is_adapted_is_refused(self, name: str, base: Path, out: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", CONFIGS[name]())
        with pytest.raises(ValueError, match=r"q_proj.* holds? NaN or infinity"):
            xadapt.merge(adapter, self.spoilt(base, "q_proj"), out)
        assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}

    def test_elsewhere_is_copied(self, base: Path, out: Path, tmp_path: Path) -> None:
        xadapt.merge(make_adapter(tmp_path / "adapter"), self.spoilt(base, "o_proj"), out)
        assert tensors_of(out)["model.layers.0.self_attn.o_proj.weight"].isnan().any()


class TestVariants:
    @pytest.fixture
    def both(self, tmp_path: Path) -> Path:
        make_llama(seed=4).save_pretrained(tmp_path / "both")
        make_llama(seed=5).half().save_pretrained(tmp_path / "both", variant="fp16")
        return tmp_path / "both"

    def test_one_is_merged_and_the_other_stays_behind(self, both: Path, out: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter")
        plan = xadapt.merge(adapter, both, out, variant="fp16")
        assert {str(file.path): file.action for file in plan.files if file.path.suffix == ".safetensors"} == {
            "model.fp16.safetensors": "merge",
            "model.safetensors": "left out",
        }
        expected = merged_by_peft(make_llama(seed=5).half().float(), adapter)
        for name, tensor in load_file(out / "model.fp16.safetensors").items():
            torch.testing.assert_close(tensor, expected[name].half(), rtol=2e-3, atol=1e-6)

    def test_an_unfinished_one_is_not_taken_for_another(
        self, both: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        adapter = make_adapter(tmp_path / "adapter")
        keys = []

        class Watched(WorkFolder):
            def __init__(self, out: Path, key: str) -> None:
                keys.append(key)
                super().__init__(out, key)

        monkeypatch.setattr(xadapt.merging, "WorkFolder", Watched)
        xadapt.merge(adapter, both, out)
        xadapt.merge(adapter, both, tmp_path / "again")
        xadapt.merge(adapter, both, tmp_path / "other", variant="fp16")
        assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_what_peft_merges_itself_is_made_one_layer_at_a_time(
    verb: str, base: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes many copies of the layer's weight, which as many threads would multiply."""
    adapter = make_adapter(tmp_path / "adapter", CONFIGS["dora"]())
    update, inside, most = Layer.update, [], []

    def watched(self: Layer, weights: Any) -> Any:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.02)
        made = update(self, weights)
        inside.remove(self)
        return made

    monkeypatch.setattr(Layer, "update", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        if verb == "merge":
            xadapt.merge(adapter, base, out)
        else:
            xadapt.export_lora(adapter, base, out, rank=4)
    finally:
        torch.set_num_threads(threads)
    assert most == [1] * 6


class TestTies:
    @pytest.fixture
    def tied(self, tmp_path: Path) -> Path:
        return make_checkpoint(tmp_path / "tied", make_gpt2(), shards=False)

    def test_stay(self, tied: Path, out: Path, tmp_path: Path, logits: Logits) -> None:
        config = OutputAdaConfig(r=4, target_modules=["c_attn", "mlp.c_proj"])
        adapter = make_adapter(tmp_path / "adapter", config, make_gpt2)
        xadapt.merge(adapter, tied, out)
        model = load_model(out)
        assert model.lm_head.weight is model.transformer.wte.weight
        assert "lm_head.weight" not in tensors_of(out)
        torch.testing.assert_close(logits(model), logits(xadapt.load(load_model(tied), adapter)))

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's word on it
    @pytest.mark.parametrize("options", [{"target_modules": ["wte"]}, {"target_modules": ["lm_head"]}])
    def test_are_not_changed_for_all(self, options: dict[str, Any], tied: Path, out: Path, tmp_path: Path) -> None:
        adapter = make_adapter(tmp_path / "adapter", LoraConfig(r=4, **options), make_gpt2)
        with pytest.raises(ValueError, match=r"are one tensor in .*Untie them first"):
            xadapt.merge(adapter, tied, out)

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
    def test_are_not_replaced_for_all(self, tied: Path, out: Path, tmp_path: Path) -> None:
        config = LoraConfig(r=4, target_modules=["c_fc"], fan_in_fan_out=True, modules_to_save=["lm_head"])
        adapter = make_adapter(tmp_path / "adapter", config, make_gpt2)
        with pytest.raises(
            ValueError, match=r"brings lm_head.weight along whole, and it is one tensor with .*wte.weight"
        ):
            xadapt.merge(adapter, tied, out)
        assert not out.exists()


def test_biases_of_gpt2(out: Path, tmp_path: Path, logits: Logits) -> None:
    model = make_gpt2()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    base = make_checkpoint(tmp_path / "gpt2", model)
    adapter = make_adapter(tmp_path / "adapter", OutputAdaConfig(r=4, target_modules=["c_attn", "c_fc"]), make_gpt2)
    xadapt.merge(adapter, base, out)
    changed = {n for n, t in tensors_of(base).items() if not torch.equal(t, tensors_of(out)[n])}
    assert sum(name.endswith("bias") for name in changed) == 4
    tuner = xadapt.load(load_model(base), adapter)
    torch.testing.assert_close(logits(load_model(out)), logits(tuner), rtol=1e-4, atol=1e-5)


def test_a_live_adapter_and_an_open_base(base: Path, out: Path, logits: Logits) -> None:
    model = adapted(make_llama(), cast(Any, CONFIGS["output"]()), std=0.1)
    xadapt.merge(model, xadapt.open_base(base), out)
    again = adapted(load_model(base), CONFIGS["output"](), std=0.1)
    torch.testing.assert_close(logits(load_model(out)), logits(again), rtol=1e-4, atol=1e-5)
