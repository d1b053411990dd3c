"""What `endprompt evaluate` is asked to score: the pairs of a recipe, or those of the command line alone."""

import contextlib
import json
import os
from pathlib import Path

from endprompt import BadInput
from endprompt.commands import counts
from endprompt.recipe import schema, settings_file, task_names
from endprompt.recipe.experiment import Experiment, resolve

# What a model is called where results are put, where no recipe says it.
NAMELESS = "model"


def _tasks(given: list[str]) -> list[str]:
    return [name for text in given for name in text.replace(",", " ").split()]


def _lengths(given: list[str]) -> list[int]:
    """Raises BadInput on what is no number of tokens."""
    found = []
    for text in _tasks(given):
        length = counts.tokens(text, f"--lengths {text!r:.60}")
        if not 0 < length <= 2**31:
            raise BadInput(
                f"--lengths {text!r:.60}: give numbers of tokens, for example --lengths 4096 65536"
            )
        found.append(length)
    return found


def with_recipe(arguments) -> Experiment:
    """The experiment of a recipe, with --tasks and --lengths in the place of its own.

    Lengths that are some of the recipe's own narrow what is scored (``narrowed``) and leave the recipe as it
    is: perplexity and far_gain score what fits behind the greatest of its lengths, and would otherwise be of
    other words in every call.  Raises BadInput.
    """
    tasks, lengths = _tasks(arguments.tasks), _lengths(arguments.lengths)
    given = [*arguments.overrides, *([f"eval.tasks={json.dumps(tasks)}"] if tasks else [])]
    if lengths:
        with contextlib.suppress(BadInput):  # what is wrong may be the lengths that are replaced
            experiment = resolve(arguments.recipe, given, arguments.method, arguments.out)
            if {*lengths} <= {*experiment.recipe.eval.lengths}:
                return experiment
        given.append(f"eval.lengths={json.dumps(lengths)}")
    return resolve(arguments.recipe, given, arguments.method, arguments.out)


def narrowed(arguments, recipe: schema.Recipe) -> list[int]:
    """Those of the recipe's lengths that --lengths asks for; none: all."""
    given = [] if arguments.recipe is None else _lengths(arguments.lengths)
    return given if {*given} < {*recipe.eval.lengths} else []


def without_recipe(arguments) -> Experiment:
    """The experiment that scores ``--model`` as it is, on --tasks and --lengths, under the method base.

    Raises BadInput if one of them is missing or wrong, or an override is of what only a recipe has.
    """
    asked = {"--model": arguments.model, "--tasks": arguments.tasks, "--lengths": arguments.lengths}
    if missing := [name for name, value in asked.items() if not value]:
        raise BadInput(
            f"evaluate: {missing[0]} is missing; without RECIPE and METHOD name a model and what to score:"
            " --model DIR_OR_ID --tasks passkey --lengths 4096 8192"
        )
    for assignment in arguments.overrides:
        if twice := {"eval.tasks": "--tasks", "eval.lengths": "--lengths"}.get(assignment.partition("=")[0]):
            raise BadInput(f"--set {assignment[:60]}: without a recipe {twice} says it; drop one of them")
        if not assignment.startswith(("eval.", "model.")):
            raise BadInput(
                f"--set {assignment[:60]}: without a recipe there are the keys of eval and model alone"
            )
    lengths = _lengths(arguments.lengths)
    tree = {
        "model": {"name_or_path": arguments.model},
        # Nothing is trained: these two are read by what is asked at chosen positions alone, or not at all.
        "lengths": {"physical": 2, "target": max(2, *lengths)},
        "data": {"corpus": "none", "tokens": 1},
        "eval": {"tasks": _tasks(arguments.tasks), "lengths": lengths},
    }
    recipe = schema.made(tree, _name(arguments.model), Path("evaluate"), arguments.overrides)
    _refuse_unread(recipe.model, arguments.model)
    if task_names.FAR_GAIN in recipe.eval.tasks and recipe.model.original_length is None:
        raise BadInput(
            "--tasks: far_gain compares with the window of a base; set it with --set"
            " model.original_length=TOKENS, or name a recipe"
        )
    return Experiment.of(recipe, "base", arguments.out)


def _refuse_unread(given: schema.ModelSection, model: str) -> None:
    """Raises BadInput on a key of the model section that nothing reads where ``model`` is scored alone."""
    if given.name_or_path != model:
        raise BadInput("--set model.name_or_path: without a recipe --model names the model; drop one of them")
    if given.gguf_file is not None:
        raise BadInput(
            "--set model.gguf_file: without a recipe a GGUF file is not read; name it in a recipe's section"
            " model, and score its method base"
        )
    if given.revision is None:
        return
    if not given.revision.strip():
        raise BadInput("--set model.revision: it is empty; name a branch, tag or commit, or leave it out")
    if os.path.isdir(os.path.expanduser(model)):
        raise BadInput(
            f"--set model.revision: {model} is a folder, which has one content alone; drop it, or name an id"
            " of the hub"
        )


def _name(model: str) -> str:
    """What the folder of the model's results is called: the end of its path or id."""
    name = Path(model).name or Path(model).absolute().name
    try:
        return settings_file.folder_name(name, "--model")
    except BadInput:
        return NAMELESS
