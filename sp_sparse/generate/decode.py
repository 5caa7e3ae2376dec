"""From latents to frames: on rank 0 whole or in tiles, or the tiles of a video shared by all ranks of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.tiles import Tile, blend_tiles, decode_tile, decoded_shape, tiles_of
from sp_sparse.parallel.agreement import says_lost_rank


class VideoDecoding:
    """The decoding of one video, by all ranks: each calls `work`, and once all have done theirs, `frames`.

    Tiles are shared where there are several ranks; what is decoded whole is decoded on rank 0.
    """

    def __init__(self, pipe: Any, latents: Tensor, ranks: Ranks) -> None:
        """`latents` `[B, C, T, H, W]` are alike on all ranks."""
        self._pipe, self._latents, self._ranks = pipe, latents, ranks
        self._tiles = tiles_of(pipe.vae, latents.shape[-2], latents.shape[-1])
        self._shared = ranks.world > 1 and bool(self._tiles)
        self._shares = share_tiles(self._tiles, ranks.world if self._shared else 1)
        # As one memory a rank, so that one message carries a share; rank 0 has all of them.
        self._decoded: list[Tensor] = []
        self._whole: Tensor | None = None

    @property
    def parts(self) -> int:
        """Calls of `on_part`: the same on all ranks, as many as the rank with most tiles has latent frames to decode."""
        return self._latents.shape[2] * max(1, len(self._shares[0]))

    @property
    def tiles_by_rank(self) -> list[int]:
        """How many tiles each rank decodes; all 0 for a video that is decoded whole."""
        return [len(share) for share in self._shares] + [0] * (self._ranks.world - len(self._shares))

    def __str__(self) -> str:
        if not self._tiles:
            vae = self._pipe.vae
            tile = f"{vae.tile_sample_min_width}x{vae.tile_sample_min_height}"
            return (
                f"whole, on rank 0: it is no larger than one tile of {tile}" if vae.use_tiling else "whole, on rank 0"
            )
        return f"{len(self._tiles)} tiles; by rank {', '.join(map(str, self.tiles_by_rank))}"

    def work(self, on_part: Callable[[], Any]) -> None:
        """Decode this rank's share. Nothing is exchanged but what `on_part` exchanges.

        Args:
            on_part: called equally often on every rank, after each latent frame; may raise, also to tell of another rank.
        """
        if self._shared:
            self._decode_share(on_part)
        elif self._ranks.first:
            self._whole = decode(self._pipe, self._latents, on_part)
        else:
            self._idle(self.parts, on_part)

    def frames(self) -> Tensor | None:
        """Frames `[B, T, H, W, 3]` in [0, 1] on the CPU of rank 0, None on the others. A collective call."""
        if not self._shared:
            return self._whole
        with says_lost_rank("gathering the decoded tiles"):
            self._gather()
        if not self._ranks.first:
            return None
        memories, self._decoded = self._decoded, []
        decoded = {
            tile: pixels
            for share, memory in zip(self._shares, memories, strict=True)
            for tile, pixels in self._views(share, memory)
        }
        pixels = blend_tiles(self._pipe.vae, self._tiles, [decoded[tile] for tile in self._tiles])
        del memories, decoded  # twice the video, before it is turned into frames
        return _as_frames(self._pipe, pixels)

    def _decode_share(self, on_part: Callable[[], Any]) -> None:
        vae, rank = self._pipe.vae, self._ranks.rank
        # All memory is taken before the first part: what fails does so while the others can still hear of it.
        self._decoded = [
            torch.empty(
                sum(self._size(tile) for tile in share if rank in (0, owner)), dtype=vae.dtype, device=vae.device
            )
            for owner, share in enumerate(self._shares)
        ]
        latents, share = _as_encoded(vae, self._latents), self._shares[rank]
        for tile, out in self._views(share, self._decoded[rank]):
            decode_tile(vae, tile.of(latents), out, on_part)
        self._idle(self.parts - len(share) * latents.shape[2], on_part)

    def _idle(self, parts: int, on_part: Callable[[], Any]) -> None:
        for _ in range(parts):
            on_part()

    def _size(self, tile: Tile) -> int:
        return prod(decoded_shape(self._pipe.vae, tile, self._latents))

    def _views(self, share: Sequence[Tile], memory: Tensor) -> list[tuple[Tile, Tensor]]:
        """The tiles of a share, each with its part of the share's memory."""
        shapes = [decoded_shape(self._pipe.vae, tile, self._latents) for tile in share]
        parts = memory.split([prod(shape) for shape in shapes]) if share else ()
        return [(tile, part.view(shape)) for tile, part, shape in zip(share, parts, shapes, strict=True)]

    def _gather(self) -> None:
        """The shares of the other ranks into the memory that rank 0 has for them: a message a rank that has tiles."""
        group, rank = self._ranks.groups[0], self._ranks.rank
        if rank == 0:
            peers = [peer for peer, memory in enumerate(self._decoded) if peer and memory.numel()]
            operations = [dist.P2POp(dist.irecv, self._decoded[peer], peer, group) for peer in peers]
        else:
            mine = self._decoded[rank]
            operations = [dist.P2POp(dist.isend, mine, 0, group)] if mine.numel() else []
        for message in dist.batch_isend_irecv(operations) if operations else ():
            message.wait()


def share_tiles(tiles: Sequence[Tile], ranks: int) -> tuple[tuple[Tile, ...], ...]:
    """The tiles of each rank: dealt out by falling size, back and forth, so that none has more than one beyond another.

    The first rank has as many as any, and the tiles that ranks decode at the same time are of about one size.
    """
    shares: list[list[Tile]] = [[] for _ in range(ranks)]
    for number, tile in enumerate(sorted(tiles, key=lambda tile: -tile.area)):
        turn, place = divmod(number, ranks)
        # The last turn may not go round, and begins at the first rank.
        back = turn % 2 == 1 and (turn + 1) * ranks <= len(tiles)
        shares[ranks - 1 - place if back else place].append(tile)
    return tuple(tuple(share) for share in shares)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor, on_frame: Callable[[], Any]) -> Tensor:
    """Frames `[B, T, H, W, 3]` in [0, 1] on the CPU, on this rank alone.

    `on_frame` is called after each latent frame, of each tile where the VAE is in tiles.
    """
    vae = pipe.vae

    def advance(*_: Any) -> None:  # what a hook returns would replace the output
        on_frame()

    # The VAE decodes one latent frame after the other.
    hook = vae.decoder.register_forward_hook(advance)
    try:
        pixels = vae.decode(_as_encoded(vae, latents), return_dict=False)[0]
    finally:
        hook.remove()
    return _as_frames(pipe, pixels)


def _as_encoded(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE's encoder has them, instead of as the transformer does."""
    mean, std = (
        torch.tensor(numbers, device=vae.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    return latents.to(vae.device, vae.dtype) * std + mean


def _as_frames(pipe: Any, pixels: Tensor) -> Tensor:
    frames: Tensor = pipe.video_processor.postprocess_video(pixels, output_type="pt")
    return frames.permute(0, 1, 3, 4, 2).float().cpu()
