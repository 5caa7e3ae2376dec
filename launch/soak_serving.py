"""Many jobs against a server of two ranks, with failures in every phase: is one lost, made twice, or memory?

Run it plainly: it starts `torchrun` itself, with the tiny model on CPUs, on the loopback address alone. The ranks run this
file too, which puts failures into the backend by words of the prompt; nothing of that is in the package. Where it may, it
mounts a small disk for the jobs and fills it now and then.

    python launch/soak_serving.py --jobs 300 --time-limit-s 480
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])  # a script's own folder stands here; `sp_sparse` lies above it

# Set for the ranks: they are servers.
_ROLE = "SP_SPARSE_SOAK_RANK"
_WAITING = 6
_SETTLED = 100
_GROWTH = 0.10
_DISK_MB = 64

# What is asked for in turn: name, words of the prompt, and how the job must end.
_KINDS = (
    ("text", "", "completed"),
    ("picture", "", "completed"),
    ("out of memory in encode, rank 1", "fail_in=encode on=1 with=oom", "out_of_memory"),
    ("text", "", "completed"),
    ("out of memory in denoise, both", "fail_in=denoise on=0,1 with=oom", "out_of_memory"),
    ("picture that is none", "", "400"),
    ("out of memory after a step, rank 1", "fail_in=step on=1 with=oom", "out_of_memory"),
    ("text", "", "completed"),
    ("cancelled", "", "cancelled"),
    ("error after a step, rank 0", "fail_in=step on=0 with=runtime", "internal_error"),
    ("not finite", "fail_in=denoise on=0,1 with=nan", "not_finite"),
    ("picture", "", "completed"),
    ("out of memory in decode", "fail_in=decode on=0 with=oom", "out_of_memory"),
    ("full disk in save", "fail_in=save on=0 with=full", "no_room"),
    ("error in encode, both", "fail_in=encode on=0,1 with=runtime", "internal_error"),
    # Within a forward, before its first layer and between two.
    ("out of memory in a forward, rank 1", "fail_in=forward on=1 with=oom", "out_of_memory"),
    ("text", "", "completed"),
    ("out of memory in a forward, rank 0", "fail_in=layer on=0 with=oom", "out_of_memory"),
    ("out of memory in a forward, both", "fail_in=forward on=0,1 with=oom", "out_of_memory"),
)
_SIZES = (("64x64", 5), ("32x64", 9), ("96x64", 5), ("64x64", 9))


def main(argv: Sequence[str] | None = None) -> int:
    """Soak; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300, help="jobs asked for at most (default: 300)")
    parser.add_argument("--time-limit-s", type=float, default=480, help="ask for no further job then (default: 480)")
    parser.add_argument("--guidance-halves", action="store_true", help="one rank a branch of guidance; else Ulysses 2")
    parser.add_argument("--kills", type=int, default=2, help="ranks killed, before memory is looked at (default: 2)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, _disk(Path(folder, "disk")) as (place, is_small):
        soak = _Soak(
            place,
            Path(folder, "log"),
            is_small,
            options.jobs,
            options.time_limit_s,
            options.kills,
            options.guidance_halves,
        )
        with soak.server():
            soak.run()
            return soak.report()


@contextmanager
def _disk(folder: Path) -> Iterator[tuple[Path, bool]]:
    """A folder, and whether it is a small file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK_MB}m", "tmpfs", str(folder)]
    is_small = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield folder, is_small
    finally:
        if is_small:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass
class _Soak:
    disk: Path
    log: Path
    is_small: bool
    jobs: int
    time_limit_s: float
    kills: int
    halves: bool
    asked: int = 0
    killed: int = 0
    filled: int = 0
    expected: dict[str, tuple[str, str]] = field(default_factory=dict)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: dict[int, list[float]] = field(default_factory=dict)

    @contextmanager
    def server(self) -> Iterator[None]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        torchrun += ["--max-restarts", str(self.kills + 5), __file__, "--model", "tiny-ti2v"]
        torchrun += ["--cfg-parallel-degree" if self.halves else "--ulysses-degree", "2"]
        torchrun += ["--sparse-attn-backend", "reference", "--sparse-attn-topk", "0.3", "--device", "cpu"]
        torchrun += ["--port", str(port), "--data-dir", str(self.disk / "data"), "--keep-gb", "1"]
        environment = {**os.environ, _ROLE: "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self._torchrun = subprocess.Popen(torchrun, env=environment, stdout=log, stderr=log)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False)
        try:
            self._wait(self._is_ready)
            yield
        finally:
            self._http.close()
            self._torchrun.send_signal(signal.SIGTERM)
            try:
                self._torchrun.wait(60)
            finally:
                self._torchrun.kill()

    def run(self) -> None:
        self._began = time.monotonic()
        while self.asked < self.jobs and time.monotonic() - self._began < self.time_limit_s:
            self._wait(lambda: self._open() < _WAITING)
            self._ask(*_KINDS[self.asked % len(_KINDS)])
            self.asked += 1
            # Before memory is looked at: ranks that are new begin anew.
            if self.killed < self.kills and self.asked == (self.killed + 1) * _SETTLED // (self.kills + 1) - 5:
                self._kill(self.killed % 2)
            if self.is_small and self.asked % 50 == 45:
                self._fill()
            if self.asked == _SETTLED or self.asked % 50 == 0:
                self.memory[self.asked] = self._resident()
        self._wait(lambda: self._open() == 0)
        self.seconds = time.monotonic() - self._began
        self.memory[self.asked] = self._resident()

    def _ask(self, name: str, words: str, end: str) -> None:
        size, frames = _SIZES[self.asked % len(_SIZES)]
        text = {"prompt": f"a fox {words}", "size": size, "num_frames": str(frames), "seed": str(self.asked)}
        text["num_inference_steps"] = "3"
        files: dict[str, Any] = {key: (None, value) for key, value in text.items()}
        if name.startswith("picture"):
            files["input_reference"] = ("x.png", _picture() if end == "completed" else b"\x89PNG\r\n\x1a\nnothing")
        answer = self._http.post("/v1/videos", files=files)
        if end == "400" or answer.status_code != 200:
            self.outcomes[name, str(answer.status_code)] += 1
            if str(answer.status_code) != end:
                self.wrong.append(f"{name}: {answer.status_code} {answer.text}")
            return
        job = answer.json()["id"]
        self.expected[job] = (name, end)
        if end == "cancelled":
            self._http.delete(f"/v1/videos/{job}")

    def _open(self) -> int:
        """Jobs that wait or run."""
        text = self._http.get("/metrics").text
        return sum(int(float(n)) for n in re.findall(r"(?m)^sp_sparse_(?:queued|running)_jobs (\S+)", text))

    def _fill(self) -> None:
        """The disk is full for a while: requests are refused, what runs waits for room or fails."""
        filling = self.disk / "filling"
        with suppress(OSError), filling.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        answer = self._http.post("/v1/videos", json={"prompt": "a fox"})
        self.outcomes["while the disk is full", str(answer.status_code)] += 1
        if answer.status_code != 507:
            self.wrong.append(f"full disk: {answer.status_code} {answer.text}")
        time.sleep(2)
        filling.unlink()
        self.filled += 1

    def _kill(self, rank: int) -> None:
        before = self._ranks()
        os.kill(before[rank], signal.SIGKILL)
        self.killed += 1
        self._wait(lambda: not set(before.values()) & set(self._ranks().values()) and len(self._ranks()) == 2)
        self._wait(self._is_ready)

    def _ranks(self) -> dict[int, int]:
        """The processes of the ranks."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, IndexError):
                parent = process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]
                rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", process.joinpath("environ").read_bytes())
                if parent == str(self._torchrun.pid) and rank:
                    found[int(rank[1])] = int(process.name)
        return found

    def _resident(self) -> list[float]:
        """MB of each rank."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for _, pid in sorted(self._ranks().items())]
        return [number * os.sysconf("SC_PAGE_SIZE") / 2**20 for number in pages]

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self._http.get("/health/ready").status_code == 200
        return False

    def _wait(self, condition: Callable[[], Any], seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while True:
            with suppress(httpx.TransportError):
                if condition():
                    return
            if time.monotonic() > end or self._torchrun.poll() is not None:
                raise RuntimeError(f"the server does not go on; its log ends\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def report(self) -> int:
        """A table, and what is wrong."""
        told = self.log.read_text()
        restarts = int(float(re.findall(r"(?m)^sp_sparse_restarts (\S+)", self._http.get("/metrics").text)[0]))
        tries: Counter[int] = Counter()
        for job, (name, end) in self.expected.items():
            answer = self._http.get(f"/v1/videos/{job}")
            found = "cancelled"
            if answer.status_code == 200:
                body = answer.json()
                found = body["status"] if body["error"] is None else body["error"]["code"]
                tries[body["tries"]] += 1
            self.outcomes[name, found] += 1
            # A disk that was full fails what was to be saved then; a cancelled job may have been done before.
            fits = found == end or (found == "no_room" and self.filled) or (end == "cancelled" and found == "completed")
            made = told.count(f"{job}: completed")
            if not fits or made > 1 or (found == "completed" and not self._is_video(job)):
                self.wrong.append(f"{job} ({name}): {found} instead of {end}, made {made} times")
        files = list((self.disk / "data" / "videos").iterdir())
        completed = sum(number for (_, end), number in self.outcomes.items() if end == "completed")
        if len(files) != completed:
            self.wrong.append(f"{len(files)} files of {completed} completed jobs")
        if restarts != self.killed:
            self.wrong.append(f"{restarts} restarts, though {self.killed} ranks were killed")
        if sum(number for count, number in tries.items() if count > 1) > self.killed:
            self.wrong.append(f"jobs were started again, though no rank was killed: {dict(tries)}")
        self._report_memory()
        print(f"\n{'asked for':38}{'ended as':18}{'jobs':>5}")
        for (name, end), number in sorted(self.outcomes.items()):
            print(f"{name:38}{end:18}{number:5}")
        print(f"\n{self.asked} jobs in {self.seconds:.0f} s; {self.killed} ranks killed, {restarts} restarts; ", end="")
        print(f"disk filled {self.filled} times; starts of a job: {dict(sorted(tries.items()))}")
        print("\n".join(f"WRONG: {text}" for text in self.wrong) or "nothing is wrong: none lost, none made twice")
        return int(bool(self.wrong))

    def _report_memory(self) -> None:
        print("resident MB of ranks 0 and 1 after so many jobs")
        for count, resident in self.memory.items():
            print(f"{count:5}  " + "  ".join(f"{mb:7.1f}" for mb in resident))
        settled, last = self.memory.get(_SETTLED), self.memory[self.asked]
        if settled is None or self.asked < 2 * _SETTLED:
            print(f"too few jobs to tell whether memory grows: {self.asked}, of {2 * _SETTLED}")
            return
        for rank, (before, after) in enumerate(zip(settled, last, strict=True)):
            print(f"rank {rank}: {100 * (after / before - 1):+.1f} % from job {_SETTLED} to job {self.asked}")
            if after > before * (1 + _GROWTH):
                self.wrong.append(f"rank {rank} grew from {before:.0f} MB to {after:.0f} MB")

    def _is_video(self, job: str) -> bool:
        return self._http.get(f"/v1/videos/{job}/content").content[4:8] == b"ftyp"


def _picture() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.effect_noise((300, 200), 90).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _serve() -> int:
    """A rank of the server, whose backend fails where the prompt says so."""
    from sp_sparse.serve.__main__ import main as serve
    from sp_sparse.serve.backend import JobParameters
    from sp_sparse.serve.wan import WanBackend

    rank = int(os.environ["RANK"])
    encode, denoise, decode, save = WanBackend.encode, WanBackend.denoise, WanBackend.decode, WanBackend.save
    running: list[JobParameters] = []

    def fail(job: JobParameters, place: str) -> None:
        asked = dict(word.split("=", 1) for word in job.prompt.split() if "=" in word)
        if asked.get("fail_in") == place and str(rank) in asked["on"].split(",") and asked["with"] != "nan":
            raise {
                "oom": torch.OutOfMemoryError("out of memory, as the prompt wants"),
                "runtime": RuntimeError("an error, as the prompt wants"),
                "full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            }[asked["with"]]

    def failing_encode(self: WanBackend, job: JobParameters) -> Any:
        running[:] = [job]
        fail(job, "encode")
        return encode(self, job)

    def failing_denoise(self: WanBackend, job: JobParameters, encoded: Any, on_step: Callable[[], None]) -> Any:
        def step() -> None:
            fail(job, "step")
            on_step()

        fail(job, "denoise")
        if "with=nan" in job.prompt:
            encoded.prompt.embeds.fill_(float("nan"))
        model = self._pipe.transformer
        hooks = [
            module.register_forward_pre_hook(lambda *_, place=place: fail(job, place))
            for module, place in ((model.condition_embedder, "forward"), (model.blocks[-1].ffn, "layer"))
        ]
        try:
            return denoise(self, job, encoded, step)
        finally:
            for hook in hooks:
                hook.remove()

    def failing_decode(self: WanBackend, latents: Any, on_part: Callable[[int, int], None]) -> Any:
        fail(running[0], "decode")
        return decode(self, latents, on_part)

    def failing_save(self: WanBackend, job: JobParameters, frames: Any, path: Path) -> None:
        fail(job, "save")
        save(self, job, frames, path)

    for name, method in (
        ("encode", failing_encode),
        ("denoise", failing_denoise),
        ("decode", failing_decode),
        ("save", failing_save),
    ):
        setattr(WanBackend, name, method)
    return serve()


if __name__ == "__main__":
    if os.environ.get(_ROLE):
        from sp_sparse.generate.ranks import leave

        leave(_serve())
    sys.exit(main())
