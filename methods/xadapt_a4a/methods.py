"""What this package registers: the method `a4a`, from IP-Adapters to A4A adapters, which has to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xadapt.contract import Adapter, Method, Siblings, Transfer
from xadapt.kinds import FileKind

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .run import Observer

PAPER = "A4A: Adapter for Adapter Transfer via All-for-All Mapping for Cross-Architecture Models"


@dataclass(frozen=True, kw_only=True)
class TrainA4A:
    """Learns to carry one IP-Adapter to one target."""

    steps: int = 1000
    lr1: float = 1e-4  # of the learnable features and the blocks
    lr2: float = 1e-5  # of projection and alignment
    lr3: float = 1e-5  # of the pretrained adapter
    train_pta: bool = True
    weight_decay: float = 0.01
    max_grad_norm: float = 0.0  # 0 clips nothing
    image_drop: float = 0.05  # the share of samples without their reference: guidance needs it
    text_drop: float | None = None  # without their text; None: 0.05 where batches have `empty_text`, as encoded ones do
    both_drop: float | None = None  # without both, likewise
    ema: float = 0.0  # the decay of averaged weights, which are then what is learnt; 0 keeps no average
    prediction: str = "auto"
    scheduler: str = ""
    depth: int = 4
    head_dim: int = 64
    coupling_ratio: float = 1.0
    coupling_width: int | None = None
    share: str = "width"
    projection: str = "linear"
    alignment: str = "linear"
    mapping: str = "attention"
    max_rows: int = 4096
    faceid_plus_v2: bool = False
    seed: int = 0
    # The run
    accumulate: int = 1  # batches per step and process
    mixed_precision: str = ""  # no, bf16, fp16; "" as `accelerate launch` says
    checkpointing: bool = False  # the target computes its activations again in the backward, for less memory
    checkpoints: str = ""  # a folder: a run that was interrupted goes on from the newest one in it
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    log_with: str = ""  # accelerate's trackers: tensorboard, wandb, …
    # Data that has to be encoded: a folder of images, tar shards, a `datasets` dataset
    batch_size: int = 8
    pipeline: str = ""  # the target's pipeline, a folder or an id of the Hub: its VAE and text encoders
    image_encoder: str = ""  # the CLIPVisionModelWithProjection that the IP-Adapter wants, likewise
    cache: str = ""  # a folder for what is encoded; "" encodes into a temporary one
    resolution: int = 0  # of the images, squares; 0 takes the target's own
    image_column: str = ""  # "" takes what is an image by its type or name
    caption_column: str = ""  # "" takes text, caption or prompt

    def batches(self, data: Any, bases: Siblings) -> Iterable[Any]:
        """What `fit` trains on, from what a user has.

        Args:
            data: an iterable of batches that are ready passes through. A folder of images with captions (NAME.txt beside
                NAME.jpg, or metadata.jsonl / .csv as `datasets` knows it), .tar shards as webdataset writes them (a file, or a
                folder of them), a `datasets` dataset or the id of one are encoded with `pipeline` and `image_encoder`, once the
                IP-Adapter is known.

        Raises:
            ValueError: there is nothing in it, captions are missing, or `pipeline` or `image_encoder` is.
        """
        batches: Iterable[Any] = _lazy("data", "batches_from")(self, data)
        return batches

    def fit(
        self,
        adapter: Adapter,
        bases: Siblings,
        batches: Iterable[Any],
        *,
        observer: Observer | None = None,
        accelerator: Accelerator | None = None,
    ) -> Transfer:
        """The trained transfer. The source is not opened: the IP-Adapter's own weights are all that is needed of it.

        Args:
            adapter: the IP-Adapter: `IP_ADAPTER` with the tensors of its file.
            batches: what `batches` returned, or dicts of image_embeds, latents, encoder_hidden_states, and what else the
                target's forward takes. `empty_text`, a dict, has what of it comes from the prompt for an empty one. Several
                processes (`accelerate launch`) each take their share of the sequence.
            observer: is shown each step; what it returns goes to the trackers.
            accelerator: one that is set up already; `mixed_precision` and `log_with` are then its own.

        Raises:
            ValueError: the adapter is no IP-Adapter, a batch lacks something, or the newest checkpoint is of another run.
        """
        transfer: Transfer = _lazy("fitting", "fit")(self, adapter, bases.target, batches, observer, accelerator)
        return transfer


def _lazy(module: str, name: str) -> Callable[..., Any]:
    """A function of this package, whose module loads torch and diffusers."""
    function: Callable[..., Any] = getattr(import_module(f".{module}", __package__), name)
    return function


def _is_ip_adapter(path: Path) -> bool:
    return path.is_file() and bool(_lazy("folders", "is_ip_adapter")(path))


def _read_ip_adapter(path: Path, allow_pickle: bool) -> Adapter:
    adapter: Adapter = _lazy("folders", "read_ip_adapter_file")(path, allow_pickle)
    return adapter


def _write_ip_adapter(adapter: Adapter, folder: Path) -> None:
    _lazy("folders", "write_ip_adapter")(adapter, folder)


def _is_a4a(path: Path) -> bool:
    return (path / "config.json").is_file() and bool(_lazy("folders", "is_a4a")(path))


def _read_a4a(path: Path, allow_pickle: bool) -> Adapter:
    adapter: Adapter = _lazy("folders", "read_a4a")(path, allow_pickle)
    return adapter


def _write_a4a(adapter: Adapter, folder: Path) -> None:
    _lazy("folders", "write_a4a")(adapter, folder)


IP_ADAPTER = FileKind(name="ip_adapter", recognises=_is_ip_adapter, read=_read_ip_adapter, write=_write_ip_adapter)
A4A_KIND = FileKind(name="a4a", recognises=_is_a4a, read=_read_a4a, write=_write_a4a)

A4A = Method(
    name="a4a",
    summary="carries an IP-Adapter to another architecture, by learning",
    paper=PAPER,
    reads=(IP_ADAPTER,),
    writes=A4A_KIND,
    build=TrainA4A,
)
