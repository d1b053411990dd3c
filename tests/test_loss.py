"""The chunked weighted loss against the plain one, in value, gradient and memory."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import configuration, network
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from endprompt.training import loss
from endprompt.training.loss import chunked_linear_cross_entropy


def plain(hidden, weight, labels, token_weights, bias=None):
    """The definition, in float64: weights times cross entropy, summed over tokens that have a label."""
    logits = nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    nll = nn.functional.cross_entropy(logits, labels.clamp_min(0), reduction="none") * (labels >= 0)
    return (nll * token_weights).sum(), nll


def example(tokens, dim, vocabulary, seed=0, bias=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, dim, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(-1, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < 0.2] = -100
    token_weights = torch.rand(tokens, generator=generator) * (torch.rand(tokens, generator=generator) < 0.8)
    vector = torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, labels, token_weights, vector


def gradients(function, inputs, scale=1.0, **options):
    """(sum, nll, gradients of hidden, weight and bias), None where one is not wanted."""
    leaves = [inputs[0], inputs[1], inputs[4]]
    for leaf in leaves:
        if leaf is not None:
            leaf.grad = None
    total, nll = function(*inputs, **options)
    (total * scale).backward()
    return total.detach(), nll.detach(), *[None if leaf is None else leaf.grad for leaf in leaves]


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@settings(max_examples=80, deadline=None)
@given(
    tokens=st.integers(1, 40),
    dim=st.integers(1, 12),
    vocabulary=st.integers(2, 60),
    chunk=st.integers(1, 48),
    seed=st.integers(0, 2**20),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, -2.5, 1e-3]),
)
def test_equals_the_plain_loss(tokens, dim, vocabulary, chunk, seed, bias, scale):
    inputs = example(tokens, dim, vocabulary, seed, bias)
    found, expected = (
        gradients(chunked_linear_cross_entropy, inputs, scale, chunk=chunk),
        gradients(plain, inputs, scale),
    )
    assert (
        found[0].dtype == found[1].dtype == torch.float32
        and found[0].shape == ()
        and found[1].shape == (tokens,)
    )
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one.double(), other.double(), rtol=2e-5, atol=2e-5 * abs(scale) + 1e-5)


def test_gradient_by_finite_differences():
    """Independent of autograd's own formula for cross entropy."""
    hidden, weight, labels, token_weights, bias = (
        x.detach().double() for x in example(3, 4, 7, seed=2, bias=True)
    )
    labels = torch.tensor([2, -100, 5])
    leaves = [x.float().requires_grad_() for x in (hidden, weight, bias)]
    chunked_linear_cross_entropy(leaves[0], leaves[1], labels, token_weights.float(), leaves[2], chunk=2)[
        0
    ].backward()
    for index, name in enumerate(("hidden", "weight", "bias")):
        values = [hidden, weight, bias]
        numeric = torch.zeros_like(values[index])
        for at in range(numeric.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                moved = [value.clone() for value in values]
                moved[index].view(-1)[at] += step
                ends.append(plain(moved[0], moved[1], labels, token_weights, moved[2])[0])
            numeric.view(-1)[at] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(leaves[index].grad.double(), numeric, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_is_close_to_float32(bias):
    inputs = example(300, 64, 500, seed=3, bias=bias, dtype=torch.bfloat16)
    found, expected = gradients(chunked_linear_cross_entropy, inputs, chunk=64), gradients(plain, inputs)
    for one, other in zip(found, expected, strict=True):
        assert one is None and other is None or relative(one, other) < 1e-2
    assert (
        found[0].dtype == found[1].dtype == torch.float32
        and found[2].dtype == found[3].dtype == torch.bfloat16
    )


def test_bf16_gradient_of_the_weight_does_not_depend_on_the_number_of_chunks():
    """Two thousand chunks of one token, whose small contributions a bf16 sum would lose."""
    inputs = example(2000, 16, 20, seed=4, dtype=torch.bfloat16)
    assert (
        relative(gradients(chunked_linear_cross_entropy, inputs, chunk=1)[3], gradients(plain, inputs)[3])
        < 1e-2
    )


def test_tokens_without_weight_or_label_give_no_gradient():
    hidden, weight, labels, token_weights, _ = example(30, 8, 20, seed=5)
    labels[:] = 3
    labels[10:20], token_weights[:] = -100, 1.0
    token_weights[:10] = 0
    total, nll = chunked_linear_cross_entropy(hidden, weight, labels, token_weights, chunk=7)
    total.backward()
    assert torch.count_nonzero(hidden.grad[:20]) == 0 and torch.count_nonzero(hidden.grad[20:]) > 0
    assert (nll[:10] > 0).all() and (nll[10:20] == 0).all()  # a weight of 0 still reports its cross entropy
    alone = weight.detach().clone().requires_grad_()
    chunked_linear_cross_entropy(hidden.detach()[20:], alone, labels[20:], token_weights[20:])[0].backward()
    torch.testing.assert_close(weight.grad, alone.grad)


def test_nothing_to_predict_gives_zero():
    hidden, weight, labels, token_weights, bias = example(5, 4, 6, bias=True)
    total, nll = chunked_linear_cross_entropy(
        hidden, weight, torch.full_like(labels, -100), token_weights, bias
    )
    total.backward()
    assert (
        total == 0
        and not nll.any()
        and not hidden.grad.any()
        and not weight.grad.any()
        and not bias.grad.any()
    )


def test_large_logits_stay_finite():
    hidden, weight, labels, token_weights, _ = example(20, 4, 30, seed=6)
    inputs = ((hidden.detach() * 1e4).requires_grad_(), weight, labels, token_weights, None)
    found, expected = gradients(chunked_linear_cross_entropy, inputs, chunk=6), gradients(plain, inputs)
    assert all(one.isfinite().all() for one in found[:4])
    assert relative(found[0], expected[0]) < 1e-5


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(frozen):
    names = ("hidden", "weight", "bias")
    inputs = example(25, 6, 15, seed=7, bias=True)
    leaves = dict(zip(names, (inputs[0], inputs[1], inputs[4]), strict=True))
    whole = dict(zip(names, gradients(chunked_linear_cross_entropy, inputs, chunk=4)[2:], strict=True))
    leaves[frozen].requires_grad_(False)
    found = dict(zip(names, gradients(chunked_linear_cross_entropy, inputs, chunk=4)[2:], strict=True))
    assert found.pop(frozen) is None
    assert all(torch.equal(found[name], whole[name]) for name in found)


def test_a_graph_kept_alive_can_be_used_twice():
    inputs = example(12, 5, 9, seed=8)
    total, _ = chunked_linear_cross_entropy(*inputs[:4], chunk=5)
    (once,) = torch.autograd.grad(total, inputs[0], retain_graph=True)
    assert torch.equal(torch.autograd.grad(total * 2, inputs[0])[0], 2 * once)


class Largest(TorchDispatchMode):
    """Records the bytes of the largest tensor that any operation returns, and the operations' names."""

    def __init__(self):
        super().__init__()
        self.size, self.names = 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel() * tensor.element_size())
        return result


def test_full_logits_are_never_built():
    tokens, vocabulary = 2048, 50000
    hidden, weight, labels, token_weights, _ = example(tokens, 4, vocabulary)
    with Largest() as largest:
        total, _ = chunked_linear_cross_entropy(hidden, weight, labels, token_weights)
        total.backward()
    assert hidden.grad.any() and weight.grad.any()
    assert 4 * tokens * vocabulary > 400e6 and largest.size <= 4 * loss.CHUNK_ELEMENTS
    with Largest() as twin:  # the measure sees the plain loss build them
        plain(hidden[:256], weight, labels[:256], token_weights[:256])
    assert twin.size >= 256 * vocabulary * 4


def test_without_gradients_only_the_value_is_computed():
    inputs = example(40, 8, 30, seed=9, bias=True)
    expected = chunked_linear_cross_entropy(*inputs, chunk=16)
    with torch.no_grad(), Largest() as seen:
        found = chunked_linear_cross_entropy(*inputs, chunk=16)
    assert not found[0].requires_grad and all(
        torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )
    assert not {"scatter_add_", "addmm_"} & seen.names


# On a GPU


def in_place(logits, labels, token_weights, needs_gradient):
    """What ``loss_kernel.rows`` promises, in plain operations."""
    nll, gradient = loss._rows(logits, labels, token_weights, needs_gradient)
    if needs_gradient:
        logits.copy_(gradient)
    return nll


@pytest.mark.parametrize("chunk, sum_type", [(40, torch.bfloat16), (30, torch.float32)])
def test_few_chunks_sum_in_the_weight_s_type_and_are_as_exact_as_full_logits(monkeypatch, chunk, sum_type):
    """Up to ``ROUNDINGS`` chunks add their rounding to that of the logits, which full logits have too, and
    hardly more.
    """
    assert (loss.ROUNDINGS * chunk >= 300) == (sum_type == torch.bfloat16)
    hidden, weight, labels, token_weights, _ = inputs = example(300, 64, 500, seed=3, dtype=torch.bfloat16)
    exact = gradients(plain, inputs)

    def full(hidden, weight, labels, token_weights, bias=None):
        losses = nn.functional.cross_entropy(
            nn.functional.linear(hidden, weight, bias).float(), labels.clamp_min(0), reduction="none"
        ) * (labels >= 0)
        return (losses * token_weights).sum(), losses

    usual = gradients(full, inputs)
    monkeypatch.setattr(loss, "row_kernel", lambda hidden: in_place)
    seen = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch,
        "zeros",
        lambda *shape, **options: seen.append(options.get("dtype")) or zeros(*shape, **options),
    )
    found = gradients(chunked_linear_cross_entropy, inputs, chunk=chunk)
    assert seen == [sum_type]
    for one, other, wanted in zip(found[:4], usual, exact, strict=False):
        assert relative(one, wanted) < 1.3 * relative(other, wanted) + 1e-6


def test_a_gpu_takes_few_chunks():
    """8192 tokens of Llama-3's vocabulary: 4 chunks, 4.2 % of the 12 bytes a logit that full logits need;
    memory stays bounded for more tokens.
    """
    chunk = loss._chunk(128256, in_place)
    assert chunk == 2048 and 2 * chunk / (12 * 8192) < 0.05 and loss._chunk(128256, None) == 130
    assert loss._chunk(10**7, in_place) == 128


KERNEL = """
import torch
from endprompt.training import loss
from endprompt.training.loss_kernel import rows

loss_rows = loss._rows
for vocabulary, dtype in ((50, torch.float32), (9000, torch.float32), (70, torch.bfloat16)):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (7,), generator=generator)
    labels[2], labels[4], weights = -100, vocabulary - 1, torch.rand(7, generator=generator)
    nll, gradient = loss_rows(logits.clone(), labels, weights, True)
    untouched = logits.clone()
    torch.testing.assert_close(rows(untouched, labels, weights, False), nll)
    assert torch.equal(untouched, logits)
    torch.testing.assert_close(rows(logits, labels, weights, True), nll)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits, gradient.to(dtype), rtol=tolerance, atol=1e-6)
    assert not logits[2].any()
print("equal")
"""


@pytest.mark.skipif(
    not importlib.util.find_spec("triton"), reason="triton, which comes with torch for GPUs, is not installed"
)
def test_the_kernel_is_what_plain_operations_do():
    """Through Triton's interpreter, which runs the kernel on a CPU."""
    result = subprocess.run(
        [sys.executable, "-c", KERNEL],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_is_not_used(dtype, capsys):
    """Compilers and devices differ: the kernel is tried on a small batch before it is trusted."""

    def late(
        logits, labels, weights, needs_gradient
    ):  # the label's logit read after the gradient was written over it
        nll = in_place(logits, labels, weights, needs_gradient)
        return torch.where(labels >= 0, nll + 0.01, nll)

    def unweighted(logits, labels, weights, needs_gradient):
        return in_place(logits, labels, torch.ones_like(weights), needs_gradient)

    state = torch.get_rng_state()
    assert loss.agrees(in_place, torch.device("cpu"), dtype) and not capsys.readouterr().err
    for wrong in (late, unweighted):
        assert not loss.agrees(wrong, torch.device("cpu"), dtype)
        assert capsys.readouterr().err.startswith("warning: the loss' Triton kernel gives other values")
    assert torch.equal(state, torch.get_rng_state())  # training draws from it


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_on_a_gpu_is_that_on_a_cpu(dtype):
    inputs = example(700, 128, 20011, seed=11, bias=True, dtype=dtype)
    exact = gradients(plain, inputs)
    there = [
        None if value is None else value.detach().to("cuda").requires_grad_(value.requires_grad)
        for value in inputs
    ]
    for chunk in (None, 128, 32):
        found = gradients(chunked_linear_cross_entropy, there, chunk=chunk)
        assert all(
            relative(one.cpu(), other) < (1e-4 if dtype == torch.float32 else 1e-2)
            for one, other in zip(found, exact, strict=True)
        ), chunk


# The head on a model


def batch(vocabulary=96, seed=0):
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    positions = torch.cat([torch.arange(15), torch.arange(55, 64)]).expand(2, -1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}, labels


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_attached_model_is_otherwise_the_same(model_type, tied, tmp_path):
    config = configuration(model_type, tie_word_embeddings=tied)
    before, after = network(config), network(config)
    loss.attach(after)
    inputs, _ = batch()
    assert list(after.state_dict()) == list(before.state_dict())
    assert [name for name, _ in after.named_parameters()] == [name for name, _ in before.named_parameters()]
    with torch.no_grad():
        assert torch.equal(after(**inputs).logits, before(**inputs).logits)
        assert torch.equal(
            after(**inputs, labels=inputs["input_ids"]).loss,
            before(**inputs, labels=inputs["input_ids"]).loss,
        )
    options = {
        "attention_mask": inputs["attention_mask"],
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(
        after.generate(inputs["input_ids"], **options), before.generate(inputs["input_ids"], **options)
    )
    after.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(type(before).from_pretrained(tmp_path)(**inputs).logits, before(**inputs).logits)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_gradients_are_those_of_transformers_own_loss(model_type, tied):
    config = configuration(model_type, tie_word_embeddings=tied)
    theirs, ours = network(config).train(), network(config).train()
    loss.attach(ours)
    inputs, labels = batch()
    weights = torch.ones(labels.shape)
    expected = theirs(**inputs, labels=inputs["input_ids"]).loss
    expected.backward()
    outputs = ours(**inputs, shift_labels=labels, shift_weights=weights)
    count = (labels >= 0).sum()
    (outputs["loss_sum"] / count).backward()
    torch.testing.assert_close(outputs["loss_sum"] / count, expected)
    assert outputs["nll"].shape == labels.shape and not outputs["nll"].requires_grad
    torch.testing.assert_close(outputs["nll"].sum() / count, expected.detach())
    for (name, one), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert one.grad is not None and one.grad.any(), name
        torch.testing.assert_close(
            one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_weights_scale_what_each_token_teaches():
    """Text at 1 and prompt at 0.1 is the sum of the two alone, in every parameter (paper Eq. 11)."""
    inputs, labels = batch()
    prompt = torch.zeros(labels.shape)
    prompt[:, 15:] = 1

    def learned(weights):
        model = network(configuration()).train()
        loss.attach(model)
        model(**inputs, shift_labels=labels, shift_weights=weights)["loss_sum"].backward()
        return [parameter.grad for parameter in model.parameters()]

    for both, text, end in zip(
        learned((1 - prompt) + 0.1 * prompt), learned(1 - prompt), learned(prompt), strict=True
    ):
        torch.testing.assert_close(both, text + 0.1 * end, rtol=1e-3, atol=1e-4)


def test_another_output_layer_is_refused():
    model = network(configuration())
    loss.attach(model)
    with pytest.raises(RuntimeError, match="output layer is LossHead"):
        loss.attach(model)
    model.lm_head = nn.Sequential(nn.Linear(32, 96))
    with pytest.raises(RuntimeError, match="output layer is Sequential"):
        loss.attach(model)


LIGER = """
import torch
from endprompt.training import loss
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

generator = torch.Generator().manual_seed(0)
hidden = torch.randn(2, 12, 16, generator=generator)
labels = torch.randint(0, 50, (2, 12), generator=generator)
labels[0, 3] = labels[1, 11] = -100
results = []
for kernel in (lambda hidden: None, lambda hidden: LigerFusedLinearCrossEntropyFunction.apply):
    loss.liger_kernel = kernel
    head = loss.LossHead(16, 50, bias=False)
    head.uniform = True
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 16, generator=torch.Generator().manual_seed(1)))
    inputs = hidden.clone().requires_grad_()
    total, nll = head(inputs, labels, (labels >= 0).float())
    (total * 0.5).backward()
    results.append((total.detach(), inputs.grad, head.weight.grad))
assert nll is None
for ours, theirs in zip(*results):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
print("equal")
"""


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("liger_kernel", "triton")),
    reason="liger-kernel and triton (the gpu extra) are not installed",
)
def test_liger_gives_the_same_where_all_weights_are_one():
    """Through Triton's interpreter, which runs the kernel on a CPU."""
    result = subprocess.run(
        [sys.executable, "-c", LIGER],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0 and "equal" in result.stdout, result.stderr[-2000:]


def test_liger_is_not_used_on_cpu_nor_with_weights():
    assert loss.liger_kernel(torch.zeros(1)) is None
    assert loss.LossHead.uniform is False
