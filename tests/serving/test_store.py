"""Jobs and files: nothing is lost, nothing half-done is shown."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sp_sparse.serve.backend import JobParameters
from sp_sparse.serve.jobs import COMPLETED, FAILED, IN_PROGRESS, QUEUED, JobError
from sp_sparse.serve.store import JobStore, QueueFullError


def _job(seed: int = 0, **changed: Any) -> JobParameters:
    values: dict[str, Any] = {
        "prompt": "a cat",
        "negative_prompt": "",
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "fps": 8,
    }
    return JobParameters(**values, num_inference_steps=4, seed=seed, guidance_scale=3.0, **changed)


def _completed(store: JobStore, seed: int = 0, size: int = 10) -> str:
    store.add(_job(seed), 10)
    taken = store.start_next()
    assert taken is not None
    store.video_path(taken[0].id).write_bytes(b"x" * size)
    store.complete(taken[0].id, {"density": 0.5})
    return taken[0].id


def test_jobs_come_back_as_they_were_in_order(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    jobs = [_job(1, image=b"\x89PNG\0"), _job(2, sparse_topk=0.25, flow_shift=5.0), _job(3, sparse_backend="none")]
    ids = [store.add(job, 3).id for job in jobs]
    with pytest.raises(QueueFullError):
        store.add(_job(), 3)
    store.close()
    store = JobStore(tmp_path)
    for job_id, job in zip(ids, jobs, strict=True):
        taken = store.start_next()
        assert taken is not None
        assert (taken[0].id, taken[0].status, taken[1]) == (job_id, IN_PROGRESS, job)
    assert store.start_next() is None


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    with pytest.raises(OSError, match="used by another server; stop it, or give another --data-dir"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    JobStore(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite3")) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="has format 99, but this server reads up to 1; update"):
        JobStore(tmp_path)


def test_states(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done = _completed(store)
    job = store.get(done)
    assert job is not None
    assert (job.status, job.result, job.tries) == (COMPLETED, {"density": 0.5}, 1)
    failed = store.add(_job(), 10).id
    store.start_next()
    store.fail(failed, JobError("out_of_memory", "use less"))
    job = store.get(failed)
    assert job is not None
    assert (job.status, job.error) == (FAILED, JobError("out_of_memory", "use less"))
    again = store.add(_job(), 10).id
    store.start_next()
    store.requeue(again)
    job = store.get(again)
    assert job is not None
    assert (job.status, job.tries, job.started_at) == (QUEUED, 0, None)
    assert store.counts() == {QUEUED: 1, IN_PROGRESS: 0, COMPLETED: 1, FAILED: 1}


@pytest.mark.parametrize("end", ["complete", "fail", "requeue", "remove", "recover"])
def test_a_job_deleted_while_it_ran_is_gone_whatever_its_end(tmp_path: Path, end: str) -> None:
    store = JobStore(tmp_path)
    job = store.add(_job(), 10).id
    store.start_next()
    store.video_path(job).write_bytes(b"x")
    assert store.delete(job) == "cancelling"
    with pytest.raises(ValueError, match="is being cancelled already"):
        store.delete(job)
    if end == "complete":
        store.complete(job, {})
    elif end == "fail":
        store.fail(job, JobError("internal_error", "x"))
    elif end == "recover":
        store.recover()
    else:
        getattr(store, end)(job)
    assert store.get(job) is None
    assert not store.video_path(job).exists()
    with pytest.raises(KeyError):
        store.delete(job)


def test_recovery(tmp_path: Path) -> None:
    store = JobStore(tmp_path, max_tries=2)
    done, lost = _completed(store), _completed(store)
    store.video_path(lost).unlink()
    running = store.add(_job(), 10).id
    (tmp_path / "videos" / f".{running}.1.mp4").write_bytes(b"half")
    store.video_path(running).touch()
    for tries in (1, 2):
        store.start_next()
        store.close()
        store = JobStore(tmp_path, max_tries=2)
        found = store.recover()
        assert found == (
            {"requeued": 1, "failed": 1, "removed": 0, "found completed": 0}
            if tries == 1
            else {**found, "requeued": 0, "failed": 1}
        )
    job = store.get(running)
    assert job is not None
    assert job.error is not None
    assert (job.status, job.error.code) == (FAILED, "interrupted")
    assert [path.name for path in (tmp_path / "videos").iterdir()] == [f"{done}.mp4"]
    missing = store.get(lost)
    assert missing is not None
    assert missing.status == FAILED


def test_old_videos_go_by_age_and_by_size(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    ids = [_completed(store, seed, size=100) for seed in range(4)]
    waiting = store.add(_job(), 10).id
    assert store.expire(1000, 250) == 2
    assert [store.get(job) is not None for job in ids] == [False, False, True, True]
    assert sorted(path.stem for path in (tmp_path / "videos").iterdir()) == sorted(ids[2:])
    assert store.expire(-1, 10**9) == 2
    assert store.get(waiting) is not None
    assert not list((tmp_path / "videos").iterdir())


def test_a_failed_transaction_leaves_everything_as_it_was(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done = _completed(store)

    def fail_amid() -> None:
        with store._transaction() as db:
            store._remove(db, done)
            raise KeyError("boom")

    with pytest.raises(KeyError, match="boom"):
        fail_amid()
    store.add(_job(), 10)
    assert store.get(done) is not None
    assert store.video_path(done).exists()


def test_many_threads(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    taken: list[str] = []

    def add(seed: int) -> None:
        store.add(_job(seed), 1000)

    def take() -> None:
        while len(taken) < 40:
            found = store.start_next()
            if found is not None:
                taken.append(found[0].id)

    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(40)]
    threads += [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(taken) == len(set(taken)) == 40


def _add_until_killed(folder: str, pipe: Any) -> None:
    store = JobStore(Path(folder))
    seed = 0
    while True:
        pipe.send(store.add(_job(seed), 10**6).id)
        seed += 1


def test_what_was_acknowledged_survives_kill(tmp_path: Path) -> None:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_add_until_killed, args=(str(tmp_path), theirs))
    process.start()
    told = [ours.recv() for _ in range(50)]
    os.kill(process.pid or 0, 9)
    process.join(60)
    while ours.poll(0.1):
        told.append(ours.recv())
    store = JobStore(tmp_path)
    assert store.recover()["failed"] == 0
    assert all(store.get(job_id) is not None for job_id in told)


def _tree(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _foreign_database(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None)) as db:
        db.execute("CREATE TABLE jobs (id TEXT, salary REAL)")


def _foreign_database_and_lock(folder: Path) -> None:
    _foreign_database(folder)
    (folder / "lock").touch()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: (folder / "lock").write_text("mine"), "has no jobs.sqlite3, but lock; give another --data-dir"),
        (lambda folder: (folder / "thesis.tex").write_text("x"), "but thesis.tex; give another --data-dir, or move"),
        (lambda folder: (folder / "videos").write_text("x"), "but videos; give another"),
        (
            lambda folder: ((folder / "videos").mkdir(), (folder / "videos" / "my_wedding.mp4").write_bytes(b"x")),
            "but videos; give another",
        ),
        # What is left when a broken database was moved away alone: finished videos, which nobody would know of.
        (
            lambda folder: (
                (folder / "videos").mkdir(),
                (folder / "videos" / f"video_{'0' * 32}.mp4").write_bytes(b"x"),
            ),
            "but videos; give another",
        ),
        (lambda folder: [(folder / name).mkdir() for name in "abcde"], "but a, b, c and 2 more"),
        (_foreign_database, "was made by another program; move it away"),
        (_foreign_database_and_lock, "was made by another program; move it away"),
        (
            lambda folder: (folder / "jobs.sqlite3").write_bytes(b"garbage" * 1000),
            "is no database, or broken .*move it",
        ),
    ],
)
def test_foreign_folders_are_left_alone(tmp_path: Path, make: Any, text: str) -> None:
    make(tmp_path)
    before = _tree(tmp_path)
    with pytest.raises(ValueError, match=text):
        JobStore(tmp_path)
    assert _tree(tmp_path) == before


def test_foreign_files_in_an_own_folder_are_left_alone(tmp_path: Path) -> None:
    JobStore(tmp_path).close()
    (tmp_path / "lock").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    videos, name = tmp_path / "videos", "video_" + "0" * 32
    for foreign in ("my_wedding.mp4", "warm-up.mp4", f"{name}.mkv", f"copy of {name}.mp4", "video_1.mp4", ".hidden"):
        (videos / foreign).write_bytes(b"x")
    (videos / "sub").mkdir()
    (videos / f"{'video_' + '1' * 32}.mp4").mkdir()
    before = _tree(tmp_path)
    own = [f"{name}.mp4", f".{name}.123.mp4", f"warm-up_{'a' * 32}.mp4", f".warm-up_{'a' * 32}.7.mp4"]
    for left in own:
        (videos / left).write_bytes(b"half")
    store = JobStore(tmp_path)
    store.recover()
    store.close()
    after = _tree(tmp_path)
    assert {path: content for path, content in after.items() if "sqlite" not in path} == {
        path: content for path, content in before.items() if "sqlite" not in path
    }


def test_a_start_that_was_cut_off_is_no_foreign_folder(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "videos").mkdir()
    JobStore(tmp_path).close()
    path = tmp_path / "jobs.sqlite3"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:  # its table was made, its mark was not
        assert db.execute("PRAGMA application_id").fetchone()[0].to_bytes(4, "big") == b"spSV"
        db.execute("PRAGMA application_id = 0")
        db.execute("PRAGMA user_version = 0")
    JobStore(tmp_path).close()
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == 1


def test_a_broken_database_is_refused_and_kept(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    done = _completed(store)
    for seed in range(200):
        store.add(_job(seed, image=b"x" * 5000), 1000)
    store.close()
    path = tmp_path / "jobs.sqlite3"
    data = bytearray(path.read_bytes())
    data[4096 : len(data) // 2] = b"\xff" * (len(data) // 2 - 4096)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"jobs.sqlite3 is no database, or broken \(.*move it and .*videos away"):
        JobStore(tmp_path)
    assert path.read_bytes() == bytes(data)
    assert store.video_path(done).exists()
    path.unlink()
    for video in (tmp_path / "videos").iterdir():
        video.rename(tmp_path.parent / video.name)
    JobStore(tmp_path).close()  # the remedy helps


def test_a_saved_video_that_was_not_written_down_is_not_made_again(tmp_path: Path) -> None:
    store = JobStore(tmp_path, max_tries=1)
    job, deleted = store.add(_job(), 10).id, store.add(_job(), 10).id
    for _ in range(2):
        store.start_next()
    for saved in (job, deleted):
        store.video_path(saved).write_bytes(b"whole")
    store.delete(deleted)
    store.close()
    store = JobStore(tmp_path, max_tries=1)
    assert store.recover() == {"requeued": 0, "failed": 0, "removed": 1, "found completed": 1}
    found = store.get(job)
    assert found is not None
    assert (found.status, found.tries) == (COMPLETED, 1)
    assert store.video_path(job).read_bytes() == b"whole"
    assert not store.video_path(deleted).exists()


def test_a_video_that_cannot_be_removed_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = JobStore(tmp_path)
    done = _completed(store)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        assert store.delete(done) == "deleted"
    assert store.video_path(done).exists()
    store.recover()
    assert not store.video_path(done).exists()
