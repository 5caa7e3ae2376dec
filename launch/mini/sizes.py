"""How large the model and its videos are."""

from __future__ import annotations

from dataclasses import dataclass

# diffusers' WanPipeline pads every caption to as many tokens and attends all of them.
TEXT_TOKENS = 512
# The longest caption of the grammar, with its end: what the text encoder runs over in training.
CAPTION_TOKENS = 48


@dataclass(frozen=True)
class Sizes:
    """The VAE makes 4 pixels of a side, and 4 frames after the first, one latent; a token is 1 x 2 x 2 latents.

    Raises:
        ValueError: sides that are no multiple of 16, or frames that are not 4n + 1.
    """

    side: int = 128
    frames: int = 49
    fps: int = 16
    latent_channels: int = 8
    encoder_width: int = 16
    decoder_width: int = 32  # multiples of 16 are twice as fast on a CPU as 24 is
    heads: int = 4
    head_dim: int = 64
    layers: int = 6
    feed_forward: int = 768
    text_width: int = 128
    text_layers: int = 2

    def __post_init__(self) -> None:
        if self.side % 16 or self.frames % 4 != 1:
            raise ValueError(
                f"side {self.side} and frames {self.frames} do not fit the model; use a multiple of 16, and 4n + 1 frames"
            )

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Channels, frames, height and width of a clip's latents."""
        return self.latent_channels, (self.frames - 1) // 4 + 1, self.side // 4, self.side // 4

    @property
    def tokens(self) -> int:
        _, frames, height, width = self.latent
        return frames * (height // 2) * (width // 2)


# 13 x 16 x 16 = 3,328 tokens, 52 blocks of 64.
MINI = Sizes()
# For tests: everything there is, as small as it goes.
MICRO = Sizes(
    side=32,
    frames=9,
    latent_channels=4,
    encoder_width=8,
    decoder_width=8,
    heads=2,
    head_dim=16,
    layers=2,
    feed_forward=64,
    text_width=32,
)
SIZES = {"mini": MINI, "micro": MICRO}
