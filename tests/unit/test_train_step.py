"""benchmarks/train_step.py on a CPU: the rows of its arms, and a peer's trainer beside ours."""

import argparse

import pytest
from configs import ROOT

from benchmarks import train_step
from benchmarks.common import read_rows

PEER = """import os
assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["DATA_PATH"]) == ("0", "1", os.getcwd())
print("step:0/6 val_loss:10.8 train_time:0ms step_avg:nanms")
for step, ms in enumerate((10, 40, 100, 150, 250, 450), 1):
    print(f"step:{step}/6 train_time:{ms}ms step_avg:{ms / step:.2f}ms")
"""


def peer(folder, text):
    folder.mkdir()
    (folder / "bench.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """{(arm, case, metric): value} of the CSV, of the tiny student beside a peer."""
    folder = tmp_path_factory.mktemp("bench")
    config, _ = train_step.student([ROOT / "tests/tiny.yaml"], None, "cpu")
    args = argparse.Namespace(attention="auto", commit="none", deterministic=True, out=folder, rounds=2)
    args.peer_dir, args.peer_runs = peer(folder / "peer", PEER), 2
    train_step.run(config, train_step.synthetic(folder, 200_000, config.data.vocab_size - 48), args)
    written = read_rows(folder / "train_step.csv")
    return {(row["arm"], row["case"], row["metric"]): float(row["value"]) for row in written}


def test_both_trainers_and_their_ratio_are_rows(rows):
    # of six steps, in two stages as ours: 10, 30, 60 ms and 50, 100, 200 ms, each the mean of the odd and even medians
    theirs = [rows["peer peer", f"stage={stage}", "ms"] for stage in (1, 2)]
    assert theirs == pytest.approx([(35 + 30) / 2, (125 + 100) / 2])
    case = "attention=reference;head=bf16;micro_batch=128;"
    for stage, ms in enumerate(theirs, 1):
        ours = rows["kdclimb", f"{case}stage={stage}", "ms"]
        ratio = rows[
            "kdclimb", f"attention=reference;head=bf16;micro_batch=128;peer=peer;stage={stage}", "ratio_to_peer"
        ]
        assert ratio == pytest.approx(ours / ms)
        assert rows["kdclimb", f"{case}stage={stage}", "drift"] > 0


def test_a_fixed_order_is_an_arm(rows):
    case = "attention=reference;deterministic=true;head=bf16;micro_batch=128"
    assert rows["kdclimb", case, "compile_s"] > 0
    for stage in (1, 2):
        plain = rows["kdclimb", f"attention=reference;head=bf16;micro_batch=128;stage={stage}", "ms"]
        fixed = rows["kdclimb", f"{case};stage={stage}", "ms"]
        assert rows["kdclimb", f"{case};stage={stage}", "ratio_to_ce"] == pytest.approx(fixed / plain)


@pytest.mark.parametrize("text", ["0", "3", "-2", "two"])
def test_rounds_are_an_even_number(text):
    assert train_step.even("4") == 4
    with pytest.raises(argparse.ArgumentTypeError, match="even number"):
        train_step.even(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise SystemExit('no GPU for the peer')", "exit code 1\nno GPU for the peer"),
        ("print('hello')", "no line like"),
        ("print('step:1/4 train_time:10ms')\nprint('step:2/4 train_time:20ms')", "of each of 2 equal stages"),
        ("print('step:1 train_time:10ms')\nprint('step:2 train_time:20ms')", "of each of 2 equal stages"),
    ],
)
def test_a_peer_that_gives_no_times_is_told(tmp_path, text, said):
    with pytest.raises(SystemExit) as error:
        train_step.peer_times(peer(tmp_path / "peer", text), 2)
    assert "--peer-dir" in str(error.value) and said in str(error.value)
