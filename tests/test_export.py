"""Copies for serving: the same model in another form, or no copy at all."""

import errno
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_main
from networks import THETA, configuration, network, saved, scheme
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from endprompt import BadInput
from endprompt.bases import older_readers, sharpen
from endprompt.positions import rope
from endprompt.runs import card, checkpoint_files, gguf_file

C, L = 64, 512
T = math.log(L) / math.log(C)
BETA = 1 / math.log(C)
NOTE = {"method": "pose_sharp", "original_length": C, "physical_length": C, "target_length": L}


def trained(run: Path, base: Path, kind: str = "yarn", model_type: str = "llama", **changes) -> Path:
    """A run's folder as training leaves it: unsharpened in its checkpoint, sharpened in model/."""
    config = configuration(model_type, vocab_size=896, **changes)
    if model_type == "qwen2":  # transformers builds its tokenizer otherwise than the base's
        base = saved(run / "base", base, model_type)
    rope.apply(config, scheme(kind, C, L), L)
    config.endprompt = NOTE
    checkpoint, tokenizer = run / "checkpoints/checkpoint-2", AutoTokenizer.from_pretrained(base)
    tokenizer.model_max_length = L
    network(config).save_pretrained(checkpoint)
    shutil.copytree(checkpoint, run / "model")
    (checkpoint / checkpoint_files.MARKER).write_text(
        json.dumps({"global_step": 2, "world_size": 1, "files": checkpoint_files.inventory(checkpoint)})
    )
    tokenizer.save_pretrained(run / "model")
    older_readers.complete(run / "model", tokenizer)
    sharpen.sharpen(run / "model", T)
    return run


def export(run: Path, to: Path, *options, expect: int = 0) -> str:
    code, out, error = run_main("export", run, "--to", to, *options)
    assert code == expect, (out, error)
    return error or out


def told(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def logits(folder: Path, count: int = L) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.arange(3, 3 + count)[None]).logits[0]


def test_a_plain_copy_is_the_model(tmp_path, base):
    run = trained(tmp_path / "run", base)
    export(run, tmp_path / "new/copy")
    for path in (run / "model").iterdir():
        other = tmp_path / "new/copy" / path.name
        if path.suffix == ".safetensors":
            one, two = load_file(path), load_file(other)
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
        else:
            assert other.read_bytes() == path.read_bytes(), path.name
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["copy"]


@pytest.mark.parametrize("options", [(), ("--dtype", "bfloat16"), ("--position-dependent",)])
def test_every_chat_template_comes_along(tmp_path, base, options):
    """Named templates, as Hermes-3 has them, lie in a folder of their own, as other files may."""
    run = trained(tmp_path / "run", base)
    model = run / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "A {{ messages }}", "tool_use": "B", "rag": "C"}
    tokenizer.save_pretrained(model)
    (model / "more/deep").mkdir(parents=True)
    for name in ("config.json", "adapter.safetensors"):  # of no interest to what is made anew
        (model / "more/deep" / name).write_text("mine")
    export(run, tmp_path / "copy", *options)
    inside = {path.relative_to(model) for path in model.rglob("*") if path.is_file()}
    assert len([path for path in inside if len(path.parts) > 1]) == 4
    copied = {
        path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*") if path.is_file()
    }
    assert copied == inside
    assert (tmp_path / "copy/more/deep/config.json").read_text() == "mine"
    found = AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert found.chat_template == tokenizer.chat_template and len(found.chat_template) == 3


def test_a_copy_in_bfloat16(tmp_path, base):
    run = trained(tmp_path / "run", base)
    export(run, tmp_path / "copy", "--dtype", "bfloat16")
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "copy"))
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    assert told(tmp_path / "copy")["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("kind", rope.TYPES)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_inside_the_window_it_is_the_unsharpened_model(tmp_path, base, model_type, kind):
    """Bit for bit; beyond it every score is multiplied by 1 + beta ln(1 + floor(p / C)), ln L / ln C at L."""
    run = trained(tmp_path / "run", base, kind, model_type)
    export(run, tmp_path / "copy", "--position-dependent")
    copied = told(tmp_path / "copy")
    assert copied["model_type"] == "ministral3" and "auto_map" not in copied
    parameters = copied["rope_parameters"]
    assert parameters["llama_4_scaling_beta"] == BETA
    assert parameters["original_max_position_embeddings"] == C
    assert "sharpened" not in copied["endprompt"] and copied["endprompt"]["sharpened_beyond"] == C
    plain, found = logits(run / "checkpoints/checkpoint-2"), logits(tmp_path / "copy")
    assert torch.equal(found[:C], plain[:C])
    assert not torch.allclose(found[C:], plain[C:], atol=1e-3)
    # The twin: the sharpened model is another inside the window.
    assert not torch.allclose(logits(run / "model")[:C], plain[:C], atol=1e-3)
    from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

    positions = torch.tensor([[0, C - 1, C, L - 1]], dtype=torch.float64)
    scale = get_llama_4_attn_scale(positions, BETA, C)[0, 0, :, 0].tolist()
    assert scale[:2] == [1, 1] and scale[2:] == pytest.approx([math.log(2 * C) / math.log(C), T])


def test_a_window_that_llama_does_not_heed_is_not_switched_on(tmp_path, base):
    """Ministral 3 heeds the key.  What heads learnt stays in the weights, and so in the note."""
    run = trained(tmp_path / "run", base)
    learnt = {"least": 0.9, "most": 1.1}
    edit(
        run,
        use_sliding_window=False,
        sliding_window=16,
        endprompt={**told(run / "model")["endprompt"], "sharpened_heads": learnt},
    )
    export(run, tmp_path / "copy", "--position-dependent")
    copied = told(tmp_path / "copy")
    assert copied["sliding_window"] is None and "use_sliding_window" not in copied
    assert torch.equal(logits(tmp_path / "copy")[:C], logits(run / "checkpoints/checkpoint-2")[:C])
    assert copied["endprompt"]["sharpened_heads"] == learnt and "sharpened" not in copied["endprompt"]


@pytest.mark.parametrize("kind", rope.TYPES)
def test_beyond_the_window_scores_are_those_of_the_scale(tmp_path, base, kind):
    """Against an attention of our own: queries of the plain model, multiplied by hand."""
    run = trained(tmp_path / "run", base, kind)
    export(run, tmp_path / "copy", "--position-dependent")
    model = AutoModelForCausalLM.from_pretrained(run / "checkpoints/checkpoint-2", dtype=torch.float32).eval()
    scale = 1 + BETA * torch.log(1 + torch.floor(torch.arange(L) / C))
    for layer in model.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: out * scale[None, :, None])
    with torch.no_grad():
        wanted = model(torch.arange(3, 3 + L)[None]).logits[0]
    torch.testing.assert_close(logits(tmp_path / "copy"), wanted, atol=2e-5, rtol=1e-4)


def test_without_a_checkpoint_the_constant_is_divided_out(tmp_path, base):
    run = trained(tmp_path / "run", base)
    plain = load_file(run / "checkpoints/checkpoint-2/model.safetensors")
    other = load_file(run / "model/model.safetensors")
    for case in ("another checkpoint", "none"):
        if case == "none":
            shutil.rmtree(run / "checkpoints")
        else:  # of an earlier step
            path = run / "checkpoints/checkpoint-2/model.safetensors"
            save_file({**plain, "model.norm.weight": plain["model.norm.weight"] * 2}, path, {"format": "pt"})
        export(run, tmp_path / case, "--position-dependent")
        found = load_file(tmp_path / case / "model.safetensors")
        for name in other:
            if "q_proj" in name:
                torch.testing.assert_close(found[name], plain[name], rtol=2e-7, atol=0)
            else:
                assert torch.equal(found[name], other[name])


# what -> (what is done to the run, options, what is said)
REFUSED = {
    "no model": (lambda run: shutil.rmtree(run / "model"), (), "has no model/"),
    "biases": ("qwen2", ("--position-dependent",), "layers of llama and mistral, and this is a qwen2"),
    "llama with biases": (
        {"attention_bias": True},
        ("--position-dependent",),
        r"has no biases, and this model has model\.layers\.0\.self_attn\.\w_proj\.bias",
    ),
    "not sharpened": (
        lambda run: edit(run, endprompt=NOTE),
        ("--position-dependent",),
        "attention is not sharpened",
    ),
    "no note": (lambda run: edit(run, endprompt=None), ("--position-dependent",), "is not sharpened"),
    "half sharpened": (
        lambda run: edit(run, endprompt={**NOTE, "sharpened": T**0.5}),
        ("--position-dependent",),
        "multiplied by 1.2247, and the scale stands for ln L / ln C, 1.5000",
    ),
    "two lengths": (
        lambda run: edit(
            run, endprompt={**NOTE, "sharpened": math.log(L) / math.log(32), "sharpened_from": 32}
        ),
        ("--position-dependent",),
        "counts from 64 tokens and its sharpening from 32",
    ),
    "too large for float16": (
        lambda run: enlarge(run),
        ("--dtype", "float16"),
        r"--dtype float16: model\.norm\.weight has values that it cannot hold",
    ),
    "no JSON": (lambda run: (run / "model/config.json").write_text("{"), (), "cannot be read"),
    "no mapping": (lambda run: (run / "model/config.json").write_text("[]"), ("--gguf",), "cannot be read"),
    "no weights": (
        lambda run: (run / "model/model.safetensors").write_bytes(b"x" * 99),
        (),
        "cannot be read: .*; train it again",
    ),
    "no converter": (lambda run: None, ("--gguf",), "llama-cpp-python"),
    "gguf by position": (
        "linear",
        ("--gguf", "--position-dependent"),
        r"llama\.cpp sharpens by position under YaRN alone",
    ),
}


def edit(run: Path, **changes) -> None:
    path = run / "model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def enlarge(run: Path) -> None:
    path = run / "model/model.safetensors"
    weights = load_file(path)
    save_file({**weights, "model.norm.weight": weights["model.norm.weight"] * 1e6}, path, {"format": "pt"})


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path, base, name, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    done, options, said = REFUSED[name]
    if isinstance(done, str):
        run = trained(
            tmp_path / "run", base, **({"kind": done} if done in rope.TYPES else {"model_type": done})
        )
    elif isinstance(done, dict):
        run = trained(tmp_path / "run", base, **done)
    else:
        run = trained(tmp_path / "run", base)
        done(run)
    error = export(run, tmp_path / "copy", *options, expect=2)
    assert len(error.strip().splitlines()) == 1 and "Traceback" not in error
    import re

    assert re.search(said, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_is_there_is_not_overwritten(tmp_path, base):
    run = trained(tmp_path / "run", base)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/mine.txt").write_text("x")
    assert "is there already" in export(run, tmp_path / "copy", expect=2)
    assert [path.name for path in (tmp_path / "copy").iterdir()] == ["mine.txt"]
    (tmp_path / "file").write_text("x")
    assert "is there already" in export(run, tmp_path / "file", expect=2)
    assert "cannot be made" in export(run, tmp_path / "file/copy", expect=2)
    (tmp_path / "empty").mkdir()
    export(run, tmp_path / "empty")


def test_folders_that_were_made_for_a_copy_go_with_it(tmp_path, base):
    run = trained(tmp_path / "run", base)
    enlarge(run)
    export(run, tmp_path / "new/folder/copy", "--dtype", "float16", expect=2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# What a converter writes of linear scaling by 8, and what is said where it does not: lines of a script.
WRITES = """
import pathlib, sys
from gguf import GGUFWriter, RopeScalingType
assert pathlib.Path(sys.argv[1], "config.json").is_file()
file = GGUFWriter(sys.argv[3], "llama")
file.add_rope_dimension_count(8)
file.add_rope_freq_base(THETA)
file.add_rope_scaling_type(RopeScalingType.LINEAR)
file.add_rope_scaling_factor(8.0)
file.write_header_to_file()
file.write_kv_data_to_file()
file.close()
""".replace("THETA", str(THETA))
CONVERTERS = {
    "all of it": (lambda text: text, None),
    "nothing": (lambda text: "import sys; sys.exit('no such model')", "cannot convert.*: no such model"),
    "another factor": (lambda text: text.replace("(8.0)", "(4.0)"), "does not write rope_type 'linear'"),
    "no scaling": (
        lambda text: "\n".join(line for line in text.splitlines() if "scaling" not in line),
        "does not write rope_type 'linear' of a llama model: its slowest pair",
    ),
    "longrope without factors": (
        lambda text: text.replace("RopeScalingType.LINEAR", "RopeScalingType.LONGROPE"),
        "does not write rope_type 'linear'",
    ),
    "another theta": (lambda text: text.replace(str(THETA), "10000.0"), "does not write rope_type 'linear'"),
    "fewer dimensions": (lambda text: text.replace("count(8)", "count(4)"), "does not write"),
    "no dimensions": (
        lambda text: text.replace("file.add_rope_dimension_count(8)", ""),
        "cannot be read back",
    ),
    "no GGUF file": (lambda text: "import sys; open(sys.argv[3], 'w').write('GGUF')", "cannot be read back"),
}


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
@pytest.mark.parametrize("name", CONVERTERS)
def test_a_gguf_file_is_made_by_llama_cpps_converter_and_read_back(tmp_path, base, monkeypatch, name):
    """Here a stub; llama.cpp's own is run in tests/test_engines.py."""
    run = trained(tmp_path / "run", base, "linear")
    changed, complaint = CONVERTERS[name]
    source = tmp_path / "llama.cpp"
    source.mkdir()
    (source / "convert_hf_to_gguf.py").write_text(changed(WRITES))
    monkeypatch.setenv("LLAMA_CPP", str(source))
    said = export(run, tmp_path / "copy", "--gguf", expect=2 if complaint else 0)
    if complaint is None:
        assert (tmp_path / "copy/model.gguf").read_bytes().startswith(b"GGUF")
    else:
        assert re.search(complaint, said)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp", "run"]


# How a file says the factor of cos and sin of YaRN by 8: (keys beside type, factor and length, what it is)
FACTORS = {
    "no key": ({}, 1 + 0.1 * math.log(8)),
    "the key that llama.cpp computes anew": ({"yarn_attn_factor": 1.0}, 1 + 0.1 * math.log(8)),
    "the other's": ({"yarn_attn_factor": 1 + 0.1 * math.log(8)}, 1 + 0.1 * math.log(8)),
    "the key that is multiplied": ({"attn_factor": 1 / (1 + 0.1 * math.log(8))}, 1.0),
    "a log multiplier of 0": ({"yarn_log_multiplier": 0.0}, 1 + 0.1 * math.log(8)),
    "a log multiplier": ({"yarn_log_multiplier": 1.0}, 1.0),
}


def gguf_of(path: Path, kind: str, **keys) -> Path:
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(path, "llama")
    file.add_rope_dimension_count(8)
    file.add_rope_freq_base(THETA)
    file.add_rope_scaling_type(gguf.RopeScalingType(kind))
    file.add_rope_scaling_factor(8.0)
    file.add_rope_scaling_orig_ctx_len(C)
    for key, value in keys.items():
        file.add_float32(f"llama.rope.scaling.{key}", value)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    return path


def config_of(scaling) -> dict:
    return {
        "model_type": "llama",
        "head_dim": 8,
        "max_position_embeddings": L,
        "rope_parameters": {"rope_theta": THETA, **scaling.hf_parameters(THETA, 8)},
    }


@pytest.mark.parametrize("with_factor", [True, False])
@pytest.mark.parametrize("name", FACTORS)
def test_yarns_factor_is_read_back_whatever_key_says_it(tmp_path, name, with_factor):
    """rope.yarn_factor: false trains without it; llama.cpp multiplies by it unless it is divided out."""
    keys, told = FACTORS[name]
    scaling = rope.extended(rope.Asked("yarn", yarn_factor=with_factor), rope.Default(), C, L)
    path = gguf_of(tmp_path / "x.gguf", "yarn", **keys)
    assert gguf_file.frequencies(path)[1] == pytest.approx(told)
    if math.isclose(scaling.attention_factor, told, rel_tol=1e-6):
        gguf_file.verify(path, config_of(scaling))
        return
    with pytest.raises(BadInput, match=rf"'yarn' .*multiplied by {told:.4g}, in the model by") as error:
        gguf_file.verify(path, config_of(scaling))
    assert "\n" not in str(error.value) and "leave out --gguf" in str(error.value)


def test_factors_of_other_schemes_are_compared_too(tmp_path):
    linear = config_of(rope.Linear(8.0))
    gguf_file.verify(gguf_of(tmp_path / "x.gguf", "linear"), linear)
    with pytest.raises(BadInput, match="'linear' .*multiplied by 1.2, in the model by 1;"):
        gguf_file.verify(gguf_of(tmp_path / "y.gguf", "linear", attn_factor=1.2), linear)


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
@pytest.mark.parametrize("with_factor", [True, False])
def test_yarn_without_its_factor_is_not_exported_with_it(tmp_path, base, monkeypatch, with_factor):
    run = trained(tmp_path / "run", base, "yarn")
    if not with_factor:
        parameters = {**told(run / "model")["rope_parameters"], "attention_factor": 1.0}
        edit(run, rope_parameters=parameters)
        older_readers.state_rope(run / "model")
    source = tmp_path / "llama.cpp"
    source.mkdir()
    added = f"file.add_rope_scaling_orig_ctx_len({C})\n"
    if not with_factor:
        added += "file.add_rope_scaling_yarn_attn_factor(1.0)\n"
    stub = WRITES.replace("Type.LINEAR", "Type.YARN").replace(
        "file.write_header", f"{added}file.write_header"
    )
    (source / "convert_hf_to_gguf.py").write_text(stub)
    monkeypatch.setenv("LLAMA_CPP", str(source))
    said = export(run, tmp_path / "copy", "--gguf", expect=0 if with_factor else 2)
    assert (tmp_path / "copy").exists() == with_factor
    assert with_factor or "by the file cos and sin are multiplied by 1.208, in the model by 1;" in said


def test_an_interrupted_copy_leaves_nothing(tmp_path, base, monkeypatch):
    from endprompt.runs import export as exporting

    run = trained(tmp_path / "run", base)
    monkeypatch.setattr(exporting, "_write_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    export(run, tmp_path / "copy", expect=130)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def _written_by(number: int, text: str | None = None):
    """safetensors' own error of a file that cannot be written."""

    def save(*_):
        raise SafetensorError(text or f"Error while serializing: I/O error: full (os error {number})")

    return "safetensors.torch.save_file", save


def _raising(place: str, number: int, *named):
    def write(*_, **__):
        raise OSError(number, os.strerror(number), *named)

    return place, write


# what fails -> (place, function in its stead), what is said of it
UNWRITTEN = {
    "weights, full": (_written_by(errno.ENOSPC), os.strerror(errno.ENOSPC)),
    "weights, quota": (_written_by(errno.EDQUOT), os.strerror(errno.EDQUOT)),
    "weights, a limit": (_written_by(errno.EFBIG), os.strerror(errno.EFBIG)),
    "weights, no number": (_written_by(0, "Error while serializing: gone"), "Error while serializing: gone"),
    "a copied file": (
        _raising("endprompt.runs.export.shutil.copyfile", errno.ENOSPC, "model/tokenizer.json"),
        os.strerror(errno.ENOSPC),
    ),
    "no file is named": (_raising("endprompt.storage.write_json", errno.EDQUOT), os.strerror(errno.EDQUOT)),
    "the card": (_raising("endprompt.runs.card.renew", errno.ENOSPC), os.strerror(errno.ENOSPC)),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_a_copy_that_cannot_be_written_says_so_and_not_that_the_model_is_damaged(
    tmp_path, base, monkeypatch, name
):
    run = trained(tmp_path / "run", base)
    (place, function), said = UNWRITTEN[name]
    monkeypatch.setattr(place, function)
    error = export(run, tmp_path / "new/copy", expect=1)
    assert f"--to: {tmp_path / 'new/copy'} could not be written ({said}); nothing half-written" in error
    assert error.count("\n") == 1 and "train it again" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_disk_that_is_full_in_earnest(tmp_path, base):
    """By a limit of this process' own; the twin is a model that is damaged."""
    run = trained(tmp_path / "run", base)
    script = "import resource, sys; from endprompt import cli; n = int(sys.argv.pop(1))\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)); cli.main(sys.argv[1:])"
    for limit in (10_000, 100_000):  # the tokenizer's file, and the weights
        command = [sys.executable, "-c", script, str(limit), "export", str(run), "--to", str(tmp_path / "x")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert f"--to: {tmp_path / 'x'} could not be written (File too large)" in done.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
    path = run / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be read" in export(run, tmp_path / "x", expect=2)


def test_what_cannot_be_read_is_not_told_of_the_copy(tmp_path, base, monkeypatch):
    run = trained(tmp_path / "run", base)
    monkeypatch.setattr(*_raising("safetensors.torch.load_file", errno.EACCES, str(run / "model/x")))
    error = export(run, tmp_path / "copy", expect=1)
    assert f"{run / 'model/x'}: Permission denied" in error and "--to" not in error


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_converter_on_a_full_disk(tmp_path, base, monkeypatch):
    run = trained(tmp_path / "run", base, "linear")
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp/convert_hf_to_gguf.py").write_text("raise OSError(28, 'No space left on device')")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    error = export(run, tmp_path / "copy", "--gguf", expect=1)
    assert "could not be written (No space left on device)" in error and not (tmp_path / "copy").exists()


@pytest.mark.parametrize("command", [("export", "{run}", "--to", "{to}"), ("report", "{run}"), ("gpus",)])
def test_an_error_that_names_no_file_is_told_by_every_command(tmp_path, monkeypatch, command):
    """Commands without --out too."""
    given = [word.format(run=tmp_path / "run", to=tmp_path / "to") for word in command]
    monkeypatch.setattr("endprompt.cli._run", _raising("", errno.ENOSPC)[1])
    code, _, error = run_main(*given)
    wanted = {"export": tmp_path / "to", "report": "report.html", "gpus": "gpus"}[command[0]]
    assert code == 1 and f"{wanted}: No space left on device; nothing half-written was kept" in error


def test_files_of_several_parts_stay_apart_and_the_index_counts_their_bytes(tmp_path, base):
    run = trained(tmp_path / "run", base)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    (run / "model/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "parts", max_shard_size="200KB")
    for path in (tmp_path / "parts").glob("model*"):
        shutil.copy(path, run / "model")
    export(run, tmp_path / "copy", "--dtype", "bfloat16")
    names = sorted(path.name for path in (tmp_path / "copy").glob("*.safetensors"))
    assert len(names) > 1 and names == sorted(path.name for path in (run / "model").glob("*.safetensors"))
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    weights = [load_file(tmp_path / "copy" / name) for name in names]
    assert index["metadata"]["total_size"] == sum(
        tensor.numel() * tensor.element_size() for part in weights for tensor in part.values()
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "copy")


def test_the_card_of_a_copy_says_what_the_copy_is(tmp_path, base):
    """Scores of the sharpened model are not those of one that is sharpened otherwise."""
    run = trained(tmp_path / "run", base)
    parts = "\n".join(f"<!-- {part} -->\n<!-- /{part} -->" for part in ("form", "loading", "scores"))
    (run / "model" / card.NAME).write_text(f"---\nlicense: mit\n---\n# Mine\n{parts}\n")
    card.renew(run / "model", [("passkey", L, 50.0, 40.0, 60.0, 100)])
    export(run, tmp_path / "plain")
    assert (tmp_path / "plain" / card.NAME).read_text() == (run / "model" / card.NAME).read_text()
    export(run, tmp_path / "copy", "--position-dependent")
    told = (tmp_path / "copy" / card.NAME).read_text()
    assert "as Ministral 3 does" in told and "passkey" not in told and "license: mit" in told


def test_nothing_of_this_machine_is_in_the_copy(tmp_path, base):
    run = trained(tmp_path / "run", base)
    export(run, tmp_path / "copy", "--position-dependent")
    for path in (tmp_path / "copy").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), path.name
    assert AutoConfig.from_pretrained(tmp_path / "copy").rope_parameters["rope_type"] == "yarn"
