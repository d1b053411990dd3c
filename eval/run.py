"""Scores one model on the recipe's tasks; one JSON file a task and length, skipped where it exists for the
same question.

lm-evaluation-harness runs the model on the task files in eval/tasks (and on its own for short text); this
module asks, keeps each answer beside its score in the official scripts' fields, and says where both come
from.
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

import torch

from endprompt import BadInput, model, provenance, runfolder, shards, sharpen
from endprompt.config import Recipe
from endprompt.eval import (
    engine,
    figures,
    intervals,
    longbench,
    longbench_scores,
    names,
    passkey,
    perplexity,
    prompts,
    results,
    ruler,
    ruler_package,
    ruler_samples,
)
from endprompt.eval.question import Questions, chat, fingerprint, same
from endprompt.methods import Method

SHOWN = {"perplexity": "{:.3f}"}  # all others are percent


def load(recipe: Recipe, method: Method, run: Path, other: str | None):
    """(model, tokenizer, what identifies the model); the model is its folder's name, unloaded, for vLLM.

    A method that trains nothing is built here, its attention sharpened as the recipe or the method says.
    Raises BadInput if there is no model to score.
    """
    from transformers import AutoConfig, AutoTokenizer

    cuda, vllm = torch.cuda.is_available(), recipe.eval.backend == "vllm"
    dtype = torch.bfloat16 if cuda else torch.float32
    if other is None and not method.trained:
        if vllm:
            raise BadInput(
                f"eval.backend: vllm reads a saved model, and {method.name} has none; use hf, or name a model"
                " with --model"
            )
        network, sharpness = model.build(recipe, method, dtype, cuda), 1.0
        if recipe.sharpen(method):
            sharpness = model.sharpness(recipe, method, model.load_config(recipe))
            sharpen.sharpen_network(network, sharpness)
        tokenizer = model.load_tokenizer(recipe)
        model.check_vocabulary(
            tokenizer, network.config, f"model: the tokenizer of {recipe.model.name_or_path!r}"
        )
        folder = Path(model.locate(recipe)["pretrained_model_name_or_path"])
        identity = {
            "name_or_path": recipe.model.name_or_path,
            "revision": recipe.model.revision,
            "gguf_file": recipe.model.gguf_file,
            "rope_parameters": network.config.rope_parameters,
            "sharpened": sharpness,
            **_content(folder, network.config, recipe.model.gguf_file),
        }
    else:
        folder = run / "model" if other is None else _named(other)
        if not folder.is_dir() and (other is None or other.startswith((".", "/", "~"))):
            raise BadInput(
                f"--model: there is no folder {folder}"
                if other
                else f"{folder} is missing; train {method.name} first, or name a model with --model"
            )
        source, trust = (
            str(folder) if other is None or folder.is_dir() else other,
            recipe.model.trust_remote_code,
        )  # else an id of the hub
        if folder.is_dir():
            model.check_folder(folder, "--model")
        try:
            with model.without_reports():
                tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust)
                config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
        except Exception as error:  # as tokenizers' own errors, which are plain Exceptions
            raise BadInput(
                f"--model: {source} cannot be loaded: {model.reason(error)}; {model.MEND}"
            ) from None
        model.refuse_kernels(config, "--model")
        model.refuse_other_kinds(config, f"--model: {source}")
        if not tokenizer.is_fast:
            raise BadInput(
                f"--model: {source} has no fast tokenizer (tokenizer.json); convert it once with transformers"
                " and save it"
            )
        model.check_vocabulary(tokenizer, config.get_text_config(), f"--model: the tokenizer of {source}")
        weights = f"--model: the weights of {source}"
        if vllm:
            model.refuse_untied(weights, source, config)
        network = (
            source
            if vllm
            else model.load_weights(
                weights,
                pretrained_model_name_or_path=source,
                trust_remote_code=trust,
                dtype=dtype,
                attn_implementation=model.supported_attention(recipe, cuda, config),
            )
        )
        identity = {"name_or_path": str(folder), **_content(folder, config)}
    # Prompts are longer than what some tokenizers were told to expect; the window is what is being tested.
    tokenizer.model_max_length = sys.maxsize
    if vllm:
        identity |= {"ends": engine.saved_ends(network, tokenizer, recipe.model.trust_remote_code)}
        return network, tokenizer, identity | {"dtype": "bfloat16", "attention": "vllm"}
    identity |= {"ends": engine.ends(network.generation_config, tokenizer)}
    identity |= {"dtype": str(network.dtype), "attention": network.config._attn_implementation}
    return network.eval().to("cuda" if cuda else "cpu"), tokenizer, identity


def _content(folder: Path, config, gguf_file: str | None = None) -> dict:
    """What the model's files are: a fingerprint of ``folder``, or the hub's commit where it is none."""
    if folder.is_dir():
        return {"fingerprint": fingerprint(folder, gguf_file)}
    return {"fingerprint": None, "commit": getattr(config, "_commit_hash", None)}


def _named(other: str) -> Path:
    """The path that --model names, whether or not it is there.  Raises BadInput if it can be no path, or is a
    file.
    """
    try:
        folder = Path(other).expanduser()
        if not other or folder.is_file():
            raise OSError("it is a file" if other else "it is empty")
        folder.resolve()
        return folder
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # too long a name, the home of a user who is not there
        raise BadInput(
            f"--model: {other[:200]!r} is no folder ({getattr(error, 'strerror', None) or error}); name a"
            " folder with config.json, or a hub id"
        ) from None


def lengths(recipe: Recipe, task: str) -> list[int | None]:
    """The lengths at which ``task`` is scored: the recipe's, LongBench's one length of truncation, or none
    for short text.
    """
    if task in names.SHORT_TEXT:
        return [None]
    if task.startswith("longbench_"):
        return [recipe.eval.longbench_length]
    return [*sorted(recipe.eval.lengths)]


class Scorer:
    """A loaded model and what its tasks need: a folder of its tokenizer, and the recipe's options as the task
    files know them.
    """

    def __init__(self, recipe: Recipe, network, tokenizer, folder: str, asks: Questions):
        self.recipe, self.tokenizer = recipe, tokenizer
        tokenizer.save_pretrained(folder)
        options = recipe.eval
        longest = max(
            *options.lengths,
            options.longbench_length + engine.LONGEST_ANSWER + prompts.room(tokenizer, options.chat_template),
        )
        self.lm = (
            engine.vllm(network, longest, recipe.model.trust_remote_code)
            if options.backend == "vllm"
            else engine.LongLM(network, tokenizer)
        )
        self.ruler_samples = asks.place("ruler_samples")
        self.metadata = {
            "tokenizer": folder,
            "samples": options.samples,
            "seed": options.seed,
            "depths": options.depths,
            "stride": options.perplexity_stride,
            "scored_tokens": options.perplexity_tokens,
            "longest": max(options.lengths),
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
        if task in names.SHORT_TEXT:
            options = self.recipe.eval
            return (
                short_text(
                    self.lm, task, options.short_text_samples, options.chat_template, options.run_unsafe_code
                ),
                [],
            )
        assert length is not None  # which only short text has none of
        generation = None
        if task.startswith("longbench_"):
            generation = (
                longbench.generation_kwargs(
                    task.removeprefix("longbench_"), self.tokenizer, self.recipe.eval.backend
                )
                or None
            )
        templated, name = chat(self.recipe, task), f"endprompt_{task}"
        asked = {**self.metadata, "max_seq_lengths": [length], "chat_template": templated}
        samples = engine.run(self.lm, name, asked, generation=generation, chat_template=templated)[name]
        documents = [sample["doc"] for sample in samples]
        answers = [sample["filtered_resps"][0] for sample in samples]
        if task == "perplexity":
            return {
                "length": length,
                **perplexity.summary(documents, [-log_likelihood for log_likelihood, _ in answers]),
            }, []
        scores = [sample["score"] for sample in samples]
        if task in passkey.TASKS:
            predictions = [
                {"key": document["key"], "depth": document["depth"], "pred": answer}
                for document, answer in zip(documents, answers, strict=True)
            ]
            return {"length": length, **passkey.summary(documents, scores)}, predictions
        low, high = intervals.bootstrap(scores)
        found = {
            "length": length,
            "score": sum(scores) / len(scores),
            "low": low,
            "high": high,
            "samples": len(scores),
        }
        if task.startswith("ruler_"):
            name = task.removeprefix("ruler_")
            predictions = [
                {
                    "index": document["index"],
                    "outputs": document["outputs"],
                    "pred": answer,
                    "length": document["length"],
                }
                for document, answer in zip(documents, answers, strict=True)
            ]
            found |= {
                "metric": "string_match_part" if name.startswith("qa_") else "string_match_all",
                "generator": self._generator(name, length),
                "official": ruler.number(name, answers, [document["outputs"] for document in documents]),
                "lengths": ruler.report(documents, length),
            }
        else:
            name = task.removeprefix("longbench_")
            predictions = [
                {"pred": answer, **{key: document[key] for key in ("answers", "all_classes", "length")}}
                for document, answer in zip(documents, answers, strict=True)
            ]
            about = longbench_scores.get(name)
            found |= {
                "metric": about.metric,
                "category": about.category,
                "truncated": sum(document["truncated"] for document in documents),
                "official": longbench_scores.number(
                    name,
                    answers,
                    [document["answers"] for document in documents],
                    documents[-1]["all_classes"],
                ),
            }
        return found, predictions

    def _generator(self, task: str, length: int) -> dict:
        if not self.ruler_samples:
            return ruler_package.generator()
        options = self.recipe.eval
        return ruler_samples.generator(
            ruler_samples.find(
                self.ruler_samples,
                task,
                length,
                options.samples,
                options.seed,
                self.tokenizer,
                options.chat_template,
            )[1]
        )


def short_text(lm, task: str, limit: int | None, chat_template: bool, unsafe_code: bool) -> dict:
    """The scores of one of the harness' own tasks, at the shots and by the metric of ``names.SHORT_TEXT``;
    all subtasks' samples count alike, as in the harness' own mean of MMLU.  ``limit``: samples a subtask;
    None: all.
    """
    few_shots, metric = names.SHORT_TEXT[task]
    found = engine.run(
        lm,
        task,
        {},
        defaults=True,
        few_shots=few_shots,
        limit=limit,
        chat_template=chat_template,
        unsafe_code=unsafe_code,
    )
    name, _, wanted = metric.partition(",")
    scores = [
        100.0 * sample[name] for part in found.values() for sample in part if sample["filter"] == wanted
    ]
    low, high = intervals.bootstrap(scores)
    return {
        "length": None,
        "metric": metric,
        "few_shots": few_shots,
        "score": sum(scores) / len(scores),
        "low": low,
        "high": high,
        "samples": len(scores),
    }


def pairs(recipe: Recipe) -> list[tuple[str, int | None]]:
    """(task, length) of every score that the recipe asks for."""
    return [(task, length) for task in recipe.eval.tasks for length in lengths(recipe, task)]


def _chosen(recipe: Recipe, only: Sequence[str]) -> list[tuple[str, int | None]]:
    known = {f"{task}:{length or '-'}": (task, length) for task, length in pairs(recipe)}
    for name in only:
        if name not in known:
            raise BadInput(f"--only {name}: the recipe has no such pair; it has {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(only)] if only else list(known.values())


def evaluate(
    recipe: Recipe,
    method: Method,
    run: Path,
    other: str | None = None,
    only: Sequence[str] = (),
    budget: float | None = None,
) -> None:
    """Writes ``run``/eval/<task>/<length>.json and the answers beside it as .jsonl (``run``/eval-<name>-<hash
    of its path> for another model) and a picture, and prints a line a score.  only: the TASK:LENGTH pairs to
    score, in that order; none: all of the recipe's.
    budget: seconds, loading included, after which no pair is begun, nor one when less is left than the
        longest so far took; None: no end.

    Raises BadInput if there is no model, another process scores one of the pairs, a length is too short for
    its task, data are missing, or the held-out documents are shorter than a length.
    """
    options, folder = recipe.eval, results.evaluation_folder(run, other and str(_named(other)))
    if (named := os.environ.get("TMPDIR")) and not (
        os.path.isdir(named) and os.access(named, os.W_OK | os.X_OK)
    ):
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
    if benched := [
        task.removeprefix("longbench_") for task in options.tasks if task.startswith("longbench_")
    ]:
        longbench_scores.check_environment(*benched)
    todo, began, longest, done = _chosen(recipe, only), time.monotonic(), 0.0, 0
    with contextlib.ExitStack() as held, tempfile.TemporaryDirectory() as temporary:
        for pair in todo:
            held.enter_context(
                runfolder.hold(
                    folder / f".{_path(Path(), *pair).with_suffix('').as_posix().replace('/', '-')}.lock"
                )
            )
        network, tokenizer, identity = load(recipe, method, run, other)
        reach = None if recipe.eval.backend == "vllm" else engine.table(network)
        if reach and (beyond := [(task, length) for task, length in todo if (length or 0) > reach]):
            raise BadInput(
                f"eval.lengths: {beyond[0][0]} at {beyond[0][1]}: the model has a table of {reach} positions "
                "and cannot read beyond; lower the length, or leave it out"
            )
        if options.chat_template:
            prompts.check_template(tokenizer)
        asks = Questions(recipe, tokenizer)
        asked = {(task, length): asks(task, length, identity) for task, length in todo}
        scorer = Scorer(recipe, network, tokenizer, temporary, asks)
        there = {key: _existing(_path(folder, *key), asked[key]) for key in todo}
        missing = [
            (task.removeprefix("ruler_"), length)
            for (task, length), result in there.items()
            if result is None and task.startswith("ruler_") and length is not None
        ]
        if (
            missing and not options.ruler_samples
        ):  # made together, on all cores; the task files find them in the cache
            ruler.ensure(
                [task for task, _ in missing],
                [length for _, length in missing],
                temporary,
                options.samples,
                options.seed,
                chat=options.chat_template,
            )
        for task, length in todo:
            result = there[task, length]
            if result is None:
                left, started = (
                    math.inf if budget is None else budget - (time.monotonic() - began),
                    time.monotonic(),
                )
                if left < max(longest, 0.001):
                    print(
                        f"evaluate: {done} of {len(todo)} pairs are scored, and of {budget:g} s"
                        f" {max(0, left):.0f} are left; the same command goes on",
                        flush=True,
                    )
                    break
                try:
                    scores, predictions = scorer.score(task, length)
                except ValueError as error:
                    raise BadInput(f"eval.lengths: {task} at {length}: {error}") from None
                seconds = time.monotonic() - started
                longest = max(longest, seconds)
                result = {
                    "question": asked[task, length],
                    "recipe": recipe.name,
                    "method": method.name,
                    "scores": scores,
                    "seconds": round(seconds, 2),
                    **provenance.stamp(),
                }
                path = _path(folder, task, length)
                path.parent.mkdir(parents=True, exist_ok=True)
                if predictions:
                    shards.write_atomically(
                        path.with_suffix(".jsonl"),
                        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions).encode(),
                    )
                shards.write_json(path, result)
            done += 1
            form = SHOWN.get(task, "{:.2f}%")
            score, low, high = (form.format(result["scores"][key]) for key in ("score", "low", "high"))
            print(f"{method.name:14} {task:22} {length or '-':>7} {score:>8}  [{low}, {high}]", flush=True)
    for task in passkey.TASKS:
        if any(asked == task for asked, _ in todo) and (folder / task).is_dir():
            figures.heatmaps({method.name: figures.read(folder / task)}, folder / f"{task}.png")


def _path(folder: Path, task: str, length: int | None) -> Path:
    return folder / task / f"{length or 'any'}.json"


def _existing(path: Path, question: dict) -> dict | None:
    """A result already there for the very same question; None, after saying so, if there is one for
    another.
    """
    try:
        result = json.loads(path.read_text())
        if same(result["question"], question):
            return result
        print(f"{path}: was scored for another model or setting; scoring again", file=sys.stderr)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError):
        print(f"{path}: cannot be read; scoring again", file=sys.stderr)
    return None
