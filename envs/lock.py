"""Make envs/locked.txt and envs/locked-dev.txt: the pins of requirements*.txt with the sha256 of what pip may install.

One wheel for each Python and processor below, else the source. torch is left out: docs/RELIABILITY.md says why. Needs
the network and pip 22.2 or newer; downloads little, since the index knows the hashes.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12")
MACHINES = ("x86_64", "aarch64")
GLIBCS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014",
          "manylinux_2_12", "manylinux_2_5", "linux")  # fmt: skip
LOCKS = {"requirements.txt": "locked.txt", "requirements-dev.txt": "locked-dev.txt"}


def pins(name: str) -> list[str]:
    """The pins of a requirements file, less torch."""
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if re.match(r"(?!torch==)[a-z]", line)]


def hashes(wanted: list[str], python: str, machine: str) -> list[str]:
    """The sha256 of the file that pip takes for each pin, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        platforms = [f"--platform={glibc}_{machine}" for glibc in GLIBCS]
        options = ["-q", "--dry-run", "--ignore-installed", "--no-deps", f"--target={folder}", f"--report={report}"]
        command = [sys.executable, "-m", "pip", "install", *options, f"--python-version={python}", *platforms, *wanted]
        subprocess.run(command, check=True)
        found = {}
        for entry in json.loads(report.read_text())["install"]:
            name = normalized(entry["metadata"]["name"])
            found[name] = entry["download_info"]["archive_info"]["hashes"]["sha256"]
    return [found[normalized(re.split(r"[\[=]", pin)[0])] for pin in wanted]


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    for source, lock in LOCKS.items():
        wanted = pins(source)
        columns = [hashes(wanted, *pair) for pair in itertools.product(PYTHONS, MACHINES)]
        text = f"# {source} with hashes, less torch; made by envs/lock.py\n"
        for pin, *found in zip(wanted, *columns, strict=True):
            text += " \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in sorted(set(found)))]) + "\n"
        (ROOT / "envs" / lock).write_text(text)
