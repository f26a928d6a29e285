"""Download ready token shards from the Hugging Face hub and check them."""

import argparse
import json
import sys
from pathlib import Path

from kdclimb.artifacts import write_text
from kdclimb.fetch import fetch

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--shards", required=True, help="JSON of the config's data.shards")
parser.add_argument("--vocab-size", type=int, required=True, help="data.vocab_size, above every id")
parser.add_argument("--log", type=Path, required=True, help="what was downloaded, or why not")

if __name__ == "__main__":
    args = parser.parse_args()
    lines = []
    try:
        for path, tokens in fetch(json.loads(args.shards), args.vocab_size, Path.cwd()):
            lines.append(f"fetch_shards: {path}: {tokens:,} tokens\n")
            print(lines[-1], end="", flush=True)
    except ValueError as error:
        write_text(args.log, "".join(lines) + f"fetch_shards: {error}\n")
        sys.exit(f"fetch_shards: {error}")
    write_text(args.log, "".join(lines))
