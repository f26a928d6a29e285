"""The trainer, called and started."""

import json
import os
import subprocess
import sys

from configs import ROOT

from kdclimb.run import run


def train(config, out, manifest, **options):
    return run(config, out, manifest, None, **{"threads": 1, "any_code": False, "last_attempt": True} | options)


def start_training(config, out, manifest):
    """train.py in a process of its own."""
    command = [sys.executable, "workflow/scripts/train.py", "--config", json.dumps(config.to_dict()), "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command += ["--manifest", manifest, "--threads", "1"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
