"""What a server refuses, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds on requests.

    Attributes:
        queue: jobs that may wait.
        requests: requests that are served at once.
        body_bytes: of a request.
        bodies_bytes: of all requests that are being read.
        body_s: seconds that a client may take between two pieces of its request, or to take a piece of an answer.
        image_pixels: of a first frame.
        prompt_characters: of a prompt, and of a negative one.
        pixels: height x width.
        frames: of a video.
        steps: denoising steps.
        work: height x width x frames x steps.
        image_urls: whether images may be fetched from the web.
        fetch_s: seconds that fetching one may take.

    Raises:
        ValueError: a bound that lets nothing through.
    """

    queue: int = 64
    requests: int = 256
    body_bytes: int = 16 << 20
    bodies_bytes: int = 256 << 20
    body_s: float = 20.0
    image_pixels: int = 16_000_000
    prompt_characters: int = 4096
    pixels: int = 1280 * 720
    frames: int = 161
    steps: int = 100
    work: int = 1280 * 720 * 121 * 50
    image_urls: bool = False
    fetch_s: float = 10.0

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "image_urls" and value <= 0:
                raise ValueError(f"limit {entry.name}={value} lets nothing through; give more than 0")
        if self.bodies_bytes < self.body_bytes:
            raise ValueError(
                f"limit bodies_bytes={self.bodies_bytes} is less than one request of body_bytes={self.body_bytes}; give more"
            )
