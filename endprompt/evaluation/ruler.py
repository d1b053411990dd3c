"""RULER (Hsieh et al., 2024): samples and scores by NVIDIA's own package, driven from here.

The samples are those of the scripts in `nvidia-long-context-eval`, run with the arguments of its
``data/prepare.py`` (template "base", one chunk); the scores those of its scorers.  Added here: processes over
tasks and lengths, a cache, bounded time, checksums of the package's data, no code from a tokenizer's folder,
and a recount of every sample.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import endprompt
from endprompt import BadInput, storage
from endprompt.evaluation import answers, prompts, ruler_package, ruler_worker
from endprompt.recipe import task_names

FORMAT = 1  # of a cache file
PATIENCE = 120  # seconds of processor time without a sign of life of a script
QUESTIONS = {
    "qa_1": 5928,
    "qa_2": 7405,
}  # beyond them the script would ask for questions that are not there, for ever


# Samples


@dataclass(frozen=True)
class Draw:
    """What is drawn of every task at every length.

    samples: how many; 500 at 65536 tokens are about 150 MB a task.
    seed: of the package's scripts.
    chat: whether the tokenizer's chat template will be put around a sample, for which samples keep room in
        their length.
    """

    samples: int = 500
    seed: int = 42
    chat: bool = False


def load_tokenizer(source: str | Path):
    """The fast tokenizer of a folder (or a hub id), without running code from it.  Raises BadInput if there
    is none, or if it needs such code.
    """
    from transformers import AutoTokenizer

    from endprompt.bases.model import UNREADABLE

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except UNREADABLE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise BadInput(
                f"tokenizer: {source} wants to run Python code of its own, which is not done here; save it"
                " once as a tokenizer.json and name that folder"
            ) from None
        raise BadInput(f"tokenizer: {source} cannot be loaded: {reason}") from None
    if not tokenizer.is_fast:
        raise BadInput(
            f"tokenizer: {source} has no fast tokenizer (tokenizer.json); convert it once with transformers"
            " and save it"
        )
    return tokenizer


def arguments(question: dict, tokenizer: str, folder: Path) -> list[str]:
    """The command line that the package's data/prepare.py gives the script of a task, with a seed in place of
    its fixed 42.

    question: of the cache file, see ``ensure``; its task, length, samples, seed and room are read here.
    Room, 0 if it is not there, counts tokens of the length that are kept free besides those of the answer.
    vt makes an example of 500 tokens whatever the length, with room for an answer: so the length is what
    shrinks.
    """
    task = question["task"]
    found = ruler_package.about(task)
    options = {
        "save_dir": folder,
        "save_name": task,
        "subset": "validation",
        "tokenizer_path": tokenizer,
        "tokenizer_type": "hf",
        "max_seq_length": question["length"] - question.get("room", 0),
        "tokens_to_generate": found["tokens_to_generate"],
        "num_samples": question["samples"],
        "random_seed": question["seed"],
        **found["args"],
        **({"pre_samples": 0} if found["task"] == "qa" else {}),
        "template": found["template"] + found["answer_prefix"],
    }
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def _too_short(task: str, length: int, reason: str) -> BadInput:
    return BadInput(
        f"eval.lengths: ruler_{task} at {length}: too short for this task with this tokenizer ({reason});"
        " raise the length, or leave the task out"
    )


def _job(question: dict, definition: Path, folder: Path) -> dict:
    """The worker's orders: to answer ``question`` in ``folder``, with the tokenizer.json ``definition``."""
    task = question["task"]
    script = ruler_package.package() / "data" / "synthetic" / f"{ruler_package.about(task)['task']}.py"
    return {
        "script": str(script),
        "argv": arguments(question, str(definition.parent), folder),
        "definition": str(definition),
        "encode_special_tokens": question["split_special_tokens"],
        "nltk_data": ruler_package.sentences()[0],
        "samples": str(folder / task / "validation.jsonl"),
        "tokens_to_generate": ruler_package.tokens_to_generate(task) + question.get("room", 0),
        "counts": str(folder / "counts.json"),
        "failure": str(folder / "failure.txt"),
        "patience": PATIENCE,
    }


def _start(job: dict, folder: Path) -> subprocess.Popen:
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    path = [str(Path(endprompt.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with (folder / "stderr.txt").open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "endprompt.evaluation.ruler_worker", str(folder / "job.json")],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )


def _finish(code: int, job: dict, task: str, length: int) -> tuple[bytes, list[int]]:
    """(the script's file, the recounted lengths) of a worker that has ended.  Raises BadInput if the length
    is too short.
    """
    failure = Path(job["failure"])
    if code == ruler_worker.TOO_SHORT:
        raise _too_short(task, length, failure.read_text(encoding="utf-8"))
    if code == ruler_worker.UNUSABLE:
        raise BadInput(f"ruler_{task}: {failure.read_text(encoding='utf-8')}")
    if code:
        last = (
            Path(job["counts"])
            .with_name("stderr.txt")
            .read_text(encoding="utf-8", errors="replace")
            .strip()
            .splitlines()
            or [f"exit code {code}"]
        )[-1]
        raise RuntimeError(f"ruler_{task} at {length}: the package's script failed: {last}")
    body = Path(job["samples"]).read_bytes()
    # A haystack too small for what it hides loses a part of it, silently.
    if ruler_package.about(task)["task"] != "qa":
        lost = sum(
            not sample["outputs"] or any(answer not in sample["input"] for answer in sample["outputs"])
            for sample in map(json.loads, body.splitlines())
        )
        if lost:
            raise _too_short(task, length, f"{lost} samples do not hold the whole of their answer")
    return body, json.loads(Path(job["counts"]).read_text(encoding="utf-8"))


def _entry(path: Path) -> tuple[dict, bytes, list[int]] | None:
    """(question, the script's file, recounted lengths) of a cache file whose checksum is right; None if it is
    damaged.  Raises OSError if it cannot be read.
    """
    head, _, body = path.read_bytes().partition(b"\n")
    try:
        found = json.loads(head)
        if found["sha256"] == hashlib.sha256(body + json.dumps(found["counts"]).encode()).hexdigest():
            return found["question"], body, found["counts"]
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, question: dict, body: bytes, counts: list[int]) -> None:
    head = {
        "question": question,
        "sha256": hashlib.sha256(body + json.dumps(counts).encode()).hexdigest(),
        "counts": counts,
    }
    storage.write_atomically(path, json.dumps(head).encode() + b"\n" + body)


def _cached(path: Path, question: dict) -> bool:
    try:
        entry = _entry(path)
    except FileNotFoundError:
        return False
    if entry is None or entry[0] != question:
        print(f"{path}: is damaged; making the samples again", file=sys.stderr)
        return False
    return True


def read(path: Path) -> list[dict]:
    """The samples of a cache file, see `generate`.  Raises BadInput if it is damaged."""
    entry = _entry(path)
    if entry is None:
        raise BadInput(f"{path}: is damaged; delete it, and the samples are made again")
    return [
        {**json.loads(line), "counted": count}
        for line, count in zip(entry[1].splitlines(), entry[2], strict=True)
    ]


def default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "endprompt" / "ruler"


def _check(tasks: list[str], lengths: list[int], draw: Draw, processes: int | None) -> None:
    if not tasks or not lengths:
        raise BadInput("eval.tasks, eval.lengths: name at least one task and one length")
    for name, value, low, high in [
        ("eval.samples", draw.samples, 1, 10**6),
        ("eval.seed", draw.seed, 0, 2**32 - 1),
        *(("eval.lengths", length, 1, 10**8) for length in lengths),
        *([] if processes is None else [("processes", processes, 1, 10**4)]),
    ]:
        if type(value) is not int or not low <= value <= high:
            raise BadInput(f"{name}: a whole number from {low} to {high} is wanted (given: {value!r})")
    for task in tasks:
        ruler_package.about(task)
        if draw.samples > QUESTIONS.get(task, draw.samples):
            raise BadInput(
                f"eval.samples: ruler_{task} has {QUESTIONS[task]} questions (given: {draw.samples});"
                " lower it"
            )
        for length in lengths:
            if (
                task == "fwe" and length < 200
            ):  # a vocabulary of a word for every 50 tokens, of which three are asked for and one is noise
                raise _too_short(task, length, "it needs 200 tokens for four words")


def ensure(
    tasks: Iterable[str],
    lengths: Iterable[int],
    tokenizer: str | Path,
    draw: Draw | None = None,
    cache: Path | None = None,
    processes: int | None = None,
) -> dict[tuple[str, int], Path]:
    """The cache file of every task at every length, for `read`; what is missing is made by ``processes`` at a
    time (None: one a core), longest first.

    Raises BadInput for a length too short for its task, a tokenizer that cannot be used, or packages that are
    not the pinned ones.
    """
    tasks, lengths, draw = list(dict.fromkeys(tasks)), list(dict.fromkeys(lengths)), draw or Draw()
    _check(tasks, lengths, draw, processes)
    loaded = load_tokenizer(tokenizer)
    common, folder = _common(loaded, draw), _folder(cache)
    paths, missing = {}, []
    for length in lengths:
        for task in tasks:
            question = {"task": task, "length": length, **common}
            digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
            paths[task, length] = folder / f"{task}-{length}-{draw.samples}-{digest[:16]}.jsonl"
            if not _cached(paths[task, length], question):
                missing.append((question, paths[task, length]))
    if missing:
        missing.sort(key=lambda entry: -entry[0]["length"])
        _make(missing, loaded.backend_tokenizer.to_str(), processes or len(os.sched_getaffinity(0)))
    return paths


def _common(tokenizer, draw: Draw) -> dict:
    """What the samples of all tasks and lengths depend on."""
    from endprompt.rows.tokenizing import tokenizer_fingerprint

    found = {
        "format": FORMAT,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "split_special_tokens": bool(tokenizer.split_special_tokens),
        "samples": draw.samples,
        "seed": draw.seed,
        **ruler_package.generator(),
    }
    if draw.chat:
        prompts.check_template(tokenizer)
        found["room"] = prompts.room(tokenizer, draw.chat)
    return found


def _folder(cache: Path | None) -> Path:
    """The folder of cache files, which is made if it is not there."""
    folder = Path(cache) if cache is not None else default_cache()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cache: {folder} cannot be made: {error.strerror}; name another folder") from None
    return folder


def generate(
    tasks: Iterable[str],
    lengths: Iterable[int],
    tokenizer: str | Path,
    draw: Draw | None = None,
    cache: Path | None = None,
    processes: int | None = None,
) -> dict[tuple[str, int], list[dict]]:
    """The samples of every task at every length (tokens, answer included), as `ensure` makes them.

    A sample is the official {"index", "input", "outputs", "length"} and "counted": tokens of "input" by this
    tokenizer plus the tokens to generate.  The official generator lets fwe overrun its length, and counts vt
    before its example is renamed; a line on stderr says how many samples are over.
    """
    return {
        key: _reported(key, read(path))
        for key, path in ensure(tasks, lengths, tokenizer, draw, cache, processes).items()
    }


def _reported(key: tuple[str, int], samples: list[dict]) -> list[dict]:
    said = report(samples, key[1])
    if said["over"]:
        print(
            f"ruler_{key[0]} at {key[1]}: {said['over']} of {said['samples']} samples are longer, up to"
            f" {said['longest']} tokens with their answer, as the official generator makes them",
            file=sys.stderr,
        )
    return samples


def _make(missing: list[tuple[dict, Path]], definition: str, processes: int) -> None:
    """Makes the cache files of ``missing``, ``processes`` at a time and in their order; after the first
    failure no other is started, and those running are ended.
    """
    running: set[subprocess.Popen] = set()
    lock, stopped = threading.Lock(), threading.Event()

    def make(question: dict, path: Path) -> None:
        task, length, start = question["task"], question["length"], time.monotonic()
        with tempfile.TemporaryDirectory(prefix="endprompt-ruler-") as folder:
            with lock:
                if stopped.is_set():
                    return
                job = _job(question, file, Path(folder))
                process = _start(job, Path(folder))
                running.add(process)
            try:
                code = process.wait()
            finally:
                with lock:
                    running.discard(process)
            if stopped.is_set():
                return
            body, counts = _finish(code, job, task, length)
        _write(path, question, body, counts)
        print(
            f"ruler_{task} at {length}: {len(counts)} samples made in {time.monotonic() - start:.1f} s",
            file=sys.stderr,
        )

    with (
        tempfile.TemporaryDirectory(prefix="endprompt-ruler-") as shared,
        ThreadPoolExecutor(processes) as pool,
    ):
        file = Path(shared) / "tokenizer.json"
        file.write_text(definition, encoding="utf-8")
        futures = [pool.submit(make, *entry) for entry in missing]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
        finally:
            with lock:
                stopped.set()
                for process in running:
                    process.kill()
            pool.shutdown(cancel_futures=True)


def report(samples: list[dict], length: int) -> dict:
    """{"samples", "over", "longest", "shortest"}: recounted tokens, answer included, against ``length``."""
    counts = [sample["counted"] for sample in samples]
    return {
        "samples": len(counts),
        "over": sum(count > length for count in counts),
        "longest": max(counts),
        "shortest": min(counts),
    }


# Scores


def clean(prediction: str | None) -> str:
    """A prediction as the package's eval/evaluate.py (which parses arguments when imported) hands it to its
    scorers: stripped, control characters as newlines, stripped.
    """
    return re.sub(r"[\x00-\x1f]", "\n", (prediction or "").strip()).strip()


def _scorer(task: str, name: str, predictions: list[str | None], references: list[list[str]]):
    kind = ruler_package.about(task)["task"]
    if len(predictions) != len(references) or not predictions:
        raise BadInput(
            f"ruler_{task}: {len(predictions)} predictions for {len(references)} samples; there must be one"
            " for each, and at least one"
        )
    for number, found in enumerate(references):
        if (
            not isinstance(found, (list, tuple))
            or not found
            or not all(isinstance(reference, str) for reference in found)
        ):
            raise BadInput(
                f"ruler_{task}: the references of sample {number} are no list of at least one text: {found!r}"
            )
    from long_context_eval.eval.synthetic.constants import TASKS as scorers

    return scorers[kind][name]([clean(prediction) for prediction in predictions], references)


def score(task: str, predictions: list[str | None], references: list[list[str]]) -> list[float]:
    """The official score of each sample in percent: the share of its references in the prediction, for qa
    whether any is.  Raises BadInput for lists that do not match.
    """
    return _scorer(task, "metric_fn_per_sample", predictions, references)


def number(task: str, predictions: list[str | None], references: list[list[str]]) -> float:
    """The number the official script prints: the mean in percent, rounded to two decimals.  Raises BadInput
    for lists that do not match.
    """
    return _scorer(task, "metric_fn", predictions, references)


# lm-evaluation-harness, see endprompt/evaluation/tasks/ruler


def dataset(task: str, **metadata):
    """{"test": Dataset} of one task at all lengths.

    ``metadata`` are lm-eval's metadata and model arguments.  These keys are read: tokenizer (or pretrained,
    or model: a folder or hub id), max_seq_lengths (one or a list; default: 4096), samples (500), seed (42),
    chat_template (whether the harness is told to apply the model's; no), ruler_samples (a folder of samples
    that were made elsewhere), cache, and processes.
    """
    import datasets

    named = (metadata.get(key) for key in ("tokenizer", "pretrained", "model"))
    source = next((value for value in named if isinstance(value, str) and value), None)
    if source is None:
        raise BadInput(
            "RULER's samples are cut to the model's own tokenizer; name it, for example --metadata"
            ' \'{"tokenizer": "FOLDER", "max_seq_lengths": [4096]}\''
        )
    lengths = metadata.get("max_seq_lengths", 4096)
    lengths = lengths if isinstance(lengths, (list, tuple)) else [lengths]
    draw = Draw(
        metadata.get("samples", Draw.samples),
        metadata.get("seed", Draw.seed),
        metadata.get("chat_template", Draw.chat),
    )
    if metadata.get("ruler_samples"):
        found = _made_elsewhere(metadata["ruler_samples"], task, lengths, draw, load_tokenizer(source))
    else:
        cache = metadata.get("cache")
        cache = None if cache is None else Path(cache)
        found = generate([task], lengths, source, draw, cache, metadata.get("processes"))
    rows = [
        {**sample, "task": task, "max_length": length}
        for (_, length), made in found.items()
        for sample in made
    ]
    return {"test": datasets.Dataset.from_list(rows)}


def _made_elsewhere(folder: str, task: str, lengths: Iterable[int], draw: Draw, tokenizer):
    """As `generate`, of one task, from the ``folder`` of samples that were made on another machine."""
    from endprompt.evaluation import ruler_samples

    return {
        (task, length): _reported((task, length), ruler_samples.take(folder, task, length, draw, tokenizer))
        for length in lengths
    }


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """{"score", "<length>"}: lm-eval's per-sample metrics, one of all samples and one of those of a
    length.
    """
    (value,) = score(doc["task"], [answers.strip_prompt(doc["input"], results[0])], [doc["outputs"]])
    return {"score": value, str(doc["max_length"]): value}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.evaluation.ruler", description="Makes RULER's samples for a tokenizer."
    )
    parser.add_argument("--tokenizer", required=True, help="folder of the model or its tokenizer")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(task_names.RULER),
        metavar="TASK",
        help=f"default: all, {', '.join(task_names.RULER)}",
    )
    parser.add_argument("--lengths", nargs="+", type=int, required=True, metavar="TOKENS")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--chat-template",
        action="store_true",
        help="keep room for the tokenizer's chat template, as eval.chat_template asks",
    )
    parser.add_argument("--processes", type=int, help="default: one a core")
    parser.add_argument("--cache", type=Path, help=f"default: {default_cache()}")
    parser.add_argument(
        "--out", type=Path, help="write OUT/<length>/<task>/validation.jsonl, in the official fields"
    )
    options = parser.parse_args(argv)
    try:
        paths = ensure(
            options.tasks,
            options.lengths,
            options.tokenizer,
            Draw(options.samples, options.seed, options.chat_template),
            options.cache,
            options.processes,
        )
        for (task, length), made in paths.items():
            samples = _reported((task, length), read(made))
            said = report(samples, length)
            print(
                f"{task:16} {length:>8} {said['samples']:>5} samples of {said['shortest']} to"
                f" {said['longest']} tokens, {said['over']} over the length"
            )
            if options.out is not None:
                path = options.out / str(length) / task / "validation.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [
                    json.dumps({key: sample[key] for key in ("index", "input", "outputs", "length")})
                    for sample in samples
                ]
                storage.write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        print(ruler_package.GENERATION)
    except BadInput as error:
        print(f"ruler: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
