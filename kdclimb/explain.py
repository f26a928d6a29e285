"""What each key of a config means, from config/schema.yaml: config/README.md, and one key for the terminal.

No torch and no snakemake: the answer must not take longer than the question.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from kdclimb.campaign import schema, schema_path
from kdclimb.config import ConfigError

LONGEST_DEFAULT = 60  # characters in a cell; a longer one is read more easily where it is set
COLUMNS = ("key", "type and allowed values", "unit", "default", "the seed's name", "meaning")
INTRODUCTION = """\
# Every key of the config

Made from `schema.yaml` by `python -m kdclimb explain --write`; change it there. For one key in the terminal, with the
value that a config gives it: `.venv/bin/python -m kdclimb explain kd.stop_margin --configfile config/h100.yaml`.

**Overlays.** A campaign is `config.yaml` with files merged over it, in the order in which they are named:
`./run --configfile config/h100.yaml mine.yaml`. A file holds only the keys that it changes. Sections are merged key
by key; anything else, lists included, is replaced whole. What a config would run, before anything runs:
`.venv/bin/python -m kdclimb plan --configfile mine.yaml`.

**Mistakes.** The merged config is checked before any job starts. An unknown or missing key, or a value that is not
allowed, stops with one line that names the key, its value and what is allowed there:

```
{mistakes}
```

Some keys also bound each other, such as `train.max_doc_tokens` and `train.micro_batch_tokens`; the line then names
both.

**Locks.** Campaigns compare only if some things are the same in all of them. Another value is refused unless the
campaign says that it is exploratory, and then nothing from it is a claim:

{locks}

The student, its data and its schedule are locked in another way: each is set once, for all arms.

**The seed's name** is the environment variable of the seed's trainer that sets the same thing; a difference is in
brackets. Where it is empty the seed fixes the value in its code, or has nothing like it.
"""
KINDS = {"string": "text", "boolean": "true or false", "object": "section"}  # of values, in words
MISTAKES = (
    "kd.alpa: unknown key; allowed here: alpha, alpha_schedule, ...",
    "kd.alpha: 'x' is not allowed; allowed: a value of type number",
    "kd.alpha: this key is missing",
)


@dataclass(frozen=True)
class Key:
    """A key of the schema by its dotted name, where `[]` stands for each entry of a list; `spec` has no $ref."""

    name: str
    spec: dict

    @property
    def is_section(self) -> bool:
        return self.spec.get("type") == "object"

    @property
    def allowed(self) -> str:
        return allowed(self.spec)


def all_keys() -> list[Key]:
    """All keys in the schema's order, a section before what it holds."""
    return list(_walk(schema(), "", schema()["$defs"]))


def _walk(spec: dict, prefix: str, definitions: dict) -> Iterable[Key]:
    for name, part in spec["properties"].items():
        part = _resolved(part, definitions)
        yield Key(prefix + name, part)
        if part.get("type") == "object":
            yield from _walk(part, f"{prefix}{name}.", definitions)
        elif part.get("items", {}).get("type") == "object":
            yield from _walk(part["items"], f"{prefix}{name}[].", definitions)


def _resolved(spec: dict, definitions: dict) -> dict:
    """`spec` with its own $ref and that of its items replaced by what they stand for."""
    spec = dict(spec)
    if "$ref" in spec:
        spec = definitions[spec.pop("$ref").rsplit("/", 1)[1]] | spec
    if "items" in spec:
        spec["items"] = _resolved(spec["items"], definitions)
    return spec


def allowed(spec: dict) -> str:
    """Type and allowed values in words."""
    if "enum" in spec:
        return "one of " + ", ".join(map(str, spec["enum"]))
    if spec["type"] == "array":
        return _allowed_list(spec)
    if spec["type"] == ["array", "null"]:
        return f"null, or {_allowed_list(spec)}"
    types = spec["type"] if isinstance(spec["type"], list) else [spec["type"]]
    kind = " or ".join(KINDS.get(name, name) for name in types)
    limits = {
        "minimum": "at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
        "multipleOf": "a multiple of {}",
        "pattern": "matching {}",
    }
    return ", ".join([kind] + [text.format(spec[word]) for word, text in limits.items() if word in spec])


def _allowed_list(spec: dict) -> str:
    least, most = spec.get("minItems", 0), spec.get("maxItems")
    number = f"exactly {least}" if least == most else f"{least} or more"
    inner = "the keys below" if spec["items"]["type"] == "object" else allowed(spec["items"])
    return f"list, {number}, {'all different, ' if spec.get('uniqueItems') else ''}each: {inner}"


# ---- config/README.md ---------------------------------------------------------------------------


def readme_path() -> Path:
    return schema_path().with_name("README.md")


def readme() -> str:
    """The whole text of config/README.md."""
    everything = all_keys()
    locks = "\n".join(f"- `{key.name}`: {key.spec['lock']}" for key in everything if "lock" in key.spec)
    parts = [INTRODUCTION.format(mistakes="\n".join(MISTAKES), locks=locks)]
    single = [key for key in everything if "." not in key.name and not key.is_section]
    parts.append("## Top level\n\n" + _table(single))
    for section in (key for key in everything if "." not in key.name and key.is_section):
        inside = [key for key in everything if key.name.startswith(f"{section.name}.")]
        subsections = "".join(f"\n{_subsection(key)}" for key in inside if key.is_section)
        text = section.spec["description"] + ("\n" + subsections if subsections else "")
        parts.append(f"## `{section.name}`\n\n{_escaped(text)}\n\n" + _table(k for k in inside if not k.is_section))
    return "\n".join(parts)


def _subsection(key: Key) -> str:
    return f"- `{key.name}`: {key.spec['description']}"


def _table(rows: Iterable[Key]) -> str:
    lines = [_row(COLUMNS), _row(["---"] * len(COLUMNS))]
    return "\n".join(lines + [_row(_cells(key)) for key in rows]) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _cells(key: Key) -> list[str]:
    spec, default = key.spec, ""
    if "default" in spec:
        text = shown(spec["default"])
        long = len(text) > LONGEST_DEFAULT
        default = f"{len(spec['default'])} entries, in `config.yaml`" if long else f"`{text}`"
    meaning = spec["description"] + (f" Locked: {spec['lock']}." if "lock" in spec else "")
    kind, unit, seed = _escaped(key.allowed), _escaped(spec.get("unit", "")), _escaped(spec.get("seed", ""))
    return [f"`{key.name}`", kind, unit, default, seed, _escaped(meaning)]


def _escaped(text: str) -> str:
    """Text in which Markdown's emphasis and table cells don't start or end by accident."""
    return re.sub(r"([*|])", r"\\\1", text)


def shown(value) -> str:
    """A value on one line, as YAML has it."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("...\n").strip()


# ---- one key ------------------------------------------------------------------------------------


def explain(name: str, config: dict) -> str:
    """The text of one key, or the keys of a section, with the values in `config`.

    `name` is dotted; `[0]` or `[]` after a list may be left out; an empty name is the whole config. Raises ConfigError,
    with the nearest known keys, for an unknown one. `config` need not be valid: who asks may be mending it.
    """
    everything = all_keys()
    plain = re.sub(r"\[\d*\]", "", name)
    if not plain:
        return _listing([key for key in everything if "." not in key.name], config)
    found = next((key for key in everything if _plain(key) == plain), None)
    if found is None:
        raise ConfigError(f"{name}: unknown key; {_nearest(plain, everything)}")
    if found.is_section:
        inside = [key for key in everything if key.name.startswith(f"{found.name}.") and not key.is_section]
        return f"{found.name}: {found.spec['description']}\n\n{_listing(inside, config)}"
    return _entry(found, config)


def _plain(key: Key) -> str:
    return key.name.replace("[]", "")


def _nearest(name: str, everything: list[Key]) -> str:
    """Which keys are meant: those spelt alike, or whose last part is spelt like the last part of `name`."""
    names, last = [_plain(key) for key in everything], name.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(last, {n.rsplit(".", 1)[-1] for n in names}, n=1, cutoff=0.75)
    close = [n for n in names if n.rsplit(".", 1)[-1] in close]
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.75) + difflib.get_close_matches(name, close, 3, 0.0)
    if not found:
        return f"the top level has: {', '.join(n for n in names if '.' not in n)}"
    return f"nearest: {', '.join(dict.fromkeys(found))}"


def _listing(rows: list[Key], config: dict) -> str:
    width = max(len(key.name) for key in rows)
    return "\n".join(f"{key.name:{width}}  {_brief(key, config)}" for key in rows)


def _brief(key: Key, config: dict) -> str:
    if key.is_section:
        return f"section: {key.spec['description']}"
    found = value(config, key.name)
    unit = f" {key.spec['unit']}" if "unit" in key.spec else ""
    return "not set" if found is None else f"{shown(found)}{unit}"


def _entry(key: Key, config: dict) -> str:
    spec, found = key.spec, value(config, key.name)
    facts = {
        "value": "not set" if found is None else shown(found),
        "default": shown(spec["default"]) if "default" in spec else None,
        "unit": spec.get("unit"),
        "allowed": key.allowed,
        "locked": spec.get("lock"),
        "seed": spec.get("seed"),
    }
    lines = [f"  {name:7}  {fact}" for name, fact in facts.items() if fact is not None]
    return "\n".join([f"{key.name}: {spec['description']}", *lines])


def value(config, name: str):
    """The value at a dotted name, None where there is none; for the keys of a list's entries, a list of values."""
    head, _, rest = name.partition(".")
    found = config.get(head.removesuffix("[]")) if isinstance(config, dict) else None
    if not rest or found is None:
        return found
    if head.endswith("[]"):
        return [value(entry, rest) for entry in found] if isinstance(found, list) else None
    return value(found, rest)
