"""Tiles of a video, as diffusers' `AutoencoderKLWan.tiled_decode` cuts, decodes and blends them, one by one.

diffusers does all tiles in one call. Here each step stands alone, so that tiles may be decoded on several ranks; the video
is the same to the last bit. Of what is private to diffusers it relies on `_feat_map`, the decoder's memory of the frames
before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_METHODS = ("enable_tiling", "tiled_decode", "blend_v", "blend_h", "clear_cache", "post_quant_conv", "decoder")
_SIZES = tuple(f"tile_sample_{kind}_{side}" for kind in ("min", "stride") for side in ("height", "width"))
_CONFIG = ("patch_size", "out_channels", "scale_factor_temporal")


@dataclass(frozen=True)
class Tile:
    """A rectangle of the latents.

    Attributes:
        row, column: its place among the tiles.
        top, left, height, width: in latents.
    """

    row: int
    column: int
    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        return self.height * self.width

    def of(self, latents: Tensor) -> Tensor:
        """Its part of `[B, C, T, H, W]`."""
        return latents[..., self.top : self.top + self.height, self.left : self.left + self.width]


def check_tiling() -> None:
    """Refuse a diffusers whose VAE is not the one that this module knows, before weights are read.

    Raises:
        ValueError: with what is missing.
    """
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        _check(AutoencoderKLWan(base_dim=8))


def enable_tiling(vae: Any) -> None:
    """Encode and decode in tiles of diffusers' own size what is larger than one.

    Raises:
        ValueError: a VAE that cannot, or whose latents the tiles would not fit.
    """
    _check(vae)
    vae.enable_tiling()


def tiles_of(vae: Any, height: int, width: int) -> tuple[Tile, ...]:
    """The tiles of latents of this size, row by row; none where diffusers decodes them whole."""
    ratio = vae.spatial_compression_ratio
    most_high, most_wide = vae.tile_sample_min_height // ratio, vae.tile_sample_min_width // ratio
    if not vae.use_tiling or (height <= most_high and width <= most_wide):
        return ()
    return tuple(
        Tile(row, column, top, left, min(most_high, height - top), min(most_wide, width - left))
        for row, top in enumerate(range(0, height, vae.tile_sample_stride_height // ratio))
        for column, left in enumerate(range(0, width, vae.tile_sample_stride_width // ratio))
    )


def decoded_shape(vae: Any, tile: Tile, latents: Tensor) -> tuple[int, ...]:
    """Of what the decoder makes of a tile of these latents: `[B, C, T, H, W]`, where the VAE has patches of patches."""
    config = vae.config
    ratio = vae.spatial_compression_ratio // (config.patch_size or 1)
    frames = (latents.shape[2] - 1) * config.scale_factor_temporal + 1
    return latents.shape[0], config.out_channels, frames, tile.height * ratio, tile.width * ratio


@torch.no_grad()
def decode_tile(vae: Any, latents: Tensor, out: Tensor, on_frame: Callable[[], Any]) -> None:
    """Decode the latents of one tile into `out`, frame after frame, as each one needs those before it.

    Args:
        latents: `[B, C, T, h, w]`, as the VAE's encoder has them.
        out: of `decoded_shape` and the VAE's dtype.
        on_frame: called after each latent frame; may raise.

    Raises:
        RuntimeError: the decoder gave another number of frames than its configuration says.
    """
    filled = 0
    vae.clear_cache()
    try:
        for number in range(latents.shape[2]):
            pixels = vae.decoder(
                vae.post_quant_conv(latents[:, :, number : number + 1]),
                feat_cache=vae._feat_map,
                feat_idx=[0],
                first_chunk=number == 0,
            )
            begin, filled = filled, filled + pixels.shape[2]
            if filled > out.shape[2] or (number == latents.shape[2] - 1 and filled != out.shape[2]):
                raise RuntimeError(
                    f"the VAE decoded {filled} frames, and its configuration says {out.shape[2]}; leave --vae-tiling out"
                )
            out[:, :, begin:filled] = pixels
            on_frame()
    finally:
        vae.clear_cache()


@torch.no_grad()
def blend_tiles(vae: Any, tiles: Sequence[Tile], decoded: Sequence[Tensor]) -> Tensor:
    """The whole video `[B, 3, T, H, W]` in [-1, 1] from all tiles, in order; `decoded` are changed where they overlap."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    patch = vae.config.patch_size or 1
    ratio = vae.spatial_compression_ratio // patch
    step_down, step_right = vae.tile_sample_stride_height // patch, vae.tile_sample_stride_width // patch
    overlap_down = vae.tile_sample_min_height // patch - step_down
    overlap_right = vae.tile_sample_min_width // patch - step_right
    last = tiles[-1]
    height, width = (last.top + last.height) * ratio, (last.left + last.width) * ratio
    video = decoded[0].new_empty(*decoded[0].shape[:3], height, width)
    blended: dict[tuple[int, int], Tensor] = {}
    for tile, pixels in zip(tiles, decoded, strict=True):
        # With neighbours that are blended already: the order of diffusers.
        if tile.row:
            pixels = vae.blend_v(blended[tile.row - 1, tile.column], pixels, overlap_down)
        if tile.column:
            pixels = vae.blend_h(blended[tile.row, tile.column - 1], pixels, overlap_right)
        blended[tile.row, tile.column] = pixels
        top, left = tile.row * step_down, tile.column * step_right
        video[..., top : top + step_down, left : left + step_right] = pixels[..., :step_down, :step_right]
    return (video if vae.config.patch_size is None else unpatchify(video, patch_size=patch)).clamp_(-1.0, 1.0)


def _check(vae: Any) -> None:
    if missing := _missing(vae):
        raise ValueError(
            f"--vae-tiling: {type(vae).__name__} of this diffusers has no {', '.join(missing)}; use diffusers 0.42.1 and an "
            "AutoencoderKLWan, or leave --vae-tiling out"
        )
    ratio = vae.spatial_compression_ratio
    for name in _SIZES:
        if getattr(vae, name) % ratio:
            raise ValueError(
                f"--vae-tiling: {name} of the VAE is {getattr(vae, name)}, which is no multiple of the {ratio} pixels of a "
                "latent; leave --vae-tiling out"
            )


def _missing(vae: Any) -> list[str]:
    """What this module needs and the VAE, or the module of diffusers, has not."""
    from diffusers.models.autoencoders import autoencoder_kl_wan

    needed = (*_METHODS, *_SIZES, "use_tiling", "spatial_compression_ratio")
    missing = [name for name in needed if not hasattr(vae, name)]
    missing += [f"config.{name}" for name in _CONFIG if name not in vae.config]
    if not hasattr(autoencoder_kl_wan, "unpatchify"):
        missing.append("unpatchify")
    if missing:
        return missing
    vae.clear_cache()
    if not hasattr(vae, "_feat_map"):
        missing.append("_feat_map")
    taken = inspect.signature(vae.decoder.forward).parameters
    return missing + [f"decoder({name}=)" for name in ("feat_cache", "feat_idx", "first_chunk") if name not in taken]
