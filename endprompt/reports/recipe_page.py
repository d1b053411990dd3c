"""A page for one recipe: every result of its methods by task and length, with pictures.  The paper has no
figures for most recipes, so these are ours alone.
"""

import csv
import io
from dataclasses import dataclass, field
from pathlib import Path

from endprompt import BadInput, methods
from endprompt.evaluation import figures, passkey, results
from endprompt.evaluation.results import Estimate, Missing, Results
from endprompt.recipe import task_names
from endprompt.reports import paper
from endprompt.reports.markdown import grid

FIELDS = ("method", "benchmark", "task", "length", "ours", "low", "high", "samples")
PERPLEXITY = "perplexity"


def shown(ours: Estimate | Missing) -> str:
    return f"{ours.score:.2f} [{ours.low:.2f}, {ours.high:.2f}]" if isinstance(ours, Estimate) else "not run"


def own_results(row: str, model: str | None) -> str:
    """The note of a row where a ``model`` that was named was scored for other recipes alone."""
    return f"{row}: {model} was not scored for this recipe; these are the run's own results."


@dataclass
class Page:
    """All results of recipe ``name`` under ``runs``.  Raises BadInput if there are none, or one cannot be
    read.
    """

    name: str
    runs: Path
    models: dict[str, str]
    pictures: list[str] = field(default_factory=list)

    def __post_init__(self):
        folder = self.runs / self.name
        self.methods: dict[str, Results] = {}
        self.stand_ins = {
            method: model
            for method, named in self.models.items()
            if (model := results.stand_in(self.runs, folder / method, named))
        }
        for method in methods.METHODS:
            if (found := results.read_run(folder / method, self.stand_ins.get(method))).found:
                self.methods[method] = found
            for task in passkey.TASKS:
                found.rows(task)  # what cannot be drawn is refused before anything is written
        if not self.methods:
            raise BadInput(
                f"--recipe {self.name}: {folder} holds no evaluated method; run `endprompt evaluate` first,"
                f" or name one of: {', '.join(results.recipes(self.runs, self.models)) or 'none is there'}"
            )
        # A model that was named stands in for the trained one, whose training is then not to be shown beside
        # it.
        self.trained = {
            method: record
            for method in methods.METHODS
            if method not in self.stand_ins and (record := results.training(folder / method))
        }

    def tasks(self, names_of: tuple[str, ...]) -> list[str]:
        """Those of ``names_of`` that some method was scored on."""
        return [task for task in names_of if any(found.lengths(task) for found in self.methods.values())]

    def lengths(self, tasks: list[str]) -> list[int | None]:
        return sorted(
            {length for found in self.methods.values() for task in tasks for length in found.lengths(task)},
            key=lambda length: length or 0,
        )

    def benchmarks(self) -> list[str]:
        groups = {
            **{task: (task,) for task in passkey.TASKS},
            "perplexity": (PERPLEXITY,),
            "RULER": task_names.GROUPS["ruler"],
            "LongBench": task_names.GROUPS["longbench"] + task_names.GROUPS["longbench_zh"],
            "short text": task_names.GROUPS["short_text"],
        }
        return [name for name, tasks in groups.items() if self.tasks(tasks)]

    def by_length(self, task: str) -> dict[str, dict[int, dict]]:
        """{method: {length: {"mean", "low", "high"}}} of one task."""
        return {
            method: {
                length: cell
                for length in found.lengths(task)
                if length is not None and (cell := _cell(found.mean([(task, length)])))
            }
            for method, found in self.methods.items()
            if found.lengths(task)
        }

    def ruler_means(self) -> dict[str, dict[int, dict]]:
        """As ``by_length``, of the mean over the 13 tasks, where all are there."""
        means = {
            method: {
                length: found.mean([(task, length) for task in task_names.GROUPS["ruler"]])
                for length in self.lengths(list(task_names.GROUPS["ruler"]))
                if length is not None
            }
            for method, found in self.methods.items()
        }
        return {
            method: kept
            for method, cells in means.items()
            if (kept := {length: cell for length, ours in cells.items() if (cell := _cell(ours))})
        }

    def draw(self, out: Path) -> None:
        for task in passkey.TASKS:
            self._draw_passkey(out, task)
        if curves := self.by_length(PERPLEXITY):
            figures.lines(
                curves,
                self._picture(out, PERPLEXITY),
                f"{self.name}: perplexity on held-out text",
                "perplexity",
                None,
            )
        if curves := self.ruler_means():
            figures.lines(
                curves, self._picture(out, "ruler"), f"{self.name}: RULER, mean of the 13 tasks", "score in %"
            )
        self._draw_longbench(out)
        if self.trained:
            self._draw_training(out)

    def _draw_passkey(self, out: Path, task: str) -> None:
        if rows := {method: kept for method, found in self.methods.items() if (kept := found.rows(task))}:
            figures.heatmaps(
                rows, self._picture(out, task), f"{self.name}: {task} retrieval by length and depth"
            )
            figures.lines(
                self.by_length(task),
                self._picture(out, f"{task}_lines"),
                f"{self.name}: {task} retrieval",
            )

    def _draw_longbench(self, out: Path) -> None:
        categories = paper.COLUMNS["longbench"]
        bars = {
            method: [
                _cell(found.mean([(task, self._cut(found, task)) for task in tasks]))
                for tasks in categories.values()
            ]
            for method, found in self.methods.items()
        }
        if any(cell for cells in bars.values() for cell in cells):
            figures.bars(
                list(categories),
                {method: cells for method, cells in bars.items() if any(cells)},
                self._picture(out, "longbench"),
                f"{self.name}: LongBench by category",
            )

    def _draw_training(self, out: Path) -> None:
        units = [
            ("largest memory", "GiB", "final_peak_memory_gib"),
            ("time of training", "seconds", "seconds"),
        ]
        # A run that was resumed knows the seconds since then only.
        known = {
            key: [
                None if key == "seconds" and record.get("resumed_from") else record.get(key)
                for record in self.trained.values()
            ]
            for _, _, key in units
        }
        panels = [(title, unit, list(self.trained), {"ours": known[key]}) for title, unit, key in units]
        devices = sorted({str(record.get("device")) for record in self.trained.values()})
        where = "on CPU, resident memory of a process" if self._on_cpu() else "on " + ", ".join(devices)
        figures.costs(panels, self._picture(out, "training"), f"{self.name}: training, {where}")

    def _on_cpu(self) -> bool:
        return any(str(record.get("device")).startswith("CPU") for record in self.trained.values())

    def _picture(self, out: Path, name: str) -> Path:
        self.pictures.append(f"recipe_{self.name}_{name}.png")
        return out / self.pictures[-1]

    @staticmethod
    def _cut(found: Results, task: str) -> int | None:
        return next(iter(found.lengths(task)[-1:]), None)

    def markdown(self) -> str:
        known = {run.recipe for run in paper.runs().values()}
        parts = [
            f"# {self.name}",
            "A cell is ours with its 95 % interval. "
            + (
                "Beside the paper's figures they stand in its tables."
                if self.name in known
                else "The paper has no figures for this recipe."
            ),
            *self._passkey_and_perplexity(),
            *self._ruler(),
            *self._longbench(),
            *self._short_text(),
            *self._training(),
            *(f"![{picture}]({picture})" for picture in self.pictures),
            "\n".join(f"- {note}" for note in self._notes()),
        ]
        return "\n\n".join(parts) + "\n"

    def _passkey_and_perplexity(self) -> list[str]:
        columns = [
            (task, length)
            for task in self.tasks((*passkey.TASKS, PERPLEXITY))
            for length in self.lengths([task])
        ]
        if not columns:
            return []
        ruler = self.tasks(task_names.GROUPS["ruler"])
        instead = (
            "RULER was not run for this recipe, and these do not replace it: passkey retrieval"
            " asks for one number in filler text. "
        )
        unlike = results.other_words(self.methods, PERPLEXITY)
        words = "**not of the same held-out tokens** (below)" if unlike else "of the same held-out tokens"
        return [
            "## Passkey and perplexity" if ruler else "## In place of RULER: passkey and perplexity",
            ("" if ruler else instead)
            + "Passkey (one key) and multikey (one of four named ones): keys found in %, Wilson interval."
            f" Perplexity: {words} at every length; it hardly separates methods that retrieve very"
            " differently.",
            grid(
                "method",
                [f"{task} {length}" for task, length in columns],
                [
                    (method, [shown(found.mean([column])) for column in columns])
                    for method, found in self.methods.items()
                ],
            ),
        ]

    def _ruler(self) -> list[str]:
        ruler = self.tasks(task_names.GROUPS["ruler"])
        if not ruler:
            return []
        lengths = self.lengths(ruler)
        rows = [
            (
                f"{method}, {task.removeprefix('ruler_')}",
                [shown(found.mean([(task, length)])) for length in lengths],
            )
            for method, found in self.methods.items()
            for task in ruler
            if found.lengths(task)
        ]
        rows += [
            (
                f"**{method}, mean of the 13 tasks**",
                [
                    shown(found.mean([(task, length) for task in task_names.GROUPS["ruler"]]))
                    for length in lengths
                ],
            )
            for method, found in self.methods.items()
        ]
        parts = ["## RULER", grid("method and task", [str(length) for length in lengths], rows)]
        if absent := [task for task in task_names.RULER if f"ruler_{task}" not in ruler]:
            parts.append(
                f"No mean over RULER: {', '.join(absent)} {'was' if len(absent) == 1 else 'were'} not run."
            )
        return parts

    def _longbench(self) -> list[str]:
        tasks = self.tasks(task_names.GROUPS["longbench"] + task_names.GROUPS["longbench_zh"])
        if not tasks:
            return []
        averaged = [(task.removeprefix("longbench_"), (task,)) for task in tasks] + [
            (f"**{name}**", members) for name, members in paper.COLUMNS["longbench"].items()
        ]
        rows = [
            (
                name,
                [
                    shown(found.mean([(task, self._cut(found, task)) for task in members]))
                    for found in self.methods.values()
                ],
            )
            for name, members in averaged
        ]
        corner = "task, category (mean of its tasks), avg (mean of the 16)"
        return ["## LongBench", grid(corner, list(self.methods), rows)]

    def _short_text(self) -> list[str]:
        tasks = self.tasks(task_names.GROUPS["short_text"])
        if not tasks:
            return []
        rows = [
            (method, [shown(found.mean([(task, None)])) for task in tasks])
            for method, found in self.methods.items()
        ]
        return ["## Short text", grid("method", tasks, rows)]

    def _training(self) -> list[str]:
        if not self.trained:
            return []
        memory = "largest memory, GiB" + (" (resident, of a process)" if self._on_cpu() else " (of a GPU)")
        rows = [(method, _trained_cells(record)) for method, record in self.trained.items()]
        return ["## Training", grid("method", [memory, "seconds", "tokens", "on"], rows)]

    def _notes(self) -> list[str]:
        unlike = (results.other_words(self.methods, task) for task in (PERPLEXITY, task_names.FAR_GAIN))
        notes = [f"{said}." for said in unlike if said]
        for method, found in self.methods.items():
            files = list(found.found.values())
            counts = sorted(
                {file["scores"]["samples"] for (task, _), file in found.found.items() if task != PERPLEXITY}
            )
            few = sum(
                file["scores"]["samples"] < results.full_samples(task)
                for (task, _), file in found.found.items()
            )
            generators = sorted(
                {str(file["question"]["generator"]) for file in files if file["question"].get("generator")}
            )
            about = [
                f"{key} {', '.join(sorted({str(file.get(key))[:cut] for file in files}))}"
                for key, cut in (("commit", 12), ("device", 80), ("date", 10))
            ]
            text = f"{method}: {found.folder}" + (
                f", {counts[0]}"
                + (f" to {counts[-1]}" if len(counts) > 1 else "")
                + " samples a task and length"
                if counts
                else ""
            )
            text += (
                f", **fewer than 500 or than the benchmark has** in {few} of {len(files)} results"
                if few
                else ""
            )
            text += f"; RULER's generator and scorers: {' / '.join(generators)}" if generators else ""
            if (named := self.models.get(method)) != self.stand_ins.get(method):
                notes.append(own_results(method, named))
            notes.append(
                "; ".join([text, *about])
                + (f"; {found.older} results of another model in that folder left out" if found.older else "")
                + "."
            )
        return notes

    def as_csv(self) -> str:
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(FIELDS)
        for method, found in self.methods.items():
            for task, length in sorted(
                found.found,
                key=lambda key: (
                    task_names.TASKS.index(key[0]) if key[0] in task_names.TASKS else len(task_names.TASKS),
                    key[0],
                    key[1] or 0,
                ),
            ):
                ours = found.mean([(task, length)])
                assert isinstance(ours, Estimate)  # it was found
                benchmark = next((group for group, tasks in task_names.GROUPS.items() if task in tasks), task)
                writer.writerow(
                    (
                        method,
                        benchmark,
                        task,
                        length or "",
                        f"{ours.score:.2f}",
                        f"{ours.low:.2f}",
                        f"{ours.high:.2f}",
                        ours.samples,
                    )
                )
        return out.getvalue()


def _trained_cells(record: dict) -> list[str]:
    """Memory, seconds, tokens and device of a train.json."""
    memory, resumed = record.get("final_peak_memory_gib"), record.get("resumed_from")
    return [
        "-" if memory is None else f"{memory:.2f}",
        f"resumed from {resumed}" if resumed else f"{record['seconds']:.0f}",
        f"{record.get('tokens', 0):,}",
        f"{record.get('world_size')} ranks on {record.get('device')}",
    ]


def _cell(ours: Estimate | Missing) -> dict | None:
    return {"mean": ours.score, "low": ours.low, "high": ours.high} if isinstance(ours, Estimate) else None
