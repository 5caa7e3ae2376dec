"""True attention mass of pairs of blocks: a selector that no other can beat in mass, and the measure of what a mask covers.

Every sum here is one of integers that a double holds exactly, so its order does not matter: queries and keys enter as
fixed point relative to the largest value of each token, exponentials as multiples of 2^-34 of the row's largest, a row's
shares as multiples of 2^-40. The one step that is not exact is the exponential, which sees one number at a time. So the
masses are the same bits on every mesh of one kind of device; a CPU and a GPU may differ in the last place of `exp`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sp_sparse.config import SparseAttentionConfig
from sp_sparse.mask import BlockMask, num_blocks
from sp_sparse.selection.base import SelectionRequest
from sp_sparse.selection.topk import select_topk

# Bits of a token's values. A product has twice as many, and 256 of them sum to less than 2^53.
_TOKEN_BITS = 22
# Of exponentials (2^18 of which a row may have) and of shares (256 rows a block).
_EXP_BITS, _SHARE_BITS = 34, 40
_LEAST_EXPONENT = -100

# Scores held at a time, 64 MB of float64.
_BUDGET = 1 << 23


class BlockMassSelector:
    """Keeps the blocks with the largest softmax mass, averaged over the rows of the query block: what the scores of other
    selectors estimate. A bound for measuring, far slower than dense attention: a block's summary is its tokens.

    The softmax has the scale `D ** -0.5`, as the attention layers have it by default.
    """

    def __init__(self, config: SparseAttentionConfig) -> None:
        self._block_size = config.block_size

    def summarize_queries(self, query: Tensor) -> Tensor:
        return block_tokens(query, self._block_size[0])

    def summarize_keys(self, key: Tensor) -> Tensor:
        return block_tokens(key, self._block_size[1])

    def select(self, queries: Tensor | None, keys: Tensor | None, request: SelectionRequest) -> BlockMask:
        assert queries is not None, "made by summarize_queries"
        assert keys is not None, "made by summarize_keys"
        mass = block_mass(queries, keys, request.query_length, request.key_length)
        return select_topk(
            mass.float(),
            request.static,
            request.density,
            self._block_size,
            request.query_length,
            request.key_length,
        )


def block_tokens(x: Tensor, block_size: int) -> Tensor:
    """The tokens of every block and head, `[B, S, H, D]` -> `[B, H, N, block_size, D]`; a short last block ends in 0."""
    batch, length, heads, head_dim = x.shape
    blocks = num_blocks(length, block_size)
    tokens = x.new_zeros(batch, heads, blocks * block_size, head_dim)
    tokens[:, :, :length] = x.transpose(1, 2)
    return tokens.unflatten(2, (blocks, block_size))


def block_mass(queries: Tensor, keys: Tensor, query_length: int, key_length: int) -> Tensor:
    """The share of its attention that a query block gives each key block, the mean over its rows: float64 `[B, H, Nq, Nk]`.

    Args:
        queries, keys: `[B, H, N, block, D]` as `block_tokens` makes them, D up to 256; keys of the whole sequence.
        query_length, key_length: tokens; what lies behind them in the last block counts as nothing.

    Raises:
        ValueError: a head or a sequence so large that the sums would not be exact.
    """
    batch, heads, num_queries, query_block, head_dim = queries.shape
    num_keys, key_block = keys.shape[2:4]
    if head_dim > 256 or key_length > 1 << 18 or query_block > 256:
        raise ValueError(
            f"block mass of {key_length} tokens, head dimension {head_dim} and query blocks of {query_block} would not be "
            f"exact; it takes at most {1 << 18} tokens, 256 and 256: use another selector"
        )
    mass = torch.empty(batch, heads, num_queries, num_keys, dtype=torch.float64, device=queries.device)
    step = max(1, _BUDGET // max(1, query_block * num_keys * key_block))
    for entry in range(batch):
        for head in range(heads):
            key, key_scale = _fixed_point(keys[entry, head].flatten(0, 1))
            for first in range(0, num_queries, step):
                rows = queries[entry, head, first : first + step]
                start = first * query_block
                own = min(query_length - start, rows.shape[0] * query_block)
                query, query_scale = _fixed_point(rows.flatten(0, 1)[:own])
                scores = query @ key.T  # exact, whatever the order
                scores *= query_scale * head_dim**-0.5
                scores *= key_scale.T
                shares = _row_shares(scores, key_length, key_block)
                mass[entry, head, first : first + step] = _mean_of_blocks(shares, query_block)
    return mass


def covered_mass(mass: Tensor, mask: BlockMask) -> Tensor:
    """The share of its attention that each query block keeps under a mask: float64 `[B, H, Nq]`."""
    return torch.where(mask.to_dense(), mass, 0.0).sum(-1)


def _fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens `[n, D]` as integers and the power of two `[n, 1]` to multiply them with, both float64."""
    x = x.double()
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp_(min=_LEAST_EXPONENT) - _TOKEN_BITS
    return (x * _power_of_two(-exponent)).round_(), _power_of_two(exponent)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2 to an integer power in float64, exact: the bits are written, as `pow` may be off by a rounding."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _row_shares(scores: Tensor, key_length: int, key_block: int) -> Tensor:
    """The softmax of each row summed over key blocks, `[n, Nk * key_block]` -> `[n, Nk]`, as multiples of 2^-40."""
    scores[:, key_length:] = -math.inf
    scores -= scores.amax(-1, keepdim=True)
    parts = scores.exp_().mul_(2.0**_EXP_BITS).round_().unflatten(1, (-1, key_block)).sum(-1)
    return (parts / parts.sum(-1, keepdim=True) * 2.0**_SHARE_BITS).round_() * 2.0**-_SHARE_BITS


def _mean_of_blocks(shares: Tensor, query_block: int) -> Tensor:
    """`[rows, Nk]` -> `[Nq, Nk]`; the last block may be short."""
    full = shares.shape[0] // query_block
    means = shares[: full * query_block].unflatten(0, (full, query_block)).sum(1) / query_block if full else shares[:0]
    rest = shares[full * query_block :]
    return means if not len(rest) else torch.cat((means, rest.sum(0, keepdim=True) / len(rest)))
