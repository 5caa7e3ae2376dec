"""Selectors that were compared with `topk` and `subblock`, for measuring on a trained model; see docs/selectors.md.

Give one as `--sparse-attn-selector launch.prototypes.selectors:TrueMass`, from the root of a checkout. They are plain
float32 and send whole blocks over a ring, so a near-tie may fall differently from mesh to mesh; compare them on one mesh.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import BlockMask
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.topk import blocks_kept, select_topk

# A variance raises an exponent by this much at most: the second-order term says little where it is large.
_MOST_RAISED = 2.0


@dataclass(frozen=True, eq=False)
class Blocks:
    """Blocks of tokens, cut into parts.

    Attributes:
        tokens: fp32 `[B, H, N, P, tokens, D]`, 0 past the end of the sequence.
        inside: bool `[N, P, tokens]`, which are tokens.
    """

    tokens: Tensor
    inside: Tensor

    @classmethod
    def of(cls, blocks: Tensor, length: int, parts: int) -> Blocks:
        """`[B, H, N, block, D]` of `length` tokens in all, as `parts` parts a block."""
        numbers = torch.arange(blocks.shape[2] * blocks.shape[3], device=blocks.device)
        size = blocks.shape[3] // parts
        return cls(blocks.unflatten(3, (parts, size)), (numbers < length).view(-1, parts, size))

    @property
    def sizes(self) -> Tensor:
        """Tokens of each part, `[N, P]`."""
        return self.inside.sum(-1).float()

    def means(self) -> Tensor:
        """`[B, H, N, P, D]`."""
        return self.tokens.sum(4) / self.sizes.clamp(min=1)[..., None]

    def variances(self) -> Tensor:
        """Of each channel within each part, `[B, H, N, P, D]`."""
        apart = (self.tokens - self.means().unsqueeze(4)) * self.inside[..., None]
        return apart.square().sum(4) / self.sizes.clamp(min=1)[..., None]


class Prototype(ABC):
    """Keeps the highest `scores`. Whole blocks are its summaries, so that a score may be made of anything in them."""

    parts = 1

    def __init__(self, config: SparseAttentionConfig) -> None:
        if any(side % self.parts for side in config.block_size):
            raise ValueError(
                f"{type(self).__name__} cuts blocks into {self.parts} parts, but block_size is {config.block_size}; use "
                f"multiples of {self.parts}"
            )
        self._block_size = config.block_size

    def summarize_queries(self, query: Tensor) -> Tensor:
        return _whole_blocks(query, self._block_size[0])

    def summarize_keys(self, key: Tensor) -> Tensor:
        return _whole_blocks(key, self._block_size[1])

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        assert queries is not None, "made by summarize_queries"
        assert keys is not None, "made by summarize_keys"
        query_blocks = Blocks.of(queries, request.query_length, self.parts)
        return self.keep(self.scores(query_blocks, Blocks.of(keys, request.key_length, self.parts)), request)

    @abstractmethod
    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        """fp32 `[B, H, Nq, Nk]` without NaN."""

    def keep(self, scores: Tensor, request: SelectionRequest) -> BlockMask:
        """The mask of the highest scores."""
        lengths = request.query_length, request.key_length
        return select_topk(scores, request.static, request.density, self._block_size, *lengths)


class TrueMass(Prototype):
    """The share of attention that a block really gets, at attention's own cost: the bound of what choosing can bring."""

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        every = keys.tokens.flatten(2, 4).transpose(-1, -2) * _scale(keys)
        outside = ~keys.inside.flatten()
        rows = []
        # A query block at a time: the whole map would not fit.
        for block in range(queries.tokens.shape[2]):
            tokens = queries.tokens[:, :, block].flatten(2, 3)[:, :, queries.inside[block].flatten()]
            shares = (tokens @ every).masked_fill_(outside, -math.inf).softmax(-1)
            rows.append(shares.unflatten(3, (keys.tokens.shape[2], -1)).sum(-1).mean(2))
        return torch.stack(rows, 2) if rows else every.new_empty(*every.shape[:2], 0, keys.tokens.shape[2])


class Maximum(Prototype):
    """The largest product of two quarters' means."""

    parts = 4

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        exponents = _exponents(queries, keys)
        exponents = exponents.masked_fill((queries.sizes == 0)[:, :, None, None], -math.inf)
        return exponents.masked_fill(keys.sizes == 0, -math.inf).amax((3, 5))


class Shares(Prototype):
    """The score of `subblock` from this many parts of a block."""

    parts = 4

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        return _shares((self.exponents(queries, keys) + keys.sizes.log()).logsumexp(5), queries)

    def exponents(self, queries: Blocks, keys: Blocks) -> Tensor:
        """Of each pair of parts, `[B, H, Nq, P, Nk, P]`."""
        return _exponents(queries, keys)


class EighthShares(Shares):
    """The score of `subblock` from eighths: four times the work and twice the traffic."""

    parts = 8


class MaximumShares(Prototype):
    """`subblock` with the largest of the four key parts in place of their sum."""

    parts = 4

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        return _shares(_exponents(queries, keys).masked_fill(keys.sizes == 0, -math.inf).amax(5), queries)


class VarianceShares(Shares):
    """`subblock` with the spread of keys within a part: half the variance of their products with the mean query."""

    def exponents(self, queries: Blocks, keys: Blocks) -> Tensor:
        return _exponents(queries, keys) + _raised(queries, keys)


class VarianceMeans(Prototype):
    """`topk` with the spread of keys within a block, likewise."""

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        return (_exponents(queries, keys) + _raised(queries, keys))[:, :, :, 0, :, 0]


class MeanAndLargest(Prototype):
    """Two summaries of a key block: its mean, and its token of the largest norm."""

    def scores(self, queries: Blocks, keys: Blocks) -> Tensor:
        tokens = keys.tokens[:, :, :, 0]
        number = tokens.square().sum(-1, keepdim=True).argmax(3, keepdim=True)
        largest = tokens.gather(3, number.expand(*number.shape[:4], tokens.shape[4]))[:, :, :, 0]
        mean = _exponents(queries, keys)[:, :, :, 0, :, 0] + (keys.sizes[:, 0] - 1).clamp(min=1e-3).log()
        return torch.logaddexp(mean, queries.means()[:, :, :, 0] @ largest.transpose(-1, -2) * _scale(keys))


class HeadBudgets(Shares):
    """`subblock` whose heads share a budget: half of it is every head's own, the rest goes where the scores are highest.

    It is shared by the heads that a rank attends at a time, so masks depend on the Ulysses degree.
    """

    def keep(self, scores: Tensor, request: SelectionRequest) -> BlockMask:
        scores = scores - scores.logsumexp(-1, keepdim=True)
        heads, columns = scores.shape[1], scores.shape[3]
        keep = blocks_kept(request.density, columns)
        own = select_topk(scores, request.static, keep / 2 / columns, self._block_size, *_lengths(request)).to_dense()
        total = request.static.counts.clamp(min=keep) * heads
        pooled = scores.masked_fill(own, math.inf).transpose(1, 2).flatten(2)
        order = pooled.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        dense = (order < total[:, None]).unflatten(2, (heads, columns)).transpose(1, 2)
        return BlockMask.from_dense(dense, self._block_size, *_lengths(request))


def _lengths(request: SelectionRequest) -> tuple[int, int]:
    return request.query_length, request.key_length


def _whole_blocks(x: Tensor, size: int) -> Tensor:
    """`[B, S, H, D]` -> fp32 `[B, H, N, size, D]`, 0 past the end."""
    padded = F.pad(x.float(), (0, 0, 0, 0, 0, -x.shape[1] % size))
    return padded.transpose(1, 2).unflatten(2, (padded.shape[1] // size, size))


def _scale(blocks: Blocks) -> float:
    return float(blocks.tokens.shape[-1] ** -0.5)


def _exponents(queries: Blocks, keys: Blocks) -> Tensor:
    """Scaled products of the means of parts: `[B, H, Nq, P, Nk, P]`."""
    return torch.einsum("bhiad,bhjcd->bhiajc", queries.means(), keys.means()) * _scale(keys)


def _raised(queries: Blocks, keys: Blocks) -> Tensor:
    """What the spread of a part's keys adds to the logarithm of its mass, to second order, capped."""
    square = queries.means().square()
    return (torch.einsum("bhiad,bhjcd->bhiajc", square, keys.variances()) * (_scale(keys) ** 2 / 2)).clamp(
        max=_MOST_RAISED
    )


def _shares(masses: Tensor, queries: Blocks) -> Tensor:
    """log of the share of attention: `[B, H, Nq, P, Nk]`, log of the mass that a query part gives, -> `[B, H, Nq, Nk]`."""
    return (masses.log_softmax(-1) + queries.sizes.log()[..., None]).logsumexp(3)
