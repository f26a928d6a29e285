"""Reading that says what it waits for: a network mount that is dead gives neither data nor an error, for as long as
the server is away. No one is stopped for it: what comes back goes on where it was.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO

EVERY = 30.0  # seconds between two looks; a wait is said once it is as long
BUFFER = 2**20  # bytes

_waits: dict[object, tuple[object, float]] = {}  # what is waited for, and since when


@contextmanager
def waiting(what: object) -> Iterator[None]:
    """Say `what` (a file, or a key of the config) on stderr, again and again, while the block takes longer than EVERY.

    For blocks that are short where the disk answers, and that wait without the GIL.
    """
    _watch()
    key = object()
    _waits[key] = what, time.monotonic()
    try:
        yield
    finally:
        del _waits[key]


@cache
def _watch() -> None:
    threading.Thread(target=_look, name="waiting", daemon=True).start()


def _look() -> None:
    while True:
        time.sleep(EVERY)
        for what, since in list(_waits.values()):
            if (waited := time.monotonic() - since) >= EVERY:
                said = f"{what}: no answer for {waited:.0f} s; still waiting. Is its disk or network mount there?"
                print(f"kdclimb: {said}", file=sys.stderr, flush=True)


class _Watched(io.FileIO):
    def readinto(self, buffer) -> int | None:
        with waiting(self.name):
            return super().readinto(buffer)


def open_watched(path: Path) -> BinaryIO:
    """The file, opened to be read by blocks, each of which is waited for aloud."""
    with waiting(path):
        return io.BufferedReader(_Watched(path), BUFFER)
