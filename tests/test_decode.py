"""Tiled decoding, alone and shared by ranks: to the last bit what diffusers' `tiled_decode` gives on one rank."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from torch import Tensor

from sp_sparse.generate.__main__ import main
from sp_sparse.generate.decode import VideoDecoding, decode, share_tiles
from sp_sparse.generate.files import decoded_pixels
from sp_sparse.generate.random_models import tiny_text_image_to_video, tiny_text_to_video
from sp_sparse.generate.ranks import Ranks
from sp_sparse.generate.tiles import (
    Tile,
    blend_tiles,
    check_tiling,
    decode_tile,
    decoded_shape,
    enable_tiling,
    tiles_of,
)
from sp_sparse.parallel.agreement import RefusedError
from tests.ranks import run_ranks
from tests.serving.server import RankServer

CPU = torch.device("cpu")
TINY = ["--model", "tiny"]
SPARSE = ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3"]
# Just above a tile of 256 x 256 pixels: four tiles, three of them ragged.
TILED = ["--vae-tiling", "--height", "272", "--width", "288", "--num-frames", "5", "--num-inference-steps", "2"]


def _pipe(channels: int, dtype: torch.dtype = torch.float32) -> Any:
    """With tiles of 64 pixels, 48 apart: 8 and 6 latents of the VAE with 16 channels, 4 and 3 of the one with 48.

    Its pixels are so bright that some are clamped.
    """
    full = tiny_text_to_video(torch.float32) if channels == 16 else tiny_text_image_to_video(torch.float32, False)
    enable_tiling(full.vae)
    full.vae.enable_tiling(64, 64, 48, 48)
    full.vae.decoder.conv_out.weight.data.mul_(16)
    return SimpleNamespace(vae=full.vae.to(dtype), video_processor=full.video_processor)


def _latents(channels: int, frames: int, height: int, width: int) -> Tensor:
    """Of two videos."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, channels, frames, height, width, generator=generator)


def _tiled(pipe: Any, latents: Tensor) -> Tensor:
    """By diffusers' own code and nothing else."""
    vae = pipe.vae
    mean, std = (
        torch.tensor(values, dtype=vae.dtype).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        pixels = vae.tiled_decode(latents.to(vae.dtype) * std + mean, return_dict=False)[0]
    assert (pixels.abs() == 1).float().mean() > 0.001
    frames: Tensor = pipe.video_processor.postprocess_video(pixels, output_type="pt").permute(0, 1, 3, 4, 2).float()
    return frames


# Channels, latent frames, rows and columns of latents, tiles.
CASES = [
    (16, 3, 13, 20, 12),  # ragged below and at the right, the last row of one latent
    (16, 1, 9, 8, 4),  # one latent more than a tile
    (16, 2, 6, 14, 3),  # one row
    (48, 3, 7, 9, 9),
    (48, 2, 4, 5, 4),
    (48, 1, 13, 2, 5),  # one column, narrower than the overlap is wide
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_rank_decodes_by_diffusers(case: tuple[int, ...], dtype: torch.dtype) -> None:
    channels, frames, height, width, count = case
    pipe, latents, calls = _pipe(channels, dtype), _latents(channels, frames, height, width), []
    decoding = VideoDecoding(pipe, latents, Ranks(0, 1, CPU))
    decoding.work(lambda: calls.append(1))
    found = decoding.frames()
    assert found is not None
    assert torch.equal(found, _tiled(pipe, latents))
    assert found.shape[:2] == (2, 4 * (frames - 1) + 1)
    assert decoding.tiles_by_rank == [count]
    assert len(calls) == decoding.parts == count * frames


@pytest.mark.parametrize("channels", [16, 48])
def test_pixels_are_those_of_diffusers(channels: int) -> None:
    """Before they become frames, which are clamped once more."""
    vae, latents = _pipe(channels).vae, _latents(channels, 2, 7, 9)
    cut = tiles_of(vae, 7, 9)
    decoded = [torch.empty(decoded_shape(vae, tile, latents)) for tile in cut]
    for tile, out in zip(cut, decoded, strict=True):
        decode_tile(vae, tile.of(latents), out, lambda: None)
    with torch.no_grad():
        wanted = vae.tiled_decode(latents, return_dict=False)[0]
    assert (wanted.abs() == 1).any()
    assert torch.equal(blend_tiles(vae, cut, decoded), wanted)


def _rank_shares(rank: int, world: int, dtype: torch.dtype, out: str) -> None:
    ranks, told = Ranks(rank, world, CPU), []
    for number, (channels, frames, height, width, count) in enumerate(CASES):
        pipe, latents = _pipe(channels, dtype), _latents(channels, frames, height, width)
        calls = itertools.count()
        with mock.patch.object(type(pipe.vae), "tiled_decode", side_effect=AssertionError("not by one rank")):
            decoding = VideoDecoding(pipe, latents, ranks)
            decoding.work(calls.__next__)
            found = decoding.frames()
        assert (found is None) == (rank != 0)
        assert next(calls) == decoding.parts
        assert sum(decoding.tiles_by_rank) == count
        assert max(decoding.tiles_by_rank) - min(decoding.tiles_by_rank) <= 1
        assert str(decoding).startswith(f"{count} tiles; by rank ")
        told.append((decoding.parts, decoding.tiles_by_rank))
        if found is not None:
            assert torch.equal(found, _tiled(pipe, latents)), number
        assert set(pipe.vae._feat_map) == {None}
    Path(out, f"rank_{rank}").write_text(json.dumps(told))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("world", [2, 3, 4, 5])
def test_shared_tiles_make_the_video_of_one_rank(tmp_path: Path, world: int, dtype: torch.dtype) -> None:
    """With 4 and 5 ranks there are more ranks than tiles too."""
    run_ranks(world, _rank_shares, world, dtype, str(tmp_path))
    assert len({(tmp_path / f"rank_{rank}").read_text() for rank in range(world)}) == 1


def _rank_decodes_whole(rank: int, tiling: bool) -> None:
    pipe, latents, calls = _pipe(16), _latents(16, 2, 8, 8), []
    pipe.vae.use_tiling = tiling
    decoding = VideoDecoding(pipe, latents, Ranks(rank, 2, CPU))
    decoding.work(lambda: calls.append(1))
    found = decoding.frames()
    assert len(calls) == decoding.parts == 2
    assert decoding.tiles_by_rank == [0, 0]
    told = "whole, on rank 0: it is no larger than one tile of 64x64" if tiling else "whole, on rank 0"
    assert str(decoding) == told
    assert (found is None) == (rank != 0)
    if found is not None:
        pipe.vae.use_tiling = False
        assert torch.equal(found, decode(pipe, latents, lambda: None))


@pytest.mark.parametrize("tiling", [True, False])
def test_what_is_not_in_tiles_is_decoded_on_the_first_rank(tiling: bool) -> None:
    run_ranks(2, _rank_decodes_whole, tiling)


def _rank_fails(rank: int, failing: int) -> None:
    """As `generate` decodes: a rank that lacks memory for its third latent frame is heard before tiles are sent."""
    ranks, pipe, latents = Ranks(rank, 3, CPU), _pipe(16), _latents(16, 2, 13, 20)
    broken = VideoDecoding(pipe, latents, ranks)
    left = [3]

    def on_part() -> None:
        left[0] -= 1
        if rank == failing and left[0] == 0:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RefusedError, match="out of memory") as refused:
        ranks.together(lambda: broken.work(on_part))
    assert refused.value.failure == f"rank {failing}: OutOfMemoryError: out of memory"
    assert set(pipe.vae._feat_map) == {None}
    again = VideoDecoding(pipe, latents, ranks)
    ranks.together(lambda: again.work(lambda: None))
    found = again.frames()
    if found is not None:
        assert torch.equal(found, _tiled(pipe, latents))


@pytest.mark.parametrize("failing", [0, 2])
def test_a_rank_that_fails_is_heard_and_the_next_video_is_right(failing: int) -> None:
    run_ranks(3, _rank_fails, failing)


def test_shares_are_even() -> None:
    """At 720p and 480p, in latents: every tile once, and no rank has much more to do than another."""
    vae = SimpleNamespace(use_tiling=True, spatial_compression_ratio=8)
    for name, pixels in (("min", 256), ("stride", 192)):
        for side in ("height", "width"):
            setattr(vae, f"tile_sample_{name}_{side}", pixels)
    for (height, width), count in (((90, 160), 28), ((60, 104), 15)):
        whole = tiles_of(vae, height, width)
        assert len(whole) == count
        for world in (1, 2, 3, 4, 8, 16, 40):
            shares = share_tiles(whole, world)
            assert sorted((tile for share in shares for tile in share), key=lambda t: (t.row, t.column)) == list(whole)
            assert len(shares[0]) == max(map(len, shares)) <= min(map(len, shares)) + 1
            for share in shares:  # the tile that some have beyond others is a small one
                assert [tile.area for tile in share] == sorted((tile.area for tile in share), reverse=True)
            work = [sum(tile.area for tile in share) for share in shares]
            assert max(work) <= sum(work) / world + max(tile.area for tile in whole)
    assert asdict(tiles_of(vae, 90, 160)[-1]) == asdict(Tile(3, 6, 72, 144, 18, 16))


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert main(flags) == 0


@pytest.mark.parametrize(
    ("model", "mesh"),
    [
        ("tiny", ["--ulysses-degree", "2"]),
        ("tiny", ["--cfg-parallel-degree", "2"]),
        ("tiny-ti2v", ["--ring-degree", "3"]),
        ("tiny-i2v", []),
    ],
    ids=str,
)
def test_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str], model: str, mesh: list[str]) -> None:
    latents, frames = tmp_path / "latents.pt", tmp_path / "frames.pt"
    flags = ["--model", model, *mesh, *SPARSE, *TILED, "--output", str(tmp_path / "video.mp4")]
    flags += ["--output-latents", str(latents), "--output-frames", str(frames)]
    if model == "tiny-ti2v":  # sides are multiples of 32
        flags[flags.index("272")] = "320"
    world = int(mesh[1]) if mesh else 1
    run_ranks(world, _rank_generates, flags) if mesh else _rank_generates(0, flags)
    pipe: Any = (
        tiny_text_image_to_video(torch.float32, False) if model == "tiny-ti2v" else tiny_text_to_video(torch.float32)
    )
    enable_tiling(pipe.vae)
    (alone,) = decode(pipe, torch.load(latents, weights_only=True), lambda: None)
    assert torch.equal(torch.load(frames, weights_only=True), alone)
    report = json.loads((tmp_path / "video.json").read_text())
    counts = {1: [4], 2: [2, 2], 3: [2, 1, 1]}[world]
    assert report["videos"][0]["decode"] == {"tiles_by_rank": counts}
    assert report["videos"][0]["made"]["height"] == alone.shape[1]
    assert f"decode: 4 tiles; by rank {', '.join(map(str, counts))}" in capfd.readouterr().err


def _rank_fails_in_generate(rank: int, flags: list[str]) -> None:
    failing = torch.OutOfMemoryError("out of memory") if rank == 1 else None
    with mock.patch("sp_sparse.generate.decode.decode_tile", side_effect=failing):
        assert main(flags) == 2


def test_generate_ends_on_every_rank_where_one_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--ulysses-degree", "2", *SPARSE, *TILED, "--output", str(tmp_path / "video.mp4")]
    run_ranks(2, _rank_fails_in_generate, flags)
    assert "rank 1: memory ran out in decode; less is taken" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_generate_tells_that_a_video_is_one_tile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--vae-tiling", "--num-inference-steps", "1", "--num-frames", "1", "--output", str(tmp_path / "v.mp4")]
    assert main([*TINY, *SPARSE, *flags]) == 0
    assert "decode: whole, on rank 0: it is no larger than one tile of 256x256" in capsys.readouterr().err
    assert json.loads((tmp_path / "v.json").read_text())["videos"][0]["decode"] == {"tiles_by_rank": [0]}


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("AutoencoderKLWan", "blend_v", "has no blend_v;"),
        ("AutoencoderKLWan", "tiled_decode", "has no tiled_decode;"),
        (None, "unpatchify", "has no unpatchify;"),
    ],
)
def test_another_diffusers_is_refused_before_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str | None, name: str, told: str
) -> None:
    from diffusers.models.autoencoders import autoencoder_kl_wan

    monkeypatch.delattr(autoencoder_kl_wan if kind is None else getattr(diffusers, kind), name)
    with pytest.raises(ValueError, match=told):
        check_tiling()
    with mock.patch("sp_sparse.generate.job.load_pipeline", side_effect=AssertionError("too late")):
        assert main([*TINY, "--vae-tiling"]) == 2
    assert told in capsys.readouterr().err


def test_another_vae_is_refused() -> None:
    vae = _pipe(16).vae
    vae.tile_sample_stride_width = 100
    with pytest.raises(
        ValueError, match="tile_sample_stride_width of the VAE is 100, which is no multiple of the 8 pixels"
    ):
        enable_tiling(vae)
    del vae.tile_sample_stride_width
    with pytest.raises(ValueError, match="AutoencoderKLWan of this diffusers has no tile_sample_stride_width;"):
        enable_tiling(vae)
    vae = _pipe(16).vae
    del vae._feat_map
    with mock.patch.object(vae, "clear_cache"), pytest.raises(ValueError, match="has no _feat_map;"):
        enable_tiling(vae)
    with (
        mock.patch.object(vae.decoder, "forward", lambda x: x),
        pytest.raises(
            ValueError, match=r"has no decoder\(feat_cache=\), decoder\(feat_idx=\), decoder\(first_chunk=\);"
        ),
    ):
        enable_tiling(vae)


def test_a_decoder_of_other_frames_is_refused() -> None:
    vae = _pipe(16).vae
    for frames in (5, 13):
        out = torch.empty(1, 3, frames, 64, 64)
        with pytest.raises(RuntimeError, match=rf"decoded 9 frames, and its configuration says {frames};"):
            decode_tile(vae, torch.randn(1, 16, 3, 8, 8), out, lambda: None)


def _serve_with_failures(flags: list[str]) -> int:
    """As `sp_sparse.serve`; rank 0 decodes all tiles of the first video, and a prompt may say which rank fails."""
    import os

    from sp_sparse.serve import wan
    from sp_sparse.serve.__main__ import main as serve

    real, rank, prompts = wan.denoise, int(os.environ["RANK"]), []

    def denoise(pipe: Any, arguments: Any, prompt: Any, *others: Any) -> Any:
        prompts.append(prompt.text)
        return real(pipe, arguments, prompt, *others)

    class Decoding(VideoDecoding):
        def __init__(self, pipe: Any, latents: Tensor, ranks: Ranks) -> None:
            super().__init__(pipe, latents, ranks)
            if len(prompts) == 1:
                self._shared, self._shares = False, (self._tiles,)

        def work(self, on_part: Callable[[], Any]) -> None:
            left = [3]

            def fail(*_: Any) -> None:
                left[0] -= 1
                if prompts[-1] == f"rank {rank} fails" and left[0] == 0:
                    raise torch.OutOfMemoryError("out of memory")

            hook = self._pipe.vae.decoder.register_forward_pre_hook(fail)
            try:
                super().work(on_part)
            finally:
                hook.remove()

    vars(wan).update(denoise=denoise, VideoDecoding=Decoding)
    return serve(flags)


def test_the_server_shares_tiles_too(tmp_path: Path) -> None:
    flags = ["--ulysses-degree", "2", "--warmup-steps", "0", "--vae-tiling"]
    job = {"size": "288x272", "num_frames": 5, "num_inference_steps": 2, "seed": 1}
    with RankServer(tmp_path, 2, *flags, program=_serve_with_failures) as server:
        videos = [decoded_pixels(server.content(server.completed(prompt="a cat", **job)["id"]))]
        videos.append(decoded_pixels(server.content(server.completed(prompt="a cat", **job)["id"])))
        for rank in range(2):
            failed = server.ended(server.create(prompt=f"rank {rank} fails", **job)["id"])
            assert (failed["status"], failed["error"]["code"]) == ("failed", "out_of_memory")
            videos.append(decoded_pixels(server.content(server.completed(prompt="a cat", **job)["id"])))
        small = server.completed(size="64x64", num_frames=5, num_inference_steps=1)
        assert server.content(small["id"])[4:8] == b"ftyp"
        told = re.findall("decode: (.*)", server.log)
    assert videos == videos[:1] * 4
    assert told[:2] == ["4 tiles; by rank 4, 0", "4 tiles; by rank 2, 2"]
    assert told[-1] == "whole, on rank 0: it is no larger than one tile of 256x256"
