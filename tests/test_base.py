"""Bases: every way to open one gives the live model's names, tensors, ties and skeleton; the rest is told plainly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import make_gpt2, make_llama, make_unet
from xadapt.base import CheckpointBase, LiveBase, open_base
from xadapt.checkpoint import Checkpoint
from xadapt.contract import Base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tied_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def rename_tensors(folder: Path, rename: Callable[[str], str], file: str = "model.safetensors") -> Path:
    save_file({rename(name): tensor for name, tensor in load_file(folder / file).items()}, folder / file)
    return folder


def check(base: CheckpointBase | LiveBase, model: nn.Module) -> None:
    """Names, tensors, skeleton and module are the model's own."""
    as_contract: Base = base
    state, weights = model.state_dict(), as_contract.weights()
    assert list(weights) == list(state)
    assert len(weights) == len(state)
    for name in weights:
        torch.testing.assert_close(weights[name], state[name], rtol=0, atol=0)
    skeleton = base.skeleton()
    assert type(skeleton) is type(model)
    assert not skeleton.training
    assert skeleton is not base.skeleton()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert {n: t.shape for n, t in skeleton.state_dict().items()} == {n: t.shape for n, t in state.items()}
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in model.named_parameters()]
    loaded = base.module()
    assert loaded is base.module()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


def error_of(base: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is the test)
        open_base(base, **options)
    return str(caught.value)


def why_absent(base: CheckpointBase | LiveBase, name: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (its text is the test)
        base.weights()[name]
    return str(caught.value)


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


class TestDiffusers:
    @pytest.fixture
    def unet_folder(self, tmp_path: Path) -> Path:
        pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        return saved(make_unet(), tmp_path / "unet")

    @pytest.fixture
    def pipeline(self, unet_folder: Path, tmp_path: Path) -> Path:
        saved(make_llama(), tmp_path / "text_encoder")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "text_encoder": ["transformers", "LlamaForCausalLM"],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "safety_checker": [None, None],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    def test_a_folder(self, unet_folder: Path) -> None:
        base = open_base(unet_folder)
        check(base, make_unet())
        assert base.library == "diffusers"
        loaded = base.module(dtype=torch.float16)
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}

    def test_shards(self, unet_folder: Path) -> None:
        shutil.rmtree(unet_folder)
        check(open_base(saved(make_unet(), unet_folder, max_shard_size="100KB")), make_unet())
        assert (unet_folder / "diffusion_pytorch_model.safetensors.index.json").is_file()

    def test_old_attention_names(self, tmp_path: Path) -> None:
        diffusers = pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2).eval()
        saved(vae, tmp_path)
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

        def rename(name: str) -> str:
            for new, before in old.items():
                name = name.replace(f".{new}.", f".{before}.")
            return name

        rename_tensors(tmp_path, rename, "diffusion_pytorch_model.safetensors")
        base = open_base(tmp_path)
        assert base.stored_name("decoder.mid_block.attentions.0.to_q.weight").endswith("query.weight")
        state = vae.state_dict()
        assert list(base.weights()) == list(state)
        assert all(torch.equal(base.weights()[name], state[name]) for name in state)

    def test_components(self, pipeline: Path) -> None:
        unet = open_base(pipeline, component="unet")
        check(unet, make_unet())
        assert unet.name == f"{pipeline}/unet"
        check(open_base(pipeline, component="text_encoder"), make_llama())

    def test_components_that_are_not_there(self, pipeline: Path) -> None:
        assert "Known: unet, text_encoder." in error_of(pipeline)
        assert "Did you mean 'unet'?" in error_of(pipeline, component="net")
        for component in ("vae", "scheduler", "safety_checker", "../elsewhere", "_class_name"):
            assert "no component" in error_of(pipeline, component=component)
        assert "leave component out" in error_of(pipeline / "unet", component="unet")

    def test_classes_that_diffusers_lacks(self, unet_folder: Path) -> None:
        for name in ("MyUNet", "StableDiffusionPipeline", "DDIMScheduler", 3, ["UNet2DConditionModel"]):
            edit_config(unet_folder, _class_name=name)
            assert "no model of diffusers" in error_of(unet_folder)
        edit_config(unet_folder, _class_name="MyUNet", auto_map={"AutoModel": "mine.MyUNet"})
        assert "trust_remote_code" in error_of(unet_folder)

    def test_a_pipeline_that_is_live(self, unet: nn.Module) -> None:
        class Pipeline:
            components = {"unet": unet, "scheduler": None}  # noqa: RUF012 (as diffusers has it)

        with pytest.raises(TypeError, match=r"pipeline\.unet"):
            open_base(Pipeline())


class TestLive:
    @pytest.mark.parametrize("make", [make_llama, make_gpt2, make_unet, tied_llama])
    def test_a_model(self, make: Callable[..., nn.Module]) -> None:
        of_diffusers = make.__name__ == "make_unet"
        if of_diffusers:
            pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")
        model = make()
        base = open_base(model)
        check(base, model)
        assert base.module() is model
        assert base.library == ("diffusers" if of_diffusers else "transformers")
        assert base.revision is None
        assert type(model).__name__ in base.name
        assert base.config

    def test_any_module(self) -> None:
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        base = open_base(model)
        check(base, model.eval())
        assert base.library == "torch"
        assert base.config == {}
        assert "0.weight" in why_absent(base, "0.wieght")
        assert base.weights().get("x") is None

    def test_tied_weights(self) -> None:
        model = open_base(tied_llama())
        assert model.tied("lm_head.weight") == ("model.embed_tokens.weight",)
        linear = nn.Linear(2, 2)
        assert open_base(nn.Sequential(linear, linear)).tied("0.bias") == ("1.bias",)
        shared = nn.Linear(2, 2)
        shared.weight = nn.Parameter(linear.weight.data)  # another parameter, the same memory
        assert open_base(nn.Sequential(linear, shared)).tied("0.weight") == ("1.weight",)

    def test_never_loaded(self) -> None:
        with torch.device("meta"):
            model = nn.Linear(2, 2)
        assert "never loaded" in why_absent(open_base(model), "weight")

    @pytest.mark.parametrize("where", ["memory", "disk"])
    def test_offloaded(self, where: str, tmp_path: Path) -> None:
        from accelerate import cpu_offload, disk_offload

        model = make_llama()
        device = torch.device("cpu")
        if where == "disk":
            disk_offload(model, tmp_path, execution_device=device)
        else:
            cpu_offload(model, execution_device=device)
        assert model.lm_head.weight.is_meta
        weights, state = open_base(model).weights(), make_llama().state_dict()
        assert list(weights) == list(state)
        assert all(torch.equal(weights[name], state[name]) for name in weights)
        assert model.lm_head.weight.is_meta

    def test_options_that_say_nothing(self) -> None:
        with pytest.raises(ValueError, match="loaded already"):
            open_base(make_llama()).module(dtype=torch.float16)
        for options in ({"component": "unet"}, {"revision": "main"}, {"variant": "fp16"}, {"allow_pickle": True}):
            assert "is open already" in error_of(make_llama(), **options)

    def test_with_adapters(self) -> None:
        assert "unload()" in error_of(get_peft_model(make_llama(), LoraConfig(target_modules=["q_proj"])))

    def test_that_cannot_be_copied(self) -> None:
        model: Any = nn.Linear(2, 2)
        model.handle = (i for i in range(3))
        with pytest.raises(ValueError, match="cannot be copied"):
            open_base(model).skeleton()


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchao, about torch and about itself
class TestQuantised:
    @pytest.fixture(scope="class")
    def quantised(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        pytest.importorskip("torchao", reason="torchao is an extra: pip install xadapt[quant]")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import AutoModelForCausalLM, TorchAoConfig

        plain = saved(make_llama(hidden_size=128), tmp_path_factory.mktemp("plain"))
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32, device_map="cpu"
        )
        return saved(model, tmp_path_factory.mktemp("torchao"), max_shard_size="100KB")

    def test_torchao_on_disk_and_live(self, quantised: Path) -> None:
        base = open_base(quantised)
        live = open_base(base.module())
        original = make_llama(hidden_size=128).state_dict()
        assert list(base.weights()) == list(live.weights()) == list(original)
        for name, tensor in original.items():
            weight = base.weights()[name]
            assert type(weight) is torch.Tensor
            assert weight.dtype == torch.float32
            assert torch.equal(weight, live.weights()[name])
            assert (weight - tensor).norm() < 0.02 * tensor.norm()
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(base.weights()[q_proj], original[q_proj])
        assert base.stored_name("model.norm.weight") == "model.norm.weight"
        with pytest.raises(ValueError, match="several tensors"):
            base.stored_name(q_proj)
        assert all(parameter.is_meta for parameter in base.skeleton().parameters())

    def test_torchao_damaged(self, quantised: Path, tmp_path: Path) -> None:
        shutil.copytree(quantised, tmp_path, dirs_exist_ok=True)
        for shard in Checkpoint.open(tmp_path).shards:
            metadata = dict(Checkpoint.open(tmp_path).metadata(shard))
            for name, text in metadata.items():
                metadata[name] = text.replace('"block_size"', '"blocks"').replace('"Int8Tensor"', '"Int9Tensor"')
            save_file(load_file(shard), shard, metadata)
        assert "not stored as torchao would" in why_absent(open_base(tmp_path), "model.layers.0.mlp.up_proj.weight")

    @pytest.mark.skipif(
        tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20),
        reason="transformers before 5.20 de-quantises fp8 for a whole model only",
    )
    @pytest.mark.filterwarnings("ignore")
    def test_fp8_in_blocks(self, tmp_path: Path) -> None:
        saved(make_llama(hidden_size=128), tmp_path)
        tensors, quantised = load_file(tmp_path / "model.safetensors"), {}
        for name, tensor in tensors.items():
            if name.endswith("_proj.weight") and tensor.shape[0] % 64 == 0 and tensor.shape[1] % 64 == 0:
                blocks = tensor.unflatten(0, (-1, 64)).unflatten(2, (-1, 64))
                scale = blocks.abs().amax((1, 3), keepdim=True) / 448
                quantised[name] = (blocks / scale).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
                quantised[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
        assert len(quantised) == 16
        save_file(tensors | quantised, tmp_path / "model.safetensors", {"format": "pt"})
        left_alone = ["up_proj", "gate_proj", "down_proj", "lm_head"]
        fp8 = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": left_alone}
        base = open_base(edit_config(tmp_path, quantization_config=fp8 | {"dequantize": True}))
        loaded = base.module().state_dict()
        assert set(base.weights()) == set(tensors)
        for name, tensor in tensors.items():
            weight = base.weights()[name]
            torch.testing.assert_close(weight, loaded[name], rtol=0, atol=0)
            assert (weight - tensor).norm() < 0.05 * tensor.norm()

    def test_other_schemes_are_refused_by_name(self, tmp_path: Path) -> None:
        saved(make_llama(), tmp_path)
        q_proj = "model.layers.0.self_attn.q_proj.weight"
        tensors = load_file(tmp_path / "model.safetensors")
        tensors[q_proj] = tensors[q_proj].to(torch.int8)
        del tensors["model.layers.0.self_attn.k_proj.weight"]  # GPTQ and AWQ have a qweight instead
        save_file(tensors, tmp_path / "model.safetensors")
        edit_config(tmp_path, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
        base = open_base(tmp_path)
        assert "bitsandbytes (8 bits)" in why_absent(base, q_proj)
        assert "bitsandbytes (8 bits)" in why_absent(base, "model.layers.0.self_attn.k_proj.weight")
        assert torch.equal(base.weights()["model.norm.weight"], tensors["model.norm.weight"])
