"""The arguments of `serve`: those of `generate` that are not about one video, and those of a server."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sp_sparse import SparseAttentionConfig
from sp_sparse.config import FLAG_PREFIX
from sp_sparse.flags import check_numbers, flag_of, option, options_of, parse_flags, same_option
from sp_sparse.generate.arguments import GenerateArguments, given_degrees, sparse_config
from sp_sparse.serve.limits import Limits

API_KEY_VARIABLE = "SP_SPARSE_API_KEY"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _shared(name: str, **changed: Any) -> Any:
    return same_option(GenerateArguments, name, **changed)


@dataclass(frozen=True)
class ServeArguments:
    """Each field is a flag: `max_queue` is `--max-queue`.

    Raises:
        ValueError: values that cannot go together or are out of range.
    """

    model: str = _shared("model")
    layers: int | None = _shared("layers")
    full: bool = _shared("full")
    sparse_attn_preset: str | None = _shared("sparse_attn_preset")
    lora: tuple[str, ...] = _shared("lora")
    lora_2: tuple[str, ...] = _shared("lora_2")
    lora_scale: tuple[float, ...] = _shared("lora_scale")
    lora_scale_2: tuple[float, ...] = _shared("lora_scale_2")
    boundary_ratio: float | None = _shared("boundary_ratio")
    scheduler: str = _shared("scheduler")
    flow_shift: float | None = _shared("flow_shift")
    dtype: str = _shared("dtype")
    device: str = _shared("device")
    compile: bool = _shared("compile")
    fsdp: bool = _shared("fsdp")
    quantization: str = _shared("quantization")
    mesh: str = _shared("mesh")
    ulysses_degree: int = _shared("ulysses_degree")
    ring_degree: int = _shared("ring_degree")
    cfg_parallel_degree: int = _shared("cfg_parallel_degree")
    vae_tiling: bool = _shared("vae_tiling")
    offload: str = _shared("offload")
    timeout_s: float = _shared(
        "timeout_s",
        default=600.0,
        help="seconds that a step, a part of decoding or another rank may take before every process ends",
    )
    host: str = option("127.0.0.1", "address to listen on; any but this machine's own loopback needs an API key")
    port: int = option(8000, "port to listen on; 0 takes a free one and tells it", int)
    api_key: str | None = option(None, f"key that clients must send; better given as {API_KEY_VARIABLE}")
    no_api_key: bool = option(False, "let everyone who can reach the server use it", bool)
    served_model_name: str | None = option(None, "name of the model for clients (default: --model)")
    data_dir: str = option("outputs/server", "folder of the jobs and videos; one server at a time")
    keep_hours: float = option(168.0, "hours that a finished job is kept", float)
    keep_gb: float = option(50.0, "GB of videos that are kept; the oldest go first", float)
    max_tries: int = option(3, "starts of a job that the server does not survive, before it fails", int)
    warmup_steps: int = option(
        4, "denoising steps of a video that is made at the start and thrown away; 0 for none", int
    )
    drain_s: float = option(
        20.0, "seconds that a running job has to end after SIGTERM; torchrun gives 30 before it kills", float
    )
    max_queue: int = option(Limits.queue, "jobs that may wait", int)
    max_requests: int = option(Limits.requests, "requests that are served at once", int)
    max_body_mb: float = option(Limits.body_bytes / 2**20, "MB of a request, its image included", float)
    max_bodies_mb: float = option(
        Limits.bodies_bytes / 2**20, "MB of all requests that are being read, their images included", float
    )
    client_timeout_s: float = option(Limits.body_s, "seconds that a client may stall while it sends or receives", float)
    max_image_pixels: int = option(Limits.image_pixels, "pixels of a first frame", int)
    max_prompt_characters: int = option(Limits.prompt_characters, "characters of a prompt", int)
    max_pixels: int = option(Limits.pixels, "height x width of a video", int)
    max_frames: int = option(Limits.frames, "frames of a video", int)
    max_steps: int = option(Limits.steps, "denoising steps of a video", int)
    max_work: int = option(Limits.work, "height x width x frames x steps of a video", int)
    allow_image_urls: bool = option(False, "fetch first frames from public http(s) addresses", bool)
    debug: bool = _shared("debug")
    sparse: SparseAttentionConfig = field(default_factory=SparseAttentionConfig)
    given_degrees: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("timeout_s", "keep_hours", "keep_gb", "max_body_mb", "max_bodies_mb", "max_tries"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} is not above 0; give more")
        for name in ("warmup_steps", "drain_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{flag_of(name)} {getattr(self, name)} is below 0; give 0 or more")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port {self.port} is outside [0, 65535]; give a free port")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.strip()):
            raise ValueError("the API key is empty or not ASCII; give letters, digits and signs")
        if self.api_key is not None and self.no_api_key:
            raise ValueError("--no-api-key serves everyone, and --api-key is given; leave out one of them")
        if self.host not in _LOOPBACK and self.api_key is None and not self.no_api_key:
            raise ValueError(
                f"--host {self.host} can be reached from elsewhere, and there is no API key; set {API_KEY_VARIABLE}, or "
                "give --no-api-key to serve everyone"
            )
        self.limits  # noqa: B018  a limit that lets nothing through is told now
        self.base()

    def base(self) -> GenerateArguments:
        """What all jobs share, as `generate` takes it."""
        shared = {entry.name for entry in fields(GenerateArguments)} & {entry.name for entry in fields(self)}
        return GenerateArguments(**{name: getattr(self, name) for name in shared})

    @property
    def limits(self) -> Limits:
        return Limits(
            queue=self.max_queue,
            requests=self.max_requests,
            body_bytes=int(self.max_body_mb * 2**20),
            bodies_bytes=int(self.max_bodies_mb * 2**20),
            body_s=self.client_timeout_s,
            image_pixels=self.max_image_pixels,
            prompt_characters=self.max_prompt_characters,
            pixels=self.max_pixels,
            frames=self.max_frames,
            steps=self.max_steps,
            work=self.max_work,
            image_urls=self.allow_image_urls,
        )

    @property
    def model_name(self) -> str:
        """What clients call the model; of a folder its name alone, since paths are nobody's business."""
        if self.served_model_name is not None:
            return self.served_model_name
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model


def parse_serve_arguments(argv: Sequence[str] | None = None) -> ServeArguments:
    """From the command line, over a `--config` file, over the environment and the defaults.

    Raises:
        ValueError: an unknown flag or key, a value that is refused, or a configuration file that cannot be read.
    """
    given, configured = parse_flags("serve", __doc__, {"": ServeArguments, FLAG_PREFIX: SparseAttentionConfig}, argv)
    given = configured | given
    if os.environ.get(API_KEY_VARIABLE) and not given.get("no_api_key"):
        given.setdefault("api_key", os.environ[API_KEY_VARIABLE])
    own = {entry.name: given[entry.name] for entry in options_of(ServeArguments) if entry.name in given}
    return ServeArguments(**own, sparse=sparse_config(given), given_degrees=given_degrees(given))
