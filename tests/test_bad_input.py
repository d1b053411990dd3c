"""What a user can get wrong ends in exit code 2 and one line that names it, and leaves nothing half-written
behind.
"""

import gzip
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from conftest import REPOSITORY, run_main, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from endprompt import BadInput, methods, storage
from endprompt.bases import model
from endprompt.recipe import former_keys, schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows import corpus, parts, prepare, shards, tokenizing
from endprompt.runs import launch


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


# -- the recipe file -----------------------------------------------------------------------------------------

MODEL, LENGTHS, DATA = (
    "model: {name_or_path: x}\n",
    "lengths: {physical: 64, target: 512}\n",
    "data: {corpus: x, tokens: 4096}\n",
)

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
    (
        (LENGTHS + DATA + "model:\n  name_or_path: x\n  name_or_path: y\n").encode(),
        "line 5",
        "'name_or_path' is given twice",
    ),
    ((MODEL + LENGTHS + DATA + "1: 2\n").encode(), "line 4", "the key 1 is not text"),
    ((MODEL + LENGTHS + DATA + "rope:\n").encode(), "rope"),
    ((MODEL + LENGTHS + DATA + "recipe: x\n").encode(), "unknown key recipe"),
    ((MODEL + LENGTHS + DATA + "name: x\n").encode(), "unknown key name"),
    (MODEL.encode(), "lengths is missing", "data is missing"),
    ((MODEL + LENGTHS + "data: {}\n").encode(), "data.corpus is missing", "data.tokens is missing"),
    ((MODEL + LENGTHS + DATA + "train: [deepspeed]\n").encode(), "train", "dictionary"),
    ((MODEL + LENGTHS + DATA + "folder: /\n").encode(), "unknown key folder"),
    ((MODEL + LENGTHS + DATA + "eval: &e {tasks: *e}\n").encode(), "refers to itself"),
    ((MODEL + LENGTHS + DATA + "train: &t {deepspeed: *t}\n").encode(), "refers to itself"),
    (
        b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 20)),
        "more than 100000 values",
    ),
    (b"model: " + b"[" * 40 + b"]" * 40, "nested more than 32 deep"),
    (b"? &a [1, *a]\n: 2", "not valid YAML at line 1"),
    (b"<<: {model: 1}", "not valid YAML at line 1"),
    (b"model: {name_or_path: 2026-01-02}", "date", "quote it"),
    (b"model: {name_or_path: 2026-13-45}", "not valid YAML", "month"),
    (b"model: {name_or_path: !!binary aGVsbG8=}", "bytes"),
    (b"model: {name_or_path: !!binary x}", "not valid YAML"),
    (b"model: !!set {a, b}", "set"),
    (b"model: !!omap [a: 1]", "tuple"),
    (b"model: !!int x", "not valid YAML", "invalid literal"),
    (b"model: !!int ''", "not valid YAML"),
    (b"model: !!map [a]", "not valid YAML"),
    (b"model: !!timestamp x", "not valid YAML"),
    (b"model: !unknown x", "not valid YAML at line 1"),
    (b"%YAML 9.9\n--- a", "incompatible YAML document"),
    (b'model: {name_or_path: "\\ud83d"}', "surrogate"),
    (b'model: {name_or_path: "\\UFFFFFFFF"}', "not valid YAML"),
    (b"data: {tokens: " + b"9" * 5000 + b"}", "not valid YAML", "5000 digits"),
    (b"# " + b"x" * 2**20, "larger than 1048576 bytes"),
]


@pytest.mark.parametrize(
    "text, telling",
    [(case[0], case[1:]) for case in RECIPE_TEXTS],
    ids=[repr(case[0][:40]) for case in RECIPE_TEXTS],
)
def test_recipe_text(tmp_path, out, text, telling):
    (tmp_path / "r.yaml").write_bytes(text)
    refused(run_main("prepare", tmp_path / "r.yaml", "endprompt", "--out", out), "r.yaml", *telling)


NAMES = [
    "..",
    ".",
    "",
    " ",
    "../up",
    "/root",
    "a/b",
    "a\\b",
    "a\0b",
    "a\nb",
    ".hidden",
    "-n",
    " a",
    "a ",
    "x" * 201,
    "ä" * 101,
    "\x1b[2J",
    5,
    None,
    True,
    ["a"],
    {"a": 1},
    1.5,
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_name_of_a_resolved_copy(recipe_file, tmp_path, out, name):
    path = recipe_file()
    path.write_text(path.read_text() + yaml.safe_dump({"recipe": name, "method": "endprompt"}))
    refused(
        run_main("prepare", path, "endprompt", "--out", out / "deeper"),
        "small.yaml: recipe:",
        "cannot name the folder of results",
        "plain name",
    )
    assert files(tmp_path) == ["corpus.jsonl", "small.yaml"]


FILE_NAMES = ["...yaml", ".hidden.yaml", ".yaml", "-n.yaml", " .yaml", "a\nb.yaml", "x" * 240 + ".yaml"]


@pytest.mark.parametrize("name", FILE_NAMES, ids=repr)
def test_name_of_a_recipe_file(recipe_file, tmp_path, out, name):
    refused(
        run_main("prepare", recipe_file().rename(tmp_path / name), "endprompt", "--out", out),
        "recipe: the file's name",
        "plain name",
    )


def fifo(path):
    os.mkfifo(path)


def listening(path):
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as server,
    ):  # a socket's own path must be short
        server.bind(f"{folder}/s")
        os.rename(f"{folder}/s", path)


def loop(path):
    path.symlink_to(path.name)


def device(path):
    path.symlink_to("/dev/zero")


SPECIAL_RECIPES = {
    "pipe": (fifo, "no regular file"),
    "socket": (listening, "no regular file"),
    "device": (device, "no regular file"),
    "folder": (Path.mkdir, "cannot be read"),
    "link to itself": (loop, "cannot be read"),
    "link to nothing": (lambda path: path.symlink_to("gone"), "there is no file"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", SPECIAL_RECIPES)
def test_recipe_that_is_no_file(tmp_path, out, case):
    make, telling = SPECIAL_RECIPES[case]
    make(tmp_path / "r.yaml")
    refused(run_main("prepare", tmp_path / "r.yaml", "endprompt", "--out", out), "r.yaml", telling)


# -- one setting ---------------------------------------------------------------------------------------------

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
    (
        "modle.name_or_path=x",
        "unknown key modle",
        "known here: model, lengths, data, method_options, rope, train",
    ),
    ("model.name=x", "unknown key model.name;", "name_or_path"),
    ("lengths.window=64", "unknown key lengths.window", "physical, target"),
    ("data.token=64", "unknown key data.token;", "tokens"),
    ("method_options.pose_chunks=3", "endprompt has no such option", "end_prompts, prompt_loss_weight"),
    ("method_options.pose.end_prompts=[EP_1]", "pose has no such option", "pose_chunks, pose_text"),
    ("method_options.endprompt=3", "method_options.endprompt: 3 is no section"),
    ("method_options.pose=[]", "method_options.pose: [] is no section"),
    ("method_options.poes.pose_chunks=3", "method_options.poes", "end_prompts, prompt_loss_weight"),
    ("method_options=3", "method_options", "dictionary"),
    ("method_options=null", "method_options", "dictionary"),
    ("rope.factor=8", "unknown key rope.factor", "type, theta, long_factor, sharpen"),
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
    ("data.prompt_loss_weight=-0.1", "method_options.prompt_loss_weight", "greater than or equal to 0"),
    ("data.prompt_loss_weight=.nan", "method_options.prompt_loss_weight"),
    ("data.prompt_loss_weight=.inf", "method_options.prompt_loss_weight", "finite"),
    ("data.prompt_loss_weight=true", "method_options.prompt_loss_weight", "number"),
    ("data.end_prompts=EP_1", "method_options.end_prompts", "list"),
    ("data.end_prompts=[]", "method_options.end_prompts", "at least 1"),
    ("data.end_prompts=[' ']", "method_options.end_prompts", "without text"),
    ("data.end_prompts=[EP_9]", "no prompt EP_9", "EP_1, EP_2, EP_3"),
    ("data.end_prompts=[EP_1, EP_2]", "no special token <|eot_id|>"),
    (f"data.end_prompts=['{'over and out ' * 30}']", "leave no room for text"),
    ("data.packing=tight", "data.packing", "'cut' or 'document'"),
    ("data.rows_per_shard=0", "data.rows_per_shard"),
    ("data.seed=-1", "data.seed"),
    ("data.seed=4294967296", "data.seed"),
    ("rope.type=cubic", "rope.type", "linear"),
    ("rope.type=dynamic", "rope.type", "rope.type=ntk"),
    ("eval.tasks=[rulers]", "eval.tasks", "there is no task 'rulers'", "passkey"),
    ("eval.tasks=[ruler_vt2]", "eval.tasks", "there is no task 'ruler_vt2'"),
    ("eval.tasks=passkey", "eval.tasks", "list"),
    ("eval.backend=tgi", "eval.backend", "vllm"),
    ("eval.longbench_length=1", "eval.longbench_length"),
    ("eval.short_text_samples=0", "eval.short_text_samples"),
    ("eval.short_text_shots=-1", "eval.short_text_shots"),
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
    # More of the form of --set.
    ("lengths..target=3", "section.key=value"),
    ("a." * 40 + "b=1", "section.key=value"),
    ("model.name_or_path.x=1", "'name_or_path' is a value, not a section"),
    ("model.name_or_path=[", "--set model.name_or_path", "not valid YAML"),
    ("model.name_or_path=!!python/name:os.system", "not valid YAML"),
    ("model.name_or_path=2026-01-02", "date", "quote it"),
    ("model.name_or_path=a\0b", "not valid YAML"),
    ("model.name_or_path=\udcff", "is no UTF-8 text"),
    ("data.tokens=" + "9" * 5000, "not valid YAML"),
    ("data.tokens=9223372036854775808", "data.tokens", "less than"),
    ("recipe=../x", "unknown key recipe"),
    ("name=x", "unknown key name"),
    ("folder=/", "unknown key folder"),
    # More of keys and values.
    ("model=null", "model", "dictionary"),
    ("data=[]", "data", "dictionary"),
    ("model.trust_remote_code=yes please", "model.trust_remote_code", "boolean"),
    ("model.trust_remote_code=1", "model.trust_remote_code", "boolean"),
    ("model.trust_remote_code=null", "model.trust_remote_code", "boolean"),
    ("model.original_length=64.0", "model.original_length", "integer"),
    ("model.revision=1", "model.revision", "string"),
    ("lengths.physical=null", "lengths.physical", "integer"),
    ("data.corpus=null", "data.corpus"),
    ("data.text_column=[text]", "data.text_column", "string"),
    ("data.end_prompts=[1]", "method_options.end_prompts", "string"),
    ("data.end_prompts={EP_1: 1}", "method_options.end_prompts", "list"),
    ("data.rows_per_shard=1.5", "data.rows_per_shard", "integer"),
    ("data.seed=true", "data.seed", "integer"),
    ("eval.lengths=[64, x]", "eval.lengths", "integer"),
    ("eval.lengths=64", "eval.lengths", "list"),
    ("eval.samples=-1", "eval.samples", "greater than 0"),
    ("eval.depths=0", "eval.depths", "greater than 0"),
    ("eval.seed=-1", "eval.seed"),
    ("eval.run_unsafe_code=1", "eval.run_unsafe_code", "boolean"),
    ("eval.perplexity_stride=0", "eval.perplexity_stride"),
    ("rope.type=[linear]", "rope.type"),
    ("rope={}=1", "--set rope", "not valid YAML"),
    ("train.sequence_parallel=0", "train.sequence_parallel", "from 1 on"),
    ("train.sequence_parallel=true", "train.sequence_parallel", "from 1 on"),
    ("train.base_share=1", "train.base_share", "below 1"),
    ("train.base_share=-0.1", "train.base_share", "below 1"),
    ("train.base_share=true", "train.base_share", "a number"),
    ("train.base_share=half", "train.base_share", "a number"),
    ("train.base_share=.nan", "train.base_share", "a number"),
    ("train.lora=8", "train.lora"),
    ("train.lora.r=0", "train.lora.r", "greater than 0"),
    ("train.lora.rank=8", "unknown key train.lora.rank", "known here: r, alpha"),
    ("train.lora.targets=[lm_head]", "train.lora.targets", "q_proj"),
    ("train.lora.dropout=1", "train.lora.dropout", "less than 1"),
    ("train.save_steps=0", "train.save_steps", "greater than 0"),
    ("train.warmup_steps=soon", "train.warmup_steps"),
    (
        "train.deepspeed={zero_optimization: 3}",
        "train.deepspeed: zero_optimization is no mapping with a stage",
    ),
    (
        "train.deepspeed={zero_optimization: {stage: 4}}",
        "train.deepspeed: zero_optimization",
        "stage from 0 to 3",
    ),
    ("train.deepspeed={zero_optimization: {stage: '3'}}", "train.deepspeed: zero_optimization"),
    ("train.deepspeed={zero_optimization: {stage: true}}", "train.deepspeed: zero_optimization"),
]


@pytest.mark.parametrize(
    "setting, telling", [(case[0], case[1:]) for case in SETTINGS], ids=[case[0][:50] for case in SETTINGS]
)
def test_setting(recipe_file, out, setting, telling):
    refused(
        run_main("prepare", recipe_file(), "endprompt", "--out", out, "--workers", 1, "--set", setting),
        *telling,
    )


# Options of one method: (method, its option, value, telling).
OPTIONS = [
    ("pose", "pose_chunks", "1", "greater than or equal to 2"),
    ("pose", "pose_chunks", "two", "integer"),
    ("pose", "pose_text", "later", "later_span"),
    ("pose_recall", "recall_share", "0", "greater than 0"),
    ("pose_recall", "recall_share", "0.6", "less than or equal to 0.5"),
    ("pose_recall", "recall_cue", "0", "greater than 0"),
    ("pose_matched", "match_pieces", "6", "no power of two"),
    ("pose_matched", "match_pieces", "1", "greater than or equal to 2"),
    ("pose_matched", "match_tokens", "0", "greater than 0"),
    ("pose_recall", "recall_tokens", "1.5", "integer"),
    ("longlora", "s2_group_size", "1", "greater than 1"),
]


@pytest.mark.parametrize("method, key, value, telling", OPTIONS)
def test_option(recipe_file, out, method, key, value, telling):
    """By its name, by its former key, and under its method's name, then in a recipe of any method."""
    former = "model" if key == "s2_group_size" else "data"
    path, own = recipe_file(), ("--out", out, "--workers", 1, "--set")
    for section in ("method_options", former):
        said = run_main("prepare", path, method, *own, f"{section}.{key}={value}")
        refused(said, f"method_options.{key}: ", telling)
    said = run_main("prepare", path, "endprompt", *own, f"method_options.{method}.{key}={value}")
    refused(said, f"method_options.{method}.{key}: ", telling)


def test_text_of_a_later_span_without_documents(recipe_file, out):
    for section in ("method_options", "data"):
        setting = f"{section}.pose_text=later_span"
        said = run_main("prepare", recipe_file(), "pose", "--out", out, "--workers", 1, "--set", setting)
        refused(said, "method_options.pose_text", "set data.packing=document")


@pytest.mark.parametrize("command", ["train", "inspect", "evaluate"])
def test_every_command_checks_the_recipe(recipe_file, out, command):
    for setting in ("lengths.physical=1024", "data.token=64"):
        refused(
            run_main(command, recipe_file(), "endprompt", "--out", out, "--set", setting),
            setting.partition("=")[0],
        )


@pytest.mark.parametrize(
    "text, telling",
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "no mapping"),
        (b"{'stage': 3}", "not valid JSON"),
        (b"3", "no mapping"),
        (b"[" * 100000, "not valid JSON"),
        (b'{"zero_optimization": []}', "zero_optimization is no mapping"),
        (b'{"zero_optimization": {"stage": 9}}', "stage from 0 to 3"),
        (b" " * 2**20 + b"{}", "larger than"),
    ],
)
def test_zero_file(recipe_file, out, tmp_path, text, telling):
    (tmp_path / "zero.json").write_bytes(text)
    refused(
        run_main("prepare", recipe_file(), "endprompt", "--out", out, "--set", "train.deepspeed=zero.json"),
        "train.deepspeed",
        "zero.json",
        telling,
    )


# -- the corpus ----------------------------------------------------------------------------------------------

NOISE = b"".join(bytes([number * 37 % 251]) for number in range(4000))
GOOD = b'{"text": "one two three"}\n'


def parquet(values, name="text"):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": list(range(len(values))), name: values}), sink)
    return sink.getvalue().to_pybytes()


def damaged(data: bytes) -> bytes:
    return (
        data[: len(data) // 2]
        + bytes(byte ^ 255 for byte in data[len(data) // 2 : len(data) // 2 + 8])
        + data[len(data) // 2 + 8 :]
    )


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
    (
        "a.txt.zst",
        zstandard.compress(random.Random(1).randbytes(300000).hex().encode())[:-5],
        "a.txt.zst",
        "cannot be read",
    ),
    (
        "a.txt.zst",
        damaged(zstandard.ZstdCompressor(write_checksum=True).compress(NOISE.hex().encode())),
        "a.txt.zst",
        "cannot be read",
    ),
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
    ("a.jsonl", GOOD.decode().encode("utf-16"), "a.jsonl", "utf-8"),
    ("a.jsonl", GOOD + b'{"text": "cut', "a.jsonl line 2: not JSON"),
    ("a.jsonl", GOOD + b'{"text": 1e999}\n', "line 2", "float, not text"),
    ("a.jsonl", b"\x1f\x8b" + GOOD, "a.jsonl", "utf-8"),
    ("a.jsonl", b"9" * 5000 + b"\n", "a.jsonl line 1: not JSON"),
    ("a.txt.gz", b"", "fewer tokens than one row of 64"),
    ("a.jsonl.gz", gzip.compress(GOOD * 50) + b"trailing words", "a.jsonl.gz", "cannot be read"),
    ("a.jsonl.zst", b"", "fewer tokens than one row of 64"),
    ("a.jsonl.zst", zstandard.compress(GOOD * 50) + b"trailing words", "a.jsonl.zst", "cannot be read"),
    ("a.txt.zst", zstandard.compress(b"\xff" * 50), "a.txt.zst", "utf-8"),
    ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "a.parquet", "cannot be read"),
    ("a.parquet", parquet([["x"], ["y"]]), "a.parquet row 1", "list, not text"),
    (
        "a.parquet",
        damaged(parquet([f"word {number}" * 50 for number in range(500)])),
        "a.parquet",
        "cannot be read",
    ),
    ("a", GOOD, "is of no known kind"),
    ("a.jsonl.bz2", GOOD, "is of no known kind"),
]


@pytest.mark.parametrize(
    "name, data, telling",
    [(*case[:2], case[2:]) for case in CORPORA],
    ids=[f"{number} {case[0]}" for number, case in enumerate(CORPORA)],
)
def test_corpus(recipe_file, tmp_path, out, name, data, telling):
    (tmp_path / name).write_bytes(data)
    refused(
        run_main(
            "prepare",
            recipe_file(data={"corpus": str(tmp_path / name)}),
            "endprompt",
            "--out",
            out,
            "--workers",
            1,
        ),
        *telling,
    )


@pytest.mark.parametrize(
    "corpus, telling",
    [
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
    ],
    ids=str,
)
def test_corpus_that_is_not_there(recipe_file, out, corpus, telling):
    refused(
        run_main("prepare", recipe_file(data={"corpus": corpus}), "endprompt", "--out", out, "--workers", 1),
        telling,
    )


def test_corpus_folder_without_text(recipe_file, tmp_path, out):
    (tmp_path / "texts/deeper").mkdir(parents=True)
    (tmp_path / "texts/deeper/README.md").write_text("x")
    refused(
        run_main(
            "prepare",
            recipe_file(data={"corpus": str(tmp_path / "texts")}),
            "endprompt",
            "--out",
            out,
            "--workers",
            1,
        ),
        "texts holds no",
        ".parquet",
    )


def in_folder(make, name="b.jsonl"):
    """A corpus folder with a good file and what ``make`` puts beside it."""

    def made(path):
        path.mkdir()
        (path / "a.jsonl").write_bytes(GOOD * 100)
        make(path / name)

    return made


SPECIAL_CORPORA = {
    "pipe": ("c.jsonl", fifo, "c.jsonl is no regular file"),
    "pipe.gz": ("c.txt.gz", fifo, "c.txt.gz is no regular file"),
    "parquet pipe": ("c.parquet", fifo, "c.parquet is no regular file"),
    "socket": ("c.jsonl", listening, "c.jsonl is no regular file"),
    "device": ("c.txt", device, "c.txt is no regular file"),
    "device by name": ("c", lambda path: path.symlink_to("/dev/urandom"), "is of no known kind"),
    "link to nothing": ("c.jsonl", lambda path: path.symlink_to("gone.jsonl"), "no file or folder"),
    "link to itself": ("c.jsonl", loop, "no file or folder"),
    "pipe in a folder": ("c", in_folder(fifo), "b.jsonl is no regular file"),
    "socket in a folder": ("c", in_folder(listening), "b.jsonl is no regular file"),
    "device in a folder": ("c", in_folder(device), "b.jsonl is no regular file"),
    "link to nothing in a folder": (
        "c",
        in_folder(lambda path: path.symlink_to("gone.jsonl")),
        "b.jsonl is a link to nothing",
    ),
    "link to itself in a folder": ("c", in_folder(loop), "b.jsonl is a link to nothing"),
    "folders alone": ("c", lambda path: (path / "a.jsonl").mkdir(parents=True), "holds no"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", SPECIAL_CORPORA)
def test_corpus_that_is_no_file(recipe_file, tmp_path, out, case):
    name, make, telling = SPECIAL_CORPORA[case]
    make(tmp_path / name)
    refused(
        run_main(
            "prepare",
            recipe_file(data={"corpus": str(tmp_path / name)}),
            "endprompt",
            "--out",
            out,
            "--workers",
            1,
        ),
        "data.corpus",
        telling,
    )
    recipe = recipe_file(eval={"tasks": ["perplexity"], "perplexity_corpus": str(tmp_path / name)})
    refused(
        run_main("evaluate", recipe, "base", "--out", out, "--model", REPOSITORY / "recipes/tiny/base"),
        "eval.perplexity_corpus",
        telling,
    )


@pytest.mark.timeout(60)
def test_a_circle_of_folders_is_passed_over(recipe_file, tmp_path):
    in_folder(lambda path: path.symlink_to("."), "again")(tmp_path / "c")
    code, _, err = run_main(
        "prepare",
        recipe_file(data={"corpus": str(tmp_path / "c"), "tokens": 640}),
        "endprompt",
        "--out",
        tmp_path / "out",
        "--workers",
        1,
    )
    assert code == 0 and "again is a link to a folder and passed over" in err


LONG = {
    "a.jsonl": lambda: b'{"text": "' + b"x" * 2**24,
    "a.txt": lambda: b"x" * 2**24,
    "b.jsonl": lambda: GOOD + b" " * 2**24,
    "a.jsonl.gz": lambda: gzip.compress(b"x" * 2**26, 1),
    "a.txt.gz": lambda: gzip.compress(b"x" * 2**26, 1),
    "a.jsonl.zst": lambda: zstandard.compress(b"x" * 2**28),
    "a.txt.zst": lambda: zstandard.compress(b"x" * 2**28),
    "a.parquet": lambda: parquet(["x" * 2**20]),
    "c.jsonl": lambda: b'{"text": "' + b"x" * 2**19 + b'"}',
}


@pytest.mark.parametrize("name", LONG)
def test_a_line_without_end_is_not_read_to_the_end(recipe_file, tmp_path, out, monkeypatch, name):
    monkeypatch.setattr(corpus, "LONGEST", 2**18)
    monkeypatch.setattr(corpus, "PIECE", 2**16)
    (tmp_path / name).write_bytes(LONG[name]())
    path = recipe_file(data={"corpus": str(tmp_path / name)})
    run_main(
        "prepare", path, "endprompt", "--out", out, "--workers", 1
    )  # what is imported on first use is not counted
    tracemalloc.start()
    try:
        refused(
            run_main("prepare", path, "endprompt", "--out", out, "--workers", 1),
            name,
            "longer than 262144 characters",
        )
        assert tracemalloc.get_traced_memory()[1] < (2**27 if name.endswith(".zst") else 2**23)
    finally:
        tracemalloc.stop()


def test_bad_line_behind_whole_shards(recipe_file, tmp_path, tiny_text, monkeypatch):
    """What is finished stays; with the line mended it is another corpus, which is said, and prepared anew."""
    path = recipe_file(data={"rows_per_shard": 10})
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_text)
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join([*lines[:6], "oops", *lines[7:]]))
    monkeypatch.setattr(
        tokenizing, "BATCH_CHARACTERS", 2000
    )  # else all documents are read before the first shard
    refused(
        run_main("prepare", path, "endprompt", "--out", tmp_path / "out", "--workers", 1),
        "corpus.jsonl line 7: not JSON",
    )
    folder = tmp_path / "out/small/endprompt/shards"
    found = files(folder)
    assert (
        found[0] == parts.PROGRESS
        and len(found) > 2
        and all(re.fullmatch(r"shard-\d{5}\.parquet", name) for name in found[1:])
    )
    corpus.write_text("\n".join(lines))
    refused(
        run_main("prepare", path, "endprompt", "--out", tmp_path / "out", "--workers", 1),
        "the corpus changed since",
        "corpus.jsonl has",
        "delete the folder",
    )
    assert files(folder) == found
    shutil.rmtree(folder)
    for out in ("out", "whole"):
        assert run_main("prepare", path, "endprompt", "--out", tmp_path / out, "--workers", 1)[0] == 0
    whole = tmp_path / "whole/small/endprompt/shards"
    assert {name: (folder / name).read_bytes() for name in files(folder)} == {
        name: (whole / name).read_bytes() for name in files(whole)
    }


# -- shards --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory, base, tiny_text):
    folder = tmp_path_factory.mktemp("prepared")
    corpus = write_jsonl(folder / "corpus.jsonl", tiny_text)
    tree = {
        "model": {"name_or_path": str(base)},
        "lengths": {"physical": 64, "target": 512},
        "data": {"corpus": str(corpus), "tokens": 4096, "rows_per_shard": 16},
        "train": {"deepspeed": str(REPOSITORY / "ds_configs/zero3.json"), "per_device_train_batch_size": 8},
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(tree))
    assert (
        run_main("prepare", folder / "small.yaml", "endprompt", "--out", folder / "out", "--workers", 1)[0]
        == 0
    )
    return folder


@pytest.fixture
def prepared(prepared_once, tmp_path):
    """(recipe, out, shards folder), with 4 shards of 16 rows."""
    shutil.copytree(prepared_once / "out", tmp_path / "out")
    return prepared_once / "small.yaml", tmp_path / "out", tmp_path / "out/small/endprompt/shards"


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


def special_manifest(make):
    def replace(folder):
        (folder / shards.MANIFEST).unlink()
        make(folder / shards.MANIFEST)

    return replace


def in_shard(**values):
    """A change of the second shard's entry in the manifest."""
    return in_manifest(lambda manifest: manifest["shards"][1].update(values))


def listed_anew(folder, number=1):
    """Makes the manifest agree with the shard's file, as whoever edits both would."""
    path = folder / f"shard-{number:05d}.parquet"

    def change(manifest):
        entry = manifest["shards"][number]
        entry |= {"sha256": storage.sha256(path), "bytes": path.stat().st_size}

    in_manifest(change)(folder)


def rewritten(change, relist=True):
    """A change of the second shard's table; its checksum in the manifest follows."""

    def edit(folder):
        path = folder / "shard-00001.parquet"
        pq.write_table(change(pq.read_table(path)), path)
        listed_anew(folder)

    return edit


def column(name, change):
    """``rewritten``, with the Python list of ``name``'s values changed in place."""

    def replace(table):
        values = table[name].to_pylist()
        values = change(values) or values
        return table.set_column(
            table.schema.get_field_index(name), name, pa.array(values, table.schema.field(name).type)
        )

    return rewritten(replace)


def at(row, *items):
    """Sets values[row][index] = value of each (index, value)."""

    def change(values):
        for index, value in items:
            values[row][index] = value

    return change


def swapped_lengths(values):
    values[3].append(1)
    values[4].pop()


def linked(folder):
    path = folder / "shard-00001.parquet"
    shutil.copy(path.rename(folder.parent / "elsewhere"), folder.parent / "copy")
    path.symlink_to(folder.parent / "elsewhere")


def bytes_of_shard(change):
    def edit(folder):
        path = folder / "shard-00001.parquet"
        path.write_bytes(change(path.read_bytes()))
        listed_anew(folder)

    return edit


SHARDS = {
    "flipped": (lambda folder: flip(folder / "shard-00002.parquet"), "shard-00002.parquet is damaged"),
    "truncated": (
        lambda folder: os.truncate(folder / "shard-00001.parquet", 100),
        "shard-00001.parquet is damaged",
    ),
    "empty": (
        lambda folder: os.truncate(folder / "shard-00000.parquet", 0),
        "shard-00000.parquet is damaged",
    ),
    "missing": (lambda folder: (folder / "shard-00003.parquet").unlink(), "shard-00003.parquet is missing"),
    "swapped": (
        lambda folder: shutil.copyfile(folder / "shard-00000.parquet", folder / "shard-00001.parquet"),
        "shard-00001.parquet is damaged",
    ),
    "not JSON": (replace_manifest(b'{"schema_version": 1, "sha'), "manifest.json cannot be read"),
    "binary": (replace_manifest(b"\xff\xfe\x00"), "manifest.json cannot be read"),
    "empty manifest": (replace_manifest(b""), "manifest.json cannot be read"),
    "a list": (replace_manifest(b"[1]"), "schema version"),
    "other version": (
        in_manifest(lambda manifest: manifest.update(schema_version=2)),
        "not of schema version 1",
    ),
    "no version": (in_manifest(lambda manifest: manifest.pop("schema_version")), "not of schema version 1"),
    "no shards": (in_manifest(lambda manifest: manifest.pop("shards")), "does not list its shards"),
    "empty list": (in_manifest(lambda manifest: manifest.update(shards=[])), "does not list its shards"),
    "no checksum": (
        in_manifest(lambda manifest: manifest["shards"][0].pop("sha256")),
        "does not list its shards",
    ),
    "no rows": (in_manifest(lambda manifest: manifest.pop("rows")), "does not list its shards"),
    "path outside": (
        in_manifest(lambda manifest: manifest["shards"][0].update(file="../../../corpus.jsonl")),
        "does not list its shards",
    ),
    "other tokenizer": (
        in_manifest(lambda manifest: manifest.update(tokenizer_fingerprint="0" * 64)),
        "tokenizer_fingerprint is '0000",
    ),
    "other method": (
        in_manifest(lambda manifest: manifest.update(method="short")),
        "method is 'short', expected 'endprompt'",
    ),
    "other target": (
        in_manifest(lambda manifest: manifest.update(target_length=1024)),
        "target_length is 1024, expected 512",
    ),
    "no seed": (in_manifest(lambda manifest: manifest.pop("seed")), "seed is None, expected 0"),
    "null": (replace_manifest(b"null"), "schema version"),
    "nested": (replace_manifest(b"[" * 100000), "nested too deep"),
    "utf-16": (
        lambda folder: (folder / shards.MANIFEST).write_text(
            (folder / shards.MANIFEST).read_text(), "utf-16"
        ),
        "manifest.json cannot be read",
    ),
    "huge": (lambda folder: os.truncate(folder / shards.MANIFEST, storage.JSON_BYTES + 1), "larger than"),
    "a folder": (special_manifest(Path.mkdir), "manifest.json cannot be read"),
    "a pipe": (special_manifest(fifo), "no regular file"),
    "a device": (special_manifest(device), "no regular file"),
    "digits": (replace_manifest(b'{"schema_version": ' + b"1" * 5000 + b"}"), "manifest.json cannot be read"),
    "true version": (
        in_manifest(lambda manifest: manifest.update(schema_version=True)),
        "not of schema version 1",
    ),
    "float version": (
        in_manifest(lambda manifest: manifest.update(schema_version=1.0)),
        "not of schema version 1",
    ),
    "text for rows": (
        in_manifest(lambda manifest: manifest.update(rows="64")),
        "rows is '64', no positive whole number",
    ),
    "no number of rows": (in_manifest(lambda manifest: manifest.update(rows=float("nan"))), "rows is nan"),
    "true rows": (in_manifest(lambda manifest: manifest.update(rows=True)), "rows is True"),
    "other sum of rows": (
        in_manifest(lambda manifest: manifest.update(rows=65)),
        "rows is 65, but its shards have 64",
    ),
    "null tokens": (in_manifest(lambda manifest: manifest.update(tokens=None)), "tokens is None"),
    "negative tokens": (in_manifest(lambda manifest: manifest.update(tokens=-1)), "tokens is -1"),
    "no target": (in_manifest(lambda manifest: manifest.pop("target_length")), "target_length is None"),
    "shards a mapping": (
        in_manifest(lambda manifest: manifest.update(shards={"0": manifest["shards"][0]})),
        "does not list its shards",
    ),
    "shards of text": (
        in_manifest(lambda manifest: manifest.update(shards=[shard["file"] for shard in manifest["shards"]])),
        "does not list its shards",
    ),
    "a shard twice": (in_shard(file="shard-00000.parquet"), "does not list its shards, each once"),
    "negative rows of a shard": (in_shard(rows=-16), "does not list its shards"),
    "no rows in a shard": (in_shard(rows=0), "does not list its shards"),
    "half a row": (in_shard(rows=16.0), "does not list its shards"),
    "text for rows of a shard": (in_shard(rows="16"), "does not list its shards"),
    "list for a file": (in_shard(file=["shard-00001.parquet"]), "does not list its shards"),
    "no file": (in_shard(file=None), "does not list its shards"),
    "absolute path": (in_shard(file="/etc/passwd"), "does not list its shards"),
    "the folder": (in_shard(file=".."), "does not list its shards"),
    "path with dots": (in_shard(file="./shard-00001.parquet"), "does not list its shards"),
    "NUL in a file": (in_shard(file="shard-00001.parquet\0"), "does not list its shards"),
    "another file": (in_shard(file="manifest.json"), "does not list its shards"),
    "short checksum": (in_shard(sha256="0" * 63), "does not list its shards"),
    "number for a checksum": (in_shard(sha256=5), "does not list its shards"),
    "text for bytes": (in_shard(bytes="many"), "does not list its shards"),
    "rows moved between shards": (
        in_manifest(
            lambda manifest: [manifest["shards"][0].update(rows=17), manifest["shards"][1].update(rows=15)]
        ),
        "holds 16 rows, the manifest says 17",
    ),
    "a link": (linked, "shard-00001.parquet is a link"),
    "a link to nothing": (
        lambda folder: [
            (folder / "shard-00001.parquet").unlink(),
            (folder / "shard-00001.parquet").symlink_to("gone"),
        ],
        "shard-00001.parquet is a link",
    ),
    "a folder for a shard": (
        lambda folder: [(folder / "shard-00001.parquet").unlink(), (folder / "shard-00001.parquet").mkdir()],
        "shard-00001.parquet is missing",
    ),
    "a pipe for a shard": (
        lambda folder: [(folder / "shard-00001.parquet").unlink(), fifo(folder / "shard-00001.parquet")],
        "shard-00001.parquet is missing",
    ),
    # From here the checksum in the manifest is that of the file.
    "noise": (bytes_of_shard(lambda data: NOISE), "shard-00001.parquet is no Parquet file"),
    "empty file": (bytes_of_shard(lambda data: b""), "shard-00001.parquet is no Parquet file"),
    "cut file": (bytes_of_shard(lambda data: data[:-100]), "shard-00001.parquet is no Parquet file"),
    "JSON": (bytes_of_shard(lambda data: GOOD), "shard-00001.parquet is no Parquet file"),
    "missing column": (
        rewritten(lambda table: table.drop_columns(["loss_weights"])),
        "other columns than schema version 1 ('loss_weights')",
    ),
    "more columns": (
        rewritten(lambda table: table.append_column("more", table["text_length"])),
        "other columns than schema version 1 ('more')",
    ),
    "column twice": (
        rewritten(lambda table: table.append_column("text_length", table["text_length"])),
        "other columns than schema version 1",
    ),
    "other type": (
        rewritten(
            lambda table: table.set_column(0, "input_ids", table["input_ids"].cast(pa.list_(pa.int64())))
        ),
        "other columns than schema version 1 ('input_ids')",
    ),
    "no list": (
        rewritten(lambda table: table.set_column(0, "input_ids", table["text_length"])),
        "other columns than schema version 1 ('input_ids')",
    ),
    "other schema": (
        rewritten(lambda table: pa.table({"text": ["x"] * 16})),
        "other columns than schema version 1",
    ),
    "a row less": (rewritten(lambda table: table.slice(1)), "holds 15 rows, the manifest says 16"),
    "no row": (rewritten(lambda table: table.slice(0, 0)), "holds 0 rows, the manifest says 16"),
}

# What only reading the rows tells; `prepare` leaves it to those who use them.
ROWS = {
    "null list": (column("input_ids", lambda values: values.__setitem__(2, None)), "input_ids has nulls"),
    "null in a list": (column("position_ids", at(2, (5, None))), "position_ids has nulls"),
    "null length": (
        column("text_length", lambda values: values.__setitem__(0, None)),
        "text_length has nulls",
    ),
    "null name": (column("prompt_name", lambda values: values.__setitem__(0, None)), "prompt_name has nulls"),
    "null document": (column("document_ids", at(0, (0, None))), "document_ids has nulls"),
    "positions fall": (column("position_ids", at(2, (5, 3))), "row 18: its positions do not increase"),
    "positions stand still": (
        column("position_ids", at(15, (5, 4))),
        "row 31: its positions do not increase",
    ),
    "position beyond the target": (
        column("position_ids", at(0, (-1, 512))),
        "row 16: its positions leave 0..511",
    ),
    "negative position": (column("position_ids", at(3, (0, -1))), "row 19: its positions leave 0..511"),
    "negative token": (column("input_ids", at(4, (7, -7))), "row 20: it has a negative token id"),
    "weight that is no number": (
        column("loss_weights", at(5, (3, float("nan")))),
        "row 21: it has a loss weight",
    ),
    "negative weight": (column("loss_weights", at(5, (3, -1.0))), "row 21: it has a loss weight"),
    "infinite weight": (column("loss_weights", at(5, (3, float("inf")))), "row 21: it has a loss weight"),
    "fewer tokens than positions": (
        column("input_ids", lambda values: values[6].pop() and None),
        "row 22: input_ids and position_ids are not equally long",
    ),
    "tokens of the next row": (
        column("input_ids", swapped_lengths),
        "row 19: input_ids and position_ids are not equally long",
    ),
    "fewer weights": (
        column("loss_weights", lambda values: values[6].clear()),
        "row 22: loss_weights and position_ids are not equally long",
    ),
    "lengths that do not add up": (
        column("text_length", lambda values: values.__setitem__(1, 3)),
        "row 17: text_length and prompt_length do not add up",
    ),
    "negative length": (
        column("prompt_length", lambda values: values.__setitem__(1, -3)),
        "row 17: text_length and prompt_length do not add up",
    ),
    "a row without tokens": (
        rewritten(
            lambda table: pa.Table.from_pylist(
                [
                    *table.slice(0, 15).to_pylist(),
                    {
                        **table.to_pylist()[15],
                        "input_ids": [],
                        "position_ids": [],
                        "loss_weights": [],
                        "text_length": 0,
                        "prompt_length": 0,
                    },
                ],
                table.schema,
            )
        ),
        "row 31: it has no tokens",
    ),
    "text that is not UTF-8": (
        rewritten(
            lambda table: table.set_column(
                5,
                "prompt_name",
                pa.Array.from_buffers(
                    pa.string(),
                    16,
                    [None, pa.py_buffer(np.arange(17, dtype=np.int32) * 2), pa.py_buffer(b"\xc3\x28" * 16)],
                ),
            )
        ),
        "shard-00001.parquet cannot be read",
    ),
    "damaged pages": (
        bytes_of_shard(lambda data: data[:200] + bytes(byte ^ 255 for byte in data[200:1200]) + data[1200:]),
        "shard-00001.parquet",
    ),
    "other sum of tokens": (
        in_manifest(lambda manifest: manifest.update(tokens=4000)),
        "4096 tokens, the manifest says 64 and 4000",
    ),
}


@pytest.mark.parametrize("command", ["inspect", "train"])
@pytest.mark.parametrize("case", ROWS)
def test_rows(prepared, command, case):
    path, out, folder = prepared
    damage, telling = ROWS[case]
    damage(folder)
    before = files(out)
    refused(run_main(command, path, "endprompt", "--out", out), "shards", telling)
    assert files(out) == before


def test_training_reads_the_rows_of_the_same_shards_once(prepared, monkeypatch):
    from endprompt.training import dataset

    path, out, folder = prepared
    experiment, calls, check = Experiment.of(schema.load(path), "endprompt", out), [], shards.check_rows
    monkeypatch.setattr(shards, "check_rows", lambda *arguments: calls.append(check(*arguments)))
    for _ in range(2):
        dataset.load_rows(experiment, verify=True)
    assert len(calls) == 1
    ROWS["positions fall"][0](folder)
    with pytest.raises(BadInput, match="row 18: its positions do not increase"):
        dataset.load_rows(experiment, verify=True)


@pytest.mark.timeout(60)
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
@pytest.mark.parametrize(
    "setting, telling",
    [
        ("lengths.target=1024", "target_length is 512, expected 1024"),
        ("lengths.physical=128", "physical_length is 64, expected 128"),
        ("data.end_prompts=[EP_3]", "EP_3"),
        ("data.seed=3", "seed is 0, expected 3"),
    ],
)
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


PART_OF_A_ROW = "are 0.125 rows of 512, which full_length trains on; make"


@pytest.mark.parametrize("options", [[], ["--dry-run"], ["--part", "1/2"]])
def test_rows_of_which_no_step_can_be_made_are_not_prepared(recipe_file, out, options):
    one = recipe_file(train={"per_device_train_batch_size": 1})
    refused(run_main("prepare", one, "full_length", "--out", out, *options), PART_OF_A_ROW, "a multiple of 8")


def test_a_dry_run_of_training_counts_its_rows_and_others_do_not(recipe_file, out):
    one = recipe_file(train={"per_device_train_batch_size": 1})
    refused(run_main("train", one, "full_length", "--out", out, "--dry-run"), PART_OF_A_ROW)
    for command, method in (("evaluate", "full_length"), ("prepare", "short"), ("prepare", "base")):
        assert run_main(command, one, method, "--out", out, "--dry-run")[0] == 0
    eight = ["--set", "train.gradient_accumulation_steps=8"]  # whatever the number of ranks
    assert run_main("prepare", one, "full_length", "--out", out, "--dry-run", *eight)[0] == 0


def progress(**changes):
    """What ``prepare`` leaves after the second shard, changed; a function of (settings, shards)."""
    return lambda expected, listed: json.dumps(
        {
            "settings": expected,
            "shards": listed[:2],
            "document": 10,
            "offset": 3,
            "text_tokens": 1,
            "prompt_tokens": 1,
            **changes,
        }
    ).encode()


PROGRESS = [
    b"not json",
    b"[]",
    b"{}",
    b'{"settings": 3}',
    b"\xff",
    b"[" * 100000,
    progress(shards=3),
    progress(shards=[{"file": "../../corpus.jsonl", "rows": 1, "sha256": "0" * 64}]),
    progress(document="ten"),
    progress(document=-1),
    progress(offset=1.5),
    progress(text_tokens=None),
    progress(shards=["shard-00000.parquet"]),
]


@pytest.mark.parametrize(
    "text",
    PROGRESS,
    ids=[
        repr(text)[:30] if isinstance(text, bytes) else f"changed {number}"
        for number, text in enumerate(PROGRESS)
    ],
)
def test_progress_that_cannot_be_read(prepared, text):
    path, out, folder = prepared
    manifest = json.loads((folder / shards.MANIFEST).read_text())
    if not isinstance(text, bytes):
        experiment = Experiment.of(schema.load(path), "endprompt", out)
        text = text(prepare.settings(experiment), manifest["shards"])
    (folder / shards.MANIFEST).unlink()
    (folder / parts.PROGRESS).write_bytes(text)
    before = files(out)
    refused(run_main("prepare", path, "endprompt", "--out", out), "progress.json cannot be read", "delete")
    assert files(out) == before


def checkpoint(run, step=2, whole=True):
    """A checkpoint of ``run``, or what a kill leaves of one, as far as its setting is concerned."""
    folder = run / f"checkpoints/checkpoint-{step}"
    folder.mkdir(parents=True)
    if whole:
        (folder / "complete.json").write_text('{"files": {}}')


@pytest.fixture
def trains(monkeypatch):
    """Where a training would begin, the command ends with these words."""
    from endprompt.training import run as train

    monkeypatch.setattr(train, "train", lambda *_: (_ for _ in ()).throw(BadInput("it went on to training")))
    return "it went on to training"


@pytest.mark.parametrize(
    "left, telling",
    [
        (lambda run: (run / "checkpoints").mkdir(), None),  # the Trainer's, before its first step
        (lambda run: checkpoint(run, whole=False), None),
        (lambda run: checkpoint(run, 4), "delete its checkpoints/ to start anew (the shards stay)"),
        (lambda run: (run / "model").mkdir(), "delete its model/ to start anew"),
        (lambda run: (checkpoint(run), (run / "model").mkdir()), "delete its checkpoints/ and model/ to"),
    ],
)
def test_a_setting_is_free_until_something_was_trained_under_it(prepared, trains, left, telling):
    path, out, folder = prepared
    left(folder.parent)
    lower = run_main("train", path, "endprompt", "--out", out, "--set", "train.learning_rate=0.001")
    refused(lower, *(["another setting (train.learning_rate)", telling] if telling else [trains]))


@pytest.mark.parametrize(
    "key, value",
    [
        ("ddp_timeout", 60),
        ("log_level", "info"),
        ("log_level_replica", "error"),
        ("log_on_each_node", False),
        ("logging_first_step", True),
        ("logging_strategy", "epoch"),
        ("save_steps", 3),
        ("dataloader_num_workers", 2),
        ("dataloader_pin_memory", False),
        ("dataloader_prefetch_factor", 4),
        ("dataloader_persistent_workers", True),
        ("dataloader_multiprocessing_context", "spawn"),
        ("torch_empty_cache_steps", 10),
    ],
)
def test_what_does_not_change_the_training_may_change_in_the_midst_of_it(prepared, trains, key, value):
    path, out, folder = prepared
    checkpoint(folder.parent)
    again = ["--set", f"train.{key}={json.dumps(value)}", "--set", "train.dataloader_num_workers=2"]
    refused(run_main("train", path, "endprompt", "--out", out, *again), trains)


@pytest.mark.parametrize(
    "text, telling",
    [
        (None, "another setting (lengths.target)"),
        ("[", "recipe.yaml: not valid YAML"),
        ("", "recipe.yaml is no recipe"),
        ("model: [1]", "recipe.yaml is no recipe"),
        ("train: x", "recipe.yaml is no recipe"),
        ("a: &a [*a]", "recipe.yaml: it holds"),
    ],
)
def test_run_that_was_trained_otherwise(prepared, text, telling):
    path, out, folder = prepared
    checkpoint(folder.parent)
    resolved = folder.parent / "recipe.yaml"
    if text is None:
        tree = yaml.safe_load(resolved.read_text())
        tree["lengths"]["target"] = 1024
        text = yaml.safe_dump(tree)
    resolved.write_text(text)
    refused(run_main("train", path, "endprompt", "--out", out), telling)
    assert resolved.read_text() == text


@pytest.mark.parametrize(
    "key, changed",
    [
        (None, None),
        ("model.trust_remote_code", None),
        ("model.trust_remote_code", True),
        ("method_options", None),
        ("method_options.prompt_loss_weight", 0.5),
    ],
)
def test_run_from_before_a_key_came(prepared, trains, key, changed):
    """What a resolved copy does not say was at its default then."""
    path, out, folder = prepared
    checkpoint(folder.parent)
    tree = yaml.safe_load((folder.parent / "recipe.yaml").read_text())
    if key:
        section, _, name = key.partition(".")
        inner = tree["method_options"]["endprompt"] if section == "method_options" else tree[section]
        inner.pop(name) if name else tree.pop(section)
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(tree))
    setting = ["--set", f"{key}={json.dumps(changed)}"] if changed else []
    refused(
        run_main("train", path, "endprompt", "--out", out, *setting),
        f"another setting ({key})" if changed else trains,
    )


def zero_file(path, **zero):
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}, "wall_clock_breakdown": False}))
    return path


@pytest.fixture
def trained(prepared_once, prepared, tmp_path):
    """(what follows ``train`` and a recipe's path, the run's folder, the ZeRO file of its training)."""
    path, out, folder = prepared
    zero = zero_file(tmp_path / "zero.json", offload_param=None)
    again = [path, "endprompt", "--out", out, "--set", f"train.deepspeed={zero}"]
    assert run_main("prepare", *again, "--workers", 1)[0] == 0
    checkpoint(folder.parent)
    return again, folder.parent, zero


@pytest.mark.parametrize(
    "changed, telling",
    [
        ({}, None),
        ({"overlap_comm": True}, "another setting (train.deepspeed.zero_optimization.overlap_comm)"),
        ({"stage": 2}, "another setting (train.deepspeed.zero_optimization.stage)"),
        ({"offload_param": {"device": "cpu"}}, "(train.deepspeed.zero_optimization.offload_param.device)"),
    ],
)
def test_a_zero_file_that_changed_is_told_by_what_it_holds(trained, trains, changed, telling):
    again, run, zero = trained
    zero_file(zero, **changed)
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.is_file()}
    refused(run_main("train", *again), telling or trains)
    assert telling is None or before == {path: path.read_bytes() for path in before}


def test_the_same_zero_options_may_stand_elsewhere_and_report_more(trained, trains):
    again, run, zero = trained
    other = zero_file(zero.with_name("other.json"))
    other.write_text(json.dumps({**json.loads(other.read_text()), "comms_logger": {"enabled": False}}))
    refused(run_main("train", *again[:-1], f"train.deepspeed={other}"), trains)
    inside = json.dumps({"zero_optimization": {"stage": 3}})
    refused(run_main("train", *again[:-1], f"train.deepspeed={inside}"), trains)
    refused(run_main("train", *again[:-1], "train.deepspeed=null"), "another setting (train.deepspeed)")


def test_a_run_from_before_zero_files_were_kept_is_known_by_the_file_s_name(trained, trains):
    again, run, zero = trained
    (run / "deepspeed.json").unlink()
    zero_file(zero, overlap_comm=True)
    refused(run_main("train", *again), trains)
    assert not (run / "deepspeed.json").exists()  # what was refused leaves nothing
    other = zero_file(zero.with_name("other.json"))
    refused(run_main("train", *again[:-1], f"train.deepspeed={other}"), "another setting (train.deepspeed)")


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100000])
def test_a_kept_zero_file_that_cannot_be_read(trained, text):
    again, run, _ = trained
    (run / "deepspeed.json").write_text(text)
    refused(run_main("train", *again), "deepspeed.json cannot be read; delete it")
    (run / "deepspeed.json").unlink()
    (run / "deepspeed.json").mkdir()
    refused(run_main("train", *again), "deepspeed.json is no file; restore it")


def test_run_from_before_methods_had_options(prepared, trains):
    """Its recipe.yaml names all options, in the sections of the recipe, as every one did."""
    path, out, folder = prepared
    checkpoint(folder.parent)
    tree = yaml.safe_load((folder.parent / "recipe.yaml").read_text())
    del tree["method_options"]
    for section in former_keys.FORMER:
        tree[section] |= {key: WHOLE[section][key] for key in former_keys.FORMER[section]}
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(tree))

    def again(*options):
        return run_main("train", path, "endprompt", "--out", out, *options)

    refused(again(), trains)
    refused(again("--set", "model.s2_group_size=64"), trains)  # which it does not have
    for section in ("data", "method_options"):
        other = again("--set", f"{section}.prompt_loss_weight=0.5")
        refused(other, "another setting (method_options.prompt_loss_weight)")


# -- the model folder ----------------------------------------------------------------------------------------


def edited(name, **values):
    """A change of a JSON file; None removes a key."""

    def edit(folder):
        tree = {**json.loads((folder / name).read_text()), **values}
        (folder / name).write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return edit


def without(*patterns):
    return lambda folder: [path.unlink() for pattern in patterns for path in folder.glob(pattern)]


def mistral(**values):
    return edited("config.json", model_type="mistral", architectures=["MistralForCausalLM"], **values)


def special_file(name, make):
    def replace(folder):
        (folder / name).unlink()
        make(folder / name)

    return replace


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(
        b"cos\nmkdir\n(S'opened'\ntR."
    )  # a pickle that makes a folder where it is read


def adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "someone/elses-model", "r": 8})
    )


def weights(change):
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return edit


MODELS = {
    "no config": (without("config.json"), "config of"),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "unsupported type": (
        edited("config.json", model_type="gpt2"),
        "type 'gpt2' is not supported",
        "llama, mistral, mixtral, qwen2",
    ),
    "unknown type": (edited("config.json", model_type="nonsense"), "nonsense"),
    "no type": (edited("config.json", model_type=None), "model_type"),
    "window as large as the target": (
        edited("config.json", max_position_embeddings=512),
        "does not exceed the model's own window of 512",
    ),
    "sliding window": (mistral(sliding_window=128), "sliding window of 128"),
    "no tokenizer": (without("token*"), "tokenizer of"),
    "tokenizer not JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of"),
    "tokenizer empty": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer of"),
    "slow tokenizer": (edited("tokenizer_config.json", tokenizer_class="ByT5Tokenizer"), "no fast tokenizer"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "config of"),
    "config not UTF-8": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config of"),
    "config a folder": (special_file("config.json", Path.mkdir), "config.json is no regular file"),
    "config a pipe": (special_file("config.json", fifo), "config.json is no regular file"),
    "config a link to nothing": (
        special_file("config.json", lambda path: path.symlink_to("gone")),
        "a link to nothing",
    ),
    "weights a pipe": (special_file("model.safetensors", fifo), "model.safetensors is no regular file"),
    "tokenizer a device": (special_file("tokenizer.json", device), "tokenizer.json is no regular file"),
    "text for sizes": (edited("config.json", hidden_size="64"), "config of"),
    "text for the window": (edited("config.json", max_position_embeddings="256"), "config of"),
    "negative window": (edited("config.json", max_position_embeddings=-1), "model"),
    "list for RoPE": (edited("config.json", rope_parameters=[1]), "config of"),
    "text for rope_theta": (
        edited("config.json", rope_parameters={"rope_type": "default", "rope_theta": "big"}),
        "model",
    ),
    "negative rope_theta": (
        edited("config.json", rope_parameters={"rope_type": "default", "rope_theta": -1.0}),
        "model",
    ),
    "number for the type": (edited("config.json", model_type=5), "model"),
    "tokenizer a list": (lambda folder: (folder / "tokenizer.json").write_text("[1]"), "tokenizer of"),
    "tokenizer cut": (lambda folder: os.truncate(folder / "tokenizer.json", 3000), "tokenizer of"),
    "tokenizer settings a list": (
        lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
        "tokenizer of",
    ),
    "unknown tokenizer model": (edited("tokenizer.json", model={"type": "Nonsense"}), "tokenizer of"),
    "tokenizer of another model": (
        edited("config.json", vocab_size=100),
        "the tokenizer of",
        "embeddings for 0 to 99 alone",
        "its own tokenizer",
    ),
    "pickled weights": (
        pickled,
        "weights in pytorch_model.bin alone",
        "must be safetensors",
        "convert them once",
    ),
    "attention from the hub": (
        edited("config.json", _attn_implementation="someone/kernel:attend"),
        "asks for attention by 'someone/kernel:attend'",
    ),
    "number for attention": (edited("config.json", _attn_implementation=5), "asks for attention by 5"),
    "text for a sliding window": (mistral(sliding_window="long"), "model"),
    "an adapter": (adapter, "is an adapter, not a whole model", "merge_and_unload"),
}


@pytest.fixture
def model_copy(base, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    return folder


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MODELS)
def test_model_folder(recipe_file, model_copy, out, case):
    damage, *telling = MODELS[case]
    damage(model_copy)
    refused(
        run_main(
            "prepare",
            recipe_file(model={"name_or_path": str(model_copy)}),
            "endprompt",
            "--out",
            out,
            "--workers",
            1,
        ),
        "model",
        *telling,
    )


def test_tokenizer_without_end_token(recipe_file, model_copy, out):
    path = model_copy / "tokenizer_config.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({**tree, "eos_token": None, "extra_special_tokens": []}))
    refused(
        run_main(
            "prepare",
            recipe_file(model={"name_or_path": str(model_copy)}),
            "endprompt",
            "--out",
            out,
            "--workers",
            1,
        ),
        "no end-of-sequence token",
    )


# What is told of the same folders as --model of `endprompt evaluate`, and more that only the weights show.
SCORED = {
    case: MODELS[case]
    for case in (
        "config a pipe",
        "weights a pipe",
        "tokenizer a device",
        "pickled weights",
        "an adapter",
        "attention from the hub",
        "number for attention",
    )
} | {
    "negative size": (edited("config.json", intermediate_size=-1), "negative dimension"),
    "padding beyond the words": (edited("config.json", pad_token_id=10**6), "cannot be loaded"),
    "no config": (without("config.json"), "cannot be loaded"),
    "config not JSON": (MODELS["config not JSON"][0], "not a valid JSON file"),
    "config a list": (MODELS["config a list"][0], "cannot be loaded"),
    "config of text": (lambda folder: (folder / "config.json").write_text('"llama"'), "cannot be loaded"),
    "unknown type": (edited("config.json", model_type="nonsense"), "nonsense"),
    "no tokenizer": (without("token*"), "cannot be loaded"),
    "tokenizer not JSON": (MODELS["tokenizer not JSON"][0], "cannot be loaded"),
    "unknown tokenizer model": (MODELS["unknown tokenizer model"][0], "cannot be loaded"),
    "slow tokenizer": (MODELS["slow tokenizer"][0], "no fast tokenizer"),
    "tokenizer of another model": (MODELS["tokenizer of another model"][0], "embeddings for 0 to 99 alone"),
    "empty folder": (without("*"), "cannot be loaded"),
    "no weights": (without("model.safetensors"), "cannot be loaded"),
    "weights cut": (lambda folder: os.truncate(folder / "model.safetensors", 5000), "cannot be loaded"),
    "weights empty": (lambda folder: os.truncate(folder / "model.safetensors", 0), "cannot be loaded"),
    "weights of noise": (
        lambda folder: (folder / "model.safetensors").write_bytes(NOISE),
        "cannot be loaded",
    ),
    "weights in a wrong shape": (
        weights(
            lambda tensors: tensors.update(
                {"model.norm.weight": tensors["model.norm.weight"][:-1].contiguous()}
            )
        ),
        "model.norm.weight is [",
        "by config.json",
    ),
    "wider by config": (edited("config.json", intermediate_size=1000), "by config.json"),
    "more layers by config": (edited("config.json", num_hidden_layers=9), "lack ['model.layers."),
    "more words by config": (edited("config.json", vocab_size=60000), "by config.json"),
    "lost weights": (
        weights(lambda tensors: tensors.pop("model.norm.weight")),
        "lack ['model.norm.weight']",
        "random values",
    ),
    "no such activation": (edited("config.json", hidden_act="nonsense"), "cannot be loaded"),
    "no heads": (edited("config.json", num_attention_heads=0), "cannot be loaded"),
    "index without its files": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}})
            ),
        ],
        "cannot be loaded",
    ),
    "index not JSON": (
        lambda folder: [
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors.index.json").write_text("{"),
        ],
        "cannot be loaded",
    ),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", SCORED)
def test_model_to_score(recipe_file, model_copy, out, tmp_path, monkeypatch, case):
    damage, *telling = SCORED[case]
    damage(model_copy)
    monkeypatch.chdir(tmp_path)
    refused(
        run_main("evaluate", recipe_file(), "endprompt", "--out", out, "--model", model_copy),
        "--model",
        *telling,
    )
    assert not (tmp_path / "opened").exists(), "the pickle was read"


MODEL_NAMES = [
    ("", "it is empty"),
    ("/no/such/folder", "there is no folder /no/such/folder"),
    ("./none", "there is no folder none"),
    ("~nobody-of-this-name/x", "no folder"),
    ("x" * 5000, "no folder"),
    ("a\0b", "no folder"),
    ("small.yaml", "it is a file"),
    ("ring", "no folder"),
    ("two words", "cannot be loaded"),
    ("../../..", "cannot be loaded"),
    ("nobody/nothing", "cannot be loaded"),
    ("a/b/c/d", "cannot be loaded"),
]


@pytest.mark.parametrize("name, telling", MODEL_NAMES, ids=[name[:20] for name, _ in MODEL_NAMES])
def test_name_of_a_model_to_score(recipe_file, tmp_path, out, monkeypatch, name, telling):
    monkeypatch.chdir(tmp_path)
    loop(tmp_path / "ring")
    refused(
        run_main("evaluate", recipe_file(), "endprompt", "--out", out, "--model", name), "--model", telling
    )


MODEL_SETTINGS = [
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
    ({"name_or_path": str(REPOSITORY / "README.md")}, "README.md is no folder"),
    ({"name_or_path": "package:"}, "is not installed"),
    ({"name_or_path": "package:yaml", "gguf_file": "../x.gguf"}, "is a path"),
    ({"name_or_path": "package:os"}, "is not installed"),
    ({"name_or_path": "a\0b"}, "cannot be loaded"),
    ({"name_or_path": "x" * 5000}, "cannot be loaded"),
    ({"name_or_path": "https://example.com/model"}, "no folder https://"),
    ({"revision": "../x", "name_or_path": "nobody/nothing"}, "cannot be loaded"),
]


@pytest.mark.parametrize("model, telling", MODEL_SETTINGS, ids=[str(case[0])[:60] for case in MODEL_SETTINGS])
def test_model_that_is_not_there(recipe_file, out, model, telling):
    refused(
        run_main("prepare", recipe_file(model=model), "endprompt", "--out", out, "--workers", 1),
        "model",
        telling,
    )


@pytest.mark.parametrize(
    "case, damage",
    [
        ("truncated", lambda path: os.truncate(path, 1000)),
        ("no file", Path.unlink),
        ("noise", lambda path: path.write_bytes(NOISE)),
    ],
)
def test_weights(recipe_file, model_copy, case, damage):
    import torch

    damage(model_copy / "model.safetensors")
    recipe = schema.load(recipe_file(model={"name_or_path": str(model_copy)}))
    experiment = Experiment.of(recipe, "endprompt")
    with pytest.raises(BadInput, match="weights of .* cannot be loaded"):
        model.build(experiment.base, experiment.scaling, torch.float32, cuda=False)


# -- the command line ----------------------------------------------------------------------------------------


def test_method_and_recipe_that_are_not_there(recipe_file, out, tmp_path):
    refused(
        run_main("prepare", recipe_file(), "endpromt", "--out", out), "'endpromt'", ", ".join(methods.METHODS)
    )
    refused(
        run_main("prepare", tmp_path / "none.yaml", "endprompt", "--out", out),
        "there is no file",
        "none.yaml",
        "recipes/",
    )
    refused(run_main("prepare", tmp_path, "endprompt", "--out", out), "cannot be read")


@pytest.mark.parametrize("workers", [0, -3, 1025, 10**9])
def test_workers(recipe_file, out, workers):
    refused(
        run_main("prepare", recipe_file(), "endprompt", "--out", out, "--workers", workers),
        f"--workers {workers}",
    )


@pytest.mark.parametrize("row", [64, -1, 10**12, -(10**30)])
def test_row_out_of_range(prepared, row):
    path, out, _ = prepared
    refused(
        run_main("inspect", path, "endprompt", "--out", out, "--row", row),
        f"--row {row}: the shards hold rows 0 to 63",
    )


@pytest.mark.parametrize("command", ["prepare", "train", "inspect", "evaluate"])
@pytest.mark.parametrize("inside", ["", "deeper/still"])
def test_out_is_a_file(recipe_file, tmp_path, command, inside):
    (tmp_path / "file").write_text("mine")
    refused(
        run_main(command, recipe_file(), "endprompt", "--out", tmp_path / "file" / inside),
        "--out",
        "is a file",
    )
    assert (tmp_path / "file").read_text() == "mine"


ARGUMENTS = [
    [],
    ["prepare"],
    ["prepare", "r.yaml"],
    ["fly", "r.yaml", "endprompt"],
    ["prepare", "r.yaml", "endprompt", "more"],
    ["prepare", "r.yaml", "endprompt", "--nonsense"],
    ["prepare", "r.yaml", "endprompt", "--set"],
    ["prepare", "r.yaml", "endprompt", "--out"],
    ["prepare", "r.yaml", "endprompt", "--workers", "two"],
    ["prepare", "r.yaml", "endprompt", "--workers", "1.5"],
    ["prepare", "r.yaml", "endprompt", "--workers", "9" * 5000],
    ["prepare", "r.yaml", "endprompt", "--row", "1"],
    ["inspect", "r.yaml", "endprompt", "--row", "x"],
    ["inspect", "r.yaml", "endprompt", "--row", "1e3"],
    ["inspect", "r.yaml", "endprompt", "--row", ""],
    ["inspect", "r.yaml", "endprompt", "--workers", "2"],
    ["evaluate", "r.yaml", "endprompt", "--model"],
    ["train", "r.yaml", "endprompt", "--model", "x"],
    ["--local_rank=x", "train", "r.yaml", "endprompt"],
    ["prepare", "r.yaml", "endprompt", "--dry-run=yes"],
    ["prepare", "--out", "x", "--row"],
    ["--", "--"],
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: " ".join(arguments)[:60])
def test_arguments(out, arguments, tmp_path, monkeypatch):
    """argparse's own form: the usage, and one line that names the argument."""
    monkeypatch.chdir(tmp_path)
    code, stdout, err = run_main(*arguments)
    assert (
        (code, stdout) == (2, "")
        and err.startswith("usage: endprompt")
        and re.fullmatch(r"endprompt.*: error: .+", err.splitlines()[-1])
    )
    assert files(tmp_path) == []


METHOD_NAMES = ["", " ", "EndPrompt", "endprompt ", "../endprompt", "endprompt/..", "None", "0", "a\nb"]


@pytest.mark.parametrize("name", METHOD_NAMES, ids=repr)
@pytest.mark.parametrize("command", ["prepare", "evaluate"])
def test_method_name(recipe_file, out, command, name):
    refused(
        run_main(command, recipe_file(), name, "--out", out), "method: there is none named", "endprompt_pose"
    )


OUTS = {
    "a link to nothing": (lambda path: path.symlink_to("gone"), ""),
    "a link to itself": (loop, ""),
    "a pipe": (fifo, ""),
    "inside a pipe": (fifo, "deeper"),
    "too long": (Path.mkdir, "x" * 300),
    "too deep": (Path.mkdir, "/".join(["x" * 200] * 30)),
    "no place for files": (lambda path: path.symlink_to("/proc/self"), ""),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("command", ["prepare", "train", "evaluate"])
@pytest.mark.parametrize("case", OUTS)
def test_out(recipe_file, tmp_path, command, case):
    make, inside = OUTS[case]
    make(tmp_path / "results")
    path = recipe_file()
    before = sorted(tmp_path.rglob("*"))
    refused(run_main(command, path, "endprompt", "--out", f"{tmp_path}/results/{inside}"), "--out")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
@pytest.mark.parametrize("command", ["prepare", "train", "evaluate"])
def test_out_that_must_not_be_written(recipe_file, tmp_path, command):
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(
        run_main(command, recipe_file(), "endprompt", "--out", tmp_path / "locked"),
        "--out",
        "Permission denied",
        "choose another",
    )


# -- the environment -----------------------------------------------------------------------------------------

ENVIRONMENTS = [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE='abc'", "whole number from 1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE='-1'"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE='2.0'"),
    ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE='999"),
    ({"RANK": "5", "WORLD_SIZE": "2"}, "RANK is 5, but of 2 ranks the last is 1"),
    ({"RANK": "x"}, "RANK='x'"),
    ({"RANK": "-1"}, "RANK='-1'"),
    ({"RANK": "1"}, "RANK is 1", "of 1 ranks"),
    ({"RANK": "\u0662"}, "RANK="),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK='-1'"),
    ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first'"),
    ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3"),
    (
        {"WORLD_SIZE": "8", "RANK": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "4"},
        "LOCAL_RANK is 4, but of 4 ranks",
    ),
    ({"LOCAL_WORLD_SIZE": "none"}, "LOCAL_WORLD_SIZE='none'"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999'", "to 65535"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT='0'"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is missing"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR, MASTER_PORT is missing"),
    (
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": "29500"},
        "MASTER_ADDR is missing",
    ),
    ({"OMP_NUM_THREADS": "x"}, "OMP_NUM_THREADS='x'", "number of threads"),
    ({"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS='0'"),
    ({"OMP_NUM_THREADS": "-1"}, "OMP_NUM_THREADS='-1'"),
    ({"OMP_NUM_THREADS": "1.5"}, "OMP_NUM_THREADS='1.5'"),
    ({"OMP_NUM_THREADS": ""}, "OMP_NUM_THREADS=''"),
    ({"OMP_NUM_THREADS": "2,,2"}, "OMP_NUM_THREADS='2,,2'"),
]


@pytest.fixture
def bare(monkeypatch):
    """No variable of a launcher, of whoever runs the tests."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "TMPDIR",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables, telling",
    [(case[0], case[1:]) for case in ENVIRONMENTS],
    ids=[str(case[0])[:60] for case in ENVIRONMENTS],
)
def test_environment(recipe_file, out, bare, monkeypatch, variables, telling):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused(run_main("train", recipe_file(), "endprompt", "--out", out), "environment: ", *telling)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OMP_NUM_THREADS": "4,2"},
        {"MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {
            "RANK": "3",
            "WORLD_SIZE": "4",
            "LOCAL_RANK": "1",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "h",
            "MASTER_PORT": "29500",
        },
    ],
)
def test_environments_that_launchers_make(variables):
    launch.check(variables)


TMPDIRS = {
    "none": lambda path: None,
    "a file": Path.touch,
    "a link to nothing": lambda path: path.symlink_to("gone"),
    "a pipe": fifo,
}


@pytest.mark.parametrize("case", TMPDIRS)
def test_folder_for_temporary_files(recipe_file, tmp_path, out, bare, monkeypatch, case):
    TMPDIRS[case](tmp_path / "t")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    refused(run_main("evaluate", recipe_file(), "base", "--out", out), "environment: TMPDIR=", "unset it")


def test_what_a_terminal_would_obey_is_shown(recipe_file, tmp_path, out):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "\x1b[2J\u202e.jsonl").write_text("no JSON")
    result = run_main(
        "prepare",
        recipe_file(data={"corpus": str(tmp_path / "c")}),
        "endprompt",
        "--out",
        out,
        "--workers",
        1,
    )
    refused(result, r"c/\x1b[2J\u202e.jsonl line 1: not JSON")
    assert result[2].rstrip("\n").isprintable()


# -- the same through real processes, where nothing catches what libraries print -----------------------------


@pytest.mark.slow
def test_processes(recipe_file, tmp_path, base, model_copy):
    edited("config.json", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})(
        model_copy
    )
    (tmp_path / "bad.jsonl").write_bytes(GOOD + b"oops\n")
    SCORED["weights in a wrong shape"][0](shutil.copytree(base, tmp_path / "misfit"))
    misfit = {"model": {"name_or_path": str(tmp_path / "misfit")}}
    bad_line = {"data": {"corpus": str(tmp_path / "bad.jsonl")}}
    scaled = {"model": {"name_or_path": str(model_copy)}}
    prepare, other_seed = ["prepare", "--workers", "2"], ["train", "--set", "data.seed=7"]
    # (recipe name, sections, command, what is told); misfit as ZeRO-3 meets it
    cases = [
        ("yaml", {"lengths": {"physical": 1024}}, prepare, "greater than lengths.target"),
        ("line", bad_line, prepare, "bad.jsonl line 2: not JSON"),
        ("damaged", {}, ["inspect"], "shard-00000.parquet is damaged"),
        ("scaled", scaled, ["prepare"], "dynamic NTK"),
        ("other", {"train": {"deepspeed": None}}, other_seed, "seed is 0, expected 7"),
        ("misfit", misfit, ["train"], "size mismatch for model.norm.weight"),
    ]
    out = tmp_path / "out"
    paths = {name: recipe_file(name, **sections) for name, sections, _, _ in cases}
    for name in ("damaged", "other", "misfit"):
        assert run_main("prepare", paths[name], "endprompt", "--out", out, "--workers", 1)[0] == 0
    flip(out / "damaged/endprompt/shards/shard-00000.parquet")
    before = files(out)
    # All at once: most of the time goes into importing.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "endprompt"]
    running = [
        subprocess.Popen(
            [*start, command[0], str(paths[name]), "endprompt", "--out", str(out), *command[1:]],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, _, command, _ in cases
    ]
    results = [process.communicate(timeout=120) for process in running]
    for (*_, telling), process, (stdout, stderr) in zip(cases, running, results, strict=True):
        refused((process.returncode, stdout, stderr), telling)
    assert [name for name in files(out) if "/.cache/" not in name] == before


# -- chance --------------------------------------------------------------------------------------------------

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.datetimes()
    | st.sampled_from(
        [
            "",
            "\0",
            "..",
            "EP_9",
            "<x>",
            "1e5",
            "~",
            "package:x",
            "linear",
            "passkey",
            "all",
            -1,
            0,
            1,
            2**31,
            2**32,
            2**63,
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        | st.sets(st.integers(), max_size=2)
    ),
    max_leaves=5,
)

# Every key of the schema, those that options had before, and of train: one of each type that it has.
WHOLE = {
    "model": {
        "name_or_path": "x",
        "gguf_file": None,
        "revision": None,
        "trust_remote_code": False,
        "original_length": None,
        "attn_implementation": None,
        "s2_group_size": None,
    },
    "lengths": {"physical": 64, "target": 512},
    "data": {
        "corpus": "x",
        "text_column": "text",
        "split": "train",
        "tokens": 4096,
        "end_prompts": ["EP_1"],
        "prompt_loss_weight": 0.1,
        "packing": "cut",
        "pose_chunks": 2,
        "pose_text": "contiguous",
        "recall_share": 0.25,
        "recall_cue": 4,
        "recall_tokens": 16,
        "match_pieces": 4,
        "match_tokens": 5,
        "rows_per_shard": 16,
        "filter_share": None,
        "filter_short": None,
        "filter_windows": 4,
        "seed": 0,
    },
    "method_options": {
        "endprompt_pose": {
            "end_prompts": ["EP_1"],
            "prompt_loss_weight": 0.1,
            "pose_chunks": 2,
            "pose_text": "contiguous",
        },
        "longlora": {"s2_group_size": None},
        "pose_recall": {
            "pose_chunks": 2,
            "pose_text": "contiguous",
            "recall_share": 0.25,
            "recall_cue": 4,
            "recall_tokens": 16,
        },
        "pose_matched": {
            "match_pieces": 4,
            "match_tokens": 5,
            "match_by": "ngrams",
            "match_candidates": 3,
        },
        "cream": {"cream_sigma": 3.0, "cream_text": "contiguous"},
        "longrecipe": {"sentence_marks": "."},
        "perturbed": {
            "pose_chunks": 2,
            "pose_text": "contiguous",
            "kl_weight": 1.0,
            "kl_target": "clean",
        },
        "longrope2": {"pose_chunks": 2, "pose_text": "contiguous", "short_share": 0.5},
    },
    "rope": {
        "type": None,
        "theta": None,
        "long_factor": [1.0, 2.0],
        "sharpen": 0.1,
        "sharpen_heads": True,
        "yarn_factor": True,
    },
    "train": {
        "deepspeed": {
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
            "bf16": {"enabled": "auto"},
            "checkpoint": {},
        },
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 8,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch",
        "gradient_checkpointing": False,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "save_steps": 10,
        "report_to": ["none"],
        "warmup_steps": 2,
        "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targets": ["q_proj"], "train_embed_norm": False},
        "sequence_parallel": 1,
        "base_share": 0.5,
        "bf16": True,
        "max_steps": 3,
        "save_total_limit": None,
        "ddp_timeout": 9,
        "lr_scheduler_kwargs": {"num_cycles": 1},
        "data_seed": 1,
        "logging_strategy": "steps",
    },
    "eval": {
        "tasks": ["passkey"],
        "lengths": [64],
        "samples": 4,
        "depths": 2,
        "seed": 1,
        "perplexity_corpus": None,
        "perplexity_column": None,
        "perplexity_tokens": 64,
        "perplexity_stride": 32,
        "distance_haystack": 64,
        "distance_keys": 2,
        "distances": [0, 8],
        "named_keys": 2,
        "far_gain_tokens": 8,
        "far_gain_texts": 2,
        "ruler_samples": None,
        "longbench_data": None,
        "longbench_length": 64,
        "short_text_samples": None,
        "short_text_shots": None,
        "chat_template": False,
        "run_unsafe_code": False,
        "backend": "hf",
    },
}


def places(tree, before=()):
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    ):
        yield (*before, key)
        yield from places(value, (*before, key))


def replaced(tree, place, value):
    """A copy of ``tree`` with ``value`` at ``place``, the keys and indices on the way to it."""
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def test_every_key_of_the_schema_is_tried(scratch):
    (scratch / "r.yaml").write_text(yaml.dump(WHOLE))
    assert (
        schema.load(scratch / "r.yaml").train["max_steps"] == 3
    )  # else every change of it would be refused, whatever it is
    for section, field in schema.Recipe.model_fields.items():
        if not field.exclude and section not in ("train", "method_options"):
            former = set(former_keys.FORMER.get(section, ()))
            assert set(WHOLE[section]) == set(field.annotation.model_fields) | former
    nested = WHOLE["method_options"]
    for name, options in nested.items():
        assert set(options) == set(methods.get(name).Options.model_fields)
    for method in methods.METHODS.values():
        assert set(method.Options.model_fields) <= set().union(*nested.values())


@settings(max_examples=400)
@given(st.sampled_from(list(places(WHOLE))), JUNK, st.sampled_from(list(methods.METHODS)))
def test_any_value_is_refused_or_a_recipe(scratch, place, value, method):
    path = scratch / "r.yaml"
    path.write_text(yaml.dump(replaced(WHOLE, place, value)))
    try:
        experiment = Experiment.of(schema.load(path), method)
    except BadInput as error:
        assert str(error)
        return
    path = scratch / "again.yaml"
    path.write_text(experiment.dump())
    again = Experiment.of(schema.load(path), method)
    assert again.dump() == experiment.dump() and again.options == experiment.options
    more = {"method_options"}  # a copy has those of its method alone
    assert again.recipe.model_dump(exclude=more) == experiment.recipe.model_dump(exclude=more)


@settings(max_examples=300)
@given(
    st.text(max_size=40) | st.binary(max_size=40).map(lambda data: data.decode("latin-1")),
    st.sampled_from(["", "data.tokens", "model", "train.lora", "eval.tasks"]),
)
def test_any_override_is_refused_or_a_recipe(scratch, text, key):
    path = scratch / "whole.yaml"
    if not path.exists():
        path.write_text(yaml.safe_dump(WHOLE))
    try:
        schema.load(path, [f"{key}={text}" if key else text])
    except BadInput as error:
        assert str(error)


def read_back(folder):
    """All rows, by way of all checks; None where BadInput refuses them."""
    try:
        manifest = shards.read_manifest(folder)
        shards.verify(folder, manifest)
        shards.check_rows(folder, manifest)
    except BadInput as error:
        assert str(error).startswith("shards: ") and "\n" not in str(error)
        return None
    return list(shards.rows(folder, manifest)), manifest


@pytest.fixture(scope="module")
def shard_folder(prepared_once, tmp_path_factory):
    """A copy of the prepared shards to be overwritten, its manifest, and the bytes and the rows of what is in
    it.
    """
    folder = shutil.copytree(
        prepared_once / "out/small/endprompt/shards", tmp_path_factory.mktemp("fuzzed") / "shards"
    )
    return (
        folder,
        json.loads((folder / shards.MANIFEST).read_text()),
        (folder / "shard-00001.parquet").read_bytes(),
        read_back(folder)[0],
    )


@pytest.mark.timeout(120)
@settings(max_examples=400)
@given(st.data())
def test_any_manifest_is_refused_or_read_whole(shard_folder, data):
    folder, manifest, parquet, rows = shard_folder
    (folder / "shard-00001.parquet").write_bytes(parquet)
    junk = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2)
        | st.dictionaries(st.text(max_size=3), st.none(), max_size=2)
    )
    changed = replaced(manifest, data.draw(st.sampled_from(list(places(manifest)))), data.draw(junk))
    (folder / shards.MANIFEST).write_text(json.dumps(changed))
    found = read_back(folder)
    assert found is None or found[0] == rows


@pytest.mark.timeout(120)
@settings(max_examples=400)
@given(st.data())
def test_any_damage_of_a_shard_is_refused_or_harmless(shard_folder, data):
    """The checksum agrees with the damaged file: what is read all the same is rows that can be trained on."""
    folder, manifest, parquet, rows = shard_folder
    changed = bytearray(parquet)
    for _ in range(data.draw(st.integers(0, 3))):
        # Pages and footer alike: the footer is the smaller part, and the one that leads the reader.
        at = data.draw(
            st.integers(0, len(changed) - 1) | st.integers(max(0, len(changed) - 2000), len(changed) - 1)
        )
        changed[at] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, len(changed)))
        changed = changed[:cut] + changed[data.draw(st.integers(cut, len(changed))) :]
    (folder / "shard-00001.parquet").write_bytes(changed)
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    found = read_back(folder)
    assert found is None or (found[0] == rows and bytes(changed) == parquet)  # by its checksum
    listed_anew(folder)
    if (found := read_back(folder)) is None:
        return
    assert len(found[0]) == found[1]["rows"]
    for row in found[0]:
        at = row["position_ids"]
        assert (
            at[0] >= 0 and at[-1] < 512 and all(one < other for one, other in zip(at, at[1:], strict=False))
        )
        assert (
            len(row["input_ids"])
            == len(row["loss_weights"])
            == len(at)
            == row["text_length"] + row["prompt_length"]
        )
        assert min(row["input_ids"]) >= 0 and all(
            0 <= weight < float("inf") for weight in row["loss_weights"]
        )


# -- how many ------------------------------------------------------------------------------------------------


def test_at_least_200_cases():
    """Different inputs of the tables above, each counted once for all commands that it is tried with."""
    counted = {
        "recipe": [RECIPE_TEXTS, NAMES, FILE_NAMES, SPECIAL_RECIPES, SETTINGS, OPTIONS],
        "corpus": [CORPORA, SPECIAL_CORPORA, LONG],
        "shards": [SHARDS, ROWS, PROGRESS],
        "model": [MODELS, SCORED, MODEL_NAMES, MODEL_SETTINGS],
        "command line": [ARGUMENTS, METHOD_NAMES, OUTS],
        "environment": [ENVIRONMENTS, TMPDIRS],
    }
    sizes = {category: sum(map(len, tables)) for category, tables in counted.items()}
    assert sum(sizes.values()) >= 200 and min(sizes.values()) >= 20, sizes
