"""Shifted sparse attention: against a mask written out, by perturbation, inside models, and gone from what is
saved.
"""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import configuration, network, row
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from endprompt.methods.longlora import s2
from endprompt.rows.collate import Collator
from endprompt.training import probe as attention


def tensors(batch, heads, kv_heads, length, dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, n, length, dim, generator=generator, dtype=dtype)
        for n in (heads, kv_heads, kv_heads)
    ]


def allowed(length: int, group: int, heads: int) -> torch.Tensor:
    """bool [heads, length, length], from the definition: t sees u if u <= t and no border of the head lies in
    (u, t].
    """
    seen = torch.zeros(heads, length, length, dtype=torch.bool)
    for head in range(heads):
        offset = 0 if head < (heads + 1) // 2 else group - group // 2
        for t in range(length):
            for u in range(t + 1):
                seen[head, t, u] = (t + offset) // group == (u + offset) // group
    return seen


def reference(query, key, value, group, padding=None):
    heads = query.shape[1]
    mask = allowed(query.shape[2], group, heads)[None]
    if padding is not None:
        mask = mask & padding[:, None, None, :] | torch.eye(query.shape[2], dtype=torch.bool)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask)


@st.composite
def shapes(draw):
    kv_heads = draw(st.integers(1, 3))
    return (
        draw(st.integers(1, 3)),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        draw(st.integers(1, 45)),
        draw(st.integers(2, 24)),
    )


@given(shapes(), st.sampled_from(["none", "right", "left", "both"]), st.data())
def test_it_is_the_mask_written_out(shape, kind, data):
    batch, heads, kv_heads, length, group = shape
    query, key, value = tensors(batch, heads, kv_heads, length)
    padding = None
    if kind != "none":
        padding = torch.zeros(batch, length, dtype=torch.bool)
        for index in range(batch):
            start = data.draw(st.integers(0, length - 1)) if kind in ("left", "both") else 0
            end = data.draw(st.integers(start + 1, length)) if kind in ("right", "both") else length
            padding[index, start:end] = True
    found, expected = (
        s2.shifted_sparse_attention(query, key, value, group, padding),
        reference(query, key, value, group, padding),
    )
    assert found.shape == expected.shape and not found.isnan().any()
    used = slice(None) if padding is None else padding[:, None, :, None].expand_as(found)
    torch.testing.assert_close(found[used], expected[used], rtol=1e-9, atol=1e-9)


@given(shapes(), st.data())
def test_a_token_moves_nothing_before_it_and_nothing_outside_its_groups(shape, data):
    batch, heads, kv_heads, length, group = shape
    inputs, t = tensors(batch, heads, kv_heads, length), data.draw(st.integers(0, length - 1))
    before = s2.shifted_sparse_attention(*inputs, group)
    for tensor in inputs:
        tensor[:, :, t] += 1.0
    moved = (s2.shifted_sparse_attention(*inputs, group) != before).any(-1).any(0)
    reach = allowed(length, group, heads)[:, :, t]
    assert not moved[:, :t].any()
    assert not (moved & ~reach).any() and moved[:, t].all()


def test_borders_are_those_of_the_two_halves():
    assert s2.borders(20, 8, shifted=False) == [0, 8, 16] and s2.borders(20, 8, shifted=True) == [0, 4, 12]
    query, key, value = tensors(1, 4, 2, 20)
    for shifted, head in ((False, 0), (False, 1), (True, 2), (True, 3)):
        starts = s2.borders(20, 8, shifted)
        found = s2.shifted_sparse_attention(query, key, value, 8)[:, head]
        for start, end in zip(starts, [*starts[1:], 20], strict=True):
            part = slice(start, end)
            alone = scaled_dot_product_attention(
                query[:, head, part], key[:, head // 2, part], value[:, head // 2, part], is_causal=True
            )
            torch.testing.assert_close(found[:, part], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (9, 3), (1, 1)])
@pytest.mark.parametrize("length", [1, 2, 17, 32])
def test_one_group_is_full_attention(heads, kv_heads, length):
    query, key, value = tensors(2, heads, kv_heads, length)
    full = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(
        s2.shifted_sparse_attention(query, key, value, 2 * length + 1), full, rtol=1e-9, atol=1e-9
    )
    if length > 2:
        found = s2.shifted_sparse_attention(query, key, value, length)
        plain = (heads + 1) // 2
        torch.testing.assert_close(found[:, :plain], full[:, :plain], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found[:, plain:], full[:, plain:]) or plain == heads


def test_gradients_are_those_of_the_mask_written_out():
    inputs = [tensor.requires_grad_() for tensor in tensors(2, 6, 3, 29)]
    found, expected = (
        torch.autograd.grad(function(*inputs, 8).sin().sum(), inputs)
        for function in (s2.shifted_sparse_attention, reference)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def batch_of(*lengths, seed=0, vocabulary=96):
    return Collator(0, 512)([row(n, 0, 512, vocabulary, seed=seed + n) for n in lengths])


def hidden(model, batch):
    with torch.no_grad():
        return model.get_decoder()(
            **{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}, use_cache=False
        ).last_hidden_state


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_a_model_trains_with_it_and_evaluates_in_full(model_type, tmp_path):
    model, batch = network(configuration(model_type)), batch_of(40, 33)
    used = batch["attention_mask"].bool()
    full = hidden(model, batch)[used]
    before = s2.install(model, 12)
    torch.testing.assert_close(hidden(model.eval(), batch)[used], full, rtol=1e-4, atol=1e-5)
    sparse = hidden(model.train(), batch)[used]
    assert (sparse - full).abs().max() > 1e-2
    torch.testing.assert_close(
        sparse[:6], full[:6], rtol=1e-4, atol=1e-5
    )  # half a group from the beginning, all heads see everything
    alone = hidden(model, batch_of(33))[0]
    torch.testing.assert_close(sparse[40:], alone, rtol=1e-4, atol=1e-5)  # whatever the batchmates
    s2.uninstall(model, before)
    assert torch.equal(hidden(model, batch)[used], full) and model.config._attn_implementation == before


def test_a_model_cannot_see_the_future():
    model = network(configuration())
    s2.install(model, 8)
    model.train()
    batch = batch_of(37, 21)
    before = hidden(model, batch)
    for t in (36, 20, 12, 5):
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, t] = (changed["input_ids"][0, t] + 7) % 96
        after = hidden(model, changed)
        assert (
            torch.equal(after[0, :t], before[0, :t])
            and not torch.equal(after[0, t:], before[0, t:])
            and torch.equal(after[1], before[1])
        )


def test_a_position_jump_without_a_mask_is_no_border():
    """transformers reads such a jump as packing where its own attention is used."""
    model, batch = network(configuration()), Collator(0, 512)([row(20, 6, 512, 96)])
    s2.install(model, 64)
    model.train()
    whole = hidden(model, batch)
    assert torch.equal(hidden(model, {**batch, "attention_mask": None}), whole)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(
    "lengths, group", [((48,), 12), ((48, 31), 12), ((47, 47), 16), ((48,), 2), ((48,), 200)]
)
def test_probe_passes_in_train_mode(layers, lengths, group):
    model = network(configuration(num_hidden_layers=layers))
    s2.install(model, group)
    assert attention.probe(model.train(), batch_of(*lengths)) > 1e-2


def test_probe_refuses_groups_that_end_where_the_halves_meet(monkeypatch):
    """Without the shift, the second half of a row begins a group: nothing reaches it."""
    model = network(configuration())
    s2.install(model, 12)
    monkeypatch.setattr(
        s2,
        "shifted_sparse_attention",
        lambda q, k, v, g, padding, scale, dropout: torch.cat(
            [
                scaled_dot_product_attention(
                    *(x[:, :, start : start + g] for x in (q, k, v)),
                    is_causal=True,
                    scale=scale,
                    enable_gqa=True,
                )
                for start in range(0, q.shape[2], g)
            ],
            2,
        ),
    )
    with pytest.raises(RuntimeError, match="liveness probe"):
        attention.probe(model.train(), batch_of(48))


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing"
)  # renamed in 5.23; the old name serves all of 5.x
def test_gradient_checkpointing_changes_nothing():
    model, batch = network(configuration()), batch_of(30, 22)
    s2.install(model, 8)
    model.train()
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(**inputs, use_cache=False).logits.sin().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_a_saved_config_does_not_name_it(tmp_path):
    model = network(configuration())
    s2.install(model, 8)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert s2.NAME not in json.dumps(written) and "s2_group_size" not in json.dumps(written)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_generation_in_eval_mode_is_that_of_the_models_own():
    model = network(configuration())
    ids, mask = (
        torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0)),
        torch.ones(2, 9, dtype=torch.int64),
    )
    mask[1, :4] = 0
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    s2.install(model, 8)
    assert torch.equal(
        model.eval().generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0),
        expected,
    )


def test_groups_of_one_token_are_refused():
    with pytest.raises(ValueError, match="use 2 or more"):
        s2.install(network(configuration()), 1)
