"""The cells: every task and space of one sibling, carried by one row's method, scored on the target."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.carry import BARE, RETRAINED, Row, carry, put_on
from benchmarks.zoo.measures import measured
from benchmarks.zoo.trust import compare, same_answers
from benchmarks.zoo.world import World
from xadapt.base import open_base
from xadapt.siblings import Pair
from xadapt.verifying.outputs import rows

Record = dict[str, Any]


class Keeper:
    """Carries and scores in one world. Keeps what several cells need: pairs of bases and what the models do bare."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._pairs: dict[str, Pair] = {}
        self._seen: dict[tuple[str, ...], list[Tensor]] = {}

    def pair(self, sibling: str) -> Pair:
        if sibling not in self._pairs:
            self._pairs[sibling] = Pair(open_base(self.world.source()), open_base(self.world.sibling(sibling)))
        return self._pairs[sibling]

    def at_home(self) -> list[Record]:
        """What each adapter does on the source, and the source without any."""
        world, records = self.world, []
        source = world.source()
        for task in world.tasks:
            records.append(self._record("source", task, "", BARE, source))
            for space in world.spaces:
                model = put_on(source, world.adapter(task, space))
                records.append(self._record("source", task, space, "copy", model))
        return records

    def bare(self, sibling: str) -> list[Record]:
        model = self.world.sibling(sibling)
        return [self._record(sibling, task, "", BARE, model) for task in self.world.tasks]

    def retrained(self, sibling: str) -> list[Record]:
        records = []
        for task in self.world.tasks:
            records.append(self._record(sibling, task, "", RETRAINED, self.world.retrained(sibling, task)))
        return records

    def carried(self, sibling: str, row: Row) -> list[Record]:
        """One record per task and space that the row takes. Where its method refuses, there is a reason and no score."""
        records = []
        for task in self.world.tasks:
            for space in filter(row.takes, self.world.spaces):
                records.append(self._carried(sibling, row, task, space))
        return records

    def measures(self, sibling: str) -> list[Record]:
        """Per adapter what check measures of its layers there, weights and activations."""
        pair, world = self.pair(sibling), self.world
        return [
            {"sibling": sibling, "task": task, "space": space, "layers": measured(world, task, space, pair)}
            for task in world.tasks
            for space in world.spaces
        ]

    def _carried(self, sibling: str, row: Row, task: str, space: str) -> Record:
        world, pair = self.world, self.pair(sibling)
        adapter, batches = world.adapter(task, space), world.calibration(task, space, row.trains)
        started = time.process_time()
        try:
            carried = carry(row, space, adapter, pair, batches, world.distil)
        except ValueError as error:
            names = {"sibling": sibling, "task": task, "space": space, "row": row.name}
            return {**names, "refused": str(error).splitlines()[0][:240]}
        seconds = time.process_time() - started
        model = put_on(world.sibling(sibling), carried.adapter)
        record = self._record(sibling, task, space, row.name, model)
        record |= {"left_out": len(carried.left_out), "seconds": round(seconds, 3)}
        record |= self._trust(sibling, task, space, model)
        considered = carried.considered
        if chosen := [name for name, told in considered.items() if "chosen" in told]:
            record["chosen"] = chosen[0]
        return record

    def _record(self, sibling: str, task: str, space: str, row: str, model: nn.Module) -> Record:
        return {
            "sibling": sibling,
            "task": task,
            "space": space,
            "row": row,
            "score": round(self.world.score(model, sibling, task), 4),
            "kept": round(self.world.kept(model, sibling), 4),
        }

    def _trust(self, sibling: str, task: str, space: str, model: nn.Module) -> Record:
        """verify's figures, for the carried adapter and for the bare target."""
        world = self.world

        def adapted() -> nn.Module:
            return put_on(world.source(), world.adapter(task, space))

        home = self._behaviour(("source", task, space, "bare"), world.source, task, space)
        taught = self._behaviour(("source", task, space, "adapted"), adapted, task, space)
        bare = self._behaviour((sibling, task, space), lambda: world.sibling(sibling), task, space)
        mine = [rows(model, batch) for batch in world.unlabelled(task, space)]
        found = compare(world.part, home, taught, bare, mine)
        without = compare(world.part, home, taught, bare, bare)
        figures = {"trust": found.score, "direction": found.direction, "strength": found.strength}
        figures |= {"trust_bare": without.score, "same": same_answers(taught, mine)}
        return {name: round(value, 4) for name, value in figures.items()}

    @torch.no_grad()
    def _behaviour(self, key: tuple[str, ...], model: Callable[[], nn.Module], task: str, space: str) -> list[Tensor]:
        if key not in self._seen:
            made = model()
            self._seen[key] = [rows(made, batch) for batch in self.world.unlabelled(task, space)]
        return self._seen[key]
