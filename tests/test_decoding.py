"""What a model is asked, and how it answers: tokenizers that append, chat templates, generation configs, ends
of answers, texts without words.
"""

import hashlib
import json
import shutil
import sys

import pytest
import torch
from conftest import run_main, tiny_documents, write_jsonl
from lm_eval.api.instance import Instance
from networks import scheme
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    PreTrainedTokenizerFast,
)
from transformers.generation import LogitsProcessorList

from endprompt import BadInput
from endprompt.evaluation import engine, longbench, passkey, perplexity, prompts, ruler
from endprompt.evaluation import run as evaluation
from endprompt.positions import rope
from endprompt.recipe import schema

# What a post-processor may put around a text (A), by name; None: the base's own, <s> before it.
FRAMES = {
    "eos behind": ["<s>", "A", "</s>"],
    "eos alone": ["A", "</s>"],
    "two behind": ["<s>", "A", "<sep>", "</s>"],
    "two before, one behind": ["<s>", "<sep>", "A", "</s>"],
    "none": ["A"],
    "own": None,
}
TEMPLATE = (
    "{% for m in messages %}[{{m['role']}}] {{m['content']}}\n{% endfor %}{% if add_generation_prompt"
    " %}[assistant]{% endif %}"
)


def edited(source, target, frame=None, template=None, generation=None):
    """A copy of the model in ``source`` with another post-processor, chat template or generation config."""
    folder = shutil.copytree(source, target)
    if frame:
        path = folder / "tokenizer.json"
        tree, ids = json.loads(path.read_text()), {"<s>": 1, "</s>": 2, "<sep>": 0}
        names = {"<sep>": "<unk>"}
        tree["post_processor"]["single"] = [
            (
                {"Sequence": {"id": "A", "type_id": 0}}
                if part == "A"
                else {"SpecialToken": {"id": part, "type_id": 0}}
            )
            for part in frame
        ]
        tree["post_processor"]["special_tokens"] = {
            part: {"id": part, "ids": [ids[part]], "tokens": [names.get(part, part)]} for part in ids
        }
        path.write_text(json.dumps(tree))
    for name, values in (
        ("tokenizer_config.json", template and {"chat_template": template}),
        ("generation_config.json", generation),
    ):
        if values:
            (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **values}))
    return folder


@pytest.fixture(scope="module")
def framed(base, tmp_path_factory):
    """{name: tokenizer} of FRAMES."""
    folder = tmp_path_factory.mktemp("framed")
    return {
        name: AutoTokenizer.from_pretrained(edited(base, folder / str(number), frame))
        for number, (name, frame) in enumerate(FRAMES.items())
    }


@pytest.fixture(scope="module")
def network(base):
    return AutoModelForCausalLM.from_pretrained(base).eval()


def asked(texts, **options):
    return [
        Instance(
            "generate_until",
            {},
            (text, {"max_gen_toks": 8, "do_sample": False, "until": [], **options}),
            number,
        )
        for number, text in enumerate(texts)
    ]


def keys(tokenizer, length=200, samples=4):
    return passkey.documents(tokenizer, [length], passkey.Design(samples, 2, 1))


def share(lm, tests):
    answers = lm.generate_until(asked([test["prompt"] for test in tests]), disable_tqdm=True)
    return sum(
        passkey.correct(answer, test["key"]) for answer, test in zip(answers, tests, strict=True)
    ) / len(tests)


# Tokenizers that append


@pytest.mark.parametrize("name", FRAMES)
def test_a_prompt_ends_in_its_own_last_token(framed, tokenizer, name):
    text, plain = "The sky is blue", tokenizer("The sky is blue", add_special_tokens=False)["input_ids"]
    before = [
        {"<s>": 1, "<sep>": 0}[part] for part in FRAMES[name] or ["<s>", "A"] if part in ("<s>", "<sep>")
    ]
    before = before[: before.index(0)] if name == "two behind" else before
    assert prompts.frame(framed[name])[0] == before and prompts.encode(framed[name], text) == before + plain
    assert prompts.encode(framed[name], "") == before and prompts.encode(framed[name], f"{text}</s>")[-1] == 2
    assert (
        prompts.encode(framed[name], f"<s>{text}")[:1] == [1]
        and prompts.encode(framed[name], f"<s>{text}").count(1) == 1
    )


def test_a_post_processor_that_changes_the_text_is_refused(base, tmp_path):
    tree = edited(base, tmp_path / "base", ["<s>", "A", "</s>"])
    loaded = AutoTokenizer.from_pretrained(tree)

    class Odd:
        def __call__(self, text, add_special_tokens=True, **options):
            found = loaded(text, add_special_tokens=False)
            return {
                "input_ids": (
                    found["input_ids"][::-1] + [5] if add_special_tokens else found["input_ids"] + [6]
                )
            }

    with pytest.raises(BadInput, match="post-processor makes .*mend post_processor in tokenizer.json"):
        prompts.frame(Odd())


@pytest.mark.parametrize("name", ["eos behind", "two behind"])
def test_answers_and_likelihoods_are_those_of_the_tokenizer_that_appends_nothing(
    framed, network, tokenizer, tiny_text, monkeypatch, name
):
    odd, plain = engine.LongLM(network, framed[name]), engine.LongLM(network, tokenizer)
    tests = keys(framed[name])
    assert tests == keys(tokenizer) and share(odd, tests) == share(plain, tests) == 1
    pairs = [
        Instance("loglikelihood", {}, (text[:200], text[200:320]), number)
        for number, text in enumerate(tiny_text[:3])
    ]
    pairs += [
        Instance("loglikelihood", {}, ("", "The sky is blue."), 3),
        Instance("loglikelihood", {}, ("The grass is ", "green"), 4),
    ]
    assert odd.loglikelihood(pairs, disable_tqdm=True) == plain.loglikelihood(pairs, disable_tqdm=True)
    context, continuation = odd._encode_pair("The sky", " is blue.")
    assert context + continuation == tokenizer("The sky is blue.")["input_ids"] and len(continuation) == len(
        tokenizer(" is blue.", add_special_tokens=False)["input_ids"]
    )
    # The twin: with what the tokenizer itself writes, the key is not found, and the pair's first token is
    # lost.
    monkeypatch.setattr(prompts, "encode", lambda tokenizer, text: tokenizer(text)["input_ids"])
    assert share(odd, tests) < 0.5 and odd._encode_pair("The sky", " is blue.")[0][-1] == 2
    assert odd.loglikelihood(pairs, disable_tqdm=True)[0] != plain.loglikelihood(pairs, disable_tqdm=True)[0]


def test_a_batch_is_padded_on_the_side_that_is_asked_for(framed, network):
    lm = engine.LongLM(network, framed["eos behind"])
    texts = ["The sky is blue.", "Go", "<s>The sky"]
    rows = [prompts.encode(framed["eos behind"], text) for text in texts]
    for side in ("left", "right"):
        ids, mask = lm.tok_batch_encode(texts, padding_side=side)
        assert [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)] == rows and (
            ids[mask == 0] == lm.tokenizer.pad_token_id
        ).all()
        assert mask[0].all() and mask[1, -1 if side == "left" else 0] == 1 and not mask[1].all()


def test_windows_and_cut_prompts_are_those_of_the_tokenizer_that_appends_nothing(
    framed, tokenizer, tmp_path, tiny_text, base
):
    def made(name):
        special = len(prompts.frame(framed[name])[0])
        return perplexity.windows(
            [perplexity.Text(" ".join(tiny_text[:2]), framed[name])],
            64,
            perplexity.Scored(128, 16, 200),
            special,
        )

    assert made("eos behind") == made("own") == made("two behind") and made("eos alone") == made(
        "none"
    ) != made("own")
    text = " ".join(tiny_text[:2])
    for length in (20, 21, 10**6):
        assert longbench.truncate(text, framed["eos behind"], length) == longbench.truncate(
            text, tokenizer, length
        )
    assert longbench.truncate(text, framed["eos behind"], 20)[1] <= 24


@pytest.mark.parametrize("frame", ["eos behind"])
def test_the_whole_way_with_a_tokenizer_that_appends(recipe_file, base, tmp_path, frame):
    """Keys and perplexity are those of the base."""
    write_jsonl(tmp_path / "held.jsonl", [" ".join(tiny_documents(4, 18))])
    found = {}
    for name, folder in (("plain", base), ("odd", edited(base, tmp_path / "odd", FRAMES[frame]))):
        path = recipe_file(
            name,
            model={"name_or_path": str(folder)},
            eval={
                "tasks": ["passkey", "perplexity"],
                "lengths": [160],
                "samples": 4,
                "perplexity_corpus": str(tmp_path / "held.jsonl"),
                "perplexity_tokens": 128,
                "perplexity_stride": 32,
            },
        )
        code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "out")
        assert code == 0, error
        found[name] = [
            json.loads((tmp_path / f"out/{name}/base/eval/{task}/160.json").read_text())["scores"]
            for task in ("passkey", "perplexity")
        ]
    assert found["odd"] == found["plain"] and found["odd"][0]["score"] == 100


# Chat templates


@pytest.mark.parametrize(
    "template", [TEMPLATE, "<s>" + TEMPLATE, TEMPLATE.replace("[assistant]", "\n" + "The answer. " * 9)]
)
@pytest.mark.parametrize("task", ["passkey", "multikey"])
def test_prompts_fit_with_their_template(base, tmp_path, network, monkeypatch, template, task):
    folder = edited(base, tmp_path / "base", FRAMES["eos behind"], template)
    lm = engine.LongLM(network, AutoTokenizer.from_pretrained(folder))
    seen, generate = [], network.generate
    monkeypatch.setattr(
        network,
        "generate",
        lambda **options: seen.extend(options["input_ids"].tolist()) or generate(**options),
    )

    def lengths(sized):
        seen.clear()
        asked = {
            "tokenizer": str(folder),
            "max_seq_lengths": [256],
            "samples": 3,
            "depths": 3,
            "seed": 1,
            "chat_template": sized,
        }
        found = engine.run(lm, f"endprompt_{task}", asked, chat_template=True)[f"endprompt_{task}"]
        assert (
            sorted(len(row) for row in seen) == sorted(sample["doc"]["prompt_tokens"] for sample in found)
            or not sized
        )
        return [len(row) + passkey.NEW_TOKENS for row in seen]

    assert all(240 < length <= 256 for length in lengths(True))
    assert all(row.count(1) == 1 and row[0] == 1 and row[-1] != 2 for row in seen)
    assert max(lengths(False)) > 256, "the twin: a prompt that was sized alone is too long"


def test_a_template_that_is_not_there_is_said(recipe_file, base, tmp_path):
    for number, template in enumerate(
        (None, "{% for m in messages %}{{ m.nothing.at_all }}{% endfor %}", "a message of its own")
    ):
        folder = edited(base, tmp_path / str(number), template=template)
        path = recipe_file(
            model={"name_or_path": str(folder)}, eval={"chat_template": True, "lengths": [128]}
        )
        code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "out")
        assert (
            code == 2
            and error.splitlines()[-1].startswith("endprompt: eval.chat_template: the model's")
            and "set eval.chat_template=false" in error
        )


def test_ruler_keeps_room_for_the_template(base, tmp_path):
    pytest.importorskip("wonderwords", reason="NVIDIA's RULER package is not installed")
    folder = edited(
        base, tmp_path / "base", template=TEMPLATE.replace("[assistant]", "\n" + "The answer. " * 25)
    )
    loaded = AutoTokenizer.from_pretrained(folder)
    plain, roomy = (
        ruler.generate(["vt"], [1280], folder, ruler.Draw(1, chat=chat), tmp_path / "cache")["vt", 1280][0]
        for chat in (False, True)
    )
    tokens = ruler.ruler_package.tokens_to_generate("vt")
    whole = {
        name: (
            len(loaded(prompts.render(loaded, sample["input"], True), add_special_tokens=False)["input_ids"])
            + tokens
        )
        for name, sample in (("plain", plain), ("roomy", roomy))
    }
    assert whole["roomy"] <= 1280 < whole["plain"] and roomy["counted"] <= 1280 and roomy["outputs"]
    assert len(list((tmp_path / "cache").iterdir())) == 2, "one with room stands beside one without"


# Generation configs

PENALTIES = [
    {"repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 2},
    {"suppress_tokens": list(range(3, 600))},
    {"begin_suppress_tokens": list(range(3, 600))},
    {"min_length": 400},
    {"max_length": 10},
    {"num_beams": 3},
    {"do_sample": True, "temperature": 5.0, "top_k": 0},
    {"forced_eos_token_id": 7},
    {"bad_words_ids": [[number] for number in range(100, 600)]},
    {"guidance_scale": 1.5},
    {"exponential_decay_length_penalty": [1, 3.0]},
    {"stop_strings": ["1"]},
    {"min_new_tokens": 8},
    {"max_new_tokens": 1},
    {"use_cache": False},
]


@pytest.mark.parametrize("options", PENALTIES, ids=lambda options: next(iter(options)))
def test_greedy_answers_are_greedy_whatever_the_folder_asks_for(network, tokenizer, monkeypatch, options):
    tests = keys(tokenizer)
    texts = [test["prompt"] for test in tests]
    monkeypatch.setattr(network, "generation_config", GenerationConfig(eos_token_id=2, bos_token_id=1))
    expected = engine.LongLM(network, tokenizer).generate_until(asked(texts), disable_tqdm=True)
    assert share(engine.LongLM(network, tokenizer), tests) == 1
    network.generation_config = given = GenerationConfig(eos_token_id=2, bos_token_id=1)
    for name, value in options.items():
        setattr(given, name, value)
    lm = engine.LongLM(network, tokenizer)
    assert lm.generate_until(asked(texts), disable_tqdm=True) == expected
    if (
        "repetition_penalty" in options or "suppress_tokens" in options
    ):  # the twin: under the folder's own config the answers are others
        network.generation_config = given
        assert lm.generate_until(asked(texts), disable_tqdm=True) != expected


def test_the_whole_way_with_a_penalty(recipe_file, base, tmp_path):
    for number, changes in enumerate(
        ({"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1, "min_length": 300})
    ):
        folder = edited(base, tmp_path / str(number), generation=changes)
        shutil.copytree(folder, tmp_path / f"config{number}")
        (
            tmp_path / f"config{number}/generation_config.json"
        ).unlink()  # as old models have it: in config.json
        config = tmp_path / f"config{number}/config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
        for model in (folder, tmp_path / f"config{number}"):
            path = recipe_file(
                f"n{model.name}", model={"name_or_path": str(model)}, eval={"lengths": [200], "samples": 3}
            )
            code, out, error = run_main("evaluate", path, "base", "--out", tmp_path / "out")
            assert code == 0 and "100.00%" in out, error


class Forced(LogitsProcessor):
    """Row r writes ``rows[r]``, its last token again and again."""

    def __init__(self, rows, start):
        self.rows, self.start = rows, start

    def __call__(self, ids, scores):
        wanted = torch.full_like(scores, -1e9)
        for number, row in enumerate(self.rows[: len(ids)]):
            wanted[number, row[min(ids.shape[1] - self.start, len(row) - 1)]] = 0
        return torch.where(scores == -float("inf"), scores, wanted)


def say(monkeypatch, network, rows):
    generate = network.generate
    monkeypatch.setattr(
        network,
        "generate",
        lambda **options: generate(
            **options, logits_processor=LogitsProcessorList([Forced(rows, options["input_ids"].shape[1])])
        ),
    )


@pytest.mark.parametrize(
    "named, expected", [([2, 300], ["a b", "ame"]), (2, ["a b", None]), (None, ["a b", None])]
)
def test_an_answer_ends_where_the_model_or_the_tokenizer_says(
    network, tokenizer, monkeypatch, named, expected
):
    """Also in a batch whose other rows go on."""
    a, b, other = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("a", "b", "c"))
    monkeypatch.setattr(network, "generation_config", GenerationConfig(eos_token_id=named, bos_token_id=1))
    lm = engine.LongLM(network, tokenizer)
    say(monkeypatch, network, [[a, b, 2, other], [a, 300, other]])
    found = lm.generate_until(asked(["Go one", "Go two"]), disable_tqdm=True)
    rest = [tokenizer.decode([a, 300, *[other] * 6])]
    assert [text.strip() for text in found] == [expected[0], expected[1] or rest[0].strip()]
    # The twin: without an end of sequence, the first row goes on behind it.
    network.generation_config = GenerationConfig(bos_token_id=1)
    assert lm.generate_until(asked(["Go one", "Go two"]), disable_tqdm=True)[0].strip().startswith("a b c")


def test_ends_of_an_answer(tokenizer):
    assert engine.ends(GenerationConfig(eos_token_id=[5, 2, 5]), tokenizer) == [2, 5] and engine.ends(
        None, tokenizer
    ) == [2]
    assert engine.ends(GenerationConfig(), tokenizer) == [2] and engine.ends(
        GenerationConfig(eos_token_id=7), tokenizer
    ) == [2, 7]


# samsum


@pytest.fixture
def newlines(base, tmp_path):
    """The base's tokenizer with a token that merges a full stop and two newlines, and the ids of it and of
    the newline alone.
    """
    tree = json.loads((base / "tokenizer.json").read_text())
    vocabulary, merges = tree["model"]["vocab"], tree["model"]["merges"]
    left, right = merges.pop()  # whose token is in no other; the last id is then the free one
    last = max(vocabulary, key=vocabulary.get)
    merged, vocabulary[last] = vocabulary[last], vocabulary.pop(left + right)
    tree["added_tokens"].append(
        {
            "id": merged,
            "content": ".\n\n",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    shutil.copytree(base, tmp_path / "newlines")
    (tmp_path / "newlines/tokenizer.json").write_text(json.dumps(tree))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "newlines")
    newline = loaded.encode("\n", add_special_tokens=False)[-1]
    assert loaded.decode([merged]) == ".\n\n" and newline != merged
    return tmp_path / "newlines", loaded, newline, merged


def test_samsum_ends_at_the_newline_token_alone(network, newlines, tmp_path, monkeypatch):
    folder, loaded, newline, merged = newlines
    row = {
        "input": "Tom: hi",
        "context": "Ann: hello",
        "answers": ["Tom greets."],
        "length": 4,
        "dataset": "samsum",
        "all_classes": None,
    }
    write_jsonl(tmp_path / "samsum.jsonl", [])
    (tmp_path / "samsum.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setattr(network, "generation_config", GenerationConfig(eos_token_id=2, bos_token_id=1))
    lm = engine.LongLM(network, loaded)
    word = {text: loaded(text, add_special_tokens=False)["input_ids"][-1] for text in ("a", "b", "c")}

    def answer(*tokens, **options):
        with monkeypatch.context() as patched:
            say(patched, network, [list(tokens)])
            asked = {"tokenizer": str(folder), "longbench_data": str(tmp_path), "longbench_length": 512}
            generation = {**longbench.generation_kwargs("samsum", loaded), **options}
            found = engine.run(lm, "endprompt_longbench_samsum", asked, generation=generation)[
                "endprompt_longbench_samsum"
            ]
        return found[0]["filtered_resps"][0].strip(" ")

    assert answer(word["a"], merged, word["b"], newline, word["c"]) == "a.\n\n b\n"
    assert answer(word["a"], newline, word["c"]) == "a\n" and answer(word["a"], 2, word["c"]) == "a"
    assert answer(word["a"], merged, word["b"], newline, until=["\n"]) == "a.", (
        "the twin: as text, a newline ends it inside the merged token"
    )
    assert not answer(newline, word["c"]).startswith("\n"), "it cannot be the first token"
    assert longbench.generation_kwargs("samsum", loaded, "vllm") == {
        "stop_token_ids": [newline],
        "min_tokens": 1,
    }
    assert longbench.generation_kwargs("qasper", loaded, "vllm") == {}


# vLLM, in whose place stands a module that says what it was asked

STUB = {
    "__init__.py": (
        """
from transformers import AutoConfig
def granted(config):
    # As vLLM 0.32 derives the greatest max_model_len.
    keys = "max_position_embeddings n_positions max_seq_len seq_length max_sequence_length seq_len"
    window = min(getattr(config, key, None) or 2**62 for key in keys.split())
    window = getattr(config, "model_max_length", None) or window
    scaled = config.rope_parameters["rope_type"] not in ("default", "longrope", "llama3", "yarn")
    return window * (config.rope_parameters["factor"] if scaled else 1)
class SamplingParams:
    def __init__(self, **options):
        self.__dict__.update(options)
class TokensPrompt(dict):
    pass
class LLM:
    def __init__(self, **options):
        self.options, self.asked = options, []
        config = AutoConfig.from_pretrained(options["model"])
        config.update(options.get("hf_overrides") or {})
        window, asked = granted(config), options["max_model_len"]
        if asked > window and not asked <= (getattr(config, "model_max_length", None) or 0):
            raise ValueError(f"max_model_len ({asked}) is greater than the derived max_model_len ({window})")
    def generate(self, prompts, sampling_params, **_):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        self.asked += list(zip(ids, sampling_params))
        text = type("Text", (), {"text": " 12345"})
        said = [[None] + [{token: -1.0} for token in prompt[1:]] for prompt in ids]
        return [type("Output", (), {"outputs": [text], "prompt_logprobs": one}) for one in said]
"""
    ),
    "lora/__init__.py": "",
    "lora/request.py": "class LoRARequest:\n    pass\n",
    "tokenizers.py": (
        "from transformers import AutoTokenizer\ndef get_tokenizer(name, **_):\n    return"
        " AutoTokenizer.from_pretrained(name)\n"
    ),
}


@pytest.fixture
def served(tmp_path, monkeypatch):
    """served(folder, longest) -> the model of engine.vllm."""
    for name, text in STUB.items():
        path = tmp_path / "stub/vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "stub/vllm-0.1.dist-info").mkdir()
    (tmp_path / "stub/vllm-0.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.1\n"
    )
    names = [
        name
        for name in sys.modules
        if name.split(".")[0] == "vllm" or name == "lm_eval.models.vllm_causallms"
    ]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path / "stub"))
    engine._served.cache_clear()
    from lm_eval.api.registry import model_registry

    known = dict(model_registry._objs) if hasattr(model_registry, "_objs") else None
    if known is not None:
        model_registry._objs.pop("vllm", None)
    yield engine.vllm
    engine._served.cache_clear()
    if known is not None:
        model_registry._objs.update(known)
    for name in [
        name
        for name in sys.modules
        if name.split(".")[0] == "vllm" or name == "lm_eval.models.vllm_causallms"
    ]:
        del sys.modules[name]


def test_vllm_is_asked_as_transformers_is(served, base, tmp_path, tokenizer, tiny_text):
    folder = edited(
        base,
        tmp_path / "odd",
        FRAMES["eos behind"],
        generation={"repetition_penalty": 2.0, "eos_token_id": [2, 300]},
    )
    lm = served(str(folder), 256)
    assert lm.model.options["generation_config"] == "vllm" and lm.model.options["max_model_len"] == 257
    text = keys(tokenizer)[0]["prompt"]
    assert lm.generate_until(asked([text]), disable_tqdm=True) == [" 12345"]
    ids, params = lm.model.asked[-1]
    assert (
        ids == tokenizer(text)["input_ids"]
        and params.stop_token_ids == [2, 300]
        and params.temperature == 0
        and not hasattr(params, "repetition_penalty")
    )
    lm.generate_until(
        asked([text], **longbench.generation_kwargs("samsum", tokenizer, "vllm")), disable_tqdm=True
    )
    assert (
        lm.model.asked[-1][1].stop_token_ids
        == sorted([2, 300, tokenizer.encode("\n", add_special_tokens=False)[-1]])
        and lm.model.asked[-1][1].min_tokens == 1
    )
    pair = Instance("loglikelihood", {}, (tiny_text[0][:200], tiny_text[0][200:300]), 0)
    counted = len(tokenizer(tiny_text[0][:300])["input_ids"]) - len(
        tokenizer(tiny_text[0][:200])["input_ids"]
    )
    assert lm.loglikelihood([pair], disable_tqdm=True) == [(-counted, True)]
    # What does not fit is refused, where the harness would cut it from the left.
    long = passkey.build(tokenizer, 300, [(0.5, passkey.NEEDLE.format(key="12345"))])[0]
    with pytest.raises(
        ValueError, match="a prompt and its answer are .* tokens, and vLLM was started for 256"
    ):
        lm.generate_until(asked([long]), disable_tqdm=True)
    with pytest.raises(ValueError, match="vLLM was started for 256"):
        lm.loglikelihood(
            [Instance("loglikelihood", {}, (" ".join(tiny_text[:3]), " So."), 0)], disable_tqdm=True
        )


@pytest.mark.parametrize("kind", [*rope.TYPES, None])
def test_vllm_grants_the_window_that_is_asked_of_it(served, base, tmp_path, kind):
    """The model's own target length with its answer, and no more than it has positions for."""
    target, scaling = (2048, scheme(kind, 256, 2048, 32)) if kind else (256, None)
    config = AutoConfig.from_pretrained(base)
    if scaling:
        rope.apply(config, scaling, target)
    folder = tmp_path / "scaled"
    shutil.copytree(base, folder)
    config.save_pretrained(folder)
    lm = served(str(folder), target)
    assert lm.max_length == target + 1
    beyond = target * 8 + 1 if kind == "linear" else target + 1
    with pytest.raises(BadInput, match=rf"up to {beyond} tokens, and vLLM computes {beyond - 1} positions"):
        served(str(folder), beyond)
    # The twin: as it was asked before, vLLM refuses what is not scaled linearly.
    import vllm

    if kind != "linear":
        with pytest.raises(ValueError, match="greater than the derived"):
            vllm.LLM(model=str(folder), max_model_len=target + 1)


def test_vllm_is_asked_for_what_the_tasks_need(recipe_file, tokenizer):
    """Not for LongBench's length where LongBench is not asked."""

    def asked(*tasks):
        checked = schema.load(recipe_file(eval={"tasks": list(tasks), "lengths": [64, 512]}))
        return evaluation.longest(checked, tokenizer), checked.eval.longbench_length

    assert asked("passkey", "mmlu")[0] == 512
    assert asked("mmlu")[0] == 4096
    needed, cut = asked("passkey", "longbench_qasper")
    assert needed == cut + engine.LONGEST_ANSWER + prompts.room(tokenizer, False)


# Texts for perplexity


@pytest.fixture(scope="module")
def byte_level(tiny_text):
    """A tokenizer like Llama 3's or Qwen's: bytes, merged within words."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    chinese = "河边的小镇有一座磨坊一座桥和几条旧船，人们去集市，晚上回家。"
    made.train_from_iterator(
        [*tiny_text, chinese * 20],
        trainers.BpeTrainer(
            vocab_size=600,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|end|>"],
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")


WORDLESS = {
    "Chinese": "河边的小镇有一座磨坊一座桥和几条旧船" * 60,
    "Chinese with a space here and there": (
        "河边的小镇有一座磨坊 一座桥和几条旧船人们去集市买东西晚上才回家因为路很远" * 30
    ),
    "Japanese": "川沿いの町には水車小屋と橋と古い舟があります。人々は市場へ行き、夜遅くに帰ります。" * 30,
    "Thai": "เมืองริมแม่น้ำมีโรงสีและสะพานกับเรือเก่า" * 30,
    "symbols of several characters": "👩‍👩‍👧‍👦🏳️‍🌈e\u0301a\u0308" * 60,
    "lines without spaces": "\n".join(
        hashlib.sha256(str(number).encode()).hexdigest() for number in range(40)
    ),
    "ideographic spaces": "河边的小镇\u3000有一座磨坊\n一座桥" * 60,
}


@pytest.mark.parametrize("kind", ["tiny", "prepending", "bytes"])
@pytest.mark.parametrize("name", WORDLESS)
def test_a_text_without_words_is_cut_between_tokens(base, tokenizer, byte_level, name, kind):
    """The same pieces at each length, without holes; the harness' two texts are the tokens that are counted,
    and no more than fit.
    """
    if kind == "prepending":
        tree = json.loads((base / "tokenizer.json").read_text())
        tree["normalizer"] = {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        }
        tree["pre_tokenizer"] = None
        loaded = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(tree)), bos_token="<s>", eos_token="</s>"
        )
    else:
        loaded = {"tiny": tokenizer, "bytes": byte_level}[kind]
    special, text = len(prompts.frame(loaded)[0]), perplexity.Text(WORDLESS[name], loaded)
    assert text.between_tokens and text.tokens > 384
    found = {
        length: perplexity.windows([text], length, perplexity.Scored(256, 32, 10**6), special)
        for length in (96, 128, 256)
    }
    pieces = {length: [window["continuation"] for window in windows] for length, windows in found.items()}
    assert pieces[96] == pieces[128] == pieces[256] and "".join(pieces[96]) in WORDLESS[name]
    assert sum(window["tokens"] for window in found[96]) > (text.tokens - 256) * 0.7
    for length, windows in found.items():
        for window in windows:
            context, whole = (
                prompts.encode(loaded, part)
                for part in (window["context"], window["context"] + window["continuation"])
            )
            assert whole[: len(context)] == context and len(whole) - len(context) == window["tokens"]
            assert (
                length - 24 <= len(whole) <= length
                and "\ufffd" not in window["context"] + window["continuation"]
            )


def test_windows_over_words_are_those_they_were(tokenizer):
    """By the checksum of what commit 33c66d6 made: prose, with symbols in it, lines, and code."""
    text = tiny_documents(48, 18)
    documents = [
        " ".join(text[:4]),
        f"{text[5]}\n\n{text[6]} ||| ====== @@@@@@@@@ {text[7]}",
        "\n".join(text[8:12]),
        "x = 1; y = 2\n    if a == b: return 3\n" * 40,
    ]
    texts = [perplexity.Text(document, tokenizer) for document in documents]
    made = json.dumps(
        [
            perplexity.windows(texts, length, perplexity.Scored(128, 16, 10**6), special=1)
            for length in (32, 64, 128)
        ]
    )
    assert (
        hashlib.sha256(made.encode()).hexdigest()
        == "78a1289024f65df53351bd4922342697b9674ce08cf78bc87798a92bf8af47af"
    )
    assert not any(text.between_tokens for text in texts)


def test_why_there_are_no_windows_is_said_truly(tokenizer, monkeypatch):
    text = perplexity.Text(WORDLESS["Chinese"], tokenizer)
    with pytest.raises(ValueError, match="no document holds 100000 tokens; give longer"):
        perplexity.windows([text], 96, perplexity.Scored(100000, 32, 100))
    monkeypatch.setattr(perplexity.Text, "fits", lambda *_: False)
    with pytest.raises(
        ValueError,
        match="no document that holds 256 tokens has places where it can be cut without changing its tokens",
    ):
        perplexity.windows([text], 96, perplexity.Scored(256, 32, 100))
    # The twin: cut between words alone, this text has no window.
    assert not [at for at in range(1, len(text.text) - 1) if text.text[at] == " "]


def test_a_text_that_cannot_be_cut_where_its_tokens_change(tokenizer):
    """A cut inside what merges again is passed over."""
    text = perplexity.Text("ab" * 400, tokenizer)
    for index in range(len(text.cuts)):
        at, before = text.cuts[index]
        if not text._leaves_tokens(index):
            assert tokenizer("ab" * 400, add_special_tokens=False)["input_ids"][:before] != text.ids(0, at)
    assert any(text._leaves_tokens(index) for index in range(len(text.cuts)))


def test_held_out_text_is_read_from_its_column(tokenizer, tmp_path, tiny_text):
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"content": tiny_text[0], "text": tiny_text[1]}) + "\n")
    for options, expected in (((), tiny_text[1]), (("content",), tiny_text[0]), (("text",), tiny_text[1])):
        assert [text.text for text in perplexity.held_out(str(path), tokenizer, 64, 16, 1000, *options)] == [
            expected
        ]
    with pytest.raises(
        BadInput, match=r"eval\.perplexity_column: .* line 1 has no 'nothing'; it has content, text"
    ):
        perplexity.held_out(str(path), tokenizer, 64, 16, 1000, "nothing")


@pytest.mark.parametrize(
    "settings, read",
    [
        ({}, "text"),
        ({"data": {"text_column": "content"}}, "content"),
        ({"data": {"text_column": "content"}, "eval": {"perplexity_column": "text"}}, "text"),
        ({"eval": {"perplexity_column": "content"}}, "content"),
    ],
)
def test_the_column_of_the_held_out_text_is_the_recipes(recipe_file, tmp_path, monkeypatch, settings, read):
    column, held_out = [], perplexity.held_out
    monkeypatch.setattr(perplexity, "held_out", lambda *asked: column.append(asked[5]) or held_out(*asked))
    text = " ".join(tiny_documents(2, 18))
    (tmp_path / "held.jsonl").write_text(json.dumps({"content": f"So. {text}", "text": text}) + "\n")
    options = {
        "tasks": ["perplexity"],
        "lengths": [96],
        "perplexity_corpus": str(tmp_path / "held.jsonl"),
        "perplexity_tokens": 32,
        "perplexity_stride": 32,
    }
    path = recipe_file(**{**settings, "eval": {**options, **settings.get("eval", {})}})
    code, _, error = run_main("evaluate", path, "base", "--out", tmp_path / "out")
    assert code == 0 and set(column) == {read} and len(column) == 2, error
