"""One table and pictures over all methods of a recipe that were evaluated; with several folders, over seeds.

python -m endprompt.reports.compare runs/tiny
python -m endprompt.reports.compare runs/seed0/tiny runs/seed1/tiny runs/seed2/tiny
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from endprompt import BadInput, methods, storage
from endprompt.evaluation import figures, intervals, results
from endprompt.recipe import experiment, former_keys, schema
from endprompt.reports.markdown import grid
from endprompt.runs import provenance

TRAINING = (
    ("tokens", "trained tokens", "{:,.0f}"),
    ("seconds", "train s", "{:.0f}"),
    ("final_text_loss", "text loss", "{:.3f}"),
    ("final_end_prompt_loss", "end-prompt loss", "{:.3f}"),
)
# (largest value, format)
TASKS = {
    "passkey": (100.0, "{:.0f}%"),
    "multikey": (100.0, "{:.0f}%"),
    "perplexity": (float("inf"), "{:.2f}"),
}
Asked = dict[tuple[str, int], tuple[dict, Path]]  # {(task, length): what the first run was asked, the run}
Order = Callable[[dict[str, dict]], dict[str, dict]]  # of the methods in ``summary``
NOTE = (
    "Means over seeds; n is how many a cell has. In brackets the 95 % interval: Student's t over seeds, or"
    " that of one seed's own samples (Wilson for keys) where there is one seed, or where all seeds agree"
    " exactly."
)


def run_setting(path: Path) -> tuple[int | None, dict]:
    """(seed, what must be equal among seeds) of a run's recipe.yaml; (None, {}) if it is not there."""
    try:
        tree = yaml.safe_load(path.read_text())
        former = former_keys.taken(tree)
        method = methods.get(tree["method"])
        options = experiment.options(method, tree.get("method_options") or {}, former)
        # A key that came after the run was made had its default.
        data, rope = (
            {
                key.removeprefix(f"{section}."): value
                for key, value in schema.defaults().items()
                if key.startswith(f"{section}.")
            }
            | given
            for section, given in (("data", tree["data"]), ("rope", tree.get("rope") or {}))
        )
        train = dict(tree.get("train") or {})
    except FileNotFoundError:
        return None, {}
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        raise BadInput(f"{path} is no recipe; restore it, or leave its folder out") from None
    train.pop("deepspeed", None)  # the same file has another path in another clone
    return data.pop("seed", None), {
        "model": tree.get("model"),
        "lengths": tree.get("lengths"),
        "data": data,
        "method_options": options.model_dump(mode="json"),
        "rope": rope,
        "train": train,
    }


def check(*settings: list[Path]) -> None:
    """Raises BadInput if two folders of a setting are the same, a seed comes twice in it, runs of a method
    differ in it in more than the seed, or any two runs of all ``settings`` were asked different questions.
    """
    asked: Asked = {}
    scored: dict[str, results.Results] = {}
    for folders in settings:
        _check_setting(folders, asked, scored)
    if said := results.other_words(scored, "perplexity"):
        raise BadInput(said)


def _check_setting(folders: list[Path], asked: Asked, scored: dict[str, results.Results]) -> None:
    """As ``check`` of one setting; notes in ``scored`` what its runs were."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise BadInput("a folder is named twice; a seed counts once")
    for name in methods.METHODS:
        models: dict[str, Path] = {}
        seeds: dict[int | None, Path] = {}
        first = None
        for folder in folders:
            if not (folder / name / "eval").is_dir():
                continue
            seed, setting = run_setting(folder / name / "recipe.yaml")
            if setting and methods.METHODS[name].trained:
                if seed in seeds:
                    raise BadInput(
                        f"{seeds[seed]} and {folder / name} both have data.seed {seed}; name one folder a"
                        " seed"
                    )
                seeds[seed] = folder / name
            if setting and first and setting != first[0]:
                differing = [key for key in setting if setting[key] != first[0][key]]
                raise BadInput(
                    f"{first[1]} and {folder / name} differ in more than the seed ({', '.join(differing)});"
                    " compare runs of one setting"
                )
            first = first or ((setting, folder / name) if setting else None)
            _check_questions(folder / name, asked)
            here = scored[str(folder / name)] = results.read_run(folder / name)
            if not methods.METHODS[name].trained and (identity := results.identity(here)):
                models.setdefault(identity, folder / name)
        if len(models) > 1:
            one, other, *_ = models.values()
            raise BadInput(
                f"{one} and {other} are two models, and {name} trains nothing that a seed could change;"
                " compare runs of one setting"
            )


def _check_questions(run: Path, asked: Asked) -> None:
    """Notes in ``asked`` what ``run`` was asked.  Raises BadInput if a run before it, of whatever method, was
    asked something else: who is told apart from whom must have had the same questions.
    """
    scored = results.read_run(run)
    for task in TASKS:
        for row in scored.rows(task):
            here = {key: value for key, value in row["question"].items() if key != "model"}
            before, where = asked.setdefault((task, row["scores"]["length"]), (here, run))
            if unlike := sorted(key for key in {**before, **here} if before.get(key) != here.get(key)):
                raise BadInput(
                    f"{where} and {run} were asked different questions ({task} at {row['scores']['length']}:"
                    f" {', '.join(unlike)}); evaluate them alike"
                )


def summary(folders: list[Path]) -> dict[str, dict]:
    """{method: {task: {length: cell of ``intervals.over_seeds``}, "training": {key: mean}}} of the methods
    that were evaluated.
    """
    result: dict[str, dict] = {}
    for name in methods.METHODS:
        runs = [folder / name for folder in folders if (folder / name / "eval").is_dir()]
        if not runs:
            continue
        result[name] = {}
        scored = [results.read_run(run) for run in runs]
        for task, (ceiling, _) in TASKS.items():
            by_length: dict[int, list[dict]] = {}
            for row in (row for one in scored for row in one.rows(task)):
                by_length.setdefault(row["scores"]["length"], []).append(row["scores"])
            result[name][task] = {
                length: intervals.over_seeds(
                    [score["score"] for score in scores], (scores[0]["low"], scores[0]["high"]), 0.0, ceiling
                )
                for length, scores in sorted(by_length.items())
            }
        records = [record for run in runs if (record := results.training(run))]
        values = {
            key: [record[key] for record in records if record.get(key) is not None] for key, _, _ in TRAINING
        }
        result[name]["training"] = {key: sum(found) / len(found) for key, found in values.items() if found}
    return result


def table(*folders: Path, order: Order = dict) -> str:
    """Markdown: a row a method, keys found and perplexity by length with 95 % intervals, training beside it.

    With several folders, a seed each, every cell also says of how many seeds it is the mean.
    """
    found, several = order(summary(list(folders))), len(folders) > 1
    columns = [
        (task, length)
        for task in TASKS
        for length in sorted({length for cells in found.values() for length in cells[task]})
    ]
    head = [*[f"{task} {length}" for task, length in columns], *[title for _, title, _ in TRAINING]]
    rows = []
    for name, row in found.items():
        cells = []
        for task, length in columns:
            cell, form = row[task].get(length), TASKS[task][1]
            if cell is None:
                cells.append("not run")
                continue
            text = form.format(cell["mean"])
            if several or task != "perplexity":
                text += f" [{form.format(cell['low'])}, {form.format(cell['high'])}]"
            cells.append(text + (f" n={cell['seeds']}" if several else ""))
        cells += [
            form.format(row["training"][key]) if key in row["training"] else "-" for key, _, form in TRAINING
        ]
        rows.append((name, cells))
    lines = grid("method", head, rows)
    return f"{lines}\n\n{NOTE}" if several else lines


def _rows(folders: list[Path], method: str, task: str) -> list[list[dict]]:
    """The results of ``task`` of each seed that was scored, by length."""
    return [results.read_run(folder / method).rows(task) for folder in folders]


def compare(
    folders: list[Path], out: Path | None = None, title: str | None = None, order: Order = dict
) -> None:
    """Writes comparison.md, comparison.json and the pictures into ``out`` (one folder: itself; several:
    comparison-<recipe> in the folder above them all) and prints the table.  Raises BadInput if nothing was
    evaluated or the folders do not belong together.
    """
    for folder in folders:
        if not any((folder / name / "eval").is_dir() for name in methods.METHODS):
            raise BadInput(f"{folder} holds no evaluated method; run `endprompt evaluate` first")
    check(folders)
    if out is None:
        out = (
            folders[0]
            if len(folders) == 1
            else Path(os.path.commonpath([folder.absolute() for folder in folders]))
            / f"comparison-{folders[0].absolute().name}"
        )
    storage.output_folder(out)
    text, found = table(*folders, order=order), order(summary(folders))
    (out / "comparison.md").write_text(text + "\n")
    storage.write_json(
        out / "comparison.json",
        {"folders": [str(folder) for folder in folders], "methods": found, **provenance.stamp()},
    )
    print(f"{text}\n\n{out / 'comparison.md'}\n{out / 'comparison.json'}")
    for task, stem in (("passkey", "comparison"), ("multikey", "comparison-multikey")):
        drawn = {name: rows for name in found if (rows := figures.pool(_rows(folders, name, task)))}
        if drawn:
            figures.heatmaps(drawn, out / f"{stem}.png", title)
            figures.lines({name: found[name][task] for name in drawn}, out / f"{stem}-lines.png", title)
            print(f"{out / stem}.png\n{out / stem}-lines.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, nargs="+", help="DIR/<recipe> of the runs; several of one recipe are its seeds"
    )
    parser.add_argument("--title", default=None)
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="where table and pictures go")
    arguments = parser.parse_args()
    try:
        compare(arguments.folder, arguments.out, arguments.title)
    except BadInput as error:
        print(f"compare: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
