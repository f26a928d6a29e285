"""A real Slurm of one node on loopback: munged, slurmctld and slurmd, started by hand and stopped by their pids."""

import csv
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
from checkouts import Checkout

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
CONFIG = Path("/etc/slurm")  # where Debian's Slurm looks: the jobstep plugin drops SLURM_CONF
NODE = "node1"
PORTS = {"CTLD_PORT": 26817, "SLURMD_PORT": 26818, "SRUN_PORTS": "26900-26999"}
AS_TYPED = "snakemake --cores 8 --profile slurm".split()
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("KDCLIMB", "SNAKEMAKE", "SLURM"))}
ENVIRONMENT |= {"PATH": f"{os.environ['PATH']}:/usr/sbin", "DEBIAN_FRONTEND": "noninteractive"}


def call(*command, **options) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def install() -> None:
    """Debian's packages. Where that can't be, the tests are skipped, but never in CI."""
    if all(shutil.which(name, path=ENVIRONMENT["PATH"]) for name in ("munged", "slurmctld", "slurmd", "sbatch")):
        return
    if os.getuid() == 0 and shutil.which("apt-get"):
        call("apt-get", "update")
        call("apt-get", "install", "-y", "--no-install-recommends", *PACKAGES)
    else:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"Slurm's packages can be installed by root on Debian alone: apt-get install {' '.join(PACKAGES)}")


class Cluster:
    """Started when made; `stop` ends its daemons and whatever jobs are left."""

    def __init__(self, folder: Path):
        self.folder, self.cpus = folder, len(os.sched_getaffinity(0))
        if (CONFIG / "slurm.conf").exists():
            pytest.fail(f"{CONFIG} is in use: this machine has a Slurm of its own, which these tests leave alone")
        for name in ("slurmctld", "slurmd"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        self._configure()
        self._start()

    def _configure(self) -> None:
        text = (Path(__file__).parent / "slurm.conf").read_text()
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 512
        host = socket.gethostname().split(".")[0]
        values = {"FOLDER": self.folder, "HOST": host, "NODE": NODE, "CPUS": self.cpus, "MEMORY_MB": memory} | PORTS
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text(f"NodeName={NODE} Name=gpu Type=fake File=/dev/zero,/dev/full\n")
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
        call("munged", "--force", *(f"--{flag}={self.folder / name}" for flag, name in files.items()))
        call("slurmctld")
        call("slurmd", "-N", NODE)
        end = time.monotonic() + 30
        while self.node_state() not in ("idle", "mixed", "allocated"):
            assert time.monotonic() < end, (self.folder / "slurmctld.log").read_text()[-3000:]
            time.sleep(0.1)

    def node_state(self) -> str:
        listed = subprocess.run(
            ["sinfo", "--noheader", "--format=%T", f"--nodes={NODE}"], capture_output=True, text=True, env=ENVIRONMENT
        )
        return listed.stdout.strip()

    def jobs(self, *states: str) -> list[tuple[str, str]]:
        """(id, comment) of the jobs in these states, oldest first."""
        options = [f"--states={','.join(states) or 'all'}", "--format=%i|%k", "--sort=i"]
        return [tuple(line.split("|")) for line in call("squeue", "--noheader", *options).splitlines()]

    def job(self, run_id: str, *states: str) -> str | None:
        """The id of a run's job in one of these states."""
        return next((job for job, comment in self.jobs(*states) if comment == f"rule_train_wildcards_{run_id}"), None)

    def stop(self) -> None:
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user=root"], capture_output=True, env=ENVIRONMENT)
        for name in ("slurmd", "slurmctld", "munged"):
            file = self.folder / f"{name}.pid"
            if file.is_file():
                self._end(int(file.read_text()))
        for name in ("slurm.conf", "gres.conf"):
            (CONFIG / name).unlink(missing_ok=True)

    def _end(self, process: int) -> None:
        os.kill(process, signal.SIGTERM)
        end = time.monotonic() + 20
        while Path(f"/proc/{process}").exists() and time.monotonic() < end:
            time.sleep(0.1)


class Master(Checkout):
    """A checkout whose slurm/config.yaml is filled in as a user would, with times and sizes of the tiny campaign."""

    def __init__(self, path: Path, cluster: Cluster, *, minutes: int = 10, threads: int = 1, finished=None):
        super().__init__(path, finished)
        self.cluster = cluster
        profile = "slurm/config.yaml"
        text = (path / profile).read_text()
        (path / profile).write_text("".join(line for line in text.splitlines(True) if "slurm_account:" not in line))
        self.edit(profile, "minutes: 240", f"minutes: {minutes}")
        self.edit(profile, "TERM@120", "TERM@60")
        self.edit(profile, "checks: 20\n", "checks: 1\n")
        self.edit(profile, "seconds-between-status-checks: 5", "seconds-between-status-checks: 1")
        for rule, memory in {"train": 32000, "train_batch": 32000, "data": 8000}.items():
            self.edit(profile, f"  {rule}:\n    mem_mb: {memory}", f"  {rule}:\n    mem_mb: 2000")
        for rule, cores in {"train": 4, "train_batch": 4, "data": 2}.items():
            self.edit(profile, f"  {rule}: {cores}\n", f"  {rule}: {threads}\n")

    def start(self, *arguments) -> subprocess.Popen:
        environment = ENVIRONMENT | {"PATH": f"{self.path / '.venv/bin'}:{ENVIRONMENT['PATH']}"}
        return subprocess.Popen(
            [*AS_TYPED, *arguments],
            cwd=self.path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def dry_run(self, *arguments) -> str:
        return call(self.path / ".venv/bin/snakemake", "--cores", 8, "-n", *arguments, cwd=self.path)

    def summary(self, run_id: str) -> dict[str, str]:
        with (self.path / "results/runs" / run_id / "summary.csv").open(newline="") as file:
            return next(csv.DictReader(file))

    def read(self, path: Path) -> str:
        """A log that Snakemake may just have deleted, to start its job again."""
        return path.read_text() if path.is_file() else ""

    def wait_for(self, what: str, seen, seconds: float = 90):
        """What `seen()` returns once that is true."""
        end = time.monotonic() + seconds
        while not (found := seen()):
            assert time.monotonic() < end, f"{what}: not within {seconds} s"
            time.sleep(0.2)
        return found
