"""The fast tokenizer beside the exact one: the same ids on real text and on noise, or a stop."""

import builtins
import random

import numpy as np
import pytest
from conftest import REPOSITORY
from test_tokenizers import from_sentencepiece, llama3, source
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from endprompt import Failure, corpus, tokenizing
from endprompt.tokenizing import Encoder

NOVELS = REPOSITORY.parent / "shared/data/text/novels.heldout.jsonl.zst"
PIECES = ["  ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "a", "É", "e\u0301", "中", "🙂", "👨\u200d👩\u200d👧", "<|endoftext|>", "</s>", "<s>", "<|end_of_text|>", "don't",
          "I'LL", "  x", "1234567", "ﬁ", "\u200b", "_", "İ", "ß", "\u212a", "ſ", "١٢", "\ue000", "The", " the", "\x7f", "-", "...", "\ufffd", "\u0131"]


@pytest.fixture(scope="module")
def noise() -> list[str]:
    rng = random.Random(0)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(60))) for _ in range(1500)]
    for low, high in ((1, 0x250), (1, 0x3000), (1, 0xD800), (0xE000, 0x110000)):
        texts += ["".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(40))) for _ in range(500)]
    return texts


@pytest.fixture(scope="module", params=["llama2", "mistral", "llama3"])
def definition(request) -> str:
    make = llama3 if request.param == "llama3" else from_sentencepiece
    return make(source(request.param)).backend_tokenizer.to_str()


def exact(definition: str, special_tokens: bool = True, split: bool = False) -> Encoder:
    encoder = Encoder(definition, special_tokens, split)
    encoder._fast = None
    return encoder


def few_bytes() -> str:
    """A byte-level tokenizer whose vocabulary lacks most control characters, as SmolLM2's does."""
    letters = bytes_to_unicode()
    tokens = [letters[byte] for byte in range(256) if byte >= 32 or byte in b"\n\t"]
    made = Tokenizer(BPE({token: i for i, token in enumerate([*tokens, "he", "Ġhe"])}, [("h", "e"), ("Ġ", "he")]))
    made.add_special_tokens([AddedToken("<end>", normalized=False)])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made.to_str()


@pytest.mark.parametrize("special_tokens, split", [(True, False), (False, True)])
def test_the_same_ids_on_noise(definition, noise, special_tokens, split):
    fast, slow = Encoder(definition, special_tokens, split), exact(definition, special_tokens, split)
    assert fast.fast and not slow.fast
    for one, other, text in zip(fast(noise), slow(noise), noise, strict=True):
        assert one.dtype == other.dtype == np.int32 and np.array_equal(one, other), repr(text)


def test_the_same_ids_on_novels(definition):
    if not NOVELS.exists():
        pytest.skip(f"{NOVELS} is not on this machine")
    texts = [row["text"][:300_000] for number, (_, row) in zip(range(3), corpus.jsonl(NOVELS), strict=False)]
    for one, other in zip(Encoder(definition)(texts), exact(definition)(texts), strict=True):
        assert len(one) > 50_000 and np.array_equal(one, other)


def test_a_byte_without_a_token_is_left_out_as_tokenizers_does(noise):
    definition = few_bytes()
    encoder = Encoder(definition)
    with pytest.raises(ValueError, match="no token in vocabulary"):
        encoder._fast.encode_batch_flat(["\x13 he"])
    texts = ["he", "\x13 he", "", "a\x01b<end>", *noise]
    assert encoder.fast and len(encoder(["\x13"])[0]) == 0
    for one, other in zip(encoder(texts), exact(definition)(texts), strict=True):
        assert one.tolist() == other.tolist()


def test_what_fastokens_does_not_know_is_left_to_tokenizers(tokenizer):
    encoder = Encoder(tokenizer.backend_tokenizer.to_str())
    assert not encoder.fast  # the tiny base's has a Metaspace
    text = "This is the end of text"
    assert encoder([text])[0].tolist() == tokenizer(text)["input_ids"] and encoder([]) == []


def test_without_fastokens(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "fastokens":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    encoder = Encoder(few_bytes())
    assert not encoder.fast and len(encoder(["he he"])[0]) == 2


def test_a_difference_is_not_written(monkeypatch):
    """Ids that differ anywhere in the text are met, as the piece that is compared moves on from batch to batch."""
    encoder = Encoder(few_bytes())
    text = "he " * 2000
    encoder([text])
    quickly = encoder._quickly
    monkeypatch.setattr(encoder, "_quickly", lambda texts: [ids[:-1] if "!" in text else ids for ids, text in zip(quickly(texts), texts, strict=True)])
    encoder([text])
    wrong = text[:4000] + "!" + text[4000:]
    with pytest.raises(Failure, match=r"fastokens writes other ids than tokenizers for the text .* uninstall fastokens"):
        for _ in range(40):
            encoder([wrong])


def test_a_corpus_by_either_is_the_same(monkeypatch, tiny_text):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(few_bytes()), eos_token="<end>")
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 3000)
    documents = [*((str(number), text) for number, text in enumerate(tiny_text)), ("ended", "he<end>"), ("control", "\x13"), ("last", "he")]
    found = list(tokenizing.tokenized(documents, tokenizer, 2))
    monkeypatch.setattr(Encoder, "_load_fast", lambda self: None)
    for workers in (1, 2):
        for (name, ids), (other, same) in zip(found, tokenizing.tokenized(documents, tokenizer, workers), strict=True):
            assert name == other and ids.dtype == np.int32 and ids.tolist() == same.tolist()
    assert [ids.tolist().count(tokenizer.eos_token_id) for _, ids in found] == [1] * len(documents) and len(found[-2][1]) == 1
