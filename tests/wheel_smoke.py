"""One call against the installed wheel: `python -I tests/wheel_smoke.py` in a venv that cannot see the checkout."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn

import xadapt
from xadapt import InputAdaConfig, registry

assert xadapt.__file__ is not None
assert Path(xadapt.__file__).is_relative_to(sys.prefix), f"not the wheel's: {xadapt.__file__}"
assert {"input_ada", "output_ada", "hybrid_ada", "full_ada"} <= set(registry.load_all()[0])

torch.manual_seed(0)
x = torch.randn(2, 8)
base = nn.Sequential(nn.Linear(8, 4))
bare = base(x)
model = get_peft_model(base, InputAdaConfig(r=2, target_modules=["0"]))
assert torch.allclose(model(x), bare), "a fresh adapter starts at the identity"
for parameter in model.parameters():
    if parameter.requires_grad:
        nn.init.normal_(parameter)
with tempfile.TemporaryDirectory() as folder:
    adapted = model.eval()(x)
    model.save_pretrained(folder)
    loaded = xadapt.load(model.unload(), folder)
    assert torch.allclose(loaded(x), adapted)
    assert not torch.allclose(adapted, bare)
print(f"the wheel works: xadapt {xadapt.__version__} in {Path(xadapt.__file__).parent}")
