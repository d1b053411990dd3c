"""The runs behind the paper's tables, in an order in which each finds what it needs."""

from dataclasses import dataclass
from pathlib import Path

from endprompt import BadInput, methods
from endprompt.recipe import task_names
from endprompt.reports import paper

# The paper's, and the two controls: the model as it came, and interpolation trained on plain short rows.
METHODS = ("base", "short", "endprompt", "pose", "endprompt_pose", "full_length", "lceg", "longlora")
# between the fields of a step: never in a path or setting, and no white space, so that bash keeps empty
# fields
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Job:
    """One thing to do.  kind: "run" (recipes/run.sh: prepare, train, evaluate), "train" (without the last),
    "sft" (recipes/sft.yaml on the trained model), "evaluate" (a model that is there).  out: OUT of the run,
    without its recipe and method; model: for "evaluate".
    """

    kind: str
    recipe: Path
    method: str
    out: Path
    overrides: tuple[str, ...] = ()
    model: str | None = None

    @property
    def folder(self) -> Path:
        return self.out / self.recipe.stem / self.method

    def step(self) -> str:
        """kind, recipe, method, OUT, model (may be empty), log, the run's folder, then the settings."""
        log = (
            self.out
            / self.recipe.stem
            / "logs"
            / f"{self.method}{'' if self.kind in ('run', 'train') else '-' + self.kind}.log"
        )
        fields = [
            self.kind,
            str(self.recipe),
            self.method,
            str(self.out),
            self.model or "",
            str(log),
            str(self.folder),
            *self.overrides,
        ]
        if wrong := [field for field in fields if SEPARATOR in field or "\n" in field]:
            raise BadInput(f"{wrong[0]!r} has a line break or a control character in it; give it without")
        return SEPARATOR.join(fields)


def jobs(
    recipe: Path,
    names_of: list[str],
    out: Path,
    overrides: tuple[str, ...],
    given: dict[str, str],
    every: bool,
) -> list[Job]:
    """The methods of ``recipe``; with ``every``, also what the paper's other tables need.  In order: a model
    is trained before it is evaluated.

    ``given``: {method: model} to evaluate in the place of training.  Raises BadInput.
    """
    tree = paper.load()
    recipes_of_paper = {run.recipe for table in paper.tables().values() for run in table.rows.values()}
    asked = (*(tree["evaluate"] if recipe.stem in recipes_of_paper else ()), *overrides)
    if absent := [method for method in given if method not in names_of]:
        raise BadInput(
            f"--model {absent[0]}={given[absent[0]]}: {absent[0]} is not among --methods"
            f" {' '.join(names_of)}; name it there"
        )
    found = [
        Job(
            "evaluate" if method in given else "run",
            recipe,
            methods.get(method).name,
            out,
            asked,
            given.get(method),
        )
        for method in names_of
    ]
    if not every:
        return found
    if recipe.stem != tree["recipe"]:
        raise BadInput(
            f"--tables all: the paper's other tables belong to the recipe {tree['recipe']}, not to"
            f" {recipe.stem}; name it with --recipe, or use --tables main"
        )
    known = {(job.recipe.stem, job.method, "") for job in found}
    return [
        *found,
        *_other_runs(recipe, out, overrides, known),
        *_tuned(recipe, out, overrides, given),
    ]


def _other_runs(
    recipe: Path, out: Path, overrides: tuple[str, ...], known: set[tuple[str, str, str]]
) -> list[Job]:
    """The runs behind the paper's tables whose (recipe, method, suffix) is not among ``known``."""
    known, found = set(known), []
    named = {(run.recipe, run.method, run.suffix) for run in paper.runs().values()}
    for table in paper.tables().values():
        cost = table.columns == "cost"
        for run in table.rows.values():
            key = (run.recipe, run.method, run.suffix)
            if key in known or (cost and key in named):
                continue
            known.add(key)
            found.append(
                Job(
                    "train" if cost else "run",
                    recipe.parent / f"{run.recipe}{recipe.suffix}",
                    run.method,
                    out / run.suffix,
                    (*run.overrides, *paper.load()["evaluate"], *overrides),
                )
            )
    return found


def _tuned(recipe: Path, out: Path, overrides: tuple[str, ...], given: dict[str, str]) -> list[Job]:
    """Fine-tuning and then its evaluation, for each row of the paper's tables after it."""
    # HumanEval runs what a model writes: only where the user allows it.
    allowed = any(item.replace(" ", "") == "eval.run_unsafe_code=true" for item in overrides)
    short = [task for task in task_names.SHORT_TEXT if task != "humaneval" or allowed]
    tasks = f"eval.tasks=[{','.join(short)}]"
    found = []
    for run in [run for table in paper.tables().values() if table.after for run in table.rows.values()]:
        path = recipe.parent / f"{run.recipe}{recipe.suffix}"
        there = out / run.suffix
        trained = given.get(run.method) or str(there / run.recipe / run.method / "model")
        job = Job("sft", path, run.method, there, overrides, trained)
        tuned = str(job.folder / "sft")
        found += [job, Job("evaluate", path, run.method, there, (*overrides, tasks), tuned)]
    return found
