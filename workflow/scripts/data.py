"""Prepare the data: tokenizer, token shards, manifest.json; and see that there are tokens enough."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

from kdclimb import supply
from kdclimb.artifacts import write_text
from kdclimb.prepare import prepare

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--spec", required=True, help="JSON of kdclimb.campaign.data_spec")
parser.add_argument("--needs", required=True, help="JSON of kdclimb.campaign.token_needs")
parser.add_argument("--code", required=True, help="hash of the code, as in rules/data.smk")
parser.add_argument("--out", type=Path, required=True, help="results/data/<data_id>")
parser.add_argument("--log", type=Path, required=True, help="what was made, or why not")


def main(args: argparse.Namespace) -> str:
    """The log's text. Raises ValueError."""
    manifest = prepare(json.loads(args.spec), args.out, Path.cwd(), args.code)
    lines = []
    for part in ("train", "val"):
        tokens, documents = (sum(shard[key] for shard in manifest[part]) for key in ("tokens", "documents"))
        lines.append(f"data: {part}: {tokens:,} tokens in {documents:,} documents\n")
    needs = supply.Needs.from_json(args.needs)
    found = supply.prepared(needs, args.out)
    supply.check(needs, found, manifest["spec"]["source"])
    return "".join(lines) + f"data: {supply.describe(needs, found)}\n"


if __name__ == "__main__":
    args = parser.parse_args()
    try:
        write_text(args.log, main(args))
    except (ValueError, OSError) as error:
        with contextlib.suppress(OSError):  # where the disk is full the log has no room either
            write_text(args.log, f"data: {error}\n")
        sys.exit(f"data: {error}")
