"""Saved models in the programs that people run: each computes beyond the window what transformers 5 does.

Slow: environments are installed from the package index, some GB for vLLM (``make test-engines``).  What was
found is written to build/engines/figures.json, from which the table in docs/engines.md is made.
"""

import json
import math
import shutil

import engines
import numpy as np
import pytest
import torch
from conftest import tiny_documents
from networks import configuration, network, scheme
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from endprompt import BadInput
from endprompt.bases import older_readers, sharpen
from endprompt.positions import rope, schemes
from endprompt.runs import export

pytestmark = [pytest.mark.slow, pytest.mark.engines, pytest.mark.timeout(2 * engines.HOURS)]

WINDOW, TARGET, THETA = 256, 2048, 500000.0
# The only list of scalings here.
SCALINGS = {kind: scheme(kind, WINDOW, TARGET, 32) for kind in rope.TYPES}
SHARPENED = "linear, sharpened"
# Copies that are sharpened by position, of these types.
BY_POSITION = {f"{kind}, by position": kind for kind in ("linear", "yarn")}
NAMES = [*SCALINGS, SHARPENED, *BY_POSITION]
# What an engine does not read, and what it says then.
UNREAD = {
    ("transformers4", "linear, by position"): "ministral3",
    ("transformers4", "yarn, by position"): "ministral3",
    ("llama.cpp", "linear, by position"): "rope_type must be 'yarn'",
}
# What an engine computes as something else without a word, and what an export says of it.
MISREAD = {("llama.cpp", "longrope"): "does not write rope_type 'longrope' of a llama model"}
POSITIONS = [100, 250, 300, 700, 1200, 1900, 2046]
TEXT = "The pass key is 40817. Old towns, and so on:  two  spaces\nand a line."


def saved(folder, base, scaling, sharpness: float = 1.0):
    """The tiny base as a run leaves it, with a theta that nobody would assume."""
    config = AutoConfig.from_pretrained(base)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    if scaling is not None:
        rope.apply(config, scaling, TARGET)
    config.endprompt = {"original_length": WINDOW, "target_length": TARGET}
    network = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = TARGET if scaling else WINDOW
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    older_readers.complete(folder, tokenizer)
    if sharpness != 1:
        sharpen.sharpen(folder, sharpness)
    return folder


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    """{name: folder}: a model of every scaling, one that is sharpened too, and the twins that must fail."""
    root = tmp_path_factory.mktemp("models")
    found = {
        name: saved(root / f"model-{number}", base, scaling)
        for number, (name, scaling) in enumerate(SCALINGS.items())
    }
    t = sharpen.factor(1.0, WINDOW, TARGET)
    found[SHARPENED] = saved(root / "sharpened", base, SCALINGS["linear"], t)
    for number, (name, kind) in enumerate(BY_POSITION.items()):
        run = root / f"run-{number}"
        saved(run / "model", base, SCALINGS[kind], t)
        found[name] = export.export(run, root / f"copy-{number}", True, None, False)
    return found


@pytest.fixture(scope="module")
def asked(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = tokenizer("\n".join(tiny_documents(12, 40)))["input_ids"]
    assert len(ids) >= TARGET
    return {"ids": ids[:TARGET], "positions": POSITIONS, "text": TEXT, "vocabulary": 896}


@pytest.fixture(scope="module")
def expected(models, asked):
    """{name: log-probabilities [positions, vocabulary] of transformers 5}."""
    return {name: reference(folder, asked) for name, folder in models.items()}


@torch.no_grad()
def reference(folder, asked) -> np.ndarray:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    logits = network(torch.tensor([asked["ids"]])).logits[0, asked["positions"]]
    return logits.double().log_softmax(-1).numpy()


@pytest.fixture(scope="module", params=engines.ENGINES)
def engine(request, models, asked, tmp_path_factory):
    """(engine, {model: its answer}): all models in one process."""
    found = engines.ENGINES[request.param]
    return found, engines.read(request.param, models, asked, tmp_path_factory.mktemp("read"))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The greatest difference, of the tokens that transformers 5 gives one in a million or more."""
    likely = wanted > math.log(1e-6)
    return float(np.max(np.abs(found - wanted)[likely]))


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_computes_what_was_trained(engine, expected, name):
    about, answers = engine
    answer = answers[name]
    if (about.name, name) in UNREAD:
        assert UNREAD[about.name, name] in answer["error"]
        engines.note(about.name, name, answer, None, None)
        return
    assert "error" not in answer, answer["error"]
    found = difference(answer["log_probabilities"], expected[name])
    same = float(np.mean(answer["log_probabilities"].argmax(-1) == expected[name].argmax(-1)))
    engines.note(about.name, name, answer, found, same)
    if (about.name, name) in MISREAD:
        assert found > 1, "it is read rightly by now: take it out of MISREAD and docs/engines.md"
        return
    assert found < about.tolerance and same == 1.0, (found, same)


def test_an_engine_reads_the_tokenizer_as_it_is(engine, base):
    about, answers = engine
    wanted = AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    for name, answer in answers.items():
        assert answer.get("ids") in (None, wanted), (about.name, name)


def test_what_llama_cpp_would_misread_is_not_exported(base, tmp_path, monkeypatch):
    """By its own converter, whose file is read back."""
    installed = engines.ready("llama.cpp").python.parents[1]
    source = next((installed / "source").glob("*/vendor/llama.cpp"))
    monkeypatch.setenv("LLAMA_CPP", str(source))
    for kind in ("llama3", "longrope"):
        saved(tmp_path / kind / "model", base, SCALINGS[kind])
        copy = tmp_path / f"{kind}-copy"
        if said := MISREAD.get(("llama.cpp", kind)):
            with pytest.raises(BadInput, match=said):
                export.export(tmp_path / kind, copy, False, None, True)
            assert not copy.exists()
        else:
            export.export(tmp_path / kind, copy, False, None, True)
            assert (copy / "model.gguf").stat().st_size > 2**20


def phi(folder, base, attention_factor=None):
    """A Phi-3 of random weights in longrope, with the base's tokenizer."""
    config = configuration("phi3", vocab_size=896, pad_token_id=0, max_position_embeddings=WINDOW)
    pairs = 4
    factors = tuple(1.0 + pair for pair in range(pairs))
    scaling = schemes.LongRope(factors, WINDOW, TARGET / WINDOW, given=attention_factor)
    rope.apply(config, scaling, TARGET)
    network(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(folder)
    older_readers.complete(folder, tokenizer)
    return folder


def test_transformers_4_reads_phi_or_says_that_it_does_not(base, asked, tmp_path):
    models = {"formula": phi(tmp_path / "0", base), "another factor": phi(tmp_path / "1", base, 1.0)}
    answers = engines.read("transformers4", models, asked, tmp_path / "read")
    found = answers["formula"]["log_probabilities"]
    assert difference(found, reference(models["formula"], asked)) < 1e-4
    assert "must be a dictionary with three fields" in answers["another factor"]["error"]


# Keys that a program goes by where transformers 5 does not, the models that are read without them, and by how
# much they then differ at least.
OWN_KEYS = {
    "transformers4": (("rope_theta", "rope_scaling"), ("linear", "yarn"), 1.0),
    "mlx-lm": (("rope_theta", "rope_scaling"), ("linear", "yarn"), 1.0),
    "vllm": (("llama_4_scaling",), ("linear, by position",), 0.1),
}


@pytest.mark.parametrize("name", OWN_KEYS)
def test_without_its_own_keys_a_program_computes_something_else(name, models, asked, tmp_path):
    """The twin: the very comparison fails on what transformers saves."""
    keys, kinds, least = OWN_KEYS[name]
    twins = {}
    for number, kind in enumerate(kinds):
        twins[kind] = shutil.copytree(models[kind], tmp_path / str(number))
        path = twins[kind] / "config.json"
        tree = json.loads(path.read_text())
        assert all(key in tree for key in keys)
        path.write_text(json.dumps({key: tree[key] for key in tree if key not in keys}))
    answers = engines.read(name, twins, asked, tmp_path / "read")
    for kind, folder in twins.items():
        wanted = reference(folder, asked)
        assert difference(answers[kind]["log_probabilities"], wanted) > least
