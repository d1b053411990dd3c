"""Trains the base model of the embedded default: a small LLaMA with a 256-token window that can look things
up.

Two parts in one run of the Hugging Face Trainer.  First rows of random spans that repeat periodically:
predicting them takes an induction head and nothing else, so one forms early.  Then documents of ``corpus.py``
no longer than a row, whose facts recur within the window.  The extension corpus (seed 1) and the evaluation
are never seen here (seeds from 1000 up).

    python recipes/tiny/train_base.py --out recipes/tiny/base      # about 40 minutes on two CPU cores
"""

import argparse
import random
import shutil
import tempfile
from pathlib import Path

import sentencepiece
import torch
from corpus import document, plain_sentence
from torch.utils.data import IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer, Trainer, TrainingArguments, set_seed

WINDOW = 256


def train_tokenizer(folder: Path, vocabulary: int) -> LlamaTokenizer:
    rng = random.Random(1000)
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text(
            "\n".join([document(rng, 40) for _ in range(1500)] + [plain_sentence(rng) for _ in range(5000)])
        )
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(Path(scratch) / "tokenizer"),
            vocab_size=vocabulary,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            num_threads=1,
            max_sentence_length=65536,
            minloglevel=2,
        )
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(Path(scratch) / "tokenizer.model", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=False, add_bos_token=True, add_eos_token=False)
    tokenizer.model_max_length = WINDOW
    tokenizer.save_pretrained(folder)
    return tokenizer


class Spans:
    """Rows of random spans that come back, up to ``window`` tokens long."""

    def __init__(self, tokenizer, window: int):
        self.tokenizer, self.window = tokenizer, window
        self.digits = tokenizer.convert_tokens_to_ids(list("0123456789"))

    def span(self, rng: random.Random, length: int, longest: int) -> list[int]:
        span = [rng.randrange(3, len(self.tokenizer)) for _ in range(rng.randint(8, longest))]
        return (span * (length // len(span) + 1))[:length]

    def hard_spans(self, rng: random.Random) -> list[int]:
        row = []
        while len(row) < self.window:
            tokens = (
                self.digits
                if rng.random() < 0.5
                else [rng.randrange(3, len(self.tokenizer)) for _ in range(12)]
            )
            row += rng.choices(tokens, k=rng.randint(5, 30)) * rng.randint(2, 4)
        return row[: self.window]

    def any_spans(self, rng: random.Random) -> list[int]:
        return self.span(rng, self.window, self.window // 2) if rng.random() < 0.5 else self.hard_spans(rng)


class Rows(Spans, IterableDataset):
    """``first`` rows of repeated random spans, then mostly document rows, for ever; dictionaries of
    ``input_ids`` and ``labels``.

    The first rows are half a window long: an induction head forms within 600 steps on them.  Spans over few
    distinct tokens, where one token of context is not enough to find the place, come only afterwards: before
    it, they keep the head from forming.
    """

    def __init__(self, tokenizer, first: int, span_share: float, seed: int):
        super().__init__(tokenizer, WINDOW)
        self.first, self.span_share, self.seed = first, span_share, seed

    def documents(self, rng: random.Random) -> list[int]:
        row = []
        if rng.random() < 0.4:  # a document of nearly a window, bridged from its first sentence to its last
            for sentences in range(rng.randint(4, 11), 0, -1):
                row = self.tokenizer(document(rng, sentences, 0.16, framed=True))["input_ids"] + [
                    self.tokenizer.eos_token_id
                ]
                if len(row) <= WINDOW:
                    break
        while len(row) < WINDOW:
            row += self.tokenizer(document(rng, rng.randint(4, 12), rng.choice([0.16, 0.3, 0.6])))[
                "input_ids"
            ] + [self.tokenizer.eos_token_id]
        return row[:WINDOW]

    def __iter__(self):
        rng, count = random.Random(self.seed), 0
        while True:
            if count < self.first:
                row = self.span(rng, WINDOW // 2, 60)
            elif rng.random() < self.span_share:
                row = self.any_spans(rng)
            else:
                row = self.documents(rng)
            count += 1
            yield {"input_ids": torch.tensor(row), "labels": torch.tensor(row)}


def network(arguments, tokenizer, window: int = WINDOW, **different) -> LlamaForCausalLM:
    """different: keys of the configuration whose value here is another."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": arguments.width,
        "intermediate_size": 3 * arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": window,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | different))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--vocabulary", type=int, default=896)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=1900)
    parser.add_argument("--span-steps", type=int, default=700)
    parser.add_argument("--span-share", type=float, default=0.2, help="of the rows after the first part")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1001)
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.out, arguments.vocabulary)
    model = network(arguments, tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        training = TrainingArguments(
            output_dir=scratch,
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.rows,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=0.01,
            adam_beta2=0.98,
            max_grad_norm=1.0,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(
            model=model,
            args=training,
            train_dataset=Rows(
                tokenizer, arguments.span_steps * arguments.rows, arguments.span_share, arguments.seed
            ),
        ).train()
    model.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
