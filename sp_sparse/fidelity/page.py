"""The page: one HTML file that loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sp_sparse.fidelity.masks import MaskSection
from sp_sparse.fidelity.tables import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #d0d0d0; padding: .25rem .5rem; text-align: left; vertical-align: top; white-space: nowrap; }
th { background: #f2f2f2; }
p, summary { max-width: 60rem; }
.plots img { max-width: 49%; }
.videos { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: 12px; max-width: 256px; }
.mask { image-rendering: pixelated; min-width: 240px; display: block; }
"""


def page(
    run: Mapping[str, Any],
    tables: Sequence[Table],
    plots: Sequence[str],
    videos: Mapping[str, Sequence[Mapping[str, str]]],
    masks: Sequence[MaskSection],
) -> str:
    """The whole document.

    Args:
        run: what all videos share.
        tables: first of all.
        plots: data URIs.
        videos: for each prompt, the `label`, `sheet` and `video` of everything that is shown of it.
        masks: of each setting that was looked at.
    """
    told = ", ".join(f"{name} {value}" for name, value in run.items() if value not in (None, "", []))
    parts = [
        f"<h1>Fidelity of {html.escape(str(run['model']))}</h1>",
        f"<p>{html.escape(told)}</p>",
        *(table.html() for table in tables),
        f'<h2>Quality against density</h2><div class="plots">{"".join(_image(plot, "plot") for plot in plots)}</div>',
        *(_prompt(prompt, shown) for prompt, shown in videos.items()),
    ]
    if masks:
        parts.append("<h2>Masks</h2><p>A row of pixels a query block, a column a key block, dark where it is kept.</p>")
        parts += [_masks(section) for section in masks]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fidelity</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _prompt(prompt: str, shown: Sequence[Mapping[str, str]]) -> str:
    sheets = "".join(
        f"<tr><td>{html.escape(one['label'])}</td><td>{_image(one['sheet'], 'frames')}</td></tr>" for one in shown
    )
    videos = "".join(
        f'<figure><video src="{one["video"]}" autoplay loop muted playsinline></video>'
        f"<figcaption>{html.escape(one['label'])}</figcaption></figure>"
        for one in shown
    )
    return (
        f"<h2>{html.escape(prompt)}</h2><details open><summary>Frames</summary><table>{sheets}</table></details>"
        f'<details open><summary>Videos side by side</summary><div class="videos">{videos}</div></details>'
    )


def _masks(section: MaskSection) -> str:
    steps = sorted({cell.step for cell in section.cells})
    layers = sorted({cell.layer for cell in section.cells})
    cells = {(cell.layer, cell.step): cell for cell in section.cells}
    head = "".join(f"<th>step {step}</th>" for step in steps)
    rows = ""
    for layer in layers:
        rows += f"<tr><th>layer {layer}</th>"
        for step in steps:
            cell = cells.get((layer, step))
            rows += "<td>"
            if cell is not None:
                rows += _image(cell.picture, "mask", "mask")
                rows += f"expert {cell.expert}: covers {cell.covered:.3f}, least {cell.least:.3f}"
            rows += "</td>"
        rows += "</tr>"
    heads = ", ".join(map(str, section.heads))
    return (
        f"<details><summary>{html.escape(section.label)}: covers {section.covered:.3f}; heads {heads}</summary>"
        f"<table><tr><th></th>{head}</tr>{rows}</table></details>"
    )


def _image(uri: str, alt: str, kind: str = "") -> str:
    return f'<img class="{kind}" src="{uri}" alt="{alt}">'
