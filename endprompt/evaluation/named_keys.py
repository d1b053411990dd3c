"""Named keys: some keys at depths of one real haystack, each asked for in turn after the haystack was read
once.

What passkey measures, at a fraction of its cost: a prompt's first tokens are all but the last few, and they
are the same for every question.  Beside the greedy answer, which is right or not, each question gives the
loss of the right answer's digits, which tells models apart where none finds keys, or all do.
"""

import random

from endprompt.evaluation import haystacks, intervals, passkey, prefix
from endprompt.evaluation.haystacks import Asked, Design, Haystack


def haystack(tokenizer, length: int, design: Design, number: int) -> Haystack:
    """Haystack ``number`` of prompts up to ``length`` tokens, with what is asked about it: the last has all
    keys as well, where not all are asked for.  Raises ValueError if that is too short.
    """
    rng = random.Random(f"named_keys/{design.seed}/{length}/{number}")
    keys = haystacks.draw(rng, haystacks.spread(design, number))
    found = haystacks.build(tokenizer, length, keys, design.chat)
    return haystacks.Haystack(found.ids, found.asked[: design.asked(number)])


def documents(tokenizer, lengths: list[int], design: Design) -> list[dict]:
    """All questions as the harness asks them, one by one: {"prompt", "key", "name", "depth", "haystack" (its
    number), "length", "prompt_tokens"}.  Raises ValueError if a length is too short.
    """
    return [
        {
            "prompt": asked.prompt,
            **about(asked, number),
            "length": length,
            "prompt_tokens": len(found.ids) + len(asked.ids),
        }
        for length in lengths
        for number in range(design.haystacks)
        for found in [haystack(tokenizer, length, design, number)]
        for asked in found.asked
    ]


def about(asked: Asked, number: int) -> dict:
    """What a prediction says of its question."""
    return {
        "key": asked.key.key,
        "name": asked.key.name,
        "depth": asked.key.depth,
        "haystack": number,
    }


def answered(reply: prefix.Reply, asked: Asked, tokenizer) -> dict:
    """What a prediction says of its answer: the text, and the loss in nats of the key's ``tokens``."""
    nats = [loss for loss, digit in zip(reply.nats, asked.digits, strict=True) if digit]
    return {
        "pred": tokenizer.decode(reply.ids, skip_special_tokens=True),
        "nats": sum(nats) / len(nats),
        "tokens": len(nats),
    }


def loss(rows: list[dict]) -> dict:
    """{"nats" a token of the key, "nats_low", "nats_high"} of predictions, by a bootstrap over them."""
    values, weights = [row["nats"] for row in rows], [row["tokens"] for row in rows]
    mean = sum(map(lambda value, weight: value * weight, values, weights)) / sum(weights)
    low, high = intervals.bootstrap(values, weights)
    return {"nats": mean, "nats_low": low, "nats_high": high}


class NamedKeys:
    """The task at one length, a haystack a piece (``progress.Pieces``)."""

    noun = "haystacks"

    def __init__(self, reader: prefix.Reader, tokenizer, design: Design, length: int):
        self.reader, self.tokenizer, self.design, self.length = reader, tokenizer, design, length
        self.total = design.haystacks

    def rows(self, number: int) -> list[dict]:
        found = haystack(self.tokenizer, self.length, self.design, number)
        start = len(found.ids)
        questions = [prefix.Question(asked.ids, asked.answer, start) for asked in found.asked]
        replies = self.reader.ask(found.ids, questions)
        self.reader.forget()
        return [
            {
                **about(asked, number),
                **answered(reply, asked, self.tokenizer),
                "prompt_tokens": start + len(asked.ids),
            }
            for asked, reply in zip(found.asked, replies, strict=True)
        ]

    def summary(self, rows: list[dict]) -> dict:
        """As passkey's, with the number of haystacks, and the loss of all and of each depth."""
        scores = [100.0 * passkey.correct(row["pred"], row["key"]) for row in rows]
        found = passkey.summary(rows, scores)
        for cell in found["cells"]:
            cell |= loss([row for row in rows if row["depth"] == cell["depth"]])
        return found | loss(rows) | {"haystacks": self.total}

    def predictions(self, rows: list[dict]) -> list[dict]:
        return [{key: value for key, value in row.items() if key != "prompt_tokens"} for row in rows]
