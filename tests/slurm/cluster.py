"""A real Slurm of four nodes on loopback: munged, slurmctld, slurmd, started by hand and stopped by their pids."""

import contextlib
import csv
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import debian
import pytest
from checkouts import CORES, Checkout

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIG = Path("/etc/slurm")  # where Debian's Slurm looks: the jobstep plugin drops SLURM_CONF
NODES = ("node1", "node2", "node3", "node4")
GPUS = {"node1": "/dev/zero", "node2": "/dev/full"}  # and the device that stands for it
PORTS = {"CTLD_PORT": 26817, "SRUN_PORTS": "26900-26999"}
PORTS |= {f"{node.upper()}_PORT": 26818 + number for number, node in enumerate(NODES)}
# Seconds to a master's first look at its jobs, which take 15 to 25. Each time that none has ended it sleeps ten more.
FIRST_LOOK = 8


def environment() -> dict[str, str]:
    """Read anew, since conftest.py may have set a temporary folder for this worker meanwhile."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("KDCLIMB", "SNAKEMAKE", "SLURM"))}
    return kept | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}


def call(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment(), **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def is_left_over(file: Path) -> bool:
    """Whether a slurm.conf is of these tests, killed before they could take it away."""
    return file.is_symlink() and not any(is_alive(pid) for pid in file.resolve().parent.glob("*.pid"))


def is_alive(pid_file: Path) -> bool:
    return pid_file.is_file() and Path("/proc", pid_file.read_text().strip() or "none").exists()


def install() -> None:
    """Debian's packages. Where that can't be, the tests are skipped, but never in CI."""
    say = pytest.fail if os.environ.get("CI") else pytest.skip
    if (CONFIG / "slurm.conf").exists() and not is_left_over(CONFIG / "slurm.conf"):
        say(f"{CONFIG} is in use: this machine has a Slurm of its own, which these tests leave alone")
    if os.getuid() != 0:
        say("these tests start munged, slurmctld and slurmd as root, and you are not")
    if all(shutil.which(name, path=environment()["PATH"]) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    if not shutil.which("apt-get"):
        say(f"Slurm can be installed here on Debian alone: apt install {' '.join(PACKAGES)}")
    try:
        debian.install(*PACKAGES)
    except AssertionError as error:
        say(f"Slurm could not be installed: {error}")


class Cluster:
    """Started when made; `stop` ends its daemons and whatever jobs are left."""

    def __init__(self, folder: Path):
        self.folder, self.cpus = folder, len(CORES)  # all, though this process may have but some of them
        for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        self.daemons: list[subprocess.Popen] = []
        self._configure()
        self._start()

    def _configure(self) -> None:
        text = (Path(__file__).parent / "slurm.conf").read_text()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2  # the nodes share it
        host = socket.gethostname().split(".")[0]
        values = {"FOLDER": self.folder, "HOST": host, "CPUS": self.cpus, "MEMORY_MB": memory} | PORTS
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        (self.folder / "slurm.conf").write_text(text)
        gpus = "".join(f"NodeName={node} Name=gpu Type=fake File={device}\n" for node, device in GPUS.items())
        (self.folder / "gres.conf").write_text(gpus)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        CONFIG.mkdir(exist_ok=True)
        for name in ("slurm.conf", "gres.conf"):
            (CONFIG / name).unlink(missing_ok=True)  # a link into a folder that is gone, of a test that was killed
            (CONFIG / name).symlink_to(self.folder / name)

    def _start(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munge.seed"
        flags = [f"--{flag}={self.folder / name}" for flag, name in files.items()]
        self._launch("munged", "--foreground", "--force", *flags)
        self._wait_for((self.folder / "munge.socket").is_socket)
        self._launch("slurmctld", "-D")
        self._wait_for(lambda: "UP" in self._ask("scontrol", "ping"))  # else slurmd waits before it tries again
        for node in NODES:
            self._launch("slurmd", "-D", "-N", node)
        self._wait_for(lambda: len(self.nodes("idle")) == len(NODES))

    def _launch(self, *command: str) -> None:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        daemon = subprocess.Popen(command, env=environment(), preexec_fn=_die_with_the_tests, **quiet)
        self.daemons.insert(0, daemon)

    def _wait_for(self, seen) -> None:
        end = time.monotonic() + 30
        while not seen():
            logs = {log.name: log.read_text()[-3000:] for log in self.folder.glob("*.log")}
            assert time.monotonic() < end, logs
            time.sleep(0.1)

    def _ask(self, *command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, env=environment()).stdout.strip()

    def nodes(self, state: str) -> list[str]:
        """Those in this state."""
        return self._ask("sinfo", "--noheader", "--Node", f"--states={state}", "--format=%N").split()

    def lose(self, node: str) -> None:
        """To Slurm it is down, and what runs there is killed and queued again; then it is back."""
        call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        self._ask("scontrol", "update", f"NodeName={node}", "State=RESUME")  # refused where it is back by itself
        self._wait_for(lambda: node not in self.nodes("down"))

    def jobs(self, *states: str, folder: Path | None = None) -> list[tuple[str, str]]:
        """(id, comment) of the jobs in these states, oldest first; of all folders, or those submitted in one."""
        options = [f"--states={','.join(states) or 'all'}", "--format=%i|%k|%Z", "--sort=i"]
        rows = [line.split("|") for line in call("squeue", "--noheader", *options).splitlines()]
        return [(job, comment) for job, comment, place in rows if folder is None or Path(place) == folder]

    def placed(self, folder: Path) -> dict[str, str]:
        """{id: node} of the jobs that were submitted in `folder` and have been given one."""
        lines = call("squeue", "--noheader", "--states=all", "--format=%i|%N|%Z").splitlines()
        rows = [line.split("|") for line in lines]
        return {job: node for job, node, place in rows if node and Path(place) == folder}

    def job(self, run_id: str, *states: str) -> str | None:
        """The id of a run's job in one of these states."""
        return next((job for job, comment in self.jobs(*states) if comment == f"rule_train_wildcards_{run_id}"), None)

    def stop(self) -> None:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], capture_output=True, env=environment())
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(timeout=20)
        for environ in Path("/proc").glob("[0-9]*/environ"):  # what a lost node has forgotten
            with contextlib.suppress(OSError):  # it has ended just now
                if b"SLURM_CLUSTER_NAME=kdclimb" in environ.read_bytes().split(b"\0"):
                    os.kill(int(environ.parent.name), signal.SIGKILL)
        for name in ("slurm.conf", "gres.conf"):
            (CONFIG / name).unlink(missing_ok=True)


def _die_with_the_tests() -> None:
    """For a child: on all cores, and ended by SIGTERM when the process that started it is gone."""
    os.sched_setaffinity(0, CORES)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Master(Checkout):
    """A checkout whose slurm/config.yaml is filled in as a user would, with times and sizes of the tiny campaign.

    `data`: a results folder with prepared data to start from.
    """

    command = ("snakemake", "--cores", "8", "--profile", "slurm")

    def __init__(self, path: Path, *, partition: str = "gpu", minutes: int = 10, threads: int = 1, data=None):
        super().__init__(path)
        if data is not None:
            shutil.copytree(data, path / "results")
        profile = "slurm/config.yaml"
        text = (path / profile).read_text()
        (path / profile).write_text("".join(line for line in text.splitlines(True) if "slurm_account:" not in line))
        self.edit(profile, "slurm_partition: gpu", f"slurm_partition: {partition}")
        self.edit(profile, "minutes: 240", f"minutes: {minutes}")
        self.edit(profile, "TERM@120", "TERM@60")
        self.edit(profile, "checks: 20\n", f"checks: {FIRST_LOOK}\n")
        self.edit(profile, "seconds-between-status-checks: 5", "seconds-between-status-checks: 1")
        for rule, memory in {"train": 32000, "train_batch": 32000, "data": 8000}.items():
            self.edit(profile, f"  {rule}:\n    mem_mb: {memory}", f"  {rule}:\n    mem_mb: 2000")
        for rule, cores in {"train": 4, "train_batch": 4, "data": 2}.items():
            self.edit(profile, f"  {rule}: {cores}\n", f"  {rule}: {threads}\n")

    def environment(self) -> dict[str, str]:
        found = environment()
        return found | {"PATH": f"{self.path / '.venv/bin'}:{found['PATH']}"}

    def begin(self, *arguments) -> None:
        """Start the master beside others. Its output goes to a file, as nobody reads it meanwhile."""
        with (self.path / "output").open("w") as file:
            self.process = self.start(*arguments, stdout=file)

    def end(self) -> str:
        """The output of a master that was begun."""
        self.process.wait(timeout=600)
        return (self.path / "output").read_text()

    def dry_run(self, *arguments) -> str:
        return call(self.path / ".venv/bin/snakemake", "--cores", 8, "-n", *arguments, cwd=self.path)

    def summary(self, run_id: str) -> dict[str, str]:
        with (self.path / "results/runs" / run_id / "summary.csv").open(newline="") as file:
            return next(csv.DictReader(file))

    def read(self, path: Path) -> str:
        """A log that Snakemake may just have deleted, to start its job again."""
        return path.read_text() if path.is_file() else ""

    def wait_for(self, what: str, seen, seconds: float = 120):
        """What `seen()` returns once that is true."""
        end = time.monotonic() + seconds
        while not (found := seen()):
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.1)
        return found

    def hold(self, run_id: str, words: str) -> int:
        """Stop a run's trainer (SIGSTOP) once it has logged these words, so that it does not end, however fast."""
        folder = self.path / "results/runs" / run_id
        self.wait_for(words, lambda: words in self.read(folder / "train.log"))
        trainer = json.loads((folder / ".state/lease.json").read_text())["process"]
        os.kill(trainer, signal.SIGSTOP)
        self.wait_for("its stop", lambda: is_held(trainer))  # which it makes when it next has a core
        return trainer


def is_held(process: int) -> bool:
    """Whether a process is stopped still, and no SIGTERM waits for it; one that Slurm sends may wake it, too."""
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    except FileNotFoundError:
        return False
    return status["State"].startswith("T") and not int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1


def go_on(process: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGCONT)
