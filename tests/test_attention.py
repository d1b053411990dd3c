"""The end prompt sees the text: on the embedded model, with every attention that runs here."""

import contextlib
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import row
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available

from endprompt.positions import rope
from endprompt.recipe.training_keys import Lora
from endprompt.rows.collate import Collator
from endprompt.training import dataset, lora, loss, trainer
from endprompt.training import probe as attention

TARGET, A, B = 2048, 100, 11
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing"
)  # renamed in 5.23; the old name serves all of 5.x


def load(base, implementation="sdpa", dtype=torch.float32):
    config = AutoConfig.from_pretrained(base)
    rope.apply(config, rope.Linear(TARGET / config.max_position_embeddings), TARGET)
    return AutoModelForCausalLM.from_pretrained(
        base, config=config, dtype=dtype, attn_implementation=implementation
    ).eval()


@pytest.fixture(scope="module")
def models(base):
    return {implementation: load(base, implementation) for implementation in ("sdpa", "eager")}


@pytest.fixture(scope="module")
def batches(base):
    vocabulary = AutoConfig.from_pretrained(base).vocab_size
    collator = Collator(0, TARGET)
    return {
        "end prompt, batch 1": collator([row(A, B, TARGET, vocabulary)]),
        "end prompt, batch 2": collator(
            [row(A, B, TARGET, vocabulary), row(A, B, TARGET, vocabulary, seed=1)]
        ),
        "end prompt, padded": collator(
            [row(A, B, TARGET, vocabulary), row(A + 20, B, TARGET, vocabulary, seed=1)]
        ),
        "contiguous, batch 1": collator([row(A, 0, TARGET, vocabulary)]),
        "contiguous, batch 2": collator(
            [row(A, 0, TARGET, vocabulary), row(A // 2, 0, TARGET, vocabulary, seed=1)]
        ),
    }


KINDS = [
    "end prompt, batch 1",
    "end prompt, batch 2",
    "end prompt, padded",
    "contiguous, batch 1",
    "contiguous, batch 2",
]


def logits(model, batch):
    with torch.no_grad():
        return model(
            **{
                name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch
            },
            use_cache=False,
        ).logits


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_probe_passes(models, batches, implementation, kind, checkpointing):
    model = models[implementation]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    try:
        assert attention.probe(model, batches[kind]) > 1e-2
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "end prompt" in kind and "padded" not in kind])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_mask_the_prompt_is_cut_off(models, batches, implementation, kind):
    """The trap itself: it fails here on the day that transformers closes it."""
    batch = {name: tensor for name, tensor in batches[kind].items() if name != "attention_mask"}
    with pytest.raises(RuntimeError, match="liveness probe") as caught:
        attention.probe(models[implementation], batch)
    moved = float(re.search(r"by (\S+) standard", str(caught.value))[1])
    assert (
        moved == 0.0
        and f"all {A} tokens" in str(caught.value)
        and f"other {B} " in str(caught.value)
        and implementation in str(caught.value)
    )
    changed = {
        **batch,
        "input_ids": torch.cat([torch.full_like(batch["input_ids"][:, :A], 5), batch["input_ids"][:, A:]], 1),
    }
    assert torch.equal(
        logits(models[implementation], batch)[:, A:], logits(models[implementation], changed)[:, A:]
    )


def test_a_contiguous_row_needs_no_mask(models, batches):
    batch = {
        name: tensor for name, tensor in batches["contiguous, batch 1"].items() if name != "attention_mask"
    }
    assert attention.probe(models["sdpa"], batch) > 1e-2


def test_probe_sees_a_cut_before_the_last_of_several_segments(models, batches):
    """Chunked text: everything before the last jump is what the prompt must see."""
    batch = {name: tensor.clone() for name, tensor in batches["end prompt, batch 1"].items()}
    batch["position_ids"][0, 50:A] += 700
    assert attention.probe(models["sdpa"], batch) > 1e-2
    del batch["attention_mask"]
    with pytest.raises(RuntimeError, match=f"all {A} tokens"):
        attention.probe(models["sdpa"], batch)


def probed(model, rows, rank, monkeypatch, masked=True):
    """What the callback finds on ``rank`` before the first step."""

    def collator(given):
        batch = Collator(0, TARGET)([{**one, "row_number": 0} for one in given])
        return batch if masked else {name: value for name, value in batch.items() if name != "attention_mask"}

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    callback = trainer.Probe(rows, collator, 1)
    callback.trainer = SimpleNamespace(accelerator=SimpleNamespace(autocast=contextlib.nullcontext))
    arguments = SimpleNamespace(per_device_train_batch_size=1, device="cpu")
    callback.on_train_begin(arguments, None, None, model=model)
    return callback.moved


@pytest.mark.parametrize("jumps, rank", [({2}, 0), ({2}, 1), ({0}, 1), ({3}, 5), ({1, 2}, 3)])
def test_the_row_that_is_probed_has_a_jump_if_one_of_the_next_has(base, monkeypatch, jumps, rank):
    """Of four rows; without a jump there is nothing that a missing mask could break."""
    model = load(base)
    vocabulary = model.config.vocab_size
    rows = [row(A, B if number in jumps else 0, TARGET, vocabulary, seed=number) for number in range(4)]
    assert probed(model, rows, rank, monkeypatch) > 1e-2
    with pytest.raises(RuntimeError, match="liveness probe"):
        probed(model, rows, rank, monkeypatch, masked=False)


def test_where_no_row_has_a_jump_the_rank_s_own_is_probed(base, monkeypatch):
    model = load(base)
    rows = [row(A + number, 0, TARGET, model.config.vocab_size) for number in range(3)]
    seen = []
    monkeypatch.setattr(
        attention, "probe", lambda model, batch: seen.append(batch["input_ids"].shape[1]) or 1
    )
    for rank in range(4):
        probed(model, rows, rank, monkeypatch)
    assert seen == [A, A + 1, A + 2, A]


def test_the_search_for_a_jump_has_an_end():
    far, plain = {"position_ids": [0, 1, 900]}, {"position_ids": [5, 6, 7]}
    assert dataset.first_with_jump([plain] * 63 + [far] * 9, 0) == 63
    assert dataset.first_with_jump([plain] * 64 + [far] * 9, 0) == 0
    assert dataset.first_with_jump([far] + [plain] * 5, 3) == 0
    assert dataset.first_with_jump([plain] * 3, 7) == 1


def test_not_a_number_is_refused(base, batches):
    model = load(base)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="liveness probe"):
        attention.probe(model, batches["end prompt, batch 1"])


def test_probe_leaves_no_trace(base, batches):
    model, batch = load(base).train(), batches["end prompt, batch 2"]
    parameters = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    columns = {name: tensor.clone() for name, tensor in batch.items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert attention.probe(model, batch) == attention.probe(model, batch)
    assert torch.equal(torch.get_rng_state(), state) and model.training and torch.is_grad_enabled()
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, columns[name]) for name, tensor in batch.items())


@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_and_eager_agree(models, batches, kind):
    used = batches[kind]["attention_mask"].bool()
    one, other = (logits(models[implementation], batches[kind])[used] for implementation in ("sdpa", "eager"))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.std()) + 1e-4)


def reference(model, ids, positions, inv_freq):
    """LLaMA for one row in float64, from the papers: whole causal attention, queries and keys turned by
    position x inv_freq.
    """
    config = model.config
    heads, dim = config.num_attention_heads, rope.head_dimension(config)
    angles = np.outer(positions, inv_freq)
    cos, sin = torch.from_numpy(np.cos(angles)), torch.from_numpy(np.sin(angles))
    mask = torch.full((len(ids), len(ids)), -torch.inf, dtype=torch.float64).triu(1)
    f = nn.functional

    def norm(x, layer):
        return layer.weight.double() * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turned(x):
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def split(x, layer):
        projected = (x @ layer.weight.double().T).view(len(ids), -1, dim).transpose(0, 1)
        return projected.repeat_interleave(heads // len(projected), 0)

    x = model.get_input_embeddings().weight.double()[ids]
    for layer in model.get_decoder().layers:
        h, a, m = norm(x, layer.input_layernorm), layer.self_attn, layer.mlp
        scores = turned(split(h, a.q_proj)) @ turned(split(h, a.k_proj)).transpose(1, 2) / dim**0.5
        mixed = ((scores + mask).softmax(-1) @ split(h, a.v_proj)).transpose(0, 1).reshape(len(ids), -1)
        x = x + mixed @ a.o_proj.weight.double().T
        h = norm(x, layer.post_attention_layernorm)
        x = (
            x
            + (f.silu(h @ m.gate_proj.weight.double().T) * (h @ m.up_proj.weight.double().T))
            @ m.down_proj.weight.double().T
        )
    return norm(x, model.get_decoder().norm) @ model.get_output_embeddings().weight.double().T


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_are_those_of_a_hand_written_model(models, batches, implementation):
    model, batch = models[implementation], batches["end prompt, batch 2"]
    theta = model.config.rope_parameters["rope_theta"]
    inv_freq = (
        theta ** (-np.arange(0, rope.head_dimension(model.config), 2) / rope.head_dimension(model.config))
        / model.config.rope_parameters["factor"]
    )
    found = logits(model, batch)
    for index in range(2):
        expected = reference(model, batch["input_ids"][index], batch["position_ids"][index].numpy(), inv_freq)
        torch.testing.assert_close(
            found[index].double(), expected, rtol=0, atol=2e-4 * float(expected.std()) + 1e-4
        )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_gradient_of_the_prompt_reaches_the_text_under_checkpointing(models, batches, implementation, masked):
    model, batch = models[implementation], batches["end prompt, batch 2"]
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        found = model(
            inputs_embeds=embedded,
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"] if masked else None,
            use_cache=False,
        )
        found.logits[:, A:].pow(2).sum().backward()
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.zero_grad()
    reached = (embedded.grad[:, :A].abs().sum(-1) > 0).double().mean()
    assert reached == (1 if masked else 0)


# What the attention kernels get


def training(model, batch):
    """One forward and backward as in training; the kinds that have no padding get there without a mask."""
    labels = torch.where(batch["attention_mask"] > 0, batch["input_ids"], -100)
    model(
        **{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")},
        shift_labels=labels,
        shift_weights=torch.ones(labels.shape),
    )["loss_sum"].backward()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_gets_a_flag_and_no_square(base, batches, monkeypatch, kind, checkpointing):
    """What transformers makes is_causal of, with which a GPU takes its flash kernel; padding, on the right,
    is no reason for a square [length, length].
    """
    model = load(base).train()
    loss.attach(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    calls, real = [], nn.functional.scaled_dot_product_attention

    def noted(*inputs, attn_mask=None, is_causal=False, **options):
        calls.append((attn_mask is None, is_causal))
        return real(*inputs, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    training(model, batches[kind])
    assert set(calls) == {(True, True)} and len(calls) == len(model.get_decoder().layers) * (
        2 if checkpointing else 1
    )
    calls.clear()
    logits(
        model, batches[kind]
    )  # without the loss the mask stays what it is, and padding does build the square: the trap itself
    assert set(calls) == {("padded" not in kind and kind != "contiguous, batch 2",) * 2}


def test_padding_takes_no_part_in_training(base, batches):
    """A padded row gives the loss and the gradients that it gives alone."""
    batch, found = batches["end prompt, padded"], []
    for rows in ([(slice(0, 2), slice(None))], [(slice(0, 1), slice(0, A + B)), (slice(1, 2), slice(None))]):
        model = load(base).train()
        loss.attach(model)
        for part in rows:
            training(model, {name: tensor[part] for name, tensor in batch.items() if name != "row_numbers"})
        found.append([parameter.grad for parameter in model.parameters()])
    for together, alone in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def attentions(graphs):
    """(mask, is_causal) of every attention in the compiled ``graphs``."""
    nodes = [
        node
        for graph in graphs
        for node in graph.graph.nodes
        if node.target is nn.functional.scaled_dot_product_attention
    ]
    return [(node.kwargs.get("attn_mask"), node.kwargs.get("is_causal")) for node in nodes]


def test_compiled_layers_get_the_flag_and_a_compiled_model_the_square(base, batches):
    """Why train.py compiles layer by layer; the second half is the trap itself."""
    batch, graphs = batches["end prompt, batch 1"], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model = load(base).train()
    loss.attach(model)
    for layer in model.get_decoder().layers:
        layer.compile(backend=backend, dynamic=False)
    training(model, batch)
    assert attentions(graphs) == [(None, True)]  # one graph for all layers
    graphs.clear()
    torch.compiler.reset()
    model = load(base)
    with torch.no_grad():
        torch.compile(model.get_decoder(), backend=backend)(
            **{name: batch[name] for name in ("input_ids", "position_ids", "attention_mask")}, use_cache=False
        )
    torch.compiler.reset()
    assert attentions(graphs) and all(mask is not None for mask, _ in attentions(graphs))


def test_flash_attention_does_not_cut_a_row_at_its_jump(batches):
    """transformers' FlashAttention takes rows whose positions are not 0, 1, 2, ... for packed ones when they
    come singly, and cuts where the least position recurs: never, as ours only rise.  The mask of ones is
    taken off before.
    """
    masking, flash = (
        pytest.importorskip("transformers.masking_utils"),
        pytest.importorskip("transformers.modeling_flash_attention_utils"),
    )
    batch = batches["end prompt, batch 1"]
    length = batch["input_ids"].shape[1]
    assert (
        masking.flash_attention_mask(1, length, length, attention_mask=batch["attention_mask"].bool()) is None
    )
    assert flash._is_packed_sequence(batch["position_ids"], 1) and not flash._is_packed_sequence(
        batches["end prompt, batch 2"]["position_ids"], 2
    )
    (cuts, _), (longest, _) = flash.prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert cuts.tolist() == [0, length] and int(longest) == length


@pytest.mark.gpu
@pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()),
    reason="needs a CUDA device and flash-attn",
)
def test_probe_passes_with_flash_attention(base, models, batches):
    model = load(base, "flash_attention_2", torch.bfloat16).to("cuda")
    for kind in KINDS:
        batch = {name: tensor.to("cuda") for name, tensor in batches[kind].items()}
        assert attention.probe(model, batch) > 1e-2, kind
        used = batches[kind]["attention_mask"].bool()
        found, expected = (
            logits(model, batch).float().cpu()[used],
            logits(models["eager"], batches[kind])[used],
        )
        assert float((found - expected).norm() / expected.norm()) < 0.05, kind


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_probe_passes_with_sdpa_on_a_gpu(base, batches):
    model = load(base, "sdpa", torch.bfloat16).to("cuda")
    for kind in KINDS:
        assert (
            attention.probe(model, {name: tensor.to("cuda") for name, tensor in batches[kind].items()}) > 1e-2
        ), kind


# Dropout


def dropped(base, where: str):
    """A model in training whose dropout is on: attention's own, or that of adapters."""
    if where == "lora":
        model = load(base)
        lora.inject(model, Lora(dropout=0.3), 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero before training, as on resuming it is not
                    parameter.normal_(std=0.1)
        return model.train()
    config = AutoConfig.from_pretrained(base, attention_dropout=0.3)
    rope.apply(config, rope.Linear(TARGET / config.max_position_embeddings), TARGET)
    options = {"config": config, "dtype": torch.float32, "attn_implementation": "sdpa"}
    return AutoModelForCausalLM.from_pretrained(base, **options).train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("where", ["attention", "lora"])
def test_dropout_does_not_hide_a_cut(base, batches, monkeypatch, where, checkpointing):
    model, whole = dropped(base, where), batches["end prompt, batch 1"]
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    cut = {name: tensor for name, tensor in whole.items() if name != "attention_mask"}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="by 0 standard|by 0.0"):
        attention.probe(model, cut)
    assert attention.probe(model, whole) > 1e-2
    assert torch.equal(torch.get_rng_state(), state) and model.training
    monkeypatch.setattr(attention, "same_draws", lambda device: contextlib.nullcontext())
    assert attention.probe(model, cut) > 1e-2, "with other draws the cut model passes: the trap itself"


def test_two_passes_draw_alike_and_the_run_goes_on_as_if_they_had_not():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with attention.same_draws(torch.device("cpu")):
        one = torch.rand(5)
    with attention.same_draws(torch.device("cpu")):
        assert torch.equal(torch.rand(5), one)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_does_not_hide_a_cut_on_a_gpu(base, batches):
    model = dropped(base, "attention").to("cuda", torch.bfloat16)
    whole = {name: tensor.to("cuda") for name, tensor in batches["end prompt, batch 1"].items()}
    state = torch.cuda.get_rng_state()
    with pytest.raises(RuntimeError, match="liveness probe"):
        attention.probe(model, {name: tensor for name, tensor in whole.items() if name != "attention_mask"})
    assert attention.probe(model, whole) > 1e-2 and torch.equal(torch.cuda.get_rng_state(), state)
