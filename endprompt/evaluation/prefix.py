"""Prompts that begin alike: the keys and values of what they share are computed once.

``Reader`` reads prompts one after another and keeps the cache of the last; a prompt that begins as the last
did is read from where the two part.  From a cache it asks many questions, each at positions of its own.
``SharedLM`` answers the harness' requests so, where enough of their tokens are shared.

Greedy answers are those of reading every prompt whole; logits differ in their last digits, for sums are made
in another order.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from endprompt.evaluation import engine

# Tokens that are read at once behind a cache: attention then has a mask of PIECE x all tokens.
PIECE = 1024
# The share of all tokens that must be saved before prompts are read one after another.
WORTH = 0.2


def common(one, other) -> int:
    """How many ids two prompts have in common from their start on."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(np.asarray(one[:size]) != np.asarray(other[:size]))
    return int(differing[0]) if len(differing) else size


def saved(prompts: list[list[int]]) -> float:
    """The share of the tokens of ``prompts`` that need not be read if each is read, in order, from where it
    parts from the one before it."""
    shared = sum(common(one, other) for one, other in zip(prompts, prompts[1:], strict=False))
    return shared / max(1, sum(map(len, prompts)))


@dataclass(frozen=True)
class Question:
    """ids: what is asked, behind what was read; answer: the ids of the right answer; start: the position of
    the first of ``ids``."""

    ids: list[int]
    answer: list[int]
    start: int


@dataclass(frozen=True)
class Reply:
    """ids: the greedy continuation, up to an end token and without it; nats: the loss of each token of the
    right answer."""

    ids: list[int]
    nats: list[float]


class Reader:
    """Reads with ``network``, whose rows may share a cache (``engine.shares_cache``).

    ends: the tokens that end an answer.  new_tokens: the most that an answer has.
    """

    def __init__(self, network, ends: list[int], new_tokens: int):
        self.network, self.ends, self.new_tokens = network, ends, new_tokens
        self.ids: list[int] = []
        self.cache = DynamicCache()

    def forget(self) -> None:
        """Lets go of what was read last."""
        self.ids, self.cache = [], DynamicCache()

    def _forward(self, ids, positions, cache, logits: int):
        """The logits [rows, logits, vocabulary] of the last of ``ids`` [rows, tokens], which stand at
        ``positions`` [rows, tokens] behind ``cache``, to which they are added.

        The mask is there, whole: without it, transformers takes a jump in positions for another text.
        """
        mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        device = self.network.device
        return self.network(
            ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits,
        ).logits

    @torch.no_grad()
    def read(self, ids: list[int]) -> DynamicCache:
        """The cache after all of ``ids`` at positions 0, 1, ...; it is good until the next call."""
        kept = common(self.ids, ids)
        if beyond := len(self.ids) - kept:
            self.cache.crop(-beyond)
        self.ids = ids[:kept]
        if not kept:
            self.cache = DynamicCache()
        step = PIECE if kept else max(1, len(ids))  # a whole prompt has no mask to make
        for at in range(kept, len(ids), step):
            piece = torch.tensor([ids[at : at + step]])
            self._forward(piece, torch.arange(at, at + piece.shape[1])[None], self.cache, 1)
            self.ids = ids[: at + piece.shape[1]]
        return self.cache

    def ask(self, ids: list[int], questions: list[Question]) -> list[Reply]:
        """The replies to ``questions``, each asked by itself behind ``ids``; questions of equal lengths are
        asked together, so that nothing is padded."""
        cache = self.read(ids)
        groups: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            groups[len(question.ids), len(question.answer)].append(number)
        found: dict[int, Reply] = {}
        for (asked, answered), numbers in groups.items():
            rows = max(1, engine.TOKENS_AT_ONCE // (len(ids) + asked + max(answered, self.new_tokens)))
            for at in range(0, len(numbers), rows):
                chosen = numbers[at : at + rows]
                replies = self._together(cache, [questions[number] for number in chosen])
                found |= dict(zip(chosen, replies, strict=True))
        return [found[number] for number in range(len(questions))]

    @torch.no_grad()
    def _together(self, cache: DynamicCache, questions: list[Question]) -> list[Reply]:
        """The replies to questions of equal lengths, asked behind copies of ``cache``."""
        asked, answered = len(questions[0].ids), len(questions[0].answer)
        own = copies(cache, len(questions))
        ids = torch.tensor([[*question.ids, *question.answer] for question in questions])
        starts = torch.tensor([[question.start] for question in questions])
        logits = self._forward(ids, starts + torch.arange(ids.shape[1]), own, answered + 1).float().cpu()
        nats = torch.nn.functional.cross_entropy(
            logits[:, :-1].transpose(1, 2), ids[:, asked:], reduction="none"
        )
        own.crop(-answered)
        chosen = [logits[:, 0].argmax(-1)]
        while len(chosen) < self.new_tokens:
            if all(self._ended(row) for row in torch.stack(chosen, 1).tolist()):
                break
            last = chosen[-1][:, None]
            logits = self._forward(last, starts + asked + len(chosen) - 1, own, 1)
            chosen.append(logits[:, -1].float().cpu().argmax(-1))
        continued = torch.stack(chosen, 1).tolist()
        return [Reply(self._cut(row), loss) for row, loss in zip(continued, nats.tolist(), strict=True)]

    def _ended(self, ids: list[int]) -> bool:
        return any(token in self.ends for token in ids)

    def _cut(self, ids: list[int]) -> list[int]:
        return next((ids[:at] for at, token in enumerate(ids) if token in self.ends), ids)


def copies(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of ``rows`` rows that are all the one row of ``cache``."""
    found = DynamicCache()
    for number, layer in enumerate(cache.layers):
        found.update(layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1), number)
    return found


class SharedLM(engine.LongLM):
    """``LongLM`` that reads what prompts of one call of ``generate_until`` share once, if that saves at least
    the share WORTH of their tokens."""

    def __init__(self, network, tokenizer):
        super().__init__(network, tokenizer)
        self.reader = Reader(network, engine.ends(network.generation_config, tokenizer), 1)
        self.prompts: list[list[int]] = []  # of the call that is being answered, where they share enough

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        before = self.cached_tokens
        if engine.shares_cache(self.model):
            prompts = [self.tok_encode(request.args[0]) for request in requests]
            if saved(sorted(prompts)) >= WORTH:
                self.prompts, self.cached_tokens = prompts, before or engine.TOKENS_AT_ONCE
        try:
            return super().generate_until(requests, disable_tqdm)
        finally:
            self.prompts, self.cached_tokens = [], before
            self.reader.forget()

    def _batches(self, groups: dict[int, list[int]]) -> list[tuple[int, list[int]]]:
        """As of ``LongLM``; prompts that begin alike stand side by side."""
        if not self.prompts:
            return super()._batches(groups)
        found: list[tuple[int, list[int]]] = []
        for index in sorted(range(len(self.prompts)), key=self.prompts.__getitem__):
            length = max(len(self.prompts[index]), found[-1][0] if found else 0)
            if not found or (len(found[-1][1]) + 1) * length > self.cached_tokens:
                found.append((len(self.prompts[index]), [index]))
            else:
                found[-1] = length, [*found[-1][1], index]
        return found

    @torch.no_grad()
    def _read(self, ids, mask):
        """As of ``LongLM``, each row from where it parts from the one read before it."""
        if not self.prompts:
            return super()._read(ids, mask)
        rows = [row[start:-1] for row, start in zip(ids.tolist(), (mask == 0).sum(1).tolist(), strict=True)]
        tokens, layers = ids.shape[1] - 1, list[list[torch.Tensor]]()
        for number in sorted(range(len(rows)), key=rows.__getitem__):
            if not rows[number]:
                continue
            cache = self.reader.read(rows[number])
            if not layers:
                layers = [
                    [
                        part.new_zeros(len(rows), part.shape[1], tokens, part.shape[3])
                        for part in (layer.keys, layer.values)
                    ]
                    for layer in cache.layers
                ]
            for whole, layer in zip(layers, cache.layers, strict=True):
                for into, part in zip(whole, (layer.keys, layer.values), strict=True):
                    into[number, :, -len(rows[number]) :] = part[0]
        found = DynamicCache()
        for number in range(len(layers)):
            found.update(*layers.pop(0), number)
        return found
