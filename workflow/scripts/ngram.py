"""Count an n-gram teacher from the training shards into its run folder."""

import argparse
import json
import sys
from pathlib import Path

from kdclimb import gpus
from kdclimb.config import NgramConfig, build
from kdclimb.count_ngrams import make

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", required=True, help="the teacher's config: a JSON file, or the JSON itself")
parser.add_argument("--out", type=Path, required=True, help="results/runs/<run_id>")
parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of the prepared data")
parser.add_argument("--threads", type=int, required=True)
parser.add_argument("--code", choices=("track", "frozen"), default="track", help="frozen: keep one of any code")

if __name__ == "__main__":
    args = parser.parse_args()
    text = args.config if args.config.startswith("{") else Path(args.config).read_text()
    try:
        config = build(NgramConfig, json.loads(text))
        gpus.take_one(config.device)
        make(config, args.out, args.manifest, args.threads, any_code=args.code == "frozen")
    except (ValueError, OSError) as error:
        sys.exit(f"ngram: {error}")
