"""The one style of all figures. In the report's SVG the colours become CSS variables, so that the page can go dark."""

from __future__ import annotations

from matplotlib.axes import Axes

# Blue, vermilion, green and violet stay apart under the common colour deficiencies; line styles repeat them.
COLOURS = {
    "ink": "#20242b",
    "muted": "#6a717d",
    "grid": "#dfe3e8",
    "ce": "#1f6fb4",
    "kd": "#d5500b",
    "boost": "#0a8f6a",
    "random": "#8a5bb5",
}
ARM_STYLE = {  # arm: (name, colour, line style)
    "ce": ("CE", "ce", "-"),
    "kd": ("KD", "kd", "-"),
    "screen": ("KD", "kd", "-"),
    "ngram": ("KD from n-grams", "kd", ":"),
    "control_boost": ("CE, KD's LR", "boost", "--"),
    "control_tuned": ("CE, tuned", "ce", "--"),
    "control_random": ("KD, random teacher", "random", "-."),
    "control_smooth": ("CE, label smoothing", "muted", "--"),
    "control_batch": ("CE, smaller batches", "boost", ":"),
    "control_extra": ("CE, teacher's time in steps", "ink", ":"),
    "control_growth": ("CE, grown", "muted", ":"),
    "log": ("imported log", "muted", "-."),
}
SIZE = (5.4, 3.5)  # inches: as wide as a phone in CSS pixels, so that text keeps its size there
RC = {
    "font.size": 9.5,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.7,
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def legend(axes: Axes, **place) -> None:
    """One entry for each name, although several lines may carry it."""
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), **place)
