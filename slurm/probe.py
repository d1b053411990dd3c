"""What is wrong with the Python that a job would use, in one line; silent if nothing is.

environment.sh hands its text to `python -c`, through the site's launcher, with OUT and then paths and their
inode numbers: what the job sees outside of a container it must see inside.  Old Pythons must be able to read
this, so that they can say that they are old.
"""

import ctypes
import os
import sys

NEEDED = ("torch", "transformers", "deepspeed")


def wrong(out, seen, device="/dev/nvidiactl"):
    """out: value of OUT; seen: (path, inode) outside; device: what a node with NVIDIA GPUs has."""
    if sys.version_info < (3, 11):  # noqa: UP036 (old Pythons)
        return "this is Python %d.%d, and 3.11 is needed" % sys.version_info[:2]  # noqa: UP031 (old Pythons)
    if os.environ.get("OUT") != out:
        return "the launcher does not hand the environment on (Apptainer: no --cleanenv)"
    for path, inode in seen:
        try:
            there = os.stat(path).st_ino == int(inode)
        except OSError:
            there = False
        if not there:
            said = os.path.abspath(path) if path != "." else "the repository, as the folder it starts in"
            return "the launcher does not show " + said + " (Apptainer: --bind it)"
    import importlib.util

    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return "it lacks " + ", ".join(lacking)
    try:
        import endprompt.cli  # noqa: F401 (whether its own imports are there)
    except ImportError as error:
        return "it cannot import endprompt: " + str(error)
    if os.path.exists(device) and os.environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "the job has GPUs, but no libcuda.so.1 is seen (Apptainer: --nv)"
    return None


if __name__ == "__main__":
    complaint = wrong(sys.argv[1], list(zip(sys.argv[2::2], sys.argv[3::2])))  # noqa: B905 (old Pythons)
    if complaint:
        sys.exit(complaint)
