"""The fast tokenizer beside the exact one: the same ids on real text and on noise, or a stop."""

import builtins
import json
import random
import re

import numpy as np
import pytest
from conftest import REPOSITORY
from test_tokenizers import LLAMA3_PATTERN, from_sentencepiece, llama3, source
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from endprompt import Failure
from endprompt.rows import corpus, tokenizing
from endprompt.rows.tokenizing import Encoder

NOVELS = REPOSITORY.parent / "shared/data/text/novels.heldout.jsonl.zst"
PIECES = [
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "a",
    "É",
    "e\u0301",
    "中",
    "🙂",
    "👨\u200d👩\u200d👧",
    "<|endoftext|>",
    "</s>",
    "<s>",
    "<|end_of_text|>",
    "don't",
    "I'LL",
    "  x",
    "1234567",
    "ﬁ",
    "\u200b",
    "_",
    "İ",
    "ß",
    "\u212a",
    "ſ",
    "١٢",
    "\ue000",
    "The",
    " the",
    "\x7f",
    "-",
    "...",
    "\ufffd",
    "\u0131",
]


@pytest.fixture(scope="module")
def noise() -> list[str]:
    rng = random.Random(0)
    texts = ["".join(rng.choice(PIECES) for _ in range(rng.randrange(60))) for _ in range(1500)]
    for low, high in ((1, 0x250), (1, 0x3000), (1, 0xD800), (0xE000, 0x110000)):
        texts += [
            "".join(chr(rng.randrange(low, high)) for _ in range(rng.randrange(40))) for _ in range(500)
        ]
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
    made = Tokenizer(
        BPE({token: i for i, token in enumerate([*tokens, "he", "Ġhe"])}, [("h", "e"), ("Ġ", "he")])
    )
    made.add_special_tokens([AddedToken("<end>", normalized=False)])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return made.to_str()


@pytest.mark.parametrize(
    "special_tokens, split", [pytest.param(True, False, marks=pytest.mark.slow), (False, True)]
)
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


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LITERALS = [
    *BYTES[::50],
    "<0x41>",
    "<0x0a>",
    "<0x",
    "<",
    ">",
    "0x41>",
    "▁",
    "▁the",
    "qqzz",
    " qqzz",
    "town hall",
    "[unused1]",
    "<tok>",
    " <tok> ",
    "x<tok>y",
    "Ġthe",
    "\0",
    "<unk>",
    "q",
    "z",
]


def bytes_at_last(
    letters=40, fallback=True, bytes_=BYTES, unk="<unk>", entries=(), pre_tokenizer=None, lower=False, **added
) -> str:
    """A tokenizer in the manner of Llama-2's, with the ``letters`` most frequent ones and ``entries`` that no
    merges lead to.
    """
    made = Tokenizer(BPE(unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), *spaces] if lower else spaces)
    text = (REPOSITORY / "LICENSE").read_text()
    made.train_from_iterator(
        [text[at : at + 100] for at in range(0, len(text), 100)],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<unk>", "<s>", "</s>", *bytes_],
            limit_alphabet=letters,
            max_token_length=9,
            show_progress=False,
        ),
    )
    if added:
        made.add_tokens([AddedToken("<tok>", **added)])
    tree = json.loads(made.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] not in bytes_]
    tree["model"] |= {"byte_fallback": fallback, "fuse_unk": True, "unk_token": unk}
    tree["model"]["vocab"] |= {entry: made.get_vocab_size() + number for number, entry in enumerate(entries)}
    tree["pre_tokenizer"] = pre_tokenizer
    return json.dumps(tree)


def byte_level(pattern=None, normalizer=None, entries=(), drop=(), **model) -> str:
    """A tokenizer in the manner of GPT-2's, or with the pattern of Llama-3 or Qwen2, without the letters of
    the bytes ``drop``.
    """
    made = Tokenizer(BPE())
    made.pre_tokenizer = (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
        if pattern
        else pre_tokenizers.ByteLevel(False)
    )
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator(
        [(REPOSITORY / "LICENSE").read_text()],
        trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tree, letters = json.loads(made.to_str()), bytes_to_unicode()
    kept = [token for token in tree["model"]["vocab"] if not any(letters[byte] in token for byte in drop)]
    tree["model"] |= {
        "vocab": {token: number for number, token in enumerate([*kept, *entries])},
        **model,
        "merges": [pair for pair in tree["model"]["merges"] if "".join(pair) in kept],
    }
    return json.dumps(tree)


CERTAIN = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA3_PATTERN, ignore_merges=True),
    "qwen2": lambda: byte_level(LLAMA3_PATTERN.replace("{1,3}", ""), normalizers.NFC()),
    "gpt2 with unmerged entries": lambda: byte_level(entries=["qqzz", "Ġzqq", *BYTES]),
    "gpt2 with unmerged entries, looked up": lambda: byte_level(entries=["qqzz", "Ġzqq"], ignore_merges=True),
    "gpt2 without some bytes": lambda: byte_level(entries=["qqzz"], drop=b"qz\0<"),
}
WITHOUT_PATTERNS = {
    "llama2": bytes_at_last,
    "llama2, no unknown token": lambda: bytes_at_last(unk=None),
    "llama2, few letters": lambda: bytes_at_last(8),
    "llama2, all letters": lambda: bytes_at_last(1000),
    "llama2 with unmerged entries": lambda: bytes_at_last(
        entries=["qqzz", "town▁hall", "[unused1]", "▁zq▁", "<0x"]
    ),
    "llama2 with an added token": lambda: bytes_at_last(single_word=True),
    "llama2 with a normalized one": lambda: bytes_at_last(normalized=True, lstrip=True),
    "gemma": lambda: bytes_at_last(
        pre_tokenizer={
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        }
    ),
}
NOT_CERTAIN = {
    "no bytes": lambda: bytes_at_last(fallback=False, unk=None),
    "some bytes": lambda: bytes_at_last(bytes_=BYTES[:60] + BYTES[61:], unk=None),
    "other normalizer": lambda: bytes_at_last(lower=True),
}


@pytest.fixture(scope="module")
def literals(noise) -> list[str]:
    rng = random.Random(1)
    return [
        *noise[::4],
        *("".join(rng.choice(PIECES + LITERALS) for _ in range(rng.randrange(40))) for _ in range(600)),
        "The sign says <0x41> and then <0x0A>.",
        "a town hall",
        "<0x41>",
        "qqzz",
    ]


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("name", [*CERTAIN, *WITHOUT_PATTERNS, *NOT_CERTAIN])
def test_the_same_ids_on_what_looks_like_tokens(literals, name, split):
    made = {**CERTAIN, **WITHOUT_PATTERNS, **NOT_CERTAIN}[name]()
    encoder, slow = Encoder(made, split_special_tokens=split), exact(made, split=split)
    assert encoder.fast == (name not in NOT_CERTAIN)
    if encoder.fast:
        quick = sum(map(encoder._certain, literals))
        assert quick == len(literals) if name in CERTAIN else 100 < quick < len(literals)
    for one, other, text in zip(encoder(literals), slow(literals), literals, strict=True):
        assert one.dtype == np.int32 and one.tolist() == other.tolist(), repr(text)


@pytest.mark.parametrize(
    "name, text",
    [
        ("llama2", "The sign says <0x41> and"),
        ("llama2, few letters", "<0x0A>"),
        ("llama2 with unmerged entries", "qqzz"),
        ("llama2 with unmerged entries", "[unused1]"),
        ("no bytes", None),
        ("some bytes", None),
    ],
)
def test_without_its_guard_it_writes_other_ids(monkeypatch, literals, name, text):
    made = {**WITHOUT_PATTERNS, **NOT_CERTAIN}[name]()
    monkeypatch.setattr(tokenizing, "fast_texts", lambda definition: True)
    encoder, texts = Encoder(made), [text] if text else literals
    differing = [
        one for one in texts if encoder._quickly([one])[0].tolist() != encoder._exactly([one])[0].tolist()
    ]
    assert differing
    with pytest.raises(Failure, match="fastokens writes other ids"):
        encoder(differing)


def test_byte_tokens_in_a_corpus(monkeypatch):
    """Literal bytes deep in a long document: the ids of tokenizers, and a stop where the guard is not there
    and the document is among those compared.
    """
    made, texts = (
        bytes_at_last(),
        ["the license " * 3000 + f"<0x{number:02X}>" + " and the rest" * 3000 for number in (65, 10)],
    )
    for one, other in zip(Encoder(made)(texts), exact(made)(texts), strict=True):
        assert one.tolist() == other.tolist()
    monkeypatch.setattr(tokenizing, "fast_texts", lambda definition: re.compile("(?!)"))
    with pytest.raises(Failure, match="fastokens writes other ids than tokenizers from token"):
        Encoder(made)(texts)


def test_a_difference_is_not_written(monkeypatch):
    """Ids that differ anywhere in the text are met, as the piece that is compared moves on from batch to
    batch, and some texts are compared whole.
    """
    text, wrong = "he " * 2000, "he " * 2000 + "!" + "he " * 2000

    def encoder():
        made = Encoder(few_bytes())
        quickly = made._quickly
        monkeypatch.setattr(
            made,
            "_quickly",
            lambda texts: [
                ids[:-1] if "!" in text else ids for ids, text in zip(quickly(texts), texts, strict=True)
            ],
        )
        return made

    telling = r"fastokens writes other ids than tokenizers from token \d+ of the text .* uninstall fastokens"
    with pytest.raises(Failure, match=telling):
        encoder()([wrong])  # the first is compared whole
    late = encoder()
    late([text])
    with pytest.raises(Failure, match=telling):
        for _ in range(40):
            late([wrong])
    monkeypatch.setattr(tokenizing, "COMPARED_CHARACTERS", 0)
    for share, met in (
        (0, False),
        (0.1, True),
    ):  # and again, as far as they are a share of all; without them none is met
        monkeypatch.setattr(tokenizing, "COMPARED_SHARE", share)
        late = encoder()
        late([text] * 20)
        late._compared += share == 0
        if met:
            with pytest.raises(Failure, match=telling):
                late([wrong] * 20)
        else:
            late([wrong] * 20)


def test_a_corpus_by_either_is_the_same(monkeypatch, tiny_text):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(few_bytes()), eos_token="<end>")
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 3000)
    documents = [
        *((str(number), text) for number, text in enumerate(tiny_text)),
        ("ended", "he<end>"),
        ("control", "\x13"),
        ("last", "he"),
    ]
    found = list(tokenizing.tokenized(documents, tokenizer, 2))
    monkeypatch.setattr(Encoder, "_load_fast", lambda self: None)
    for workers in (1, 2):
        for (name, ids), (other, same) in zip(
            found, tokenizing.tokenized(documents, tokenizer, workers), strict=True
        ):
            assert name == other and ids.dtype == np.int32 and ids.tolist() == same.tolist()
    assert [ids.tolist().count(tokenizer.eos_token_id) for _, ids in found] == [1] * len(documents) and len(
        found[-2][1]
    ) == 1
