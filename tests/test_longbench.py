"""LongBench: official scores of public predictions, prompts, truncation, and environments that would give
other scores.
"""

import difflib
import gzip
import json
import types
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from test_eval import Known

from endprompt import BadInput
from endprompt.evaluation import engine, longbench, longbench_scores, score
from endprompt.recipe import task_names
from endprompt.rows import corpus

SHARED = REPOSITORY.parent / "shared/data/longbench"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return SHARED / name


# Scores


# ROUGE of long summaries takes ten to twenty seconds a task; qmsum and samsum stand for them.
LONG = ("gov_report", "multi_news", "vcsum")


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=pytest.mark.slow) if task in LONG else task for task in longbench_scores.TASKS],
)
def test_official_score_of_public_predictions(task):
    """Llama-2-7B-chat's predictions, for which the official script printed these."""
    official = json.loads(shared("predictions/official_scores.json").read_text())[task]
    assert score.score("longbench", task, shared(f"predictions/{task}.jsonl.zst")) == pytest.approx(
        official, abs=0.0051
    )


CLASSES = ["City", "Other location", "State", "Country", "Mountain", "Individual", "Title of a person"]
CASES = [  # (task, prediction, references, percent)
    ("qasper", "The cat sat.", ["the cat sat"], 100),
    ("qasper", "A cat", ["dog", "cat"], 100),
    ("qasper", "", ["cat"], 0),
    ("qasper", "the", ["an"], 0),
    ("qasper", "cat dog", ["cat"], 200 / 3),
    ("qasper", "cat cat", ["cat"], 200 / 3),
    ("qasper", "CAT!", ["cat"], 100),
    ("qasper", "naïve", ["naïve"], 100),
    ("qasper", "cat\ndog", ["cat dog"], 100),
    ("qasper", "cat", [], 0),
    ("qasper", "x\x00y", ["x\x00y"], 100),
    ("triviaqa", "\n\nParis\nQuestion: and now?", ["Paris"], 100),
    ("triviaqa", "Paris is in France\nParis", ["Paris"], 40),
    ("qasper", "Paris\nFrance", ["Paris"], 200 / 3),
    ("gov_report", "", ["a report"], 0),
    ("gov_report", "the same text", ["the same text"], 100),
    ("gov_report", "...", ["a report"], 0),
    ("samsum", "Tom is late.\nAnn: hi", ["Tom is late."], 100),
    ("passage_count", "There are 5 paragraphs", ["5"], 100),
    ("passage_count", "5 or 6", ["5"], 50),
    ("passage_count", "55", ["5"], 0),
    ("passage_count", "five", ["5"], 0),
    ("passage_count", "5, 5, 5, 4", ["5"], 75),
    ("passage_count", "", ["5"], 0),
    ("passage_retrieval_en", "Paragraph 12", ["Paragraph 12"], 100),
    ("passage_retrieval_en", "12 and 3", ["Paragraph 12"], 50),
    ("passage_retrieval_en", "Paragraph 1", ["Paragraph 12"], 0),
    ("passage_retrieval_zh", "段落12", ["段落12"], 100),
    ("multifieldqa_zh", "北京，大学", ["北京 大学"], 100),
    ("multifieldqa_zh", "北京，大学", ["北京大学"], 0),
    ("multifieldqa_zh", "", ["北京"], 0),
    ("lcc", "\n    return x", ["    return x"], 100),
    ("lcc", "# a comment\nreturn x\nreturn y", ["return x"], 100),
    ("lcc", "// a comment\n```\nreturn x", ["return x"], 100),
    ("lcc", "# only a comment", ["return x"], 0),
    ("lcc", "", ["return x"], 0),
    ("lcc", "return result", ["count += value"], 7),
    ("trec", "City", ["City"], 100),
    ("trec", "\nCity\nType: State", ["City"], 100),
    ("trec", "City or State", ["City"], 50),
    ("trec", "Other location", ["Other location"], 100),
    ("trec", "city", ["City"], 0),
    ("trec", "", ["City"], 0),
    ("trec", "a State and a Country and a City", ["State"], 100 / 3),
]


@pytest.mark.parametrize(
    "task, prediction, references, percent",
    CASES,
    ids=[f"{case[0]}-{number}" for number, case in enumerate(CASES)],
)
def test_cases_by_hand(task, prediction, references, percent):
    classes = CLASSES if task == "trec" else None
    assert longbench_scores.score(task, [prediction], [references], classes) == [
        pytest.approx(percent, abs=1e-4)
    ]


def test_class_name_within_another():
    """The original takes a name that is a part of the right one out of the list it is walking through, and so
    passes over the next one.
    """
    classes = ["Other", "location", "Other location"]
    assert longbench_scores.score("trec", ["Other location"], [["Other location"]], classes) == [50]
    assert longbench_scores.score(
        "trec", ["Other location"], [["Other location"]], ["Other", "Other location"]
    ) == [100]


@given(
    st.lists(
        st.tuples(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=3)),
        min_size=1,
        max_size=4,
    )
)
def test_scores_lie_between_none_and_all(rows):
    predictions, references = zip(*rows, strict=True)
    for task in ("qasper", "lcc", "passage_count"):
        found = longbench_scores.score(task, list(predictions), list(references))
        assert all(0 <= value <= 100.0001 for value in found)
        assert longbench_scores.number(task, list(predictions), list(references)) == pytest.approx(
            sum(found) / len(found), abs=0.0051
        )


def test_categories_of_the_paper():
    """EndPrompt's six printed columns give its printed average as the mean over 16 tasks, and not as that of
    the categories.
    """
    printed = {
        "single_doc_qa": 32.03,
        "multi_doc_qa": 30.81,
        "summarization": 26.04,
        "few_shot": 68.04,
        "synthetic": 4.54,
        "code": 66.48,
    }
    scores = {task: printed[longbench_scores.get(task).category] for task in task_names.LONGBENCH}
    found = longbench_scores.categories(scores)
    assert (
        {key: round(found[key], 2) for key in printed} == printed
        and round(found["mean_16_tasks"], 2) == 38.30
        and round(found["mean_of_categories"], 2) == 37.99
    )
    missing = longbench_scores.categories({task: value for task, value in scores.items() if task != "lcc"})
    assert (
        missing["code"] is None
        and missing["mean_16_tasks"] is None
        and missing["few_shot"] == found["few_shot"]
    )
    assert (
        longbench_scores.ENGLISH == task_names.LONGBENCH
        and longbench_scores.CHINESE == task_names.LONGBENCH_ZH
    )


# The environment


def impostor(name, **contents):
    module = types.ModuleType(name)
    for key, value in contents.items():
        setattr(module, key, value)
    return module


class OtherRouge:
    def __init__(self, **_):
        pass

    def get_scores(self, *_, **__):
        return {"rouge-l": {"f": 3 / 7}}


@pytest.mark.parametrize(
    "task, name, module, mend",
    [
        ("gov_report", "rouge", impostor("rouge", Rouge=OtherRouge), "pip uninstall -y rouge-chinese"),
        (
            "lcc",
            "fuzzywuzzy",
            impostor("fuzzywuzzy", fuzz=types.SimpleNamespace(SequenceMatcher=object, ratio=lambda *_: 7)),
            "pip uninstall -y python-Levenshtein",
        ),
        (
            "lcc",
            "fuzzywuzzy",
            impostor(
                "fuzzywuzzy",
                fuzz=types.SimpleNamespace(SequenceMatcher=difflib.SequenceMatcher, ratio=lambda *_: 30),
            ),
            "python-Levenshtein",
        ),
        (
            "multifieldqa_zh",
            "jieba",
            impostor("jieba", cut=lambda text, cut_all: list(text), setLogLevel=lambda level: None),
            "jieba==0.42.1",
        ),
    ],
)
def test_libraries_that_compute_other_scores_are_refused(monkeypatch, task, name, module, mend):
    real = longbench_scores.importlib.import_module
    monkeypatch.setattr(
        longbench_scores.importlib,
        "import_module",
        lambda wanted: module if wanted.split(".")[0] == name else real(wanted),
    )
    longbench_scores.library.cache_clear()
    try:
        with pytest.raises(BadInput, match=f"{name} .* computes other scores: .*{mend}"):
            longbench_scores.score(task, ["a"], [["a"]])
        longbench_scores.score("qasper", ["a"], [["a"]])  # needs none of them
    finally:
        longbench_scores.library.cache_clear()


def test_another_version_or_none_is_refused(monkeypatch):
    real = longbench_scores.importlib.metadata.version
    monkeypatch.setattr(longbench_scores.importlib.metadata, "version", lambda name: "2.0.0")
    longbench_scores.library.cache_clear()
    with pytest.raises(BadInput, match="need rouge 1.0.1; 2.0.0 is installed: pip install rouge==1.0.1"):
        longbench_scores.check_environment("gov_report")

    def missing(name):
        raise longbench_scores.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(longbench_scores.importlib.metadata, "version", missing)
    with pytest.raises(BadInput, match="need fuzzywuzzy 0.18.0, which is not installed"):
        longbench_scores.check_environment("lcc")
    monkeypatch.setattr(longbench_scores.importlib.metadata, "version", real)
    longbench_scores.library.cache_clear()
    longbench_scores.check_environment(*longbench_scores.TASKS)


# Prompts


@pytest.mark.parametrize("task", longbench_scores.TASKS)
def test_template_is_the_official_one(task):
    """By its checksum; and the full prompts of MiniLongBench begin and end with its words."""
    template = longbench.template(task)
    assert "{context}" in template and (
        "{input}" in template or task in ("gov_report", "multi_news", "vcsum", "passage_count", "lcc")
    )
    # MiniLongBench words these two as it words hotpotqa.
    if task in ("narrativeqa", "qasper") or not (SHARED / "minilongbench_prompts.jsonl.zst").exists():
        return
    before, after = template.split("{context}")
    rows = [row for _, row in corpus.jsonl(SHARED / "minilongbench_prompts.jsonl.zst") if row["task"] == task]
    assert rows
    for row in rows:
        prompt, (gap, _, end) = row["origin_prompt"], after.partition("{input}")
        assert prompt.startswith(before) and prompt.rstrip().endswith(end.rstrip()) and gap.strip() in prompt


def test_other_words_in_the_harness_are_refused(tmp_path, monkeypatch):
    (tmp_path / "qasper.yaml").write_text('doc_to_text: "Read this: {{context}} {{question}}"\n')
    monkeypatch.setattr(longbench, "_templates", lambda: tmp_path)
    longbench.template.cache_clear()
    try:
        with pytest.raises(BadInput, match="the prompt of qasper is not worded as in the official"):
            longbench.template("qasper")
        with pytest.raises(BadInput, match="lcc.yaml: LongBench's prompt cannot be read"):
            longbench.template("lcc")
    finally:
        longbench.template.cache_clear()


@given(st.integers(2, 60), st.integers(1, 60))
def test_truncation_keeps_both_ends(tokenizer, limit, words):
    text = " ".join(
        ("The sky is blue.", "Here we go.", "The sun is yellow.")[number % 3] for number in range(words)
    )
    ids = tokenizer(text)["input_ids"]
    cut, tokens = longbench.truncate(text, tokenizer, limit)
    if len(ids) <= limit:
        assert cut == text and tokens == len(ids)
    else:
        half = limit // 2
        assert cut == tokenizer.decode(ids[:half], skip_special_tokens=True) + tokenizer.decode(
            ids[-half:], skip_special_tokens=True
        )
        assert tokens == len(tokenizer(cut)["input_ids"]) and abs(tokens - limit) <= 4


def test_samsum_ends_at_a_newline_and_not_at_once(tokenizer):
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    assert longbench.generation_kwargs("samsum", tokenizer) == {
        "eos_token_id": [tokenizer.eos_token_id, newline],
        "min_new_tokens": 1,
    }
    assert longbench.generation_kwargs("qasper", tokenizer) == {}


# Data

ROW = {
    "input": "What?",
    "context": "The sky is blue.",
    "answers": ["blue", "Blue"],
    "length": 4,
    "dataset": "qasper",
    "language": "en",
    "all_classes": None,
    "_id": "1",
}


def folder_of(tmp_path, rows=(ROW,), name="qasper.jsonl"):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("name", ["qasper.jsonl", "qasper.jsonl.gz"])
def test_samples_of_a_folder(tmp_path, tokenizer, name):
    (found,) = longbench.samples("qasper", folder_of(tmp_path, name=name), tokenizer)
    assert (
        found["prompt"] == longbench.template("qasper").format(context=ROW["context"], input=ROW["input"])
        and not found["truncated"]
    )
    assert (found["answers"], found["all_classes"], found["length"]) == (ROW["answers"], None, 4)
    assert len(longbench.samples("qasper", folder_of(tmp_path, [ROW] * 3), tokenizer, 64, limit=2)) == 2


def test_a_whole_task_of_the_benchmark(tokenizer):
    found = longbench.samples("multi_news", shared("multi_news.jsonl.zst").parent, tokenizer, 512, limit=5)
    assert len(found) == 5 and all(
        abs(sample["tokens"] - 512) < 8 and sample["truncated"] for sample in found
    )


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda folder: (folder / "qasper.jsonl").unlink(), r"holds no qasper\.jsonl"),
        (lambda folder: (folder / "qasper.jsonl").write_text("{"), r"qasper\.jsonl line 1: not JSON"),
        (lambda folder: (folder / "qasper.jsonl").write_text("[1]\n"), "line 1: list in place of an object"),
        (
            lambda folder: (folder / "qasper.jsonl").write_text(
                json.dumps({**ROW, "answers": "blue"}) + "\n"
            ),
            "'answers' is no list of texts",
        ),
        (
            lambda folder: (folder / "qasper.jsonl").write_text(
                json.dumps({key: value for key, value in ROW.items() if key != "context"}) + "\n"
            ),
            "has no 'context'",
        ),
        (lambda folder: (folder / "qasper.jsonl").write_text(""), "holds no row of qasper"),
        (lambda folder: (folder / "qasper.jsonl").write_bytes(b"\xff\xfe"), "cannot be read"),
    ],
)
def test_damaged_data(tmp_path, tokenizer, spoil, complaint):
    folder = folder_of(tmp_path)
    spoil(folder)
    with pytest.raises(BadInput, match=complaint):
        longbench.samples("qasper", folder, tokenizer)


def test_without_data_or_network(tmp_path, tokenizer, monkeypatch):
    import huggingface_hub

    with pytest.raises(BadInput, match="longbench_data: there is no .*nowhere"):
        longbench.samples("qasper", tmp_path / "nowhere", tokenizer)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(
        BadInput, match="data.zip cannot be had from the hub .* give its folder of qasper.jsonl"
    ):
        longbench.samples("qasper", None, tokenizer)


# Through the harness


@pytest.mark.parametrize("task", ["qasper", "trec", "lcc", "samsum", "passage_retrieval_en"])
def test_known_models(base, tokenizer, tmp_path, task):
    """One that knows the answers scores 100, one that says nothing or repeats its prompt 0."""
    answer = {"trec": "City", "passage_retrieval_en": "Paragraph 3"}.get(task, "return blue")
    row = {**ROW, "answers": [answer], "all_classes": CLASSES if task == "trec" else None, "dataset": task}
    folder = folder_of(tmp_path, [row, {**row, "context": f"The sky is blue. {answer}"}], f"{task}.jsonl")
    asked = {"tokenizer": str(base), "longbench_data": str(folder), "longbench_length": 2048}
    for says, expected in (
        (lambda prompt: f"{answer}", 100),
        (lambda prompt: "", 0),
        (lambda prompt: prompt, 0),
        (lambda prompt: prompt + answer, 100),
    ):
        known = Known(says)
        found = engine.run(known, f"endprompt_longbench_{task}", asked)[f"endprompt_longbench_{task}"]
        assert [sample["score"] for sample in found] == pytest.approx([expected, expected], abs=1e-5)
        assert known.prompts == [sample["prompt"] for sample in longbench.samples(task, folder, tokenizer)]
        assert all(
            options["max_gen_toks"] == longbench_scores.get(task).new_tokens and options["do_sample"] is False
            for options in known.options
        )


def test_limits_are_the_protocols():
    """New tokens, samples, first-line rule and chat template of the 16 tasks, as the official configuration
    has them (shared/protocols.md).
    """
    limits = {
        **dict.fromkeys(task_names.LONGBENCH, 32),
        **dict.fromkeys(("gov_report", "qmsum", "multi_news"), 512),
        **dict.fromkeys(("narrativeqa", "qasper", "samsum"), 128),
        **dict.fromkeys(("multifieldqa_en", "trec", "lcc", "repobench-p"), 64),
    }
    sizes = {
        **dict.fromkeys(task_names.LONGBENCH, 200),
        "multifieldqa_en": 150,
        "lcc": 500,
        "repobench-p": 500,
    }
    about = {task: longbench_scores.get(task) for task in task_names.LONGBENCH}
    assert {task: one.new_tokens for task, one in about.items()} == limits and {
        task: one.samples for task, one in about.items()
    } == sizes
    assert {task for task, one in about.items() if one.first_line} == {"trec", "triviaqa", "samsum"}
    assert {task for task, one in about.items() if not one.chat} == {
        "trec",
        "triviaqa",
        "samsum",
        "lcc",
        "repobench-p",
    }


def test_task_files_are_all_there():
    folder = engine.TASKS / "longbench"
    for task, about in longbench_scores.TASKS.items():
        found = yaml.safe_load((folder / f"{task}.yaml").read_text().replace("!function ", ""))
        assert (
            found["task"] == f"endprompt_longbench_{task}"
            and found["generation_kwargs"]["max_gen_toks"] == about.new_tokens
        )
    assert yaml.safe_load((folder / "group.yaml").read_text())["task"] == [
        f"endprompt_longbench_{task}" for task in task_names.LONGBENCH
    ]


# The command for old prediction files


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (("glue", "sst2"), "there is no benchmark 'glue'; use ruler, longbench, passkey"),
        (("ruler", "vt2"), "ruler has no task 'vt2'"),
        (("ruler", "vt"), "line 1: there is no 'outputs'; it has pred, answers"),
        (("passkey", "passkey"), "line 1: there is no 'key'"),
        (("longbench", "trec"), "trec needs 'all_classes'"),
    ],
)
def test_score_refuses(tmp_path, capsys, arguments, complaint):
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps({"pred": "a", "answers": ["a"]}) + "\n")
    with pytest.raises(SystemExit) as stopped:
        score.main([*arguments, str(path)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out and err.count("\n") == 1 and complaint in err


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", "holds no prediction"),
        ("{", "not JSON"),
        ("3\n", "int, not an object"),
        ('{"pred": 3, "answers": ["a"]}\n', "'pred' is not what"),
        ('{"pred": "a", "answers": []}\n', "'answers' is not what"),
        (None, "there is no file"),
    ],
)
def test_score_refuses_files(tmp_path, capsys, text, complaint):
    path = tmp_path / "predictions.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        score.main(["longbench", "qasper", str(path)])
    assert stopped.value.code == 2 and complaint in capsys.readouterr().err


def test_score_prints_one_number(tmp_path, capsys):
    path = tmp_path / "predictions.jsonl"
    path.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"pred": "X is 1", "outputs": ["1", "2"]},
                {"pred": None, "outputs": ["1"]},
                {"pred": "b A", "output": "a"},
            )
        )
    )
    score.main(["ruler", "vt", str(path)])
    assert capsys.readouterr().out == "50.0\n"
    score.main(["ruler", "qa_1", str(path)])
    assert capsys.readouterr().out == "66.67\n"
    path.write_text('{"pred": " 12345.", "key": "12345"}\n{"pred": "", "key": "12345"}\n')
    score.main(["passkey", "passkey", str(path)])
    assert capsys.readouterr().out == "50.0\n"
