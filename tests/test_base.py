"""Bases of transformers and of the Hub, and folders that are none: names, tensors, ties and skeleton are the live model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.base_models import COMMIT, check, edit_config, error_of, rename_tensors, saved, tied_llama, why_absent
from tests.conftest import make_gpt2, make_llama
from xadapt.base import CheckpointBase, open_base
from xadapt.checkpoint import Checkpoint


class TestTransformers:
    def test_a_folder(self, tmp_path: Path) -> None:
        base = open_base(saved(make_llama(), tmp_path))
        check(base, make_llama())
        assert base.library == "transformers"
        assert base.config["hidden_size"] == 32
        assert base.name == str(tmp_path)
        assert base.revision is None
        assert open_base(base) is base

    def test_shards(self, tmp_path: Path) -> None:
        base = open_base(str(saved(make_llama(), tmp_path, max_shard_size="20KB")))
        check(base, make_llama())

    def test_tied_weights(self, tmp_path: Path) -> None:
        base = open_base(saved(tied_llama(), tmp_path))
        check(base, tied_llama())
        assert "lm_head.weight" not in Checkpoint.open(tmp_path)
        assert base.stored_name("lm_head.weight") == "model.embed_tokens.weight"
        assert base.tied("lm_head.weight") == ("model.embed_tokens.weight",)
        assert base.tied("model.embed_tokens.weight") == ("lm_head.weight",)
        assert base.tied("model.norm.weight") == ()
        skeleton: Any = base.skeleton()
        assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight

    @pytest.mark.filterwarnings("ignore")
    def test_tied_weights_that_are_stored_twice_and_differ(self, tmp_path: Path) -> None:
        saved(tied_llama(), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        assert open_base(tmp_path).tied("lm_head.weight") == ("model.embed_tokens.weight",)
        tensors["lm_head.weight"] += 1
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        base = open_base(tmp_path)
        assert base.tied("lm_head.weight") == ()
        assert torch.equal(base.weights()["lm_head.weight"], base.module().state_dict()["lm_head.weight"])

    def test_an_old_file_without_the_prefix(self, tmp_path: Path) -> None:
        saved(make_gpt2(), tmp_path)
        rename_tensors(tmp_path, lambda name: name.removeprefix("transformer."))
        base = open_base(tmp_path)
        assert list(base.weights()) == list(make_gpt2().state_dict())
        assert base.stored_name("transformer.h.0.attn.c_attn.weight") == "h.0.attn.c_attn.weight"
        assert base.stored_name("lm_head.weight") == "wte.weight"
        state = make_gpt2().state_dict()
        assert all(torch.equal(base.weights()[name], state[name]) for name in state)

    def test_a_headless_model_from_a_file_with_the_prefix(self, tmp_path: Path) -> None:
        edit_config(saved(make_gpt2(), tmp_path), architectures=["GPT2Model"])
        base = open_base(tmp_path)
        assert base.stored_name("h.0.attn.c_attn.weight") == "transformer.h.0.attn.c_attn.weight"
        assert list(base.weights()) == list(make_gpt2().transformer.state_dict())

    def test_old_names(self, tmp_path: Path) -> None:
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        saved(BertModel(config), tmp_path)
        rename_tensors(tmp_path, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma"))
        base = open_base(tmp_path)
        assert base.stored_name("embeddings.LayerNorm.weight") == "embeddings.LayerNorm.gamma"

    def test_what_is_merged_while_loading_is_absent(self, tmp_path: Path) -> None:
        from transformers import MixtralConfig, MixtralForCausalLM

        config = MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=2,
        )
        model = MixtralForCausalLM(config)
        base = open_base(saved(model, tmp_path))
        assert any("experts.0.w1" in name for name in Checkpoint.open(tmp_path))
        absent = model.state_dict().keys() - set(base.weights())
        assert {name.rpartition(".")[2] for name in absent} == {"gate_up_proj", "down_proj"}
        for name in absent:
            assert "WeightConverter" in why_absent(base, name)
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        assert torch.equal(base.weights()[q_proj], model.state_dict()[q_proj])

    def test_names_that_are_not_there(self, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path)
        rename_tensors(tmp_path, lambda name: name.replace("model.norm", "model.other"))
        base = open_base(tmp_path)
        assert "model.norm.weight" not in base.weights()
        assert base.weights().get("model.norm.weight") is None
        assert "fill it at random" in why_absent(base, "model.norm.weight")
        assert "The nearest: lm_head.weight" in why_absent(base, "lm_head.weigth")
        with pytest.raises(ValueError, match="fill it at random"):
            base.stored_name("model.norm.weight")

    def test_tied_names_none_of_which_is_there(self, tmp_path: Path) -> None:
        saved(tied_llama(), tmp_path)
        rename_tensors(tmp_path, lambda name: name.replace("embed_tokens", "other"))
        assert "is tied to model.embed_tokens.weight" in why_absent(open_base(tmp_path), "lm_head.weight")

    def test_two_tensors_of_one_name(self, tmp_path: Path) -> None:
        saved(make_gpt2(), tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["ln_f.weight"] = tensors["transformer.ln_f.weight"].clone()
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="which are both"):
            open_base(tmp_path).weights()

    def test_shapes_that_are_not_the_config_s(self, tmp_path: Path) -> None:
        base = open_base(edit_config(saved(make_llama(), tmp_path), intermediate_size=40))
        assert "(48, 32)" in why_absent(base, "model.layers.0.mlp.up_proj.weight")
        assert "(40, 32)" in why_absent(base, "model.layers.0.mlp.up_proj.weight")

    def test_loaded_as_asked(self, tmp_path: Path) -> None:
        base = open_base(saved(make_llama(), tmp_path))
        assert {p.dtype for p in base.module(dtype=torch.bfloat16, device_map="cpu").parameters()} == {torch.bfloat16}
        assert not base.module().training

    def test_pickles(self, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path)
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
        assert "allow_pickle=True" in error_of(tmp_path)
        check(open_base(tmp_path, allow_pickle=True), make_llama())

    def test_variants(self, tmp_path: Path) -> None:
        check(open_base(saved(make_llama(), tmp_path, variant="fp16"), variant="fp16"), make_llama())
        assert "variant='fp16'" in error_of(tmp_path)

    def test_a_skeleton_takes_adapters_and_no_random_numbers(self, tmp_path: Path) -> None:
        base = open_base(saved(make_llama(), tmp_path))
        state = torch.get_rng_state()
        skeleton = base.skeleton()
        assert torch.equal(torch.get_rng_state(), state)
        adapted = get_peft_model(skeleton, LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
        assert all(parameter.is_meta for parameter in adapted.parameters())
        assert "lora" not in str(base.skeleton())

    def test_a_skeleton_in_real_size(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig

        LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            max_position_embeddings=131072,
            tie_word_embeddings=True,
            dtype="bfloat16",
        ).save_pretrained(tmp_path)
        save_file({"model.norm.weight": torch.ones(2048)}, tmp_path / "model.safetensors")
        skeleton = open_base(tmp_path).skeleton()
        assert sum(parameter.numel() for parameter in skeleton.parameters()) == 1_235_814_400
        assert {parameter.dtype for parameter in skeleton.parameters()} == {torch.bfloat16}

    def test_an_unknown_architecture_falls_back_on_the_bare_model(self, tmp_path: Path) -> None:
        from transformers import LlamaModel

        base = open_base(edit_config(saved(make_llama(), tmp_path), architectures=["LlamaForTelepathy"]))
        assert type(base.skeleton()) is LlamaModel
        assert base.stored_name("norm.weight") == "model.norm.weight"

    def test_custom_code_is_refused(self, tmp_path: Path) -> None:
        custom = {"auto_map": {"AutoModel": "modeling.Mine", "AutoConfig": "modeling.MyConfig"}}
        edit_config(saved(make_llama(), tmp_path), model_type="mine", **custom)
        assert "auto_map" in error_of(tmp_path)
        edit_config(tmp_path, model_type="llama", architectures=["Mine"], **custom)
        assert "trust_remote_code" in error_of(tmp_path)
        edit_config(tmp_path, architectures=["LlamaForCausalLM"])
        check(open_base(tmp_path), make_llama())

    def test_configs_of_no_model(self, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path)
        edit_config(tmp_path, model_type="llama7")
        assert "'llama7'" in error_of(tmp_path)
        edit_config(tmp_path, model_type="llama", hidden_size="wide")
        assert "config.json" in error_of(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "llama", "model_type": "gpt2"}')
        assert "twice" in error_of(tmp_path)


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
        """`hub(folder)` stands in for the Hub; `hub(error)` for one that fails. Both return the calls."""

        def stand_in(answer: Path | Exception) -> list[dict[str, Any]]:
            calls: list[dict[str, Any]] = []

            def download(name: str, **options: Any) -> str:
                calls.append({"name": name, **options})
                if isinstance(answer, Exception):
                    raise answer
                return str(answer)

            monkeypatch.setattr("huggingface_hub.snapshot_download", download)
            return calls

        return stand_in

    def test_a_model(self, hub: Any, tmp_path: Path) -> None:
        snapshot = saved(make_llama(), tmp_path / "snapshots" / COMMIT)
        calls = hub(snapshot)
        base = open_base("owner/llama", revision="main")
        check(base, make_llama())
        assert base.name == "owner/llama"
        assert base.revision == COMMIT
        assert all(call["revision"] == "main" for call in calls)
        assert "model.safetensors" in calls[-1]["allow_patterns"]
        assert not any("bin" in pattern or "fp16" in pattern for pattern in calls[-1]["allow_patterns"])

    def test_a_component(self, hub: Any, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path / "text_encoder", variant="fp16")
        (tmp_path / "model_index.json").write_text('{"text_encoder": ["transformers", "LlamaForCausalLM"]}')
        calls = hub(tmp_path)
        base = open_base("owner/pipe", component="text_encoder", variant="fp16", allow_pickle=True)
        assert base.name == "owner/pipe/text_encoder"
        assert {
            "model_index.json",
            "text_encoder/model.fp16.safetensors",
            "text_encoder/pytorch_model.fp16.bin",
        } <= set(calls[0]["allow_patterns"])
        assert "Known: text_encoder" in error_of("owner/pipe")

    def test_a_folder_goes_first(self, hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = hub(OSError())
        saved(make_llama(), tmp_path / "owner" / "llama")
        monkeypatch.chdir(tmp_path)
        assert isinstance(open_base("owner/llama"), CheckpointBase)
        assert not calls
        assert "leave it out" in error_of("owner/llama", revision="main")

    def test_what_cannot_be_downloaded(self, hub: Any) -> None:
        from huggingface_hub import errors

        response = SimpleNamespace(headers={}, request=None, status_code=403)
        hub(errors.GatedRepoError("gated", response=response))
        assert "hf auth login" in error_of("owner/llama")
        hub(errors.RepositoryNotFoundError("none", response=response))
        assert "Is it spelt right?" in error_of("owner/llama")
        hub(errors.RevisionNotFoundError("none", response=response))
        assert "no revision 'v9'" in error_of("owner/llama", revision="v9")
        hub(errors.LocalEntryNotFoundError("not cached"))
        assert "hf download owner/llama" in error_of("owner/llama")
        hub(errors.OfflineModeIsEnabled("offline"))
        assert "offline" in error_of("owner/llama")

    @pytest.mark.parametrize(
        "name", ["no/such/folder", "./llama", "/no/llama", "~/llama", "", "a b", "x" * 9999, "a\0"]
    )
    def test_neither_folder_nor_id(self, hub: Any, name: str) -> None:
        calls = hub(OSError())
        error_of(name)
        assert not calls

    def test_paths_are_never_ids(self, hub: Any) -> None:
        calls = hub(OSError())
        assert "is not there" in error_of(Path("owner/llama"))
        assert not calls


def test_folders_that_are_no_base(tmp_path: Path) -> None:
    assert "holds nothing" in error_of(tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert "holds a.safetensors" in error_of(tmp_path)
    assert "is a file" in error_of(tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="not int"):
        open_base(3)
