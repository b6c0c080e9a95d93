"""DDP and FSDP2 on two CPU processes: the loss curve of one process, and an adapter that one process can load.

Run as a program, this file is what each of the processes does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import xadapt
from tests.conftest import make_llama
from tests.language_models import CONFIGS, outputs
from tests.verb_models import drifted, lora_folder

STRATEGIES = ("ddp", "fsdp2", "fsdp2, each factor on its own")
STEPS = 4
BATCH = torch.arange(28).reshape(4, 7)


def fresh(name: str) -> PeftModel:
    """The same model in every process. B starts at zero and A at random, so the seed counts."""
    base = make_llama()
    torch.manual_seed(7)
    return get_peft_model(base, CONFIGS[name]()).train()


def optimizer_for(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)


# ---- what each process does


def shard_through_accelerate(accelerator: Any) -> None:
    """What accelerate does when it finds GPUs; on CPUs it would fall back to DDP without a word."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import DistributedType, PartialState

    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator.state.distributed_type = DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def shard_by_pefts_policy(model: nn.Module) -> None:
    """The units of PEFT's `fsdp_auto_wrap_policy`: each trainable linear and each block."""
    from peft.utils.other import fsdp_auto_wrap_policy
    from torch.distributed.fsdp import fully_shard

    policy = fsdp_auto_wrap_policy(model)
    units = [m for m in model.modules() if m is not model and policy(module=m, recurse=False, nonwrapped_numel=0)]
    for unit in [*reversed(units), model]:
        fully_shard(unit)


def train(strategy: str, name: str, folder: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model: Any = fresh(name)
    if strategy == STRATEGIES[2]:
        shard_by_pefts_policy(model)
        optimizer = optimizer_for(model)
    else:
        if strategy == "fsdp2":
            shard_through_accelerate(accelerator)
        model, optimizer = accelerator.prepare(model, optimizer_for(model))
    assert isinstance(model, DistributedDataParallel if strategy == "ddp" else FSDPModule)

    losses = []
    for _ in range(STEPS):
        rows = BATCH[accelerator.process_index :: 2]
        loss = model(input_ids=rows, labels=rows).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())

    if strategy == STRATEGIES[2]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = get_model_state_dict(model, options=options)
    else:
        state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict)
        (folder / "losses.json").write_text(json.dumps(losses))
    accelerator.wait_for_everyone()


def distil(folder: Path, out: Path, batches: list[dict[str, torch.Tensor]]) -> None:
    """The verb, with a method that trains: each process calls it."""
    adapter = lora_folder(folder / "lora")
    xadapt.transfer(adapter, make_llama(), drifted(make_llama()), "distil", out=out, data=batches, steps=STEPS)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"  # or accelerate would look for GPUs, and run each process by itself
    distil(folder / os.environ["RANK"], folder / "distilled", [{"input_ids": rows} for rows in BATCH.split(1)])
    del os.environ["ACCELERATE_USE_CPU"]
    for strategy in STRATEGIES:
        for name in CONFIGS:
            train(strategy, name, folder / strategy / name)
    torch.distributed.destroy_process_group()


# ---- what is expected of them


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All strategies in one launch: importing the libraries is most of the time."""
    folder = tmp_path_factory.mktemp("distributed")
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    root = Path(__file__).parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    environment["CUDA_VISIBLE_DEVICES"] = ""  # FSDP2 and gloo would not agree on the device
    command = [sys.executable, *launch, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_like_one_process(strategy: str, name: str, trained: Path, tmp_path: Path) -> None:
    folder = trained / strategy / name
    model = fresh(name)
    optimizer = optimizer_for(model)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=BATCH, labels=BATCH).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert json.loads((folder / "losses.json").read_text()) == pytest.approx(losses, abs=1e-5)

    model.eval().save_pretrained(tmp_path)
    saved, expected = (load_file(f / "adapter_model.safetensors") for f in (folder, tmp_path))
    torch.testing.assert_close(saved, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs(xadapt.load(make_llama(), folder)), outputs(model), atol=1e-5, rtol=0.0)


def test_a_transfer_that_trains(trained: Path, tmp_path: Path) -> None:
    """Two processes with a row each are one with both: a row here, a row there, and the first of them writes."""
    pairs = [{"input_ids": rows} for rows in BATCH.split(2)]
    distil(tmp_path, tmp_path / "distilled", pairs)
    (found, wanted) = (load_file(folder / "distilled" / "adapter_model.safetensors") for folder in (trained, tmp_path))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert not [path.name for path in trained.iterdir() if path.name.startswith(".")]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
