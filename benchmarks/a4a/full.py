"""The presets for real models, and their command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.a4a.settings import METHODS, Method
from benchmarks.tiny.progress import Reporter

NATIVE = "native"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A pipeline whose denoiser gets the adapter."""

    pipeline: str  # a folder, or an id of the Hub
    resolution: int
    native: str = ""
    """An IP-Adapter that was published for it (the paper's PTA-UM): a file, or "owner/name:path" on the Hub."""

    sampling_steps: int = 30
    guidance: float = 5.0


SDXL = Target(
    pipeline="stabilityai/stable-diffusion-xl-base-1.0",
    resolution=1024,
    native="h94/IP-Adapter:sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
)
PIXART = Target(pipeline="PixArt-alpha/PixArt-XL-2-1024-MS", resolution=1024, sampling_steps=20, guidance=4.5)
PIXART_512 = Target(pipeline="PixArt-alpha/PixArt-XL-2-512x512", resolution=512, sampling_steps=20, guidance=4.5)


@dataclass(frozen=True, kw_only=True)
class FullSettings:
    """One preset. Where the paper says a number, it is the paper's."""

    preset: str
    summary: str
    targets: dict[str, Target]
    ip_adapter: str = "h94/IP-Adapter:models/ip-adapter_sd15.safetensors"
    image_encoder: str = "h94/IP-Adapter:models/image_encoder"
    methods: tuple[str, ...] = ("a4a", "random", "scratch copy", NATIVE)
    seeds: tuple[int, ...] = (0,)
    steps: int = 30_000
    batch: int = 4  # per process
    processes: int = 2  # what `accelerate launch` should be told; the number of samples seen follows from it
    stops: tuple[int, ...] = (2_500, 5_000, 10_000, 20_000, 30_000)
    learning_rates: dict[str, float] = field(
        default_factory=lambda: {"a4a": 1e-4, "random": 1e-4, "layerwise": 1e-4, "scratch copy": 1e-4, "scratch": 1e-4}
    )
    """Those of the paper, and of the official training code of IP-Adapter. --rate METHOD=… gives another."""

    depth: int = 4
    head_dim: int = 64
    weight_decay: float = 0.01
    mixed_precision: str = "bf16"
    checkpointing: bool = True
    checkpoint_every: int = 1_000
    references: int = 100
    prompts: tuple[str, ...] = (
        "a photo of a person on the beach",
        "a person with blue hair",
        "a person wearing a spacesuit",
        "a watercolor painting of a person",
    )
    scales: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.25)
    scale: float = 1.0
    clip: str = "openai/clip-vit-large-patch14"
    faces: str = "~/.insightface"  # "" leaves IDA out

    def cells(self) -> list[tuple[str, str, int]]:
        """(target, method, seed), in the order in which they run; native adapters are not trained, so once."""
        return [
            (target, method, seed)
            for target, one in self.targets.items()
            for method in self.methods
            for seed in self.seeds
            if method != NATIVE or (one.native and seed == self.seeds[0])
        ]

    def rate_of(self, method: str) -> float:
        return self.learning_rates.get(method, 1e-4)


PRESETS = {
    "paper": FullSettings(
        preset="paper",
        summary="SDXL and PixArt-α at 1024 pixels, 240k samples, two GPUs of 80 GB; CelebAMask-HQ or Open Images",
        targets={"sdxl": SDXL, "pixart": PIXART},
        methods=(
            "a4a",
            "random",
            "layerwise",
            "scratch copy",
            NATIVE,
            "frozen",
            "half",
            "double",
            "no training",
            "linear",
        ),
    ),
    "small": FullSettings(
        preset="small",
        summary="PixArt-α at 512 pixels, 16k samples, one GPU of 24 GB",
        targets={"pixart": PIXART_512},
        methods=("a4a", "random", "scratch copy"),
        seeds=(0, 1, 2),
        steps=4_000,
        processes=1,
        stops=(500, 1_000, 2_000, 4_000),
        references=25,
    ),
}


def method_of(name: str) -> Method:
    return METHODS[name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What these presets need beside what all presets have."""
    parser.add_argument("--data", help="training images with captions: a folder, .tar shards, or a data set's id")
    parser.add_argument("--references", type=Path, help="folder of held-out reference images")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, NATIVE], help="instead of the preset's")
    parser.add_argument("--rate", action="append", default=[], metavar="METHOD=RATE", help="another learning rate")
    parser.add_argument("--faces", help="insightface's folder with models/antelopev2; '' leaves IDA out")


def main(parsed: argparse.Namespace, progress: Reporter, settings: FullSettings | None = None) -> int:
    """Plan or run a preset; the exit status."""
    settings = chosen(settings or PRESETS[parsed.preset], parsed)
    if parsed.plan:
        progress.say(f"{settings.summary}. One GPU: python -m benchmarks.a4a {settings.preset} --data … --references …")
        if settings.processes > 1:
            progress.say(
                f"accelerate launch --num_processes {settings.processes} -m benchmarks.a4a {settings.preset} --data … --references …"
            )
        for target, method, seed in settings.cells():
            progress.say(f"  {target}-{method.replace(' ', '-')}-seed{seed}")
        for name, value in vars(settings).items():
            progress.say(f"{name}: {value}")
        return 0
    for option in ("data", "references"):
        if not getattr(parsed, option):
            raise ValueError(
                f"This preset needs --{option}. The paper trains on CelebAMask-HQ (request it from its authors: "
                "https://github.com/switchablenorms/CelebAMask-HQ) or Open Images, captioned with BLIP-2: a folder of NAME.jpg with "
                "NAME.txt beside it; references are images that are not in it."
            )
    from benchmarks.a4a.photographs import run

    return run(
        settings, str(parsed.data), parsed.references, parsed.out or Path("runs/a4a") / settings.preset, progress
    )


def chosen(settings: FullSettings, parsed: argparse.Namespace) -> FullSettings:
    """The settings with what the command line says."""
    from dataclasses import replace

    changes: dict[str, object] = {}
    if parsed.seeds:
        changes["seeds"] = tuple(parsed.seeds)
    if parsed.methods:
        changes["methods"] = tuple(parsed.methods)
    if parsed.faces is not None:
        changes["faces"] = parsed.faces
    if parsed.targets:
        unknown = [name for name in parsed.targets if name not in settings.targets]
        if unknown:
            raise ValueError(
                f"--targets {' '.join(unknown)}: preset {settings.preset} has {', '.join(settings.targets)}."
            )
        changes["targets"] = {name: settings.targets[name] for name in parsed.targets}
    if parsed.rate:
        changes["learning_rates"] = settings.learning_rates | rates(parsed.rate)
    return replace(settings, **changes)  # type: ignore[arg-type]  # by name, from the command line


def rates(given: Sequence[str]) -> dict[str, float]:
    """{"a4a": 3e-4} from ["a4a=3e-4"]."""
    found = {}
    for one in given:
        name, _, rate = one.partition("=")
        try:
            found[name] = float(rate)
        except ValueError:
            raise ValueError(f"--rate {one}: write METHOD=RATE, such as a4a=3e-4.") from None
        if name not in METHODS:
            raise ValueError(f"--rate {one}: there is no method {name!r}. Known: {', '.join(METHODS)}.")
    return found
