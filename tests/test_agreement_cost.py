"""What agreeing costs, in collectives and waits: counted, for a clock would tell nothing here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("diffusers")

from sp_sparse import SequenceParallelMesh, SparseAttentionConfig
from sp_sparse.integrations.diffusers import enable_sparse_attention
from sp_sparse.integrations.diffusers.agree import ForwardAgreement
from sp_sparse.integrations.diffusers.family import input_names
from sp_sparse.integrations.diffusers.position import SchedulerSteps
from sp_sparse.parallel.agreement import meet_on_host
from sp_sparse.parallel.collectives import all_from_first
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.tiny_wan import inputs, run, tiny_pipeline, tiny_transformer

CONFIG = SparseAttentionConfig(backend="reference", topk=0.4, schedule="constant", block_size=(16, 16))
# The layers use none of them.
COUNTED = ("all_reduce", "broadcast", "all_gather", "all_gather_object")


class _Count:
    """How often each collective is called within the context."""

    def __enter__(self) -> Counter[str]:
        self.found: Counter[str] = Counter()
        self._patches = [mock.patch.object(dist, name, self._counting(name)) for name in COUNTED]
        for patch in self._patches:
            patch.start()
        return self.found

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _counting(self, name: str) -> Any:
        own = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return own(*args, **kwargs)

        return counted


# Ulysses, ring and CFG degrees -> all-reduces of numbers and broadcasts of tensors in a step with guidance.
STEPS = {
    # Both forwards begin and end; latents and timestep in one broadcast, for both branches; the scheduler's sample.
    (2, 1, 1): {"all_reduce": 4, "broadcast": 2},
    (1, 2, 1): {"all_reduce": 4, "broadcast": 2},
    # Each over two groups.
    (2, 2, 1): {"all_reduce": 8, "broadcast": 4},
    # Both ends of the step and the first branch's forward; the two branches are exchanged, too.
    (1, 1, 2): {"all_reduce": 3, "broadcast": 4},
}


def _check_steps(rank: int, family: str, degrees: tuple[int, int, int], expected: dict[str, int]) -> None:
    pipe = tiny_pipeline(family)
    enable_sparse_attention(pipe, CONFIG, SequenceParallelMesh(*degrees))
    run(pipe)  # the ranks agree on their kernels
    counts = []
    for steps in (4, 8):
        with _Count() as count:
            run(pipe, num_inference_steps=steps)
        counts.append(count)
    each = {name: (counts[1][name] - counts[0][name]) / 4 for name in COUNTED}
    assert {name: number for name, number in each.items() if number} == expected
    # Texts once in a loop, for each expert and branch.
    texts = counts[0]["broadcast"] - 4 * expected["broadcast"]
    assert texts == {(2, 2, 1): 8, (1, 1, 2): 2}.get(degrees, 4)


@pytest.mark.parametrize("degrees", STEPS)
def test_collectives_of_a_step(degrees: tuple[int, int, int]) -> None:
    run_ranks(degrees[0] * degrees[1] * degrees[2], _check_steps, "t2v", degrees, STEPS[degrees])


def test_collectives_of_a_step_of_image_to_video() -> None:
    run_ranks(2, _check_steps, "i2v", (2, 1, 1), STEPS[2, 1, 1])


def _check_new_on_one_rank(rank: int) -> None:
    """Nothing is broadcast here, so that a rank that would stay behind is seen rather than waited for."""
    model = tiny_transformer()
    agree = ForwardAgreement(SequenceParallelMesh(2), input_names(model), keeps_latents=False)
    given = inputs(model)
    sent: list[int] = []

    def counting(tensors: Sequence[Tensor], groups: object) -> list[Tensor]:
        sent.append(len(tensors))
        return [x.clone() for x in tensors]

    with mock.patch("sp_sparse.integrations.diffusers.agree.all_from_first", counting):
        agree({}, None, (), given)
        agree({}, None, (), given)
        if rank == 1:
            given["encoder_hidden_states"] = given["encoder_hidden_states"].clone()
        agree({}, None, (), given)
    # Latents and timestep, then texts.
    assert sent == [2, 1, 0, 0, 0, 1]


def test_what_is_new_on_one_rank_is_sent_by_all() -> None:
    run_ranks(2, _check_new_on_one_rank)


def _check_changed(rank: int) -> None:
    """A tensor that is written into is another, and one rank's new tensor is sent to all."""
    model = tiny_transformer()
    enable_sparse_attention(model, CONFIG, SequenceParallelMesh(2))
    given = inputs(model)
    with torch.no_grad():
        with _Count() as count:
            before = model(**given)[0]
        # Latents and texts apart, and the check of the latents that nobody else makes alike.
        assert count["broadcast"] == 2
        assert count["all_reduce"] == 3
        with _Count() as count:
            assert torch.equal(model(**given)[0], before)
        assert count["broadcast"] == 0
        assert count["all_reduce"] == 2
        given["encoder_hidden_states"].mul_(2 + rank)
        changed = model(**given)[0]
        alone, doubled = tiny_transformer(), inputs(model)
        enable_sparse_attention(alone, CONFIG)
        doubled["encoder_hidden_states"] *= 2
        expected = alone(**doubled)[0]
        assert relative_error(changed, expected) < 1e-4
        assert relative_error(changed, before) > 1e-3
        if rank == 1:
            given["encoder_hidden_states"] = torch.randn_like(given["encoder_hidden_states"])
        assert torch.equal(model(**given)[0], changed)
        # Nobody counts what is written into these.
        with torch.inference_mode():
            again = inputs(model)
            assert torch.equal(model(**again)[0], before)
            again["hidden_states"].mul_(2)
            assert relative_error(model(**again)[0], before) > 1e-3


def test_inputs_are_sent_when_they_are_new_on_any_rank() -> None:
    run_ranks(2, _check_changed)


def _check_packed(rank: int) -> None:
    groups = SequenceParallelMesh(2).groups
    assert meet_on_host(groups)
    given = [torch.full((3, 5), rank, dtype=torch.bfloat16).t(), torch.tensor(rank), torch.full((7,), rank > 0)]
    given.append(torch.empty(0, 3))
    with _Count() as count:
        sent = all_from_first(given, groups)
    assert count == {"broadcast": 1}
    for x, own in zip(sent, given, strict=True):
        assert (x.shape, x.dtype) == (own.shape, own.dtype)
        assert not x.any()
    assert given[1] == rank


def test_several_tensors_in_one_broadcast() -> None:
    run_ranks(2, _check_packed)


def test_the_step_of_a_loop_that_does_not_tell_it_waits_for_no_device() -> None:
    pipe = tiny_pipeline("i2v")
    pipe.scheduler.set_timesteps(6)
    steps = SchedulerSteps(pipe)
    for place, t in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler._step_index = place
        with mock.patch.object(Tensor, "max", side_effect=AssertionError("waits")):
            assert steps(t.expand(2)) == (place, 6)
        # Per token, as of TI2V, it is computed, and must be read.
        assert steps(torch.stack([t * 0, t])[None]) == (place, 6)
        # Nobody's place in the scheduler's own.
        assert steps((t + 1).expand(2)) == (None, None)
        assert steps(pipe.scheduler.timesteps[(place + 1) % 6].expand(2)) == (None, None)
