"""Scores a file of predictions as the official script of its benchmark would, and prints one number.

    python eval/score.py ruler vt predictions.jsonl
    python eval/score.py longbench qasper predictions.jsonl.gz

One JSON object a line, in the official fields.  RULER: ``pred`` and ``outputs`` (a list; ``output`` for one).
LongBench: ``pred``, ``answers``, ``all_classes`` (for trec and lsht).  passkey: ``pred`` and ``key``.
``pred`` is the continuation alone: a prompt in it would be scored too.
"""

import argparse
import sys
from pathlib import Path

from endprompt import BadInput
from endprompt.evaluation import longbench_scores, passkey, ruler
from endprompt.recipe import task_names
from endprompt.rows import corpus

BENCHMARKS = {
    "ruler": task_names.RULER,
    "longbench": (*task_names.LONGBENCH, *task_names.LONGBENCH_ZH),
    "passkey": (*passkey.TASKS, task_names.NAMED_KEYS, task_names.DISTANCE),
}


def read(path: Path, fields: dict[str, type | tuple[type, ...]]) -> list[dict]:
    """The rows of a file of predictions, each with ``fields`` of these types.  Raises BadInput naming file,
    line and field.
    """
    found = []
    try:
        for number, row in corpus.jsonl(path):
            if not isinstance(row, dict):
                raise BadInput(
                    f"{path} line {number}: {type(row).__name__}, not an object with {', '.join(fields)}"
                )
            if "outputs" in fields and "outputs" not in row and "output" in row:
                row["outputs"] = [row["output"]]
            for field, kinds in fields.items():
                if field not in row:
                    raise BadInput(
                        f"{path} line {number}: there is no {field!r}; it has {', '.join(map(str, row))}"
                    )
                value = row[field]
                if not isinstance(value, kinds) or (
                    isinstance(value, list)
                    and (not value or not all(isinstance(item, str) for item in value))
                ):
                    raise BadInput(
                        f"{path} line {number}: {field!r} is not what the official file holds there "
                        f"({'a list of texts' if kinds is list else 'text'}), but {str(value)[:60]!r}"
                    )
            found.append(row)
    except FileNotFoundError:
        raise BadInput(f"there is no file {path}") from None
    except BadInput:
        raise
    except Exception as error:  # gzip, zstd and UTF-8 each raise their own
        raise BadInput(
            f"{path} cannot be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from None
    if not found:
        raise BadInput(f"{path} holds no prediction")
    return found


def score(benchmark: str, task: str, path: Path) -> float:
    """The official number, 0 to 100, of ``path``.  Raises BadInput for an unknown task, a file that cannot be
    scored, or scorers of other versions.
    """
    if benchmark not in BENCHMARKS:
        raise BadInput(f"there is no benchmark {benchmark!r}; use {', '.join(BENCHMARKS)}")
    if task not in BENCHMARKS[benchmark]:
        raise BadInput(f"{benchmark} has no task {task!r}; use {', '.join(BENCHMARKS[benchmark])}")
    if benchmark == "ruler":
        rows = read(path, {"pred": (str, type(None)), "outputs": list})
        return ruler.number(task, [row["pred"] for row in rows], [row["outputs"] for row in rows])
    if benchmark == "longbench":
        rows = read(path, {"pred": str, "answers": list})
        classes = rows[-1].get("all_classes")  # the official script keeps the last row's
        named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if task in ("trec", "lsht") and not (classes and named):
            raise BadInput(f"{path}: {task} needs 'all_classes', the names of its classes, in each row")
        return longbench_scores.number(
            task, [row["pred"] for row in rows], [row["answers"] for row in rows], classes
        )
    rows = read(path, {"pred": str, "key": str})
    return round(100 * sum(passkey.correct(row["pred"], row["key"]) for row in rows) / len(rows), 2)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", help=", ".join(BENCHMARKS))
    parser.add_argument("task", help="the benchmark's own name, such as vt or qasper")
    parser.add_argument("predictions", type=Path, help="a .jsonl file, plain or packed as .gz or .zst")
    arguments = parser.parse_args(argv)
    try:
        print(score(arguments.benchmark, arguments.task, arguments.predictions))
    except BadInput as error:
        print(f"score: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
