"""Teachers from elsewhere: strict reading, refusals by name, and the same numbers as the seed's formulas."""

import json
import os
import pickle
import re

import pytest
import seed_checkpoints as seed
import torch
import torch.nn.functional as F
from configs import ROOT

from kdclimb import __main__ as cli
from kdclimb import unpickle
from kdclimb.analysis.tables import RunFolder
from kdclimb.attention import Documents
from kdclimb.campaign import data_id
from kdclimb.data import Dataset
from kdclimb.import_teacher import Shape, check, choose_windows, convert, read, rotary_order, slug, without_prefix
from kdclimb.model import GPT
from kdclimb.teacher import checkpoint_facts, load_teacher, read_description

WINDOWS, LONG_WINDOWS = (8, 24), (12, 24)
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


def save(path, **options):
    torch.save(seed.checkpoint(seed.L3, **options), path)
    return path


@pytest.fixture
def file(tmp_path):
    return save(tmp_path / "state_best.pt")


# ---- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "bigram", "params"),
    [(11, 251520, 543_818_890), (11, 2, 350_653_066), (3, 251520, 489_554_538), (3, 2, 296_388_714)],
)
def test_the_keys_add_up_to_the_parameters_in_the_seeds_logs(layers, bigram, params):
    keys = Shape(layers, 6, 128, 50304, bigram).keys()
    assert sum(torch.Size(shapes[0]).numel() for shapes in keys.values()) == params


def test_value_tables_of_any_depth():
    tables = {layers: Shape(layers, 2, 8, 384, 2).value_tables for layers in (1, 2, 3, 4, 5, 7, 11)}
    assert tables[1] == {0: 0} and tables[2] == {0: 0, 1: 1} and tables[3] == {0: 0, 1: 1, 2: 2}
    assert tables[4] == {0: 0, 1: 1, 2: 2, 3: 3} and tables[5] == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
    assert tables[7] == {0: 0, 1: 1, 4: 2, 5: 3}  # layer 6 has no attention to use the last one
    assert tables[11] == {0: 0, 1: 1, 8: 2, 9: 3, 10: 4}


# ---- refusals -------------------------------------------------------------------------------------


def test_reads_with_and_without_the_prefix(file, tmp_path):
    compiled, facts = read(file, seed.L3, tmp_path)
    plain, _ = read(save(tmp_path / "plain.pt", prefix=""), seed.L3, tmp_path)
    assert list(compiled) == list(plain) and all(torch.equal(compiled[name], plain[name]) for name in plain)
    assert {name: value.dtype for name, value in plain.items()}["attn_bank"] == torch.bfloat16
    assert facts["step"] == 250 and facts["best_val_loss"] == 4.069 and "code" not in facts
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".import-")] == []


def test_gate_rows_of_both_descriptions_and_padded_scalars():
    for options in ({"gate_rows": 10}, {"padding": 7}):
        check(seed.model(seed.L3, prefix="", **options), seed.L3, "x.pt")


def inline(path):
    """What `read` does in a process of its own, without that process's seconds."""
    tensors, _ = unpickle.split(unpickle.load(path), path)
    check(without_prefix(tensors, path), seed.L3, path)


def edited(tmp_path, edit):
    """A checkpoint whose dict `edit` has changed."""
    content = seed.checkpoint(seed.L3)
    edit(content)
    torch.save(content, tmp_path / "edited.pt")
    return tmp_path / "edited.pt"


def drop(name):
    return lambda content: content["model"].pop(f"_orig_mod.{name}")


def put(name, value, prefix="_orig_mod."):
    return lambda content: content["model"].update({prefix + name: value})


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (drop("smear_gate.weight"), r"missing key smear_gate.weight, expected \(1, 12\)$"),
        (drop("value_embeds.4.weight"), r"missing key value_embeds.4.weight, expected \(384, 32\)$"),
        (put("yarn.factor1", torch.ones(2)), "unknown key yarn.factor1$"),
        (put("attn_bank", torch.ones(2, 128, 32)), r"attn_bank has shape \(2, 128, 32\), expected \(3, 128, 32\)$"),
        (put("attn_gate_bank", torch.ones(4, 2, 12)), r"\(4, 2, 12\), expected \(3, 2, 12\) or \(10, 2, 12\)$"),
        (put("scalars", torch.ones(14)), r"scalars has shape \(14,\), expected \(15,\) to \(22,\)$"),
        (put("x0_lambdas", torch.ones(3), prefix=""), "_orig_mod.* starts with _orig_mod., but x0_lambdas doesn't"),
        (put("embed.weight", torch.full((384, 32), float("nan"))), "'_orig_mod.embed.weight' holds a value that is no"),
        (put("embed.weight", torch.ones(384, 32, dtype=torch.int8)), "embed.weight' is torch.int8"),
        (put("embed.weight", [1.0]), "embed.weight' is a list, not a tensor"),
        (lambda content: content.pop("best_val_loss"), "missing entry 'best_val_loss'"),
        (lambda content: content.update(epoch=3), "unknown entry 'epoch'"),
        (lambda content: content.update(step="last"), "entry 'step' is a str"),
        (lambda content: content.update(code=RunsCode()), "refused, .*posix.system"),
        (lambda content: content.update(best_val_loss=Shape), "refused, .*kdclimb.import_teacher.Shape"),
    ],
)
def test_what_is_refused_by_name(tmp_path, monkeypatch, edit, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"edited.pt: .*{said}") as error:
        inline(edited(tmp_path, edit))
    assert "\n" not in str(error.value) and not (tmp_path / "pwned").exists()


def test_the_process_that_reads_refuses_code_in_one_line(tmp_path):
    pwned = tmp_path / "pwned"

    class RunsCode:
        def __reduce__(self):
            return os.system, (f"touch {pwned}",)

    torch.save(seed.checkpoint(seed.L3) | {"code": RunsCode()}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="^[^\n]*x.pt: refused, and nothing of it was run: its pickle calls posix.system$"
    ):
        read(tmp_path / "x.pt", seed.L3, tmp_path)
    assert not pwned.exists()


def test_every_problem_is_named_at_once():
    tensors = seed.model(seed.L3, prefix="")
    del tensors["mlp_bank"]
    tensors["more"] = torch.ones(1)
    with pytest.raises(ValueError, match="missing key mlp_bank, .*; unknown key more"):
        check(tensors, seed.L3, "x.pt")
    with pytest.raises(ValueError, match=r"--layers 4 .*; mlp_bank has shape \(4, 2, 128, 32\), expected \(5, 2, 128"):
        check(seed.model(seed.L3, prefix=""), Shape(4, 2, 16, 384, 2), "x.pt")


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_in_every_form_that_torch_saves(tmp_path, monkeypatch, protocol, zipped):
    monkeypatch.chdir(tmp_path)
    content = seed.checkpoint(seed.L3) | {"code": RunsCode()}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="x.pt: (refused, .*posix.system|not a file that torch.save wrote)"):
        inline(tmp_path / "x.pt")
    assert not (tmp_path / "pwned").exists()


def test_files_that_are_no_checkpoints(file, tmp_path):
    content, other = file.read_bytes(), tmp_path / "other.pt"
    cases = {
        b"": "not a file that torch.save wrote",
        b"%PDF-1.7 a paper": "not a file that torch.save wrote",
        content[: len(content) // 2]: "cut off or damaged",
        content[:-1]: "cut off or damaged",
        pickle.dumps(RunsCode()): "refused, .*posix.system",
    }
    for data, said in cases.items():
        other.write_bytes(data)
        with pytest.raises(ValueError, match=f"other.pt: {said}"):
            inline(other)
    torch.save([1, 2], other)
    with pytest.raises(ValueError, match=r"other.pt: holds a list, not the dict"):
        inline(other)
    with pytest.raises(ValueError, match="gone.pt: there is no such file"):
        read(tmp_path / "gone.pt", seed.L3, tmp_path)


def test_a_pickle_is_read_in_one_place_only():
    text = {path: path.read_text() for folder in ("kdclimb", "workflow") for path in (ROOT / folder).rglob("*.py")}
    assert [path.name for path, code in text.items() if re.search(r"torch\.load|pickle\.load", code)] == ["unpickle.py"]
    assert "weights_only=True" in text[ROOT / "kdclimb/unpickle.py"]
    assert not any("weights_only=False" in code for code in text.values())


# ---- the same numbers -----------------------------------------------------------------------------


def test_rotary_order_keeps_scores_and_pairs():
    order = rotary_order(2, 8).view(2, 8)
    assert order.tolist() == [[0, 2, 4, 5, 1, 3, 6, 7], [8, 10, 12, 13, 9, 11, 14, 15]]


def stream(length, starts):
    tokens = torch.randint(0, 384, (length,), generator=torch.Generator().manual_seed(1))
    documents = [sum(start <= t for start in starts) for t in range(length)]
    return tokens, documents, Documents.of(starts, length, "cpu")


def ours(tensors, shape, dtype):
    """Our model with a checkpoint's weights."""
    model = GPT(shape.model(), backend="reference", compute_dtype=dtype).to(dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in convert(tensors, shape)[0].items()}, strict=True)
    model.set_windows(WINDOWS, LONG_WINDOWS)
    return model.requires_grad_(False)


@pytest.mark.parametrize("shape", [seed.L3, seed.L11, Shape(1, 2, 8, 384, 7), Shape(8, 2, 8, 384, 7)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-3)])
def test_the_imported_model_computes_what_the_seeds_formulas_give(shape, dtype, tolerance):
    tensors = seed.model(shape, prefix="", seed=3)
    tokens, documents, packed = stream(64, [0, 40, 55])
    hidden, logits = seed.forward(tensors, shape, tokens, documents, WINDOWS, LONG_WINDOWS)
    model = ours(tensors, shape, dtype)
    found = model(tokens, packed)
    assert (found.double() - hidden).abs().max() < tolerance * hidden.abs().max()
    a, b, c = model.config.softcap
    scores = a * torch.sigmoid((found @ model.head_weight.T + b) / c)
    labels = tokens.roll(-1)
    assert F.cross_entropy(scores, labels).item() == pytest.approx(
        F.cross_entropy(logits, labels).item(), abs=tolerance
    )


# ---- the command ----------------------------------------------------------------------------------


@pytest.fixture
def results(manifest, tmp_path):
    """A results folder with the tiny campaign's data."""
    (tmp_path / "results/data").mkdir(parents=True)
    (tmp_path / "results/data" / manifest.parent.name).symlink_to(manifest.parent)
    return tmp_path / "results"


def bring(file, results, *more):
    shape = "--layers 3 --heads 2 --head-dim 16 --vocab-size 384 --bigram-vocab-size 2".split()
    windows = "--long-windows 12 24 --windows 8 24 --cost-ms 56600".split()
    config = ["--configfile", str(ROOT / "tests/tiny.yaml"), "--results", str(results)]
    return cli.main(["import-teacher", str(file), *shape, *windows, *config, *more])


def test_an_import_is_a_finished_run_that_a_student_can_learn_from(
    file, results, manifest, tiny, tiny_runs, train, tmp_path, capsys
):
    assert bring(file, results) == 0
    out, err = capsys.readouterr()
    (folder,) = (results / "runs").iterdir()
    assert f"imported: [{folder.name}]" in out and re.fullmatch("imported-state-best-[0-9a-f]{12}", folder.name)
    assert "val_loss" in err and "best_val_loss 4.0690 says its file, at step 250" in err
    assert "left out, since nothing uses them: mlp_bank[3], value_embeds.3.weight, ve_gate_bank[3]" in err

    run = RunFolder.read(f"imported|seed|{folder}")
    (val,) = run.val
    assert (run.ok, run.imported, run.steps, run.horizon) == (True, True, [], 250)
    assert (val["step"], val["train_time_ms"], val["tokens"]) == (250, 56600.0, None)
    row = run.row()
    assert (row["kind"], row["train_time_ms"], row["clock"], row["code_hash"]) == ("imported", 56600, "declared", "")
    assert row["final_val"] == row["best_val"] == val["val_loss"]
    assert (folder / "train.log").read_text().startswith("PYTHONPATH=. python -m kdclimb import-teacher ")

    description = json.loads((folder / "checkpoints/model.json").read_text())
    assert description["imported"] is True and description["imported_from"]["file"] == "state_best.pt"
    assert (description["windows"], description["long_windows"], description["cost_ms"]) == ([8, 24], [12, 24], 56600)

    config = next(run.config for run in tiny_runs if run.arm == "isolate" and run.config.kd)
    code, student = train(config, tmp_path / "students", folder / "checkpoints")
    assert code == 0 and json.loads((student / "status.json").read_text())["status"] == "ok"
    dataset = Dataset(manifest)
    batches = dataset.val_batches(config.validation.tokens, 128, 64, "cpu")
    options = {"device": "cpu", "backend": "reference", "compute_dtype": torch.float32}
    teacher, loss = load_teacher(folder / "checkpoints", batches, checkpoint_facts(config, dataset), **options)
    assert loss == pytest.approx(val["val_loss"], abs=1e-6) and teacher.windows == ((8, 24), (12, 24))

    status = (folder / "status.json").stat().st_mtime_ns
    assert bring(file, results) == 0 and "already imported" in capsys.readouterr().err
    assert (folder / "status.json").stat().st_mtime_ns == status


@pytest.mark.parametrize("name", ["checkpoints/model.safetensors", "checkpoints/model.json", "val.csv"])
def test_a_damaged_import_is_mended_by_the_command_that_its_error_names(file, results, capsys, name):
    assert bring(file, results) == 0
    (folder,) = (results / "runs").iterdir()
    weights, age = (folder / "checkpoints/model.safetensors").read_bytes(), 10**18
    os.utime(folder / "checkpoints/model.json", ns=(age, age))
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    if "checkpoints" in name:
        with pytest.raises(ValueError, match=f"{name}: damaged: .*; import it again: python -m kdclimb import-teacher"):
            read_description(folder / "checkpoints")
    assert bring(file, results) == 0
    err = capsys.readouterr().err
    assert f"{folder / name}: damaged" in err and "already imported" not in err
    run = RunFolder.read(f"imported|seed|{folder}")
    assert len(run.val) == 1 and (folder / "checkpoints/model.safetensors").read_bytes() == weights
    read_description(folder / "checkpoints")
    if name != "checkpoints/model.json":  # the only file that says whether these are the weights that taught others
        ages = [path.stat().st_mtime_ns for path in (folder / "checkpoints", folder / "checkpoints/model.json")]
        assert ages == [age, age]
    assert bring(file, results) == 0 and "already imported" in capsys.readouterr().err


def test_an_import_that_a_bundle_brought_without_weights_gets_them(file, results, capsys):
    assert bring(file, results) == 0
    (folder,) = (results / "runs").iterdir()
    checkpoints, weights = folder / "checkpoints", (folder / "checkpoints/model.safetensors").read_bytes()
    (checkpoints / "model.safetensors").unlink()
    (checkpoints / "model.safetensors.elsewhere").write_text("")
    age = (checkpoints / "model.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="--weights, or import it again: .*import-teacher, .*/train.log$"):
        read_description(checkpoints)
    assert bring(file, results) == 0
    read_description(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["model.json", "model.safetensors"]
    assert (checkpoints / "model.safetensors").read_bytes() == weights
    assert checkpoints.stat().st_mtime_ns == age  # what it taught stays younger


def test_the_measured_loss_is_that_of_the_seeds_formulas(file, results, manifest, tiny, capsys):
    assert bring(file, results) == 0
    (folder,) = (results / "runs").iterdir()
    found = json.loads((folder / "checkpoints/model.json").read_text())["final_val"]
    tensors = {name.removeprefix("_orig_mod."): value for name, value in torch.load(file)["model"].items()}
    losses = []
    for batch in Dataset(manifest).val_batches(tiny.validation.tokens, 128, 64, "cpu"):
        bounds = batch.documents.cu_seqlens.tolist()
        documents = [sum(start <= t for start in bounds) for t in range(len(batch.inputs))]
        _, logits = seed.forward(tensors, seed.L3, batch.inputs, documents, (8, 24), (12, 24))
        losses.append(F.cross_entropy(logits, batch.labels).item())
    assert found == pytest.approx(sum(losses) / len(losses), abs=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vocab-size", "50304"], "--vocab-size: 50304 is not allowed; allowed: 384"),
        (["--cost-ms", "0"], "--cost-ms: 0.0 is not allowed"),
        (["--name", "a/b"], "--name: 'a/b' is not allowed"),
        (["--heads", "3"], "num_heads: 3 is not allowed"),
        (["--head-dim", "4"], "--heads, --head-dim: 8 is not allowed; allowed: a width of 12 or more"),
        (["--layers", "4"], "state_best.pt: not a checkpoint of --layers 4"),
        (["--layers", "0"], "num_layers: 0 is not allowed"),
        (["--windows", "24", "8"], "--windows: (24, 8) is not allowed"),
    ],
)
def test_a_wrong_flag_is_one_line_and_leaves_nothing(file, results, capsys, more, said):
    assert bring(file, results, *more) == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert said in err[-1] and "Traceback" not in "".join(err)
    assert not (results / "runs").exists() and [path.name for path in results.iterdir()] == ["data"]


def test_flags_that_are_owed(file, capsys):
    with pytest.raises(SystemExit):
        cli.main(["import-teacher", str(file), "--layers", "3", "--heads", "6", "--windows-passed", "3"])
    assert "--cost-ms" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["import-teacher", str(file), "--layers", "3", "--heads", "6", "--cost-ms", "1"])
    assert "one of the arguments --windows-passed --long-windows is required" in capsys.readouterr().err


def test_missing_data_names_the_command_that_makes_it(file, tmp_path, tiny, capsys):
    assert bring(file, tmp_path) == 1
    made = f"./run results/data/{data_id(tiny, ROOT)}/manifest.json --configfile {ROOT / 'tests/tiny.yaml'}"
    assert capsys.readouterr().err.strip().endswith(made)


def test_windows_of_the_seeds_stages():
    assert choose_windows(1, None, None) == ((384,), (128, 384))
    assert choose_windows(3, None, None) == ((384, 896, 1408), (640, 1408))
    assert choose_windows(4, None, [768, 2560]) == ((384, 896, 1408, 1664), (768, 2560))
    assert choose_windows(4, None, None)[1] == (768, 1664)
    with pytest.raises(ValueError, match="--windows: "):
        choose_windows(None, [128], None)


@pytest.mark.parametrize(
    ("name", "said"), [("state_best.pt", "state-best"), ("a b.c.pt", "a-b.c"), ("_.pt", "teacher")]
)
def test_slug(tmp_path, name, said):
    assert slug(tmp_path / name) == said
