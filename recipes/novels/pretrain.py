"""Pretrains the second base of the laboratory: a small LLaMA with a window of 512 tokens, on natural English.

As ``recipes/tiny/train_base.py``, in one run of the Hugging Face Trainer: first rows of random spans that
repeat, on which an induction head forms, then rows of the text with facts planted between its sentences,
which come back within the row.  A tenth of what is read is planted.  Every sixth document is kept from
pretraining: most of them become the text of the extension, with facts that come back up to 4096 tokens later,
and three are held out as they are, for perplexity.

    python recipes/novels/pretrain.py --text TEXT [TEXT ...] --out runs/novels     # 100 minutes of one core

writes ``base/``, ``corpus.jsonl.gz`` and ``heldout.jsonl.gz`` into ``--out``, which recipes/novels-cpu.yaml
reads.  TEXT: what ``data.corpus`` takes, documents of at least some 20,000 characters, 40 million in all for
the steps below.  A killed run goes on from its last checkpoint with the same command.

Depth, width and rate decide whether an induction head forms: three layers of width 192 have one after 800
steps, four layers had none after 1050.  A training in which none has formed is ended after ``--span-steps``.
"""

import argparse
import bisect
import gzip
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments, set_seed

from endprompt import BadInput, storage
from endprompt.rows import corpus as reading

sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
# What the tiny laboratory plants, and how it begins.
from corpus import COMMON, new_fact
from train_base import Spans, network

WINDOW, TARGET = 512, 4096
KEPT, HELD_OUT = 6, 3  # every sixth document is not for pretraining; three of those are for perplexity
SHARE = 0.1  # planted, of all characters
FACT = 125  # characters that a fact takes, all its statements together
TOKENIZER_CHARACTERS = 12_000_000
REPEAT = 32  # tokens of the longest span on which it is tested that repeats are foretold
WRAPPED = re.compile(r"(?<!\n)\n(?!\n)")  # the end of a line inside a paragraph
SENTENCE = re.compile(r"[.!?][\"'\u201d\u2019]?\s+")


def documents(sources: list[str], column: str) -> list[str]:
    """The texts of ``sources``.  Raises BadInput if they cannot be read, or are too few."""
    data = SimpleNamespace(corpus=sources, text_column=column, split="train")
    reader = SimpleNamespace(data=data, path=lambda value: Path(value) if Path(value).exists() else None)
    try:
        there = reading.documents(reader, reading.local_files(reader))
        found = [WRAPPED.sub(" ", text) for _, text in there]
    except BadInput as error:
        raise BadInput(str(error).replace("data.corpus", "--text").replace("data.text_", "--text-")) from None
    if len(found) < KEPT * (HELD_OUT + 1):
        raise BadInput(
            f"--text: {len(found)} documents are too few, as every {KEPT}th is kept from pretraining and"
            f" {HELD_OUT} of those are held out; give at least {KEPT * (HELD_OUT + 1)}"
        )
    return found


def planted(rng: random.Random, text: str, share: float, far: float, taken: set) -> str:
    """``text`` with facts between its sentences, ``share`` of its characters; each is stated again, up to
    ``far`` characters later.  Keys in ``taken`` are not used, and those used are added."""
    cuts = [match.end() for match in SENTENCE.finditer(text)]
    count = share * len(text) / FACT
    count = int(count) + (rng.random() < count % 1)
    if not cuts or not count:
        return text
    added: dict[int, list[str]] = {}
    for _ in range(count):
        place = rng.randrange(len(cuts))
        if rng.random() < 0.1:  # passkey's filler, as long as a fact
            added.setdefault(place, []).append(COMMON[0])
            continue
        fact = new_fact(rng, taken)
        added.setdefault(place, []).append(fact())
        for _ in range(rng.choice([1, 1, 2, 3])):
            later = cuts[place] + math.exp(rng.uniform(math.log(60), math.log(max(61, far))))
            place = bisect.bisect_left(cuts, later)
            if place >= len(cuts):
                place = rng.randrange(len(cuts))
            added.setdefault(place, []).append(fact())
    parts, start = [], 0
    for place in sorted(added):
        parts += [text[start : cuts[place]], *(f"{sentence} " for sentence in added[place])]
        start = cuts[place]
    return "".join([*parts, text[start:]])


def story(rng: random.Random, text: str, far: float) -> str:
    """A whole document with facts: a name's key is used once in two neighbouring stretches of 2 ``far``."""
    size, before, parts = int(2 * far), set[object](), []
    for start in range(0, len(text), size):
        taken = set(before)
        parts.append(planted(rng, text[start : start + size], SHARE, far, taken))
        before = taken - before
    return "".join(parts)


def write(path: Path, texts: list[str]) -> None:
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        for number, text in enumerate(texts):
            row = {"id": f"{path.name.partition('.')[0]}-{number:04d}", "text": text}
            packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def train_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as Llama-3's is, with a token for each digit, as Llama-2's has."""
    rng, left, sample = random.Random(0), TOKENIZER_CHARACTERS, []
    for text in rng.sample(texts, len(texts)):
        sample += [planted(rng, text[:left][:200_000], SHARE, 2000, set())]
        left -= len(sample[-1])
        if left <= 0:
            break
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


class Rows(Spans, Dataset):
    """``first`` rows of repeated spans, then mostly rows of the text with facts, ``count`` in all;
    dictionaries of ``input_ids`` and ``labels``.  Row i depends on the seed and i alone.

    The first rows are a quarter of the window long: an induction head forms on them, at a quarter of the cost
    of whole ones.

    rate: characters of a token.
    """

    def __init__(self, tokenizer, texts: list[str], rate: float, count: int, arguments):
        super().__init__(tokenizer, WINDOW)
        self.texts, self.rate, self.count, self.seed = texts, rate, count, arguments.seed
        self.first, self.span_share = arguments.span_steps * arguments.rows, arguments.span_share
        self.weights = [len(text) for text in texts]

    def __len__(self) -> int:
        return self.count

    def piece(self, rng: random.Random) -> str:
        """A stretch from all over the texts that fills a row with its facts, rather densely in some."""
        share, size = rng.choice([0, 0, SHARE, 3 * SHARE]), int(1.02 * self.rate * WINDOW)
        text = rng.choices(self.texts, self.weights)[0]
        start = rng.randrange(max(1, len(text) - size))
        return planted(rng, text[start : start + int(size / (1 + share))], share, size, set())

    def text(self, rng: random.Random) -> list[int]:
        row: list[int] = []
        while len(row) < WINDOW:
            row += [*self.tokenizer(self.piece(rng), verbose=False)["input_ids"], self.tokenizer.eos_token_id]
        return row[:WINDOW]

    def __getitem__(self, number: int) -> dict:
        rng = random.Random(f"{self.seed}/{number}")
        if number < self.first:
            row = self.span(rng, WINDOW // 4, 60)
        elif rng.random() < self.span_share:
            row = self.any_spans(rng)
        else:
            row = self.text(rng)
        return {"input_ids": torch.tensor(row), "labels": torch.tensor(row)}


class Copies(TrainerCallback):
    """Ends the training after its first part if repeats cost ``share`` of what guessing costs, or more: no
    induction head has formed then, and the base would find no key.
    """

    def __init__(self, rows: Rows, step: int, share: float):
        self.rows, self.step, self.share = rows, step, share

    def on_step_end(self, args, state, control, model=None, **more):
        if state.global_step != self.step or self.share >= 1:
            return
        rng = random.Random("copies")
        found = repeats(model, torch.tensor([self.rows.span(rng, 2 * REPEAT, REPEAT) for _ in range(32)]))
        chance = math.log(len(self.rows.tokenizer))
        print(f"step {self.step}: repeats cost {found:.2f} nats a token, guessing {chance:.2f}", flush=True)
        if found > self.share * chance:
            raise BadInput(
                f"--span-steps: no induction head has formed in {self.step} steps (repeats cost {found:.2f}"
                f" nats a token, guessing {chance:.2f}), so this base would find no key; give more steps, and"
                " another --out"
            )


@torch.no_grad()
def repeats(model, ids: torch.Tensor) -> float:
    """The mean loss, in nats, of the second half of ``ids`` [rows, 2 * REPEAT], spans that come back."""
    logits = model(ids.to(model.device)).logits[:, REPEAT - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).cpu(), ids[:, REPEAT:].flatten()))


class Said(TrainerCallback):
    """A line for every log: the step, its loss, and the time left."""

    def __init__(self):
        self.start: tuple[int, float] | None = None

    def on_step_begin(self, args, state, control, **more):
        self.start = self.start or (state.global_step, time.monotonic())

    def on_log(self, args, state, control, logs=None, **more):
        if "loss" not in (logs or {}) or self.start is None or state.global_step == self.start[0]:
            return
        each = (time.monotonic() - self.start[1]) / (state.global_step - self.start[0])
        left = int(each * (state.max_steps - state.global_step))
        print(
            f"step {state.global_step}/{state.max_steps}  loss {float(logs['loss']):.3f}  {each:.2f} s a step"
            f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            flush=True,
        )


def last_checkpoint(folder: Path) -> str | None:
    """The last one that is whole; the Trainer writes its state last.  What a kill left half is removed."""
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            storage.read_json(path / "trainer_state.json")
            found.append(path)
        except (OSError, ValueError):
            shutil.rmtree(path)
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def train(arguments, tokenizer, texts: list[str], rate: float) -> None:
    set_seed(arguments.seed)
    wide = arguments.feed_forward
    model = network(arguments, tokenizer, WINDOW, intermediate_size=wide, tie_word_embeddings=True)
    print(f"{sum(one.numel() for one in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    checkpoints = arguments.out / "checkpoints"
    training = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.rows,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        logging_steps=20,
        save_steps=arguments.save_steps,
        save_total_limit=2,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=arguments.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    rows = Rows(tokenizer, texts, rate, arguments.steps * arguments.rows, arguments)
    copies = Copies(rows, arguments.span_steps, arguments.copied)
    trainer = Trainer(model=model, args=training, train_dataset=rows, callbacks=[Said(), copies])
    trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    model.save_pretrained(arguments.out / "base.part")
    tokenizer.save_pretrained(arguments.out / "base.part")
    (arguments.out / "base.part").rename(arguments.out / "base")
    shutil.rmtree(checkpoints)


def refuse_others(arguments, texts: list[str]) -> None:
    """Raises BadInput if ``--out`` was begun with other text or other options, and notes these."""
    asked = {key: value for key, value in vars(arguments).items() if key not in ("out", "text", "save_steps")}
    asked |= {"documents": len(texts), "characters": sum(map(len, texts))}
    path = arguments.out / "pretrain.json"
    if path.exists() and (begun := storage.read_json(path)) != asked:
        differing = [key for key in asked if begun.get(key) != asked[key]]
        raise BadInput(
            f"--out: {arguments.out} was begun with another {', '.join(differing)}; delete it, or choose"
            " another --out"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, asked)


def run(arguments) -> None:
    texts = documents(arguments.text, arguments.text_column)
    refuse_others(arguments, texts)
    if (arguments.out / "base").exists():
        print(f"{arguments.out / 'base'} is there already; nothing to train")
        return
    kept, read = texts[KEPT - 1 :: KEPT], [text for number, text in enumerate(texts, 1) if number % KEPT]
    tokenizer = train_tokenizer(arguments.out / "tokenizer", read, arguments.vocabulary)
    sample = read[0][:100_000]
    rate = len(sample) / len(tokenizer(sample, verbose=False)["input_ids"])
    rng = random.Random(arguments.seed)
    write(arguments.out / "heldout.jsonl.gz", kept[:HELD_OUT])
    extension = [story(rng, text, rate * TARGET) for text in kept[HELD_OUT:]]
    write(arguments.out / "corpus.jsonl.gz", extension)
    added = sum(map(len, extension)) / sum(map(len, kept[HELD_OUT:])) - 1
    print(
        f"{len(read)} documents to pretrain on, {len(extension)} to extend on ({added:.0%} planted),"
        f" {HELD_OUT} held out; {rate:.2f} characters a token",
        flush=True,
    )
    train(arguments, tokenizer, read, rate)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--out", type=Path, default=Path("runs/novels"))
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=192, help="a multiple of 8; there are 4 heads")
    parser.add_argument(
        "--feed-forward", type=int, default=1024, help="the width between a layer's two products"
    )
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--span-steps", type=int, default=900)
    parser.add_argument("--span-share", type=float, default=0.1, help="of the rows after the first part")
    parser.add_argument(
        "--copied",
        type=float,
        default=0.5,
        help="the share of guessing's loss that repeats must cost less than after the first part; 1: any",
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--save-steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1001)
    try:
        run(parser.parse_args())
    except BadInput as error:
        print(f"pretrain.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
