"""What a score depends on.  A result may stand only as long as nothing of it has changed; where it lies and
when it was written is no part of it.

A question holds what was resolved: the content of weights and data, the tokenizer, the chat template's text,
the code of the task, and every key of the recipe's eval section but those that are named here as having no
say.
"""

import ast
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

from endprompt import BadInput
from endprompt.bases.locating import fingerprint as fingerprint
from endprompt.bases.model import Base
from endprompt.evaluation import (
    engine,
    far_gain,
    longbench,
    longbench_scores,
    perplexity,
    prompts,
    ruler,
    ruler_package,
    ruler_samples,
)
from endprompt.recipe import task_names
from endprompt.recipe.schema import Recipe

HERE = Path(__file__).parent

# Keys of the eval section that no question holds: which pairs are asked for and whether code may run; and
# those in whose place stands what they lead to.
_ELSEWHERE = (
    "tasks",
    "lengths",
    "run_unsafe_code",
    "short_text_shots",
    "perplexity_corpus",
    "perplexity_column",
    "ruler_samples",
    "longbench_data",
    "longbench_length",
    "chat_template",
)
# The only tasks that read a key.  Any other key is part of every question.
_READERS = {
    "samples": ("passkey", "ruler", "longbench", "distance", "named_keys"),
    "depths": ("passkey", "named_keys"),
    "perplexity_tokens": ("perplexity",),
    "perplexity_stride": ("perplexity",),
    "short_text_samples": ("short_text",),
    "distance_haystack": ("distance",),
    "distance_keys": ("distance",),
    "distances": ("distance",),
    "named_keys": ("named_keys",),
    "far_gain_tokens": ("far_gain",),
    "far_gain_texts": ("far_gain",),
}
# Modules that a task is scored by, beside its hooks in the harness and the engine.  passkey goes through
# prefix.py too, which saves time and changes no answer: its results of before stand.
_MODULES = {"distance": ("distance.py",), "named_keys": ("named_keys.py",), "far_gain": ("far_gain.py",)}


def family(task: str) -> str:
    """ "passkey" (multikey too), "perplexity", "ruler", "longbench", "short_text", or a task of PIECEWISE."""
    if task in task_names.SHORT_TEXT:
        return "short_text"
    if task in task_names.PIECEWISE:
        return task
    return {"multikey": "passkey"}.get(task, task.partition("_")[0])


# The tokenizer


def tokenizer_of(tokenizer) -> str:
    """SHA-256 over all of a fast tokenizer that ids and texts depend on: its definition, its special tokens,
    and how it splits and decodes.

    Nothing is padded where it counts, and the harness sets a padding token of its own: it is left out.
    """
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    definition["truncation"] = definition["padding"] = None
    special = {key: str(token) for key, token in tokenizer.special_tokens_map.items() if key != "pad_token"}
    return _digest(
        [
            definition,
            special,
            tokenizer.bos_token_id,
            tokenizer.eos_token_id,
            bool(tokenizer.split_special_tokens),
            bool(tokenizer.clean_up_tokenization_spaces),
        ]
    )


# The code


@functools.cache
def code(task: str) -> str:
    """SHA-256 over the code that makes and scores ``task``: its task file, its hooks, the modules of
    endprompt.evaluation that these import, the engine, and the intervals.

    Comments, docstrings and layout do not count.  The harness' own tasks are known by its version, which
    stands beside this.
    """
    known: dict[str, str] = {}
    waiting = [HERE / "engine.py", HERE / "intervals.py"]
    waiting += [HERE / name for name in _MODULES.get(family(task), ())]
    if family(task) not in ("short_text", task_names.DISTANCE):  # the harness' own, and one it cannot hold
        folder = engine.TASKS / family(task)
        waiting.append(folder / "utils.py")
        known[f"{task}.yaml"] = _task_file(folder / f"{task.removeprefix(f'{family(task)}_')}.yaml")
    while waiting:
        path = waiting.pop()
        if path.name not in known:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            waiting += _imported(tree)
            known[path.name] = _plain(tree)
    return _digest(sorted(known.items()))


def _imported(tree: ast.AST) -> Iterator[Path]:
    """The modules of endprompt.evaluation that are imported anywhere in ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "endprompt.evaluation":
            modules = [alias.name for alias in node.names]
        elif (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.startswith("endprompt.evaluation.")
        ):
            modules = [node.module.removeprefix("endprompt.evaluation.")]
        elif isinstance(node, ast.Import):
            modules = [
                alias.name.removeprefix("endprompt.evaluation.")
                for alias in node.names
                if alias.name.startswith("endprompt.evaluation.")
            ]
        else:
            continue
        yield from (HERE / f"{module}.py" for module in modules if (HERE / f"{module}.py").is_file())


def _plain(tree: ast.AST) -> str:
    """The code of ``tree`` without docstrings, in Python's own layout."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and ast.get_docstring(node, False) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _task_file(path: Path) -> str:
    """A task file and those it includes, as JSON."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
    return json.dumps([_task_file(path.parent / tree["include"])] if "include" in tree else []) + json.dumps(
        tree, sort_keys=True
    )


# The question


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _words(found: list[dict]) -> str:
    return _digest([piece["continuation"] for piece in found])


def chat(recipe: Recipe, task: str) -> bool:
    """Whether ``task`` is asked in the model's chat template: what LongBench asks without it is, and
    perplexity and far_gain are those of the text itself.
    """
    if not recipe.eval.chat_template or task in ("perplexity", task_names.FAR_GAIN):
        return False
    return family(task) != "longbench" or longbench_scores.get(task.removeprefix("longbench_")).chat


def original_length(recipe: Recipe) -> int:
    """The window of the recipe's base, C.  Raises BadInput if its config cannot be read."""
    return recipe.model.original_length or Base(recipe).original_length


class Questions:
    """Asks what the scores of ``recipe`` with ``tokenizer`` depend on; reads each of the data once."""

    def __init__(self, recipe: Recipe, tokenizer):
        self.recipe, self.tokenizer = recipe, tokenizer

    @functools.cached_property
    def _tokenizer(self) -> str:
        return tokenizer_of(self.tokenizer)

    @functools.cached_property
    def _held_out(self) -> dict:
        """{"data": of the documents that are scored, in their order, "words": that are scored of them}."""
        options = self.recipe.eval
        longest, stride = max(options.lengths), options.perplexity_stride
        found = perplexity.held_out(
            str(self.place("perplexity_corpus")),
            self.tokenizer,
            longest,
            stride,
            options.perplexity_tokens,
            self.column,
        )
        try:
            asked = perplexity.Scored(longest, stride, options.perplexity_tokens, tuple(options.lengths))
            words = perplexity.windows(found, longest, asked, self._special)
        except ValueError:
            words = []  # scoring says why
        return {"data": _digest([text.text for text in found]), "words": _words(words)}

    @property
    def _special(self) -> int:
        """Tokens that the tokenizer puts before a text."""
        return len(prompts.frame(self.tokenizer)[0])

    @functools.cached_property
    def far_gain(self) -> far_gain.Limits:
        """What the texts of far_gain are.  Raises BadInput if the base's window is not known."""
        options = self.recipe.eval
        original = original_length(self.recipe)
        beyond = tuple(length for length in options.lengths if length > original)
        return far_gain.Limits(
            original, max(options.lengths), options.far_gain_tokens, options.far_gain_texts, beyond
        )

    @functools.cached_property
    def far_documents(self) -> list[perplexity.Text]:
        """The documents of far_gain, in their order."""
        source, limits = str(self.place("perplexity_corpus")), self.far_gain
        return far_gain.documents(source, self.tokenizer, limits.longest, limits.texts, self.column)

    @functools.cached_property
    def _far_words(self) -> dict:
        """As ``_held_out``."""
        found, limits = self.far_documents, self.far_gain
        try:
            words = far_gain.pieces(found, limits.longest, limits, self._special)
        except (ValueError, BadInput):
            words = []  # scoring says why
        return {"data": _digest([text.text for text in found]), "words": _words(words)}

    @property
    def column(self) -> str:
        """The field of held-out rows that is their text."""
        return self.recipe.eval.perplexity_column or self.recipe.data.text_column

    def place(self, key: str) -> str | None:
        """Where the data that ``key`` of the eval section names lie, as a path if there is one, else the name
        itself; None if it names none.
        """
        value = getattr(self.recipe.eval, key)
        return value and str(self.recipe.path(value) or value)

    def _data(self, task: str, length: int | None) -> dict:
        """What ``task`` is made of, beside options and tokenizer.  Raises BadInput if it cannot be read."""
        options = self.recipe.eval
        match family(task):
            case "perplexity":
                return {**self._held_out, "longest": max(options.lengths)}
            case "distance":
                return {"target": self.recipe.lengths.target}
            case "far_gain":
                return {
                    **self._far_words,
                    "longest": max(options.lengths),
                    "original": self.far_gain.original,
                }
            case "ruler" if (folder := self.place("ruler_samples")) and length:
                name = task.removeprefix("ruler_")
                draw = ruler.Draw(options.samples, options.seed, chat(self.recipe, task))
                return {
                    "generator": ruler_package.GENERATION,
                    "made_elsewhere": True,
                    "data": ruler_samples.content(folder, name, length, draw, self.tokenizer),
                }
            case "ruler":
                return {"generator": ruler_package.GENERATION, "data": _digest(ruler_package.generator())}
            case "longbench":
                return {
                    "data": longbench.content(
                        task.removeprefix("longbench_"), self.place("longbench_data"), options.samples
                    )
                }
            case "short_text":
                few_shots, metric = task_names.short_text(task, options.short_text_shots)
                return {"few_shots": few_shots, "metric": metric}
            case _:
                return {}

    def __call__(self, task: str, length: int | None, identity: dict) -> dict:
        """All that the score of ``task`` at ``length`` depends on, of the model that ``identity`` describes.
        Raises BadInput if its data cannot be read.
        """
        options = {
            key: value
            for key, value in self.recipe.eval.model_dump(mode="json").items()
            if key not in _ELSEWHERE and family(task) in _READERS.get(key, (family(task),))
        }
        template = _digest(self.tokenizer.chat_template) if chat(self.recipe, task) else None
        return {
            "task": task,
            "length": length,
            "model": identity,
            **options,
            **self._data(task, length),
            "tokenizer": self._tokenizer,
            "chat_template": template,
            "code": code(task),
            "lm_eval": importlib.metadata.version("lm_eval"),
        }


def bare(question: dict) -> dict:
    """``question`` as JSON gives it back, without where the model's files lie."""
    found = json.loads(json.dumps(question))
    if isinstance(found["model"], dict) and found["model"].get("fingerprint"):
        found["model"].pop("name_or_path", None)
    return found


def same(one: dict, other: dict) -> bool:
    """Whether two questions are one, wherever the model's files lie."""
    return bare(one) == bare(other)
