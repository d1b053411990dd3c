"""What a full evaluation will run, in which state each run is, and what the missing ones cost.

GPU hours are computed, not measured.  Training: `endprompt.train.flops_per_token` x tokens / (peak x MFU).  Evaluating: a third of that (forward
alone) at the length of each prompt, times the samples, at the same MFU; the tokens that are generated, loading and scoring are left out.  LongBench
is counted as if each prompt had its greatest length, short text not at all.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import yaml

from endprompt import BadInput, config, methods
from endprompt.eval import longbench_scores, names, tables

# Shapes of models on the hub, from their config.json, for plans made where they are not at hand.
_FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {name: dict(zip(_FIELDS, values, strict=True)) for name, values in {
    "meta-llama/Meta-Llama-3-8B": (4096, 14336, 32, 32, 8, 128256), "meta-llama/Llama-2-7b-hf": (4096, 11008, 32, 32, 32, 32000),
    "mistralai/Mistral-7B-v0.3": (4096, 14336, 32, 32, 8, 32768), "HuggingFaceTB/SmolLM2-135M": (576, 1536, 30, 9, 3, 49152)}.items()}
PEAKS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H200": 989e12}


def shape(recipe: config.Recipe):
    """The model's config, or its known shape; None where neither is at hand."""
    if (known := SHAPES.get(recipe.model.name_or_path)) is not None:
        return SimpleNamespace(**known)
    from endprompt import model

    try:
        return model.load_config(recipe)
    except BadInput:
        return None


def train_flops(recipe: config.Recipe, method: methods.Method, about) -> float:
    from endprompt.train import flops_per_token

    if not method.trained:
        return 0.0
    attended = recipe.group_size(method) or recipe.row_length(method)
    return flops_per_token(about, attended, recipe.lora(method) is not None) * recipe.data.tokens


def evaluate_flops(recipe: config.Recipe, about) -> float:
    from endprompt.train import flops_per_token

    options, total = recipe.eval, 0.0
    for task in options.tasks:
        if task in names.SHORT_TEXT:
            continue
        if task.startswith("longbench_"):
            rows = min(options.samples, longbench_scores.get(task.removeprefix("longbench_")).samples)
            total += rows * options.longbench_length * flops_per_token(about, options.longbench_length) / 3
            continue
        rows = -(-options.perplexity_tokens // options.perplexity_stride) if task == "perplexity" else options.samples
        total += sum(rows * length * flops_per_token(about, length) / 3 for length in options.lengths)
    return total


def state(run: Path, recipe: config.Recipe, method: methods.Method) -> str:
    from endprompt.eval.run import lengths

    wanted = [run / "eval" / task / f"{length or 'any'}.json" for task in recipe.eval.tasks for length in lengths(recipe, task)]
    there = sum(path.is_file() for path in wanted)
    if there == len(wanted):
        return "evaluated"
    if method.trained and not (run / "model").is_dir():
        return "missing"
    return f"evaluated {there} of {len(wanted)}" if there else "trained" if method.trained else "to evaluate"


def runs(recipe: Path, chosen: list[str], overrides: list[str], out: Path, all_tables: bool) -> list[tuple[Path, str, Path, list[str]]]:
    """(recipe file, method, OUT, overrides) of every run, in order: the methods, then the paper's ablations if asked for and if the recipe is its own."""
    found = [(recipe, methods.get(name).name, out, overrides) for name in chosen]
    if all_tables:
        paper = yaml.safe_load(tables.PAPER.read_text(encoding="utf-8"))
        if recipe.stem != paper["base"]["recipe"]:
            raise BadInput(f"--tables all: the paper's ablations belong to {paper['base']['recipe']}, not to {recipe.stem}; use --recipe recipes/{paper['base']['recipe']}.yaml")
        found += [(recipe.with_name(f"{row['recipe']}.yaml"), "endprompt", out / "ablations" / name, [*overrides, *row.get("set", [])]) for name, row in paper["runs"].items()]
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", required=True, choices=list(methods.METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs"), metavar="DIR")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--tables", choices=["main", "all"], default="main")
    parser.add_argument("--gpu", choices=PEAKS, default="A800")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--commands", action="store_true", help="print one line a run for a shell: OUT, recipe, method, overrides, tab-separated")
    arguments = parser.parse_args(argv)
    try:
        if not 0 < arguments.mfu <= 1:
            raise BadInput(f"--mfu {arguments.mfu}: a share between 0 and 1 is wanted")
        planned = runs(arguments.recipe, arguments.methods, arguments.overrides, arguments.out, arguments.tables == "all")
        checked = [config.load(recipe, overrides) for recipe, _, _, overrides in planned]
        if arguments.commands:
            for recipe, method, out, overrides in planned:
                print("\t".join([str(out), str(recipe), method, *(part for override in overrides for part in ("--set", override))]))
            return
        rate, total = PEAKS[arguments.gpu] * arguments.mfu * 3600, 0.0
        print(f"{'recipe':32} {'method':18} {'state':18} {'train':>9} {'evaluate':>9}  GPU hours on {arguments.gpu} at {arguments.mfu:.0%} MFU, computed")
        for recipe, (_, method, out, _) in zip(checked, planned, strict=True):
            about, found = shape(recipe), state(out / recipe.name / method, recipe, methods.get(method))
            cells = ["unknown", "unknown"]
            if about is not None:
                train, evaluate = train_flops(recipe, methods.get(method), about) / rate, evaluate_flops(recipe, about) / rate
                cells = [f"{train:.2f}", f"{evaluate:.2f}"]
                total += (train if found == "missing" else 0.0) + (0.0 if found == "evaluated" else evaluate)
            label = recipe.name if out == arguments.out else f"{recipe.name} ({out.name})"
            print(f"{label:32} {method:18} {found:18} {cells[0]:>9} {cells[1]:>9}")
        print(f"still to do: {total:.2f} GPU hours" + ("" if all(shape(recipe) for recipe in checked) else ", without the runs whose model is not at hand"))
    except BadInput as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
