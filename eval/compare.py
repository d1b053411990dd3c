"""One table and one picture over all methods of a recipe that were evaluated.

    python -m endprompt.eval.compare runs/tiny
"""

import argparse
import json
import sys
from pathlib import Path

from endprompt import methods
from endprompt.eval import figures


def table(folder: Path) -> str:
    """Markdown: a row a method, passkey accuracy with its 95 % Wilson interval and perplexity by length, training beside it."""
    found = [name for name in methods.METHODS if (folder / name / "eval").is_dir()]
    passkey = {name: {row["scores"]["length"]: row["scores"] for row in figures.read(folder / name / "eval" / "passkey")} for name in found}
    perplexity = {name: {row["scores"]["length"]: row["scores"] for row in figures.read(folder / name / "eval" / "perplexity")} for name in found}
    keys = sorted({length for scores in passkey.values() for length in scores})
    texts = sorted({length for scores in perplexity.values() for length in scores})
    head = ["method", *[f"passkey {length}" for length in keys], *[f"perplexity {length}" for length in texts], "trained tokens", "train s", "text loss", "end-prompt loss"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in found:
        cells = [name]
        for length in keys:
            score = passkey[name].get(length)
            cells.append(f"{score['accuracy']:.0%} [{score['low']:.0%}, {score['high']:.0%}]" if score else "not run")
        for length in texts:
            score = perplexity[name].get(length)
            cells.append(f"{score['perplexity']:.2f}" if score else "not run")
        path = folder / name / "train.json"
        training = json.loads(path.read_text()) if path.exists() else {}
        for key, form in (("tokens", "{:,}"), ("seconds", "{:.0f}"), ("final_text_loss", "{:.3f}"), ("final_end_prompt_loss", "{:.3f}")):
            cells.append(form.format(training[key]) if training.get(key) is not None else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="DIR/<recipe> of the runs")
    parser.add_argument("--title", default=None)
    arguments = parser.parse_args()
    results = {name: rows for name in methods.METHODS if (rows := figures.read(arguments.folder / name / "eval" / "passkey"))}
    if not any((arguments.folder / name / "eval").is_dir() for name in methods.METHODS):
        print(f"compare: {arguments.folder} holds no evaluated method; run `endprompt evaluate` first", file=sys.stderr)
        raise SystemExit(2)
    text = table(arguments.folder)
    (arguments.folder / "comparison.md").write_text(text + "\n")
    print(text)
    print(f"\n{arguments.folder / 'comparison.md'}")
    if results:
        figures.heatmaps(results, arguments.folder / "comparison.png", arguments.title)
        print(arguments.folder / "comparison.png")


if __name__ == "__main__":
    main()
