"""transformers: its architectures train and generate, its own adapter API works, and so does what Trainer relies on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.feature_models import CONFIG, SPACES, Mlp, adapted, mlp_batch, randomise
from tests.language_models import (
    CONFIGS,
    IDS,
    MORE_CONFIGS,
    adapted_llama,
    loss_and_gradients,
    losses_in_training,
    outputs,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",  # its new name is newer than transformers 5.0
)

every_config = pytest.mark.parametrize("name", CONFIGS)
# transformers 5 loses the magnitudes of a DoRA, in stock PEFT too: it looks for them without their `.weight`.
every_loadable = pytest.mark.parametrize("name", [name for name in MORE_CONFIGS if name != "dora"])
every_space = pytest.mark.parametrize("space", SPACES)


def make_t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens: dict[str, Any] = {"vocab_size": 64, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    config = T5Config(**tokens, **sizes)
    return T5ForConditionalGeneration(config).eval()


def make_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return BertForMaskedLM(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes)).eval()


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "llama": (make_llama, ["q_proj", "v_proj", "gate_proj"]),
    "gpt2": (make_gpt2, ["c_attn", "c_proj"]),
    "t5": (make_t5, ["q", "v", "wo"]),  # its feed-forward reads wo.weight.dtype
    "bert": (make_bert, ["query", "value", "dense"]),
}


def adapted_architecture(architecture: str, space: str) -> PeftModel:
    make, targets = ARCHITECTURES[architecture]
    return get_peft_model(make(), CONFIG[space](r=4, target_modules=targets))


class TestArchitectures:
    @every_space
    @pytest.mark.parametrize("architecture", ARCHITECTURES)
    def test_training_lowers_the_loss(self, architecture: str, space: str) -> None:
        model = adapted_architecture(architecture, space)
        frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        losses = losses_in_training(model)
        assert losses[-1] < losses[0] - 0.05
        for name, parameter in model.named_parameters():
            assert name not in frozen or torch.equal(parameter, frozen[name])

    @every_space
    @pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
    def test_generating_with_and_without_a_cache(self, architecture: str, space: str) -> None:
        model = adapted_architecture(architecture, space).eval()
        options: dict[str, Any] = {"input_ids": IDS[:, :5], "max_new_tokens": 6, "min_new_tokens": 6}
        bare = model.generate(**options)
        randomise(model, std=0.3)
        generated = model.generate(**options)
        assert not torch.equal(generated, bare)
        torch.testing.assert_close(generated, model.generate(use_cache=False, **options))
        torch.testing.assert_close(generated, model.merge_and_unload().generate(**options))


class TestAdapterApi:
    """transformers' PeftAdapterMixin: adapters on the model itself, without a PeftModel around it."""

    @pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # for LoRA too
    @pytest.mark.parametrize("name", MORE_CONFIGS)
    def test_add_set_disable_delete(self, name: str) -> None:
        model = make_llama()
        bare = outputs(model)
        model.add_adapter(MORE_CONFIGS[name]())
        assert torch.equal(outputs(model), bare) or name == "loha"
        randomise(model)
        first = outputs(model)
        assert not torch.allclose(first, bare, atol=1e-3)
        model.add_adapter(MORE_CONFIGS[name](), "second")
        assert model.active_adapters() == ["second"]
        randomise(model, seed=2)
        assert not torch.allclose(outputs(model), first, atol=1e-3)
        model.set_adapter("default")
        assert torch.equal(outputs(model), first)
        model.disable_adapters()
        assert torch.equal(outputs(model), bare)
        model.enable_adapters()
        assert torch.equal(outputs(model), first)
        model.delete_adapter("second")
        assert not any("second" in key for key in model.state_dict())
        assert torch.equal(outputs(model), first)
        model.delete_adapter("default")
        assert not hasattr(model, "peft_config")
        assert torch.equal(outputs(model), bare)

    @every_loadable
    def test_save_pretrained_and_load_adapter(self, name: str, tmp_path: Path) -> None:
        model = make_llama()
        model.add_adapter(MORE_CONFIGS[name]())
        randomise(model)
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "model.safetensors").exists()
        loaded = make_llama()
        report = loaded.load_adapter(tmp_path)
        for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            assert not getattr(report, keys, ())  # transformers before 5.5 reports otherwise, or nothing
        assert torch.equal(outputs(loaded), outputs(model))
        assert torch.equal(outputs(PeftModel.from_pretrained(make_llama(), tmp_path)), outputs(model))

    @every_loadable
    def test_load_adapter_reads_what_peft_saved(self, name: str, tmp_path: Path) -> None:
        model = adapted_llama(name)
        model.save_pretrained(tmp_path)
        loaded = make_llama()
        loaded.load_adapter(tmp_path, adapter_name="other")
        assert torch.equal(outputs(loaded), outputs(model))

    @every_space
    def test_auto_classes(self, space: str, tmp_path: Path) -> None:
        make_llama().save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")  # knows its own path
        config = CONFIG[space](r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = adapted(base, config)
        model.save_pretrained(tmp_path / "adapter")
        for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
            assert torch.equal(outputs(auto.from_pretrained(tmp_path / "adapter").eval()), outputs(model))


class TestTraining:
    @every_config
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, name: str, reentrant: bool) -> None:
        loss, gradients = loss_and_gradients(adapted_llama(name))
        model = adapted_llama(name)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        again, recomputed = loss_and_gradients(model)
        assert again == loss
        torch.testing.assert_close(recomputed, gradients)

    @every_config
    def test_autocast(self, name: str) -> None:
        loss, gradients = loss_and_gradients(adapted_llama(name))
        with torch.autocast("cpu", torch.bfloat16):
            rounded, cast = loss_and_gradients(adapted_llama(name))
        assert rounded == pytest.approx(loss, abs=2e-2)
        assert {g.dtype for g in cast.values()} == {torch.float32}
        for key, gradient in gradients.items():
            assert (cast[key] - gradient).norm() < 0.1 * gradient.norm(), key

    @every_config
    def test_a_base_in_bfloat16_with_an_adapter_in_float32(self, name: str) -> None:
        loss, gradients = loss_and_gradients(adapted_llama(name))
        model = adapted_llama(name, dtype=torch.bfloat16)
        rounded, mixed = loss_and_gradients(model)
        assert rounded == pytest.approx(loss, abs=2e-2)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        assert outputs(model).dtype == torch.bfloat16
        for key, gradient in gradients.items():
            assert (mixed[key] - gradient).norm() < 0.1 * gradient.norm(), key

    @every_space
    def test_trainer_and_its_checkpoints(self, space: str, tmp_path: Path) -> None:
        data = [{"input_ids": row, "labels": row} for row in torch.arange(56).reshape(8, 7)]

        def train(resume_from: str | None = None) -> PeftModel:
            model = get_peft_model(make_llama(), CONFIG[space](r=4, target_modules=["q_proj", "down_proj"]))
            options = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
            arguments = TrainingArguments(
                str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", **options
            )
            Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume_from)
            return model.eval()

        model = train()
        assert not torch.allclose(outputs(model), outputs(make_llama()), atol=1e-3)
        assert torch.equal(outputs(xadapt.load(make_llama(), tmp_path / "checkpoint-4")), outputs(model))
        resumed = train(resume_from=str(tmp_path / "checkpoint-2"))
        torch.testing.assert_close(outputs(resumed), outputs(model))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch 2.13, about its own compiler
class TestCompile:
    """One graph, the same numbers as without, and nothing compiled again from step to step."""

    def check(self, make: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], backend: str) -> None:
        torch.compiler.reset()
        eager, model = make().train(), make().train()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (eager, model)]
        for step in range(3):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                values = loss(eager), loss(compiled)
            for value, optimizer in zip(values, optimizers, strict=True):
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            torch.testing.assert_close(values[1], values[0])
            for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad)
            for optimizer in optimizers:
                optimizer.zero_grad()
        torch.compiler.reset()

    @every_config
    def test_a_language_model(self, name: str) -> None:
        self.check(lambda: adapted_llama(name, layers=1), lambda m: m(input_ids=IDS, labels=IDS).loss, "aot_eager")

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler")
    @every_space
    def test_inductor(self, space: str) -> None:
        config = CONFIG[space](r=4, target_modules=["lin0", "lin1"])
        self.check(lambda: adapted(Mlp(), config), lambda m: m(mlp_batch()).pow(2).mean(), "inductor")


def test_a_process_that_does_not_know_the_format(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """Stock PEFT and transformers refuse by KeyError; `xadapt.load` loads the plug-in first."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_llama().save_pretrained(base)
    model = adapted_llama("input")
    model.save_pretrained(folder)
    printed = run_python(f"""
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
errors = []
base = AutoModelForCausalLM.from_pretrained({str(base)!r}).eval()
for load in (lambda: PeftModel.from_pretrained(base, {str(folder)!r}), lambda: base.load_adapter({str(folder)!r})):
    try:
        load()
    except KeyError as error:
        errors.append(error.args)
import xadapt
model = xadapt.load(base, {str(folder)!r})
with torch.no_grad():
    print(json.dumps([errors, model(input_ids=torch.tensor({IDS.tolist()})).logits.tolist()]))
""")
    errors, logits = json.loads(printed.splitlines()[-1])
    assert errors == [["INPUT_ADA"], ["INPUT_ADA"]]
    torch.testing.assert_close(torch.tensor(logits), outputs(model))
