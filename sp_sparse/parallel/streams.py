"""Work beside the current stream: exchanges that run while the GPU attends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Pending:
    """Work that was queued on a side stream."""

    def __init__(self) -> None:
        self.done: torch.cuda.Event | None = None

    def join(self) -> None:
        """Let what is queued on the current stream from now on wait for the work; the host goes on."""
        if self.done is not None:
            torch.cuda.current_stream(self.done.device).wait_event(self.done)


class SideStream:
    """A stream for exchanges, which keep their order on it. On CPUs, where there are no streams, work runs in place.

    Its priority is high: an exchange gets multiprocessors as soon as tiles of an attention kernel retire, and not only when
    all tiles of that kernel have been handed out.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def run(self) -> Iterator[Pending]:
        """Queue work after all that the current stream holds by now.

        Tensors that the work touches are to be allocated before and kept until `join`: their memory then is the current
        stream's, and is not handed on too early.
        """
        pending = Pending()
        if self._stream is None:
            yield pending
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        try:
            with torch.cuda.stream(self._stream):
                yield pending
        finally:  # what was queued before a failure is at work all the same
            pending.done = self._stream.record_event()
