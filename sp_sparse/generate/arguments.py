"""The arguments of `generate`: flags, a configuration file with the same names, and what can be refused from them alone."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sp_sparse import SparseAttentionConfig
from sp_sparse.config import FLAG_PREFIX, PRESET_HELP, PRESETS
from sp_sparse.flags import check_numbers, flag_of, option, options_of, parse_flags
from sp_sparse.generate.defaults import MINI_PROMPT, PROMPT
from sp_sparse.generate.memory import MemoryOptions
from sp_sparse.generate.mini import MINI

TINY_MODELS = ("tiny", "tiny-i2v", "tiny-ti2v", "tiny-2.1", "tiny-2.1-i2v", "tiny-vace")
RANDOM_A14B = "a14b-random"
STAND_INS = (RANDOM_A14B, "ti2v-5b-random")
RANDOM_LAYERS = 4

# Token blocks of 128 would leave a tiny model with three of them, and mini with 26.
_SMALL_BLOCKS = {**dict.fromkeys(TINY_MODELS, (16, 16)), MINI: (64, 64)}

# As a 64-bit generator takes them.
_SEEDS = 2**64 - 1
_LARGEST = 10_000_000
_LARGEST_SCALE = 100


def _sources(text: str) -> tuple[str, ...]:
    """`a,b` or `["a", "b"]`."""
    found = json.loads(text) if text.lstrip().startswith("[") else text.split(",")
    return tuple(str(source).strip() for source in found)


def _scales(text: str) -> tuple[float, ...]:
    """`0.5,1` or `[0.5, 1]`."""
    return tuple(float(scale) for scale in text.strip().removeprefix("[").removesuffix("]").split(","))


def _check_scales(sources_name: str, sources: tuple[str, ...], name: str, scales: tuple[float, ...]) -> None:
    if scales and not sources:
        raise ValueError(
            f"{flag_of(name)} weighs {flag_of(sources_name)}, which is not given; give it, or leave it out"
        )
    if scales and len(scales) not in (1, len(sources)):
        raise ValueError(
            f"{flag_of(name)} has {len(scales)} numbers for {len(sources)} sources of {flag_of(sources_name)}; give one for "
            f"all, or {len(sources)}"
        )
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise ValueError(
            f"{flag_of(sources_name)} {twice} is given twice; give it once, with the sum of both weights as {flag_of(name)}"
        )
    for scale in scales:
        if not (math.isfinite(scale) and abs(scale) <= _LARGEST_SCALE):
            raise ValueError(
                f"{flag_of(name)} {scale!r} is not a number from -{_LARGEST_SCALE} to {_LARGEST_SCALE}; give such a number"
            )


# Of the mesh; `--mesh auto` gives way to those that flags give.
DEGREES = ("ulysses_degree", "ring_degree", "cfg_parallel_degree")


@dataclass(frozen=True)
class GenerateArguments:
    """Each field is a flag: `num_frames` is `--num-frames`. None means "as the model wants it".

    Raises:
        ValueError: values that cannot go together or are out of range.
    """

    model: str = option(
        MINI,
        f"{MINI} (small and trained; in a checkout); {', '.join(TINY_MODELS)} (random weights, run anywhere); "
        "a14b-random or ti2v-5b-random (full width, random weights); a folder; or a hub id",
    )
    layers: int | None = option(
        None,
        f"layers of each expert of a model that ends in -random, {RANDOM_LAYERS} if not given; the real A14B has 40, TI2V "
        "30",
        int,
        at_least=1,
        at_most=1000,
    )
    full: bool = option(
        False, "a model that ends in -random gets a text encoder and a VAE of real size, with random weights too", bool
    )
    sparse_attn_preset: str | None = option(None, PRESET_HELP, choices=tuple(PRESETS))
    lora: tuple[str, ...] = option(
        (),
        "LoRA weights for the first (or only, or high-noise) expert: a file, folder or hub id; several with commas or by "
        "giving the flag again",
        _sources,
        many=True,
    )
    lora_2: tuple[str, ...] = option((), "the same for the second (low-noise) expert", _sources, many=True)
    lora_scale: tuple[float, ...] = option(
        (),
        "weights of --lora, from -100 to 100: one for all, or one each, with commas; 1 if not given",
        _scales,
        many=True,
    )
    lora_scale_2: tuple[float, ...] = option((), "the same for --lora-2", _scales, many=True)
    prompt: str | None = option(None, f"what to show (default: {PROMPT}; for mini: {MINI_PROMPT})")
    prompt_file: str | None = option(
        None,
        "one prompt a line, one video each; instead of --prompt; of a .jsonl file each line is an object with prompt and "
        "its own settings",
    )
    videos_per_prompt: int = option(
        1, "videos of each prompt, each with the next seed", int, at_least=1, at_most=10_000
    )
    negative_prompt: str = option("", "what to keep away from")
    image: str | None = option(None, "first frame, for image-to-video; a tiny or random model draws one if not given")
    last_image: str | None = option(None, "last frame, for models that make a video between two")
    video: str | None = option(
        None,
        "video to make into another, for Wan 2.1 text-to-video models, or that controls one, for VACE; size, length and "
        "frames a second follow it where they are not given",
    )
    mask: str | None = option(
        None, "for VACE: a video or picture, white where --video is made anew; all of it is if not given"
    )
    reference_image: tuple[str, ...] = option(
        (),
        "for VACE: pictures of what the video shows; several with commas or by giving the flag again",
        _sources,
        many=True,
    )
    conditioning_scale: float | None = option(
        None, "for VACE: weight of what controls the video, up to 10; 1 if not given", float, at_least=0, at_most=10
    )
    strength: float | None = option(
        None,
        "share of the steps that are run on --video, above 0, up to 1: the higher, the less of it is kept; 0.8 if not given",
        float,
        above=0,
        at_most=1,
    )
    height: int | None = option(
        None,
        "pixels, a multiple of 16 (TI2V: 32); with --image and without height or width, the picture's aspect at about the "
        "model's number of pixels",
        int,
        at_least=1,
        at_most=_LARGEST,
    )
    width: int | None = option(None, "pixels, likewise", int, at_least=1, at_most=_LARGEST)
    num_frames: int | None = option(None, "frames of the video, 4n + 1", int, at_least=1, at_most=_LARGEST)
    fps: int | None = option(None, "frames a second of the video, up to 120", int, at_least=1, at_most=120)
    num_inference_steps: int | None = option(None, "denoising steps", int, at_least=1, at_most=_LARGEST)
    seed: int = option(0, "the same on every rank", int, at_least=0, at_most=_SEEDS)
    guidance_scale: float | None = option(
        None, "classifier-free guidance, 1 to 100; 1 switches it off", float, at_least=1, at_most=100
    )
    guidance_scale_2: float | None = option(
        None, "guidance of the second expert, 0 to 100", float, at_least=0, at_most=100
    )
    boundary_ratio: float | None = option(
        None,
        "share of the noise, above 0 and below 1, under which the second expert takes over; for models with two experts",
        float,
        above=0,
        at_most=1,
    )
    scheduler: str = option(
        "model",
        "the steps through the noise: model is that of the model's folder; euler and lcm are for distilled models",
        choices=("model", "unipc", "euler", "lcm"),
    )
    flow_shift: float | None = option(
        None, "shift of the noise schedule, above 0, up to 100", float, above=0, at_most=100
    )
    output: str | None = option(None, "video, .mp4 (default: outputs/<model>_u<U>_r<R>_<topk>_<seed>.mp4)")
    output_latents: str | None = option(None, "final latents too, .pt")
    output_frames: str | None = option(None, "frames too, as they are before the video codec, .pt")
    output_masks: str | None = option(
        None, "block masks of some layers and steps too, .npz, for launch/benchmark.py simulate"
    )
    report: str | None = option(None, "what ran, .json (default: beside the video)")
    mesh: str = option(
        "degrees",
        "degrees: as the next three flags say; auto: chosen for the ranks, nodes, heads and size, around those of them that "
        "are given",
        choices=("degrees", "auto"),
    )
    ulysses_degree: int = option(1, "ranks that split the heads", int, at_least=1, at_most=_LARGEST)
    ring_degree: int = option(1, "ranks that pass keys and values around", int, at_least=1, at_most=_LARGEST)
    cfg_parallel_degree: int = option(
        1, "2 runs the two guidance branches on two halves of the ranks", int, at_least=1, at_most=2
    )
    compile: bool = option(False, "torch.compile the transformer blocks", bool)
    fsdp: bool = option(
        False, "deal the weights out over all ranks, each block gathered while the one before it runs", bool
    )
    quantization: str = option(
        "none",
        "fp8 computes the linear layers of the transformer blocks in float8; for GPUs from compute capability 8.9",
        choices=("none", "fp8"),
    )
    dtype: str = option(
        "auto",
        "of the transformers; auto is float32 for tiny models and on CPUs, else bfloat16",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    device: str = option("auto", "auto is cuda where there is one", choices=("auto", "cpu", "cuda"))
    vae_tiling: bool = option(
        False, "encode and decode video in tiles, which takes less memory; several ranks share those of a decode", bool
    )
    offload: str = option(
        "none",
        "what waits in the CPU's memory: nothing; idle: text encoder, image encoder (Wan 2.1) and experts while they are "
        "not at work; layers: the image encoder likewise, and all blocks of the others but those at work",
        choices=("none", "idle", "layers"),
    )
    timeout_s: float = option(
        900.0, "seconds that a rank waits for the others before it gives up", float, above=0, at_most=1_000_000
    )
    verify: str = option(
        "none",
        "generate again from the same seed and compare: single (sparse, each rank alone), dense (the model's own "
        "attention, each rank alone)",
        choices=("none", "single", "dense"),
    )
    verify_tolerance: float | None = option(
        None, "exit with 1 if the relative RMS difference of the latents exceeds this", float, at_least=0
    )
    repeat: int = option(1, "denoise each video so many times, to measure", int, at_least=1, at_most=_LARGEST)
    debug: bool = option(False, "show the traceback of an error", bool)
    sparse: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    # Of the degrees, those that flags gave: --mesh auto keeps to them; and why it chose the others.
    given_degrees: tuple[str, ...] = ()
    mesh_reason: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", tuple(self.lora))
        object.__setattr__(self, "lora_2", tuple(self.lora_2))
        object.__setattr__(self, "reference_image", tuple(self.reference_image))
        object.__setattr__(self, "lora_scale", tuple(self.lora_scale))
        object.__setattr__(self, "lora_scale_2", tuple(self.lora_scale_2))
        check_numbers(self)
        _check_scales("lora", self.lora, "lora_scale", self.lora_scale)
        _check_scales("lora_2", self.lora_2, "lora_scale_2", self.lora_scale_2)
        self._check_combinations()
        self.memory  # noqa: B018  options that contradict are told now
        for name, suffix in (
            ("output", ".mp4"),
            ("output_latents", ".pt"),
            ("output_frames", ".pt"),
            ("output_masks", ".npz"),
            ("report", ".json"),
        ):
            value = getattr(self, name)
            if value is not None and Path(value).suffix != suffix:
                raise ValueError(f"{flag_of(name)} {value} must end in {suffix}")
        tensors = list(map(os.path.abspath, self.tensor_paths().values()))
        if len(set(tensors)) < len(tensors):
            raise ValueError(
                f"--output-latents and --output-frames are both {self.output_latents}, and one would overwrite the other; "
                "give two files"
            )

    def _check_combinations(self) -> None:
        if not self.model:
            raise ValueError(f"--model is empty; give {MINI}, another name of --help, a folder, or a hub id")
        for name, given in (("layers", self.layers is not None), ("full", self.full)):
            if given and self.model not in STAND_INS:
                told = f"--layers {self.layers}" if name == "layers" else "--full"
                raise ValueError(
                    f"{told} is for {' and '.join(STAND_INS)}, and the model is {self.model}; leave it out"
                )
        if self.last_image is not None and self.image is None:
            raise ValueError("--last-image is given without --image; give the first frame, too")
        if self.video is not None and self.image is not None:
            raise ValueError("--video and --image are both given, and a video starts from one of them; use one")
        if self.mask is not None and self.video is None:
            raise ValueError("--mask is for --video, which is not given; give it, or leave --mask out")
        if self.strength is not None and self.video is None:
            raise ValueError(f"--strength {self.strength:g} is for --video, which is not given; leave --strength out")
        if self.boundary_ratio == 1:
            raise ValueError("--boundary-ratio 1.0 leaves the first expert no step; give a number above 0 and below 1")
        guided = self.guidance_scale is None or self.guidance_scale > 1
        if self.cfg_parallel_degree > 1 and not guided:
            raise ValueError(
                f"--cfg-parallel-degree {self.cfg_parallel_degree} needs two guidance branches, but --guidance-scale "
                f"{self.guidance_scale} switches guidance off; use a scale above 1, or --cfg-parallel-degree 1"
            )
        if self.sparse.backend == "none" and self.cfg_parallel_degree > 1:
            raise ValueError(
                "--cfg-parallel-degree 2 is done by sp_sparse, which --sparse-attn-backend none leaves off; use "
                "--sparse-attn-backend auto, with --sparse-attn-topk 1.0 for dense attention"
            )
        if self.sparse.backend == "none" and self.verify != "none":
            raise ValueError(
                f"--verify {self.verify} compares sparse attention, which --sparse-attn-backend none leaves off; choose "
                "a backend such as auto, or --verify none"
            )
        is_open = self.mesh == "auto"  # the degrees are checked when they have been chosen
        if (
            self.sparse.backend != "none"
            and self.sparse.kv_exchange == "all_gather"
            and self.ring_degree == 1
            and not is_open
        ):
            raise ValueError(
                f"--sparse-attn-kv-exchange {self.sparse.kv_exchange} is for ring ranks, and --ring-degree is 1; leave it "
                "out, or use --ring-degree 2 or more"
            )
        if self.output_masks is not None and self.sparse.backend == "none":
            raise ValueError(
                f"--output-masks {self.output_masks} records what sparse attention chooses, which --sparse-attn-backend "
                "none leaves off; choose a backend such as auto, or leave --output-masks out"
            )
        if self.verify_tolerance is not None and self.verify == "none":
            raise ValueError("--verify-tolerance has nothing to judge; add --verify single or --verify dense")

    @property
    def memory(self) -> MemoryOptions:
        """Those of the arguments that decide what memory a job takes."""
        return MemoryOptions(
            offload=self.offload,
            vae_tiling=self.vae_tiling,
            fsdp=self.fsdp,
            quantization=self.quantization,
            ranks=self.ranks_wanted,
            foreign_parallelism=self.sparse.backend == "none" and self.ranks_wanted > 1,
        )

    @property
    def ranks_wanted(self) -> int:
        return self.ulysses_degree * self.ring_degree * self.cfg_parallel_degree

    def output_path(self) -> Path:
        """Where the video goes; with several videos, the name before the number of each is added."""
        if self.output is not None:
            return Path(self.output)
        model = Path(os.path.normpath(self.model)).name
        density = "dense" if self.sparse.backend == "none" else f"topk{self.sparse.topk:g}"
        return Path("outputs", f"{model}_u{self.ulysses_degree}_r{self.ring_degree}_{density}_{self.seed}.mp4")

    def tensor_paths(self) -> dict[str, Path]:
        """Where latents and frames go, by the names of their flags; those that are not wanted are absent."""
        given = {name: getattr(self, name) for name in ("output_latents", "output_frames")}
        return {name: Path(path) for name, path in given.items() if path is not None}

    def report_path(self) -> Path:
        return self.output_path().with_suffix(".json") if self.report is None else Path(self.report)


def parse_arguments(argv: Sequence[str] | None = None) -> GenerateArguments:
    """From the command line, over a `--config` file, over the defaults.

    Raises:
        ValueError: an unknown flag or key, a value that is refused, or a configuration file that cannot be read.
    """
    given, configured = parse_flags(
        "generate", __doc__, {"": GenerateArguments, FLAG_PREFIX: SparseAttentionConfig}, argv
    )
    given, configured = _one_prompt(given), _one_prompt(configured)
    if "prompt" in given or "prompt_file" in given:
        configured = {name: value for name, value in configured.items() if name not in ("prompt", "prompt_file")}
    given = configured | given
    own = {o.name: given[o.name] for o in options_of(GenerateArguments) if o.name in given}
    return GenerateArguments(**own, sparse=sparse_config(given), given_degrees=given_degrees(given))


def given_degrees(given: dict[str, Any]) -> tuple[str, ...]:
    """The degrees of the mesh among the flags that were given."""
    return tuple(name for name in DEGREES if name in given)


def sparse_config(given: dict[str, Any]) -> SparseAttentionConfig:
    """What the `--sparse-attn-…` flags say, for the model that is asked for."""
    names = [name for name in given if name.startswith(FLAG_PREFIX)]
    if names and not {f"{FLAG_PREFIX}backend", f"{FLAG_PREFIX}preset"} & set(names):
        raise ValueError(
            f"{flag_of(names[0])} is given, but attention is dense without a backend; add --sparse-attn-backend auto or a "
            "preset, or none to keep it dense"
        )
    block_size = _SMALL_BLOCKS.get(given.get("model", MINI))
    if block_size is not None:
        given = {"sparse_attn_block_size": block_size, **given}
    return SparseAttentionConfig.from_flags(argparse.Namespace(**given))


def _one_prompt(given: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in given and "prompt_file" in given:
        raise ValueError("--prompt and --prompt-file are both given; use one")
    return given
