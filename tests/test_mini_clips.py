"""Clips, captions and the check of `mini`: what is drawn is what is told, and what is recognised."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from launch.mini.__main__ import main
from launch.mini.captions import caption_of, kinds_told, vocabulary
from launch.mini.check import judge, recognise
from launch.mini.clips import render
from launch.mini.parts import make_tokenizer, tokenize
from launch.mini.samples import held_out_scenes
from launch.mini.scenes import COLORS, DIRECTIONS, SHAPES, Figure, Scene, is_held_out, sample_scene
from launch.mini.stages import training_scene
from sp_sparse.fidelity.metrics import load_caption_check

FRAMES, SIDE = 13, 64


def _scenes(count: int, figures: int = 1) -> list[Scene]:
    rng = random.Random(5)
    found: list[Scene] = []
    while len(found) < count:
        scene = sample_scene(rng, held_out=len(found) % 2 == 0)
        if len(scene.figures) == figures:
            found.append(scene)
    return found


def _videos(scenes: list[Scene]) -> Tensor:
    """[B, T, 3, H, W] in 0 to 1."""
    return (render(scenes, FRAMES, SIDE).transpose(1, 2) + 1) / 2


def _followed(videos: Tensor, scenes: list[Scene]) -> float:
    return sum(judge(video, scene.figures).followed for video, scene in zip(videos, scenes, strict=True)) / len(scenes)


def test_the_same_scene_gives_the_same_clip_alone_or_among_others() -> None:
    scenes = _scenes(2) + _scenes(1, figures=2)
    together = render(scenes, FRAMES, SIDE)
    assert together.shape == (3, 3, FRAMES, SIDE, SIDE)
    assert together.dtype == torch.float32
    assert together.min() >= -1
    assert together.max() <= 1
    for row, scene in enumerate(scenes):
        torch.testing.assert_close(render([scene], FRAMES, SIDE)[0], together[row], rtol=0, atol=1e-6)
    torch.testing.assert_close(render(scenes, FRAMES, SIDE, window=slice(4, 9)), together[:, :, 4:9], rtol=0, atol=1e-6)


def test_a_scene_follows_from_its_seed() -> None:
    assert training_scene("clip 3") == training_scene("clip 3")
    assert training_scene("clip 3") != training_scene("clip 4")


def test_figures_stay_in_the_frame() -> None:
    for scene in _scenes(60) + _scenes(20, figures=2):
        for figure in scene.figures:
            for at in (*figure.start, *figure.end):
                assert 1.25 * figure.radius < at < 1 - 1.25 * figure.radius
            moved = [b - a for a, b in zip(figure.start, figure.end, strict=True)]
            assert [(m > 1e-9) - (m < -1e-9) for m in moved] == list(DIRECTIONS[figure.direction])


def test_no_training_clip_shows_what_is_held_out() -> None:
    held_out = {figure_kind(figure) for scene, _ in held_out_scenes(200) for figure in scene.figures}
    trained = {figure_kind(figure) for n in range(3000) for figure in training_scene(f"clip {n}").figures}
    assert not held_out & trained
    everything = {(c, s, d) for c in COLORS for s in SHAPES for d in DIRECTIONS}
    assert trained == {kind for kind in everything if not is_held_out(*kind)}
    assert 20 <= len(everything - trained) <= 80
    # What is held out is a combination: each color, shape and direction of it was seen in others.
    for place in range(3):
        assert {kind[place] for kind in held_out} <= {kind[place] for kind in trained}


def figure_kind(figure: Figure) -> tuple[str, str, str]:
    return figure.color, figure.shape, figure.direction


def test_a_caption_tells_every_attribute_in_known_words() -> None:
    tokenizer = make_tokenizer()
    unknown = tokenizer.unk_token_id
    captions = []
    for number, scene in enumerate(_scenes(60) + _scenes(60, figures=2)):
        caption = caption_of(scene, random.Random(number))
        captions.append(caption)
        words = caption.replace(",", "").replace(".", "").split()
        assert set(words) <= set(vocabulary())
        for figure in scene.figures:
            assert f"{figure.color} {figure.shape}" in caption
        assert f"{scene.tone} {scene.pattern}" in caption
    ids, mask = tokenize(tokenizer, captions)
    assert not (ids == unknown).any()
    assert [int(n) for n in mask.sum(1)] == [len(c.replace(",", " ,").replace(".", " .").split()) + 1 for c in captions]
    assert len(set(captions)) == len(captions)


def test_other_words_are_spelled_and_a_long_caption_is_refused() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.unk_token_id not in tokenizer("a zebra, 3 times").input_ids
    with pytest.raises(ValueError, match="50 tokens, and training encodes 48"):
        tokenize(tokenizer, ["red " * 49])


def test_the_check_recognises_clips() -> None:
    scenes = _scenes(48)
    videos = _videos(scenes)
    assert _followed(videos, scenes) >= 0.97
    generator = torch.Generator().manual_seed(0)
    noisy = (videos + 0.1 * torch.randn(videos.shape, generator=generator)).clamp(0, 1)
    assert _followed(noisy, scenes) >= 0.9
    small = F.interpolate(videos.flatten(0, 1), size=SIDE // 2, mode="area")
    blurred = F.interpolate(small, size=SIDE, mode="bilinear").view_as(videos)
    assert _followed(blurred, scenes) >= 0.9


def test_the_check_recognises_two_figures() -> None:
    scenes = _scenes(24, figures=2)
    assert _followed(_videos(scenes), scenes) >= 0.75


def test_the_check_refuses_wrong_captions() -> None:
    scenes = _scenes(24)
    videos = _videos(scenes)
    for video, scene in zip(videos, scenes, strict=True):
        (figure,) = scene.figures
        (seen,) = recognise(video, 1)
        changes: tuple[dict[str, Any], ...] = (
            {"color": next(c for c in COLORS if c != figure.color)},
            {"shape": next(s for s in SHAPES if s != seen.shape)},
            {"direction": next(d for d in DIRECTIONS if d != seen.direction)},
        )
        for change in changes:
            wrong = replace(scene, figures=(replace(figure, **change),))
            assert not judge(video, wrong.figures).followed, change
    others = scenes[1:] + scenes[:1]
    assert _followed(videos, others) <= 0.1


def test_the_check_sees_nothing_in_noise_and_no_direction_in_a_still() -> None:
    noise = torch.rand(FRAMES, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    assert all(seen.shape is None or seen.direction is None for seen in recognise(noise * 0.5, 2))
    scene = _scenes(1)[0]
    still = _videos([scene])[0, :1].expand(FRAMES, -1, -1, -1)
    verdict = judge(still, scene.figures)
    assert verdict.color
    assert verdict.shape
    assert not verdict.direction


def test_a_caption_tells_its_figures() -> None:
    for number in range(300):
        rng = random.Random(number)
        scene = sample_scene(rng, held_out=bool(number % 2))
        told = [(kind.color, kind.shape, kind.direction) for kind in kinds_told(caption_of(scene, rng))]
        assert told == [(figure.color, figure.shape, figure.direction) for figure in scene.figures]
    with pytest.raises(ValueError, match="'a cat' tells of no figure as mini's captions do"):
        kinds_told("a cat")


def test_the_caption_check_of_fidelity() -> None:
    check = load_caption_check("launch.mini.check:follows_caption")
    scenes = _scenes(4)
    for video, scene, other in zip(_videos(scenes), scenes, scenes[1:] + scenes[:1], strict=True):
        frames = video.permute(0, 2, 3, 1)
        assert check(frames, caption_of(scene, random.Random(0))) == 1.0
        assert check(frames, caption_of(other, random.Random(0))) == 0.0


def test_captions_are_printed_for_a_prompt_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["captions", "--count", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [caption for _, caption in held_out_scenes(3)]
