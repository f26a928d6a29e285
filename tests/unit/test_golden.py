"""What training computed when it was last meant to change: a refactor must not move these losses.

Where a change is meant to, run the test, look at the losses that it prints, and put them here.
"""

import pytest
import torch

from kdclimb.data import Dataset
from kdclimb.train import Trainer

STEPS = 20
LOSSES = {  # loss_hard in nats: the tiny campaign's first steps
    "ce": [
        8.90238,
        8.78147,
        8.49711,
        8.28924,
        7.69722,
        7.56345,
        6.89263,
        6.76806,
        6.42663,
        6.33141,
        6.18303,
        6.01246,
        5.87207,
        5.67877,
        5.60448,
        5.531,
        5.33412,
        5.25669,
        5.08047,
        4.95525,
    ],
    "kd": [
        8.90238,
        8.82011,
        7.89445,
        7.77263,
        7.20558,
        7.08149,
        6.66751,
        6.64836,
        6.53997,
        6.42113,
        6.40013,
        6.22385,
        6.22332,
        6.15257,
        6.1636,
        6.12844,
        5.97619,
        5.94877,
        5.84466,
        5.80137,
    ],
}


@pytest.mark.parametrize("arm", LOSSES)
def test_the_first_losses_are_the_golden_ones(arm, tiny_runs, manifest, teacher_folder):
    torch.set_num_threads(1)
    config = next(r.config for r in tiny_runs if r.arm == arm)
    trainer = Trainer(config, Dataset(manifest), teacher_folder if config.kd else None, "reference")
    steps = [trainer.train_step(kd_on=config.kd is not None) for _ in range(STEPS)]
    losses = [step["loss_hard"] for step in steps]
    print([float(f"{loss:.6g}") for loss in losses])
    assert losses == pytest.approx(LOSSES[arm], rel=1e-3)
