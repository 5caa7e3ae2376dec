"""The server with the tiny model on gloo ranks, over real HTTP."""

from __future__ import annotations

import base64
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sp_sparse.generate.__main__ import main as generate
from sp_sparse.generate.files import decoded_pixels
from sp_sparse.serve.__main__ import main as serve
from tests.processes import wait_for
from tests.ranks import run_ranks
from tests.serving.server import SPARSE, TINY, RankServer

LONG = {"num_inference_steps": 5000}
CONSTANT = ["--sparse-attn-schedule", "constant"]
LIMITS = ["--max-steps", "5000"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankServer]:
    with RankServer(tmp_path_factory.mktemp("server"), 2, "--ulysses-degree", "2", *LIMITS) as started:
        yield started


def _generated(folder: Path, world: int, *flags: str) -> bytes:
    """The pixels that `generate` makes on so many ranks."""
    run_ranks(world, _rank_generates, [*TINY, *flags, "--prompt", "a fox", "--output", str(folder / "video.mp4")])
    return decoded_pixels((folder / "video.mp4").read_bytes())


def _rank_generates(rank: int, flags: list[str]) -> None:
    assert generate(flags) == 0


def test_the_life_of_a_job(server: RankServer) -> None:
    job = server.create(prompt="a cat", seed=7, num_inference_steps=30)
    assert job["status"] == "queued"
    assert (job["phase"], job["progress"]) == ("queued", 0)
    seen = []

    def ended() -> bool:
        seen.append(server.get(job["id"]))
        return seen[-1]["status"] not in ("queued", "in_progress")

    wait_for(ended)
    done = seen[-1]
    assert done["status"] == "completed"
    assert (done["progress"], done["step"], done["steps"], done["phase"]) == (100, 30, 30, None)
    percents = [told["progress"] for told in seen]
    assert percents == sorted(percents)
    assert len({told["step"] for told in seen}) > 2  # progress that moves
    running = [told for told in seen if told["phase"] == "denoise" and told["step"] > 1]
    assert all(told["seconds_per_step"] > 0 and told["eta_s"] >= 0 for told in running)
    assert set(done["stage_durations"]) == {"encode", "denoise", "decode", "save"}
    assert 0.3 < done["density"] < 1
    assert done["kernel_calls"]["reference"] > 0
    assert done["peak_memory_mb"] > 1
    video = server.content(done["id"])
    assert video[4:8] == b"ftyp"
    part = server.http.get(f"/v1/videos/{done['id']}/content", headers={"Range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, b"ftyp")
    assert done["id"] in [told["id"] for told in server.http.get("/v1/videos").json()["data"]]
    assert server.http.delete(f"/v1/videos/{done['id']}").json() == {
        "id": done["id"],
        "object": "video.deleted",
        "deleted": True,
    }
    assert server.http.get(f"/v1/videos/{done['id']}").status_code == 404


def test_the_same_video_as_generate(server: RankServer, tmp_path: Path) -> None:
    """Also after jobs with other settings, which must leave nothing behind."""
    asked: list[tuple[dict[str, Any], list[str]]] = [
        ({"seed": 3}, ["--seed", "3", *SPARSE]),
        (
            {"seed": 3, "sparse_attn_topk": 0.1, "sparse_attn_schedule": "constant", "flow_shift": 5.0},
            ["--seed", "3", *SPARSE, "--sparse-attn-topk", "0.1", *CONSTANT, "--flow-shift", "5"],
        ),
        (
            {"seed": 3, "sparse_attn_backend": "none"},
            ["--seed", "3", "--sparse-attn-backend", "auto", "--sparse-attn-topk", "1"],
        ),
        (
            {"seed": 4, "size": "160x96", "num_frames": 9, "guidance_scale": 1},
            ["--seed", "4", *SPARSE, "--width", "160", "--height", "96", "--num-frames", "9", "--guidance-scale", "1"],
        ),
        ({"seed": 3}, ["--seed", "3", *SPARSE]),
    ]
    videos = []
    for fields, flags in asked:
        job = server.completed(prompt="a fox", **fields)
        videos.append(server.content(job["id"]))
        assert decoded_pixels(videos[-1]) == _generated(tmp_path, 2, "--ulysses-degree", "2", *flags)
        assert (job["density"] == 1) == ("sparse_attn_backend" in fields)
    assert decoded_pixels(videos[0]) == decoded_pixels(videos[-1])
    assert len({decoded_pixels(video) for video in videos}) == 4


def test_a_job_that_runs_is_cancelled_at_its_next_step(server: RankServer) -> None:
    job = server.create(**LONG)["id"]
    waiting = server.create()["id"]
    wait_for(lambda: server.get(job)["step"] > 2)
    assert server.http.delete(f"/v1/videos/{job}").json()["deleted"]
    assert server.http.delete(f"/v1/videos/{job}").status_code in (404, 409)
    wait_for(lambda: server.http.get(f"/v1/videos/{job}").status_code == 404)
    assert server.ended(waiting)["status"] == "completed"


def test_a_queued_job_is_deleted_at_once(server: RankServer) -> None:
    running, waiting = server.create(**LONG)["id"], server.create()["id"]
    assert server.get(waiting)["jobs_ahead"] == 1
    assert server.http.delete(f"/v1/videos/{waiting}").status_code == 200
    assert server.http.get(f"/v1/videos/{waiting}").status_code == 404
    server.http.delete(f"/v1/videos/{running}")
    assert server.completed()["id"]


def test_what_ranks_would_refuse_is_refused_before_they_see_it(server: RankServer) -> None:
    for fields, text in (
        ({"size": "130x128"}, "multiples of 16; use 128 or 144"),
        ({"num_frames": 16}, "frames are 4n + 1; use 13 or 17"),
        ({"seed": -1}, "seed"),
        ({"sparse_attn_topk": 0}, "sparse_attn_topk"),
        ({"sparse_attn_backend": "nonesuch"}, "is not this server's"),
        ({"sparse_attn_schedule": "table"}, "sparse_attn_schedule"),
        ({"size": "4096x4096"}, "limit"),
    ):
        answer = server.http.post("/v1/videos", json={"prompt": "a cat", **fields})
        assert answer.status_code == 400
        assert text in answer.json()["error"]["message"]
    assert server.completed()["id"]


def test_four_ranks(tmp_path: Path) -> None:
    flags = ["--ulysses-degree", "2", "--ring-degree", "2"]
    with RankServer(tmp_path, 4, *flags, *LIMITS) as server:
        job = server.completed(prompt="a fox", seed=3)
        cancelled = server.create(**LONG)["id"]
        wait_for(lambda: server.get(cancelled)["step"] > 0)
        server.http.delete(f"/v1/videos/{cancelled}")
        again = server.completed(prompt="a fox", seed=3)
        videos = [decoded_pixels(server.content(told["id"])) for told in (job, again)]
        assert server.stop() == [0] * 4
    assert videos[0] == videos[1] == _generated(tmp_path, 4, *flags, "--seed", "3", *SPARSE)


def test_guidance_on_two_halves(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--cfg-parallel-degree", "2", "--offload", "idle") as server:
        refused = server.http.post("/v1/videos", json={"prompt": "a cat", "guidance_scale": 1})
        assert "use a scale above 1" in refused.json()["error"]["message"]
        ours = server.content(server.completed(prompt="a fox", seed=2)["id"])
    same = _generated(tmp_path, 2, "--cfg-parallel-degree", "2", "--seed", "2", *SPARSE)
    assert decoded_pixels(ours) == same


def test_weights_that_are_dealt_out_over_both_halves(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--cfg-parallel-degree", "2", "--fsdp", *LIMITS) as server:
        videos = [server.content(server.completed(prompt="a fox", seed=2)["id"]) for _ in range(2)]
        job = server.create(**LONG)["id"]
        wait_for(lambda: server.get(job)["step"] > 0)
        server.signal(1, signal.SIGKILL)
        assert server.join() == [1, -signal.SIGKILL]
        assert "error: a rank stopped or did not answer" in server.log
    same = _generated(tmp_path, 2, "--cfg-parallel-degree", "2", "--seed", "2", *SPARSE)
    assert [decoded_pixels(video) for video in videos] == [same, same]


@pytest.mark.parametrize("model", ["tiny-i2v", "tiny-ti2v"])
def test_from_an_image(tmp_path: Path, model: str) -> None:
    image = Image.effect_noise((70, 50), 90).convert("RGB")
    image.save(tmp_path / "first.png")
    data = (tmp_path / "first.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    with RankServer(tmp_path, 1, "--model", model) as server:
        form = server.http.post(
            "/v1/videos", data={"prompt": "a fox", "seed": "3"}, files={"input_reference": ("../../x.png", data)}
        )
        from_form = server.ended(form.json()["id"])
        from_json = server.completed(prompt="a fox", seed=3, input_reference={"image_url": url})
        without = server.completed(prompt="a fox", seed=3)
        videos = [decoded_pixels(server.content(job["id"])) for job in (from_form, from_json, without)]
    flags = ["--model", model, "--seed", "3", *SPARSE]
    with_image = _generated(tmp_path, 1, *flags, "--image", str(tmp_path / "first.png"))
    assert videos[0] == videos[1] == with_image
    assert videos[2] == _generated(tmp_path, 1, *flags) != with_image


def test_sigterm_drains(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--ring-degree", "2", *LIMITS) as server:
        running, waiting = server.create(num_inference_steps=40)["id"], server.create()["id"]
        wait_for(lambda: server.get(running)["step"] > 0)
        assert server.stop() == [0, 0]
        assert "drained" in server.log
        server.start()
        assert server.get(running)["tries"] == 1
        assert server.status(running) == "completed"
        assert server.ended(waiting)["status"] == "completed"


def test_a_job_that_drains_too_slowly_runs_again(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--ring-degree", "2", "--drain-s", "0.5", *LIMITS) as server:
        running = server.create(num_inference_steps=300, num_frames=5, size="32x32")["id"]
        wait_for(lambda: server.get(running)["step"] > 0)
        assert server.stop() == [0, 0]
        assert "interrupted, to run after the next start" in server.log
        server.start()
        assert server.ended(running)["status"] == "completed"
        assert server.get(running)["tries"] == 1


def test_a_killed_server_keeps_its_jobs(tmp_path: Path) -> None:
    with RankServer(tmp_path, 2, "--ulysses-degree", "2", "--max-tries", "2", *LIMITS) as server:
        done = server.completed()["id"]
        video = server.content(done)
        running, deleted = server.create(**LONG)["id"], server.create()["id"]
        waiting = server.create()["id"]
        server.http.delete(f"/v1/videos/{deleted}")
        for _ in range(2):
            wait_for(lambda: server.get(running)["step"] > 0)
            for rank in range(2):
                server.signal(rank, signal.SIGKILL)
            server.join()
            (tmp_path / "data" / "videos" / f".{running}.99.mp4").write_bytes(b"half")
            server.start()
        assert server.content(done) == video
        failed = server.ended(running)
        assert failed["error"]["code"] == "interrupted"
        assert "stopped 2 times" in failed["error"]["message"]
        assert server.ended(waiting)["status"] == "completed"
        assert server.http.get(f"/v1/videos/{deleted}").status_code == 404
        assert sorted(p.name for p in (tmp_path / "data" / "videos").iterdir()) == sorted(
            [f"{done}.mp4", f"{waiting}.mp4"]
        )


def _main_with_nan(flags: list[str]) -> int:
    """As `sp_sparse.serve`, with latents or frames that are no numbers where the prompt says so."""
    from sp_sparse.serve import wan

    real_denoise = wan.denoise
    prompts: list[str] = []

    def denoise(pipe: Any, arguments: Any, prompt: Any, *others: Any) -> Any:
        latents = real_denoise(pipe, arguments, prompt, *others)
        prompts[:] = [prompt.text]
        if prompt.text == "nan in latents":
            latents[0, 0, 0, 0, 0] = float("nan")
        return latents

    class Decoding(wan.VideoDecoding):
        def frames(self) -> Any:
            frames = super().frames()
            if frames is not None and prompts == ["infinite frames"]:
                frames[-1] = float("inf")
            return frames

    vars(wan).update(denoise=denoise, VideoDecoding=Decoding)
    return serve(flags)


@pytest.mark.parametrize("world", [1, 2])
def test_a_video_that_is_no_numbers_fails(tmp_path: Path, world: int) -> None:
    with RankServer(tmp_path, world, "--ulysses-degree", str(world), program=_main_with_nan) as server:
        for prompt, told in (("nan in latents", "1 of "), ("infinite frames", "frames of this video are not finite")):
            job = server.ended(server.create(prompt=prompt)["id"])
            assert (job["status"], job["error"]["code"]) == ("failed", "not_finite")
            assert told in job["error"]["message"]
            assert "--dtype float32" in job["error"]["message"]
        assert server.completed()["status"] == "completed"
