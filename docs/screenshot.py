"""The README's picture of a report.

python docs/screenshot.py results/default/report/index.html docs/records/default/report.png

Needs the packages of requirements-dev.txt and Chromium (apt install chromium). --width 390 is a phone, --dark its
night; --height 0 takes the whole page.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright


def shoot(report: Path, out: Path, width: int, height: int, dark: bool) -> None:
    """Write `out`, a PNG of the top `height` CSS pixels of the report, its charts drawn; all of it where that is 0."""
    with sync_playwright() as playwright:
        options = {"executable_path": shutil.which("chromium"), "chromium_sandbox": os.getuid() != 0}
        browser = playwright.chromium.launch(**options)
        size = {"width": width, "height": height or 900}
        page = browser.new_page(viewport=size, color_scheme="dark" if dark else "light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        for event in ("beforeprint", "afterprint"):  # which draws the charts that are out of sight too
            page.evaluate(f"dispatchEvent(new Event('{event}'))")
        page.wait_for_function("document.querySelectorAll('.drawn .main-svg').length > 0")
        page.wait_for_timeout(1000)  # for the last of them to settle
        page.screenshot(path=out, full_page=height == 0)
        browser.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1300)
    parser.add_argument("--dark", action="store_true")
    args = parser.parse_args()
    if shutil.which("chromium") is None:
        print("Chromium is needed: apt install chromium", file=sys.stderr)
        return 1
    shoot(**vars(args))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
