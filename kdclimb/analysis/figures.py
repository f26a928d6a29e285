"""The figures of a campaign, drawn from its tables: nothing is computed here.

Each figure is written as PNG and SVG, and returned as SVG for the report. The colours below are those
of the light page; in the report's SVG they become CSS variables, so that the page can go dark.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from matplotlib.transforms import Bbox

from kdclimb.analysis import charts
from kdclimb.analysis.styles import ARM_STYLE, COLOURS, RC, SIZE, legend
from kdclimb.analysis.tables import show_ms
from kdclimb.artifacts import write_text, write_via

FIRST_VALIDATIONS = 8
AROUND = (  # a point: where its name may be, (x, y) of the way there and the name's alignment
    (0, 1, "center", "bottom"),
    (0, -1, "center", "top"),
    (-1, 0, "right", "center"),
    (1, 0, "left", "center"),
    (-1, 1, "right", "bottom"),
    (1, 1, "left", "bottom"),
    (-1, -1, "right", "top"),
    (1, -1, "left", "top"),
)


def draw(folder: Path, data: dict, names: Iterable[str] | None = None) -> dict[str, str]:
    """Draw all figures of a campaign, or those of these names, into `folder` from the tables and decisions in `data`.

    Returns {name: SVG for the report}, where the SVG is empty for a figure with nothing to show.
    """
    horizon = max((row["horizon"] for row in data["curves"] or () if row["arm"] == "ce"), default=0)
    target, point = (data["target"] or {}).get("value"), (data["verdict"] or {}).get("point")
    drawings = {
        "val_loss_steps": lambda axes: _curves(axes, data, "step", horizon, target),
        "val_loss_time": lambda axes: _curves(axes, data, "train_time_ms", horizon, target),
        "steps_saved_trend": lambda axes: _trend(axes, data["trend"] or [], target, point),
        "kd_alive": lambda axes: _alive(axes, data["curves"] or [], data["screen"] or [], point),
        "teachers": lambda axes: bool(data["budget"]) and _teachers(axes, data["teachers"] or [], data["budget"]),
        "isolates": lambda axes: _isolates(axes, data["isolates"] or []),
        "step_parts": lambda axes: charts.step_parts(axes, data["profile"]),
        "step_deltas": lambda axes: charts.by_step(axes, data, "step_ms", horizon),
        "lr_phases": lambda axes: charts.by_step(axes, data, "lr_mult", horizon),
        "horizon_curve": lambda axes: charts.horizons(axes, data["horizon_curve"], target),
        "break_even": lambda axes: charts.break_even(axes, data["break_even"]),
        "sweep_parallel": lambda axes: charts.sweep_parallel(axes, data["screen"]),
        "sweep_knobs": lambda axes: _several(axes, lambda figure: charts.sweep_knobs(figure, data["screen"], point)),
    }
    asked = [*drawings] if names is None else names
    drawings |= {
        "claims": lambda axes: charts.claims(axes, data["claims"], "val_delta", 0),
        "claim_times": lambda axes: charts.claims(axes, data["claims"], "time_ratio", 1),
    }
    with matplotlib.rc_context(RC):
        return {name: _render(folder, name, drawings[name]) for name in asked}


def _several(axes: Axes, drawing) -> bool:
    """A figure of several plots, in place of the one that there is."""
    drawn = drawing(axes.figure)
    if drawn:
        axes.remove()
    return drawn


def _render(folder: Path, name: str, drawing) -> str:
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot()
    drawn = drawing(axes)
    if not drawn:
        axes.clear()
        axes.axis("off")
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color=COLOURS["muted"], fontsize=14)
    png, svg = io.BytesIO(), io.BytesIO()
    figure.savefig(png, format="png", dpi=160, metadata={"Software": None})
    with matplotlib.rc_context({"svg.hashsalt": name}):  # or ids would differ from one drawing to the next
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    write_via(folder / f"{name}.png", lambda temporary: temporary.write_bytes(png.getvalue()))
    write_text(folder / f"{name}.svg", svg.getvalue().decode())
    return _inline(name, svg.getvalue().decode()) if drawn else ""


def _inline(name: str, svg: str) -> str:
    """The SVG element alone: scalable, transparent, colours as CSS variables, ids that are unique in the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for key, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--fig-{key})")
    return svg.replace("fill: #ffffff", "fill: none").replace(
        "<svg ", f'<svg role="img" aria-label="{name.replace("_", " ")}" ', 1
    )


def _by_run(rows: list[dict]) -> dict[tuple, list[dict]]:
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        runs.setdefault((row["arm"], row["label"], row["run_id"]), []).append(row)
    return runs


def _line(axes: Axes, rows: list[dict], x: str, **style) -> None:
    scale = 1000 if x.endswith("_ms") else 1
    rows = [row for row in rows if row[x] is not None]  # an old log has no times
    axes.plot([row[x] / scale for row in rows], [row["val_loss"] for row in rows], linewidth=1.5, **style)


def _curves(axes: Axes, data: dict, x: str, horizon: int, target: float | None) -> bool:
    """Validation loss of CE, KD and the boost control at the full horizon; KD again with its teacher's time."""
    timed, modelled = x != "step", (data["budget"] or {}).get("clock") == "modelled"
    stops = {row["run_id"]: row["kd_stop_step"] for row in data["runs"] or ()}
    rows = [row for row in data["curves"] or () if row["horizon"] == horizon and row["step"] > 0]
    groups = {key: group for key, group in _by_run(rows).items() if key[0] in ("ce", "kd", "control_boost", "log")}
    several = len({label for arm, label, _ in groups if arm == "kd"}) > 1
    for (arm, label, run_id), group in groups.items():
        name, colour, dashes = ARM_STYLE[arm]
        name = f"{name} {label}" if several and arm != "ce" else name
        _line(axes, group, x, color=COLOURS[colour], linestyle=dashes, label=name)
        if timed and arm == "kd":
            style = {"color": COLOURS["kd"], "linestyle": ":", "label": "KD, teacher's time added"}
            _line(axes, group, "time_with_teacher_ms", **style)
        for row in group if arm == "kd" else ():
            if row["step"] == stops.get(run_id):
                place = [row[x] / 1000 if timed else row[x]], [row["val_loss"]]
                axes.plot(*place, "o", color=COLOURS["kd"], markersize=5, label="KD stops", linestyle="none")
    if target is not None:
        axes.axhline(target, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 2)), label="target")
    axes.set_xlabel(f"{'modelled ' if modelled else ''}training time (s)" if timed else "step")
    axes.set_ylabel("validation loss (nats)")
    if groups:
        legend(axes)
    return bool(groups)


def _trend(axes: Axes, trend: list[dict], target: float | None, point: str | None) -> bool:
    """Steps saved at CE's losses, from its first to its last; where KD never stood at one, the line has a gap."""
    rows = [row for row in trend if row["label"] == point]
    for seed, dashes in zip(dict.fromkeys(row["seed"] for row in rows), cycle(("-", "--", ":", "-."))):
        mine = [row for row in rows if row["seed"] == seed]
        saved = [float("nan") if row["steps_saved"] is None else row["steps_saved"] for row in mine]
        style = {"color": COLOURS["kd"], "linestyle": dashes, "marker": "o", "markersize": 3, "linewidth": 1.5}
        axes.plot([row["val_loss"] for row in mine], saved, label=f"seed {seed}", **style)
    axes.axhline(0, color=COLOURS["muted"], linewidth=1)
    if target is not None:
        axes.axvline(target, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 2)), label="target")
    axes.invert_xaxis()
    axes.set_xlabel("validation loss (nats)")
    axes.set_ylabel("steps saved")
    if rows:
        legend(axes)
    return bool(rows)


def _alive(axes: Axes, curves: list[dict], screen: list[dict], point: str | None) -> bool:
    """The first validations at the screen's horizon and seed: the promoted point, CE and the random teacher."""
    start = next((row["run_id"] for row in screen if row["label"] == point), None)
    kd = [row for row in curves if row["arm"] == "screen" and row["run_id"] == start]
    if not kd:
        return False
    place = (kd[0]["horizon"], kd[0]["seed"])
    for arm, marker in (("control_random", "s"), ("ce", "^"), ("screen", "o")):
        rows = [
            row for row in curves if row["arm"] == arm and (row["horizon"], row["seed"]) == place and row["step"] > 0
        ]
        rows = [row for row in rows if arm == "ce" or row["label"] == point][:FIRST_VALIDATIONS]
        name, colour, dashes = ARM_STYLE[arm]
        if rows:
            _line(axes, rows, "step", color=COLOURS[colour], linestyle=dashes, marker=marker, markersize=5, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss (nats)")
    legend(axes)
    return True


def _teachers(axes: Axes, teachers: list[dict], budget: dict) -> bool:
    """Each trained candidate's time and loss; those turned away on their projected time lie on the axis."""
    if not teachers:
        return False
    styles = {
        "selected": ("o", COLOURS["kd"], 9),
        "survivor": ("o", COLOURS["ce"], 7),
        "rejected": ("x", COLOURS["muted"], 7),
    }
    trained = [row for row in teachers if row["final_val"] is not None and row["train_time_ms"] is not None]
    for row in trained:
        marker, colour, size = styles[row["verdict"]]
        x, y = row["train_time_ms"] / 1000, row["final_val"]
        name = row["verdict"] + (", imported" if row["imported"] else "")
        fill = {"markerfacecolor": "none"} if row["imported"] else {}
        axes.plot([x], [y], marker, color=colour, markersize=size, label=name, linestyle="none", **fill)
    projected = [
        row["projected_ms"] / 1000 for row in teachers if row not in trained and row["projected_ms"] is not None
    ]
    if projected:
        style = {"color": COLOURS["muted"], "markersize": 6, "linestyle": "none", "markerfacecolor": "none"}
        across = axes.get_xaxis_transform()
        axes.plot(projected, [0.03] * len(projected), "v", transform=across, label="projected only", **style)
    axes.axvline(budget["budget_ms"] / 1000, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 2)), label="budget")
    axes.set_xscale("log")  # a candidate may be projected at many times the budget
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15, y=0.2)
    axes.set_xlabel("teacher training time (s)")
    axes.set_ylabel("final validation loss (nats)")
    if not trained:
        axes.set_yticks([])
    legend(axes, bbox_to_anchor=(0, 1.0), loc="lower left", ncols=3)
    named = [row for row in trained if row["verdict"] == "selected" or len(trained) <= 8]
    named.sort(key=lambda row: row["verdict"] != "selected")  # where there is no room, it has the first choice
    _name_points(axes, [(row["candidate"], row["train_time_ms"] / 1000, row["final_val"]) for row in named])
    return True


def _name_points(axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Names beside their points (name, x, y), each as near as it meets no other name, no point and no end of the axes.

    One that finds no such place is left out: a table holds it.
    """
    axes.figure.draw_without_rendering()  # so that the axes have their place
    inside, pixels = axes.get_window_extent(), axes.figure.dpi / 72
    middles = axes.transData.transform([point[1:] for point in points])
    taken = [Bbox.from_extents(*(middle - 5 * pixels), *(middle + 5 * pixels)) for middle in middles]
    near = {"textcoords": "offset points", "fontsize": 8, "color": COLOURS["ink"], "in_layout": False}
    line = {"arrowstyle": "-", "color": COLOURS["muted"], "linewidth": 0.5}
    for name, *point in points:
        for far, (right, up, ha, va) in itertools.product((8, 20, 32, 44, 56), AROUND):
            place = far * right, far * up
            text = axes.annotate(name, point, xytext=place, ha=ha, va=va, **near)
            box = text.get_window_extent()
            within = inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1)
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                if far > 8:
                    axes.annotate("", point, xytext=place, textcoords="offset points", arrowprops=line, in_layout=False)
                break
            text.remove()


def _isolates(axes: Axes, isolates: list[dict]) -> bool:
    """Median step time of each isolate, the first on top, with its ratio to CE."""
    rows = [row for row in isolates if row["step_ms_median"] is not None]
    if not rows:
        return False
    times = [row["step_ms_median"] for row in rows]
    colours, hatches = ("ce", "random", "kd", "boost", "muted"), ("", "///", "xxx", "...", "---")
    for i in sorted(range(len(rows)), key=lambda i: -times[i]):  # each holds all above it: a stack
        style = {"color": COLOURS[colours[i % 5]], "hatch": hatches[i % 5], "edgecolor": "white", "linewidth": 0}
        holding = [i, *(j for j in range(i + 1, len(rows)) if times[j] >= times[i])]
        axes.barh(holding, times[i], height=0.5, **style)
    bars = axes.barh(range(len(rows)), times, color="none", height=0.5)
    axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
    texts = []
    for row in rows:
        ratio = "" if row["ratio_to_ce"] is None else f"  ({row['ratio_to_ce']:.2f}x CE)"
        texts.append(f"{show_ms(row['step_ms_median'])}{ratio}")
    axes.bar_label(bars, texts, padding=4, color=COLOURS["ink"])
    axes.set_xlim(0, 1.6 * max(times))  # room for the labels
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("median step (ms)")
    return True
