"""Config files, read so that they can hold nothing but keys and values, and merged as Snakemake merges them.

Snakemake itself reads a file as a template if it asks for that (`__use_yte__`), and a template runs what it holds. So
./run has every file read here first: python -m kdclimb.configfiles FILE...

No torch and no snakemake.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

from kdclimb.config import ConfigError

DEFAULTS = Path(__file__).resolve().parent.parent / "config/config.yaml"
LARGEST = 2**20  # bytes of a file
MOST_VALUES = 100_000  # in a file, once its aliases are written out
MOST_DIGITS = 100  # of a number; Python refuses to print one of thousands


def read_config(overlays: Iterable[Path]) -> dict:
    """config/config.yaml with overlays merged over it as Snakemake merges them; nothing is validated.

    Raises ConfigError, see `read_file`.
    """
    over: dict = {}  # Snakemake merges the overlays with each other first
    for path in overlays:
        over = merge(over, read_file(path))
    return merge(read_file(DEFAULTS), over)


def merge(config, over: dict) -> dict:
    """A new dict: `config` with `over` on top, sections key by key, all else replaced."""
    merged = dict(config) if isinstance(config, dict) else {}
    for key, new in over.items():
        merged[key] = merge(merged.get(key, {}), new) if isinstance(new, dict) else new
    return merged


def read_file(path: Path) -> dict:
    """A file's keys and values: JSON if it is, else YAML, as for Snakemake.

    Raises ConfigError that names the file, if it can't be read, is neither, has no keys at its top level or one twice,
    is a template, or is larger than any config.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
        _refuse(len(content) > LARGEST, f"is larger than {LARGEST:,} bytes, and so no config")
        config = _parse(content.decode())
        _refuse(not isinstance(config, dict), "holds no keys at its top level")
        _refuse("__use_yte__" in config, "is a template (__use_yte__), which could run anything")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply, or holds itself") from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def _refuse(condition: bool, why: str) -> None:
    if condition:
        raise ValueError(why)


def _parse(text: str):
    """What the text holds. Raises ValueError and RecursionError."""
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_int=_int)
    except json.JSONDecodeError:
        _check_nodes(yaml.compose(text, yaml.SafeLoader))
        return yaml.safe_load(text)


def _unique(pairs: list[tuple]) -> dict:
    found = {}
    for key, value in pairs:
        _refuse(key in found, f"{key} is there twice")
        found[key] = value
    return found


def _int(text: str) -> int:
    _refuse(len(text) > MOST_DIGITS, f"{text[:10]}... is a number of {len(text):,} digits")
    return int(text)


def _check_nodes(root: yaml.Node | None) -> None:
    """Raise ValueError for a key that a mapping has twice, for a number or for aliases that make too much of it."""
    counted: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        """Values in a node, once its aliases are written out."""
        if id(node) not in counted:
            parts = []
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            elif node.tag == "tag:yaml.org,2002:int":
                _int(node.value)
            counted[id(node)] = 1 + sum(count(part) for part in parts)
        return counted[id(node)]

    _refuse(root is not None and count(root) > MOST_VALUES, f"holds more than {MOST_VALUES:,} values, by its aliases")


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        _refuse(name in seen, f"line {key.start_mark.line + 1}: {key.value} is there twice")
        seen.add(name)


if __name__ == "__main__":
    try:
        for name in sys.argv[1:]:
            read_file(Path(name))
    except ConfigError as error:
        sys.exit(f"kdclimb: error: {error}")
