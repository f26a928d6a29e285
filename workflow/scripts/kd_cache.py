"""Write the cache of a teacher's targets for a run's exact tokens. Exit code 75: interrupted, start it again."""

import argparse
import json
import sys
from pathlib import Path

from kdclimb import gpus
from kdclimb.config import CacheConfig, build
from kdclimb.write_cache import stands_in, write

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--config", required=True, help="the cache's config, as JSON")
parser.add_argument("--out", type=Path, required=True, help="results/caches/<cache id>")
parser.add_argument("--manifest", type=Path, required=True, help="manifest.json of the prepared data")
parser.add_argument("--teacher", type=Path, required=True, help="checkpoints/ folder of the teacher's run")
parser.add_argument("--threads", type=int, required=True)

if __name__ == "__main__":
    args = parser.parse_args()
    try:
        if stands_in(args.out, args.teacher):
            sys.exit(0)
        config = build(CacheConfig, json.loads(args.config))
        gpus.take_one(config.device)
        code = write(config, args.out, args.manifest, args.teacher, args.threads)
    except (ValueError, OSError) as error:
        sys.exit(f"kd_cache: {error}")
    sys.exit(code)
