"""The tasks of ``task_names.PIECEWISE`` as `endprompt evaluate` scores them: what is refused before a model
is loaded, what is made of a loaded one, and the pictures.
"""

from pathlib import Path

import numpy as np

from endprompt import BadInput
from endprompt.evaluation import (
    distance,
    distance_figures,
    engine,
    far_gain,
    figures,
    haystacks,
    named_keys,
    passkey,
    prefix,
    progress,
    prompts,
    question,
    results,
)
from endprompt.positions import coverage, plans
from endprompt.recipe import task_names
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import Recipe
from endprompt.rows import inspection, shards

Pair = tuple[str, int | None]


def refuse(recipe: Recipe, todo: list[Pair]) -> None:
    """Raises BadInput if the recipe's engine cannot score one of ``todo``."""
    task = next((task for task, _ in todo if task in task_names.PIECEWISE), None)
    if task and recipe.eval.backend == "vllm":
        why = {
            task_names.DISTANCE: "asks at positions that it chooses, and vLLM takes none from outside",
            task_names.NAMED_KEYS: "reads the loss of an answer behind a cache that it keeps itself",
            task_names.FAR_GAIN: "was not tried with vLLM",
        }
        raise BadInput(f"eval.tasks: {task} {why[task]}; use eval.backend=hf, or drop {task} from eval.tasks")


def lengths(recipe: Recipe, task: str) -> list[int]:
    """The lengths at which ``task`` is scored: the target; for far_gain, those beyond the base's window."""
    if task == task_names.DISTANCE:
        return [recipe.lengths.target]
    if task == task_names.FAR_GAIN:
        original = question.original_length(recipe)
        return [length for length in sorted(recipe.eval.lengths) if length > original]
    return sorted(recipe.eval.lengths)


def prefill(recipe: Recipe, task: str) -> list[tuple[int, int]]:
    """(prompts that are read whole, tokens of each) of ``task`` at all its lengths, without questions."""
    options, found = recipe.eval, lengths(recipe, task)
    if task == task_names.DISTANCE:
        return [(-(-options.samples // options.distance_keys), options.distance_haystack)]
    if task == task_names.NAMED_KEYS:
        return [(-(-options.samples // options.named_keys), length) for length in found]
    near = question.original_length(recipe) if found else 0
    return [(options.far_gain_texts, tokens) for length in found for tokens in (length, near)]


class Makers:
    """Makes the pieces of a pair.

    scorer: has the harness' model as ``lm``.  other: the model that is scored in place of the run's own, by
    name.
    """

    def __init__(
        self, experiment: Experiment, scorer, tokenizer, asks: question.Questions, other: str | None
    ):
        self.experiment, self.scorer, self.tokenizer, self.asks = experiment, scorer, tokenizer, asks
        self.other = other

    @property
    def lm(self):
        return self.scorer.lm

    def check(self, todo: list[Pair]) -> None:
        """Raises BadInput if the loaded model or its tokenizer cannot be asked for one of ``todo``."""
        for task, _ in todo:
            if task == task_names.FAR_GAIN:
                self.asks.far_gain.check(len(prompts.frame(self.tokenizer)[0]))
            if task in (task_names.DISTANCE, task_names.NAMED_KEYS):
                if not engine.shares_cache(self.lm.model):
                    kind = self.lm.model.config.model_type
                    raise BadInput(
                        f"eval.tasks: {task} asks many questions behind one reading of a haystack, which this"
                        f" model ({kind}) does not allow: its attention slides, its frequencies depend on a"
                        f" row's length, or its type is not supported; drop {task} from eval.tasks"
                    )
                if task == task_names.DISTANCE:
                    self._distances()
                    self._haystack()

    def pieces(self, task: str, length: int) -> progress.Pieces:
        """The pieces of a pair.  Raises ValueError or BadInput if it cannot be made."""
        if task == task_names.FAR_GAIN:
            special = len(prompts.frame(self.tokenizer)[0])
            found = self.asks.far_documents
            return far_gain.FarGain(self.lm, far_gain.pieces(found, length, self.asks.far_gain, special))
        ends = engine.ends(self.lm.model.generation_config, self.tokenizer)
        reader, design = prefix.Reader(self.lm.model, ends, passkey.NEW_TOKENS), self._design(task)
        if task == task_names.NAMED_KEYS:
            return named_keys.NamedKeys(reader, self.tokenizer, design, length)
        stretch, chosen = self._distances()
        made = distance.Distance(reader, self.tokenizer, design, stretch, chosen)
        made.counts, made.reason = supervised(self.experiment, self.other)
        return made

    def _design(self, task: str) -> haystacks.Design:
        options = self.experiment.recipe.eval
        keys = options.distance_keys if task == task_names.DISTANCE else options.named_keys
        templated = question.chat(self.experiment.recipe, task)
        return haystacks.Design(options.samples, keys, options.depths, options.seed, templated)

    def _haystack(self) -> None:
        """Raises BadInput if the haystack of distance is too short for its keys."""
        design, tokens = self._design(task_names.DISTANCE), self.experiment.recipe.eval.distance_haystack
        try:
            haystacks.within(self.tokenizer, tokens, distance.drawn(design, 0), design.chat)
        except ValueError as error:
            raise BadInput(f"eval.distance_haystack: {error}") from None

    def _distances(self) -> tuple[distance.Stretch, list[int]]:
        recipe = self.experiment.recipe
        templated = question.chat(recipe, task_names.DISTANCE)
        room = haystacks.room(self.tokenizer, templated)
        stretch = distance.Stretch(recipe.eval.distance_haystack, recipe.lengths.target, room)
        try:
            return stretch, stretch.distances(recipe.eval.distances)
        except ValueError as error:
            raise BadInput(str(error)) from None


def supervised(experiment: Experiment, other: str | None) -> tuple[np.ndarray | None, str]:
    """(int64 [L] query-key pairs at each distance in the rows that the scored model was trained on, where
    they come from); None and the reason where that is not known.
    """
    if other is not None:
        return None, "another model than the run's own was scored"
    if not experiment.method.trained:
        return None, f"{experiment.method.name} trains nothing"
    folder = experiment.run / "shards"
    try:
        manifest = inspection.checked(experiment)
    except BadInput as error:
        return None, str(error)
    rows = (plans.segments(row) for row in shards.position_ids(folder, manifest))
    return coverage.pair_counts(rows, experiment.target_length), f"{manifest['rows']} rows of shards/"


def draw(name: str, folder: Path, tasks: set[str]) -> None:
    """Draws a picture of each of ``tasks`` that has results in ``folder``; name: of the method.  Raises
    BadInput for a file that is no result.
    """
    if not tasks & {*task_names.PIECEWISE}:
        return
    scored = results.read(folder)
    if task_names.NAMED_KEYS in tasks and (found := scored.rows(task_names.NAMED_KEYS)):
        figures.heatmaps({name: found}, folder / f"{task_names.NAMED_KEYS}.png")
    if task_names.DISTANCE in tasks and (found := scored.rows(task_names.DISTANCE)):
        distance_figures.panels({name: found[-1]["scores"]}, folder / f"{task_names.DISTANCE}.png")
    if task_names.FAR_GAIN in tasks and (found := scored.rows(task_names.FAR_GAIN)):
        cells = {
            result["scores"]["length"]: {"mean": result["scores"]["score"], **result["scores"]}
            for result in found
        }
        ends = [cell[end] for cell in cells.values() for end in ("low", "high", "score")]
        margin = 0.05 * (max(0.0, *ends) - min(0.0, *ends)) or 1.0
        figures.lines(
            {name: cells},
            folder / f"{task_names.FAR_GAIN}.png",
            label="gain from far context in nats a token",
            limits=(min(0.0, *ends) - margin, max(0.0, *ends) + margin),
        )
