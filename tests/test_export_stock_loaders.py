"""Exports in stock PEFT, transformers and diffusers, in a process that never imports xadapt: the tuner's outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is an extra: pip install xadapt[diffusers]")

import xadapt
from tests.conftest import make_gpt2, make_llama
from tests.feature_models import adapted
from tests.layout_models import make_pipeline
from xadapt import HybridAdaConfig, InputAdaConfig, OutputAdaConfig

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
FLUX = [*ATTENTION, "add_q_proj", "add_v_proj", "to_add_out", "proj_mlp", "single_transformer_blocks.0.proj_out"]
TIE = r"(layers\.\d+)\.self_attn"

# What a user of these libraries writes, and nothing else. {"name": [error, change]} goes to standard output.
STOCK = """
import json, sys, torch, transformers, diffusers
from peft import PeftModel
from safetensors.torch import load_file

def read(file):
    tensors = load_file(file)
    kwargs = {}
    for name, tensor in tensors.items():
        outer, dot, inner = name.partition("/")
        if dot:
            kwargs.setdefault(outer, {})[inner] = tensor
        else:
            kwargs[name] = tensor
    return kwargs.pop("expected"), kwargs

def adapted(case):
    lora, how = case["lora"], case["how"]
    if how in ("pipeline", "model"):
        pipeline = diffusers.DiffusionPipeline.from_pretrained(case["base"], **dict.fromkeys(case["absent"]))
        model = getattr(pipeline, case["component"])
        yield model
        if how == "pipeline":
            pipeline.load_lora_weights(lora)
        else:
            model.load_lora_adapter(lora, prefix=case["component"])
    else:
        library = transformers if case["library"] == "transformers" else diffusers
        model = getattr(library, case["class"]).from_pretrained(case["base"])
        yield model
        if how == "peft":
            model = PeftModel.from_pretrained(model, lora)
        else:
            model.load_adapter(lora)
    yield model

results = {}
for case in json.loads(sys.argv[1]):
    expected, inputs = read(case["data"])
    try:
        with torch.no_grad():
            outputs = [model.eval()(**inputs)[0] for model in adapted(case)]
        bare, result = (output.double() for output in outputs)
        results[case["name"]] = [float((one - expected).norm() / expected.norm()) for one in (result, bare)]
    except Exception as error:
        results[case["name"]] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.partition(".")[0].startswith("xadapt")]
print("RESULTS" + json.dumps(results))
"""


@dataclass(frozen=True)
class Case:
    """One export, and the loader it is for."""

    family: str
    how: str  # peft, transformers, pipeline, model
    config: Callable[[], Any]
    layout: str = "peft"
    component: str | None = None


def adapter(space: str, targets: list[str], **options: Any) -> Callable[[], Any]:
    config: Any = {"input": InputAdaConfig, "output": OutputAdaConfig, "hybrid": HybridAdaConfig}[space]
    return lambda: config(r=4, lora_alpha=6, target_modules=targets, **options)


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
CONVOLUTIONS = [*ATTENTION, "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv"]
CASES = {
    f"llama, {name}, {how}": Case("llama", how, config)
    for how in ("peft", "transformers")
    for name, config in {
        "input": adapter("input", LLAMA, rank_pattern={"k_proj": 2}, alpha_pattern={"o_proj": 1}),
        "output": adapter("output", [*LLAMA, "gate_proj"], use_rslora=True),
        "hybrid": adapter("hybrid", LLAMA, feature_r=2),
        "tied": adapter("input", LLAMA[:3], tie=TIE),
    }.items()
}
CASES |= {
    f"gpt2, {space}, {how}": Case("gpt2", how, adapter(space, ["c_attn", "c_fc", "mlp.c_proj"]))
    for how in ("peft", "transformers")
    for space in ("input", "output")
}
for family, component, targets in (
    ("sd15", "unet", CONVOLUTIONS),
    ("sdxl", "unet", CONVOLUTIONS),
    ("sd3", "transformer", [*ATTENTION, "add_k_proj", "ff.net.2"]),
    ("flux", "transformer", FLUX),
    ("sd15", "text_encoder", CLIP),
):
    for space in ("input", "output"):
        name = f"{family} {component}, {space}"
        CASES[f"{name}, peft"] = Case(family, "peft", adapter(space, targets), component=component)
        CASES[f"{name}, diffusers"] = Case(family, "pipeline", adapter(space, targets), "diffusers", component)
        if component != "text_encoder":
            CASES[f"{name}, diffusers model"] = Case(family, "model", adapter(space, targets), "diffusers", component)
    if family not in (
        "sd3",
        "flux",
    ):  # kohya has no SD3, and FLUX only at its full width: tests/test_layouts_kohya.py
        CASES[f"{family} {component}, kohya"] = Case(family, "pipeline", adapter("input", targets), "kohya", component)


def data(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs_for(family: str, component: str | None) -> dict[str, Any]:
    if component in (None, "text_encoder"):
        return {"input_ids": torch.arange(2, 14).reshape(2, 6)}
    context = {"encoder_hidden_states": data(1, 5, 24, seed=1), "timestep": torch.tensor([10])}
    if family == "flux":
        ids = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
        timestep = {"timestep": torch.tensor([0.3]), "pooled_projections": data(1, 12, seed=2)}
        return {"hidden_states": data(1, 16, 4, seed=0), **context, **ids, **timestep}
    if family == "sd3":
        return {"hidden_states": data(1, 4, 8, 8, seed=0), **context, "pooled_projections": data(1, 12, seed=2)}
    added = {"text_embeds": data(1, 12, seed=2), "time_ids": data(1, 6, seed=3)}
    more = {"added_cond_kwargs": added} if family == "sdxl" else {}
    return {"sample": data(1, 4, 8, 8, seed=0), **context, **more}


def moved(model: nn.Module, seed: int) -> None:
    """Another model of the family: every number differs, and biases are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make(family: str) -> Any:
    language: dict[str, Callable[[], nn.Module]] = {"llama": make_llama, "gpt2": make_gpt2}
    return language[family]() if family in language else make_pipeline(family)


def network(made: Any, component: str | None) -> Any:
    return getattr(made, component) if component else made


def flat(kwargs: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in kwargs.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", tensor) for inner, tensor in value.items())
        else:
            yield name, value


def prepare(name: str, case: Case, folder: Path, bases: dict[str, Path]) -> dict[str, Any]:
    """Trains nothing, but saves an adapter of a source and exports it for a target; what the subprocess is told."""
    here = folder / name.replace(" ", "_").replace(",", "")
    source = network(make(case.family), case.component)
    xadapt.save(adapted(source, case.config(), std=0.1), here / "adapter")
    base = bases[case.family]
    target = xadapt.open_base(base, component=case.component).module()
    out = here / ("lora" if case.layout == "peft" else "lora.safetensors")
    report = xadapt.export_lora(here / "adapter", base, out, layout=case.layout, component=case.component)
    assert report.exact
    kwargs = inputs_for(case.family, case.component)
    with torch.no_grad():
        expected = xadapt.load(target, here / "adapter").eval()(**kwargs)[0]
    save_file({"expected": expected.double().contiguous(), **dict(flat(kwargs))}, here / "data.safetensors")
    index = json.loads((base / "model_index.json").read_text()) if case.component else {}
    absent = [part for part, found in index.items() if isinstance(found, list) and found[0] is None]
    inside = case.component is not None and case.how == "peft"
    return {
        "name": name,
        "how": case.how,
        "base": str(base / cast(str, case.component) if inside else base),
        "absent": absent,
        "component": case.component,
        "class": type(target).__name__,
        "library": xadapt.open_base(target).library,
        "lora": str(report.out),
        "data": str(here / "data.safetensors"),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("exports")
    bases = {}
    for family in {case.family for case in CASES.values()}:
        made = make(family)
        parts = made.components.values() if hasattr(made, "components") else [made]
        for number, part in enumerate(part for part in parts if isinstance(part, nn.Module)):
            moved(part, seed=number)
        made.save_pretrained(folder / family)
        bases[family] = folder / family
    told = [prepare(name, case, folder, bases) for name, case in CASES.items()]
    command = [sys.executable, "-c", STOCK, json.dumps(told)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return cast("dict[str, Any]", json.loads(done.stdout.partition("RESULTS")[2]))


@pytest.mark.parametrize("name", CASES)
def test_the_tuner_s_outputs(name: str, results: dict[str, Any]) -> None:
    result = results[name]
    assert isinstance(result, list), result
    error, change = result
    assert error <= 1e-5
    assert change > 5e-3  # the adapter does something
