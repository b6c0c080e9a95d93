"""What this package registers: the method `auto`, which chooses among the others, or refuses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from xadapt.contract import Adapter, Carried, Method, Siblings, Transfer
from xadapt_feature import HYBRID_ADA, INPUT_ADA, OUTPUT_ADA
from xadapt_weight import COPY


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Chooses a method for the adapter, or for each of its layers, and says why. Writes a plain LoRA for the target.

    Without data, check's verdicts on the weights decide, layer by layer. With unlabelled data every candidate is tried, and the
    one whose change of behaviour on the target agrees best with the adapter's on its source is taken
    (`xadapt.verifying.behaviour`). Half of the samples fit what has to be fitted, the other half decide; the winner is then
    fitted on all of them.
    """

    candidates: str = ""
    """The methods to choose from, "copy, aligned"; all that are installed, read adapters of this kind and do not train by default."""

    margin: float = 0.001
    """By how much another method must beat the adapter as it is, and a mixture by layer must beat a method throughout. Ties are noise,
    and what is simpler is better understood."""

    gain: float = 0.05
    """What the best has to gain over the bare target, of 1 for all of the adapter's work. Below that it does not carry, and is
    refused: what does a little of it may as well do harm."""

    allow_training: bool = False
    """Train a fresh adapter on the target (`distil`) where the best of the others agrees less than `train_below`. Once on half of the
    data, to be judged, and if it is taken, once more on all of them."""

    train_below: float = 0.99

    train_margin: float = 0.02
    """By how much another method must beat the trained adapter, once there is one: of two that agree as well, what was trained does
    the task better."""

    training_steps: int = 300
    training_lr: float = 1e-3

    continue_tokens: int = 0
    """Of language models: let the adapted source continue every sample by up to this many tokens first, and judge on these. For data
    that are prompts without answers, where what the adapter learnt to say would not be seen otherwise."""

    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("margin", "gain", "train_below", "train_margin"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(
                    f"{name}={value!r}: agreement is measured from 0 to 1, so write a number between them."
                )
        if not 0 < self.training_lr < float("inf"):
            raise ValueError(
                f"training_lr={self.training_lr!r}: a learning rate is above 0, for example training_lr=0.001."
            )
        for name, least in (("training_steps", 1), ("continue_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number from {least} on.")

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates one by one; none where all are meant."""
        return tuple(name.strip() for name in self.candidates.split(",") if name.strip())

    @property
    def training(self) -> dict[str, Any]:
        """The options of the method that trains."""
        return {"steps": self.training_steps, "lr": self.training_lr, "seed": self.seed}

    def transfer(self, adapter: Adapter, bases: Siblings) -> Carried:
        """The adapter by check's verdicts on the weights alone. Reads the adapted layers of both bases, a pair at a time.

        Raises:
            Refused: the weights say that no training-free method without data carries it.
            ValueError: an option is set that means something with data only.
        """
        from .by_weights import by_weights

        idle = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name not in ("candidates", "seed") and getattr(self, field.name) != field.default
        ]
        if idle:
            raise ValueError(
                f"{', '.join(idle)}: needs data, as auto runs nothing without: pass data=…, unlabelled inputs of the kind the adapter is "
                "for, or leave it out."
            )

        return by_weights(self, adapter, bases)

    def fit(self, adapter: Adapter, bases: Siblings, batches: Iterable[Any]) -> Transfer:
        """The decision for this adapter and these bases, by trying the candidates. Loads both models.

        Args:
            batches: dicts of arguments for the forward of both models. What labels of -100 leave out is learnt from, and not
                judged by; what labels say otherwise is not looked at.

        Raises:
            Refused: nothing gains enough over the bare target.
        """
        from .by_behaviour import decide

        return decide(self, adapter, bases, batches)


AUTO = Method(
    name="auto",
    summary="chooses among the other methods per layer and per adapter by what it measures, or refuses; writes a LoRA",
    paper="this library; check and verify say what is measured",
    reads=(COPY.writes, INPUT_ADA.writes, OUTPUT_ADA.writes, HYBRID_ADA.writes),
    writes=COPY.writes,
    build=Auto,
)
