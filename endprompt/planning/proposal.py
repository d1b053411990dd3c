"""How a model is extended on a machine so that it fits: what `endprompt init` chooses.

The choice is made by the memory that ``estimate`` counts.  Tried in this order, the first that fits is taken:
all weights, adapters, adapters on a base in 4 bits, all weights with the optimizer on the host; for each the
ZeRO file that shares least; then activations kept before activations computed again; then as many rows a
micro-batch as fit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from endprompt import RECOMMENDED, BadInput
from endprompt.bases import families, quantized
from endprompt.planning import estimate
from endprompt.planning.estimate import Machine
from endprompt.planning.memory import Memory, candidates, training_memory
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

LONGEST_ROW, SHORTEST_ROW = 8192, 1024  # tokens; the paper's rows, and the shortest that are proposed
STEP_ROWS = 64  # the paper's rows a step (appendix A.1)
FEWEST_STEPS = 100  # fewer rows a step where the corpus is small
MOST_ROWS = 8  # of a micro-batch: by then a GPU is busy
TOKENS = 100_000_000
SAMPLE = 2**20  # characters that are tokenized to see how many tokens a corpus holds
# Of the shipped recipes that train adapters.
LORA = {"r": 16, "alpha": 32.0}
RATES = {True: 2.0e-4, False: 2.0e-5}  # with adapters, and without
MORE_GPUS = (2, 4, 8, 16, 32, 64)
ALL, ADAPTERS, QUANTIZED = "all", "lora", "nf4"
WHAT = {ALL: "all weights", ADAPTERS: "LoRA", QUANTIZED: "LoRA on a base in 4 bits"}


@dataclass(frozen=True)
class Asked:
    """What `endprompt init` was asked for.  tokens: None for TOKENS, or what the corpus holds if that is
    less; train: "all" weights, "lora", or "auto"; out: the recipe's file."""

    model: str
    gguf: str | None
    target: int
    corpus: list[str]
    method: str
    tokens: int | None
    train: str
    out: Path


@dataclass(frozen=True)
class Way:
    """One way of training.  what: ALL, ADAPTERS, or QUANTIZED, adapters on a base in 4 bits; zero: the name
    of a ZeRO file, "none" without DeepSpeed; recomputed: whether activations are; rows: of a micro-batch."""

    what: str
    zero: str
    recomputed: bool = True
    rows: int = 1


@dataclass(frozen=True)
class Proposal:
    """experiment: of the recipe that is proposed; memory: of a GPU; hours: of the training."""

    experiment: Experiment
    way: Way
    memory: Memory
    machine: Machine
    hours: float
    measured: bool  # whether the corpus was counted


class Search:
    """The ways of training one recipe's model on a machine, and what memory each takes."""

    def __init__(self, recipe: schema.Recipe, method: str, about):
        self.recipe, self.method, self.about = recipe, method, about
        self.files = candidates(recipe)

    def experiment(self, way: Way, gpus: int) -> Experiment:
        train = settings(self.recipe, self.method, way, gpus)
        return Experiment.of(self.recipe.model_copy(update={"train": train}), self.method)

    def memory(self, way: Way, machine: Machine) -> Memory:
        found = self.experiment(way, machine.gpus)
        rows = None if found.method.fills == "target" else way.rows
        return training_memory(found, self.about, machine.gpus, self.files[way.zero], rows)

    @property
    def quantizable(self) -> bool:
        """Whether adapters can be trained on this base in 4 bits, by this method."""
        try:
            quantized.refuse(self.about)
        except BadInput:
            return False
        found = self.experiment(Way(QUANTIZED, "none"), 1)
        return not (self.recipe.model.gguf_file or found.method.base_beside(found.adapters))

    def ways(self, train: str, gpus: int) -> Iterator[Way]:
        """By preference."""
        shared = ["none"] if gpus == 1 else ["none", "zero2", "zero3"]
        own = Experiment.of(self.recipe, self.method).method.adapters is not None
        whole, adapted = train != ADAPTERS and not own, train != ALL
        for what in [ALL] * whole + [ADAPTERS] * adapted:
            yield from (Way(what, zero) for zero in shared)
        if adapted and self.quantizable:
            yield Way(QUANTIZED, "none")
        for what in [ALL] * whole + [ADAPTERS] * adapted:
            yield Way(what, "zero3_offload")

    def first(self, train: str, machine: Machine, most: int) -> tuple[Way, Memory] | None:
        """The first way that fits, with as many rows as fit, ``most`` at most; None if there is none."""
        for way in self.ways(train, machine.gpus):
            if not estimate.fits(self.memory(way, machine), machine):
                continue
            kept = replace(way, recomputed=False)
            if estimate.fits(self.memory(kept, machine), machine):
                way = kept
            while way.rows * 2 <= most:
                wider = replace(way, rows=way.rows * 2)
                if not estimate.fits(self.memory(wider, machine), machine):
                    break
                way = wider
            return way, self.memory(way, machine)
        return None

    def least(self, train: str, machine: Machine) -> tuple[Way, Memory]:
        """The way that takes least memory."""
        found = [(way, self.memory(way, machine)) for way in self.ways(train, machine.gpus)]
        return min(found, key=lambda one: one[1].total)


def step_rows(recipe: schema.Recipe, gpus: int) -> int:
    """Rows of lengths.physical tokens a step: STEP_ROWS, fewer where the corpus would give few steps."""
    rows = recipe.data.tokens // recipe.lengths.physical
    return max(gpus, min(STEP_ROWS, 2 ** int(math.log2(max(1, rows // FEWEST_STEPS)))))


def settings(recipe: schema.Recipe, method: str, way: Way, gpus: int) -> dict[str, Any]:
    """``train:`` of a recipe that trains so."""
    adapters = way.what != ALL
    own = Experiment.of(recipe, method).method
    rows, wide = step_rows(recipe, gpus), way.rows
    if own.fills == "target":  # a longer row takes the place of so many short ones
        many = Fraction(recipe.lengths.target, recipe.lengths.physical).numerator
        wide, count = 1, many * max(1, round(rows / gpus / many))
    else:
        count = max(1, rows // (gpus * wide))
    steps = max(1, recipe.data.tokens // (recipe.lengths.physical * gpus * wide * count))
    found: dict[str, Any] = {
        "deepspeed": None if way.zero == "none" else f"ds_configs/{way.zero}.json",
        "gradient_checkpointing": way.recomputed,
        "per_device_train_batch_size": wide,
        "gradient_accumulation_steps": count,
        "learning_rate": RATES[adapters],
        "warmup_steps": min(20, -(-steps // 10)),
    }
    lora: dict[str, Any] = {} if own.adapters is not None or not adapters else dict(LORA)
    if way.what == QUANTIZED:
        lora["quantize"] = QUANTIZED
    if lora:
        found["lora"] = lora
    if path := found["deepspeed"]:
        found["deepspeed"] = str(recipe.path(path))
    return found


def _recipe(asked: Asked, physical: int, tokens: int, kind: str | None) -> schema.Recipe:
    corpus = asked.corpus[0] if len(asked.corpus) == 1 else asked.corpus
    tree: dict[str, Any] = {
        "model": {"name_or_path": asked.model, "gguf_file": asked.gguf},
        "lengths": {"physical": physical, "target": asked.target},
        "data": {"corpus": corpus, "tokens": tokens},
        "rope": {"type": kind},
    }
    return schema.made(tree, asked.out.stem, asked.out)


def counted(recipe: schema.Recipe, tokenizer, most: int) -> int | None:
    """Tokens that the corpus holds, ``most`` where it holds as many; None for a dataset of the hub.

    Its characters are counted, and the first of them tokenized.  Raises BadInput if it cannot be read.
    """
    from endprompt.rows import corpus

    if (files := corpus.local_files(recipe)) is None:
        return None
    characters, sample, ids = 0, 0, 0
    for _, text in corpus.documents(recipe, files):
        characters += len(text)
        if sample < SAMPLE:
            text = text[: SAMPLE - sample]
            sample += len(text)
            ids += len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        elif characters * ids >= most * sample:
            break
    return min(most, characters * ids // sample) if sample else 0


def propose(asked: Asked, machine: Machine) -> Proposal:
    """Raises BadInput if the base, the corpus or the method cannot be used so, or nothing fits, saying what
    would."""
    machine.peak  # noqa: B018 (refuses)
    if asked.tokens is not None and asked.tokens < 1:
        raise BadInput(f"--tokens {asked.tokens}: give a positive number of tokens to train on")
    if asked.target < 2 or asked.target > 2**31:
        raise BadInput(f"--target {asked.target}: give the tokens of the window to reach, up to {2**31}")
    wanted = asked.tokens or TOKENS
    first = Experiment.of(_recipe(asked, 2, wanted, None), asked.method)
    if not first.method.trained:
        raise BadInput(f"--method {asked.method}: it trains nothing; endprompt evaluate scores it")
    if asked.train == ALL and first.method.adapters is not None:
        raise BadInput(f"--train all: {asked.method} trains adapters; leave it out, or take another method")
    base = first.base
    kind = _scheme(first)
    held = counted(first.recipe, base.tokenizer, wanted)
    tokens = wanted if held is None else held
    found = None
    for physical in _lengths(base.window, asked.target, first.method.fills):
        recipe = _recipe(asked, physical, tokens, kind)
        search = Search(recipe, asked.method, base.config)
        _refuse_short(search, base.tokenizer, tokens)
        if found := search.first(asked.train, machine, _most_rows(search, machine)):
            break
    if found is None:
        raise BadInput(_what_would(search, asked, machine))
    way, memory = found
    _refuse_long_step(search, way, machine, tokens)
    experiment = search.experiment(way, machine.gpus)
    if experiment.adapters:
        families.adapted(base.config, experiment.adapters.targets)  # refuses
    for checked in ("scaling", "sharpness"):  # each refuses what does not go together
        getattr(experiment, checked)
    hours = estimate.hours(experiment, base.config, machine)
    return Proposal(experiment, way, memory, machine, hours, held is not None)


def _lengths(window: int, target: int, fills: str) -> list[int]:
    """What lengths.physical may be, by preference.

    fills: the method's.  Rows of the target length leave it to count the rows of a step alone, in which as
    many as both lengths divide must fit: the longest that divides the target, if one is near.
    """
    longest = 2 ** int(math.log2(min(LONGEST_ROW, window)))
    if fills == "target":
        divisors = (length for length in range(longest, longest // 8, -1) if target % length == 0)
        return [next((length for length in divisors if length > 1), longest)]
    return [longest >> halved for halved in range(20) if longest >> halved >= min(longest, SHORTEST_ROW)]


def _refuse_long_step(search: Search, way: Way, machine: Machine, tokens: int) -> None:
    """Raises BadInput if one step takes more than the ``tokens`` of the whole training."""
    train = settings(search.recipe, search.method, way, machine.gpus)
    rows = train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * machine.gpus
    physical, target = search.recipe.lengths.physical, search.recipe.lengths.target
    if rows * physical <= tokens:
        return
    mends = ["give more text and more --tokens"]
    if machine.gpus > 1:
        mends.append("fewer --gpus")
    if Experiment.of(search.recipe, search.method).method.fills == "target" and target % physical:
        mends.append(f"a --target that {physical} divides, as {-(-target // physical) * physical}")
    raise BadInput(
        f"--corpus: {tokens} tokens are less than one step of {search.method} takes, {rows * physical};"
        f" {', or '.join(mends)}"
    )


def _scheme(experiment: Experiment) -> str | None:
    """``rope.type``: that of a base that is scaled already; None: the method's."""
    own = experiment.base.own_scheme
    return None if isinstance(own, rope.Default) or own.name == experiment.method.rope else own.name


def _most_rows(search: Search, machine: Machine) -> int:
    """Of a micro-batch.  One where rows are of the target length: they keep a GPU busy by themselves."""
    if Experiment.of(search.recipe, search.method).method.fills == "target":
        return 1
    return min(MOST_ROWS, step_rows(search.recipe, machine.gpus) // machine.gpus)


def _refuse_short(search: Search, tokenizer, tokens: int) -> None:
    """Raises BadInput if the rows cannot be made, of this tokenizer or of so few tokens."""
    found = Experiment.of(search.recipe, search.method)
    needed = found.rows(tokenizer).together * found.row_length
    if tokens < needed:
        raise BadInput(
            f"--corpus: {tokens} tokens are less than the {needed} that {search.method} takes at a time;"
            " give more text, or more --tokens"
        )


def _what_would(search: Search, asked: Asked, machine: Machine) -> str:
    """One line: what is lacking, and what would fit."""
    way, memory = search.least(asked.train, machine)
    length = Experiment.of(search.recipe, search.method).row_length
    needed = math.ceil(memory.total / estimate.USABLE / 1e9)
    what = WHAT[way.what]
    line = (
        f"--gpu-memory {machine.gpu_memory:g}: nothing fits {machine.gpus} x {machine.gpu_memory:g} GB; the"
        f" least is {memory.total / 1e9:.1f} GB a GPU ({what}, one row of {length} tokens a GPU,"
        f" {'no ZeRO file' if way.zero == 'none' else way.zero})"
    )
    mends = [f"--gpu-memory {needed}"]
    for gpus in MORE_GPUS:
        if gpus > machine.gpus and search.first(asked.train, replace(machine, gpus=gpus), 1):
            mends.append(f"--gpus {gpus}")
            break
    if asked.train == ALL and search.first(ADAPTERS, machine, 1):
        mends.append("--train lora")
    if Experiment.of(search.recipe, search.method).method.fills == "target":
        short = Search(search.recipe, RECOMMENDED, search.about)
        if short.first(asked.train, machine, 1):
            mends.append(f"--method {RECOMMENDED}, whose rows are short")
    return f"{line}; what would: {', or '.join(mends)}"
