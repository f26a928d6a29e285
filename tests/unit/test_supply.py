"""Tokens needed and there: counted as the packer fills its batches, and a shortage told in one line."""

import dataclasses

import numpy as np
import pytest
from configs import ROOT, merged

from kdclimb import campaign, sources, supply
from kdclimb.data import Packer
from kdclimb.plan import run_tokens
from kdclimb.shards import document_lengths, write_shard
from kdclimb.supply import Longest, Needs, Supply, count_batches


def random_shards(folder, rng) -> list[np.ndarray]:
    """The tokens of one to three shards, some of which start within a document."""
    found = []
    for _ in range(rng.integers(1, 4)):
        documents = [[0, *rng.integers(1, 99, rng.integers(0, 40))] for _ in range(rng.integers(1, 60))]
        found.append(np.concatenate([rng.integers(1, 99, rng.integers(0, 5)), *documents]).astype(np.uint16))
        write_shard(folder / f"train_{len(found)}.bin", found[-1])
    return found


@pytest.mark.parametrize("case", range(25))
def test_as_many_batches_are_counted_as_the_packer_fills(tmp_path, case):
    rng = np.random.default_rng(case)
    shards = random_shards(tmp_path, rng)
    lengths = [document_lengths(tmp_path / f"train_{i + 1}.bin", 0, 99) for i in range(len(shards))]
    size, longest, epochs = (int(rng.integers(*bounds)) for bounds in ((8, 100), (2, 50), (1, 4)))
    seed = None if case % 3 == 0 else case
    batches, begun = count_batches(lengths, size, longest, seed, epochs)
    packer = Packer(shards, bos=0, max_doc_tokens=longest, seed=seed)
    for _ in range(batches):
        packer.skip_batch(size)
    assert packer.epoch < epochs
    if begun > 1:
        packer.skip_batch(begun - 1)  # what is left fills a batch of this size
        assert packer.epoch < epochs
    packer.skip_batch(1 if begun > 1 else size)
    assert packer.epoch == epochs


def test_the_longest_run_is_needed_whole(tiny, tiny_runs):
    needs = campaign.token_needs(tiny)
    assert [run.seed for run in needs.runs] == [0, 1, 100]
    for run in needs.runs:
        assert run.tokens == max(run_tokens(r.config) for r in tiny_runs if r.config.seed == run.seed)
    assert (needs.batch_tokens, needs.max_doc_tokens, needs.val_tokens, needs.max_epochs) == (128, 64, 512, 1)
    assert Needs.from_json(supply_json(needs)) == needs


def supply_json(needs: Needs) -> str:
    return campaign.canonical_json(dataclasses.asdict(needs))


def test_a_long_teacher_is_the_longest_run():
    candidate = {"num_layers": 1, "num_heads": 2, "head_dim": 8, "steps": 900}
    config = campaign.load(merged("tests/tiny.yaml", {"teacher": {"candidates": [candidate]}}), ROOT)
    longest = max(campaign.token_needs(config).runs, key=lambda run: run.tokens)
    assert (longest.what, longest.key, longest.seed) == ("teacher L1-H2-D8-900", "teacher.candidates", 0)


def test_prepared_data_are_counted_exactly(tiny, manifest):
    found = supply.prepared(campaign.token_needs(tiny), manifest.parent)
    assert found.train % 128 == 0 and 28_672 <= found.train < found.whole
    assert found.val >= 512
    twice = supply.prepared(dataclasses.replace(campaign.token_needs(tiny), max_epochs=2), manifest.parent)
    assert twice.whole == 2 * found.whole and abs(twice.train - 2 * found.train) <= 128


def test_all_that_validation_can_have_it_gets(tiny, manifest):
    from kdclimb.data import Dataset

    most = supply.prepared(campaign.token_needs(tiny), manifest.parent).val
    assert len(Dataset(manifest).val_batches(most, 128, 64, "cpu")) == -(-most // 128)
    with pytest.raises(ValueError, match=r"validation\.tokens"):
        Dataset(manifest).val_batches(most + 1, 128, 64, "cpu")
    most = supply.prepared(dataclasses.replace(campaign.token_needs(tiny), val_slabs=True), manifest.parent).val
    assert len(Dataset(manifest).val_batches(most, 128, None, "cpu")) == -(-most // 128)
    with pytest.raises(ValueError, match=r"validation\.tokens"):
        Dataset(manifest).val_batches(most + 1, 128, None, "cpu")


NEEDS = Needs(64, 32, 2, 500, False, (Longest("CE 100", "train.horizons", 0, 1000),))


@pytest.mark.parametrize(
    ("source", "there", "said"),
    [
        (
            "text",
            Supply(NEEDS.runs[0], 600, 999, 900),
            "data.max_epochs: CE 100 needs 1,000 training tokens, but 2 passes over the documents, cut to "
            "train.max_doc_tokens (32) and packed, give 600; add text; raise data.max_epochs (to 4 or more); or lower "
            "train.horizons",
        ),
        (
            "text",
            Supply(NEEDS.runs[0], 600, 999, 9000),
            "or lower data.text.max_doc_chars, which splits long documents",
        ),
        ("text", Supply(NEEDS.runs[0], 0, 999, 9000), "raise data.max_epochs; or"),
        ("shards", Supply(NEEDS.runs[0], 600, 999), "give at most 600; add shards (./run fetch_shards gets"),
        (
            "text",
            Supply(NEEDS.runs[0], 1000, 499, 2000),
            "validation.tokens: 500 are needed, but the held-out documents, cut to train.max_doc_tokens (32) and "
            "packed, give 499; lower it, or raise data.text.val_fraction or add text",
        ),
        ("shards", Supply(NEEDS.runs[0], None, 499), "give at most 499; lower it, or add shards to data.shards.val"),
    ],
)
def test_a_shortage_is_told_in_one_line(source, there, said):
    with pytest.raises(ValueError) as error:
        supply.check(NEEDS, there, source)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_is_enough_or_not_known_yet_passes():
    for there in (Supply(NEEDS.runs[0], 1000, 500, 1000), Supply(NEEDS.runs[0], None, None)):
        supply.check(NEEDS, there, "text")
    assert supply.describe(NEEDS, there) == (
        "Tokens needed and there: CE 100 1,000 of not known yet in 2 passes (data.max_epochs); "
        "validation 500 of not known yet."
    )


# ---- before the first job -----------------------------------------------------------------------


def short_of(root, **data) -> str:
    """The line about tiny on these data, before anything is prepared."""
    config = campaign.load(merged("tests/tiny.yaml", {"data": data}), root)
    with pytest.raises(ValueError) as error:
        campaign.check_tokens(config, root, root / "results")
    return str(error.value)


def test_headers_and_sizes_are_enough_to_stop(tmp_path):
    for name, documents in (("train", 100), ("val", 100)):
        write_shard(tmp_path / f"{name}.bin", np.tile(np.arange(50, dtype=np.uint16), documents))
    shards = {"train": "train.bin", "val": "val.bin", "bos_id": 0}
    assert "give at most 5,000; add shards" in short_of(tmp_path, source="shards", shards=shards)
    (tmp_path / "a.txt").write_text("one\n\f\ntwo")
    assert "give at most 10; add text" in short_of(tmp_path, text={"files": ["a.txt"]})


def test_what_is_wrong_with_a_small_file_is_told_first(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}')
    assert "a.jsonl:1: no field 'text'" in short_of(tmp_path, text={"files": ["a.jsonl"]})
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}.bin", np.array([0, 1, 400], dtype=np.uint16))
    shards = {"train": "train.bin", "val": "val.bin", "bos_id": 0}
    assert "train.bin: holds token id 400" in short_of(tmp_path, source="shards", shards=shards)


def test_files_that_say_nothing_of_their_tokens_are_left_to_the_data_rule(tiny):
    assert sources.most_tokens(campaign.data_spec(tiny, ROOT), ROOT) == {"train": None, "val": None}


@pytest.mark.parametrize("content", ["", "a", "a\n\f\nb\n\f\nc\n\f\n", "é" * 9, "\n\f\n\n\f\n"])
def test_no_text_has_more_tokens_than_its_size_allows(tmp_path, content):
    """A byte a token, and an end-of-text token a document."""
    from kdclimb.text import read_documents

    (tmp_path / "a.txt").write_text(content)
    most = sources.most_tokens({"source": "text", "files": ["a.txt"]}, tmp_path)["train"]
    assert sum(1 + len(d.encode()) for d in read_documents(tmp_path / "a.txt", "text", 100)) <= most
