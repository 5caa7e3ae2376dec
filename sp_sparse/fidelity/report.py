"""The report: tables, plots, and one page that holds everything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sp_sparse.fidelity.arguments import FidelityArguments
from sp_sparse.fidelity.masks import mask_sections, mask_table
from sp_sparse.fidelity.page import page
from sp_sparse.fidelity.pictures import contact_sheet_uri, data_uri, video_uri
from sp_sparse.fidelity.plots import quality_plots
from sp_sparse.fidelity.store import Item, ResultStore
from sp_sparse.fidelity.summary import Summary, summarize
from sp_sparse.fidelity.tables import equal_quality_table, quality_table


def report_files(store: ResultStore, arguments: FidelityArguments, prompts: Sequence[str]) -> dict[str, str | bytes]:
    """All files by their names, from everything that the folder holds."""
    summary = summarize(store.lines(), arguments.compared_with)
    run = json.loads((store.folder / "run.json").read_text(encoding="utf-8"))
    looked_at = mask_sections(store, summary, prompts[0])
    tables = [quality_table(summary)]
    if (equal := equal_quality_table(summary)).rows:
        tables.append(equal)
    if looked_at:
        tables.append(mask_table(looked_at, prompts[0]))
    plots = quality_plots(summary)
    html = page(
        run,
        tables,
        [data_uri("image/png", plot) for plot in plots.values()],
        _videos(store, summary, prompts[: arguments.shown], int(run["fps"])),
        looked_at,
    )
    return {
        "fidelity.md": "\n".join(table.markdown() for table in tables),
        "fidelity.txt": "\n".join(table.text() for table in tables),
        "index.html": html,
        **plots,
    }


def _videos(store: ResultStore, summary: Summary, prompts: Sequence[str], fps: int) -> dict[str, list[dict[str, Any]]]:
    """For each prompt, what is shown of each row of the summary: its label, contact sheet and video at seed 0."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for prompt in prompts:
        for row in summary.rows:
            frames = store.frames(Item(row.kind, prompt, 0, row.setting))
            if frames is not None:
                told = {"label": row.label, "sheet": contact_sheet_uri(frames), "video": video_uri(frames, fps)}
                shown.setdefault(prompt, []).append(told)
    return shown
