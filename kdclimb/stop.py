"""When a job is asked to stop, and how it says that it did: it can be started again, and then goes on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: start it again and it goes on


class StopRequests:
    """Whether to stop: on SIGTERM, SIGINT or SIGUSR1, or when the master that KDCLIMB_MASTER names is gone.

    Slurm sends SIGTERM to what it preempts or requeues, and before its time limit the signal that sbatch asked for.
    ./run sets that variable. Without it a job would outlive a killed master, and its successor would wait for a device
    that nobody watches.
    """

    def __init__(self):
        self.signalled = False
        self.master = int(os.environ.get("KDCLIMB_MASTER", 0))
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_) -> None:
        self.signalled = True

    def asked(self) -> bool:
        if self.master and not Path(f"/proc/{self.master}").exists():
            return True
        return self.signalled
