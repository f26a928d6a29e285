"""The figures of steps, horizons, break-even and the sweep, in the style of figures.py. Nothing is computed here."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from kdclimb.analysis.styles import ARM_STYLE, COLOURS, legend

OUTCOMES = (
    "rank label run_id status reason miss_reason steps_to_target final_val best_val stability first_val kd_stop_step "
    "kd_share_mean"
).split()  # of screen.csv; all its other columns are knobs
PART_COLOURS = ("muted", "random", "ce", "kd", "boost", "ink")
PART_HATCHES = ("", "///", "xxx", "...", "---", "\\\\\\", "+++")
BY_STEP = {"step_ms": "median step (ms)", "lr_mult": "LR multiplier"}


def by_step(axes: Axes, data: dict, column: str, horizon: int) -> bool:
    """A column of the traces over steps, for CE and KD at `horizon`, one line a seed."""
    runs = {r["run_id"]: r for r in data["runs"] or () if r["arm"] in ("kd", "ce") and r["horizon"] == horizon}
    drawn = False
    for arm in ("ce", "kd"):
        name, colour, _ = ARM_STYLE[arm]
        dashes = "--" if arm == "ce" else "-"  # they cross too often to be told apart by colour alone
        for run_id in (run_id for run_id, run in runs.items() if run["arm"] == arm):
            rows = [r for r in data["traces"] or () if r["run_id"] == run_id and r[column] is not None]
            place = [r["step"] for r in rows], [r[column] for r in rows]
            axes.plot(*place, color=COLOURS[colour], linestyle=dashes, linewidth=1.3, label=name)
            drawn = drawn or bool(rows)
    axes.set_xlabel("step")
    axes.set_ylabel(BY_STEP[column])
    if drawn:
        legend(axes)
    return drawn


def horizons(axes: Axes, rows: list[dict] | None, target: float | None) -> bool:
    """Final losses by horizon: a point a seed, the fit through the means, and the interval."""
    for arm, label in dict.fromkeys((row["arm"], row["label"]) for row in rows or ()):
        name, colour, _ = ARM_STYLE[arm]
        mine = [row for row in rows if (row["arm"], row["label"]) == (arm, label)]
        seeds, means = [r for r in mine if r["seed"] is not None], [r for r in mine if r["seed"] is None]
        style = {"color": COLOURS[colour]}
        points = {"linestyle": "none", "marker": "o", "markersize": 4, "alpha": 0.6, "label": None if means else name}
        axes.plot([r["horizon"] for r in seeds], [r["final_val"] for r in seeds], **points, **style)
        axes.plot([r["horizon"] for r in means], [r["fitted"] for r in means], linewidth=1.5, label=name, **style)
        known = [r for r in means if r["low"] is not None]
        edges = [[r[key] for r in known] for key in ("low", "high")]
        axes.fill_between([r["horizon"] for r in known], *edges, alpha=0.15, linewidth=0, **style)
    if not rows:
        return False
    if target is not None:
        axes.axhline(target, color=COLOURS["muted"], linewidth=1, linestyle=(0, (4, 2)), label="target")
    axes.set_xscale("log")
    places = sorted({row["horizon"] for row in rows})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("horizon (steps, complete)")
    axes.set_ylabel("final validation loss (nats)")
    legend(axes)
    return True


def break_even(axes: Axes, rows: list[dict] | None) -> bool:
    """By target, the share of CE's tokens that KD must save, and the one measured with its interval."""
    rows = [row for row in rows or () if row["needed"] is not None or row["measured"] is not None]
    for i, row in enumerate(rows):
        low, high, kd = row["measured_low"], row["measured_high"], COLOURS["kd"]
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [i, i], color=kd, linewidth=2, alpha=0.5, label="its interval")
        points = ("measured", "o", kd, "measured"), ("needed", "D", COLOURS["ink"], "needed")
        for key, marker, colour, name in (*points, ("needed_amortized", "d", "none", "needed if shared")):
            if row[key] is not None:
                style = {"color": colour, "markeredgecolor": COLOURS["ink"] if key != "measured" else kd}
                axes.plot([100 * row[key]], [i], marker, linestyle="none", label=name, **style)
    if not rows:
        return False
    axes.axvline(0, color=COLOURS["muted"], linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['target_value']:.4f}" for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("share of CE's tokens saved (%)")
    axes.set_ylabel("target (nats)")
    legend(axes, bbox_to_anchor=(0, 1.0), loc="lower left", ncols=2)
    return True


def step_parts(axes: Axes, rows: list[dict] | None) -> bool:
    """Where the time of each isolate's step goes: the medians of its parts, one behind the other."""
    labels = list(dict.fromkeys(row["label"] for row in rows or ()))
    ends = dict.fromkeys(labels, 0.0)
    for i, part in enumerate(dict.fromkeys(row["part"] for row in rows or ())):
        mine = [row for row in rows if row["part"] == part]
        style = {"color": COLOURS[PART_COLOURS[i % 6]], "hatch": PART_HATCHES[i % 7], "edgecolor": "white"}
        style |= {"height": 0.5, "linewidth": 0, "label": part}
        places, widths = [labels.index(row["label"]) for row in mine], [row["ms_median"] for row in mine]
        axes.barh(places, widths, left=[ends[row["label"]] for row in mine], **style)
        for row in mine:
            ends[row["label"]] += row["ms_median"]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("median of the step's part (ms)")
    if labels:
        legend(axes, bbox_to_anchor=(1, 1.0), loc="lower right", ncols=3)
    return bool(labels)


CLAIM_COLUMNS = {
    "val_delta": "nats against the other run, less is better",
    "time_ratio": "time, as a multiple of the other's",
}


def claims(axes: Axes, rows: list[dict], column: str, level: float) -> bool:
    """A column of the matched claims, one a line, about the `level` at which the two runs are alike."""
    rows = [row for row in rows if row[column] is not None]
    for i, row in enumerate(rows):
        if column == "val_delta" and row["noise"] is not None:
            style = {"color": COLOURS["muted"], "alpha": 0.25, "label": "two runs of the same thing"}
            axes.barh([i], [2 * row["noise"]], left=[-row["noise"]], height=0.8, linewidth=0, **style)
        axes.plot([row[column]], [i], "o", color=COLOURS["kd"])
    axes.axvline(level, color=COLOURS["muted"], linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row['run_id']}\nagainst {row['against']}" for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(CLAIM_COLUMNS[column])
    return bool(rows)


def knobs_of(screen: list[dict] | None) -> list[str]:
    """The columns of screen.csv that the grid varies."""
    rows = screen or []
    columns = [column for column in (rows[0] if rows else ()) if column not in OUTCOMES]
    return [column for column in columns if len({row[column] for row in rows if row[column] is not None}) > 1]


def short(column: str) -> str:
    return column.removeprefix("lr_").replace("_", " ")


def sweep_parallel(axes: Axes, screen: list[dict] | None) -> bool:
    """One line a point over its knobs and what came of it; each axis runs from its lowest to its highest value."""
    rows, knobs = [row for row in screen or () if row["final_val"] is not None], knobs_of(screen)
    if not rows or not knobs:
        return False
    columns = [*knobs, "first_val", "final_val"]
    limits = {c: [f(r[c] for r in rows if r[c] is not None) for f in (min, max)] for c in columns}
    for row in sorted(rows, key=lambda row: -row["rank"]):
        places = [_place(row[c], *limits[c]) for c in columns]
        first = row["rank"] == 1
        style = {"color": COLOURS["kd" if first else "muted"], "linewidth": 3 if first else 1}
        axes.plot(range(len(columns)), places, alpha=1 if first else 0.7, marker="o", markersize=4, **style)
    for i, column in enumerate(columns):
        axes.text(i, 1.04, f"{limits[column][1]:.5g}", ha="center", fontsize=8)
        axes.text(i, -0.05, f"{limits[column][0]:.5g}", ha="center", va="top", fontsize=8)
    axes.set_xticks(range(len(columns)), [short(column) for column in columns], fontsize=8)
    axes.tick_params(axis="x", pad=12)
    axes.set_yticks([])
    axes.set_ylim(-0.06, 1.12)
    axes.spines[["left", "bottom"]].set_visible(False)
    return True


def _place(value: float | None, low: float, high: float) -> float:
    return float("nan") if value is None else 0.5 if low == high else (value - low) / (high - low)


def sweep_knobs(figure: Figure, screen: list[dict] | None, point: str | None) -> bool:
    """A small plot for each knob: its values against the final loss, on one scale."""
    rows, knobs = [row for row in screen or () if row["final_val"] is not None], knobs_of(screen)
    if not rows or not knobs:
        return False
    for i, (axes, knob) in enumerate(zip(figure.subplots(1, len(knobs), sharey=True, squeeze=False)[0], knobs)):
        for row in (row for row in rows if row[knob] is not None):
            fill = {} if row["label"] == point else {"markerfacecolor": "none"}
            axes.plot([row[knob]], [row["final_val"]], "o", color=COLOURS["kd"], **fill)
        values = sorted({row[knob] for row in rows if row[knob] is not None})
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.margins(x=0.3)
        axes.set_xlabel(short(knob))
        axes.set_ylabel("final validation loss (nats)" if i == 0 else "")
    return True
