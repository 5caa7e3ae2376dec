"""The stage `text`: an encoder that tells of each word of a caption which figure it speaks of, and of what background.

From the videos alone the encoder and the transformer learn a bag of words, which is enough wherever there is one figure;
with two, nothing then says which shape goes with which color. So the encoder learns that from captions first, and then
stays as it is.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.mini.captions import caption_of, figures_told
from launch.mini.parts import make_text_encoder, make_tokenizer, tokenize
from launch.mini.scenes import CAMERAS, COLORS, DIRECTIONS, PATTERNS, SHAPES, TONES, Scene, sample_scene
from launch.mini.sizes import Sizes
from launch.mini.training import Budget, Log, Schedule, Stage, averaged
from sp_sparse.generate.ranks import Ranks

# What a word is asked for: of its figure first, then of the whole caption.
_ASKED = (list(COLORS), SHAPES, list(DIRECTIONS), list(TONES), PATTERNS, CAMERAS)
_OF_FIGURE = 3
_SKIPPED = -100  # cross_entropy's label for words that are not asked
_TESTED = 256


def train_text(
    sizes: Sizes, folder: Path, ranks: Ranks, budget: Budget, batch: int, rate: float, start: Any = None
) -> float:
    """Train the text encoder with one linear layer on top of it, `batch` captions a rank; `start`: an encoder to begin from.

    Returns the cross-entropy of a question in nats.
    """
    torch.manual_seed(0)
    device, tokenizer = ranks.device, make_tokenizer()
    encoder = make_text_encoder(sizes) if start is None else start
    heads = nn.Linear(sizes.text_width, sum(len(options) for options in _ASKED))
    modules = {"text_encoder": encoder.float().to(device), "heads": heads.to(device)}
    stage = Stage("text", modules, folder, Schedule(rate, decay=0.5), "captions", ranks)

    def loss(step: int) -> tuple[Tensor, Tensor]:
        rng = random.Random(f"text {step} {ranks.rank}")
        found = questions(tokenizer, [sample_scene(rng, held_out=False) for _ in range(batch)], rng)
        ids, mask, labels = (part.to(device) for part in found)
        states = encoder(ids, mask).last_hidden_state
        answers = heads(states).split([len(options) for options in _ASKED], -1)
        error = torch.stack(
            [
                F.cross_entropy(a.flatten(0, 1), labels[..., n].flatten(), ignore_index=_SKIPPED)
                for n, a in enumerate(answers)
            ]
        ).mean()
        return error, error

    mean = stage.run(loss, budget)
    if ranks.first:
        Log(folder, ranks).write(stage="text", held_out_told=_told(sizes, folder, device))
    return mean


def trained_text_encoder(sizes: Sizes, folder: Path, device: torch.device | str) -> tuple[Any, int]:
    """The encoder with its averaged weights, frozen, and its step."""
    weights, step = averaged(folder / "text.pt", device)
    encoder = make_text_encoder(sizes)
    encoder.load_state_dict(weights["text_encoder"])
    return encoder.to(device).eval().requires_grad_(False), step


def questions(tokenizer: Any, scenes: list[Scene], rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Captions of scenes: ids and mask [B, L], and labels [B, L, 6], int64, for what each token is asked."""
    captions = [caption_of(scene, rng) for scene in scenes]
    ids, mask = tokenize(tokenizer, captions)
    offsets = tokenizer(captions, return_offsets_mapping=True).offset_mapping
    labels = torch.full((*ids.shape, len(_ASKED)), _SKIPPED)
    for row, (scene, caption) in enumerate(zip(scenes, captions, strict=True)):
        words = int(mask[row].sum())
        about = (TONES, PATTERNS, CAMERAS)
        for number, (options, name) in enumerate(zip(about, (scene.tone, scene.pattern, scene.camera), strict=True)):
            labels[row, :words, _OF_FIGURE + number] = list(options).index(name)
        for kind, (first, last) in figures_told(caption):
            inside = [token for token, (begin, end) in enumerate(offsets[row]) if begin < last and end > first]
            named = (kind.color, kind.shape, kind.direction)
            labels[row, inside, :_OF_FIGURE] = torch.tensor(
                [list(o).index(n) for o, n in zip(_ASKED, named, strict=False)]
            )
    return ids, mask, labels


@torch.no_grad()
def _told(sizes: Sizes, folder: Path, device: torch.device) -> float:
    """Of the words about a figure in held-out captions, the share that tells color, shape and direction of it."""
    encoder, _ = trained_text_encoder(sizes, folder, device)
    heads = nn.Linear(sizes.text_width, sum(len(options) for options in _ASKED)).to(device)
    heads.load_state_dict(averaged(folder / "text.pt", device)[0]["heads"])
    rng = random.Random("held out text")
    found = questions(make_tokenizer(), [sample_scene(rng, held_out=True) for _ in range(_TESTED)], rng)
    ids, mask, labels = (part.to(device) for part in found)
    answers = heads(encoder(ids, mask).last_hidden_state).split([len(options) for options in _ASKED], -1)[:_OF_FIGURE]
    right = torch.stack([answer.argmax(-1) == labels[..., number] for number, answer in enumerate(answers)]).all(0)
    return right[labels[..., 0] != _SKIPPED].float().mean().item()
