"""RULER samples that were made on another machine: the cache files of ``python -m endprompt.evaluation.ruler
--cache FOLDER``, of which the first so many are taken.

They need neither NVIDIA's data nor NLTK, whose versions the file itself names.
"""

import hashlib
import json
from pathlib import Path

from endprompt import BadInput
from endprompt.evaluation import prompts, ruler, ruler_package


def _question(path: Path) -> dict | None:
    """What the file at ``path`` says it answers; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.readline())["question"]
        return found if isinstance(found, dict) and type(found.get("samples")) is int else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find(folder: str | Path, task: str, length: int, draw: ruler.Draw, tokenizer) -> tuple[Path, dict]:
    """(file, its question) in ``folder`` with what ``draw`` asks of ``task`` at ``length`` tokens of
    ``tokenizer`` (a loaded one), or with more samples.

    Raises BadInput if there is none.
    """
    from endprompt.rows.tokenizing import tokenizer_fingerprint

    wanted = {
        "format": ruler.FORMAT,
        "task": task,
        "length": length,
        "seed": draw.seed,
        "generation": ruler_package.GENERATION,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "room": prompts.room(tokenizer, draw.chat) or None,
    }
    there = [
        (path, found)
        for path in sorted(Path(folder).glob(f"{task}-{length}-*.jsonl"))
        if (found := _question(path))
    ]
    fitting = [
        (path, found)
        for path, found in there
        if found["samples"] >= draw.samples and all(found.get(key) == value for key, value in wanted.items())
    ]
    if not fitting:
        other = sorted(
            {key for _, found in there for key, value in wanted.items() if found.get(key) != value}
        )
        why = (
            f"; what is there differs in {', '.join(other)}"
            if other
            else f"; what is there has {max(found['samples'] for _, found in there)}"
            if there
            else ""
        )
        raise BadInput(
            f"eval.ruler_samples: {folder} holds no {draw.samples} samples of ruler_{task} at {length} for"
            f" this tokenizer and seed {draw.seed}{why}; make them by `python -m endprompt.evaluation.ruler"
            f" --cache FOLDER --tokenizer MODEL --tasks {task} --lengths {length} --samples {draw.samples}"
            f" --seed {draw.seed}{' --chat-template' if draw.chat else ''}`"
        )
    return max(fitting, key=lambda entry: entry[1]["samples"])


def content(folder: str | Path, task: str, length: int, draw: ruler.Draw, tokenizer) -> str:
    """SHA-256 of what ``take`` gives.  Raises BadInput as it does."""
    found = take(folder, task, length, draw, tokenizer)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def take(folder: str | Path, task: str, length: int, draw: ruler.Draw, tokenizer) -> list[dict]:
    """The first ``draw.samples`` samples, as `ruler.read` gives them.  Raises BadInput if there are not so
    many, or the file is damaged.
    """
    return ruler.read(find(folder, task, length, draw, tokenizer)[0])[: draw.samples]


def generator(question: dict) -> dict:
    """What `ruler_package.generator` said where the samples were made, and how many were drawn."""
    return {
        **{key: question.get(key) for key in ("generation", "words", "sentences", "python", "versions")},
        "drawn": question["samples"],
    }
