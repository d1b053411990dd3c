"""``evaluate --model`` with models of other families: scored where transformers can run them, else refused in
one line."""

import shutil

import pytest
import torch
from conftest import run_main
from networks import configuration, network
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from endprompt.evaluation import engine

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "opt": {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 512},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 512},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "gemma2": {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 128},
    "gpt_neox": {**SIZE, "max_position_embeddings": 512},
    "t5": {"d_model": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "d_ff": 48},
    "bert": {**SIZE, "max_position_embeddings": 512},
}


def made(model_type):
    torch.manual_seed(0)
    kind = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM}.get(model_type, AutoModelForCausalLM)
    return kind.from_config(
        AutoConfig.for_model(model_type, vocab_size=896, bos_token_id=1, eos_token_id=2, **SHAPES[model_type])
    )


@pytest.fixture
def evaluate(base, tmp_path):
    """evaluate(model type, lengths, *options) -> (exit code, stdout, stderr)"""

    def run(model_type, lengths, *options):
        folder = tmp_path / model_type
        if not folder.exists():
            made(model_type).save_pretrained(folder)
            for file in base.glob("tokenizer*"):
                shutil.copy(file, folder)
        return run_main(
            "evaluate",
            "tiny",
            "base",
            "--out",
            tmp_path / "out",
            "--model",
            folder,
            "--set",
            f"eval.lengths={lengths}",
            "--set",
            "eval.samples=2",
            "--set",
            "eval.depths=1",
            "--set",
            "eval.perplexity_tokens=256",
            *options,
        )

    return run


@pytest.mark.parametrize(
    "model_type, lengths",
    [
        ("gpt2", [256, 512]),
        ("opt", [512]),
        ("gptj", [512]),
        ("mpt", [512]),
        ("bloom", [1024]),
        ("mamba", [1024]),
        ("gemma2", [1024]),
        ("gpt_neox", [1024]),
    ],
)
def test_other_families_are_scored(evaluate, model_type, lengths):
    code, out, err = evaluate(model_type, lengths)
    assert code == 0, err
    scores = {tuple(line.split()[1:3]): float(line.split()[3].strip("%")) for line in out.splitlines()}
    assert scores.keys() == {(task, str(length)) for task in ("passkey", "perplexity") for length in lengths}
    # Random weights know nothing: about the size of the vocabulary.
    assert all(
        700 < score < 1200 if task == "perplexity" else score == 0 for (task, _), score in scores.items()
    )


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gptj", "mpt"])
def test_lengths_beyond_a_table_of_positions_are_refused_before_anything_is_scored(
    evaluate, tmp_path, model_type
):
    code, out, err = evaluate(model_type, [256, 1024])
    assert (code, out) == (2, "") and err.count("endprompt: ") == 1
    assert (
        "eval.lengths: passkey at 1024: the model has a table of 512 positions" in err
        and "Traceback" not in err
    )
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_table_that_is_not_looked_for_ends_in_a_traceback(evaluate, monkeypatch):
    monkeypatch.setattr(engine, "table", lambda network: None)
    with pytest.raises(IndexError):
        evaluate("gpt2", [1024], "--only", "passkey:1024")


def test_prompts_that_are_longer_than_said_are_refused_too(tokenizer):
    """As few shots and questions of short text may be, whose length no recipe states."""
    lm = engine.LongLM(made("gpt2").eval(), tokenizer)
    ids = torch.full((1, 505), 5)
    assert (
        lm._model_generate(ids[:, :504], max_length=512, stop=[], attention_mask=torch.ones(1, 504)).shape[1]
        <= 512
    )
    with pytest.raises(
        ValueError, match="a prompt with its answer has 513 tokens, and the model a table of 512 positions"
    ):
        lm._model_generate(ids, max_length=513, stop=[], attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="513 tokens"):
        lm._loglikelihood_tokens([(("", ""), [5] * 512, [6, 7])])
    assert len(lm._loglikelihood_tokens([(("", ""), [5] * 511, [6, 7])])) == 1


@pytest.mark.parametrize(
    "model_type, kind", [("t5", "T5ForConditionalGeneration"), ("bert", "BertForMaskedLM")]
)
def test_models_that_do_not_continue_text_are_refused(evaluate, model_type, kind):
    code, out, err = evaluate(model_type, [256])
    assert (
        (code, out) == (2, "")
        and f"is a {kind} of type '{model_type}', and no decoder" in err
        and "Traceback" not in err
    )


def test_a_common_cache_is_for_plain_attention_alone():
    plain = configuration("llama")
    assert engine.shares_cache(network(plain)) and engine.shares_cache(network(configuration("qwen2")))
    assert not any(
        engine.shares_cache(made(model_type))
        for model_type in ("gpt2", "mamba", "gemma2", "bloom", "gpt_neox")
    )
    assert not engine.shares_cache(network(configuration("mistral", sliding_window=32)))
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not engine.shares_cache(network(configuration("llama", rope_parameters=dynamic)))
