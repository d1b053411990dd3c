"""Prompts that begin alike: the keys and values of what they share are computed once.

``Reader`` reads prompts one after another and keeps the cache of the last; a prompt that begins as the last
did is read from where the two part.  From a cache it asks many questions, each at positions of its own.
``SharedLM`` answers the harness' requests so, where enough of their tokens are shared.

Greedy answers are those of reading every prompt whole; logits differ in their last digits, for sums are made
in another order.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from endprompt.evaluation import engine

# Tokens that are read at once behind a cache: attention then has a mask of PIECE x all tokens.
PIECE = 1024
# Elements of the mask of questions that are asked together: half a GiB in float32.
MASK = 2**27
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
        mask = torch.ones(len(ids), cache.get_seq_length() + ids.shape[1], dtype=torch.long, device="cpu")
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
            piece = torch.tensor([ids[at : at + step]], device="cpu")
            positions = torch.arange(at, at + piece.shape[1], device="cpu")
            self._forward(piece, positions[None], self.cache, 1)
            self.ids = ids[: at + piece.shape[1]]
        return self.cache

    def ask(self, ids: list[int], questions: list[Question]) -> list[Reply]:
        """The replies to ``questions``, each asked by itself behind ``ids``.

        They stand in one row, under a mask that shows each of them what was read and itself: copies of the
        cache would be read and written again for every token of an answer.
        """
        self.read(ids)
        found: list[Reply] = []
        with _masked(self.network):
            for chosen in _shares(questions, len(ids), self.new_tokens):
                found += self._together(chosen)
                self.cache.crop(-(self.cache.get_seq_length() - len(ids)))
        return found

    @torch.no_grad()
    def _together(self, questions: list[Question]) -> list[Reply]:
        """The replies to questions that are read as one row; their tokens are left in the cache."""
        host = torch.device("cpu")  # the network's inputs are made there
        rows = [torch.tensor([*question.ids, *question.answer], device=host) for question in questions]
        sizes = torch.tensor([len(row) for row in rows], device=host)
        each = torch.arange(len(rows), device=host)
        own = torch.repeat_interleave(each, sizes)
        places = torch.cat([torch.arange(len(row), device=host) for row in rows])
        starts = torch.tensor([question.start for question in questions], device=host)
        # A token sees its question up to itself; no answer is seen by what is generated.
        inside = (own[:, None] == own) & (places[:, None] >= places)
        asked = torch.tensor([len(question.ids) for question in questions], device=host)
        predicts = places >= asked[own] - 1
        logits = self._step(torch.cat(rows), starts[own] + places, inside, predicts.nonzero()[:, 0])
        split = logits.split([len(question.answer) + 1 for question in questions])
        nats = [
            torch.nn.functional.cross_entropy(some[:-1], row[len(question.ids) :], reduction="none")
            for some, row, question in zip(split, rows, questions, strict=True)
        ]
        chosen = torch.stack([some[0].argmax(-1) for some in split])[:, None]
        sees = (each[:, None] == own) & (places < asked[own])
        same = torch.eye(len(rows), dtype=torch.bool, device=host)
        while chosen.shape[1] < self.new_tokens and not all(map(self._ended, chosen.tolist())):
            sees = torch.cat([sees, same], 1)
            at = starts + asked + chosen.shape[1] - 1
            logits = self._step(chosen[:, -1], at, sees, each)
            chosen = torch.cat([chosen, logits.argmax(-1)[:, None]], 1)
        return [Reply(self._cut(row), loss.tolist()) for row, loss in zip(chosen.tolist(), nats, strict=True)]

    def _step(self, ids, positions, sees, wanted):
        """The logits [wanted, vocabulary] of ``ids`` [tokens] at ``positions`` [tokens], which are added to
        the cache.

        sees: bool [tokens, keys]: of the last keys in the cache, their own among them, which each sees; what
        is before them all do.  wanted: which of ``ids``.
        """
        device, dtype = self.network.device, self.network.dtype
        before = self.cache.get_seq_length() + len(ids) - sees.shape[1]
        hidden = torch.zeros(len(ids), before + sees.shape[1], dtype=dtype, device="cpu")
        hidden[:, before:].masked_fill_(~sees, torch.finfo(dtype).min)
        found = self.network(
            ids[None].to(device),
            attention_mask=hidden[None, None].to(device),
            position_ids=positions[None].to(device),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=wanted.to(device),
        )
        return found.logits[0].float().cpu()

    def _ended(self, ids: list[int]) -> bool:
        return any(token in self.ends for token in ids)

    def _cut(self, ids: list[int]) -> list[int]:
        return next((ids[:at] for at, token in enumerate(ids) if token in self.ends), ids)


def _shares(questions: list[Question], read: int, new_tokens: int) -> Iterator[list[Question]]:
    """``questions`` in parts whose masks behind ``read`` tokens have at most MASK elements."""
    part: list[Question] = []
    tokens = 0
    for question in questions:
        size = len(question.ids) + len(question.answer) + new_tokens
        if part and (tokens + size) * (read + tokens + size) > MASK:
            yield part
            part, tokens = [], 0
        part.append(question)
        tokens += size
    if part:
        yield part


@contextlib.contextmanager
def _masked(network) -> Iterator[None]:
    """Inside, ``network`` takes a mask of any form, which FlashAttention does not."""
    before = network.config._attn_implementation
    if before in ("sdpa", "eager"):
        yield
        return
    network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


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
