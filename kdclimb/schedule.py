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
    steps, stages = schedule.horizon if steps is None else steps, len(schedule.batch_tokens)
    scheduled = min(steps, schedule.scheduled)
    ends = [min(scheduled, -(-i * schedule.scheduled // stages)) for i in range(stages + 1)]
    tokens = sum(size * (end - start) for size, start, end in zip(schedule.batch_tokens, ends, ends[1:]))
    return tokens + (steps - scheduled) * batch_tokens(schedule, schedule.scheduled)


def kd_tokens(schedule: ScheduleConfig, kd: KDConfig) -> int:
    """Tokens of the first steps of the horizon, up to the last that may have KD; validations may stop it sooner."""
    tokens, most = 0, kd.token_frac * total_tokens(schedule)
    steps = kd.stop_frac * schedule.horizon if kd.stop_mode == "step" else schedule.horizon
    for step in range(schedule.horizon):
        if tokens >= most or step >= steps:
            break
        tokens += batch_tokens(schedule, step)
    return tokens


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
        return mult * [factor for start, factor in schedule.lr_table if step >= start * schedule.horizon][-1]
    left = max(0.0, 1.0 - step / schedule.scheduled)
    if left >= schedule.cooldown_frac:
        return mult
    weight = left / schedule.cooldown_frac
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
