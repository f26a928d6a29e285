"""Configs for the tests, merged as Snakemake merges them; the tiny campaign's data."""

from pathlib import Path

import yaml
from snakemake.utils import update_config

from kdclimb import campaign
from kdclimb.prepare import prepare
from kdclimb.sections import Campaign

ROOT = Path(__file__).resolve().parent.parent.parent


def merged(*overlays: str | dict) -> dict:
    """config.yaml with overlays (paths from the project folder, or dicts) merged over it."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    for overlay in overlays:
        update_config(config, yaml.safe_load((ROOT / overlay).read_text()) if isinstance(overlay, str) else overlay)
    return config


def prepare_tiny(results: Path) -> tuple[Campaign, Path]:
    """The tiny campaign, and the manifest of its data, which are made in a results folder."""
    tiny = campaign.load(merged("tests/tiny.yaml"), ROOT)
    folder = results / "data" / campaign.data_id(tiny, ROOT)
    prepare(campaign.data_spec(tiny, ROOT), folder, ROOT)
    return tiny, folder / "manifest.json"
