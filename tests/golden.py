"""Golden values: what every method of the tiny recipe prepares, trains and scores, to show that a refactor
changed no bit of it.

    python tests/golden.py record                                 # before the move, into tests/golden.json
    python tests/golden.py compare                                # after it: exit 1 and a line a difference
    python tests/golden.py compare --only shards --methods short  # a part, in seconds

Nothing but the command line is used, in processes of its own, and the files it writes: modules may move.
Shards must be the same on every machine.  The bits of trained weights depend on the processor and on torch:
where those are not the recorded ones, numbers are compared to 1e-3 and what hangs on single bits is left out.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).with_suffix(".json")
RECIPE = "recipes/tiny.yaml"
PARTS = ("shards", "training", "evaluation")
MAIN, SCORED = "endprompt", ("endprompt", "base", "interpolation")  # MAIN: trained under DeepSpeed, too
ZERO = "@zero3"  # ends the name of a run under DeepSpeed
TOLERANCE = 1e-3
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "numpy", "pyarrow")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# 512 short rows or 64 long ones; short ones in three shards.
SHARDS = ["data.tokens=131072", "data.rows_per_shard=200"]
TRAINING = [*SHARDS, "train.max_steps=8", "train.logging_steps=1"]
ALONE = "train.deepspeed=null"
EVALUATION = [
    *TRAINING,
    ALONE,
    "eval.tasks=[passkey, multikey, perplexity]",
    "eval.lengths=[256, 512]",
    "eval.samples=4",
    "eval.depths=2",
    "eval.perplexity_tokens=512",
]

# What differs from run to run, or says where and with what it was made.  "code": a digest of a task's source.
UNSTABLE = re.compile(
    "versions|commit|device|date|seconds|.*tokens_per_second|.*memory_gib|corpus"
    "|name_or_path|fingerprint|code|lm_eval|transformers_version"
)
# What a last bit can turn over: weights, answers, and the counts of right answers.
FRAGILE = re.compile(
    r"training/.*/model\.safetensors|evaluation/.*/pred"
    r"|evaluation/[^/]+/(passkey|multikey)/.*/(score|low|high|correct)"
)

# Several commands in one process, which loads its libraries once.
COMMANDS = """
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["endprompt", *arguments]
    try:
        runpy.run_module("endprompt", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


class Broken(Exception):
    """A command that failed, or a request that makes no sense."""


def run(*command: str, expect: int = 0) -> str:
    """What a command prints.  Raises Broken, with the end of it, at any other exit code than ``expect``."""
    result = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if result.returncode != expect:
        raise Broken(f"exit code {result.returncode} of {' '.join(command)}:\n{result.stdout[-3000:]}")
    return result.stdout


def command(name: str, method: str, out: Path, settings: list[str]) -> list[str]:
    workers = ["--workers", "1"] if name == "prepare" else []
    overrides = [part for setting in settings for part in ("--set", setting)]
    return [name, RECIPE, method, "--out", str(out), *workers, *overrides]


def methods() -> list[str]:
    """The names of all methods, which the command line lists when it is asked for one that there is not."""
    said = run("-m", "endprompt", "train", RECIPE, "no-such-method", expect=2)
    return re.search(r"choose one of (.+)", said)[1].strip().split(", ")


def flat(value, name: str) -> dict:
    """{path: leaf} of nested dictionaries and lists, UNSTABLE keys left out; plain lists are leaves."""
    if isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    parts = [flat(item, f"{name}/{key}") for key, item in value.items() if not UNSTABLE.fullmatch(str(key))]
    return {key: leaf for part in parts for key, leaf in part.items()}


def file_values(path: Path, name: str) -> dict:
    """The values in a JSON or JSONL file; of any other file its SHA-256."""
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()), name)
    if path.suffix == ".jsonl":
        return flat([json.loads(line) for line in path.read_text().splitlines()], name)
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()}


def values_of(name: str, *paths: Path, below: Path) -> dict:
    """The values of files, each under ``name`` and its path from ``below``."""
    found = [file_values(path, f"{name}/{path.relative_to(below).as_posix()}") for path in paths]
    return {key: value for part in found for key, value in part.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Runs:
    """Runs commands, with ``settings`` over all others and outputs below ``work``; keeps their values."""

    def __init__(self, work: Path, settings: list[str]):
        self.alone, self.zero, self.settings = work / "alone", work / "zero3", settings
        self.values: dict = {}

    def folder(self, name: str) -> Path:
        """Where the run of a method is, or that of a method under DeepSpeed, whose name ends in ZERO."""
        out = self.zero if name.endswith(ZERO) else self.alone
        return out / Path(RECIPE).stem / name.removesuffix(ZERO)

    def preparing(self, names: list[str]) -> list[list[str]]:
        """The commands that prepare the shards of runs."""
        settings = [*SHARDS, *self.settings]
        return [
            command("prepare", name.removesuffix(ZERO), self.folder(name).parents[1], settings)
            for name in names
        ]

    def prepare(self, names: list[str]) -> list[str]:
        """Prepares the shards of runs; returns the names of those that have any, as what trains does."""
        say(f"shards of {', '.join(names)}")
        run("-c", COMMANDS, json.dumps(self.preparing(names)))
        return [name for name in names if (self.folder(name) / "shards/manifest.json").is_file()]

    def read_shards(self, name: str) -> None:
        folder = self.folder(name) / "shards"
        files = sorted(path for path in folder.iterdir() if path.suffix in (".parquet", ".json"))
        self.values |= values_of(f"shards/{name}", *files, below=folder)

    def train(self, name: str) -> None:
        say(f"training of {name}")
        settings = [*TRAINING, *([] if name.endswith(ZERO) else [ALONE]), *self.settings]
        out = self.folder(name).parents[1]
        run("-m", "endprompt", *command("train", name.removesuffix(ZERO), out, settings))

    def read_training(self, name: str) -> None:
        folder = self.folder(name)
        files = [folder / "train.json", folder / "model/config.json", folder / "model/model.safetensors"]
        self.values |= values_of(f"training/{name}", *files, below=folder)

    def evaluate(self, name: str) -> None:
        say(f"evaluation of {name}")
        folder = self.folder(name) / "eval"
        run("-m", "endprompt", *command("evaluate", name, self.alone, [*EVALUATION, *self.settings]))
        files = sorted(path for path in folder.rglob("*.json*") if not path.name.startswith("."))
        self.values |= values_of(f"evaluation/{name}", *files, below=folder)


def collect(work: Path, chosen: list[str], only: list[str], settings: list[str]) -> dict:
    """Runs what ``only`` asks for of the ``chosen`` methods and returns {path: value}."""
    runs = Runs(work, settings)
    scored = [name for name in SCORED if name in chosen and "evaluation" in only]
    wanted = chosen if {"shards", "training"} & {*only} else [name for name in scored if name == MAIN]
    under_zero = [MAIN + ZERO] if MAIN in wanted and "training" in only else []
    prepared = runs.prepare([*wanted, *under_zero]) if wanted else []
    for name in prepared:
        if "shards" in only and not name.endswith(ZERO):
            runs.read_shards(name)
        if "training" in only or name in scored:
            runs.train(name)
        if "training" in only:
            runs.read_training(name)
    for name in scored:
        runs.evaluate(name)
    return runs.values


def machine() -> dict:
    """What the bits of trained weights depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    processor = {key: about.get(key) for key in ("model name", "cpu family", "model", "stepping")}
    return {
        "processor": processor,
        "threads": int(ENVIRONMENT["OMP_NUM_THREADS"]),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def within(key: str, asked: list[str] | None, only: list[str]) -> bool:
    """Whether a value is of the parts and methods asked for; None: of all methods, also those now gone."""
    part, name = key.split("/")[:2]
    return part in only and (asked is None or name.removesuffix(ZERO) in asked)


def same(key: str, one, other, bits: bool) -> bool:
    """Whether two values agree: exactly for shards, or if ``bits``; else numbers to TOLERANCE."""
    if bits or key.startswith("shards/") or not (isinstance(one, float) and isinstance(other, float)):
        return type(one) is type(other) and one == other
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def differences(golden: dict, found: dict, bits: bool = True) -> tuple[list[str], int]:
    """(a line a difference, number of equal values).  bits: whether last bits count, as on one machine."""
    lines, equal = [], 0
    for key in [*golden, *(key for key in found if key not in golden)]:
        if not bits and FRAGILE.fullmatch(key):
            continue
        if key not in found:
            lines.append(f"{key}: {golden[key]!r} is missing")
        elif key not in golden:
            lines.append(f"{key}: {found[key]!r} is new")
        elif not same(key, golden[key], found[key], bits):
            lines.append(f"{key}: {golden[key]!r} became {found[key]!r}")
        else:
            equal += 1
    return lines, equal


def read_golden() -> dict:
    return json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}


def record(asked: list[str] | None, only: list[str], work: Path) -> int:
    """Writes the values of what was asked for over those in the file; the others stay."""
    golden, here = read_golden(), machine()
    kept = {key: value for key, value in golden.get("values", {}).items() if not within(key, asked, only)}
    if kept and golden["machine"] != here:
        raise Broken(f"{GOLDEN} is of another machine or other versions; record all of it, or record there")
    found = collect(work, asked or methods(), only, [])
    GOLDEN.write_text(json.dumps({"machine": here, "values": kept | found}, indent=1) + "\n")
    print(f"{len(found)} values are recorded")
    return 0


def compare(asked: list[str] | None, only: list[str], work: Path, settings: list[str]) -> int:
    """Prints a line a difference and a count.  Returns the exit code: 1 if there are differences."""
    golden, here = read_golden(), machine()
    there = golden.get("machine", {})
    expected = {key: value for key, value in golden.get("values", {}).items() if within(key, asked, only)}
    if not expected:
        raise Broken(f"{GOLDEN} holds no such values; record them first")
    if other := [key for key in here | there if here.get(key) != there.get(key)]:
        print(f"other {', '.join(other)} than recorded: numbers to {TOLERANCE}, no weights, no answers")
    lines, equal = differences(expected, collect(work, asked or methods(), only, settings), bits=not other)
    print("\n".join([*lines, f"{equal} values are equal, {len(lines)} differ"]))
    return 1 if lines else 0


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = root.add_subparsers(dest="command", required=True)
    for name in ("record", "compare"):
        verb = commands.add_parser(name)
        verb.add_argument("--methods", metavar="A,B", help="these alone; default: all")
        verb.add_argument("--only", choices=PARTS, help="this part alone")
        verb.add_argument("--work", type=Path, metavar="DIR", help="an empty folder that keeps the outputs")
    commands.choices["compare"].add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a change, to see differences",
    )
    return root


def named(given: str | None) -> list[str] | None:
    """The methods of --methods; None if it is not given.  Raises Broken if there is no such method."""
    if given is None:
        return None
    known = methods()
    if unknown := [name for name in given.split(",") if name not in known]:
        raise Broken(f"--methods: there is none named {unknown[0]!r}; choose of {', '.join(known)}")
    return given.split(",")


@contextlib.contextmanager
def work_folder(given: Path | None):
    """The folder for outputs: ``given``, which must hold nothing yet, or one that is gone afterwards."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            yield Path(folder)
        return
    given.mkdir(parents=True, exist_ok=True)
    if any(given.iterdir()):
        raise Broken(f"--work: {given} is not empty, and outputs of before would be taken for new ones")
    yield given.resolve()


def main(given: list[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    only = [arguments.only] if arguments.only else [*PARTS]
    try:
        asked = named(arguments.methods)
        with work_folder(arguments.work) as work:
            if arguments.command == "record":
                return record(asked, only, work)
            return compare(asked, only, work, arguments.settings)
    except Broken as error:
        say(f"golden.py: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
