"""Read a checkpoint that torch pickled, in a process of its own: python -m kdclimb.unpickle FILE OUT.

The only place that reads a torch pickle, and only with weights_only=True, which builds tensors and plain values and
calls nothing else. Writes the model's tensors to OUT (safetensors) with what else the file says under the metadata key
`facts` (JSON). A file that can't be used ends it with one line on stderr and exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import pickletools
import re
import sys
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from kdclimb.artifacts import needs_room

REQUIRED = ("step", "code", "model", "best_val_loss", "kd_enabled", "kd_stop_step")
DROPPED = ("optimizer", "best_val_step")  # further entries of state_stepNNNNNN.pt
GLOBAL = re.compile(r"(?:GLOBAL|class|function) ([\w.]+)")  # in torch's error, the name that it refused
ZIP_START = b"PK\x03\x04"


def load(path: Path) -> dict:
    """The unpickled object. Raises ValueError that names the file, and what its pickle asks for."""
    try:
        zipped = zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path}: not a file that torch.save wrote, or damaged ({error})") from error
    if not zipped and path.open("rb").read(4) == ZIP_START:
        raise ValueError(f"{path}: cut off or damaged: it starts as a torch file, but its end is missing")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        asked = GLOBAL.search(str(error))
        name = asked[1] if asked else _stacked_global(path, zipped)
        if name is not None:
            raise ValueError(f"{path}: refused, and nothing of it was run: its pickle calls {name}") from error
        raise ValueError(f"{path}: not a file that torch.save wrote with its defaults, or damaged") from error
    except Exception as error:  # torch has errors of all kinds, failed assertions too, for what it did not write
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a file that torch.save wrote, or damaged ({reason})") from error


def _stacked_global(path: Path, zipped: bool) -> str | None:
    """The first name that a pickle of protocol 4 or 5 asks for, found without running it; torch names none there."""
    strings: list[str] = []
    try:
        if zipped:
            with zipfile.ZipFile(path) as archive:
                stream = archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        else:
            stream = path.read_bytes()
        for operand, argument, _ in pickletools.genops(stream):
            if operand.name == "STACK_GLOBAL" and strings[-2].split(".")[0] not in ("torch", "collections"):
                return ".".join(strings[-2:])
            strings += [argument] if isinstance(argument, str) else []
    except Exception:  # no pickle, or a zip file with another of zipfile's and zlib's many errors
        pass
    return None


def split(found, path: Path) -> tuple[dict, dict]:
    """(tensors of the model by name, facts: step, best_val_loss, kd_enabled, kd_stop_step, code's sha256)."""
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds a {type(found).__name__}, not the dict of a checkpoint")
    missing = [key for key in REQUIRED if key not in found]
    extra = sorted(str(key) for key in found if key not in (*REQUIRED, *DROPPED))
    if missing or extra:
        problems = [f"missing entry {key!r}" for key in missing] + [f"unknown entry {key!r}" for key in extra]
        raise ValueError(f"{path}: {'; '.join(problems)}; a checkpoint has {', '.join(REQUIRED)}")
    _check_types(found, path)
    for name, value in found["model"].items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: model entry {name!r} is a {type(value).__name__}, not a tensor")
        if not value.is_floating_point() or value.layout != torch.strided:
            raise ValueError(f"{path}: model entry {name!r} is {value.dtype} ({value.layout}), not dense floats")
        if not value.isfinite().all():
            raise ValueError(f"{path}: model entry {name!r} holds a value that is no finite number")
    facts = {key: found[key] for key in REQUIRED if key not in ("model", "code")}
    return found["model"], facts | {"code_sha256": hashlib.sha256(found["code"].encode()).hexdigest()}


def _check_types(found: dict, path: Path) -> None:
    number = (int, float)
    kinds = {
        "step": int,
        "code": str,
        "model": dict,
        "best_val_loss": (*number, type(None)),
        "kd_enabled": bool,
        "kd_stop_step": (int, type(None)),
    }
    for key, kind in kinds.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{path}: entry {key!r} is a {type(found[key]).__name__}, which it never is")


def main(path: Path, out: Path) -> None:
    tensors, facts = split(load(path), path)
    tensors = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    with needs_room(out):
        save_file(tensors, out, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError) as error:
        sys.exit(str(error))
