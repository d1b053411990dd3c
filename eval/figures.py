"""Pictures of results: length x depth heatmaps, one panel a method."""

import json
from pathlib import Path


def read(folder: Path) -> list[dict]:
    """The results in ``folder`` (one JSON file a length) of the model that was scored there last, by length."""
    results = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    newest = max(results, key=lambda result: result["date"])["question"]["model"] if results else None
    return sorted((result for result in results if result["question"]["model"] == newest), key=lambda result: result["scores"]["length"])


def heatmaps(results: dict[str, list[dict]], path: Path, title: str | None = None) -> None:
    """Draws accuracy by length (across) and depth of the key (down) for each named list of passkey results, into one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(1, len(results), figsize=(1.2 + 2.3 * len(results), 3.6), squeeze=False, sharey=True, layout="constrained")
    for axis, (name, rows) in zip(axes[0], results.items(), strict=True):
        depths = sorted({cell["depth"] for row in rows for cell in row["scores"]["cells"]})
        grid = np.full((len(depths), len(rows)), np.nan)
        for column, row in enumerate(rows):
            for cell in row["scores"]["cells"]:
                grid[depths.index(cell["depth"]), column] = cell["correct"] / cell["total"]
        image = axis.imshow(grid, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(rows)), [f"{row['scores']['length']}\n{row['scores']['accuracy']:.0%}" for row in rows], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        axis.set_title(name, fontsize=10)
    axes[0][0].set_ylabel("depth of the key")
    figure.supxlabel("length in tokens, and accuracy over all depths", fontsize=9)
    figure.colorbar(image, ax=axes[0].tolist(), label="keys found", shrink=0.9)
    if title:
        figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
