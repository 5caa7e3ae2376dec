"""`AutoencoderKLWan` over whole clips at once, and its loss.

The class itself goes chunk by chunk, which is slow. All that it does in time is causal, so one pass over the whole clip
gives the same numbers; only the resampling in time treats the first frame as a special case.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_KL = 1e-5
_SQUARES = 2.0  # weight of the squared error, which counts small bright figures more than the absolute one does
_EDGES = 0.25  # weight of the differences between neighbours in space and time


def encode(vae: Any, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance [B, C, 1 + n, H/4, W/4] of the latents of a video [B, 3, 1 + 4n, H, W] in -1 to 1."""
    encoder = vae.encoder
    x = encoder.conv_in(video)
    for block in encoder.down_blocks:
        x = _shrink_block(block, x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = vae.quant_conv(x).chunk(2, 1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """A video [B, 3, 1 + 4n, H, W] of latents, not clamped."""
    decoder = vae.decoder
    x = decoder.mid_block(decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        x = _grow_block(block, x)
    out: Tensor = decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))
    return out


def loss_of(vae: Any, video: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What is minimised, and the mean absolute error of a pixel in -1 to 1."""
    mean, log_variance = encode(vae, video)
    mean, log_variance = mean.float(), log_variance.float()
    noise = torch.randn(mean.shape, generator=generator, device=mean.device)
    seen = decode(vae, mean + torch.exp(0.5 * log_variance) * noise).float()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    difference, error = difference_of(seen, video)
    return difference + _KL * divergence, error


def difference_of(seen: Tensor, video: Tensor) -> tuple[Tensor, Tensor]:
    """How far two videos lie apart, as it is minimised, and the mean absolute error of a pixel in -1 to 1."""
    difference = seen - video
    error = difference.abs().mean()
    edges = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4))
    return error + _SQUARES * difference.square().mean() + _EDGES * edges, error


def _shrink_block(block: Any, x: Tensor) -> Tensor:
    shortcut = block.avg_shortcut(x[:, :, :1])
    if x.shape[2] > 1:
        shortcut = torch.cat([shortcut, block.avg_shortcut(x[:, :, 1:])], 2)
    for resnet in block.resnets:
        x = resnet(x)
    if block.downsampler is not None:
        x = _shrink(block.downsampler, x)
    return x + shortcut


def _grow_block(block: Any, x: Tensor) -> Tensor:
    shortcut = None if block.avg_shortcut is None else block.avg_shortcut(x, first_chunk=True)
    for resnet in block.resnets:
        x = resnet(x)
    if block.upsampler is not None:
        x = _grow(block.upsampler, x)
    return x if shortcut is None else x + shortcut


def _shrink(layer: Any, x: Tensor) -> Tensor:
    x = layer(x)
    if layer.mode != "downsample3d":
        return x
    return torch.cat([x[:, :, :1], layer.time_conv(x)], 2) if x.shape[2] > 1 else x


def _grow(layer: Any, x: Tensor) -> Tensor:
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        pairs = layer.time_conv(x[:, :, 1:])  # does not see the first frame
        pairs = pairs.unflatten(1, (2, -1)).movedim(1, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], pairs], 2)
    return layer(x)


def sharpness(video: Tensor, seen: Tensor) -> Tensor:
    """PSNR of each video [B, ...] in -1 to 1, in dB."""
    return 10 * torch.log10(4 / F.mse_loss(seen, video, reduction="none").flatten(1).mean(1))
