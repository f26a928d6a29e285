"""Configs, logs, shards, checkpoints and texts that nobody meant: an error that names the key or the file, or a result.

The short form runs a few examples of each; the long one, ./test --faults, as many and as long as it is told.
"""

import copy
import json
import random
import time

import numpy as np
import pytest
import torch
import yaml
from configs import ROOT, merged
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kdclimb import campaign, expansion, logs, shards, unpickle
from kdclimb.config import ConfigError, RunConfig
from kdclimb.configfiles import read_file
from kdclimb.text import read_documents

QUIET = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}
SCHEMA = yaml.safe_load((ROOT / "config/schema.yaml").read_text())
TINY = merged("tests/tiny.yaml")


@pytest.fixture
def effort(request):
    """effort(property, examples): run a hypothesis property in its short form, or as long as the long form is told."""

    def call(check, strategy, examples):
        limit, first, rounds = request.config.getoption("--fuzz-seconds"), request.config.getoption("--first"), 0
        begun, tried = time.process_time(), 0
        while not rounds or time.process_time() - begun < limit:
            count = 500 if limit else examples

            def counted(value):
                nonlocal tried
                tried += 1
                check(value)

            seed(1_000_000 * first + rounds)(settings(max_examples=count, **QUIET)(given(strategy)(counted)))()
            rounds += 1
        spent = time.process_time() - begun
        request.config.measured.append(f"{request.node.name}: {tried:,} examples in {spent:.0f} CPU seconds")
        return tried

    return call


# ---- configs ----------------------------------------------------------------------------------------


def leaves(schema: dict, path=()):
    """(path, schema) of each key that is no section."""
    for key, value in schema["properties"].items():
        if "properties" in value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


LEAVES = list(leaves(SCHEMA))
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**7),
    st.floats(allow_nan=True),
    st.text(max_size=12),
    st.sampled_from([10**400, -(10**400), 10**15, [10**15], -0.0, 5e-324, 1e308]),
    st.sampled_from(["; rm -rf ~", "$(id)", "../../x", "tiny\n", "a b", "<script>", "-n", "", "nan"]),
    st.lists(st.integers(-2, 300), max_size=4),
    st.lists(st.lists(st.floats(0, 2), max_size=3), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def fitting(schema: dict) -> st.SearchStrategy:
    """Values that the schema allows, or nearly."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].split("/")[-1]]
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", max(low + 1, 500)))
    if kind == "boolean":
        return st.booleans()
    if kind == "integer":
        return st.integers(int(low), int(high))
    if kind == "number":
        return st.floats(low, high, allow_nan=False)
    if kind == "array":
        return st.lists(fitting(schema.get("items", {})), min_size=schema.get("minItems", 0), max_size=3)
    return ODD


CHANGES = st.lists(
    st.sampled_from(LEAVES).flatmap(
        lambda leaf: st.tuples(st.just(leaf[0]), st.one_of(fitting(leaf[1]), st.just(leaf[1].get("default")), ODD))
    ),
    min_size=1,
    max_size=2,
)


def dry_run(config: dict) -> bool:
    """What the Snakefile does with a config before the first job; False if it is refused, with a key in the message."""
    try:
        found = campaign.load(config, ROOT)
        data = campaign.data_id(found, ROOT)
        campaign.check_tokens(found, ROOT, ROOT / "results/none")
    except ValueError as error:
        said = str(error)
        key = said.split(":")[0].split("[")[0].split(" ")[0].split(",")[0]
        parts = key.split(".")
        assert parts[0] in SCHEMA["properties"] or parts[-1] in said, said
        named = any(part in json.dumps(SCHEMA["properties"]) for part in parts)
        assert named and "\n" not in said.replace(repr("\n"), ""), said
        return False
    names = [candidate.name for candidate in found.teacher.candidates]
    decisions = {"projected": {"survivors": names}}
    teacher = next((run for run in expansion.expand(found, decisions, data) if run.arm == "teacher"), None)
    if teacher is not None:
        decisions["selected"] = {"run_id": teacher.run_id, "train_time_ms": 0.1, "budget_ms": 0.1}
        decisions["promoted"] = {"points": [expansion.grid_points(found.kd.grid)[0].name]}
    for run in expansion.expand(found, decisions, data):
        assert run.run_id.replace("-", "").replace(".", "").replace("+", "").isalnum(), run.run_id
        assert RunConfig.from_dict(json.loads(run.config.canonical())).run_id == run.run_id
    return True


def changed(changes) -> dict:
    config = copy.deepcopy(TINY)
    for path, value in changes:
        section = config
        for key in path[:-1]:
            section = section[key]
        section[path[-1]] = value
    return config


def test_any_config_dry_runs_or_names_a_key(effort):
    seen = {True: 0, False: 0}

    def check(changes):
        seen[dry_run(changed(changes))] += 1

    effort(check, CHANGES, 60)
    assert min(seen.values()) > 0, seen


@pytest.mark.parametrize("name", ["; rm -rf ~", "$(id)", "../x", "tiny\n", "a b", "<script>alert(1)</script>", ""])
def test_a_name_that_a_shell_or_a_page_could_take_for_more_is_refused(name):
    with pytest.raises(ConfigError, match="^campaign: "):
        campaign.load(TINY | {"campaign": name}, ROOT)
    for key, start in (("imported", "imported-"), ("imports", "imported-log-")):
        section = "teacher" if key == "imported" else "baseline"
        with pytest.raises(ConfigError, match=f"^{section}.{key}"):
            campaign.load(TINY | {section: TINY[section] | {key: [start + "x" + (name or " ")]}}, ROOT)


def test_a_name_that_is_too_long_for_a_folder_is_refused():
    with pytest.raises(ConfigError, match="^campaign: "):
        campaign.load(TINY | {"campaign": "x" * 101}, ROOT)


@pytest.mark.parametrize(
    ("overlay", "said"),
    [
        ({"kd": {"norm_max": 10**400}}, "kd.norm_max: 1000"),
        ({"campaign": "a" * 10**6}, "campaign: 'aaa"),
        ({5: 1, True: 2, None: 3}, "5: unknown key"),
    ],
)
def test_a_value_beyond_all_bounds_is_named_on_a_short_line(overlay, said):
    with pytest.raises(ConfigError) as caught:
        campaign.load(merged("tests/tiny.yaml", overlay), ROOT)
    assert str(caught.value).startswith(said) and len(str(caught.value)) < 1000


def test_a_horizon_beyond_all_bounds_is_refused_at_once(tmp_path):
    (tmp_path / "some.txt").write_text("word " * 2000)
    overlay = {"train": {"horizons": [10**15]}, "data": {"text": {"files": [str(tmp_path / "some.txt")]}}}
    found = campaign.load(merged("tests/tiny.yaml", overlay), ROOT)
    with pytest.raises(ValueError, match="^data.max_epochs: "):
        campaign.check_tokens(found, ROOT, ROOT / "results/none")


def tenfold(entry: str) -> str:
    """A YAML file whose few lines stand for 10**8 values; `entry` has what a line says of the one before it."""
    lines = [f"x{i}: &x{i} {entry.format(', '.join([f'*x{i - 1}'] * 10))}" for i in range(1, 9)]
    return "\n".join(["x0: &x0 {a: 1}", *lines])


CONFIG_FILES = {
    tenfold("[{}]"): "more than 100,000 values",
    tenfold("{{<<: [{}]}}"): "more than 100,000 values",
    "campaign: &a [*a]": "holds itself",
    "train: &a {seeds: *a}": "holds itself",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 100_000: "nested too deeply",
    "kd: {alpha: 1}\ntrain: {}\nkd: {}": "line 3: kd is there twice",
    '{"kd": {"alpha": 1, "alpha": 2}}': "alpha is there twice",
    "kd: {norm_max: " + "9" * 5000 + "}": "a number of 5,000 digits",
    '{"kd": {"norm_max": ' + "9" * 5000 + "}}": "a number of 5,000 digits",
    "kd: {norm_max: 0x" + "f" * 5000 + "}": "a number of 5,002 digits",
    "campaign: " + "a" * 2**21: "is larger than",
    "__use_yte__: true\n?print(1): {}": "is a template",
    '{"__use_yte__": true}': "is a template",
    "campaign: !!python/name:os.system": "not YAML",
    "campaign: !!python/object/apply:os.system [id]": "not YAML",
    "a: 1\n---\nb: 2": "not YAML",
    "a: \0": "not YAML",
    "? [a, b]\n: 3": "not YAML",
    "a: 2020-99-99": "month must be",
    b"\xff\xfe": "can't be read",
}


@pytest.mark.parametrize("content", CONFIG_FILES, ids=lambda content: str(content[:20]))
def test_a_config_file_holds_keys_and_values_or_is_refused_by_name(content, tmp_path):
    path, said = tmp_path / "some.yaml", CONFIG_FILES[content]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and said in line and "\n" not in line and len(line) < 1000


def test_a_config_file_may_have_aliases_and_be_json(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text("a: &a {x: 1}\nb: [*a, *a]\nc: {<<: *a, x: 2}\n")
    assert read_file(path) == {"a": {"x": 1}, "b": [{"x": 1}] * 2, "c": {"x": 2}}
    path.write_text('{"a": 1e5}')  # which YAML 1.1 takes for text
    assert read_file(path) == {"a": 100_000.0}


# ---- files ------------------------------------------------------------------------------------------


def mutated(data: bytes, number: int) -> bytes:
    """`data` with a few cuts, flips, copies and insertions, drawn from the seed `number`."""
    rng = random.Random(number)
    for _ in range(rng.randint(1, 4)):
        place, width = rng.randrange(len(data) + 1), rng.choice([1, 2, 8, 64])
        junk = rng.choice([b"", rng.randbytes(width), data[place : place + width] * 2, b"\xff" * width, b"9" * width])
        data = data[:place] + junk + data[place + rng.choice([0, width]) :]
        if rng.random() < 0.1:
            data = data[: rng.randrange(len(data) + 1)]
    return data


MANY = st.integers(0, 2**32)
LOG = (
    "from torch import nn\n"
    + "".join(
        f"step:{step}/50 train_time:{step * 9}ms step_avg:9.0ms kd_mode:kd kd_active:True\n" for step in range(1, 50)
    )
    + "step:50/50 val_loss:4.5 train_time:450ms step_avg:9.0ms\npeak memory allocated: 30 MiB reserved: 40 MiB\n"
)


def test_any_log_is_read_or_refused_by_name(effort, tmp_path):
    path = tmp_path / "run.txt"

    def check(number):
        path.write_bytes(mutated(LOG.encode(), number))
        try:
            found = logs.read_log(path)
        except ValueError as error:
            assert "run.txt" in str(error)
            return
        config, row = logs.log_config(found), logs.summary(found)
        assert row["run_id"] == config.run_id and found.status in ("imported", "provisional")

    effort(check, MANY, 150)


def test_any_shard_is_read_or_refused_by_name(effort, tmp_path):
    path = tmp_path / "train_000000.bin"
    tokens = np.arange(300, dtype=np.uint16) % 40
    shards.write_shard(path, tokens)
    whole = path.read_bytes()

    def check(number):
        path.write_bytes(mutated(whole, number))
        try:
            lengths = shards.document_lengths(path, 0, 50)
        except ValueError as error:
            assert path.name in str(error)
            return
        found = shards.read_shard(path)
        assert lengths.sum() <= len(found) and found.max() < 50

    effort(check, MANY, 200)


def test_any_checkpoint_is_read_or_refused_by_name(effort, tmp_path):
    path, model = tmp_path / "state.pt", {"model": {"a": torch.zeros(3)}}
    facts = {"step": 1, "code": "x = 1", "best_val_loss": 4.5, "kd_enabled": False, "kd_stop_step": None}
    torch.save(model | facts, path)
    whole = path.read_bytes()

    def check(number):
        path.write_bytes(mutated(whole, number))
        try:
            tensors, found = unpickle.split(unpickle.load(path), path)
        except ValueError as error:
            assert path.name in str(error)
            return
        assert all(tensor.isfinite().all() for tensor in tensors.values()) and "step" in found

    for number in (5257, 1942136):  # zipfile raised an error of its own; torch failed an assertion
        check(number)
    effort(check, MANY, 100)


TEXTS = {
    "empty": b"",
    "binary": bytes(range(256)),
    "one huge line": b"word " * 400_000,
    "invalid UTF-8": b"fine, then \xff\xfe",
    "right to left": "\u202e\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\n".encode() * 50,
    "half a character": "\u05e9".encode()[:1],
    "zero bytes": b"a\0b",
    "separators alone": b"\n\f\n" * 50,
    "no spaces": b"x" * 500_000,
}


@pytest.mark.parametrize("ending", [".txt", ".md", ".jsonl", ".txt.xz", ".parquet"])
@pytest.mark.parametrize("name", TEXTS)
def test_any_text_is_read_or_refused_by_name(name, ending, tmp_path):
    path = tmp_path / f"some{ending}"
    path.write_bytes(TEXTS[name])
    try:
        documents = list(read_documents(path, "text", 1000))
    except ValueError as error:
        assert path.name in str(error)
        return
    assert all(0 < len(document) <= 1000 for document in documents)


def test_any_bytes_as_text(effort, tmp_path):
    path = tmp_path / "some.txt"

    def check(content):
        path.write_bytes(content)
        try:
            documents = list(read_documents(path, "text", 100))
        except ValueError as error:
            assert path.name in str(error)
            return
        assert all(0 < len(document) <= 100 for document in documents)

    effort(
        check,
        st.one_of(st.binary(max_size=400), st.text(max_size=400).map(lambda t: t.encode("utf-8", "replace"))),
        100,
    )
