"""A data source that hangs, on a real mount whose server is silent: said by name, and gone on with once it answers."""

import io
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from configs import ROOT

from kdclimb.shards import write_shard

TEXT = "\n\f\n".join(f"document {number} " + "word " * 60 for number in range(4000))  # some megabyte
BEGIN = """
import mmap, os, sys
from pathlib import Path
from kdclimb import waiting
waiting.EVERY = 0.2
def ready():
    print("ready", flush=True)
    sys.stdin.readline()
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
"""
READ = """
from kdclimb.text import read_documents
ready()
print(len(list(read_documents(file, "text", 1000))))
"""
LIST = """
from kdclimb.text import list_files
ready()
print(len(list_files([str(folder)], Path()).paths))
"""
COUNT = """
from kdclimb.shards import document_lengths
ready()
print(len(document_lengths(file, 0, 50)))
"""
PACK = """
from kdclimb.artifacts import sha256
from kdclimb.data import Packer
from kdclimb.shards import read_shard
tokens, descriptor = read_shard(file), os.open(file, os.O_RDONLY)
sha256(file)
stream = Packer([tokens], 0, 64, seed=None)
for _ in range(batches):
    stream.next_batch(128, "cpu")
tokens._mmap.madvise(mmap.MADV_DONTNEED)  # as if the memory had been needed for something else
os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
ready()
print(len(stream.next_batch(128, "cpu").inputs))
"""


def contents(name: str, folder) -> bytes:
    if name.endswith(".txt"):
        return TEXT.encode()
    if name.endswith(".bin"):
        write_shard(folder / "some.bin", np.arange(600_000) % 40)
        return (folder / "some.bin").read_bytes()
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXT.split("\n\f\n")}), file, compression="none")
    return file.getvalue()


@pytest.mark.parametrize(
    ("code", "name", "hang_at_read", "said", "result"),
    [
        (LIST, "some.txt", None, "data.text.files[0]: ", "1"),
        (READ, "some.txt", None, "some.txt: ", "4000"),
        (READ, "some.txt", 3, "some.txt: ", "4000"),
        (READ, "some.parquet", 3, "some.parquet: ", "4000"),
        (COUNT, "some.bin", 3, "some.bin: ", "15000"),
        ("batches = 0" + PACK, "some.bin", None, "the token shards: ", "128"),
        (
            "batches = 1" + PACK,
            "some.bin",
            None,
            "the token shards: ",
            "128",
        ),  # documents for which numpy keeps the GIL
    ],
    ids=["list", "open", "text", "parquet", "shard", "first batch", "batch"],
)
def test_a_wait_for_a_dead_mount_is_said_and_ends_with_it(code, name, hang_at_read, said, result, hanging, tmp_path):
    mount, folder = hanging(name, contents(name, tmp_path)), tmp_path / "mount"
    process = subprocess.Popen(
        [sys.executable, "-c", BEGIN + code, folder, folder / name], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    mount.hang_at_read = hang_at_read
    if hang_at_read is None:
        mount.answers.clear()
    process.stdin.write("\n")
    process.stdin.flush()
    line = next(line for line in process.stderr if said in line)
    assert "no answer for" in line and process.poll() is None
    mount.answers.set()
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and output == f"{result}\n"
