"""The arguments of `fidelity`: those of `generate` that all videos share, and the lists of what is compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from sp_sparse import SparseAttentionConfig
from sp_sparse.fidelity.plan import Baseline, Setting, SettingLists, default_block_size
from sp_sparse.flags import check_numbers, flag_of, option, options_of, parse_flags, same_option
from sp_sparse.generate.arguments import GenerateArguments, given_degrees


def _shared(name: str, **changed: Any) -> Any:
    return same_option(GenerateArguments, name, **changed)


def _listed(name: str) -> Callable[[str], tuple[Any, ...]]:
    """Reads values with commas between, each as the field `name` of the configuration is read."""
    parse = next(entry for entry in fields(SparseAttentionConfig) if entry.name == name).metadata["parse"]
    return lambda text: tuple(parse(part.strip()) for part in text.strip("[] ").replace('"', "").split(","))


def _switch(text: str) -> bool:
    (value,) = _listed("keep_diagonal")(text)
    return bool(value)


@dataclass(frozen=True)
class FidelityArguments:
    """Each field is a flag: `num_frames` is `--num-frames`; lists have commas between. None means "as the model wants it".

    Raises:
        ValueError: values that cannot go together or are out of range.
    """

    prompts: str = option("", "file with one prompt a line")
    output: str = option("", "folder of the results; one that was begun with the same model and sizes is gone on with")
    seeds: int = option(1, "videos of each prompt and setting, from the seeds 0, 1, …", int, at_least=1, at_most=10_000)
    densities: tuple[float, ...] = option((0.1, 0.3), "shares of key blocks that are kept; 1 is dense", _listed("topk"))
    selectors: tuple[str, ...] = option(
        ("topk",), "selectors; mass is the true attention mass of blocks, a bound that is slow", _listed("selector")
    )
    remainders: tuple[str, ...] = option(("drop",), "what becomes of the other blocks", _listed("remainder"))
    orders: tuple[str, ...] = option(("raster",), "token orders", _listed("token_order"))
    dense_steps: tuple[int, ...] = option((0,), "first denoising steps that stay dense", _listed("dense_steps"))
    block_sizes: tuple[tuple[int, int], ...] = option(
        (), "tokens of a block, as 128 or 128x64 (default: as generate takes them)", _listed("block_size")
    )
    keep_diagonal: tuple[bool, ...] = option((True,), "true, false, or both", _listed("keep_diagonal"))
    keep_first_frame: tuple[bool, ...] = option((False,), "true, false, or both", _listed("keep_first_frame"))
    sparse_attn_backend: str = same_option(SparseAttentionConfig, "backend", default="auto")
    sparse_attn_kv_exchange: str = same_option(SparseAttentionConfig, "kv_exchange")
    baseline: str | None = option(
        None,
        "what the differences are taken to, such as remainder=drop,selector=topk: each setting is compared with the one "
        "that has these parts instead of its own (default: the first of every list but the densities)",
    )
    noise_floor: bool = option(True, "render dense attention by another kernel too: true or false", _switch)
    masks: bool = option(True, "look at the masks of the first prompt, in a run of their own: true or false", _switch)
    report_only: bool = option(
        False, "write the report of what is in the folder, and render nothing: true or false", _switch
    )
    batch: int = option(1, "videos made together, as the memory allows", int, at_least=1, at_most=1000)
    shown: int = option(2, "prompts whose videos the page shows, each at seed 0", int, at_least=0, at_most=1000)
    caption_check: str | None = option(
        None, "package.module:function (frames [T, H, W, 3] in [0, 1], prompt) -> share of the caption that is shown"
    )
    model: str = _shared("model")
    layers: int | None = _shared("layers")
    full: bool = _shared("full")
    lora: tuple[str, ...] = _shared("lora")
    lora_2: tuple[str, ...] = _shared("lora_2")
    lora_scale: tuple[float, ...] = _shared("lora_scale")
    lora_scale_2: tuple[float, ...] = _shared("lora_scale_2")
    negative_prompt: str = _shared("negative_prompt")
    image: str | None = _shared("image")
    last_image: str | None = _shared("last_image")
    height: int | None = _shared("height")
    width: int | None = _shared("width")
    num_frames: int | None = _shared("num_frames")
    fps: int | None = _shared("fps")
    num_inference_steps: int | None = _shared("num_inference_steps")
    guidance_scale: float | None = _shared("guidance_scale")
    guidance_scale_2: float | None = _shared("guidance_scale_2")
    boundary_ratio: float | None = _shared("boundary_ratio")
    scheduler: str = _shared("scheduler")
    flow_shift: float | None = _shared("flow_shift")
    vae_tiling: bool = _shared("vae_tiling")
    mesh: str = _shared("mesh")
    ulysses_degree: int = _shared("ulysses_degree")
    ring_degree: int = _shared("ring_degree")
    cfg_parallel_degree: int = _shared("cfg_parallel_degree")
    offload: str = _shared("offload")
    fsdp: bool = _shared("fsdp")
    quantization: str = _shared("quantization")
    dtype: str = _shared("dtype")
    device: str = _shared("device")
    timeout_s: float = _shared("timeout_s")
    debug: bool = _shared("debug")
    given_degrees: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self)
        for name, what in (("prompts", "a file with one prompt a line"), ("output", "a folder for the results")):
            if not getattr(self, name):
                raise ValueError(f"{flag_of(name)} is missing; give {what}")
        if Path(self.prompts).suffix == ".jsonl":
            raise ValueError(
                f"--prompts {self.prompts} has settings of its own a line, and the videos compared here share theirs; give "
                "a text file with one prompt a line"
            )
        if self.sparse_attn_backend == "none":
            raise ValueError(
                "--sparse-attn-backend none leaves attention dense, which is rendered anyhow; use auto or a kernel"
            )
        if not self.block_sizes:
            object.__setattr__(self, "block_sizes", (default_block_size(self.model),))
        for setting in self.settings:
            self.config(setting)
        self.compared_with  # noqa: B018  a baseline that is not measured is told now
        self.base()

    @property
    def lists(self) -> SettingLists:
        return SettingLists(
            selector=self.selectors,
            remainder=self.remainders,
            order=self.orders,
            dense_steps=self.dense_steps,
            block_size=self.block_sizes,
            keep_diagonal=self.keep_diagonal,
            keep_first_frame=self.keep_first_frame,
            density=self.densities,
        )

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self.lists.settings()

    @property
    def compared_with(self) -> Baseline:
        return self.lists.baseline(self.baseline)

    @property
    def folder(self) -> Path:
        return Path(self.output)

    def config(self, setting: Setting) -> SparseAttentionConfig:
        """A setting as the layers take it.

        Raises:
            ValueError: values that the configuration refuses.
        """
        return replace(setting.config(self.sparse_attn_backend), kv_exchange=self.sparse_attn_kv_exchange)

    def base(self) -> GenerateArguments:
        """What all videos share, as `generate` takes it."""
        shared = {entry.name for entry in options_of(GenerateArguments)} & {entry.name for entry in fields(self)}
        shared -= {"output"}
        sparse = self.config(self.settings[0])
        return GenerateArguments(
            **{name: getattr(self, name) for name in shared},
            prompt_file=self.prompts,
            sparse=sparse,
            given_degrees=self.given_degrees,
        )


def parse_arguments(argv: Sequence[str] | None = None) -> FidelityArguments:
    """From the command line, over a `--config` file, over the defaults.

    Raises:
        ValueError: an unknown flag or key, a value that is refused, or a configuration file that cannot be read.
    """
    given, configured = parse_flags("fidelity", __doc__, {"": FidelityArguments}, argv)
    given = configured | given
    return FidelityArguments(**given, given_degrees=given_degrees(given))
