r"""LongBench v1: its prompts, truncation and generation limits as the official scripts have them; its scores
are in longbench_scores.py.

Source of the facts: THUDM/LongBench at 2e00731, folder LongBench (pred.py, eval.py, metrics.py,
config/dataset2prompt.json, config/dataset2maxlen.json, task.md).  The benchmark's own wording is read at run
time from the installed lm-eval, where six of its 21 templates lost white space; it is put back, and each
template is held against the official one's SHA-256.

    lm_eval --include_path endprompt/evaluation/tasks --tasks endprompt_longbench --model hf --model_args \
        pretrained=DIR \
        --metadata '{"longbench_data": "FOLDER"}'
"""

import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

from endprompt import BadInput
from endprompt.evaluation import prompts
from endprompt.evaluation.answers import strip_prompt
from endprompt.evaluation.longbench_scores import get, score
from endprompt.rows import corpus

# tokens of a prompt beyond which its middle is cut: LCEG's choice; the official one is a number for each
# model
LENGTH = 32768
HUB = "zai-org/LongBench"
# Where lm-eval's template differs from the official one: what is put in the place of what.
_LOST = {
    "triviaqa": ("{context}\n", "{context}\n\n"),
    "samsum": ("{context}\n", "{context}\n\n"),
    "passage_count": (":$", ": "),
    "passage_retrieval_en": (":$", ": "),
    "lcc": (":$", ":\n"),
    "repobench-p": (":$", ":\n"),
}


@functools.cache
def _templates() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            "LongBench's prompts are read from the package lm-eval, which is not installed: pip install"
            " 'endprompt[eval]'"
        )
    return Path(spec.submodule_search_locations[0]) / "tasks" / "longbench"


@functools.cache
def template(task: str) -> str:
    """The official template, with {context} and {input}.  Raises BadInput if the installed lm-eval has other
    words than the benchmark.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    about, path = get(task), _templates() / f"{task}.yaml"
    try:
        raw = (
            yaml.load(path.read_text(encoding="utf-8"), Loader)["doc_to_text"]
            .replace("{{context}}", "{context}")
            .replace("{{question}}", "{input}")
        )
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{path}: LongBench's prompt cannot be read ({type(error).__name__}: {error}); pip install"
            " lm-eval==0.4.13"
        ) from None
    candidates = [raw]
    if task in _LOST:
        lost, official = _LOST[task]
        candidates.append(
            raw.removesuffix(lost[:-1]) + official if lost.endswith("$") else raw.replace(lost, official, 1)
        )
    for candidate in candidates:
        if hashlib.sha256(candidate.encode()).hexdigest() == about.template:
            return candidate
    raise BadInput(
        f"{path}: the prompt of {task} is not worded as in the official dataset2prompt.json (lm-eval"
        f" {importlib.metadata.version('lm_eval')}); scores would not be LongBench's: pip install"
        " lm-eval==0.4.13"
    )


def truncate(prompt: str, tokenizer, max_length: int) -> tuple[str, int]:
    """(prompt without its middle if it has more than ``max_length`` tokens, its tokens as a model will read
    them).

    As the official pred.py: the whole prompt is tokenized *with* the tokenizer's special tokens,
    int(max_length / 2) tokens are kept at each end, decoded without special tokens and joined; the model's
    own tokenizer call then adds them again.  So a beginning-of-sequence token takes one place of the first
    half, an odd length loses a token, and at the seam tokens may merge or split: the second number can differ
    from ``max_length`` by a few, either way.  Tokens that a tokenizer appends are left out, as they are where
    a model is asked.
    """
    if max_length < 2:
        raise BadInput(
            f"longbench_length is {max_length}; it counts a prompt's tokens, of which both ends are kept:"
            " give 2 or more"
        )
    ids = prompts.encode(tokenizer, prompt)
    if len(ids) <= max_length:
        return prompt, len(ids)
    half = int(max_length / 2)
    prompt = tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
        ids[-half:], skip_special_tokens=True
    )
    return prompt, len(prompts.encode(tokenizer, prompt))


def generation_kwargs(task: str, tokenizer, backend: str = "hf") -> dict:
    """What ``model.generate`` (or with ``backend`` vllm, vLLM's SamplingParams) needs besides greedy decoding
    and ``new_tokens``: nothing, but for samsum, as the official pred.py.

    There the newline token ends the answer, and cannot be its first token, nor can the end of sequence
    (min_new_tokens=1 is the original's min_length = prompt + 1).  ``tokenizer.encode("\\n")[-1]`` is the
    newline alone; tokens that merge it with other characters do not stop it.
    """
    if task != "samsum":
        get(task)
        return {}
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    if backend == "vllm":  # which ends at the model's own end tokens besides
        return {"stop_token_ids": [newline], "min_tokens": 1}
    return {
        "eos_token_id": [token for token in (tokenizer.eos_token_id, newline) if token is not None],
        "min_new_tokens": 1,
    }


def content(task: str, data: str | Path | None, limit: int | None = None) -> str:
    """SHA-256 of the first ``limit`` rows of ``task`` that ``samples`` would read, wherever they lie.  Raises
    BadInput on missing or damaged data.
    """
    digest = hashlib.sha256()
    for _, row in itertools.islice(_task_rows(task, data), limit):
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


# Data


def _rows(file, where: str) -> Iterator[tuple[str, dict]]:
    """(place, object) of each line of a jsonl file."""
    number = 0
    try:
        for number, row in corpus.json_lines(file, where):
            if not isinstance(row, dict):
                raise BadInput(
                    f"{where} line {number}: {type(row).__name__} in place of an object; LongBench has one"
                    " object a line"
                )
            yield f"{where} line {number}", row
    except BadInput:
        raise
    except Exception as error:  # gzip, zstd, zip and UTF-8 each raise their own
        raise BadInput(
            f"{where}: cannot be read after line {number}: {str(error) or type(error).__name__}; restore the"
            " file"
        ) from None


def _packed(task: str) -> Iterator[tuple[str, dict]]:
    """The rows of the official data.zip on the hub."""
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(HUB, "data.zip", repo_type="dataset")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"LongBench's data.zip cannot be had from the hub ({type(error).__name__}); where there is no"
            f" network, unpack it elsewhere and give its folder of {task}.jsonl and the others as"
            " longbench_data"
        ) from None
    try:
        with (
            zipfile.ZipFile(path) as archive,
            io.TextIOWrapper(archive.open(f"data/{task}.jsonl"), encoding="utf-8-sig") as file,
        ):
            yield from _rows(file, f"{path}: {task}.jsonl")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path}: no data/{task}.jsonl can be read from it ({error}); delete it and let it be fetched"
            " again"
        ) from None


def _local(task: str, data: Path) -> Iterator[tuple[str, dict]]:
    if data.is_file():  # all tasks in one file
        with corpus.open_text(data) as file:
            for where, row in _rows(file, str(data)):
                if task == row.get("dataset", row.get("task")):
                    yield where, row
        return
    names = [
        folder / f"{task}.jsonl{packing}"
        for folder in (data, data / "data")
        for packing in ("", ".zst", ".gz")
    ]
    path = next((name for name in names if name.is_file()), None)
    if path is None:
        raise BadInput(
            f"longbench_data: {data} holds no {task}.jsonl (nor .zst or .gz of it); give the folder that the"
            " official data.zip unpacks to"
        )
    with corpus.open_text(path) as file:
        yield from _rows(file, str(path))


def _field(row: dict, where: str, *names: str):
    for name in names:
        if name in row:
            return row[name]
    raise BadInput(
        f"{where} has no {names[0]!r}; it has {', '.join(map(str, row))}; LongBench's rows have input,"
        " context, answers, all_classes and length"
    )


def _task_rows(task: str, data: str | Path | None) -> Iterator[tuple[str, dict]]:
    if data is not None and not Path(data).expanduser().exists():
        raise BadInput(
            f"longbench_data: there is no {data}; give the folder that the official data.zip unpacks to"
        )
    return _packed(task) if data is None else _local(task, Path(data).expanduser())


def _references(task: str, where: str, row: dict) -> tuple[list[str], list[str] | None]:
    """(answers, names of all classes) of a row, as the task's scorer needs them."""
    answers = _field(row, where, "answers", "gold")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadInput(f"{where}: 'answers' is no list of texts; restore the file")
    classes = row.get("all_classes")
    if get(task).metric == "classification" and not (
        isinstance(classes, list) and classes and all(isinstance(name, str) for name in classes)
    ):
        raise BadInput(
            f"{where}: 'all_classes' is no list of names, from which {task} is scored; restore the file"
        )
    return answers, classes


def _prompt(task: str, where: str, row: dict) -> tuple[str, str]:
    """(a row's whole prompt, whose wording it has: the "file"'s or the "official" one)."""
    if "prompt" in row or "origin_prompt" in row:
        whole = _field(row, where, "prompt", "origin_prompt")
        if not isinstance(whole, str):
            raise BadInput(f"{where}: the prompt is no text; restore the file")
        return whole, "file"
    context, question = _field(row, where, "context"), _field(row, where, "input")
    if not isinstance(context, str) or not isinstance(question, str):
        raise BadInput(f"{where}: input or context is no text; restore the file")
    return template(task).format(context=context, input=question), "official"


def samples(
    task: str, data: str | Path | None, tokenizer, max_length: int = LENGTH, limit: int | None = None
) -> list[dict]:
    """The task's prompts in the data's order, cut to ``max_length`` tokens; the first ``limit`` of them.

    ``data``: a folder with ``<task>.jsonl`` (or .zst, .gz) in the official fields, one file of rows that name
    their ``dataset`` or ``task``, or None for the official data.zip.  Rows may hold a full ``prompt``
    (MiniLongBench: ``origin_prompt``, ``gold``) in place of ``input`` and ``context``; its wording is then
    the file's ("template": "file"). Each sample: index, dataset, prompt, tokens (of the prompt, special ones
    counted), truncated, template, answers, all_classes, length (the data's). Nothing keeps room for the
    answer, as in the original: ``max_length`` + ``new_tokens`` must fit the model. Raises BadInput on missing
    or damaged data.
    """
    get(task)  # which refuses unknown names before anything is read
    if limit is not None and limit < 1:
        raise BadInput(f"samples is {limit}; give 1 or more, or leave it out for all of them")
    found: list[dict] = []
    for where, row in _task_rows(task, data):
        answers, classes = _references(task, where, row)
        whole, wording = _prompt(task, where, row)
        prompt, tokens = truncate(whole, tokenizer, max_length)
        found.append(
            {
                "index": len(found),
                "dataset": task,
                "prompt": prompt,
                "tokens": tokens,
                "truncated": prompt != whole,
                "template": wording,
                "answers": answers,
                "all_classes": classes,
                "length": row.get("length"),
            }
        )
        if len(found) == limit:
            break
    if not found:
        raise BadInput(f"{data or 'data.zip'} holds no row of {task}")
    return found


# For lm-eval


def dataset(longbench_task: str, **metadata) -> dict:
    """{"test": datasets.Dataset} of ``samples``.  Keys of ``metadata``, others are ignored: tokenizer (or
    pretrained, or model: a folder or hub id), longbench_data (folder; default: the hub), longbench_length
    (tokens, default 32768), samples (default: all).
    """
    import datasets
    from transformers import AutoTokenizer

    name = metadata.get("tokenizer") or metadata.get("pretrained") or metadata.get("model")
    if name is None:
        raise BadInput(
            "LongBench cuts prompts by the model's own tokens; name its folder or hub id as tokenizer or"
            " pretrained in lm-eval's metadata"
        )
    tokenizer = name
    if isinstance(name, str | Path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise BadInput(
                f"tokenizer: {name} cannot be loaded:"
                f" {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            ) from None
    limits = {key: metadata.get(key) for key in ("longbench_length", "samples")}
    for key, value in limits.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise BadInput(f"{key} is {value!r}; give a whole number")
    rows = samples(
        longbench_task,
        metadata.get("longbench_data"),
        tokenizer,
        LENGTH if limits["longbench_length"] is None else limits["longbench_length"],
        limits["samples"],
    )
    return {"test": datasets.Dataset.from_list(rows)}


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """lm-eval's score of one sample, in percent, of the output without the prompt."""
    return {
        "score": score(
            doc["dataset"], [strip_prompt(doc["prompt"], results[0])], [doc["answers"]], doc["all_classes"]
        )[0]
    }
