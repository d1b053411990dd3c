"""Two predictions of the same tokens: the chunked divergence against the plain one, and methods with it."""

import copy
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import configuration, network, row
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from endprompt import BadInput, methods
from endprompt.methods import distilling, self_distil
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.recipe.training_keys import Lora
from endprompt.rows.collate import Collator
from endprompt.training import divergence, heads, lora, loss


def plain(hidden, weight, bias, target, token_weights):
    """The definition, in float64."""
    logits = nn.functional.linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    own, other = logits.log_softmax(-1), target.double().log_softmax(-1)
    each = (other.exp() * (other - own)).sum(-1)
    return (each * token_weights).sum(), each


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 30),
    vocabulary=st.integers(2, 40),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 2**20),
    bias=st.booleans(),
    divisor=st.sampled_from([1.0, 3.0]),
)
def test_equals_the_plain_divergence(tokens, vocabulary, chunk, seed, bias, divisor):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 7), (vocabulary, 7), *([(vocabulary,)] if bias else [])]
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    layer = (*made, *[None] * (not bias))
    target = torch.randn(tokens, vocabulary, generator=generator)
    weights = torch.rand(tokens, generator=generator)
    total, each = divergence.chunked_divergence(layer, target.__getitem__, weights, divisor, chunk)
    leaves = [leaf for leaf in layer if leaf is not None]
    found = torch.autograd.grad(-2.5 * total, leaves)
    scaled = [layer[0], layer[1] / divisor, None if layer[2] is None else layer[2] / divisor]
    expected, all_of_it = plain(*scaled, target, weights)
    wanted = torch.autograd.grad(-2.5 * expected, leaves)
    torch.testing.assert_close(total.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(each.double(), all_of_it, rtol=2e-5, atol=2e-5)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def test_equal_predictions_have_none():
    hidden, weight = torch.randn(5, 4), torch.randn(9, 4)
    logits = hidden @ weight.T
    total, each = divergence.chunked_divergence((hidden, weight, None), logits.__getitem__, torch.ones(5))
    assert float(total) == pytest.approx(0, abs=1e-6) and float(each.abs().max()) < 1e-6


class Largest(TorchDispatchMode):
    """The largest tensor that anything inside makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_full_logits_are_never_built():
    hidden, weight = torch.randn(512, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    head = types.SimpleNamespace(weight=weight, bias=None)
    target = divergence.logits_of(head, torch.randn(512, 4), 1.0)
    with Largest() as seen:
        total, _ = divergence.chunked_divergence((hidden, weight, None), target, torch.ones(512), chunk=32)
        total.backward()
    assert 32 * 300 <= seen.elements < 512 * 300 / 8
    with Largest() as seen:  # the twin: in one chunk they are
        divergence.chunked_divergence((hidden, weight, None), target, torch.ones(512), chunk=512)
    assert seen.elements == 512 * 300


# -- in a network --------------------------------------------------------------------------------------------


def made(seed: int = 0, factor: float = 8.0):
    """A network under linear scaling with the weighted loss, and a batch of rows with a jump, one padded."""
    config = configuration()
    rope.apply(config, rope.Linear(factor), 512)
    model = network(config, seed)
    loss.attach(model)
    rows = [row(40, 8, 512, 96, seed=1), row(30, 6, 512, 96, seed=2)]
    return model, Collator(0, 512)(rows)


def outputs_of(model, batch):
    inputs = {key: value for key, value in batch.items() if key not in ("shift_prompt", "row_numbers")}
    return model(**inputs, with_hidden=True)


def logits_at(model, batch, positions):
    seen = torch.ones_like(batch["attention_mask"])
    return (
        type(model)
        .forward(model, input_ids=batch["input_ids"], attention_mask=seen, position_ids=positions)
        .logits
    )


@pytest.mark.parametrize("target", ["clean", "perturbed"])
def test_two_views(target):
    method, (model, batch) = methods.get("perturbed"), made()
    options = method.Options(kl_weight=0.5, kl_target=target)
    found = method.loss_term(model, batch, outputs_of(model, batch), options)
    gradient = torch.autograd.grad(found, list(model.parameters()))
    plain_positions = torch.arange(48).expand(2, -1)
    jumps, clean = logits_at(model, batch, batch["position_ids"]), logits_at(model, batch, plain_positions)
    own, constant = (jumps, clean) if target == "clean" else (clean, jumps)
    each = nn.functional.kl_div(
        own.log_softmax(-1), constant.detach().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected = 0.5 * (each * batch["shift_weights"]).sum()
    assert float(found) == pytest.approx(float(expected), rel=1e-4) and float(found) > 0.01
    for one, other in zip(gradient, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def teacher_of(model, **changes):
    """The base's network with the same weights, unscaled."""
    base = network(configuration(**changes))
    base.load_state_dict(model.state_dict())
    return base


def test_the_base_beside():
    method, (model, batch) = methods.get("self_distil"), made()
    base = teacher_of(model)
    model.teacher = self_distil.Beside(copy.deepcopy(base))
    found = method.loss_term(model, batch, outputs_of(model, batch), method.Options(kl_weight=2.0))
    constant = logits_at(base, batch, torch.arange(48).expand(2, -1)).detach()
    own = logits_at(model, batch, batch["position_ids"])
    each = nn.functional.kl_div(
        own.log_softmax(-1), constant.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert float(found) == pytest.approx(2 * float((each * batch["shift_weights"]).sum()), rel=1e-4)
    assert len(list(model.parameters())) == len(list(base.parameters()))  # the teacher is none of its parts
    found.backward()
    assert all(parameter.grad is None for parameter in model.teacher.network.parameters())


def test_the_base_within_adapters():
    """Adapters off and the base's RoPE: bit for bit what the base computes; then the student's again."""
    model, batch = made()
    base, positions = teacher_of(model), distilling.contiguous(batch)
    assert positions.tolist() == [[*range(48)], [*range(36), *[35] * 12]]
    expected = distilling.hidden_states(base, batch, positions)
    lora.inject(model, Lora(r=4), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    before = distilling.hidden_states(model, batch, positions)
    teacher = self_distil.Within(model, configuration())
    with torch.no_grad():
        assert torch.equal(teacher.hidden_states(batch), expected)
    assert teacher.head is None and not torch.equal(before, expected)
    assert torch.equal(distilling.hidden_states(model, batch, positions), before)
    with pytest.raises(KeyError):  # and after a failure too
        teacher.hidden_states({key: value for key, value in batch.items() if key != "attention_mask"})
    assert torch.equal(distilling.hidden_states(model, batch, positions), before)


@pytest.mark.parametrize("learnt", ["adapters", "heads", "both"])
def test_the_base_within_has_nothing_that_is_learnt(learnt):
    model, batch = made()
    base, positions = teacher_of(model), distilling.contiguous(batch)
    expected = distilling.hidden_states(base, batch, positions)
    if learnt != "adapters":
        heads.attach(model)
    if learnt != "heads":
        lora.inject(model, Lora(r=4), 0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.endswith(heads.NAME):
                parameter.normal_(std=0.1)
    before = distilling.hidden_states(model, batch, positions)
    assert not torch.allclose(before, expected, atol=1e-3)
    with torch.no_grad():
        assert torch.equal(self_distil.Within(model, configuration()).hidden_states(batch), expected)
    assert torch.equal(distilling.hidden_states(model, batch, positions), before)


def experiment_of(recipe_file, *overrides):
    return Experiment.of(schema.load(recipe_file(), overrides), "self_distil")


@pytest.mark.parametrize(
    "settings, kind",
    [
        ([], self_distil.Beside),
        (["train.lora={r: 4}"], self_distil.Within),
        (["train.lora={r: 4, train_embed_norm: true}"], self_distil.Beside),
    ],
)
def test_which_teacher_there_is(recipe_file, settings, kind):
    experiment = experiment_of(recipe_file, *settings)
    model, _ = made()
    experiment.method.before_training(model, experiment, False)
    assert type(model.teacher) is kind


def test_rows_beyond_the_teachers_window_are_refused(recipe_file):
    experiment = experiment_of(recipe_file, "lengths.physical=257")
    with pytest.raises(BadInput, match="lengths.physical: the teacher of self_distil reads at most .* 256"):
        experiment.method.before_training(made()[0], experiment, False)


@pytest.mark.parametrize("method", ["perturbed", "self_distil"])
def test_what_changes_no_row_is_not_in_the_manifest(recipe_file, method):
    recipe = schema.load(recipe_file(), ["method_options.kl_weight=3", "method_options.pose_chunks=3"])
    experiment = Experiment.of(recipe, method)
    assert experiment.options.kl_weight == 3.0
    assert experiment.rows().recorded() == {"pose_chunks": 3, "pose_text": "contiguous"}
