"""The page as a file: its head, its security policy, and what its script draws from, compressed.

plotly.js is the file that the pinned plotly package brings, gzipped into the page, which leaves two fifths of it. The
browser unpacks it with DecompressionStream. The policy allows the two scripts by their hashes and no connection at all.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
from functools import cache
from html import escape
from importlib.resources import files

from kdclimb.analysis.figures import ARM_STYLE
from kdclimb.analysis.report.parts import ARM_NAMES, Page

# What the script reads.
DRAWN_FROM = (
    "traces curves runs screen teachers isolates profile trend break_even horizon_curve run_pages claims".split()
)
DIGITS = 6  # significant: as fine as anything that is read off a chart


@cache
def asset(name: str) -> str:
    return (files("kdclimb.analysis.report") / name).read_text(encoding="utf-8")


@cache
def plotly() -> str:
    """plotly.js, as the installed plotly package brings it. Nothing else of that package is used."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def document(page: Page, sections: list[str], so_far: str = "") -> str:
    """The whole HTML file. `so_far` says how far an unfinished campaign is, and goes to the top."""
    note = f'<p class="sofar"><b>So far.</b> {escape(so_far)}</p>' if so_far else ""
    return html(f"kdclimb: {page.campaign}", f"campaign {page.campaign}", note + "\n".join(sections), data_of(page))


def html(title: str, subtitle: str, body: str, data: dict | None = None) -> str:
    """A page of ours: `body` is HTML, `data` what its script draws from; without it, there is no script."""
    allowed, scripts = "'none'", ""
    if data is not None:
        script = asset("page.js")
        allowed = f"'{digest(script)}' '{digest(plotly())}'"
        carried = packed(json.dumps(data, separators=(",", ":"), allow_nan=False))
        scripts = SCRIPTS.format(data=carried, plotly=_packed_plotly(), script=script)
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; "
        "form-action 'none'"
    )
    return HTML.format(
        policy=policy,
        title=escape(title),
        subtitle=escape(subtitle),
        css=asset("page.css"),
        body=body,
        scripts=scripts,
    )


def digest(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@cache
def _packed_plotly() -> str:
    return packed(plotly())


def packed(text: str) -> str:
    """gzip in base64: letters, digits, + / = only, so that nothing in it can end the element that holds it."""
    return base64.b64encode(gzip.compress(text.encode(), 9, mtime=0)).decode()


def data_of(page: Page) -> dict:
    """What the script draws from: the tables by column, figures to DIGITS significant digits, and the runs' configs."""
    data = page.data
    names = {arm: {"name": name} for arm, name in ARM_NAMES.items()}
    for arm, (name, colour, dashes) in ARM_STYLE.items():
        names[arm] = {"name": names[arm]["name"] if arm == "screen" else name, "colour": colour, "dash": dashes}
    fixed = [row["value"] for row in data["headline"] or () if row["figure"] == "fixed_target"]
    return {
        "tables": {name: by_column(data[name]) for name in DRAWN_FROM if data.get(name)},
        "budget_ms": page.facts.get("budget_ms"),
        "modelled": (data["budget"] or {}).get("clock") == "modelled",
        "target": page.facts.get("target"),
        "fixed": fixed,
        "point": data["verdict"] and data["verdict"]["point"],
        "arms": names,
        "alts": page.alts,
        "folders": page.runs,
        "configs": configs(data["run_configs"] or []),
    }


def by_column(rows: list[dict]) -> dict[str, list]:
    return {column: [shown(row[column]) for row in rows] for column in rows[0]}


def shown(cell):
    """A cell as the page shows it."""
    if not isinstance(cell, float):
        return cell
    if not math.isfinite(cell):
        return None
    value = float(f"{cell:.{DIGITS}g}")
    return int(value) if value.is_integer() else value


def configs(rows: list[dict]) -> dict:
    """{keys, values, runs: {run id: [index of a value, or -1, for each key]}}: most values repeat."""
    keys = {row["key"]: i for i, row in enumerate({row["key"]: row for row in rows}.values())}
    values: dict[str, int] = {}
    runs: dict[str, list[int]] = {}
    for row in rows:
        found = runs.setdefault(row["run_id"], [-1] * len(keys))
        found[keys[row["key"]]] = values.setdefault(row["value"], len(values))
    return {"keys": list(keys), "values": list(values), "runs": runs}


HTML = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<a class="skip" href="#report">Skip to the report</a>
<main id="report">
<h1>Does distillation pay? <small>{subtitle}</small></h1>
<nav class="js" id="contents" aria-label="Sections"></nav>
{body}
</main>
<main id="runs-page" hidden></main>
<div id="chosen" class="js" role="status" hidden></div>
{scripts}
</body>
</html>
"""
SCRIPTS = """<script type="text/plain" id="data">{data}</script>
<script type="text/plain" id="plotly">{plotly}</script>
<script>{script}</script>"""
