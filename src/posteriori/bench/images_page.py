"""The report of the image benchmark as one page of HTML, which needs nothing from a network and no other file.

Only pictures of the test set, where there are any, lie beside it, in the folder of the run. Tables are those of the
Markdown document, cell by cell; a script (``page.js``) sorts and filters them and draws the viewer.
"""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from posteriori.bench.images_charts import chart, marker
from posteriori.bench.images_figures import Style, curve_columns, styles
from posteriori.bench.images_pool import Entry
from posteriori.bench.tables import Table

__all__ = ["page"]

_CODE = re.compile("`([^`]+)`")


def _asset(name: str) -> str:
    return files("posteriori.bench").joinpath(name).read_text(encoding="utf-8")


def _paragraph(text: str) -> str:
    return "<p>" + _CODE.sub(r"<code>\1</code>", html.escape(text)) + "</p>"


def _table(table: Table) -> str:
    label = html.escape(table.title, quote=True)
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">{table.html()}</div>'


def _tools(tasks: Sequence[str], look: Mapping[str, Style]) -> str:
    """The choice of tasks and methods, which is the charts' legend too."""
    options = "".join(f'<option value="{html.escape(t)}">{html.escape(t)}</option>' for t in tasks)
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{html.escape(m)}"> '
        f'<svg viewBox="-6 -6 12 12" aria-hidden="true">{marker(s, 0, 0)}</svg> {html.escape(m)}</label>'
        for m, s in look.items()
    )
    return (
        '<nav class="tools" aria-label="What is shown"><label>task <select id="task"><option value="">all</option>'
        f"{options}</select></label><details open><summary>methods</summary><fieldset>"
        '<button type="button" id="every">all</button><button type="button" id="none">none</button>'
        f"{boxes}</fieldset></details></nav>"
    )


def _charts(by_task: Mapping[str, Sequence[Entry]], task: str, names: Mapping[str, str], look: Any) -> str:
    drawn = [chart(by_task[task], c, names, look) for c in curve_columns(by_task)]
    return f'<div class="charts">{"".join(drawn)}</div>'


def _image(path: Path, text: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img class="figure" alt="{html.escape(text)}" src="data:image/png;base64,{content}"></p>'


def _viewer(pictures: Mapping[str, Any]) -> str:
    options = "".join(f'<option value="{html.escape(t)}">{html.escape(t)}</option>' for t in pictures["tasks"])
    content = json.dumps(pictures).replace("<", "\\u003c")
    return f"""<section id="viewer" aria-label="Samples">
<h2>Samples</h2>
<p class="faint">All pictures show the same place: click one to come closer (with shift: further away), drag to move, or
use the arrow keys, + and -. Standard deviations go from black, 0, to the brightest colour,
{pictures["std_top"]:g} in units of [-1, 1]. PSNR is the average of single samples.</p>
<div class="bar"><label>task <select name="picture-task">{options}</select></label>
<label>image <select name="image"></select></label>
<button type="button" name="closer" aria-label="Closer">+</button>
<button type="button" name="further" aria-label="Further away">&minus;</button>
<button type="button" name="whole">whole picture</button>
<label>size <input type="range" name="side" min="48" max="320" value="96"></label></div>
<div class="strips"></div>
<script type="application/json" id="pictures">{content}</script>
</section>"""


def _details(facts: Mapping[str, str], recipe: Mapping[str, Any], settings: Table) -> str:
    lines = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    shown = html.escape(json.dumps(recipe, indent=1))
    return (
        f"<details><summary>Recipe, settings, versions, hashes</summary><dl>{lines}</dl>{_table(settings)}"
        f"<pre>{shown}</pre></details>"
    )


def page(
    *,
    title: str,
    introduction: Sequence[str],
    by_task: Mapping[str, Sequence[Entry]],
    names: Mapping[str, str],
    wins: Sequence[Table],
    tables: Mapping[str, Sequence[Table]],
    settings: Table,
    facts: Mapping[str, str],
    recipe: Mapping[str, Any],
    figure: Path | None = None,
    pictures: Mapping[str, Any] | None = None,
) -> str:
    """The whole page.

    Args:
        title: heading.
        introduction: paragraphs.
        by_task: pooled entries.
        names: of the feature network's scores.
        wins: tables of all tasks together.
        tables: those of every task.
        settings, facts, recipe: how it was measured.
        figure: of calibration, copied into the page.
        pictures: see :func:`posteriori.bench.images_pictures.write_pictures`; no viewer without.
    """
    look = styles(list(dict.fromkeys(e.method for lines in by_task.values() for e in lines)))
    parts = [f"<h1>{html.escape(title)}</h1>", *map(_paragraph, introduction)]
    parts += [_tools(list(by_task), look), *map(_table, wins)]
    if pictures and pictures["tasks"]:
        parts.append(_viewer(pictures))
    for task, found in tables.items():
        heading = f'<section data-task="{html.escape(task)}"><h2>{html.escape(task)}</h2>'
        parts += [heading, _charts(by_task, task, names, look), *map(_table, found), "</section>"]
    if figure is not None:
        parts += ["<h2>Calibration</h2>", _image(figure, "Calibration of every method; values are in the tables")]
    parts.append(_details(facts, recipe, settings))
    body = "\n".join(parts)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{_asset("page.css")}</style>
</head>
<body>
<main>
{body}
</main>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""
