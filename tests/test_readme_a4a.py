"""What README.md says of A4A, run as it stands there on tiny models: from files, by the command line and by a pipeline."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.a4a_models import SD15_WIDTHS, base_file, flat
from tests.a4a_pipes import picture, write_images, write_pipeline
from xadapt.cli import main

README = Path(__file__).parents[1] / "README.md"
TINY = ["--steps", "2", "--depth", "1", "--batch-size", "2"]


def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(
        r"<!-- a4a: .*? -->\n```bash\n(.*?)```.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    monkeypatch.chdir(tmp_path)
    write_world()
    transfer, inspect = (shlex.split(line)[1:] for line in found[1].splitlines())
    assert main([*transfer, *TINY]) == 0, capsys.readouterr().err
    assert "by a4a on 12 layers" in capsys.readouterr().out
    assert list(Path("run").glob("checkpoint-*"))
    record = json.loads(Path("a4a-sdxl/xadapt_transfer.json").read_text(encoding="utf-8"))
    assert (record["method"], record["options"]["steps"], len(record["layers"])) == ("a4a", 2, 12)
    assert main(inspect) == 0
    assert "carried from: ip-adapter_sd15.safetensors" in capsys.readouterr().out

    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(compile(found[2], str(README), "exec"), names)
    layers = names["adapter"].config.target_layers
    styled = [name for name in layers if name.startswith("up_blocks.0.attentions.1.")]
    assert 0 < len(styled) < len(layers)
    assert names["whole"].tobytes() != names["style"].tobytes()


def write_world() -> None:
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    write_pipeline("sdxl", Path("sdxl"))
    config: Any = UNet2DConditionModel.load_config("sdxl/unet")
    unet: Any = UNet2DConditionModel.from_config({**config, "layers_per_block": 2})  # as many blocks as SDXL has
    unet.save_pretrained("sdxl/unet")
    save_file(flat(base_file(SD15_WIDTHS)), "ip-adapter_sd15.safetensors")
    write_images(Path("pictures"))
    picture(0).save("reference.png")
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=224, patch_size=56, projection_dim=16)
    CLIPVisionModelWithProjection(vision).save_pretrained("clip-vision")
