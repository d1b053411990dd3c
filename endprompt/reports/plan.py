r"""What is to be run for the tables, what of it is there, and how many GPU hours the rest takes;
`eval/run_all.sh` follows it.

    python -m endprompt.reports.plan --recipe recipes/llama3-8b-64k.yaml [--tables all] [--gpu A800 --gpus 8 \
        --mfu 0.4]

Hours are FLOPs / (peak x MFU).  Training: ``flops_per_token`` x tokens x epochs.  Evaluation: the prompts'
forward pass, a third of ``flops_per_token`` at that length (causal attention counted as half of the square) x
samples; LongBench as if every prompt filled the length it is cut to, an upper bound.  Left out: generating
answers (bound by memory, and one prompt at a time: with short prompts longer than all that is counted), short
text, fine-tuning, start-up and data, activation checkpointing's second forward pass (MFU counts the model's
FLOPs alone).
"""

import argparse
import contextlib
import copy
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from endprompt import BadInput
from endprompt.evaluation import results
from endprompt.planning import estimate
from endprompt.positions import rope
from endprompt.recipe import task_names
from endprompt.recipe.batch import batch_shape
from endprompt.recipe.experiment import Experiment, resolve
from endprompt.recipe.schema import Recipe
from endprompt.reports.plan_jobs import METHODS, Job, jobs


def training_flops(experiment: Experiment, about, gpus: int) -> float:
    """gpus: that train together, which ``train.max_steps`` counts by."""
    if not experiment.method.trained:
        return 0.0
    return estimate.token_flops(experiment, about) * estimate.trained_tokens(experiment, gpus)


def prefill_flops(recipe: Recipe, about) -> float:
    """Of all prompts of the recipe's tasks, at most as many as a benchmark holds; short text is left out."""
    from endprompt.evaluation import piecewise
    from endprompt.training.trainer import flops_per_token

    options, total = recipe.eval, 0.0
    for task in options.tasks:
        if task in task_names.SHORT_TEXT:
            continue
        if task in task_names.PIECEWISE:
            for count, length in piecewise.prefill(recipe, task):
                total += count * length * flops_per_token(about, length) / 3
            continue
        samples = options.samples
        if task == "perplexity":
            samples = math.ceil(options.perplexity_tokens / options.perplexity_stride)
        elif task.startswith("longbench_"):
            samples = min(samples, results.full_samples(task))
        for length in [options.longbench_length] if task.startswith("longbench_") else options.lengths:
            total += samples * length * flops_per_token(about, length) / 3
    return total


def _answered(experiment: Experiment, folder: Path, scored: Path | None) -> tuple[int, int]:
    """(results in ``folder`` that `endprompt evaluate` would keep, results it would make) for the model in
    ``scored``; None: the untrained one.
    """
    from endprompt.evaluation import question, run

    recipe = experiment.recipe
    pairs, found = run.pairs(recipe), {}
    for task, length in pairs:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            asked = json.loads((folder / task / f"{length or 'any'}.json").read_text(encoding="utf-8"))[
                "question"
            ]
            found[task, length] = asked.pop("model"), asked
    if not found:
        return 0, len(pairs)
    there = 0
    with contextlib.suppress(
        BadInput
    ):  # a tokenizer that cannot be loaded, as of a base that was not fetched
        is_model = _identified(experiment, scored)
        asks = question.Questions(recipe, _tokenizer(recipe, scored))
        for (task, length), (of, asked) in found.items():
            with contextlib.suppress(
                BadInput, KeyError, TypeError, AttributeError
            ):  # data that are not there, an old form of result
                expected = {key: value for key, value in asks(task, length, {}).items() if key != "model"}
                there += asked == json.loads(json.dumps(expected)) and is_model(of)
    return there, len(pairs)


def _identified(experiment: Experiment, scored: Path | None) -> Callable[[dict], bool]:
    """Whether what a result says of its model is the one in ``scored``; None: the base under the method's
    RoPE, whose parameters are told before anything is built.  Of an id of the hub all that is known is the
    folder of its results.  Raises BadInput if the base cannot be read.
    """
    from endprompt.evaluation import question

    if scored is not None:
        expected = {"fingerprint": question.fingerprint(scored)} if scored.is_dir() else {}
        return lambda of: all(of[key] == value for key, value in expected.items())
    base, config = experiment.base, copy.deepcopy(experiment.base.config)
    rope.apply(config, experiment.scaling, experiment.target_length)
    built = {"rope_parameters": config.rope_parameters, "sharpened": experiment.sharpness}
    expected = json.loads(json.dumps(built))
    return lambda of: (
        (of.get("fingerprint") or str(of.get("commit"))) == base.fingerprint
        and all(of.get(key, value) == value for key, value in expected.items())
    )


def _tokenizer(recipe: Recipe, scored: Path | None):
    """The tokenizer of the model in ``scored``, or of the recipe's base.  Raises BadInput."""
    from transformers import AutoTokenizer

    from endprompt.bases import model

    if scored is not None and (scored / "tokenizer.json").is_file():
        with contextlib.suppress(*model.UNREADABLE):
            return AutoTokenizer.from_pretrained(scored)
    return model.load_tokenizer(recipe)


@dataclass(frozen=True)
class Planned:
    """A job with its state ("missing", "trained", "evaluated", "k of n results"), GPU hours to go, and bytes
    a GPU in training; None: not known, or nothing to train.
    """

    job: Job
    state: str
    done: bool
    train_hours: float | None
    evaluate_hours: float | None
    memory: float | None = None


def training_memory(experiment: Experiment, about, gpus: int) -> float | None:
    """Bytes a GPU under the recipe's own ZeRO file (see ``estimate.memory``)."""
    if experiment.recipe.sequence_parallel > 1:
        return None
    return estimate.training_memory(experiment, about, gpus).total


def inspect(job: Job, flops_per_hour: float, gpus: int = 8) -> Planned:
    """gpus: that train together, for the memory of one.  Raises BadInput if the recipe cannot be run as the
    job says.
    """
    experiment = resolve(job.recipe, list(job.overrides), job.method, job.out)
    recipe, method = experiment.recipe, experiment.method
    if recipe.name != job.recipe.stem:
        raise BadInput(
            f"--recipe {job.recipe} is the resolved copy of a run of {recipe.name}; name the recipe itself,"
            f" recipes/{recipe.name}.yaml"
        )
    if job.kind == "sft":
        done = any((job.folder / "sft").glob("*.safetensors"))
        return Planned(job, "trained" if done else "missing", done, 0.0 if done else None, 0.0)
    if method.trained and job.kind != "evaluate":
        batch_shape(experiment)
    about = estimate.shape(recipe)
    scored = Path(job.model).expanduser() if job.model else job.folder / "model" if method.trained else None
    trained = job.kind == "evaluate" or not method.trained or (scored is not None and scored.is_dir())
    if job.kind == "train":
        there = wanted = 0
    elif trained:
        there, wanted = _answered(experiment, results.evaluation_folder(job.folder, job.model), scored)
    else:
        there, wanted = 0, 1
    done = trained and there == wanted
    if not trained:
        state = "missing"
    elif done:
        state = "trained" if job.kind == "train" else "evaluated"
    elif there:
        state = f"{there} of {wanted} results"
    else:
        state = "trained" if method.trained and job.kind == "run" else "not evaluated"
    if about is None:
        return Planned(job, state, done, None, None)
    train = 0.0 if trained else training_flops(experiment, about, gpus) / flops_per_hour
    counted = any(task not in task_names.SHORT_TEXT for task in recipe.eval.tasks)
    evaluate = (
        0.0
        if done or job.kind == "train"
        else (
            None
            if not counted
            else prefill_flops(recipe, about) * ((wanted - there) / wanted) / flops_per_hour
        )
    )
    return Planned(
        job, state, done, train, evaluate, None if trained else training_memory(experiment, about, gpus)
    )


def _hours(value: float | None) -> str:
    if value is None:
        return "?"
    if value == 0:
        return "-"
    if value < 0.01:
        return "<0.01"
    return f"{value:,.2f}" if value < 10 else f"{value:,.1f}"


def table(planned: list[Planned], gpu: str, peak: float, gpus: int, mfu: float) -> str:
    train, evaluate = (
        math.fsum(getattr(item, key) or 0 for item in planned) for key in ("train_hours", "evaluate_hours")
    )
    done = f"{sum(item.done for item in planned)} of {len(planned)} done"
    rows = [
        ("run", "to do", "state", "GB a GPU", "training, GPU h", "prompts, GPU h"),
        *map(_row, planned),
        ("total", "", done, "", _hours(train), _hours(evaluate)),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"Estimated, not measured: {gpu} at {peak / 1e12:.0f} TFLOP/s (dense bf16) x MFU {mfu:.0%}"
            + (f"; training on {gpus} GPUs takes {_hours(train / gpus)} h of wall-clock." if train else "."),
            f"Left out: {', '.join(_left_out(planned))}; ? is not known.",
        ]
    )


def _row(item: Planned) -> tuple[str, ...]:
    return (
        str(item.job.folder),
        "-" if item.done else item.job.kind,
        item.state,
        "-" if item.memory is None else f"{item.memory / 1e9:.1f}",
        _hours(item.train_hours),
        _hours(item.evaluate_hours),
    )


def _left_out(planned: list[Planned]) -> list[str]:
    """What the hours do not hold."""
    tuned = any(item.job.kind == "sft" and not item.done for item in planned)
    short = any(item.evaluate_hours is None for item in planned)
    return [
        "generating answers (often longer than the prompts' pass)",
        "start-up and data",
        *(["fine-tuning"] if tuned else []),
        *(["short text"] if short else []),
    ]


def make(arguments: argparse.Namespace) -> tuple[list[Planned], float]:
    from endprompt.training.trainer import PEAK_FLOPS

    peak = PEAK_FLOPS.get(arguments.gpu)
    if peak is None:
        raise BadInput(f"--gpu {arguments.gpu}: its peak is not known; use one of {', '.join(PEAK_FLOPS)}")
    if not 0 < arguments.mfu <= 1:
        raise BadInput(
            f"--mfu {arguments.mfu}: a share of the peak above 0 and at most 1 is wanted, such as 0.4"
        )
    if arguments.gpus < 1:
        raise BadInput(f"--gpus {arguments.gpus}: at least one is needed")
    overrides = list(arguments.overrides)
    if arguments.samples is not None:
        overrides.append(f"eval.samples={arguments.samples}")
    if arguments.lengths:
        overrides.append(f"eval.lengths=[{','.join(map(str, arguments.lengths))}]")
    found = jobs(
        arguments.recipe,
        arguments.methods,
        arguments.out,
        tuple(overrides),
        results.models(arguments.model),
        arguments.tables == "all",
    )
    return [inspect(job, peak * arguments.mfu * 3600, arguments.gpus) for job in found], peak


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m endprompt.reports.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_runs(parser)
    parser.add_argument(
        "--gpu", default="A800", metavar="NAME", help="A100, A800, H100, ...: for the hours (default: A800)"
    )
    parser.add_argument(
        "--gpus", type=int, default=8, metavar="N", help="for the hours of wall-clock (default: 8)"
    )
    parser.add_argument(
        "--mfu",
        type=float,
        default=0.4,
        metavar="X",
        help="share of the peak that is reached, an assumption (default: 0.4)",
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help=(
            "print what is to be done for a shell to follow: a line a step, its fields separated by the"
            " character 31"
        ),
    )
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    """The options that say what is to be run."""
    parser.add_argument(
        "--recipe",
        type=Path,
        default=Path("recipes/tiny.yaml"),
        metavar="FILE",
        help="default: recipes/tiny.yaml",
    )
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), metavar="METHOD", help=f"default: {' '.join(METHODS)}"
    )
    parser.add_argument(
        "--tables",
        choices=("main", "all"),
        default="main",
        help="all: also the runs of the paper's ablations, 32K figure and fine-tuning",
    )
    parser.add_argument("--samples", type=int, default=None, metavar="N", help="eval.samples")
    parser.add_argument("--lengths", type=int, nargs="+", default=None, metavar="N", help="eval.lengths")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="METHOD=DIR",
        help="evaluate this model in the place of training METHOD",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="KEY=VALUE",
        help="override a key of the recipe",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs"), metavar="DIR", help="where runs are and go (default: runs)"
    )


def main(argv: list[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    try:
        planned, peak = make(arguments)
        text = (
            "\n".join(item.job.step() for item in planned if not item.done)
            if arguments.steps
            else table(planned, arguments.gpu, peak, arguments.gpus, arguments.mfu)
        )
    except BadInput as error:
        print(f"plan: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    if text:
        print(text)


if __name__ == "__main__":
    main()
