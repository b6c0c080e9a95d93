"""What a preset of benchmarks/dreambooth says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from benchmarks.dreambooth.tiny.settings import TinySettings

Family = Literal["sd", "sdxl", "sd3", "flux"]
PeftMethod = Literal["lora", "dora", "loha", "lokr"]
Adaptation = Literal["param", "input", "output", "hybrid", "lora-x"]
Side = Literal["source", "target"]
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a model is asked for images."""

    steps: int
    guidance: float
    text_length: int | None = None
    """Tokens of T5, for the families that have it."""


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """What the adapter's weights are moved by."""

    name: Literal["adamw", "adamw8bit", "prodigy"] = "adamw"
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two models, and what the paper trains on the first of them."""

    name: str
    """As in the paper's tables: "flux-dev->flux-schnell"."""
    family: Family
    source: str = "source"
    """Hub id or folder of a diffusers pipeline. In tiny pairs, a folder of the pair that is made."""
    target: str = "target"
    source_revision: str | None = None
    target_revision: str | None = None
    source_sampling: Sampling
    target_sampling: Sampling
    targets: tuple[str, ...]
    """PEFT's target_modules."""
    learning_rates: tuple[float, ...]
    """More than one: chosen on the source, for each method and adaptation."""
    optimizer: Optimizer = Optimizer()
    train_guidance: float = 3.5
    """What a model with a guidance embedding is told in training."""
    text_length: int | None = None
    """T5's tokens in training."""
    forward_seconds: float = 0.0
    """One call of the denoiser for one image, on the hardware that the preset names. For --plan only."""
    megabytes_per_rank: float = 0.0
    """Of a LoRA on these layers. For --plan only."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """One training; the paper's settings by default."""

    steps: int = 500
    batch: int = 4
    resolution: int = 512
    crops: int = 8
    """Random crops of each image whose latents are cached; 1 is the centre crop."""
    prompt: str = "a photo of a {}"
    unique_token: str | None = None
    """A rare token before the class word, as in the original DreamBooth."""
    prior_weight: float = 0.0
    """Weight of the loss on images of the class that the model makes itself; 0 is none, as in the paper."""
    prior_images: int = 100


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How, not what."""

    dtype: Dtype = "float32"
    """Of the frozen models. The adapter's weights are in float32."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    micro_batch: int = 4
    """Images in one step of a training; accumulation makes up for the rest of the batch."""
    image_batch: int = 8
    """Images that are made at once."""
    gradient_checkpointing: bool = False
    offload: Literal["none", "model", "sequential"] = "none"
    """diffusers' CPU offload while images are made."""
    processes: int = 1
    """Of one training, through accelerate."""
    keep_images: Literal["first", "all", "none"] = "first"
    """Which images are kept as files: those of the first image seed, for the report."""
    log_with: str | None = None
    """A tracker of accelerate's: tensorboard, wandb, trackio ..."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What looks at the images."""

    clip: str = "openai/clip-vit-base-patch32"
    dino: str = "facebook/dino-vits16"
    dino_resize: int = 256
    """The shorter side before the centre crop to what the model takes."""
    classifier: str | None = None
    """An image classifier, one of whose labels is the subject's name: metric "subject"."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How one of several learning rates is chosen: by images on the source."""

    subjects: tuple[str, ...] = ()
    """The first of all if none is named; of several, the mean."""
    seed: int = 0
    by: tuple[str, ...] = ("clip_t", "dino_i")
    """Metrics whose mean is to be high."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A product of choices. Experiments share what they have in common."""

    pairs: tuple[str, ...]
    methods: tuple[PeftMethod, ...] = ("lora",)
    adaptations: tuple[Adaptation, ...] = ("param", "input", "output")
    ranks: tuple[int, ...] = ()
    """The method's own rank if empty."""
    splits: tuple[int, ...] = ()
    """Hybrid: how much of the rank is in feature space. Half of it if empty."""
    hybrid_space: Literal["input", "output"] = "output"
    transfers: tuple[str, ...] = ()
    """Transfer methods (`xadapt methods`) that carry the LoRAs in parameter space besides the plain copy: lora_x ..."""
    retrained: bool = False
    """Train the param adapters on the target as well: what there is to gain."""
    seeds: tuple[int, ...] = (0,)
    subjects: tuple[str, ...] = ()
    """Those of the preset if empty."""


def _ranks() -> dict[str, int]:
    return {"lora": 4, "dora": 4, "loha": 64, "lokr": 128}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A preset."""

    images: str = "google/dreambooth"
    """The data set on the hub, or a folder with one folder of images per subject."""
    subjects_file: str = "dreambooth"
    """Class words and prompts: a file in benchmarks/dreambooth/data, or a path to one like those."""
    subjects: tuple[str, ...] = ()
    """All of the file if empty."""
    prompts: int | None = None
    """The first so many; all if not given."""
    image_seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    pairs: tuple[Pair, ...] = ()
    experiments: tuple[Experiment, ...] = ()
    training: TrainingSettings = TrainingSettings()
    ranks: dict[str, int] = field(default_factory=_ranks)
    alpha: Literal["rank", "peft"] = "rank"
    """lora_alpha (LoHa's, LoKr's alpha): the rank, or PEFT's default of 8. The paper does not say."""
    judge: Judge = Judge()
    compute: Compute = Compute()
    tuning: Tuning = Tuning()
    tables: tuple[str, ...] = ()
    """Tables of the paper to set beside ours: "1", "2", "8" ..."""
    models: Literal["loaded", "made"] = "loaded"
    """Loaded from the hub or folders; or made on the spot, with their judges and images."""
    tiny: TinySettings = field(default_factory=TinySettings)
    """How they are made, where they are."""
