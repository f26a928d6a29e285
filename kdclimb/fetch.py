"""Ready token shards from the Hugging Face hub, for those who are online."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from pathlib import Path

from kdclimb.shards import count_tokens, document_lengths
from kdclimb.sources import PARTS


def fetch(shards: dict, vocab_size: int, root: Path) -> Iterator[tuple[Path, int]]:
    """Download what `data.shards` (as a dict) is to hold, and yield (path, tokens) of each shard, checked.

    The files of the hub's repository whose names match the globs go to the folders of these: all for validation, the
    first `hub.train_shards` for training. What is there and whole stays, what was cut off goes on. Raises ValueError
    that names the key or the file at fault.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HTTPError

    hub, folders = shards["hub"], {part: _folder(part, shards[part], root) for part in PARTS}
    where = {"repo_id": hub["repo"], "repo_type": "dataset", "revision": hub["revision"]}
    try:
        names = sorted(HfApi().list_repo_files(**where))
        for part in reversed(PARTS):  # validation first, since a campaign of any length needs it
            for name in _wanted(part, shards, names):
                path = Path(hf_hub_download(**where, filename=name, local_dir=folders[part]))
                yield path, _checked(path, shards["bos_id"], vocab_size)
    except (OSError, HTTPError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"data.shards.hub: {hub['repo']} at {hub['revision']}: {why}") from error


def _folder(part: str, pattern: str, root: Path) -> Path:
    folder = root / Path(pattern).parent
    if any(sign in str(Path(pattern).parent) for sign in "*?["):
        raise ValueError(f"data.shards.{part}: {pattern!r} names no one folder to download to")
    return folder


def _wanted(part: str, shards: dict, names: list[str]) -> list[str]:
    pattern, hub = Path(shards[part]).name, shards["hub"]
    found = fnmatch.filter(names, pattern)
    number = hub["train_shards"] if part == "train" else min(1, len(found))
    if not found or len(found) < number:
        held = f"{len(found)} of {number} such files" if found else "none"
        raise ValueError(f"data.shards.{part}: {hub['repo']} is to hold files like {pattern!r}, but has {held}")
    return found[:number] if part == "train" else found


def _checked(path: Path, bos: int, vocab_size: int) -> int:
    try:
        document_lengths(path, bos, vocab_size)
    except ValueError as error:
        raise ValueError(f"{error}; delete it to have it downloaded again") from error
    return count_tokens(path)
