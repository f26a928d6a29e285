"""Text of any size at bounded memory."""

import json
import random
import subprocess
import sys

import pytest
from configs import ROOT, merged

from kdclimb import campaign

MIB = 2**20
# VmHWM, since ru_maxrss would have the memory of the process that started this one.
CODE = r"""
import json, re, sys
from pathlib import Path
from kdclimb.prepare import prepare
manifest = prepare(json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
tokens = sum(shard["tokens"] for part in ("train", "val") for shard in manifest[part])
print(json.dumps([tokens, int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024]))
"""


def write_text(path, size: int) -> None:
    """So many bytes of documents of made-up words, and one document that is a tenth of it in one line."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    block = "\n\f\n".join(" ".join(rng.choices(words, k=300)) for _ in range(500)) + "\n\f\n"
    with path.open("w") as file:
        for _ in range(int(0.9 * size) // len(block)):
            file.write(block)
        line = " ".join(rng.choices(words, k=10_000)) + " "
        for _ in range(int(0.1 * size) // len(line)):
            file.write(line)


def tokenize(folder, size: int) -> tuple[int, int]:
    """(tokens, peak memory in bytes) of preparing so many bytes of text in a process of its own."""
    write_text(folder / "text.txt", size)
    config = merged("tests/tiny.yaml", {"data": {"text": {"files": [str(folder / "text.txt")]}}})
    config["data"]["tokenizer"]["train_bytes"] = 2 * MIB
    spec = campaign.data_spec(campaign.load(config, ROOT), ROOT)
    command = [sys.executable, "-c", CODE, json.dumps(spec), folder / "data", ROOT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("size", [4 * MIB, pytest.param(2048 * MIB, marks=pytest.mark.faults)])
def test_text_is_tokenized_at_bounded_memory(size, tmp_path, pytestconfig):
    tokens, peak = tokenize(tmp_path, size)
    pytestconfig.measured.append(f"{size / MIB:.0f} MiB of text, {tokens:,} tokens: peak {peak / MIB:.0f} MiB")
    assert tokens > size / 8
    assert peak < (1024 * MIB if size > 64 * MIB else 512 * MIB)
