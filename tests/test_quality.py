"""`benchmark quality`: its tables by hand, and docs/quality.md as its own command makes it."""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from launch.benchmarks.command import main
from launch.benchmarks.quality import BEGIN, END
from sp_sparse.fidelity.plan import Setting

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("matplotlib")


def _videos() -> list[dict[str, Any]]:
    """Six prompts: dropping has 20, 24 and 28 dB at densities 0.1, 0.3 and 0.5, linear 2 dB more."""
    lines = []
    for prompt in "abcdef":
        for remainder in ("drop", "linear"):
            for number, density in enumerate((0.1, 0.3, 0.5)):
                setting = Setting("topk", remainder, "raster", 3, (64, 64), True, False, density)
                figures = {"psnr": 20.0 + 4 * number + 2 * (remainder == "linear"), "ssim": 0.9, "lpips": None}
                figures |= {"caption": 1.0, "density": density, "density_all": density, "seconds": 1.0}
                one = {"kind": "sparse", "prompt": prompt, "seed": 0, "setting": setting.to_json()}
                lines.append({**one, **figures})
    return lines


def _speeds() -> list[dict[str, Any]]:
    """100 ms for each unit of density, 5 more with the linear term; dense attention takes 120."""
    rows = []
    for kernel, more in (("fa4", 0.0), ("fa4+linear", 5.0)):
        for density in (0.1, 0.3):
            ms = 100 * density + more
            row = {"what": "attention", "gpus": 1, "ulysses": 1, "ring": 1, "sequence": 100, "density": density}
            row |= {"kernel": kernel, "ms_median": ms, "speedup": 120 / ms, "hardware": "H", "implementation": "layer"}
            rows.append(row)
    # Another way to exchange, which is no part of the curve.
    return [*rows, {**rows[-1], "kv_exchange": "all_gather", "density": 0.2, "ms_median": 99.0}]


def _write(path: Path, rows: list[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def _run(folder: Path, videos: list[dict[str, Any]], text: str = f"before\n{BEGIN}\nstale\n{END}\nafter\n") -> int:
    (folder / "q.md").write_text(text)
    flags = [_write(folder / "f.jsonl.gz", videos), "--speed", _write(folder / "s.jsonl", _speeds())]
    return main(["quality", *flags, "--document", str(folder / "q.md"), "--output-dir", str(folder / "plots")])


def test_tables_by_hand(tmp_path: Path) -> None:
    assert _run(tmp_path, _videos()) == 0
    text = (tmp_path / "q.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "stale" not in text
    gain = "+2.00* [+2.00, +2.00]"
    assert f"| topk, linear, over remainder=drop | {gain} | {gain} | {gain} |" in text
    assert "| topk, linear | below 0.100 | 0.200 | 0.400 |" in text
    # 0.2 with the term takes 25 ms, 0.3 without it 30. Beyond 0.3 nothing was timed, and nothing is told.
    assert "| 24.00 | 0.300: 30.0 ms, 4.00× | linear | 0.200: 25.0 ms, 4.80× | 1.20× |" in text
    assert "| 20.00 | 0.100: 10.0 ms, 12.00× | linear | ≤ 0.100: ≤ 15.0 ms, ≥ 8.00× | ≥ 0.67× |" in text
    assert "| 28.00 |" not in text
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"psnr.png", "ssim.png", "speed.png"}


def test_few_videos_have_no_interval(tmp_path: Path) -> None:
    assert _run(tmp_path, [line for line in _videos() if line["prompt"] in "abc"]) == 0
    assert (
        "| topk, linear, over remainder=drop | +2.00 (3) | +2.00 (3) | +2.00 (3) |" in (tmp_path / "q.md").read_text()
    )


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(tmp_path, _videos(), "no marks") == 2
    assert "put them where the tables shall stand" in capsys.readouterr().err
    assert _run(tmp_path, [{"psnr": 1.0}]) == 2
    assert "f.jsonl.gz line 1 cannot be read" in capsys.readouterr().err
    assert _run(tmp_path, [line for line in _videos() if line["setting"]["remainder"] == "drop"]) == 2
    assert "run sp_sparse.fidelity with --remainders drop,linear" in capsys.readouterr().err


def test_the_document_is_what_its_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/quality.md").read_text()
    command = text[text.index("python launch/benchmark.py quality") :].partition("```")[0]
    (tmp_path / "q.md").write_text(text)
    monkeypatch.chdir(ROOT)
    flags = shlex.split(command.replace("\\\n", " "))[2:]
    assert main([*flags, "--document", str(tmp_path / "q.md"), "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "q.md").read_text() == text
