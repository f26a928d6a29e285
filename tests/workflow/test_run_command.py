"""./run without a workflow: a copy of the scripts whose Python is a stub that records how it was called."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = ["run", "test", "envs/setup.sh", "requirements.txt", "requirements-dev.txt", "config/config.yaml"]

# Stands for the base Python and, once `-m venv` copied it there, for .venv/bin/python.
STUB = r"""#!/usr/bin/env bash
[[ $1 == -m && $2 != venv && $2 != kdclimb.configfiles ]] && echo "${*:2}" >>calls
case "$1 $2" in
  *version_info*) echo "${STUB_VERSION:-3.11}" ;;
  *'version("torch")'*) echo 2.13.0+cpu ;;
  "-m venv") echo venv >>calls && mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  "-m kdclimb.configfiles") if grep -q __use_yte__ "${@:3}"; then exit 1; fi ;;
  "-m pip") while [[ -e hold-pip ]]; do sleep 0.02; done ;;
  "-m snakemake")
    if [[ $* == *--unlock* ]]; then while [[ -e hold-unlock ]]; do sleep 0.02; done; rm -r .snakemake/locks; exit; fi
    if [[ -e snakemake.py ]]; then exec "$REAL_PYTHON" snakemake.py; fi
    exit "${STUB_EXIT:-0}"
    ;;
esac
"""


class Project:
    """A temporary copy of the project's scripts, and ways to start them."""

    def __init__(self, folder: Path):
        self.folder = folder / "project"
        tools = folder / "tools"
        for name in FILES:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        for name, text in {"nvidia-smi": "#!/bin/sh\nexit 9\n", **dict.fromkeys(["python3", "stub"], STUB)}.items():
            self.script(tools / name, text)
        self.tools = tools
        ours = ("CUDA_", "KDCLIMB_", "OMP_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k != "PYTHON"}
        self.env |= {"PATH": f"{tools}:{os.environ['PATH']}", "REAL_PYTHON": sys.executable}
        self.started = []

    @staticmethod
    def script(path: Path, text: str):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *args, script="run", cwd=None, **env) -> subprocess.Popen:
        process = subprocess.Popen(
            [self.folder / script, *args],
            cwd=cwd or self.folder,
            env=self.env | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def beside(self, argv, **kwargs) -> subprocess.Popen:
        process = subprocess.Popen(argv, cwd=self.folder, stdin=subprocess.DEVNULL, **kwargs)
        self.started.append(process)
        return process

    def run(self, *args, **kwargs) -> tuple[int, list[str]]:
        process = self.start(*args, **kwargs)
        out, _ = process.communicate(timeout=60)
        return process.returncode, out.splitlines()

    def calls(self, word="") -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [line for line in lines if line.startswith(word)]

    def write(self, name: str, text: str = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path


@pytest.fixture
def bare(tmp_path):
    """Nothing set up yet."""
    project = Project(tmp_path)
    yield project
    for process in project.started:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


@pytest.fixture
def project(bare):
    """Set up, as a first ./run leaves it."""
    assert bare.run("-n")[0] == 0
    (bare.folder / "calls").unlink()
    return bare


def until(condition, what):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def is_free(lock: Path) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def cores() -> str:
    n = len(os.sched_getaffinity(0))
    return f"{n} core{'s' if n > 1 else ''}"


# ---- first line ---------------------------------------------------------------------------------


def test_first_line_comes_before_any_setup(bare):
    code, lines = bare.run()
    assert code == 0
    assert lines[0] == f"kdclimb: campaign default on cpu ({cores()})"
    assert lines[1].startswith("kdclimb: setting up .venv with Python 3.11")


@pytest.mark.parametrize(
    ("args", "campaign", "device"),
    [
        ([], "default", "cpu"),
        (["--configfile", "a.yaml"], "a", "cuda (no GPU found here)"),
        (["--configfile=a.yaml", "-n"], "a", "cuda (no GPU found here)"),
        (["--configfiles", "a.yaml", "b.yaml", "-n"], "b c", "cuda (no GPU found here)"),
        (["--configfile", "a.yaml", "--configfile", "b.yaml"], "b c", "cpu"),
        (["--configfile", "none.yaml"], "default", "cpu"),
        (["--configfile", "a.yaml", "--config", "campaign=x", "device=cpu"], "x", "cpu"),
        (["-C", "campaign=x"], "x", "cpu"),
        (["--config=campaign=x", "-n"], "x", "cpu"),
    ],
)
def test_first_line_says_what_the_config_merges_to(project, args, campaign, device):
    project.write("a.yaml", "teacher:\n  campaign: no\ncampaign: a # comment\ndevice: 'cuda' # comment\n")
    project.write("b.yaml", '# campaign: no\ncampaign: "b c"\n')
    project.write("none.yaml", "train: {horizons: [75]}\n")
    code, lines = project.run(*args)
    assert code == 0
    device = f"cpu ({cores()})" if device == "cpu" else device
    assert lines[0] == f"kdclimb: campaign {campaign} on {device}"


def test_auto_is_cuda_where_a_gpu_is_listed(bare):
    gpus = "".join(f"echo 'GPU {i}: NVIDIA H100 80GB HBM3 (UUID: GPU-{i})'\n" for i in range(2))
    bare.script(bare.tools / "nvidia-smi", f"#!/bin/sh\n{gpus}")
    code, lines = bare.run()
    assert code == 0
    assert lines[0] == "kdclimb: campaign default on cuda (2 x NVIDIA H100 80GB HBM3)"
    assert not [call for call in bare.calls("pip") if "extra-index-url" in call]
    for hidden in ("", "-1", ",NoDevFiles"):
        assert bare.run(CUDA_VISIBLE_DEVICES=hidden)[1][0] == f"kdclimb: campaign default on cpu ({cores()})"
    assert bare.run(CUDA_VISIBLE_DEVICES=" GPU-1")[1][0] == lines[0]
    assert not [call for call in bare.calls("pip") if "extra-index-url" in call]  # what runs on a GPU stays
    assert bare.run(KDCLIMB_TORCH="cpu")[0] == 0
    assert [call for call in bare.calls("pip") if "extra-index-url" in call]


def test_missing_config_file_is_named(project):
    code, lines = project.run("--configfile", "config/other.yaml")
    assert code == 1
    assert "no config file config/other.yaml" in lines[-1]


def test_a_config_file_that_is_refused_never_reaches_snakemake(project):
    project.write("a.yaml", "__use_yte__: true\n")
    for arguments in (["--configfile", "a.yaml"], ["-n", "--configfile=a.yaml"]):
        assert project.run(*arguments)[0] == 1
    assert project.calls() == []


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "--cores all --rerun-incomplete --show-failed-logs"),
        (["-n"], "--cores all --rerun-incomplete --show-failed-logs --nolock -n"),
        (["-np"], "--cores all --rerun-incomplete --show-failed-logs --nolock -np"),
        (["--cores", "1"], "--rerun-incomplete --show-failed-logs --cores 1"),
        (["-c1"], "--rerun-incomplete --show-failed-logs -c1"),
        (["-kj2"], "--rerun-incomplete --show-failed-logs -kj2"),
        (["--jobs=2"], "--rerun-incomplete --show-failed-logs --jobs=2"),
        (["--profile", "slurm"], "--rerun-incomplete --show-failed-logs --profile slurm"),
        (["results/x y.json", "--quiet"], "--cores all --rerun-incomplete --show-failed-logs results/x y.json --quiet"),
    ],
)
def test_arguments_go_on_to_snakemake(project, args, expected):
    assert project.run(*args)[0] == 0
    assert project.calls() == [f"snakemake {expected}"]


def test_exit_code_passes_through(project):
    assert project.run(STUB_EXIT="42")[0] == 42


def test_from_another_folder(project, tmp_path):
    code, _ = project.run("-n", cwd=tmp_path)
    assert code == 0
    assert project.calls("snakemake")


def test_stdout_of_printing_options_is_snakemakes_alone(project):
    process = subprocess.run([project.folder / "run", "--dag"], env=project.env, capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stdout == ""
    assert process.stderr.startswith("kdclimb: campaign default")


# ---- one at a time ------------------------------------------------------------------------------


def test_refused_while_another_run_holds_the_lock(project):
    with open(project.write(".snakemake/kdclimb.lock", f"{os.getpid()}\n")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        stale = project.write(".snakemake/locks/0.input.lock")
        code, lines = project.run()
        assert code == 1
        assert f"another ./run works in this folder, process {os.getpid()}" in lines[-1]
        assert project.calls() == []
        for looking in (["-n"], ["--lint"], ["--report", "r.html"], ["--version"], ["--summary"]):
            assert project.run(*looking)[0] == 0, looking
        assert stale.exists()
    assert project.run()[0] == 0


def test_refused_while_another_checkout_works_with_the_same_results(project, tmp_path):
    (tmp_path / "shared").mkdir()
    (project.folder / "results").symlink_to(tmp_path / "shared")
    with open(tmp_path / "shared/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, lines = project.run()
        assert code == 1 and "another checkout works with the same results" in lines[-1] and project.calls() == []
        assert project.run("-n")[0] == 0
    assert project.run()[0] == 0


def test_kill_9_frees_the_lock_though_jobs_live_on(project):
    """The process that ./run was becomes snakemake; the jobs it starts inherit no lock."""
    project.write(
        "snakemake.py",
        "import os, subprocess, time\n"
        "job = subprocess.Popen(['sleep', '60'])\n"
        "open('job', 'w').write(f'{job.pid} {os.getpid()} ' + os.environ['KDCLIMB_MASTER'] + '\\n')\n"
        "time.sleep(60)\n",
    )
    process = project.start()
    until(lambda: (project.folder / "job").exists() and (project.folder / "job").read_text().endswith("\n"), "the job")
    job, snakemake, master = map(int, (project.folder / "job").read_text().split())
    names = (".snakemake/kdclimb.lock", ".snakemake/kdclimb.venv.lock", "results/.lock")
    locks = [project.folder / name for name in names]
    try:
        assert process.pid == snakemake == master == int(locks[0].read_text())
        assert not any(map(is_free, locks))
        process.kill()
        process.wait()
        os.kill(job, 0)
        assert all(map(is_free, locks))

        (project.folder / "snakemake.py").unlink()
        second = project.start()
        for line in second.stdout:
            if f"waiting for what a killed ./run left to stop: process {job}" in line:
                break
        else:
            pytest.fail("did not wait for the job that a killed ./run left")
    finally:
        os.kill(job, signal.SIGKILL)
    assert second.wait(timeout=30) == 0


def test_what_a_killed_start_left_in_the_lock_is_waited_for(project):
    project.write(".snakemake/locks/0.output.lock")
    held = project.write("hold-unlock")
    first = project.start()
    until(lambda: project.calls("snakemake --unlock"), "the unlocking")
    first.kill()
    first.wait()
    second = project.start()
    line = next(line for line in second.stdout if "campaign" not in line)
    assert line == f"kdclimb: waiting for what a killed ./run (process {first.pid}) left to end\n"
    held.unlink()
    output, _ = second.communicate(timeout=30)
    assert second.returncode == 0, output


@pytest.mark.parametrize("how", ["program", "module", "script"])
def test_refused_beside_a_live_snakemake(project, how):
    project.write("sub/snakemake.py", "import time\ntime.sleep(60)\n")
    project.write("sub/snakemake", "import time\ntime.sleep(60)\n")
    path = {"PYTHONPATH": str(project.folder / "sub")}
    if how == "program":
        other = project.beside(["/usr/local/bin/snakemake", "60"], executable=shutil.which("sleep"))
    elif how == "module":
        other = project.beside([sys.executable, "-u", "-m", "snakemake", "--cores", "1"], env=project.env | path)
    else:
        other = project.beside([sys.executable, "sub/snakemake", "--cores", "1"])
    stale = project.write(".snakemake/locks/0.output.lock")
    until(lambda: b"snakemake" in Path(f"/proc/{other.pid}/cmdline").read_bytes(), "the other snakemake")
    code, lines = project.run()
    assert code == 1
    assert f"process {other.pid}" in lines[-1]
    assert stale.exists()
    assert project.calls() == []
    other.kill()
    other.wait()
    assert project.run()[0] == 0


def test_a_dry_run_and_other_folders_are_no_obstacle(project, tmp_path):
    project.write("sub/snakemake", "import time\ntime.sleep(60)\n")
    project.beside([sys.executable, "sub/snakemake", "--cores", "all", "-n"])
    project.started.append(subprocess.Popen([sys.executable, project.folder / "sub/snakemake"], cwd=tmp_path))
    project.beside(["grep", "snakemake", "--", "-"], executable=shutil.which("sleep"), stderr=subprocess.DEVNULL)
    project.write(".snakemake/locks/0.output.lock")
    assert project.run()[0] == 0


def test_stale_locks_are_cleared_with_the_same_config(project):
    project.write("a.yaml", "campaign: a\n")
    stale = project.write(".snakemake/locks/0.output.lock")
    code, lines = project.run("--configfile", "a.yaml", "--config", "campaign=x")
    assert code == 0
    assert not stale.exists()
    assert project.calls()[0] == "snakemake --unlock --configfile a.yaml --config campaign=x"
    assert len(project.calls()) == 2
    assert any("clearing the locks" in line for line in lines)


def test_a_record_of_snakemakes_that_is_no_text_is_dropped(project):
    whole, damaged = (
        project.write(".snakemake/metadata/YQ==", '{"a": "\u00e4"}'),
        project.write(".snakemake/metadata/Yg=="),
    )
    damaged.write_bytes(b'{"b": "\xc1"}')
    code, lines = project.run()
    assert code == 0 and whole.exists() and not damaged.exists()
    assert next(line for line in lines if "damaged" in line).startswith("kdclimb: dropping .snakemake/metadata/Yg==")
    assert not [line for line in project.run()[1] if "damaged" in line]


def test_a_home_folder_that_cannot_be_written_is_not_needed(project):
    project.write("snakemake.py", "import os\nopen('cache', 'w').write(os.environ['XDG_CACHE_HOME'])\n")
    assert project.run(HOME="/proc", XDG_CACHE_HOME="")[0] == 0
    assert (project.folder / "cache").read_text() == str(project.folder / ".snakemake/cache")


def test_nothing_to_clear_costs_no_call(project):
    project.write(".snakemake/log/x")
    assert project.run()[0] == 0
    assert len(project.calls()) == 1


# ---- set-up -------------------------------------------------------------------------------------


def test_second_start_calls_no_pip(bare):
    for _ in range(2):
        assert bare.run()[0] == 0
    assert len(bare.calls("venv")) == 1
    torch, hashed, rest = bare.calls("pip")
    assert " torch==" in torch and hashed.endswith("--require-hashes -r envs/locked.txt")
    assert rest.endswith(" -r requirements.txt")  # what torch's build brings


def test_tests_add_to_what_runs_need(project):
    assert project.run(script="test")[0] == 0
    assert [call.split()[-3:] for call in project.calls("pip")] == [["--require-hashes", "-r", "envs/locked-dev.txt"]]
    assert project.calls("pytest") == ["pytest -m not gpu -n 3"]
    code, lines = project.run("-m", "gpu", "-x", script="test")
    assert code == 0
    assert lines[0] == f"kdclimb: tests on cpu ({cores()})"
    assert project.calls("pytest")[-1] == "pytest -m not gpu -m gpu -x"  # alone on the GPU
    assert len(project.calls("pip")) == 1


def test_changed_pins_set_up_anew(project):
    project.write("requirements.txt", (project.folder / "requirements.txt").read_text() + "extra==1\n")
    assert project.run()[0] == 0
    assert project.calls("venv")


def test_changed_pins_wait_for_the_end_of_what_uses_the_old_ones(project):
    project.write("requirements.txt", (project.folder / "requirements.txt").read_text() + "extra==1\n")
    with open(project.folder / ".snakemake/kdclimb.venv.lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        code, lines = project.run("-n")
    assert code == 1
    assert "a ./run or ./test works with them" in lines[-1]
    assert project.calls() == []


@pytest.mark.parametrize("stage", ["venv without a stamp", "broken python"])
def test_unfinished_setup_is_done_again(project, stage):
    left = project.write(".venv/lib/half-installed")
    if stage == "broken python":
        (project.folder / ".venv/bin/python").unlink()
        (project.folder / ".venv/bin/python").symlink_to("/nonexistent/python3")
    else:
        for path in (project.folder / ".venv").glob(".kdclimb-*"):
            path.unlink()
    assert project.run()[0] == 0
    assert not left.exists()
    assert len(project.calls("venv")) == 1


def test_killed_setup_is_done_again_after_its_pip_ended(bare):
    hold = bare.write("hold-pip")
    first = bare.start()
    until(lambda: bare.calls("pip"), "the first pip")
    first.kill()
    first.wait()
    second = bare.start()
    for line in second.stdout:
        if "another set-up is at work here" in line:
            break
    assert len(bare.calls("venv")) == 1
    hold.unlink()
    assert second.wait(timeout=30) == 0
    assert len(bare.calls("venv")) == 2
    assert len(bare.calls("snakemake")) == 1


def test_killed_while_adding_the_test_packages(project):
    project.write("hold-pip")
    first = project.start(script="test")
    until(lambda: project.calls("pip"), "pip")
    assert project.run("-n")[0] == 0, "a run has all it needs"
    first.kill()
    first.wait()
    (project.folder / "hold-pip").unlink()
    assert project.run(script="test")[0] == 0
    assert len(project.calls("venv")) == 1
    assert not (project.folder / ".venv/.kdclimb-unfinished").exists()


def test_started_together_they_set_up_once(bare):
    processes = [bare.start("-n"), bare.start(script="test"), bare.start("-n"), bare.start(script="test")]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    assert len(bare.calls("venv")) == 1
    assert len(bare.calls("pip")) == 4


@pytest.mark.parametrize(
    ("python", "said"), [("/bin/false", "/bin/false does not run"), ("old", "is Python 3.9"), ("none", "does not run")]
)
def test_unsupported_python_is_named(bare, python, said):
    bare.script(bare.tools / "old", "#!/bin/sh\necho 3.9\n")
    code, lines = bare.run(PYTHON=python)
    assert code == 1
    assert "Python 3.11 or 3.12 is needed" in lines[-1]
    assert said in lines[-1]
    assert not (bare.folder / ".venv").exists()


def test_the_first_supported_python_is_taken(bare):
    bare.script(bare.tools / "python3", "#!/bin/sh\necho 3.13\n")
    bare.script(bare.tools / "python3.12", STUB.replace("3.11", "3.12"))
    code, lines = bare.run()
    assert code == 0
    assert "with Python 3.12" in lines[1]
    for name in ("python3.11", "python3.12"):
        bare.script(bare.tools / name, "#!/bin/sh\necho 3.9\n")
    shutil.rmtree(bare.folder / ".venv")
    code, lines = bare.run()
    assert code == 1
    assert "python3 is Python 3.13; python3.12 is Python 3.9; python3.11 is Python 3.9" in lines[-1]


def test_missing_venv_module_names_its_package(bare):
    bare.script(bare.tools / "no-venv", STUB.replace('case "$1 $2" in', 'case "$1 $2" in\n  *ensurepip*) exit 1 ;;'))
    code, lines = bare.run(PYTHON="no-venv")
    assert code == 1
    assert "apt install python3-venv" in lines[-1]


def test_failing_pip_leaves_no_stamp(bare):
    bare.script(bare.tools / "python3", STUB.replace('"-m pip") ', '"-m pip") [[ -e ok ]] || exit 1; '))
    assert bare.run()[0] == 1
    assert bare.calls("snakemake") == []
    bare.write("ok")
    assert bare.run()[0] == 0
