"""What each step uses: batch size, windows, labels, learning rate, momentum, and the three LR phases of KD.

Phase A: boosted while KD is active. Phase B: at the KD stop the boost is gone at once. Phase C: a
low tail down to the end of the horizon. Steps count from 0 here.
"""

from __future__ import annotations

from kdclimb.config import KDConfig, MuonConfig, PolicyConfig, ScheduleConfig


def stage_starts(schedule: ScheduleConfig) -> list[int]:
    """The first step of each equal stage of the scheduled steps: the nearest to its share, as in the speedrun."""
    stages = len(schedule.batch_tokens)
    return [round(i * schedule.scheduled / stages) for i in range(stages)]


def stage(schedule: ScheduleConfig, step: int) -> int:
    """Index of the stage that `step` lies in; the extension belongs to the last."""
    return sum(step >= start for start in stage_starts(schedule)) - 1


def batch_tokens(schedule: ScheduleConfig, step: int) -> int:
    return schedule.batch_tokens[stage(schedule, step)]


def total_tokens(schedule: ScheduleConfig, steps: int | None = None) -> int:
    """Tokens of the first so many steps; of the whole horizon by default. By stages, since a horizon may be long."""
    steps = schedule.horizon if steps is None else steps
    bounds = [*(min(start, steps) for start in stage_starts(schedule)), steps]
    return sum(size * (end - start) for size, start, end in zip(schedule.batch_tokens, bounds, bounds[1:]))


def kd_tokens(schedule: ScheduleConfig, kd: KDConfig) -> int:
    """Tokens of the first steps of the horizon, up to the last that may have KD; validations may stop it sooner."""
    tokens = 0
    for step in range(schedule.horizon):
        if kd_ends(schedule, kd, step, tokens):
            break
        tokens += batch_tokens(schedule, step)
    return tokens


def kd_ends(schedule: ScheduleConfig, kd: KDConfig, step: int, tokens: int) -> str | None:
    """Why KD has ended before `step`, before which `tokens` are trained, whatever validations say; None if it has not.

    Shares are compared, since products such as 0.07 * 100 lie above the step that they name.
    """
    if tokens / total_tokens(schedule) >= kd.token_frac:
        return f"{kd.token_frac:g} of the tokens are trained"
    if kd.stop_mode == "step" and step / schedule.horizon >= kd.stop_frac:
        return f"{kd.stop_frac:g} of the horizon"
    return None


def windows(schedule: ScheduleConfig, step: int) -> tuple[tuple[int, int] | None, tuple[int, ...]]:
    """What `GPT.set_windows` takes: (short, long) of `step`, and the long windows of all steps so far.

    After the last step (`step` is the horizon) the final windows, which leave YaRN alone.
    """
    if not schedule.windows:
        return None, ()
    pairs = list(schedule.windows[: stage(schedule, step) + 1])
    if step >= schedule.scheduled < schedule.horizon and schedule.extension_windows:
        pairs.append(schedule.extension_windows)
    now = schedule.final_windows if step >= schedule.horizon and schedule.final_windows else pairs[-1]
    return now, tuple(long for i, (_, long) in enumerate(pairs) if i == 0 or long != pairs[i - 1][1])


def mtp_weights(schedule: ScheduleConfig, step: int) -> list[float]:
    """Weights of the next token in the hard loss, the one after it, ...: from this stage's row to the next's, linearly.

    Trailing labels that have no weight in the whole stage are left out, so that they cost nothing.
    """
    stages, at = len(schedule.batch_tokens), stage(schedule, step)
    rows = schedule.mtp_weights if len(schedule.mtp_weights) > 1 else schedule.mtp_weights * stages
    start, end = rows[at], rows[min(at + 1, stages - 1)]
    x = min(1.0, max(0.0, step * stages / schedule.scheduled - at))
    labels = max(i + 1 for i, pair in enumerate(zip(start, end, strict=True)) if max(pair) > 0)
    return [a + (b - a) * x for a, b in zip(start[:labels], end[:labels], strict=True)]


def base_lr(schedule: ScheduleConfig, step: int) -> float:
    """Stage multiplier, falling linearly to lr_floor over the last cooldown_frac of the scheduled steps.

    With an lr_table, that times the stage multiplier instead: its latest row's, without a cooldown or a floor.
    """
    mult = schedule.batch_lr[stage(schedule, step)]
    if schedule.lr_table:
        return mult * [factor for start, factor in schedule.lr_table if step / schedule.horizon >= start][-1]
    left = max(0.0, 1.0 - step / schedule.scheduled)
    if left >= schedule.cooldown_frac and left > 0:
        return mult
    weight = left / schedule.cooldown_frac if left else 0.0  # the extension is at the floor, after no cooldown too
    return mult * weight + schedule.lr_floor * (1.0 - weight)


def momentum(muon: MuonConfig, horizon: int, step: int) -> float:
    """Muon's momentum: linearly up from `momentum_min` in the first steps, and back down to it in the last.

    Ramps of a fixed number of steps would leave a short horizon no room, hence the cap on both. Where they overlap it
    goes up, as in the speedrun.
    """
    most = muon.momentum_ramp_frac * horizon
    warmup, cooldown = min(muon.momentum_warmup, most), min(muon.momentum_cooldown, most)
    ramp = 1.0
    if step < warmup:
        ramp = step / warmup
    elif horizon - step < cooldown:
        ramp = (horizon - step) / cooldown
    return muon.momentum_min + (muon.momentum - muon.momentum_min) * ramp


def boost(schedule: ScheduleConfig, step: int) -> float:
    """The early LR boost by fractions of the horizon: held, then linearly down to 1."""
    config = schedule.lr_boost
    if config is None:
        return 1.0
    x = step / schedule.horizon
    if x < config.hold_frac:
        return config.mult
    if x < config.drop_frac:
        return config.mult + (1.0 - config.mult) * (x - config.hold_frac) / (config.drop_frac - config.hold_frac)
    return 1.0


def lr_mult(schedule: ScheduleConfig, kd: KDConfig | PolicyConfig | None, step: int, kd_stop_step: int | None) -> float:
    """The LR multiplier of `step`. `kd_stop_step`: the step after which KD stopped, None while it is active.

    Without KD the boost runs by its fractions alone, or with a KD run's policy as in that run.
    """
    mult = base_lr(schedule, step)
    if kd is None or kd_stop_step is None:
        return mult * boost(schedule, step)
    blended = 1.0 if kd.post_stop_blend_steps == 0 else min(1.0, (step - kd_stop_step + 1) / kd.post_stop_blend_steps)
    return mult * (1.0 + (kd.post_stop_lr - 1.0) * blended)
