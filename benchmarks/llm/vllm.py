"""lm-eval's vLLM backend: an xadapt adapter is served as the plain LoRA that it is on that model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.frame.worker import Worker
    from benchmarks.llm.evaluation import Evaluation

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""


@contextmanager
def language_model(cell: Evaluation, worker: Worker) -> Iterator[Any]:
    """lm-eval's model for the cell's base and adapter. vLLM loads the base for each cell."""
    try:
        import vllm  # noqa: F401 (only whether it is there)
        from lm_eval.models.vllm_causallms import VLLM
    except ModuleNotFoundError:
        raise ValueError("the backend vllm needs vLLM: pip install vllm, or take --machine.backend hf.") from None
    with TemporaryDirectory() as folder:
        where, revision = cell.target.where(worker), cell.target.revision
        lora = exported(cell, worker, Path(folder)) if cell.training else {}
        named = {"revision": revision, "tokenizer_revision": revision}
        yield VLLM(pretrained=where, dtype=cell.dtype, batch_size="auto", **named, **lora)


def exported(cell: Evaluation, worker: Worker, folder: Path) -> dict[str, Any]:
    """What vLLM is told of the adapter, exported for the cell's base into `folder`.

    Raises:
        ValueError: the adapter is no LoRA on that base (DoRA), so vLLM cannot hold it.
    """
    import xadapt

    assert cell.training is not None
    out = folder / "lora"
    base = xadapt.open_base(cell.target.where(worker), revision=cell.target.revision)
    xadapt.export_lora(worker.artifacts(cell.training) / "adapter", base, out)
    rank = cell.training.adapter.rank
    if rank > RANKS[-1]:
        raise ValueError(
            f"vLLM holds LoRAs up to rank {RANKS[-1]}, and this one has {rank}; take --machine.backend hf."
        )
    at_most = next(allowed for allowed in RANKS if allowed >= rank)
    return {"lora_local_path": str(out), "enable_lora": True, "max_lora_rank": at_most}
