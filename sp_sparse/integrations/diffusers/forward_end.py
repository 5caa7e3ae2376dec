"""What ranks that share a sequence do where a forward ends: those that are well hear of one that failed.

A rank that fails within a forward leaves the others in a collective that it never comes to. So it first goes through what is
left of the forward's collectives, with zeros, and then meets the others, which throw their results away: nobody waits in
vain, and the next video finds all ranks in step.

Weights that are dealt out (FSDP2) are collectives too, of all ranks: of both halves of guidance, whose attention has none in
common. There a rank also goes through those of a forward that it fails to begin.

What cannot be gone through is a collective left half-done: a failure within a layer's attention, or where a step cache
decides which layers run. Where the groups meet on the host, beside a GPU's collectives, all are told of that too; else those
that wait hear it at their timeout. Either way the groups are of no use any more, and later forwards are refused.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sp_sparse.attention import SparseAttention
from sp_sparse.integrations.diffusers.call import WanCall
from sp_sparse.integrations.diffusers.sharded import blocks_of, free_weights, gather_weights, is_sharded, settle
from sp_sparse.parallel.agreement import RefusedError, every_value, is_lost_rank, meet_on_host
from sp_sparse.parallel.failures import Standing
from sp_sparse.parallel.mesh import SequenceParallelMesh


class ForwardEnd:
    """Of one transformer. Where its groups do not meet on the host, nothing is exchanged here."""

    def __init__(
        self,
        model: Any,
        layers: Sequence[SparseAttention],
        attentions: Sequence[Any],
        call: WanCall,
        mesh: SequenceParallelMesh,
        standing: Standing,
        confirm: Callable[[], None],
    ) -> None:
        """`attentions` are the modules of `layers`; `confirm` is called where a forward has ended well on all ranks."""
        self._model, self._call, self._confirm = model, call, confirm
        self._layers = list(zip(layers, attentions, strict=True))
        self._groups, self._standing = mesh.sequence_groups, standing
        self._meets = bool(self._groups) and meet_on_host(self._groups)

    def __call__(self, error: Exception | None) -> Exception | None:
        """The forward has ended on this rank, well or by `error`; what to raise, if anything. A collective call."""
        call = self._call
        if not call.is_running:  # refused before it began, or ended already
            return error
        call.end()
        if error is not None and is_lost_rank(error):
            self._standing.leave(error, can_meet=False)
            return error
        if self._meets:
            error = self._meet(error)
        elif error is not None and self._dealt_out and not self._go_through(error):
            self._standing.leave(error, can_meet=call.plan.local.device.type != "cpu")
        if error is None:
            self._confirm()
        return error

    def skip(self) -> None:
        """Nothing of a forward has run on this rank that others may be in: make its collectives of weights."""
        blocks = blocks_of(self._model)
        for block in blocks:
            gather_weights(block)
            free_weights(block)
        settle(self._model, blocks)

    @property
    def _dealt_out(self) -> bool:
        return is_sharded(self._model)

    def _meet(self, error: Exception | None) -> Exception | None:
        halfway: str | None = None
        if error is not None and not isinstance(error, RefusedError) and not self._go_through(error):
            halfway = f"{type(error).__name__} in layer {self._call.layers_done}"
        aside = self._call.plan.local.device.type != "cpu"  # the meeting is none of the layers' collectives
        if halfway is not None and error is not None and not aside:
            if not isinstance(error, (TypeError, ValueError)):  # those are of arguments, which all ranks have alike
                self._standing.leave(error, can_meet=False)
            return error
        raised = self._standing.meet(error, self._groups, "the ranks did not all end a forward")
        if raised is not None and aside and self._standing.can_meet:
            places = set(every_value(halfway, self._groups).values())
            if len(places) > 1:  # those that all failed at one place are in step
                self._standing.leave(raised, can_meet=True)
        return raised

    def _go_through(self, error: Exception) -> bool:
        """Make the collectives that the others still make in this forward, with zeros; whether that went well."""
        call, model = self._call, self._model
        if (call.is_within and self._meets) or getattr(model, "_cache_config", None) is not None:
            return False
        if isinstance(error, torch.OutOfMemoryError):
            traceback.clear_frames(error.__traceback__)  # they hold what the forward has computed
        try:
            with torch.no_grad():
                blocks = blocks_of(model)
                for number in range(call.layers_done, len(self._layers)):
                    layer, attn = self._layers[number]
                    for gathered in blocks[number : number + 2]:  # the next one is gathered ahead
                        gather_weights(gathered)
                    if self._meets:
                        zeros = call.zeros((layer.num_heads, layer.head_dim), "layer", attn.to_v)
                        call.attend(layer, zeros, zeros, zeros)
                    free_weights(blocks[number])
                if self._meets and not call.has_left:
                    call.leave(call.zeros((model.proj_out.out_features,), "leave", model.proj_out))
                settle(model, blocks)  # the block that failed is whole yet
        except Exception:
            return False
        return True
