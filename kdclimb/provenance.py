"""What a run ran on and from: code hash, versions, device."""

from __future__ import annotations

import ast
import hashlib
import platform
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def source_hash(entry: str) -> str:
    """12 hex digits over `entry` (a path from the project folder, such as workflow/scripts/train.py) and every
    kdclimb module that it imports, directly or not, inside functions too. Blind to comments, docstrings and
    layout, so that editing those reruns nothing; and to the Python that asks, so that results of 3.11 count as made by
    the same code under 3.12.
    """
    closure: set[Path] = set()
    todo = [ROOT / entry]
    while todo:
        path = todo.pop()
        if path not in closure:
            closure.add(path)
            todo += _read(path)[1]
    digest = hashlib.sha256()
    for path in sorted(closure):
        digest.update(f"{path.relative_to(ROOT)}\n{_read(path)[0]}\n".encode())
    return digest.hexdigest()[:12]


@cache
def _read(path: Path) -> tuple[str, tuple[Path, ...]]:
    """The code of a file without comments and docstrings, and the files of ours that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    imports: set[Path] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                imports |= _modules(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                imports |= _modules(f"{node.module}.{alias.name}")
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return _text(tree), tuple(sorted(imports))


def _text(node: object) -> str:
    """A syntax tree as text, the same from each Python.

    ast.unparse quotes f-strings otherwise from 3.12 on, ast.dump shows fields that a version has added, and 3.12 ends
    some f-strings with an empty text.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return ascii(node)
    fields = {name: getattr(node, name, None) for name in node._fields}
    if isinstance(node, ast.JoinedStr):
        fields["values"] = [part for part in node.values if not (isinstance(part, ast.Constant) and part.value == "")]
    held = [f"{name}={_text(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"{type(node).__name__}({', '.join(held)})"


def _modules(name: str) -> set[Path]:
    """The files that importing the dotted `name` runs: its packages' __init__ and the module itself."""
    parts = name.split(".")
    if parts[0] != "kdclimb":
        return set()
    files = set()
    for end in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:end])
        files |= {f for f in (base / "__init__.py", base.with_suffix(".py")) if f.is_file()}
    return files


def git_commit() -> str:
    """The commit, with -dirty if tracked files differ from it; "unknown" outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return "unknown"
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def device_kind(device: str) -> str:
    """The GPU's name, or "cpu " and the processor's."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"cpu {names[0] if names else platform.machine()}"


def device_identity(device: str) -> str:
    """What tells this device from the others of its machine: a GPU's UUID, for a node may have several of one kind."""
    if device == "cuda":
        import torch

        return f"{device_kind(device)} {torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    return device_kind(device)


def versions() -> dict[str, str]:
    import torch

    return {"python": platform.python_version(), "torch": torch.__version__, "kdclimb_commit": git_commit()}
