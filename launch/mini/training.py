"""What every stage shares: its budget, gradients over the ranks, averaged weights, checkpoints to go on from, the log."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sp_sparse.generate.ranks import Ranks

_LOG_EVERY = 50
_SAVE_SECONDS = 120.0
_EMA = 0.998
_CLIP = 1.0


@dataclass(frozen=True)
class Schedule:
    """Of the learning rate: up over `warmup` steps; down to 0 over the last `decay`, a share of this call's budget."""

    rate: float
    warmup: int = 100
    decay: float = 0.0

    def at(self, step: int, share_done: float) -> float:
        """`step` since the first call of all, `share_done` of the present call."""
        left = 1.0 if self.decay == 0 else min(1.0, (1.0 - share_done) / self.decay)
        return self.rate * min(1.0, (step + 1) / self.warmup) * max(0.02, left)


@dataclass(frozen=True)
class Budget:
    """How long a call trains: seconds, or steps where they are given."""

    seconds: float
    steps: int | None = None

    def steps_from(self, start: float, ranks: Ranks) -> Iterator[float]:
        """The share done, before each step, until the budget is spent: on all ranks by the first one's clock."""
        done = 0
        while (share := _of_first(self._share(start, done), ranks)) < 1:
            yield share
            done += 1

    def _share(self, start: float, done: int) -> float:
        if self.steps is not None:
            return done / self.steps if self.steps else 1.0
        return (time.perf_counter() - start) / self.seconds if self.seconds > 0 else 1.0


class Log:
    """JSON lines in `log.jsonl` of a folder, and the same for people on the screen; the first rank's alone."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._first = folder / "log.jsonl", ranks.first

    def write(self, **values: Any) -> None:
        if not self._first:
            return
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rounded) + "\n")
        print(" ".join(f"{k}={v}" for k, v in rounded.items()), flush=True)


class Stage:
    """Trains `modules` together; everything that goes on is in the checkpoint `<name>.pt` of the folder.

    Every rank has the same weights and draws its own noise; gradients are averaged. Give modules alike on all ranks.

    Raises:
        ValueError: a checkpoint that was made `of` something else, such as latents of another VAE.
    """

    def __init__(
        self, name: str, modules: Mapping[str, nn.Module], folder: Path, schedule: Schedule, of: str, ranks: Ranks
    ) -> None:
        self.name, self.step = name, 0
        self.modules = nn.ModuleDict(modules)
        self.device = next(self.modules.parameters()).device
        self.generator = torch.Generator(self.device).manual_seed(ranks.rank)
        self._file = folder / f"{name}.pt"
        self._ranks = ranks
        self._log = Log(folder, ranks)
        self._schedule, self._of = schedule, of
        self._optimizer = torch.optim.AdamW(
            self.modules.parameters(), lr=schedule.rate, betas=(0.9, 0.98), weight_decay=0.01,
            fused=self.device.type == "cuda",
        )  # fmt: skip
        self._ema = {key: value.detach().clone() for key, value in self.modules.state_dict().items()}
        if self._file.exists():
            self._load()

    def _load(self) -> None:
        found = torch.load(self._file, map_location=self.device, weights_only=True)
        if found["of"] != self._of:
            raise ValueError(
                f"{self._file} was trained on {found['of']}, and this is {self._of}; move it away to start this stage anew"
            )
        self.modules.load_state_dict(found["weights"])
        self._optimizer.load_state_dict(found["optimizer"])
        self._ema, self.step = found["ema"], found["step"]
        state = found["generator"].cpu()
        if self._ranks.first and state.shape == self.generator.get_state().shape:
            self.generator.set_state(state)
        else:  # the checkpoint holds the first rank's alone, and that of another kind of device does not fit
            self.generator.manual_seed(self.step * self._ranks.world + self._ranks.rank)
        self._ranks.say(f"{self.name}: goes on from step {self.step}")

    def save(self) -> None:
        """Write the checkpoint, on the first rank; a call that is killed meanwhile leaves the one before."""
        if not self._ranks.first:
            return
        half = self._file.with_suffix(".tmp")
        state = {
            "of": self._of, "step": self.step, "weights": self.modules.state_dict(), "ema": self._ema,
            "optimizer": self._optimizer.state_dict(), "generator": self.generator.get_state(),
        }  # fmt: skip
        torch.save(state, half)
        os.replace(half, self._file)

    def run(self, loss_of: Callable[[int], tuple[Tensor, Tensor]], budget: Budget) -> float:
        """Train; `loss_of(step)` gives what is minimised and what is logged. The mean of this rank's last logged values.

        Raises:
            FloatingPointError: the loss is no longer finite; the last checkpoint is from before.
        """
        self._log.write(stage=self.name, step=self.step, budget=asdict(budget), schedule=asdict(self._schedule),
                        device=device_name(self.device), ranks=self._ranks.world, torch=torch.__version__,
                        of=self._of)  # fmt: skip
        self.modules.train()
        start = saved = marked = time.perf_counter()
        recent: list[Tensor] = []
        mean, first = math.nan, self.step
        for share in budget.steps_from(start, self._ranks):
            loss, shown = loss_of(self.step)
            self._update(loss, share)
            recent.append(shown.detach())
            if len(recent) == _LOG_EVERY:
                mean, marked = self._report(recent, marked, start)
                recent = []
                if time.perf_counter() - saved > _SAVE_SECONDS:
                    self.save()
                    saved = time.perf_counter()
        if recent:
            mean, _ = self._report(recent, marked, start)
        if self.step > first or not self._file.exists():
            self.save()
        return mean

    def _update(self, loss: Tensor, share: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.at(self.step, share)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.modules.parameters(), _CLIP)
        self._optimizer.step()
        keep = min(_EMA, (self.step + 1) / (self.step + 10))
        now = self.modules.state_dict()
        with torch.no_grad():
            torch._foreach_lerp_(list(self._ema.values()), [now[key] for key in self._ema], 1 - keep)
        self.step += 1

    def _average_gradients(self) -> None:
        for group in self._ranks.groups:
            gradients = [p.grad for p in self.modules.parameters() if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients]) / self._ranks.world
            dist.all_reduce(flat, group=group)
            parts = flat.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def _report(self, recent: list[Tensor], marked: float, start: float) -> tuple[float, float]:
        mean = torch.stack(recent).float().mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"{self.name}: the loss is {mean} at step {self.step}; run again, from the last checkpoint, with a "
                "lower --rate"
            )
        now = time.perf_counter()
        self._log.write(stage=self.name, step=self.step, seconds=now - start, loss=mean,
                        steps_per_s=len(recent) / (now - marked))  # fmt: skip
        return mean, now


def _of_first(value: float, ranks: Ranks) -> float:
    shared = torch.tensor([value], dtype=torch.float64, device="cpu")
    for group in ranks.groups:
        dist.broadcast(shared, 0, group=group)
    return shared.item()


def averaged(
    file: Path, device: torch.device | str = "cpu", of: str | None = None
) -> tuple[dict[str, dict[str, Tensor]], int]:
    """The averaged weights of each module of a checkpoint, and its step.

    Raises:
        FileNotFoundError: with the stage to run.
        ValueError: a checkpoint that was not made `of` this.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there; run --stage {file.stem} first")
    found = torch.load(file, map_location=device, weights_only=True)
    if of is not None and found["of"] != of:
        raise ValueError(
            f"{file} was trained on {found['of']}, and this is {of}; run --stage {file.stem} again, without it"
        )
    weights: dict[str, dict[str, Tensor]] = {}
    for key, value in found["ema"].items():
        module, _, rest = key.partition(".")
        weights.setdefault(module, {})[rest] = value
    return weights, found["step"]


def device_name(device: torch.device) -> str:
    """Of the GPU, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
