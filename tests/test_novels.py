"""The script that pretrains the laboratory's second base, on a few texts."""

import gzip
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl

from endprompt import BadInput

SCRIPT = REPOSITORY / "recipes/novels/pretrain.py"
SMALL = (
    "--vocabulary 400 --layers 1 --width 32 --feed-forward 96 --steps 4 --span-steps 1 --rows 2"
    " --save-steps 2 --copied 1"
).split()


@pytest.fixture(scope="module")
def script():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("novels_pretrain", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("corpus", "train_base"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    texts = [text.replace(". ", ".\n", 1) for text in tiny_documents(24, 300)]
    return write_jsonl(tmp_path_factory.mktemp("novels") / "text.jsonl", texts)


# Ends like a killed process in step 3.
KILLED = f"""
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("pretrain", {str(SCRIPT)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
def end(self, args, state, control, **more):
    if state.global_step == 3:
        os._exit(9)
module.Said.on_step_end = end
module.main()
"""


def pretrain(text, out, *more, script=(SCRIPT,)):
    command = [sys.executable, *script, "--text", text, "--out", out, *SMALL, *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3])
def test_a_share_is_planted(script, share):
    """Nothing of the text is lost, and every fact is stated more than once."""
    rng, text = random.Random(0), "It was late, and the wind rose. " * 60
    made = [script.planted(rng, text, share, len(text), set()) for _ in range(200)]
    assert sum(map(len, made)) / (200 * len(text)) - 1 == pytest.approx(share, abs=0.02)
    for found in made:
        assert found.count("It was late, and the wind rose. ") == 60
        values = re.findall(r"\b\d{5}\b", found)
        assert all(values.count(value) > 1 for value in values)


def test_facts_come_back_within_reach(script):
    text = "It was late, and the wind rose. " * 3000
    found = script.story(random.Random(0), text, 4000)
    apart = [
        match.start() - first
        for value in set(re.findall(r"\b\d{5}\b", found))
        for first, *later in [[place.start() for place in re.finditer(value, found)]]
        for match in re.finditer(value, found)
        if match.start() > first
    ]
    assert max(apart) > 3000 and min(apart) < 200


def test_text_without_sentences_stays(script):
    assert script.planted(random.Random(0), "no end", 0.5, 100, set()) == "no end"


class Copying:
    """Foretells what stood ``period`` tokens before, surely or not at all."""

    device = torch.device("cpu")

    def __init__(self, period: int, sure: float):
        self.period, self.sure = period, sure

    def __call__(self, ids):
        logits = torch.zeros(*ids.shape, 1000)
        told = ids.roll(self.period - 1, 1)
        return SimpleNamespace(logits=logits.scatter(2, told[..., None], self.sure))


@pytest.mark.parametrize("sure, stops", [(20.0, False), (0.0, True)])
def test_a_base_that_does_not_copy_is_not_trained_on(script, sure, stops):
    period = 24
    rows = SimpleNamespace(
        tokenizer=range(1000),
        span=lambda rng, length, longest: ([rng.randrange(1000) for _ in range(period)] * 3)[:length],
    )
    copies = script.Copies(rows, 7, 0.5)
    copies.on_step_end(None, SimpleNamespace(global_step=6), None, model=None)  # not yet
    if not stops:
        return copies.on_step_end(None, SimpleNamespace(global_step=7), None, model=Copying(period, sure))
    with pytest.raises(BadInput, match="--span-steps: no induction head has formed in 7 steps .repeats cost"):
        copies.on_step_end(None, SimpleNamespace(global_step=7), None, model=Copying(period, sure))


@pytest.mark.slow  # five processes, each of which imports the Trainer
def test_it_pretrains_and_goes_on_after_a_kill(text, tmp_path):
    whole = pretrain(text, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "20 documents to pretrain on, 1 to extend on" in whole.stdout and "M parameters" in whole.stdout
    out = tmp_path / "cut"
    killed = pretrain(text, out, script=("-c", KILLED))
    assert killed.returncode == 9 and [path.name for path in out.glob("checkpoints/*")] == ["checkpoint-2"]
    (out / "checkpoints/checkpoint-3").mkdir()  # half-written
    again = pretrain(text, out)
    assert again.returncode == 0, again.stderr
    for name in ("base/model.safetensors", "base/tokenizer.json", "corpus.jsonl.gz", "heldout.jsonl.gz"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (out / "checkpoints").exists()
    assert "nothing to train" in pretrain(text, out).stdout
    blind = pretrain(text, tmp_path / "blind", "--copied", "0.5")
    assert blind.returncode == 2 and "no induction head has formed in 1 steps" in blind.stderr
    assert blind.stderr.splitlines()[-1].startswith("pretrain.py: --span-steps")
    assert not (tmp_path / "blind/base").exists()
    other = pretrain(text, out, "--seed", "7")
    assert other.returncode == 2 and "was begun with another seed" in other.stderr
    with gzip.open(out / "heldout.jsonl.gz", "rt") as file:
        assert [set(json.loads(line)) for line in file] == [{"id", "text"}] * 3
    recipe = REPOSITORY / "recipes/novels-cpu.yaml"
    settings = (
        f"model.name_or_path={out}/base",
        f"data.corpus={out}/corpus.jsonl.gz",
        "data.tokens=4096",
    )
    given = [word for setting in settings for word in ("--set", setting)]
    code, _, err = run_main("prepare", recipe, "endprompt", "--out", tmp_path / "runs", *given)
    assert code == 0, err


@pytest.mark.parametrize(
    "content, complaint",
    [
        ('{"text": "a"}\n' * 5, "5 documents are too few"),
        ('{"body": "a"}\n' * 30, "--text-column"),
        (None, "--text: there is no file or folder"),
    ],
)
def test_text_that_is_none(script, tmp_path, monkeypatch, capsys, content, complaint):
    path = tmp_path / "text.jsonl"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--text", str(path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and complaint in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
