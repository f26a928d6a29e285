"""Prepare the data: tokenizer, token shards, manifest.json."""

import argparse
import json
import sys
from pathlib import Path

from kdclimb.data import prepare

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--spec", required=True, help="JSON of kdclimb.campaign.data_spec")
parser.add_argument("--out", type=Path, required=True, help="results/data/<data_id>")

if __name__ == "__main__":
    args = parser.parse_args()
    try:
        manifest = prepare(json.loads(args.spec), args.out, Path.cwd())
    except ValueError as error:
        sys.exit(f"data: {error}")
    for part in ("train", "val"):
        tokens, documents = (sum(shard[key] for shard in manifest[part]) for key in ("tokens", "documents"))
        print(f"data: {part}: {tokens:,} tokens in {documents:,} documents")
