"""Configs for the unit tests, merged as Snakemake merges them."""

from pathlib import Path

import yaml
from snakemake.utils import update_config

ROOT = Path(__file__).resolve().parent.parent.parent


def merged(*overlays: str | dict) -> dict:
    """config.yaml with overlays (paths from the project folder, or dicts) merged over it."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for overlay in overlays:
        update_config(config, yaml.safe_load((ROOT / overlay).read_text()) if isinstance(overlay, str) else overlay)
    return config
