"""What a score depends on: each input is changed in turn, and the result is scored again; what cannot change
it leaves it.
"""

import gzip
import json
import os
import shutil

import pytest
import yaml
from conftest import REPOSITORY, tiny_documents, with_symbols, write_jsonl
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from endprompt import BadInput
from endprompt.evaluation import (
    engine,
    longbench,
    prompts,
    question,
    results,
    ruler,
    ruler_package,
    run,
)
from endprompt.recipe import schema, task_names
from endprompt.recipe.experiment import Experiment
from endprompt.reports import compare
from endprompt.rows.tokenizing import tokenizer_fingerprint

TEMPLATE = (
    "{% for m in messages %}[{{m['role']}}] {{m['content']}}\n{% endfor %}{% if add_generation_prompt"
    " %}[assistant]{% endif %}"
)
ROW = {
    "input": "What?",
    "context": "The sky is blue.",
    "answers": ["blue"],
    "length": 4,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
}


class Setting:
    """A model, data of every kind, and a recipe over them, whose scores are counted and not computed."""

    def __init__(self, folder, base, text):
        self.folder, self.model, self.overrides, self.method = (
            folder,
            shutil.copytree(base, folder / "base"),
            [],
            "base",
        )
        self.held = write_jsonl(folder / "held.jsonl", [" ".join(text[:4])])
        self.bench = folder / "bench"
        self.bench.mkdir()
        write_jsonl(self.bench / "qasper.jsonl", [])
        self.write_bench(ROW)
        self.samples = folder / "samples"
        self.samples.mkdir()
        self.write_samples("prompt")
        self.tasks, self.code = ["passkey", "perplexity", "longbench_qasper"], None

    def write_bench(self, row):
        (self.bench / "qasper.jsonl").write_text(json.dumps(row) + "\n")

    def write_samples(self, word):
        asked = {
            "task": "vt",
            "length": 96,
            "format": ruler.FORMAT,
            "tokenizer": tokenizer_fingerprint(ruler.load_tokenizer(self.model)),
            "split_special_tokens": False,
            "samples": 5,
            "seed": 42,
            "generation": ruler_package.GENERATION,
        }
        rows = [
            {"index": number, "input": f"{word} {number}", "outputs": [f"{number}"], "length": 90}
            for number in range(5)
        ]
        ruler._write(
            self.samples / "vt-96-5-0.jsonl",
            asked,
            "".join(json.dumps(row) + "\n" for row in rows).encode(),
            [90] * 5,
        )

    def edit(self, name, **values):
        path = self.model / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def set(self, *overrides):
        self.overrides += overrides

    def recipe(self):
        tree = {
            "model": {"name_or_path": str(self.model)},
            "lengths": {"physical": 64, "target": 2048},
            "data": {"corpus": str(self.held), "tokens": 64},
            "eval": {
                "tasks": self.tasks,
                "lengths": [96],
                "samples": 3,
                "depths": 2,
                "perplexity_corpus": str(self.held),
                "perplexity_tokens": 64,
                "perplexity_stride": 32,
                "longbench_data": str(self.bench),
                "longbench_length": 96,
                "ruler_samples": str(self.samples),
            },
        }
        path = self.folder / "small.yaml"
        path.write_text(yaml.safe_dump(tree))
        return schema.load(path, self.overrides)

    def asked(self, monkeypatch, blind=None):
        """The tasks that `evaluate` scores now.  blind: a key that it does not compare."""
        scored = []

        class Scorer:
            def __init__(self, *_):
                pass

            def score(self, task, length):
                scored.append(task)
                return {
                    "length": length,
                    "metric": task,
                    "score": 5.0,
                    "low": 4.0,
                    "high": 6.0,
                    "samples": 3,
                }, []

        def same(one, other):
            # What is scored of a text says much of how it is scored.
            unseen = {blind: None, "words": None} if blind else {}
            return question.same(*({**asked, **unseen} for asked in (one, other)))

        with monkeypatch.context() as patched:
            patched.setattr(run, "Scorer", Scorer)
            patched.setattr(run, "same", same)
            patched.setattr(run.figures, "heatmaps", lambda *_: None)
            run.evaluate(Experiment.of(self.recipe(), self.method, self.folder / "run"))
        return set(scored)


@pytest.fixture
def setting(tmp_path, base, tiny_text):
    question.code.cache_clear()
    yield Setting(tmp_path, base, tiny_text)
    question.code.cache_clear()


def weights(setting):
    """One number of one projection, far from both ends of the file."""
    path = setting.model / "model.safetensors"
    tensors, size = load_file(path), path.stat().st_size
    tensors["model.layers.1.mlp.up_proj.weight"][7, 7] += 1
    save_file(tensors, path, {"format": "pt"})
    assert path.stat().st_size == size


def appended(setting):
    path = setting.model / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    tree["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    path.write_text(json.dumps(tree))


def templated(setting):
    setting.edit("tokenizer_config.json", chat_template=TEMPLATE)
    setting.set("eval.chat_template=true")


def shuffled(setting):
    text = json.loads(setting.held.read_text())["text"].split()
    write_jsonl(setting.held, [" ".join([*text[1:], text[0]])])


def code(name, before, after, setting):
    """A copy of the code with another line, asked in place of it."""
    copy = setting.folder / "code"
    if not copy.exists():
        shutil.copytree(question.HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / name).read_text()
    assert before in text
    (copy / name).write_text(text.replace(before, after))
    setting.code = copy


ALL = {"passkey", "perplexity", "longbench_qasper"}
# What is changed: (how, the tasks that are scored again, the key of the question that holds it).
CHANGES = {
    "weights": (weights, ALL, "model"),
    "config.json": (lambda setting: setting.edit("config.json", rms_norm_eps=1e-4), ALL, "model"),
    "end tokens": (lambda setting: setting.edit("generation_config.json", eos_token_id=[2, 5]), ALL, "model"),
    "attention": (lambda setting: setting.set("model.attn_implementation=eager"), ALL, "model"),
    "sharpness": (lambda setting: setting.set("rope.sharpen=1.0"), ALL, "model"),
    "post-processor": (appended, ALL, "tokenizer"),
    "special tokens": (
        lambda setting: setting.edit("tokenizer_config.json", bos_token="<unk>"),
        ALL,
        "tokenizer",
    ),
    "samples": (lambda setting: setting.set("eval.samples=2"), {"passkey", "longbench_qasper"}, "samples"),
    "depths": (lambda setting: setting.set("eval.depths=3"), {"passkey"}, "depths"),
    "seed": (lambda setting: setting.set("eval.seed=7"), ALL, "seed"),
    "stride": (lambda setting: setting.set("eval.perplexity_stride=16"), {"perplexity"}, "perplexity_stride"),
    "scored tokens": (
        lambda setting: setting.set("eval.perplexity_tokens=80"),
        {"perplexity"},
        "perplexity_tokens",
    ),
    "words shuffled": (shuffled, {"perplexity"}, "data"),
    "benchmark's data": (
        lambda setting: setting.write_bench({**ROW, "answers": ["Blue"]}),
        {"longbench_qasper"},
        "data",
    ),
    "version of the harness": (None, ALL, "lm_eval"),
    "a task's module": (
        lambda setting: code("passkey.py", "KEYS = 4", "KEYS = 5", setting),
        {"passkey"},
        "code",
    ),
    "a module of its module": (
        lambda setting: code("longbench_scores.py", "round(100 * total", "round(99 * total", setting),
        {"longbench_qasper"},
        "code",
    ),
    "the intervals": (lambda setting: code("intervals.py", "0.95", "0.96", setting), ALL, "code"),
    "a task file": (
        lambda setting: code("tasks/longbench/qasper.yaml", "128", "129", setting),
        {"longbench_qasper"},
        "code",
    ),
    "an included task file": (
        lambda setting: code("tasks/longbench/_longbench.yaml", "version: 1.0", "version: 1.1", setting),
        {"longbench_qasper"},
        "code",
    ),
    "the engine": (
        lambda setting: code("engine.py", "NO_LIMIT = 2**31 - 1", "NO_LIMIT = 2**30", setting),
        ALL,
        "code",
    ),
}


def follow(setting, monkeypatch, name):
    if name == "version of the harness":
        monkeypatch.setattr(question.importlib.metadata, "version", lambda package: "9.9")
    if setting.code:
        monkeypatch.setattr(question, "HERE", setting.code)
        monkeypatch.setattr(engine, "TASKS", setting.code / "tasks")
        question.code.cache_clear()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_scored_again(setting, monkeypatch, capsys, name):
    change, expected, key = CHANGES[name]
    assert setting.asked(monkeypatch) == ALL and setting.asked(monkeypatch) == set()
    capsys.readouterr()
    if change:
        change(setting)
    follow(setting, monkeypatch, name)
    assert setting.asked(monkeypatch, blind=key) == set(), (
        "the twin: without the key, what was scored before would stand"
    )
    assert setting.asked(monkeypatch) == expected
    assert capsys.readouterr().err.count("scoring again") == len(expected)
    assert setting.asked(monkeypatch) == set()


def test_a_greater_length_moves_where_perplexity_starts(setting, monkeypatch, capsys):
    assert setting.asked(monkeypatch) == ALL
    setting.set("eval.lengths=[96,128]")
    capsys.readouterr()
    assert setting.asked(monkeypatch) == {"passkey", "perplexity"}  # at 128
    again = [line for line in capsys.readouterr().err.splitlines() if "scoring again" in line]
    assert len(again) == 1 and "perplexity/96.json" in again[0]


@pytest.mark.parametrize("method, sharper", [("base", 1.0), ("interpolation", 2.0)])
def test_sharpness_of_what_is_not_trained_is_part_of_the_question(setting, monkeypatch, method, sharper):
    setting.method, setting.tasks = method, ["passkey"]
    assert setting.asked(monkeypatch) == {"passkey"}
    setting.set(f"rope.sharpen={sharper}")
    assert setting.asked(monkeypatch) == {"passkey"} and setting.asked(monkeypatch) == set()
    setting.set("rope.sharpen=0.0")
    assert setting.asked(monkeypatch) == {"passkey"}


def test_the_template_counts_where_it_is_used(setting, monkeypatch):
    """Perplexity is of the text itself, and this change of the template is none for what does not use it."""
    templated(setting)
    setting.tasks = [*setting.tasks, "multikey", "longbench_trec"]
    (setting.bench / "trec.jsonl").write_text(json.dumps({**ROW, "all_classes": ["blue"]}) + "\n")
    assert setting.asked(monkeypatch) == {*ALL, "multikey", "longbench_trec"}
    setting.edit("tokenizer_config.json", chat_template=TEMPLATE.replace("[assistant]", "[model]"))
    assert setting.asked(monkeypatch, blind="chat_template") == set()
    assert setting.asked(monkeypatch) == {"passkey", "multikey", "longbench_qasper"}
    setting.set("eval.chat_template=false")
    assert (
        setting.asked(monkeypatch) == {"passkey", "multikey", "longbench_qasper"}
        and setting.asked(monkeypatch) == set()
    )


def test_the_column_of_the_text_counts_by_what_stands_in_it(setting, monkeypatch):
    text = json.loads(setting.held.read_text())["text"]
    setting.tasks = ["perplexity"]
    setting.held.write_text(json.dumps({"text": text, "content": f"So. {text}", "copy": text}) + "\n")
    assert setting.asked(monkeypatch) == {"perplexity"}
    setting.set("data.text_column=copy")
    assert setting.asked(monkeypatch) == set()
    setting.set("data.text_column=content")
    assert setting.asked(monkeypatch) == {"perplexity"}
    setting.set("eval.perplexity_column=text")
    assert setting.asked(monkeypatch) == {"perplexity"} and setting.asked(monkeypatch) == set()


def test_ruler_samples_count_by_their_content(setting, monkeypatch):
    setting.tasks = ["ruler_vt"]
    assert setting.asked(monkeypatch) == {"ruler_vt"}
    setting.samples = shutil.move(setting.samples, setting.folder / "elsewhere")
    assert setting.asked(monkeypatch) == set()
    setting.write_samples("another prompt")
    assert setting.asked(monkeypatch, blind="data") == set() and setting.asked(monkeypatch) == {"ruler_vt"}


def test_what_the_generator_is_counts_where_samples_are_made(setting, monkeypatch):
    setting.tasks = ["ruler_vt"]
    setting.set("eval.ruler_samples=null")
    monkeypatch.setattr(run.ruler, "ensure", lambda *_, **__: None)
    monkeypatch.setattr(ruler_package, "generator", lambda: {"words": "a"})
    assert setting.asked(monkeypatch) == {"ruler_vt"} and setting.asked(monkeypatch) == set()
    monkeypatch.setattr(ruler_package, "generator", lambda: {"words": "b"})
    assert setting.asked(monkeypatch) == {"ruler_vt"}


def packed(setting):
    with gzip.open(setting.folder / "other.jsonl.gz", "wt") as file:
        file.write(setting.held.read_text())
    setting.held = setting.folder / "other.jsonl.gz"
    setting.bench = shutil.move(setting.bench, setting.folder / "other-bench")


def touched(setting):
    for path in setting.folder.rglob("*"):
        if path.is_file() and "run" not in path.parts:
            os.utime(path, (1, 1))


def moved(setting):
    setting.model = shutil.move(setting.model, setting.folder / "moved")


COSMETIC = {
    "times": touched,
    "data moved and packed": packed,
    "model moved": moved,
    "notes beside the weights": lambda setting: (setting.model / "README.md").write_text("x"),
    "a penalty that does not count": lambda setting: setting.edit(
        "generation_config.json", repetition_penalty=2.0, temperature=0.7
    ),
    "a template that is not used": lambda setting: setting.edit(
        "tokenizer_config.json", chat_template=TEMPLATE
    ),
    "comments": lambda setting: code("passkey.py", "KEYS = 4\n", "KEYS   =  4  # of them\n", setting),
    "docstrings": lambda setting: code(
        "passkey.py", '"""The longest prompt', '"""A prompt, the longest', setting
    ),
    "code of another task": lambda setting: code("ruler.py", "FORMAT = 1", "FORMAT = 2", setting),
    "what may run": lambda setting: setting.set("eval.run_unsafe_code=true"),
}


@pytest.mark.parametrize("name", COSMETIC)
def test_what_cannot_change_a_score_leaves_it(setting, monkeypatch, name):
    assert setting.asked(monkeypatch) == ALL
    COSMETIC[name](setting)
    follow(setting, monkeypatch, name)
    assert setting.asked(monkeypatch) == set()


def test_results_of_a_model_that_was_moved_stay_together(setting, monkeypatch):
    """One file was written before the move and one after it; both are the model's."""
    assert setting.asked(monkeypatch) == ALL
    moved(setting)
    setting.set("eval.lengths=[96,128]")
    assert setting.asked(monkeypatch) == ALL - {"longbench_qasper"}
    folder = Experiment.of(setting.recipe(), setting.method, setting.folder / "run").run / "eval"
    found = results.read(folder)
    assert found.lengths("passkey") == [96, 128] and found.older == 0


def test_every_key_of_the_eval_section_is_held_or_named(setting):
    """A key that is added later is part of every question until someone says otherwise."""
    fields = set(schema.EvalSection.model_fields)
    assert fields >= set(question._ELSEWHERE) | set(question._READERS)
    recipe, loaded = setting.recipe(), AutoTokenizer.from_pretrained(setting.model)
    for task in ("passkey", "multikey", "perplexity", "longbench_qasper", "ruler_vt", "hellaswag"):
        asked = question.Questions(recipe, loaded)(task, 96, {})
        wanted = {
            key
            for key in fields - set(question._ELSEWHERE)
            if question.family(task) in question._READERS.get(key, (question.family(task),))
        }
        assert wanted <= set(asked), task
        assert {
            "model",
            "tokenizer",
            "code",
            "chat_template",
            "lm_eval",
            "task",
            "length",
            "backend",
            "seed",
        } <= set(asked)
    assert set(question._READERS["samples"]) | {"perplexity", "short_text", "far_gain"} == {
        question.family(task) for task in task_names.TASKS
    }
    assert len(
        {question.code(task) for task in task_names.TASKS if question.family(task) != "short_text"}
    ) == len(task_names.TASKS) - len(task_names.SHORT_TEXT)


@pytest.mark.parametrize(
    "tasks, most", [("gsm8k, mmlu", 5), ("humaneval", 0), ("hellaswag, gsm8k", None), ("passkey", None)]
)
def test_no_more_examples_than_a_task_has(setting, tasks, most):
    setting.overrides = [f"eval.tasks=[{tasks}]", f"eval.short_text_shots={most or 0}"]
    assert setting.recipe().eval.short_text_shots == (most or 0)
    setting.overrides[1] = "eval.short_text_shots=6"
    if most is None:
        assert setting.recipe().eval.short_text_shots == 6
        return
    with pytest.raises(BadInput, match=rf"eval.short_text_shots 6: \w+ has {most} examples"):
        setting.recipe()


def test_the_number_of_examples_is_held_as_what_it_comes_to(setting):
    loaded = AutoTokenizer.from_pretrained(setting.model)

    def asked(*overrides):
        setting.overrides = list(overrides)
        return question.Questions(setting.recipe(), loaded)("hellaswag", None, {})

    own = asked()
    assert own["few_shots"] == 10 and own == asked("eval.short_text_shots=10")
    assert asked("eval.short_text_shots=0") == {**own, "few_shots": 0}


@pytest.mark.parametrize("task", ["perplexity", "far_gain"])
def test_lengths_count_where_they_change_the_words(setting, task):
    """Prose is of the same words whatever lengths are beside; what a shorter window cannot cut is not."""
    write_jsonl(setting.held, [with_symbols(tiny_documents(3, 40)) + " end"])
    loaded = ruler.load_tokenizer(setting.model)

    def words(*lengths):
        setting.overrides = [
            f"eval.tasks=[{task}]",
            f"eval.lengths={list(lengths)}",
            "eval.perplexity_stride=16",
            "eval.perplexity_tokens=400",
            "model.original_length=40",
            "eval.far_gain_tokens=16",
            "eval.far_gain_texts=3",
        ]
        recipe = setting.recipe()
        return {length: question.Questions(recipe, loaded)(task, length, {})["words"] for length in lengths}

    both = words(48, 512)
    assert both[48] == both[512]
    if task == "perplexity":
        assert both[512] != words(512)[512]
    write_jsonl(setting.held, [" ".join(tiny_documents(3, 40))])
    assert words(48, 512)[512] == words(512)[512]


@pytest.mark.parametrize(
    "name, at, seen",
    [
        ("model.safetensors", 0, True),
        ("model.safetensors", 2**21, True),
        ("model.safetensors", -1, True),
        ("model.gguf", 2**21, True),
        ("model.safetensors.index.json", 5, True),
        ("modeling.py", 5, True),
        ("config.json", 0, True),
        ("README.md", 0, False),
    ],
)
def test_fingerprint(tmp_path, name, at, seen):
    """Every byte counts, also far from both ends."""
    data = bytearray(2**22 + 100)
    (tmp_path / name).write_bytes(data)
    before = question.fingerprint(tmp_path)
    data[at] = 1
    (tmp_path / name).write_bytes(data)
    assert (question.fingerprint(tmp_path) != before) is seen
    (tmp_path / name).rename(tmp_path / f"a-{name}")
    assert name == "README.md" or question.fingerprint(tmp_path) != before


def test_fingerprint_of_one_quantization_among_several(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"1")
    before = question.fingerprint(tmp_path, "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"2")
    assert question.fingerprint(tmp_path, "a.gguf") == before != question.fingerprint(tmp_path)


def test_old_results_can_still_be_read_and_compared(tmp_path):
    """Those that are published, whose questions have other keys."""
    published = results.read(REPOSITORY / "docs/results/smollm2-ruler")
    assert len(published.found) > 10 and not published.older
    one, two = tmp_path / "seed0/tiny", tmp_path / "seed1/tiny"
    for folder in (one, two):
        path = folder / "base/eval/passkey/96.json"
        path.parent.mkdir(parents=True)
        asked = {
            "task": "passkey",
            "length": 96,
            "model": {"name_or_path": "x", "fingerprint": "f"},
            "seed": 42,
            "samples": 3,
        }
        cells = [{"depth": 0, "correct": 1, "total": 1}]
        path.write_text(
            json.dumps(
                {
                    "question": asked,
                    "date": "2026-01-01T00:00:00+00:00",
                    "scores": {"length": 96, "score": 1, "low": 0, "high": 2, "samples": 1, "cells": cells},
                }
            )
        )
    compare.check([one, two])
    path.write_text(path.read_text().replace('"samples": 3', '"samples": 4, "code": "c"'))
    with pytest.raises(compare.BadInput, match=r"passkey at 96: code, samples"):
        compare.check([one, two])


def test_the_content_of_longbench_is_that_of_its_rows(tmp_path):
    (tmp_path / "qasper.jsonl").write_text(
        "".join(json.dumps({**ROW, "input": str(number)}) + "\n" for number in range(3))
    )
    whole, first = longbench.content("qasper", tmp_path), longbench.content("qasper", tmp_path, 1)
    (tmp_path / "qasper.jsonl").write_text(
        "".join(json.dumps({**ROW, "input": str(number)}) + "\n" for number in (0, 5))
    )
    assert (
        longbench.content("qasper", tmp_path, 1) == first and longbench.content("qasper", tmp_path) != whole
    )


def test_the_tokenizer_is_its_definition_and_its_special_tokens(base, tmp_path):
    first = question.tokenizer_of(AutoTokenizer.from_pretrained(base))
    loaded = AutoTokenizer.from_pretrained(base)
    loaded.pad_token = loaded.eos_token  # as the harness does
    loaded.model_max_length = 7
    assert question.tokenizer_of(loaded) == first
    loaded.save_pretrained(tmp_path)
    assert question.tokenizer_of(AutoTokenizer.from_pretrained(tmp_path)) == first
    loaded.split_special_tokens = True
    assert question.tokenizer_of(loaded) != first and prompts.PROBE


@pytest.mark.parametrize("at", ["passkey", "passkey/64.json"])
def test_what_stands_where_a_result_belongs_is_named_before_anything_is_scored(tmp_path, at):
    path = tmp_path / at
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine") if at == "passkey" else path.mkdir()
    with pytest.raises(BadInput, match=f"{at} is .* to be written; remove it"):
        run._existing(tmp_path / "passkey/64.json", {})
    path.unlink() if at == "passkey" else path.rmdir()
    assert run._existing(tmp_path / "passkey/64.json", {}) is None
