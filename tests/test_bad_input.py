"""What a user can get wrong ends in exit code 2 and one line that names it, and leaves nothing half-written behind."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from conftest import REPOSITORY, run_main, write_jsonl

from endprompt import BadInput, config, methods, model, prepare, shards


def refused(result, *telling):
    code, _, err = result
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    assert code == 2, result
    assert len(lines) == 1 and lines[0].startswith("endprompt: "), err
    for words in telling:
        assert words in lines[0]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def out(tmp_path):
    """A folder for results, empty at the end too."""
    yield tmp_path / "out"
    assert files(tmp_path / "out") == []


# -- the recipe file ---------------------------------------------------------------------------------------------------

MODEL, LENGTHS, DATA = "model: {name_or_path: x}\n", "lengths: {physical: 64, target: 512}\n", "data: {corpus: x, tokens: 4096}\n"

RECIPE_TEXTS = [
    (b"", "mapping of sections", "NoneType"),
    (b"# nothing but words\n", "mapping of sections"),
    (b"- model\n- lengths\n", "mapping of sections", "list"),
    (b"endprompt", "mapping of sections", "str"),
    (bytes(range(256)), "UTF-8"),
    ((MODEL + LENGTHS).encode("utf-16"), "UTF-8"),
    (b"model: \0", "not valid YAML"),
    (b"model:\n\tname_or_path: x", "not valid YAML at line 2"),
    (b"model: {name_or_path: x\n", "not valid YAML at line 2"),
    (b"model: name: x", "not valid YAML at line 1"),
    (b"model: *gone", "not valid YAML at line 1", "gone"),
    (b"model: " + b"[" * 3000, "not valid YAML"),
    (b"model: !!python/object/apply:os.getcwd []", "not valid YAML at line 1", "os.getcwd"),
    ((MODEL + "---\n" + LENGTHS).encode(), "not valid YAML at line 2", "another document"),
    ((MODEL + LENGTHS + DATA + MODEL).encode(), "line 4", "'model' is given twice"),
    ((LENGTHS + DATA + "model:\n  name_or_path: x\n  name_or_path: y\n").encode(), "line 5", "'name_or_path' is given twice"),
    ((MODEL + LENGTHS + DATA + "1: 2\n").encode(), "line 4", "the key 1 is not text"),
    ((MODEL + LENGTHS + DATA + "rope:\n").encode(), "rope"),
    ((MODEL + LENGTHS + DATA + "recipe: x\n").encode(), "unknown key recipe"),
    ((MODEL + LENGTHS + DATA + "name: x\n").encode(), "unknown key name"),
    (MODEL.encode(), "lengths is missing", "data is missing"),
    ((MODEL + LENGTHS + "data: {}\n").encode(), "data.corpus is missing", "data.tokens is missing"),
    ((MODEL + LENGTHS + DATA + "train: [deepspeed]\n").encode(), "train", "dictionary"),
]


@pytest.mark.parametrize("text, telling", [(case[0], case[1:]) for case in RECIPE_TEXTS], ids=[repr(case[0][:40]) for case in RECIPE_TEXTS])
def test_recipe_text(tmp_path, out, text, telling):
    (tmp_path / "r.yaml").write_bytes(text)
    refused(run_main("prepare", tmp_path / "r.yaml", "endprompt", "--out", out), "r.yaml", *telling)


# -- one setting -------------------------------------------------------------------------------------------------------

SETTINGS = [
    # The form of --set itself.
    ("lengths", "section.key=value"),
    ("", "section.key=value"),
    ("=3", "section.key=value"),
    ("lengths.=3", "section.key=value"),
    (".target=3", "section.key=value"),
    ("lengths.target.more=3", "'target' is a value, not a section"),
    ("lengths={physical: 64", "--set lengths", "not valid YAML"),
    ("data={corpus: x, corpus: y}", "--set data", "given twice"),
    # Keys.
    ("modle.name_or_path=x", "unknown key modle", "known here: model, lengths, data, rope, train, eval"),
    ("model.name=x", "unknown key model.name;", "name_or_path"),
    ("lengths.window=64", "unknown key lengths.window", "physical, target"),
    ("data.token=64", "unknown key data.token;", "tokens"),
    ("data.pose_chunks=1", "data.pose_chunks", "greater than or equal to 2"),
    ("data.pose_chunks=two", "data.pose_chunks", "integer"),
    ("data.pose_text=later", "data.pose_text", "later_span"),
    ("data.pose_text=later_span", "data.pose_text", "set data.packing=document"),
    ("rope.factor=8", "unknown key rope.factor", "type"),
    ("eval.task=passkey", "unknown key eval.task;", "tasks"),
    ("train.learning_rat=1e-4", "unknown key train.learning_rat;", "for example learning_rate"),
    ("train.zzzz=1", "unknown key train.zzzz", "TrainingArguments"),
    # Values.
    ("lengths=64", "lengths", "dictionary"),
    ("model.name_or_path=", "model.name_or_path", "string"),
    ("model.name_or_path=''", "model.name_or_path"),
    ("model.original_length=0", "model.original_length", "greater than 0"),
    ("model.attn_implementation=flash", "model.attn_implementation", "flash_attention_2"),
    ("lengths.physical=1024", "lengths.physical 1024 is greater than lengths.target 512"),
    ("lengths.physical=1", "lengths.physical", "greater than 1"),
    ("lengths.physical=true", "lengths.physical", "integer"),
    ("lengths.target=256", "lengths.target 256 does not exceed the model's own window"),
    ("lengths.target=-512", "lengths.target", "greater than 1"),
    ("lengths.target=512.5", "lengths.target", "integer"),
    ("lengths.target='512'", "lengths.target", "integer"),
    ("lengths.target=.nan", "lengths.target", "integer"),
    ("lengths.target=4294967296", "lengths.target", "less than or equal"),
    ("data.tokens=0", "data.tokens", "greater than 0"),
    ("data.tokens=-1e9", "data.tokens", "greater than 0"),
    ("data.tokens=1.5", "data.tokens", "integer"),
    ("data.tokens=.inf", "data.tokens", "integer"),
    ("data.tokens=many", "data.tokens", "'many'"),
    ("data.tokens=63", "data.tokens: 63 tokens are less than one row of 64"),
    ("data.prompt_loss_weight=-0.1", "data.prompt_loss_weight", "greater than or equal to 0"),
    ("data.prompt_loss_weight=.nan", "data.prompt_loss_weight"),
    ("data.prompt_loss_weight=.inf", "data.prompt_loss_weight", "finite"),
    ("data.prompt_loss_weight=true", "data.prompt_loss_weight", "number"),
    ("data.end_prompts=EP_1", "data.end_prompts", "list"),
    ("data.end_prompts=[]", "data.end_prompts", "at least 1"),
    ("data.end_prompts=[' ']", "data.end_prompts", "without text"),
    ("data.end_prompts=[EP_9]", "no prompt EP_9", "EP_1, EP_2, EP_3"),
    ("data.end_prompts=[EP_1, EP_2]", "no special token <|eot_id|>"),
    (f"data.end_prompts=['{'over and out ' * 30}']", "leave no room for text"),
    ("data.packing=tight", "data.packing", "'cut' or 'document'"),
    ("data.rows_per_shard=0", "data.rows_per_shard"),
    ("data.seed=-1", "data.seed"),
    ("data.seed=4294967296", "data.seed"),
    ("rope.type=ntk", "rope.type", "linear"),
    ("eval.tasks=[rulers]", "eval.tasks", "there is no task 'rulers'", "passkey"),
    ("eval.tasks=[ruler_vt2]", "eval.tasks", "there is no task 'ruler_vt2'"),
    ("eval.tasks=passkey", "eval.tasks", "list"),
    ("eval.backend=tgi", "eval.backend", "vllm"),
    ("eval.longbench_length=1", "eval.longbench_length"),
    ("eval.short_text_samples=0", "eval.short_text_samples"),
    ("eval.tasks=[perplexity]", "eval.perplexity_corpus is missing"),
    ("eval.lengths=[]", "eval.lengths"),
    ("eval.lengths=[0]", "eval.lengths: 0 is not a length"),
    ("eval.samples=0", "eval.samples"),
    # Training arguments.
    ("train.output_dir=x", "train.output_dir is not for recipes", "--out"),
    ("train.resume_from_checkpoint=x", "train.resume_from_checkpoint is not for recipes"),
    ("train.remove_unused_columns=true", "train.remove_unused_columns is not for recipes"),
    ("train.eval_strategy=steps", "train.eval_strategy is not for recipes"),
    ("train.learning_rate=fast", "train.learning_rate", "'fast'"),
    ("train.learning_rate=0", "train.learning_rate", "greater than 0"),
    ("train.learning_rate=.nan", "train.learning_rate", "nan"),
    ("train.learning_rate=.inf", "train.learning_rate", "inf"),
    ("train.per_device_train_batch_size=-8", "train.per_device_train_batch_size", "greater than 0"),
    ("train.per_device_train_batch_size=true", "train.per_device_train_batch_size", "number"),
    ("train.per_device_train_batch_size=1.5", "train.per_device_train_batch_size", "integer"),
    ("train.gradient_checkpointing=maybe", "train.gradient_checkpointing", "boolean"),
    ("train.lr_scheduler_type=zigzag", "train.lr_scheduler_type", "constant_with_warmup"),
    ("train.optim=best", "train.optim", "adamw_torch"),
    ("train.deepspeed=ds_configs/zero4.json", "no ZeRO file ds_configs/zero4.json", "zero3_offload.json"),
    ("train.deepspeed=ds_configs", "no ZeRO file ds_configs"),
    ("train.deepspeed=3", "train.deepspeed"),
]


@pytest.mark.parametrize("setting, telling", [(case[0], case[1:]) for case in SETTINGS], ids=[case[0][:50] for case in SETTINGS])
def test_setting(recipe_file, out, setting, telling):
    refused(run_main("prepare", recipe_file(), "endprompt", "--out", out, "--workers", 1, "--set", setting), *telling)


@pytest.mark.parametrize("command", ["train", "inspect", "evaluate"])
def test_every_command_checks_the_recipe(recipe_file, out, command):
    for setting in ("lengths.physical=1024", "data.token=64"):
        refused(run_main(command, recipe_file(), "endprompt", "--out", out, "--set", setting), setting.partition("=")[0])


@pytest.mark.parametrize("text, telling", [
    (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "no mapping"), (b"{'stage': 3}", "not valid JSON"), (b"3", "no mapping")])
def test_zero_file(recipe_file, out, tmp_path, text, telling):
    (tmp_path / "zero.json").write_bytes(text)
    refused(run_main("prepare", recipe_file(), "endprompt", "--out", out, "--set", "train.deepspeed=zero.json"), "train.deepspeed", "zero.json", telling)


# -- the corpus --------------------------------------------------------------------------------------------------------

NOISE = b"".join(bytes([number * 37 % 251]) for number in range(4000))
GOOD = b'{"text": "one two three"}\n'


def parquet(values, name="text"):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(values))), name: values}), sink)
    return sink.getvalue().to_pybytes()


def damaged(data: bytes) -> bytes:
    return data[:len(data) // 2] + bytes(byte ^ 255 for byte in data[len(data) // 2:len(data) // 2 + 8]) + data[len(data) // 2 + 8:]


CORPORA = [
    ("a.jsonl", GOOD + b'{"text": \n' + GOOD, "a.jsonl line 2: not JSON"),
    ("a.jsonl", b"\n\n" + GOOD + b"plain words\n", "a.jsonl line 4: not JSON"),
    ("a.json", b'[\n {"text": "x"}\n]', "a.json line 1"),
    ("a.jsonl", b"[" * 100000, "a.jsonl line 1: not JSON"),
    ("a.jsonl", GOOD + b'["text"]\n', "a.jsonl line 2", "list"),
    ("a.jsonl", b'"text"\n', "a.jsonl line 1", "str"),
    ("a.jsonl", b'{"id": 1, "content": "x"}\n', "line 1 has no 'text'", "it has id, content"),
    ("a.jsonl", GOOD + b'{"text": null}\n', "line 2", "NoneType, not text"),
    ("a.jsonl", GOOD + b'{"text": ["x"]}\n', "line 2", "list, not text"),
    ("a.jsonl", GOOD + b'{"text": "half \\ud83d of a smile"}\n', "line 2", "surrogate"),
    ("a.jsonl", b'{"text": "\xe4"}\n', "a.jsonl", "utf-8"),
    ("a.txt", "Käse".encode("latin-1"), "a.txt", "utf-8"),
    ("a.jsonl.gz", gzip.compress(GOOD * 2000)[:60], "a.jsonl.gz", "cannot be read"),
    ("a.jsonl.gz", damaged(gzip.compress(NOISE * 4)), "a.jsonl.gz", "cannot be read"),
    ("a.jsonl.gz", GOOD, "a.jsonl.gz", "cannot be read"),
    ("a.txt.zst", zstandard.compress(os.urandom(300000).hex().encode())[:-5], "a.txt.zst", "cannot be read"),
    ("a.txt.zst", damaged(zstandard.ZstdCompressor(write_checksum=True).compress(NOISE.hex().encode())), "a.txt.zst", "cannot be read"),
    ("a.jsonl.zst", GOOD, "a.jsonl.zst", "cannot be read"),
    ("a.parquet", GOOD * 40, "a.parquet", "cannot be read"),
    ("a.parquet", b"", "a.parquet", "cannot be read"),
    ("a.parquet", parquet(["x"] * 500)[:-100], "a.parquet", "cannot be read"),
    ("a.parquet", parquet(["x"], "content"), "has no 'text'", "it has id, content"),
    ("a.parquet", parquet(["x", None]), "a.parquet row 2", "NoneType, not text"),
    ("a.parquet", parquet([b"x"]), "a.parquet row 1", "bytes, not text"),
    ("a.csv", b"text\nx\n", "a.csv is of no known kind", ".jsonl"),
    ("a.parquet.gz", gzip.compress(b"x"), "is of no known kind"),
    ("a.jsonl", GOOD, "fewer tokens than one row of 64"),
    ("a.jsonl", b"", "fewer tokens than one row of 64"),
    ("a.txt", b" \n ", "fewer tokens than one row of 64"),
]


@pytest.mark.parametrize("name, data, telling", [(*case[:2], case[2:]) for case in CORPORA], ids=[f"{case[0]} {case[1][:16]!r}" for case in CORPORA])
def test_corpus(recipe_file, tmp_path, out, name, data, telling):
    (tmp_path / name).write_bytes(data)
    refused(run_main("prepare", recipe_file(data={"corpus": str(tmp_path / name)}), "endprompt", "--out", out, "--workers", 1), *telling)


@pytest.mark.parametrize("corpus, telling", [
    ("data/none.jsonl", "no file or folder 'data/none.jsonl'"),
    ("none.txt", "no file or folder 'none.txt'"),
    ("/none", "no file or folder '/none'"),
    ("../some/where/else", "no file or folder"),
    ("~nobody-of-this-name/x", "no file or folder"),
    ("a" * 5000 + "/b/c", "no file or folder"),
    ("", "no file or folder"),
    ([], "data.corpus is empty"),
    (["some/set", "other/set"], "no file or folder 'some/set'"),
    ([5], "data.corpus"),
    ({"path": "x"}, "data.corpus"),
    ("some-user/some-set", "cannot be streamed from the hub"),  # this test is offline
], ids=str)
def test_corpus_that_is_not_there(recipe_file, out, corpus, telling):
    refused(run_main("prepare", recipe_file(data={"corpus": corpus}), "endprompt", "--out", out, "--workers", 1), telling)


def test_corpus_folder_without_text(recipe_file, tmp_path, out):
    (tmp_path / "texts/deeper").mkdir(parents=True)
    (tmp_path / "texts/deeper/README.md").write_text("x")
    refused(run_main("prepare", recipe_file(data={"corpus": str(tmp_path / "texts")}), "endprompt", "--out", out, "--workers", 1), "texts holds no", ".parquet")


def test_bad_line_behind_whole_shards(recipe_file, tmp_path, tiny_text, monkeypatch):
    """What is finished stays; when the line is mended, the run goes on from there, to the same bytes."""
    path = recipe_file(data={"rows_per_shard": 10})
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_text)
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:6], "oops", *lines[7:]]))
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 2000)  # else all documents are read before the first shard
    refused(run_main("prepare", path, "endprompt", "--out", tmp_path / "out", "--workers", 1), "corpus.jsonl line 7: not JSON")
    folder = tmp_path / "out/small/endprompt/shards"
    found = files(folder)
    assert found[0] == prepare.PROGRESS and len(found) > 2 and all(re.fullmatch(r"shard-\d{5}\.parquet", name) for name in found[1:])
    corpus.write_text("\n".join(lines))
    for out in ("out", "whole"):
        assert run_main("prepare", path, "endprompt", "--out", tmp_path / out, "--workers", 1)[0] == 0
    whole = tmp_path / "whole/small/endprompt/shards"
    assert {name: (folder / name).read_bytes() for name in files(folder)} == {name: (whole / name).read_bytes() for name in files(whole)}


# -- shards ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(recipe_file, tmp_path):
    """(recipe, out, shards folder), with 4 shards of 16 rows."""
    path = recipe_file(data={"rows_per_shard": 16})
    assert run_main("prepare", path, "endprompt", "--out", tmp_path / "out", "--workers", 1)[0] == 0
    return path, tmp_path / "out", tmp_path / "out/small/endprompt/shards"


def flip(path: Path) -> None:
    path.write_bytes(damaged(path.read_bytes()))


def in_manifest(change):
    def edit(folder):
        path = folder / shards.MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return edit


def replace_manifest(data: bytes):
    return lambda folder: (folder / shards.MANIFEST).write_bytes(data)


SHARDS = {
    "flipped": (lambda folder: flip(folder / "shard-00002.parquet"), "shard-00002.parquet is damaged"),
    "truncated": (lambda folder: os.truncate(folder / "shard-00001.parquet", 100), "shard-00001.parquet is damaged"),
    "empty": (lambda folder: os.truncate(folder / "shard-00000.parquet", 0), "shard-00000.parquet is damaged"),
    "missing": (lambda folder: (folder / "shard-00003.parquet").unlink(), "shard-00003.parquet is missing"),
    "swapped": (lambda folder: shutil.copyfile(folder / "shard-00000.parquet", folder / "shard-00001.parquet"), "shard-00001.parquet is damaged"),
    "not JSON": (replace_manifest(b'{"schema_version": 1, "sha'), "manifest.json cannot be read"),
    "binary": (replace_manifest(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "empty manifest": (replace_manifest(b""), "manifest.json cannot be read"),
    "a list": (replace_manifest(b"[1]"), "schema version"),
    "other version": (in_manifest(lambda manifest: manifest.update(schema_version=2)), "not of schema version 1"),
    "no version": (in_manifest(lambda manifest: manifest.pop("schema_version")), "not of schema version 1"),
    "no shards": (in_manifest(lambda manifest: manifest.pop("shards")), "does not list its shards"),
    "empty list": (in_manifest(lambda manifest: manifest.update(shards=[])), "does not list its shards"),
    "no checksum": (in_manifest(lambda manifest: manifest["shards"][0].pop("sha256")), "does not list its shards"),
    "no rows": (in_manifest(lambda manifest: manifest.pop("rows")), "does not list its shards"),
    "path outside": (in_manifest(lambda manifest: manifest["shards"][0].update(file="../../../corpus.jsonl")), "does not list its shards"),
    "other tokenizer": (in_manifest(lambda manifest: manifest.update(tokenizer_fingerprint="0" * 64)), "tokenizer_fingerprint is '0000"),
    "other method": (in_manifest(lambda manifest: manifest.update(method="short")), "method is 'short', expected 'endprompt'"),
    "other target": (in_manifest(lambda manifest: manifest.update(target_length=1024)), "target_length is 1024, expected 512"),
    "no seed": (in_manifest(lambda manifest: manifest.pop("seed")), "seed is None, expected 0"),
}


@pytest.mark.parametrize("command", ["inspect", "prepare", "train"])
@pytest.mark.parametrize("case", SHARDS)
def test_shards(prepared, command, case):
    path, out, folder = prepared
    damage, telling = SHARDS[case]
    damage(folder)
    before = files(out)
    refused(run_main(command, path, "endprompt", "--out", out), "shards", telling)
    assert files(out) == before


@pytest.mark.parametrize("command", ["inspect", "train"])
def test_no_manifest(prepared, command):
    path, out, folder = prepared
    (folder / shards.MANIFEST).unlink()
    refused(run_main(command, path, "endprompt", "--out", out), "manifest.json is missing", "prepare")
    refused(run_main(command, path, "short", "--out", out), "manifest.json is missing")


@pytest.mark.parametrize("command", ["inspect", "prepare", "train"])
@pytest.mark.parametrize("setting, telling", [
    ("lengths.target=1024", "target_length is 512, expected 1024"), ("lengths.physical=128", "physical_length is 64, expected 128"),
    ("data.end_prompts=[EP_3]", "EP_3"), ("data.seed=3", "seed is 0, expected 3")])
def test_shards_of_another_recipe(prepared, command, setting, telling):
    path, out, folder = prepared
    resolved = (folder.parent / "recipe.yaml").read_bytes()
    refused(run_main(command, path, "endprompt", "--out", out, "--set", setting), "shards", telling)
    assert (folder.parent / "recipe.yaml").read_bytes() == resolved


@pytest.mark.parametrize("command", ["inspect", "prepare", "train"])
def test_shards_of_another_method(prepared, command):
    path, out, folder = prepared
    folder.parent.rename(folder.parent.with_name("short"))
    refused(run_main(command, path, "short", "--out", out), "method is 'endprompt', expected 'short'")


@pytest.mark.parametrize("text", [b"not json", b"[]", b"{}", b'{"settings": 3}'])
def test_progress_that_cannot_be_read(prepared, text):
    path, out, folder = prepared
    (folder / shards.MANIFEST).unlink()
    (folder / prepare.PROGRESS).write_bytes(text)
    before = files(out)
    refused(run_main("prepare", path, "endprompt", "--out", out), "progress.json cannot be read", "delete")
    assert files(out) == before


@pytest.mark.parametrize("text, telling", [(None, "another setting (lengths.target)"), ("[", "recipe.yaml: not valid YAML"), ("", "recipe.yaml is no recipe")])
def test_run_that_was_trained_otherwise(prepared, text, telling):
    path, out, folder = prepared
    (folder.parent / "checkpoints").mkdir()
    resolved = folder.parent / "recipe.yaml"
    if text is None:
        tree = yaml.safe_load(resolved.read_text())
        tree["lengths"]["target"] = 1024
        text = yaml.safe_dump(tree)
    resolved.write_text(text)
    refused(run_main("train", path, "endprompt", "--out", out), telling)
    assert resolved.read_text() == text


# -- the model folder --------------------------------------------------------------------------------------------------


def edited(name, **values):
    """A change of a JSON file; None removes a key."""

    def edit(folder):
        tree = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))

    return edit


def without(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def mistral(**values):
    return edited("config.json", model_type="mistral", architectures=["MistralForCausalLM"], **values)


MODELS = {
    "no config": (without("config.json"), "config of"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "unsupported type": (edited("config.json", model_type="gpt2"), "type 'gpt2' is not supported", "llama, mistral, qwen2"),
    "unknown type": (edited("config.json", model_type="nonsense"), "nonsense"),
    "no type": (edited("config.json", model_type=None), "model_type"),
    "window as large as the target": (edited("config.json", max_position_embeddings=512), "does not exceed the model's own window of 512"),
    "sliding window": (mistral(sliding_window=128), "sliding window of 128"),
    "no tokenizer": (without("token*"), "tokenizer of"),
    "tokenizer not JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of"),
    "tokenizer empty": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer of"),
    "slow tokenizer": (edited("tokenizer_config.json", tokenizer_class="ByT5Tokenizer"), "no fast tokenizer"),
}


@pytest.fixture
def model_copy(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    return folder


@pytest.mark.parametrize("case", MODELS)
def test_model_folder(recipe_file, model_copy, out, case):
    damage, *telling = MODELS[case]
    damage(model_copy)
    refused(run_main("prepare", recipe_file(model={"name_or_path": str(model_copy)}), "endprompt", "--out", out, "--workers", 1), "model", *telling)


def test_tokenizer_without_end_token(recipe_file, model_copy, out):
    path = model_copy / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "eos_token": None, "extra_special_tokens": []}))
    refused(run_main("prepare", recipe_file(model={"name_or_path": str(model_copy)}), "endprompt", "--out", out, "--workers", 1), "no end-of-sequence token")


@pytest.mark.parametrize("model, telling", [
    ({"name_or_path": "/no/such/folder"}, "no folder /no/such/folder"),
    ({"name_or_path": "recipes/tiny/bass"}, "no folder recipes/tiny/bass"),
    ({"name_or_path": "./bass"}, "no folder ./bass"),
    ({"name_or_path": "two words"}, "two words"),
    ({"name_or_path": "nobody/nothing"}, "'nobody/nothing' cannot be loaded"),  # this test is offline
    ({"name_or_path": "package:no_such_package"}, "pip install no-such-package"),
    ({"name_or_path": "package:../x"}, "is not installed"),
    ({"name_or_path": "package:yaml"}, "the package 'yaml' has no file config.json"),
    ({"name_or_path": "package:yaml", "gguf_file": "some.gguf"}, "the package 'yaml' has no file some.gguf"),
    ({"gguf_file": "none.gguf"}, "has no file none.gguf"),
    ({"gguf_file": "config.json"}, "GGUF"),
])
def test_model_that_is_not_there(recipe_file, out, model, telling):
    refused(run_main("prepare", recipe_file(model=model), "endprompt", "--out", out, "--workers", 1), "model", telling)


@pytest.mark.parametrize("case, damage", [("truncated", lambda path: os.truncate(path, 1000)), ("no file", Path.unlink), ("noise", lambda path: path.write_bytes(NOISE))])
def test_weights(recipe_file, model_copy, case, damage):
    import torch

    damage(model_copy / "model.safetensors")
    recipe = config.load(recipe_file(model={"name_or_path": str(model_copy)}))
    with pytest.raises(BadInput, match="weights of .* cannot be loaded"):
        model.build(recipe, methods.get("endprompt"), torch.float32, cuda=False)


# -- the command line --------------------------------------------------------------------------------------------------


def test_method_and_recipe_that_are_not_there(recipe_file, out, tmp_path):
    refused(run_main("prepare", recipe_file(), "endpromt", "--out", out), "'endpromt'", ", ".join(methods.METHODS))
    refused(run_main("prepare", tmp_path / "none.yaml", "endprompt", "--out", out), "there is no file", "none.yaml", "recipes/")
    refused(run_main("prepare", tmp_path, "endprompt", "--out", out), "cannot be read")


@pytest.mark.parametrize("workers", [0, -3])
def test_workers(recipe_file, out, workers):
    refused(run_main("prepare", recipe_file(), "endprompt", "--out", out, "--workers", workers), f"--workers {workers}")


@pytest.mark.parametrize("row", [64, -1, 10**12])
def test_row_out_of_range(prepared, row):
    path, out, _ = prepared
    refused(run_main("inspect", path, "endprompt", "--out", out, "--row", row), f"--row {row}: the shards hold rows 0 to 63")


@pytest.mark.parametrize("command", ["prepare", "train", "inspect", "evaluate"])
@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_out_is_a_file(recipe_file, tmp_path, command, inside):
    (tmp_path / "file").write_text("mine")
    refused(run_main(command, recipe_file(), "endprompt", "--out", tmp_path / "file" / inside), "--out", "is a file")
    assert (tmp_path / "file").read_text() == "mine"


# -- the same through real processes, where nothing catches what libraries print ---------------------------------------


def test_processes(recipe_file, tmp_path, model_copy):
    edited("config.json", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})(model_copy)
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"oops\n")
    # (recipe name, sections, command, what is told)
    cases = [
        ("yaml", {"lengths": {"physical": 1024}}, ["prepare", "--workers", "2"], "greater than lengths.target"),
        ("line", {"data": {"corpus": str(tmp_path / "bad.jsonl")}}, ["prepare", "--workers", "2"], "bad.jsonl line 2: not JSON"),
        ("damaged", {}, ["inspect"], "shard-00000.parquet is damaged"),
        ("scaled", {"model": {"name_or_path": str(model_copy)}}, ["prepare"], "scaled already"),
        ("other", {"train": {"deepspeed": None}}, ["train", "--set", "data.seed=7"], "seed is 0, expected 7"),
    ]
    out = tmp_path / "out"
    paths = {name: recipe_file(name, **sections) for name, sections, _, _ in cases}
    for name in ("damaged", "other"):
        assert run_main("prepare", paths[name], "endprompt", "--out", out, "--workers", 1)[0] == 0
    flip(out / "damaged/endprompt/shards/shard-00000.parquet")
    before = files(out)
    # All at once: most of the time goes into importing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "-m", "endprompt", command[0], str(paths[name]), "endprompt", "--out", str(out), *command[1:]], cwd=REPOSITORY,
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for name, _, command, _ in cases]
    results = [process.communicate(timeout=120) for process in running]
    for (*_, telling), process, (stdout, stderr) in zip(cases, running, results, strict=True):
        refused((process.returncode, stdout, stderr), telling)
    assert [name for name in files(out) if "/.cache/" not in name] == before
