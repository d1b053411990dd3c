"""The benchmarks run and say what they measured; their figures are for quiet machines."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY, tiny_documents, write_jsonl


def run(name: str, *options, timeout: int = 200) -> dict:
    out = options[options.index("--out") + 1]
    result = subprocess.run([sys.executable, str(REPOSITORY / "benchmarks" / name), *map(str, options)], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text())[name.removesuffix(".py")]


def test_loss(tmp_path):
    found = run("loss.py", "--tokens", 1024, "--vocabulary", 40000, "--width", 32, "--repeats", 1, "--out", tmp_path / "r.json")
    assert max(found["chunked"]["relative_gradient_difference"]) < 1e-5 and found["full"]["loss"] == pytest.approx(found["chunked"]["loss"], rel=1e-5)
    assert 0 < found["memory_share"] < 0.8 and found["commit"] and found["command"].startswith("python")


@pytest.mark.slow
def test_prepare(tmp_path):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", tiny_documents(150, 18))
    found = run("prepare.py", corpus, "--documents", 150, "--model", "recipes/tiny/base", "--gguf", "", "--workers", 1, "--repeats", 1,
                "--out", tmp_path / "r.json")
    # Rows are whole: of the corpus' tokens some remain, and eight times the corpus is eight times the tokens and less than one row.
    for kind in ("prepare", "tokenizers"):
        assert found[f"{kind}_first"]["tokens"] == 8192 <= found[f"{kind}_1"]["tokens"] <= found["bare"]["tokens"] + 150
        assert abs(found[f"{kind}_8"]["tokens"] - 8 * found["bare"]["tokens"]) < 8 * 8192
        assert 0 < found[f"{kind}_1"]["position_share_of_bytes"] < 0.05 and found[f"{kind}_memory_8_times_of_once"] > 0
        assert found[f"{kind}_once_of_map"] > 0 and f"{kind}_without_start_up_of_bare" in found  # of a corpus this small, noise
    assert found["map"]["tokens"] <= found["bare"]["tokens"] + 150


@pytest.mark.slow
def test_startup(tmp_path):
    found = run("startup.py", "--repeats", 1, "--out", tmp_path / "r.json")
    assert 0 < found["help_seconds"] < found["first_step_seconds"] < 120
