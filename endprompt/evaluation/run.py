"""Scores one model on the recipe's tasks; one JSON file a task and length, skipped where it exists for the
same question.

lm-evaluation-harness runs the model on the task files in endprompt/evaluation/tasks (and on its own for short
text); this module asks, keeps each answer beside its score in the official scripts' fields, and says where
both come from.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.evaluation import (
    engine,
    figures,
    intervals,
    longbench,
    longbench_scores,
    passkey,
    perplexity,
    piecewise,
    prefix,
    progress,
    prompts,
    results,
    ruler,
    ruler_package,
    ruler_samples,
    scored_model,
)
from endprompt.evaluation.question import Questions, bare, chat, same
from endprompt.recipe import task_names
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import Recipe
from endprompt.runs import card, provenance, runfolder

SHOWN = {"perplexity": "{:.3f}", task_names.FAR_GAIN: "{:+.4f}"}  # all others are percent


def lengths(recipe: Recipe, task: str) -> list[int | None]:
    """The lengths at which ``task`` is scored: the recipe's, LongBench's one length of truncation, or none
    for short text; distance at the target length, far_gain at the lengths beyond the base's window.
    """
    if task in task_names.PIECEWISE:
        return [*piecewise.lengths(recipe, task)]
    if task in task_names.SHORT_TEXT:
        return [None]
    if task.startswith("longbench_"):
        return [recipe.eval.longbench_length]
    return [*sorted(recipe.eval.lengths)]


def longest(recipe: Recipe, tokenizer) -> int:
    """Tokens of the longest prompt with its answer among the recipe's tasks; of short text alone, as many as
    its longest prompts have by far."""
    room = engine.LONGEST_ANSWER + prompts.room(tokenizer, recipe.eval.chat_template)
    found = [
        length + (room if task.startswith("longbench_") else 0)
        for task, length in pairs(recipe)
        if length is not None
    ]
    return max(found, default=4096)


class Scorer:
    """A loaded model and what its tasks need: a folder of its tokenizer, and the recipe's options as the task
    files know them.
    """

    def __init__(self, recipe: Recipe, network, tokenizer, folder: str, asks: Questions):
        self.recipe, self.tokenizer = recipe, tokenizer
        tokenizer.save_pretrained(folder)
        options = recipe.eval
        if options.backend == "vllm":
            lm = engine.vllm(network, longest(recipe, tokenizer), recipe.model.trust_remote_code)
            self.lm = self.sharing = lm
        else:
            self.lm, self.sharing = engine.LongLM(network, tokenizer), prefix.SharedLM(network, tokenizer)
        self.ruler_samples = asks.place("ruler_samples")
        self.metadata = {
            "tokenizer": folder,
            "samples": options.samples,
            "seed": options.seed,
            "depths": options.depths,
            "stride": options.perplexity_stride,
            "scored_tokens": options.perplexity_tokens,
            "longest": max(options.lengths),
            "lengths": options.lengths,
            "perplexity_corpus": asks.place("perplexity_corpus") or "",
            "perplexity_column": asks.column,
            "ruler_samples": self.ruler_samples,
            "longbench_data": asks.place("longbench_data") or None,
            "longbench_length": options.longbench_length,
        }

    def score(self, task: str, length: int | None) -> tuple[dict, list[dict]]:
        """(what the result file holds under "scores", the predictions in the official fields).  Raises
        ValueError or BadInput.
        """
        options = self.recipe.eval
        if task in task_names.SHORT_TEXT:
            limits = options.short_text_samples, options.chat_template, options.run_unsafe_code
            return short_text(self.lm, task, *limits, shots=options.short_text_shots), []
        assert length is not None  # which only short text has none of
        samples = self._run(task, length)
        documents = [sample["doc"] for sample in samples]
        answers = [sample["filtered_resps"][0] for sample in samples]
        if task == "perplexity":
            losses = [-log_likelihood for log_likelihood, _ in answers]
            return {"length": length, **perplexity.summary(documents, losses)}, []
        scores = [sample["score"] for sample in samples]
        if task in passkey.TASKS:
            found = {"length": length, **passkey.summary(documents, scores)}
            return found, _predictions(documents, answers, ("key", "depth"), ())
        found = {"length": length, **_mean(scores)}
        if task.startswith("ruler_"):
            found |= self._ruler(task.removeprefix("ruler_"), length, documents, answers)
            return found, _predictions(documents, answers, ("index", "outputs"), ("length",))
        found |= _longbench(task.removeprefix("longbench_"), documents, answers)
        return found, _predictions(documents, answers, (), ("answers", "all_classes", "length"))

    def _run(self, task: str, length: int) -> list[dict]:
        """The harness' samples of one of our tasks."""
        generation = None
        if task.startswith("longbench_"):
            name = task.removeprefix("longbench_")
            generation = longbench.generation_kwargs(name, self.tokenizer, self.recipe.eval.backend) or None
        templated, name = chat(self.recipe, task), f"endprompt_{task}"
        asked = {**self.metadata, "max_seq_lengths": [length], "chat_template": templated}
        lm = self.sharing if task in passkey.TASKS else self.lm
        return engine.run(lm, name, asked, generation=generation, chat_template=templated)[name]

    def _ruler(self, name: str, length: int, documents: list[dict], answers: list) -> dict:
        """What a result of RULER says beside its mean."""
        return {
            "metric": "string_match_part" if name.startswith("qa_") else "string_match_all",
            "generator": self._generator(name, length),
            "official": ruler.number(name, answers, [document["outputs"] for document in documents]),
            "lengths": ruler.report(documents, length),
        }

    def _generator(self, task: str, length: int) -> dict:
        if not self.ruler_samples:
            return ruler_package.generator()
        options = self.recipe.eval
        draw = ruler.Draw(options.samples, options.seed, options.chat_template)
        _, question = ruler_samples.find(self.ruler_samples, task, length, draw, self.tokenizer)
        return ruler_samples.generator(question)


def _mean(scores: list[float]) -> dict:
    """The mean of ``scores`` with its interval."""
    low, high = intervals.bootstrap(scores)
    return {"score": sum(scores) / len(scores), "low": low, "high": high, "samples": len(scores)}


def _longbench(name: str, documents: list[dict], answers: list) -> dict:
    """What a result of LongBench says beside its mean."""
    about = longbench_scores.get(name)
    references = [document["answers"] for document in documents]
    return {
        "metric": about.metric,
        "category": about.category,
        "truncated": sum(document["truncated"] for document in documents),
        "official": longbench_scores.number(name, answers, references, documents[-1]["all_classes"]),
    }


def _predictions(documents: list[dict], answers: list, before: Sequence[str], after: Sequence[str]):
    """Each answer as "pred" between the fields ``before`` and ``after`` it, in the official order."""
    return [
        {
            **{key: document[key] for key in before},
            "pred": answer,
            **{key: document[key] for key in after},
        }
        for document, answer in zip(documents, answers, strict=True)
    ]


def short_text(
    lm, task: str, limit: int | None, chat_template: bool, unsafe_code: bool, shots: int | None = None
) -> dict:
    """The scores of one of the harness' own tasks by the metric of ``task_names.SHORT_TEXT``; all subtasks'
    samples count alike, as in the harness' own mean of MMLU.

    limit: samples a subtask; None: all.  shots: examples before a question; None: the task's own number.
    """
    few_shots, metric = task_names.short_text(task, shots)
    found = engine.run_own(
        lm,
        task,
        few_shots=few_shots,
        limit=limit,
        chat_template=chat_template,
        unsafe_code=unsafe_code,
    )
    name, _, wanted = metric.partition(",")
    scores = [
        100.0 * sample[name] for part in found.values() for sample in part if sample["filter"] == wanted
    ]
    return {"length": None, "metric": metric, "few_shots": few_shots, **_mean(scores)}


def pairs(recipe: Recipe, among: Sequence[int] = ()) -> list[tuple[str, int | None]]:
    """(task, length) of every score that the recipe asks for; among: those of its lengths that are wanted,
    none: all.  Tasks that have lengths of their own are not narrowed.
    """
    found = [(task, length) for task in recipe.eval.tasks for length in lengths(recipe, task)]
    return [pair for pair in found if not among or pair[1] in among or not _by_length(pair[0])]


def _by_length(task: str) -> bool:
    """Whether ``task`` is scored at the lengths of ``eval.lengths``."""
    own = task in task_names.SHORT_TEXT or task.startswith("longbench_") or task == task_names.DISTANCE
    return not own


def _chosen(recipe: Recipe, only: Sequence[str], among: Sequence[int]) -> list[tuple[str, int | None]]:
    known = {f"{task}:{length or '-'}": (task, length) for task, length in pairs(recipe, among)}
    for name in only:
        if name not in known:
            raise BadInput(f"--only {name}: the recipe has no such pair; it has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(only)] if only else list(known.values())


def evaluate(
    experiment: Experiment,
    other: str | None = None,
    only: Sequence[str] = (),
    budget: float | None = None,
    among: Sequence[int] = (),
) -> None:
    """Writes eval/<task>/<length>.json below the run and the answers beside it as .jsonl (eval-<name>-<hash
    of its path> for another model) and pictures, and prints a line a score.

    only: the TASK:LENGTH pairs to score, in that order; none: all of the recipe's.
    budget: seconds, loading included, after which no pair is begun, nor one when less is left than the
        longest so far took; None: no end.
    among: those of the recipe's lengths to score; none: all.  The question stays that of all, so that
        perplexity and far_gain are of the same words however many calls share the lengths.

    Raises BadInput if there is no model, another process scores one of the pairs, a length is too short for
    its task, data are missing, or the held-out documents are shorter than a length.
    """
    _check_environment(experiment.recipe)
    folder = results.evaluation_folder(experiment.run, other and str(scored_model.named(other)))
    todo, clock = _chosen(experiment.recipe, only, among), Clock(budget)
    piecewise.refuse(experiment.recipe, todo)
    _say_what_is_left_out(experiment.recipe, todo, among)
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as temporary:
        for pair in todo:
            lock = _path(Path(), *pair).with_suffix("").as_posix().replace("/", "-")
            held.enter_context(runfolder.hold(folder / f".{lock}.lock"))
        Evaluation(experiment, folder, other, todo, temporary).run(clock)
    _draw(experiment, folder, todo)
    if other is None and experiment.method.trained:
        _renew_card(experiment, folder)


def _renew_card(experiment: Experiment, folder: Path) -> None:
    """Puts all scores of the run's model into its card; a folder that cannot be written keeps the card that
    it has."""
    try:
        found = results.read(folder).found
        scores: list[card.Score] = [
            (task, length, *(result["scores"][key] for key in ("score", "low", "high", "samples")))
            for (task, length), result in sorted(
                found.items(), key=lambda item: (item[0][0], item[0][1] or 0)
            )
        ]
        card.renew(experiment.run / "model", scores)
    except (OSError, BadInput) as error:
        print(f"warning: the model card stays as it was: {error}", file=sys.stderr)


def _say_what_is_left_out(recipe: Recipe, todo: list, among: Sequence[int]) -> None:
    """A line on stderr for a task that has no length here.  Raises BadInput if nothing else is asked for."""
    task = task_names.FAR_GAIN
    if task in recipe.eval.tasks and not any(asked == task for asked, _ in pairs(recipe, among)):
        key = "--lengths" if among and piecewise.lengths(recipe, task) else "eval.lengths"
        line = f"{task}: no length of {key} is beyond the base's window; add one, or drop {task}"
        if not todo:
            raise BadInput(f"eval.tasks: {line} from eval.tasks")
        print(f"evaluate: {line}", file=sys.stderr)


def _check_environment(recipe: Recipe) -> None:
    """Raises BadInput if this machine cannot score the recipe's tasks as they are to be scored."""
    options, named = recipe.eval, os.environ.get("TMPDIR")
    if named and not (os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)):
        raise BadInput(
            f"environment: TMPDIR={named!r} is no folder that can be written to; make it, or unset it"
        )
    if "humaneval" in options.tasks:
        if not options.run_unsafe_code:
            raise BadInput(
                "eval.tasks: humaneval runs code that the model writes, on this machine; set"
                " eval.run_unsafe_code=true if it may"
            )
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    benched = [task.removeprefix("longbench_") for task in options.tasks if task.startswith("longbench_")]
    if benched:
        longbench_scores.check_environment(*benched)


class Clock:
    """How much of a budget of seconds is left, and how long the longest pair took."""

    def __init__(self, budget: float | None):
        self.budget, self.began, self.longest = budget, time.monotonic(), 0.0

    @property
    def left(self) -> float:
        return math.inf if self.budget is None else self.budget - (time.monotonic() - self.began)

    def spent(self, task: str) -> bool:
        """Whether no pair of ``task`` should be begun; one that is kept piece by piece always may be."""
        return self.left < max(0.0 if task in task_names.PIECEWISE else self.longest, 0.001)


class Evaluation:
    """The pairs of one model: loaded, asked for what is there, and scored where it is not."""

    def __init__(self, experiment: Experiment, folder: Path, other: str | None, todo: list, temporary: str):
        recipe = experiment.recipe
        self.experiment, self.folder, self.todo = experiment, folder, todo
        network, tokenizer, identity = scored_model.load(experiment, other)
        reach = None if recipe.eval.backend == "vllm" else engine.table(network)
        if reach and (beyond := [(task, length) for task, length in todo if (length or 0) > reach]):
            raise BadInput(
                f"eval.lengths: {beyond[0][0]} at {beyond[0][1]}: the model has a table of {reach} positions "
                "and cannot read beyond; lower the length, or leave it out"
            )
        if recipe.eval.chat_template:
            prompts.check_template(tokenizer)
        asks = Questions(recipe, tokenizer)
        self.asked = {(task, length): asks(task, length, identity) for task, length in todo}
        self.scorer = Scorer(recipe, network, tokenizer, temporary, asks)
        self.makers = piecewise.Makers(experiment, self.scorer, tokenizer, asks, other)
        self.makers.check(todo)
        self.there = {key: _existing(_path(folder, *key), self.asked[key]) for key in todo}
        self.make_samples(temporary)

    def make_samples(self, temporary: str) -> None:
        """RULER's, all together, on all cores; the task files find them in the cache."""
        options = self.experiment.recipe.eval
        missing = [
            (task.removeprefix("ruler_"), length)
            for (task, length), result in self.there.items()
            if result is None and task.startswith("ruler_") and length is not None
        ]
        if missing and not options.ruler_samples:
            ruler.ensure(
                [task for task, _ in missing],
                [length for _, length in missing],
                temporary,
                ruler.Draw(options.samples, options.seed, options.chat_template),
            )

    def run(self, clock: Clock) -> None:
        for done, (task, length) in enumerate(self.todo):
            result = self.there[task, length]
            if result is None:
                begun = ""
                try:
                    result = None if clock.spent(task) else self.score(task, length, clock)
                except progress.Unfinished as error:
                    begun = f", and {error} of {task} at {length}"
                if result is None:
                    print(
                        f"evaluate: {done} of {len(self.todo)} pairs are scored{begun}, and of"
                        f" {clock.budget:g} s {max(0, clock.left):.0f} are left; the same command goes on",
                        flush=True,
                    )
                    break
            form = SHOWN.get(task, "{:.2f}%")
            score, low, high = (form.format(result["scores"][key]) for key in ("score", "low", "high"))
            name = self.experiment.method.name
            print(f"{name:14} {task:22} {length or '-':>7} {score:>8}  [{low}, {high}]", flush=True)

    def score(self, task: str, length: int | None, clock: Clock) -> dict:
        """The result of a pair, written down with its answers."""
        started, kept = time.monotonic(), None
        try:
            if task in task_names.PIECEWISE and length:
                scores, predictions, kept = self._piecewise(task, length, clock)
            else:
                scores, predictions = self.scorer.score(task, length)
        except ValueError as error:
            raise BadInput(f"eval.lengths: {task} at {length}: {error}") from None
        seconds = time.monotonic() - started
        if kept is None:
            clock.longest = max(clock.longest, seconds)
        result = {
            "question": self.asked[task, length],
            "recipe": self.experiment.recipe.name,
            "method": self.experiment.method.name,
            "scores": scores,
            "seconds": round(seconds, 2),
            **provenance.stamp(),
        }
        path = _path(self.folder, task, length)
        path.parent.mkdir(parents=True, exist_ok=True)
        if predictions:
            answers = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
            storage.write_atomically(path.with_suffix(".jsonl"), answers.encode())
        storage.write_json(path, result)
        if kept is not None:
            kept.remove()
        return result

    def _piecewise(self, task: str, length: int, clock: Clock) -> tuple[dict, list[dict], progress.Kept]:
        """As ``Scorer.score``, and what is kept of the pieces until the result is written."""
        pieces = self.makers.pieces(task, length)
        kept = progress.Kept(
            progress.path_of(_path(self.folder, task, length)), bare(self.asked[task, length])
        )
        rows = progress.collect(pieces, kept, lambda: clock.left, f"{task} at {length}")
        return {"length": length, **pieces.summary(rows)}, pieces.predictions(rows), kept


def _draw(experiment: Experiment, folder: Path, todo: list) -> None:
    """Pictures of the tasks that were scored; those of a task stay as they were, after a warning, where a
    result in ``folder`` cannot be read, or nothing can be written."""
    name = experiment.method.name
    for task in sorted({task for task, _ in todo}):
        try:
            if task in passkey.TASKS and (found := results.read(folder).rows(task)):
                figures.heatmaps({name: found}, folder / f"{task}.png")
            piecewise.draw(name, folder, {task})
        except (OSError, BadInput) as error:
            print(f"warning: the picture of {task} is not drawn anew: {error}", file=sys.stderr)


def _path(folder: Path, task: str, length: int | None) -> Path:
    return folder / task / f"{length or 'any'}.json"


def _existing(path: Path, question: dict) -> dict | None:
    """A result already there for the very same question; None, after saying so, if there is one for
    another.  Raises BadInput if what is there is no file.
    """
    if path.is_dir():
        raise BadInput(f"{path} is a folder, where a result is to be written; remove it")
    if path.parent.exists() and not path.parent.is_dir():
        raise BadInput(f"{path.parent} is no folder, where results are to be written; remove it")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        if same(result["question"], question):
            return results.check(path)
        print(f"{path}: was scored for another model or setting; scoring again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (BadInput, OSError, ValueError, KeyError, TypeError, RecursionError):
        print(f"{path}: cannot be read; scoring again", file=sys.stderr)
    return None
