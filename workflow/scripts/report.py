"""Render the report: one self-contained page, and its figures as PNG and SVG."""

from kdclimb.analysis import report
from kdclimb.analysis.tables import run_script

if __name__ == "__main__":
    raise SystemExit(run_script(__doc__, report.report, *report.INPUTS, "figures", "out", campaign=str))
