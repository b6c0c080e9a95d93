"""What this package registers: the method `a4a`, from IP-Adapters to A4A adapters, which has to be learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
    """of the optimiser"""
    lr1: float = 1e-4
    """learning rate of the learnable features and the blocks"""
    lr2: float = 1e-5
    """learning rate of projection and alignment"""
    lr3: float = 1e-5
    """learning rate of the pretrained adapter"""
    train_pta: bool = True
    """train the pretrained adapter further"""
    weight_decay: float = 0.01
    """of AdamW"""
    max_grad_norm: float = 0.0
    """0 clips nothing"""
    image_drop: float = 0.05
    """share of samples without their reference: guidance needs it"""
    text_drop: float | None = None
    """share without their text; None: 0.05 where batches have `empty_text`, as encoded ones do"""
    both_drop: float | None = None
    """share without both, likewise"""
    ema: float = 0.0
    """decay of averaged weights, which are then what is learnt; 0 keeps no average"""
    prediction: str = "auto"
    """epsilon, v_prediction, flow, or what the target's scheduler says"""
    scheduler: str = ""
    """folder or id of the target's scheduler, if it is not its pipeline's"""
    depth: int = 4
    """R, the number of rounds of Eq. 9"""
    head_dim: int = 64
    """of an attention head in them"""
    coupling_ratio: float = 1.0
    """the coupling space's width as a multiple of the least common multiple of the source's"""
    coupling_width: int | None = None
    """that width itself, instead"""
    share: str = "width"
    """one linear layer per distinct width in projection and alignment, or one per layer"""
    projection: str = "linear"
    """linear, or interpolate: training-free"""
    alignment: str = "linear"
    """linear, or pool: training-free"""
    mapping: str = "attention"
    """attention, linear, or layerwise"""
    max_rows: int = 4096
    """the most rows that the mapping's attention may run over"""
    faceid_plus_v2: bool = False
    """the file is a FaceID-plus of version 2, which it does not say itself"""
    seed: int = 0
    accumulate: int = 1
    """batches per step and process"""
    mixed_precision: str = ""
    """no, bf16, fp16; an empty one as `accelerate launch` says"""
    checkpointing: bool = False
    """the target computes its activations again in the backward, for less memory"""
    checkpoints: str = ""
    """a folder: a run that was interrupted goes on from the newest one in it"""
    checkpoint_every: int = 500
    """steps"""
    keep_checkpoints: int = 2
    """the newest ones"""
    log_with: str = ""
    """accelerate's trackers: tensorboard, wandb, …"""
    # Data that has to be encoded: a folder of images, tar shards, a `datasets` dataset
    batch_size: int = 8
    """images in a batch"""
    pipeline: str = ""
    """the target's, for VAE, text encoders and scheduler: a folder or a hub id; an empty one is that which the target lies in"""
    image_encoder: str = ""
    """the CLIPVisionModelWithProjection that the IP-Adapter wants: a folder or a hub id"""
    cache: str = ""
    """a folder for what is encoded; an empty one encodes into a temporary folder"""
    resolution: int = 0
    """of the images, squares; 0 takes the target's own"""
    image_column: str = ""
    """an empty one takes what is an image by its type or name"""
    caption_column: str = ""
    """an empty one takes text, caption or prompt"""

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
        batches: Iterable[Any] = _lazy("data", "batches_from")(self, data, bases.target)
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


def _describe(adapter: Adapter) -> Mapping[str, str]:
    facts: Mapping[str, str] = _lazy("describing", f"{adapter.kind.name}_facts")(adapter)
    return facts


IP_ADAPTER = FileKind(
    name="ip_adapter",
    recognises=_is_ip_adapter,
    read=_read_ip_adapter,
    write=_write_ip_adapter,
    applied="diffusers puts it on the model that it was made for: pipe.load_ip_adapter(…). `xadapt transfer --method a4a` carries it to others.",
    describe=_describe,
)
A4A_KIND = FileKind(
    name="a4a",
    recognises=_is_a4a,
    read=_read_a4a,
    write=_write_a4a,
    applied="Use it as it is: xadapt.A4AModel.from_pretrained(folder), and adapter.attached(unet, bank) around the pipeline's call.",
    describe=_describe,
)

A4A = Method(
    name="a4a",
    summary="carries an IP-Adapter to another architecture, by learning",
    paper=PAPER,
    reads=(IP_ADAPTER,),
    writes=A4A_KIND,
    build=TrainA4A,
)
