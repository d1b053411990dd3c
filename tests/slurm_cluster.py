"""A Slurm cluster of two nodes on this machine, in a folder of its own: munged, slurmctld and two slurmd's,
ended by their process ids.

python tests/slurm_cluster.py FOLDER     # starts one, says how to reach it, and ends it with Ctrl-C or
SIGTERM
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.name != "posix" or os.geteuid() != 0:
        return "slurmd needs root"
    lacking = [name for name in NEEDED if not shutil.which(name, path=_path())]
    return f"not installed: {', '.join(lacking)} (make slurm-packages)" if lacking else None


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _configuration(host: str, folder: Path, user: str, ports: list[int]) -> str:
    """slurm.conf of a controller and two nodes on this host; ``ports`` are theirs, in this order."""
    return f"""\
ClusterName=endprompt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket,cred_expire=30
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=5
KillWait=10
JobRequeue=1
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=2 RealMemory=4000 Gres=gpu:a100:2 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """nodes n1 and n2.  environment: what a client of the cluster needs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": _path(),
        }
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _spawn(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self.environment,
            start_new_session=True,
        )

    def _start(self) -> None:
        host, folder = socket.gethostname().split(".")[0], self.folder
        munge = folder / "munge"
        for name in ("munge", "state", "spool", "log", "run"):
            (folder / name).mkdir(exist_ok=True)
        key = munge / "munge.key"
        key.write_bytes(os.urandom(1024))
        owner = pwd.getpwuid(os.geteuid())
        for path in (munge, key):
            os.chmod(path, 0o700 if path.is_dir() else 0o600)
        os.chmod(munge, 0o711)
        (folder / "slurm.conf").write_text(_configuration(host, folder, owner.pw_name, _free_ports(3)))
        # Two GPUs a node, of which nobody asks but how many there are.
        for number in range(2):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu Type=a100 File={folder}/gpu[0-1]\n")
        version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
        (folder / "cgroup.conf").write_text(f"CgroupPlugin=cgroup/{version}\n")
        self._spawn(
            "munged",
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            f"--socket={munge}/munge.socket",
            f"--pid-file={munge}/munged.pid",
            f"--log-file={munge}/munged.log",
            f"--seed-file={munge}/munged.seed",
        )
        self.until(lambda: (munge / "munge.socket").exists(), "munged's socket")
        self._spawn("slurmctld", "slurmctld", "-D", "-c")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.until(lambda: self.states() == {"n1": "IDLE", "n2": "IDLE"}, "two idle nodes", 60)

    def start_node(self, node: str) -> None:
        self._spawn(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """kill -9 of the node's slurmd, its slurmstepd's and every process of a job there: the node is gone
        from one moment to the next.
        """
        self._kill([self.processes[node].pid, *self._of(node)])
        self.processes[node].wait()

    @staticmethod
    def _kill(pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _of(self, node: str) -> list[int]:
        """The processes of jobs on ``node``, known by what Slurm puts into their environment, and the
        slurmstepd's above them.
        """
        mine = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        tasks, parents = [], set()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if mine <= set((path / "environ").read_bytes().split(b"\0")):
                    tasks.append(int(path.name))
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    if (Path("/proc") / str(parent) / "cmdline").read_bytes().startswith(b"slurmstepd"):
                        parents.add(parent)
        return [*parents, *tasks]

    def client(self, *command: str, check: bool = True, **environment: str) -> str:
        result = subprocess.run(
            [str(part) for part in command],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=180,
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: exit {result.returncode}: {result.stdout}")
        return result.stdout.strip()

    def states(self) -> dict[str, str]:
        text = self.client("scontrol", "-o", "show", "nodes", check=False)
        return dict(re.findall(r"NodeName=(\S+).*?State=([A-Z]+\*?)", text))

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", self.client("scontrol", "-o", "show", "job", number)))

    def until(self, condition, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}"
                    for path in sorted([*self.folder.glob("*.out"), *self.folder.glob("log/*.log")])
                )
                raise TimeoutError(f"no {what} within {seconds} s; states {self.states()}\n{logs}")
            time.sleep(0.2)

    def __exit__(self, *_):
        if "slurmctld" in self.processes:
            self.client("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name, check=False)
            time.sleep(1)
        for node in ("n1", "n2"):
            self._kill(self._of(node))
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(f"no cluster here: {reason}")
    with Cluster(Path(sys.argv[1]).absolute()) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
