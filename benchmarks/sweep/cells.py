"""A transfer, and its verification, as cells. They use xadapt's verbs as anybody would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.frame.cell import Cell, Result
from benchmarks.frame.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Transferred(Cell):
    """One adapter to one target by one method. A refusal is a result, not a failure."""

    adapter: str
    source: str
    target: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    samples: int = 128
    component: str | None = None
    partial: bool = False
    seed: int = 0
    contents: tuple[str, ...] = ()
    """Hashes of adapter and data, where they are files: another adapter in the same folder is another cell."""

    def run(self, worker: Worker) -> Result:
        import xadapt
        from xadapt.adapter_files import Opened, open_adapter
        from xadapt.refused import Refused

        adapter = worker.shared(self.adapter, lambda: open_adapter(self.adapter, self.component))
        try:
            result = xadapt.transfer(
                Opened(adapter, self.adapter),
                opened(worker, self.source, self.component),
                opened(worker, self.target, self.component),
                self.method,
                out=worker.out / "adapter",
                data=self.data if learns(self.method) else None,
                amount=amount(self.samples, self.seed) if self.data and learns(self.method) else None,
                component=None,
                partial=self.partial,
                seed=self.seed,
                **self.options,
            )
        except Refused as refusal:
            return {"refused": str(refusal), "rows": [{"metric": "refused", "value": 1.0}]}
        rows = [
            {"metric": "refused", "value": 0.0},
            {"metric": "layers", "value": float(len(result.layers))},
            {"metric": "left out", "value": float(len(result.left_out))},
        ]
        return {"refused": None, "methods": result.methods, "rows": rows}

    def base(self) -> str:
        return self.target

    def describe(self) -> str:
        return f"{self.adapter} → {self.target} by {self.method}"


@dataclass(frozen=True, kw_only=True)
class Verified(Cell):
    """How much of its work a transferred adapter does on the target, beside the bare target and the copy."""

    transfer: Transferred
    neutral: str | None = None

    def run(self, worker: Worker) -> Result:
        import xadapt

        done = self.transfer
        if worker.result(done)["refused"] is not None:
            return {"rows": []}
        report = xadapt.verify(
            opened(worker, done.source, done.component),
            opened(worker, done.target, done.component),
            done.adapter,
            worker.artifacts(done) / "adapter",
            done.data,
            neutral=self.neutral,
            amount=amount(done.samples, done.seed),
        )
        rows = [
            {"metric": "score", "candidate": row.name, "value": row.agreement.score}
            for row in report.rows
            if row.agreement is not None
        ]
        return {"verdict": report.verdict, "rows": rows}

    def base(self) -> str:
        return self.transfer.target

    def describe(self) -> str:
        return f"verify {self.transfer.describe()}"


def opened(worker: Worker, base: str, component: str | None) -> Any:
    """A base that stays open, and loaded once it was, for the cells that follow."""
    from xadapt.base import open_base

    return worker.base(base, lambda: open_base(base, component=component))


def learns(method: str) -> bool:
    """Whether it can do something with data."""
    from xadapt import registry
    from xadapt.contract import Learner

    return isinstance(registry.get(method).build(), Learner)


def amount(samples: int, seed: int) -> Any:
    """As much of the data as the settings say."""
    from xadapt.data import Amount

    return Amount(samples=samples, seed=seed)
