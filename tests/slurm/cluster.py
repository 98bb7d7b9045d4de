"""A real Slurm of two nodes on the loopback of one machine: munged, slurmctld and two slurmd in one folder."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 180  # seconds: of every wait; a job of these tests takes some ten
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=86400
KillWait=30
JobRequeue=1
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=64 RealMemory=1024000 Gres=gpu:h100:4 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10
"""


class Cluster:
    """The daemons and what the tests ask of them.

    Parameters
    ----------
    folder : Path
        Holds everything; empty.

    Attributes
    ----------
    environment : dict
        For Slurm's commands, and for what calls them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        theirs = ("SLURM_", "SBATCH_", "SPARSEKV_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # as in an active environment
        self.environment = {**inherited, "PATH": path, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start the daemons; returns when both nodes are idle."""
        for name in ("run", "log", "state", "spool/n1", "spool/n2"):
            (self.folder / name).mkdir(parents=True)
        ports = dict(zip(("controller", "first", "second"), free_ports(3), strict=True))
        host = socket.gethostname().partition(".")[0]
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(folder=self.folder, host=host, **ports))
        self._make_gpus()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "run/munge.socket", "pid-file": "run/munged.pid"}
        files |= {"log-file": "log/munged.log", "seed-file": "munge.seed"}
        self.call("munged", "--force", *(f"--{option}={self.folder / file}" for option, file in files.items()))
        self.call("slurmctld", "-c")
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node)
        wait_until(lambda: set(self.call("sinfo", "-hNo", "%T", check=False).split()) == {"idle"}, "idle nodes", 30)

    def _make_gpus(self) -> None:
        """Device files, as Slurm wants to see them; there is nothing behind them."""
        for node in ("n1", "n2"):
            for number in range(4):
                os.mknod(self.folder / "run" / f"{node}gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        lines = (f"NodeName={node} Name=gpu Type=h100 File={self.folder}/run/{node}gpu[0-3]\n" for node in ("n1", "n2"))
        (self.folder / "gres.conf").write_text("".join(lines))

    def stop(self) -> None:
        """End every job, then every daemon by its own pid."""
        if (self.folder / "run/slurmctld.pid").exists():
            self.call("scancel", "--user=root", check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self.call("squeue", "-h", "-t", "R,CG", check=False), "an empty queue", 45)
        files = [self.folder / "run" / f"{name}.pid" for name in ("slurmd-n1", "slurmd-n2", "slurmctld", "munged")]
        stop_processes([int(file.read_text()) for file in files if file.exists()])

    # ---- what tests ask ----

    def call(self, *words: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """What a command prints."""
        done = subprocess.run(
            words,
            env={**self.environment, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0 or not check, f"{' '.join(words)}: {done.stderr or done.stdout}"
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What Slurm says of a job, or of a task of an array (12_0)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "-o", "show", "job", job)))

    def wait(self, *jobs: str) -> list[str]:
        """How jobs ended."""
        for job in jobs:
            wait_until(lambda job=job: self.show(job)["JobState"] in ENDED, f"the end of job {job}")
        return [self.show(job)["JobState"] for job in jobs]

    def wait_for_processes(self, job: str) -> None:
        """Wait until nothing of a job is left running."""
        wait_until(lambda: not self.call("squeue", "-h", "-t", "R,CG", "-j", job), f"the processes of job {job}")

    def start_again(self, job: str, restarts: int = 1) -> None:
        """Wait until a job was requeued so many times in all, and start it: Slurm itself would wait two minutes."""

        def restarted() -> bool:
            shown = self.show(job)
            if shown["JobState"] == "PENDING":
                time.sleep(1.5)  # sooner its credential would still be the one that was just revoked
                self.call("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return int(shown["Restarts"]) >= restarts and shown["JobState"] in ("RUNNING", *ENDED)

        wait_until(restarted, f"restart {restarts} of job {job}")


class Project:
    """A folder as a user has it: the jobs, the configurations and a folder for logs.

    Parameters
    ----------
    cluster : Cluster
    folder : Path
        A new one.
    """

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        for name in ("scripts", "configs", "logs"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.log"))

    def sbatch(self, script: str, *arguments: str, options: tuple[str, ...] = (), **environment: str) -> str:
        """Submit a script of scripts/ by hand; returns the job's id."""
        words = ["sbatch", "--parsable", *options, f"scripts/{script}", *arguments]
        return self.cluster.call(*words, cwd=self.folder, **environment)

    def log(self, job: str) -> str:
        """All that a job has printed."""
        return "\n".join(path.read_text("utf-8") for path in self.folder.glob(f"logs/*-{job}.log"))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_until(condition: Callable[[], bool], what: str, timeout: float = TIMEOUT) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout} s for {what}"
        time.sleep(0.2)


def stop_processes(numbers: list[int]) -> None:
    """TERM, and KILL for those that are there ten seconds later."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        for number in filter(lives, numbers):
            os.kill(number, which)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not any(map(lives, numbers)), "the end of the daemons", 10)


def lives(number: int) -> bool:
    return Path(f"/proc/{number}").exists()
