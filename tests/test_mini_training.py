"""The training of `mini`, as small as it goes: parts as the pipeline uses them, every stage, resuming, export."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launch.mini import autoencoder, stages
from launch.mini.__main__ import main
from launch.mini.examine import _exchanged
from launch.mini.export import MOST_BYTES, assemble
from launch.mini.noise import noise_levels
from launch.mini.parts import (
    BOUNDARY,
    denormalize,
    embed,
    make_scheduler,
    make_tokenizer,
    make_transformer,
    make_vae,
    normalize,
    tokenize,
)
from launch.mini.samples import make_videos
from launch.mini.scenes import CAMERAS, COLORS, DIRECTIONS, SHAPES, sample_scene
from launch.mini.sizes import MICRO, MINI, Sizes
from launch.mini.text import questions
from launch.mini.training import Budget, Schedule, Stage, averaged
from sp_sparse.generate.arguments import GenerateArguments
from sp_sparse.generate.mini import mini_folder
from sp_sparse.generate.models import find_model
from sp_sparse.generate.ranks import Ranks
from tests.ranks import run_ranks

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
CAPTIONS = ["A red circle moves to the left over gray dots.", "a blue ring gliding up across brown waves"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run for a step or two, and `model` in it."""
    folder = tmp_path_factory.mktemp("mini")
    for stage in stages.STAGES:
        arguments = ["--stage", stage, "--folder", str(folder), "--steps", "2", "--clips", "48", "--batch", "2"]
        assert main(["train", "--size", "micro", *arguments]) == 0
    assert main(["export", "--size", "micro", "--folder", str(folder), "--model", str(folder / "model")]) == 0
    return folder


def _pipeline(folder: Path) -> Any:
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained(folder / "model")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_whole_clip_through_the_vae_is_as_chunk_by_chunk(frames: int) -> None:
    torch.manual_seed(0)
    vae = make_vae(MICRO).eval()
    video = torch.rand(2, 3, frames, 32, 32) * 2 - 1
    with torch.no_grad():
        mean, log_variance = autoencoder.encode(vae, video)
        known = vae.encode(video).latent_dist
        torch.testing.assert_close(mean, known.mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(log_variance, known.logvar, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            autoencoder.decode(vae, mean).clamp(-1, 1), vae.decode(mean).sample, rtol=1e-4, atol=1e-5
        )


def test_captions_are_embedded_as_the_pipeline_does(trained: Path) -> None:
    pipe = _pipeline(trained).to(torch.float32)
    ids, mask = tokenize(pipe.tokenizer, [*CAPTIONS, ""])
    known, empty = pipe.encode_prompt(CAPTIONS, max_sequence_length=512)
    with torch.no_grad():
        ours = embed(pipe.text_encoder, ids, mask)
    torch.testing.assert_close(ours[:2], known, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2], empty[0], rtol=1e-4, atol=1e-5)
    assert ours[2, 1:].abs().max() == 0


def test_velocity_of_the_truth_leads_the_scheduler_back_to_the_clip() -> None:
    clean, noise = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    scheduler = make_scheduler()
    scheduler.set_timesteps(16)
    latents = noise
    for step in scheduler.timesteps:
        latents = scheduler.step(noise - clean, step, latents, return_dict=False)[0]
    torch.testing.assert_close(latents, clean, rtol=1e-3, atol=1e-3)
    levels = noise_levels(4096, 0.0, 1.0, torch.Generator().manual_seed(0))
    # As much training as sampling on either side of the boundary.
    share = (scheduler.timesteps >= BOUNDARY * 1000).float().mean().item()
    assert math.isclose((levels >= BOUNDARY).float().mean().item(), share, abs_tol=1 / 16)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (BOUNDARY, 1.0), (0.0, BOUNDARY)])
def test_noise_stays_in_its_range(low: float, high: float) -> None:
    levels = noise_levels(500, low, high, torch.Generator().manual_seed(0))
    assert low <= levels.min() < low + 0.02
    assert high - 0.02 < levels.max() <= high


def test_latents_are_normalised_as_the_pipeline_undoes_it(trained: Path) -> None:
    vae = _pipeline(trained).vae
    data = stages.Latents(MICRO, trained, CPU)
    latents, ids, mask = data.batch(400, torch.Generator().manual_seed(0))
    assert latents.shape == (400, *MICRO.latent)
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=0.15)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(4), rtol=0, atol=0.15)
    torch.testing.assert_close(normalize(vae, denormalize(vae, latents)), latents, rtol=1e-4, atol=1e-4)
    # The empty caption is the end of a sequence alone.
    share = (mask.sum(1) == 1).float().mean().item()
    assert 0.05 < share < 0.17
    assert (ids[mask.sum(1) == 1][:, 0] == 1).all()


def test_the_pipeline_loads_the_folder_and_makes_its_videos(trained: Path) -> None:
    pipe = _pipeline(trained)
    videos = make_videos(pipe, MICRO, CAPTIONS, steps=3)
    assert videos.shape == (2, MICRO.frames, 3, MICRO.side, MICRO.side)
    alone = make_videos(pipe, MICRO, CAPTIONS[1:], steps=3)
    torch.testing.assert_close(videos[1], alone[0], rtol=0, atol=1e-3)
    # Float16 on disk is what was trained, to its rounding.
    before = make_videos(assemble(MICRO, trained, CPU), MICRO, CAPTIONS, steps=3)
    assert (before - videos).abs().mean() < 2e-3
    assert pipe.config.boundary_ratio == BOUNDARY
    assert (trained / "model" / "README.md").read_text().startswith("# mini")
    first = json.loads((trained / "model" / "log.jsonl").read_text().splitlines()[0])
    assert first["stage"] == "vae"
    assert "torch" in first


def test_the_experts_differ_and_the_pipeline_takes_each_in_its_range(trained: Path) -> None:
    pipe = _pipeline(trained)
    (one, two), joint = (
        [averaged(trained / f"{name}.pt")[0] for name in ("high", "low")],
        averaged(trained / "joint.pt")[0],
    )
    key = "proj_out.weight"
    assert not torch.equal(one["transformer"][key], two["transformer"][key])
    assert not torch.equal(one["transformer"][key], joint["transformer"][key])
    torch.testing.assert_close(pipe.transformer.state_dict()[key], one["transformer"][key], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(pipe.transformer_2.state_dict()[key], two["transformer"][key], rtol=1e-3, atol=1e-4)


def test_check_writes_its_verdicts(trained: Path, tmp_path: Path) -> None:
    model = ["--model", str(trained / "model"), "--out", str(tmp_path)]
    settings = ["--count", "3", "--batch", "2", "--steps", "2"]
    assert main(["check", "--size", "micro", *model, *settings]) == 0
    found = json.loads((tmp_path / "check.json").read_text())
    assert found["captions"] == len(found["verdicts"]) == 3
    assert 0 <= found["followed"] <= found["color"] <= 1
    assert (tmp_path / "check.png").stat().st_size > 0
    assert main(["check", "--size", "micro", *model, *settings, "--at-least", "1"]) == 1


def test_sample_draws_a_picture(trained: Path, tmp_path: Path) -> None:
    arguments = ["--size", "micro", "--folder", str(trained), "--count", "1", "--steps", "2"]
    assert main(["sample", *arguments, "--out", str(tmp_path / "a.png")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 0


class _Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3))


def _weight(stage: Stage) -> Tensor:
    return next(stage.modules.parameters())


def _fit(folder: Path, *steps: int, of: str = "a line") -> Stage:
    for count in steps:
        stage = Stage("line", {"line": _Line()}, folder, Schedule(0.1, warmup=3), of, ALONE)

        def loss(step: int, stage: Stage = stage) -> tuple[Tensor, Tensor]:
            target = torch.tensor([1.0, 2.0, 3.0]) + 0.1 * torch.randn(3, generator=stage.generator)
            error = (_weight(stage) - target).square().sum()
            return error, error

        stage.run(loss, Budget(0, count))
    return stage


def test_resuming_gives_the_same_state_as_going_on(tmp_path: Path) -> None:
    _fit(tmp_path / "once", 9)
    _fit(tmp_path / "twice", 4, 5)
    once, twice = (torch.load(tmp_path / name / "line.pt") for name in ("once", "twice"))
    for key in ("weights", "ema"):
        torch.testing.assert_close(once[key], twice[key], rtol=0, atol=0)
    torch.testing.assert_close(once["optimizer"]["state"], twice["optimizer"]["state"], rtol=0, atol=0)
    assert torch.equal(once["generator"], twice["generator"])
    assert once["step"] == twice["step"] == 9
    with pytest.raises(ValueError, match="was trained on a line, and this is another; move it away"):
        _fit(tmp_path / "once", 1, of="another")


def _fit_together(rank: int, folder: Path) -> None:
    ranks = Ranks(rank, 2, CPU)
    line = _Line()
    stage = Stage("line", {"line": line}, folder, Schedule(0.1, warmup=3), "a line", ranks)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        error = (_weight(stage) - torch.tensor([1.0, 2.0, 3.0]) * (rank + 1)).square().sum()
        return error, error

    stage.run(loss, Budget(0, 5))
    draws = ranks.gather(torch.rand(3, generator=stage.generator).tolist())
    assert len(set(map(tuple, draws))) == 2, draws
    torch.save(line.weight.detach(), folder / f"rank{rank}.pt")


def test_ranks_train_the_same_weights_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    run_ranks(2, _fit_together, tmp_path)
    # The mean of both gradients is that of a target in the middle.
    alone = Stage("one", {"line": _Line()}, tmp_path / "alone", Schedule(0.1, warmup=3), "a line", ALONE)
    middle = torch.tensor([1.0, 2.0, 3.0]) * 1.5

    def loss(step: int) -> tuple[Tensor, Tensor]:
        error = (_weight(alone) - middle).square().sum()
        return error, error

    alone.run(loss, Budget(0, 5))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"rank{rank}.pt"), _weight(alone).detach())
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 5], "one rank writes the log"
    assert lines[0]["ranks"] == 2


def _encode_together(rank: int, trained: Path, folder: Path) -> None:
    if rank == 0:
        (folder / "vae.pt").symlink_to(trained / "vae.pt")
    ranks = Ranks(rank, 2, CPU)
    dist.barrier()
    stages.make_latents(MICRO, folder, ranks, Budget(0, 2), clips=128)


def test_ranks_encode_the_same_clips_as_one(trained: Path, tmp_path: Path) -> None:
    for name, world in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        if world == 1:
            (tmp_path / name / "vae.pt").symlink_to(trained / "vae.pt")
            stages.make_latents(MICRO, tmp_path / name, ALONE, Budget(0, 4), clips=128)
        else:
            run_ranks(world, _encode_together, trained, tmp_path / name)
    one, two = (torch.load(tmp_path / name / "latents.pt") for name in ("one", "two"))
    assert torch.equal(one["ids"], two["ids"])
    torch.testing.assert_close(one["latents"], two["latents"])
    assert one["mean"].tolist() == pytest.approx(two["mean"].tolist())


def test_resuming_a_transformer_gives_the_same_weights(trained: Path, tmp_path: Path) -> None:
    for parts, steps in (("once", (3,)), ("twice", (1, 2))):
        folder = tmp_path / parts
        folder.mkdir()
        for name in ("vae.pt", "latents.pt", "text.pt"):
            (folder / name).symlink_to(trained / name)
        for count in steps:
            stages.train_transformer("joint", MICRO, folder, ALONE, Budget(0, count), batch=2, rate=1e-3)
    once, twice = (averaged(tmp_path / name / "joint.pt")[0] for name in ("once", "twice"))
    torch.testing.assert_close(once, twice, rtol=0, atol=1e-7)


def test_blocks_that_do_not_compile_run_as_they_are(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*anything: Any) -> None:
        raise RuntimeError("no compiler here")

    transformer = make_transformer(MICRO)
    monkeypatch.setattr(transformer, "compile_repeated_blocks", refuse)
    stage = Stage("joint", {"transformer": transformer}, tmp_path, Schedule(0.1), "nothing", ALONE)
    before = stage.generator.get_state()
    stages._compile(transformer, lambda: torch.zeros(()), stage)
    assert "blocks are not compiled (RuntimeError: no compiler here)" in capsys.readouterr().out
    assert torch.equal(stage.generator.get_state(), before)
    inputs = torch.zeros(1, *MICRO.latent), torch.tensor([500]), torch.zeros(1, 8, MICRO.text_width)
    assert transformer(*inputs, return_dict=False)[0].isfinite().all()


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_kept(tmp_path: Path) -> None:
    _fit(tmp_path, 2)
    stage = Stage("line", {"line": _Line()}, tmp_path, Schedule(0.1), "a line", ALONE)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        return _weight(stage).sum() * math.nan, torch.tensor(math.nan)

    with pytest.raises(FloatingPointError, match=r"line: the loss is nan at step 3; run again"):
        stage.run(loss, Budget(0, 1))
    assert torch.load(tmp_path / "line.pt")["step"] == 2


def test_a_few_steps_lower_the_losses(trained: Path, tmp_path: Path) -> None:
    small = Sizes(side=16, frames=5, latent_channels=4, encoder_width=8, decoder_width=8)
    first = stages.train_vae(small, tmp_path, ALONE, Budget(0, 3), batch=2, rate=1e-6)
    (tmp_path / "vae.pt").unlink()
    assert stages.train_vae(small, tmp_path, ALONE, Budget(0, 50), batch=2, rate=3e-3) < 0.8 * first
    for name in ("vae.pt", "latents.pt", "text.pt"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(trained / name)
    start = stages.train_transformer("joint", MICRO, tmp_path, ALONE, Budget(0, 3), batch=4, rate=1e-6)
    (tmp_path / "joint.pt").unlink()
    later = stages.train_transformer("joint", MICRO, tmp_path, ALONE, Budget(0, 60), batch=4, rate=3e-3)
    assert later < 0.8 * start


def test_training_goes_on_from_an_exported_model(trained: Path, tmp_path: Path) -> None:
    start = ["--size", "micro", "--folder", str(tmp_path), "--exported", str(trained / "model"), "--steps", "0"]
    assert main(["train", *start, "--stage", "vae"]) == 0
    weights = averaged(tmp_path / "vae.pt")[0]["vae"]
    known = averaged(trained / "vae.pt")[0]["vae"]
    torch.testing.assert_close(weights, known, rtol=1e-3, atol=1e-3)
    assert main(["train", *start[:-2], "--steps", "4", "--clips", "32", "--stage", "latents"]) == 0
    for stage, module, part in (
        ("text", "text_encoder", "text_encoder"),
        ("joint", "transformer", "transformer"),
        ("low", "transformer", "transformer_2"),
    ):
        assert main(["train", *start, "--stage", stage]) == 0
        weights = averaged(tmp_path / f"{stage}.pt")[0][module]
        known = getattr(_pipeline(trained), part).float().state_dict()
        torch.testing.assert_close(weights, dict(known), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_another_kind_of_device_goes_on(tmp_path: Path) -> None:
    _fit(tmp_path, 2)
    found = torch.load(tmp_path / "line.pt")
    torch.save({**found, "generator": torch.zeros(16, dtype=torch.uint8)}, tmp_path / "line.pt")  # as CUDA's
    assert _fit(tmp_path, 1).step == 3


def test_words_are_asked_for_their_own_figure() -> None:
    tokenizer, scenes = make_tokenizer(), [sample_scene(random.Random(row), held_out=False) for row in range(40)]
    ids, mask, labels = questions(tokenizer, scenes, random.Random(0))
    assert labels.shape == (*ids.shape, 6)
    assert (labels[mask == 0] == -100).all()
    for scene, words, answers in zip(scenes, ids, labels, strict=True):
        asked = {tuple(answer) for answer in answers[:, :3].tolist() if answer[0] != -100}
        known = {
            (list(COLORS).index(f.color), SHAPES.index(f.shape), list(DIRECTIONS).index(f.direction))
            for f in scene.figures
        }
        assert asked == known
        shapes = {word: SHAPES.index(word) for word in SHAPES}
        for token, answer in zip(tokenizer.convert_ids_to_tokens(words.tolist()), answers[:, 1].tolist(), strict=True):
            if (name := token.strip("▁ ").lower()) in shapes:
                assert answer == shapes[name]
        assert set(answers[:, 5].tolist()) <= {-100, CAMERAS.index(scene.camera)}


def test_exchanged_words_are_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exchange", "--size", "micro", "--folder", str(trained), "--count", "2"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[-6:]
    assert all(line.startswith("level=") and " shape=" in line and " direction=" in line for line in lines), lines
    scene = next(
        s for s in (sample_scene(random.Random(row), held_out=True) for row in range(99)) if len(s.figures) == 2
    )
    one, other = scene.figures
    swapped = _exchanged(scene, "shape").figures
    assert (swapped[0].shape, swapped[1].shape) == (other.shape, one.shape)
    assert (swapped[0].color, swapped[1].direction) == (one.color, other.direction)


def test_stages_out_of_order_are_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--size", "micro", "--folder", str(tmp_path), "--steps", "1"]
    assert main(["train", *arguments, "--stage", "latents"]) == 2
    assert "vae.pt is not there; run --stage vae first" in capsys.readouterr().err
    assert main(["train", *arguments, "--stage", "joint"]) == 2
    assert "run --stage latents first" in capsys.readouterr().err
    found = torch.load(trained / "vae.pt")
    torch.save({**found, "step": 99}, tmp_path / "vae.pt")
    (tmp_path / "latents.pt").symlink_to(trained / "latents.pt")
    assert main(["train", *arguments, "--stage", "joint"]) == 2
    assert "is of the VAE at step 2, and vae.pt is at 99; run --stage latents again" in capsys.readouterr().err


def test_the_model_fits_the_repository_and_the_pipeline() -> None:
    from launch.mini import parts

    made = [make(MINI) for make in (parts.make_vae, parts.make_text_encoder, parts.make_transformer)]
    count = [sum(parameter.numel() for parameter in part.parameters()) for part in made]
    assert 2 * (count[0] + count[1] + 2 * count[2]) < MOST_BYTES - 500_000
    assert MINI.tokens == 3328
    assert MINI.head_dim == 64
    with pytest.raises(ValueError, match="side 120 and frames 49"):
        Sizes(side=120)


def test_mini_is_found_where_its_weights_are(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError,
        match=r"mini \(the default\) has no weights in .*; run from a checkout .*give another --model: .*or tiny ",
    ):
        mini_folder(tmp_path)
    assert mini_folder(trained / "model") == trained / "model"
    monkeypatch.setattr("sp_sparse.generate.models.mini_folder", lambda: trained / "model")
    model = find_model(GenerateArguments(model="mini"), CPU)
    assert (model.experts, model.spatial_multiple, model.temporal_multiple) == (2, 16, 4)
    assert (model.defaults.height, model.defaults.num_frames) == (MINI.side, MINI.frames)
    assert not model.takes_image
