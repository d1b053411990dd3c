"""Families of models: a tiny one of each is prepared, trained, saved, read again, sharpened, adapted and
planned; what is special in one, by itself."""

import copy
import json
import shutil

import family_models
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_main
from family_models import MODELS
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from training import TORCHRUN, run
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from endprompt import BadInput, Failure
from endprompt.bases import counting, families, model, sharpen
from endprompt.evaluation import theory
from endprompt.planning import estimate
from endprompt.positions import rope
from endprompt.training import checkpoint, lora, loss, trainer, windows
from endprompt.training import run as training_run

FIRST = {one.type: name for name, one in reversed(MODELS.items())}  # of each family
T = 1.5


def logits(network, length: int = 200):
    ids = torch.arange(length)[None] % 800 + 3
    with torch.no_grad():
        return network.eval()(ids, use_cache=False).logits.float()


def trained(experiment) -> torch.Tensor:
    """Trains in this process; returns the logits of the network that was trained."""
    kept, save = [], checkpoint.save_final

    def saving(found, *more):
        save(found, *more)
        kept.append(logits(found.model))

    with family_models.environment(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "save_final", saving)
        training_run.train(experiment)
    return kept[0]


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module", params=MODELS)
def one(request, tmp_path_factory, base):
    """(name, experiment, logits of the trained network)"""
    folder = tmp_path_factory.mktemp("family") / "x"
    experiment = family_models.experiment(folder, request.param, base)
    yield request.param, experiment, trained(experiment)
    shutil.rmtree(folder)


def test_train_save_reload(one):
    name, experiment, expected = one
    said = json.loads((experiment.run / "train.json").read_text())
    assert said["steps"] == 2 and said["probe"] > 1e-3
    network = reloaded(experiment.run / "model")
    torch.testing.assert_close(logits(network), expected, atol=2e-5, rtol=1e-4)
    # The file says all of it: the frequencies, the window, and what the family needs to read them.
    config = network.config
    theta = rope.parameters(experiment.base.config)["rope_theta"]
    assert rope.verify(network.get_decoder().rotary_emb, config, experiment.scaling, theta) < 1e-5
    assert config.max_position_embeddings == MODELS[name].target == config.endprompt["target_length"]
    assert experiment.base.window == MODELS[name].window == config.endprompt["original_length"]
    # The twin: the base reads rows of that length otherwise, and training moved it.
    before = reloaded(experiment.base.folder)
    assert not torch.allclose(logits(before), expected, atol=1e-3)
    moved = [
        name
        for (name, was), (_, now) in zip(before.named_parameters(), network.named_parameters(), strict=True)
        if not torch.equal(was, now)
    ]
    assert len(moved) > 0.8 * len(list(before.named_parameters()))


def scores(network) -> list[torch.Tensor]:
    """q.k times the model's scale, as attention gets them, of every layer for the same input."""
    found: list[torch.Tensor] = []

    def attend(module, query, key, value, attention_mask, scaling=None, **more):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        found.append(query.double() @ key.double().mT * scaling)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("family_scores", attend)
    network, decoder = copy.deepcopy(network), network.get_decoder()
    network.set_attn_implementation("family_scores")
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 24, network.config.hidden_size, generator=generator)
    positions = torch.arange(24)[None] * 7
    kinds = getattr(network.config, "layer_types", None)
    nested = isinstance(decoder.rotary_emb.rope_type, dict)
    with torch.no_grad():
        for number, layer in enumerate(network.get_decoder().layers):
            kind = (kinds[number],) if nested else ()
            turned = decoder.rotary_emb(hidden, positions, *kind)
            layer.self_attn(hidden_states=hidden, position_embeddings=turned, attention_mask=None)
    return found


def test_sharpening_multiplies_scores(one, tmp_path):
    """On disk and in the network; layers with a window of their own stay."""
    _, experiment, _ = one
    folder = shutil.copytree(experiment.run / "model", tmp_path / "model")
    network = reloaded(folder)
    before, local = scores(network), families.local_layers(network.config)
    sharpen.sharpen(folder, T)
    sharpen.sharpen_network(network, T)
    for found in (scores(reloaded(folder)), scores(network)):
        assert len(found) == len(before) == network.config.num_hidden_layers
        for was, now, stays in zip(before, found, local, strict=True):
            torch.testing.assert_close(now, was * (1 if stays else T), rtol=1e-4, atol=1e-5)
    assert json.loads((folder / "config.json").read_text())["endprompt"]["sharpened"] == T


def test_what_does_not_multiply_scores_is_seen(base, tmp_path, monkeypatch):
    """Behind a norm, a projection may be multiplied without any effect."""
    folder = family_models.saved(tmp_path / "x", family_models.written("Qwen3-0.6B"), base)
    network = reloaded(folder)
    before = scores(network)
    wrong = {**families.BY_TYPE, "qwen3": families.Family("qwen3", "")}
    monkeypatch.setattr(families, "BY_TYPE", wrong)
    sharpen.sharpen_network(network, T)
    torch.testing.assert_close(scores(network)[0], before[0], rtol=1e-4, atol=1e-4)


def test_plan_counts_what_is_there(one):
    """Weights, and the FLOPs of a forward pass that torch counts on the model itself."""
    _, experiment, _ = one
    network = reloaded(experiment.base.folder)
    about = estimate.shape(experiment.recipe)
    assert estimate.parameter_count(about) == sum(one.numel() for one in network.parameters())
    tokens = 64
    if families.experts(network.config):
        network.set_experts_implementation("eager")  # torch does not count the grouped product
    with FlopCounterMode(display=False) as counter:
        logits(network, tokens)
    counts = counter.get_flop_counts()["Global"]
    attention = {kind: count for kind, count in counts.items() if "attention" in str(kind)}
    matrices = sum(counts.values()) - sum(attention.values())
    assert matrices == trainer.flops_per_token(network.config, 0) / 3 * tokens
    code, out, error = run_main("plan", experiment.recipe.folder / "run.yaml", "endprompt", "--gpus", "2")
    assert code == 0, error
    assert f"{estimate.parameter_count(about) / 1e9:.3g} B parameters" in out


def weighted(network):
    """(our loss, transformers' own) of a row, each the mean over its tokens."""
    ids = torch.arange(48).reshape(2, 24) * 7 % 800 + 3
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    theirs = network(ids, labels=ids, use_cache=False).loss
    loss.attach(network)
    weights = (labels >= 0).float()
    positions, mask = torch.arange(24).expand(2, -1), torch.ones_like(ids)
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    ours = network(**given, shift_labels=labels, shift_weights=weights)["loss_sum"] / weights.sum()
    return ours, theirs


def test_loss_is_the_model_s_own(one):
    """In value and in the gradient of the output layer."""
    _, experiment, _ = one
    network = reloaded(experiment.base.folder)
    ours, theirs = weighted(network)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    head = network.get_output_embeddings().weight
    found, expected = (torch.autograd.grad(one, head, retain_graph=True)[0] for one in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_divisor_that_is_left_out_is_seen(base, tmp_path, monkeypatch):
    folder = family_models.saved(tmp_path / "x", family_models.written("Granite-3.0-2B"), base)
    monkeypatch.setattr(families, "BY_TYPE", {})
    ours, theirs = weighted(reloaded(folder))
    assert abs(ours - theirs) > 0.1


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-30B-A3B"])
def test_the_router_s_loss_is_config_json_s(base, tmp_path, name):
    folder = family_models.saved(tmp_path / "x", family_models.written(name), base)
    without, _ = weighted(reloaded(folder))
    changes = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    keys = {**family_models.written(name), **changes}
    (folder / "config.json").write_text(json.dumps(keys))
    network = reloaded(folder)
    ours, theirs = weighted(network)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours > without + 0.1
    gate = network.get_decoder().layers[0].mlp.gate.weight
    found, expected = (torch.autograd.grad(one, gate, retain_graph=True)[0] for one in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


# Grouped queries, biases, normalized queries, sliding windows, fused and scaled; the others are like these.
KINDS = ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "granite")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in KINDS else pytest.param(kind, marks=pytest.mark.slow) for kind in families.BY_TYPE],
)
def test_adapters_are_merged(tmp_path, base, kind):
    """Of every projection that the family lets adapters have."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    if not families.BY_TYPE[kind].experts:
        targets += [*([] if kind == "apertus" else ["gate_proj"]), "up_proj", "down_proj"]
    adapters = {"r": 4, "targets": targets, "train_embed_norm": kind in ("glm", "qwen3")}
    experiment = family_models.experiment(tmp_path / "x", FIRST[kind], base, train={"lora": adapters})
    expected = trained(experiment)
    said = json.loads((experiment.run / "train.json").read_text())
    assert said["merge_difference"] < 1e-3
    torch.testing.assert_close(logits(reloaded(experiment.run / "model")), expected, atol=1e-4, rtol=1e-3)
    # The planner counts what is trained.
    network = reloaded(experiment.base.folder)
    lora.inject(network, experiment.adapters, 0)
    there = sum(one.numel() for one in network.parameters() if one.requires_grad)
    about = estimate.shape(experiment.recipe)
    share = estimate.trained_share(about, experiment.adapters)
    assert there == pytest.approx(share * estimate.parameter_count(about), abs=0.5)


@pytest.mark.parametrize(
    "kind, targets, said",
    [
        ("phi3", ["q_proj"], "qkv_proj of a phi3 model holds q_proj, k_proj, v_proj in one matrix"),
        ("glm", ["up_proj"], "gate_up_proj of a glm model holds"),
        ("mixtral", ["q_proj", "up_proj"], "up_proj of a mixtral model are experts"),
        ("apertus", ["gate_proj"], "an apertus model has no gate_proj"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path, base, kind, targets, said):
    experiment = family_models.experiment(
        tmp_path / "x", FIRST[kind], base, train={"lora": {"targets": targets}}
    )
    with family_models.environment(), pytest.raises(BadInput, match=f"train.lora.targets: {said}"):
        training_run.train(experiment)


def test_an_expert_that_is_missing_is_seen(tmp_path, base):
    """The files hold single experts, memory one tensor of them."""
    experiment = family_models.experiment(tmp_path / "x", "Mixtral", base)
    trained(experiment)
    path = experiment.run / "model/model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    theta = rope.parameters(experiment.base.config)["rope_theta"]
    dims = rope.rotary_dimensions(experiment.base.config)

    def verify():
        checkpoint.verify_saved(path.parent, experiment.scaling, theta, experiment.target_length, dims)

    verify()
    save_file({key: one for key, one in tensors.items() if key != name}, path, {"format": "pt"})
    with pytest.raises(Failure, match=f"lacks 1 parameters.*{name}"):
        verify()


# Layers with a window of their own


@pytest.fixture
def gemma(tmp_path, base):
    keys = {**family_models.written("Gemma-3-1B"), "num_hidden_layers": 2}
    keys["layer_types"] = ["sliding_attention", "full_attention"]
    return reloaded(family_models.saved(tmp_path / "gemma", keys, base))


def first_layer(network, ids, positions):
    kept = []
    hook = network.get_decoder().layers[0].register_forward_hook(lambda _, __, out: kept.append(out))
    with torch.no_grad():
        mask = torch.ones_like(ids)
        network.get_decoder()(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hook.remove()
    return kept[0][0] if isinstance(kept[0], tuple) else kept[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_window_is_counted_in_positions(gemma, attention):
    """What stands far behind a jump meets nothing of what is before it, as in a whole row, in the layer with
    a window of 16; in the other it does."""
    gemma.set_attn_implementation(attention)
    ids = torch.arange(30)[None] + 5
    positions = torch.cat([torch.arange(20), torch.arange(300, 310)])[None]
    alone = first_layer(gemma, ids[:, 20:], positions[:, 20:])
    assert not torch.allclose(first_layer(gemma, ids, positions)[:, 20:], alone, atol=1e-3)
    text = first_layer(gemma, ids[:, :20], positions[:, :20])
    windows.attach(gemma)
    found = first_layer(gemma, ids, positions)
    torch.testing.assert_close(found[:, 20:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, :20], text, atol=1e-5, rtol=1e-5)

    def last(tokens):
        with torch.no_grad():
            return gemma(tokens, position_ids=positions, attention_mask=torch.ones_like(tokens)).logits[:, -1]

    changed = ids.clone()
    changed[:, :20] += 1
    assert (last(ids) - last(changed)).abs().max() > 1e-3


def test_padding_is_hidden(gemma):
    windows.attach(gemma)
    ids = torch.arange(30)[None] + 5
    positions = torch.cat([torch.arange(20), torch.arange(300, 310)])[None]
    padded = torch.nn.functional.pad(ids, (0, 6), value=2)
    mask = (torch.arange(36) < 30).long()[None]
    with torch.no_grad():
        plain = gemma(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        found = gemma(
            padded, position_ids=torch.nn.functional.pad(positions, (0, 6)), attention_mask=mask
        ).logits
    torch.testing.assert_close(found[:, :30], plain, atol=1e-5, rtol=1e-5)


def test_what_cannot_count_positions_is_refused(tmp_path, base, monkeypatch):
    from endprompt.recipe import schema
    from endprompt.recipe.experiment import Experiment
    from endprompt.training import sequence

    experiment = family_models.experiment(tmp_path / "x", "Gemma-3-1B", base)
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    assert experiment.base.attention_implementation(True) == "sdpa"
    path = experiment.recipe.folder / "run.yaml"
    given = schema.load(path, ["model.attn_implementation=flash_attention_2"])
    with pytest.raises(BadInput, match="flash_attention_2 counts the sliding windows of a gemma3_text"):
        model.Base(given).attention_implementation(True)
    shared = schema.load(path, ["train.sequence_parallel=2", "train.deepspeed=ds_configs/zero3.json"])
    with pytest.raises(BadInput, match="train.sequence_parallel: some layers of a gemma3_text"):
        sequence.check(Experiment.of(shared, "full_length"), "sdpa", 2, {})
    longlora = Experiment.of(schema.load(path), "longlora")
    network = reloaded(experiment.base.folder)
    with (
        pytest.raises(BadInput, match="longlora: some layers of a gemma3_text"),
        longlora.method.attention(network, longlora.options, 64),
    ):
        pass


def test_local_frequencies_must_stay(gemma):
    config = copy.deepcopy(gemma.config)
    scheme = rope.Linear(8.0)
    rope.apply(config, scheme, 512)
    assert config.rope_parameters["sliding_attention"] == gemma.config.rope_parameters["sliding_attention"]
    built = AutoModelForCausalLM.from_config(config).get_decoder().rotary_emb
    assert rope.verify(built, config, scheme, 1e6) < 1e-5
    built.sliding_attention_inv_freq /= 8
    with pytest.raises(Failure, match="frequencies of sliding_attention layers changed"):
        rope.verify(built, config, scheme, 1e6)


def test_what_phi_writes_is_extended_again(tmp_path, base):
    """Linear by 8 and then longrope by 8 have the frequencies of linear by 64; YaRN's sharpening, written as
    longrope, would grow by another rule."""
    folder = family_models.saved(tmp_path / "x", family_models.written("Phi-4"), base)

    def staged(scheme):
        config = AutoConfig.from_pretrained(folder)
        rope.apply(config, families.written_scheme(config, scheme, 64), 512)
        assert config.original_max_position_embeddings == 64
        return rope.extended(rope.Asked("longrope"), rope.own_scheme(config), 512, 4096)

    found, dims = staged(rope.Linear(8.0)), 16
    np.testing.assert_allclose(found.inv_freq(250000, dims), rope.Linear(64.0).inv_freq(250000, dims))
    assert found.attention_factor == 1.0
    with pytest.raises(BadInput, match="attention_factor.*not known"):
        staged(rope.Yarn(8.0, 64))


@pytest.mark.parametrize("kind", families.BY_TYPE)
def test_activations_are_those_that_are_kept(kind):
    """On the CPU with real tensors; the estimate ran on none.  Of experts, the grouped kernel's are counted,
    and the CPU runs another."""
    config = AutoConfig.for_model(**family_models.written(FIRST[kind]))
    config._attn_implementation = "sdpa"
    network = AutoModelForCausalLM.from_config(config).train()
    windows.attach(network)
    positions = torch.cat([torch.arange(100), torch.arange(400, 428)]).expand(2, -1)
    ids = torch.ones(2, 128, dtype=torch.int64)
    inputs = {"input_ids": ids, "attention_mask": ids, "position_ids": positions}
    with estimate.Kept(network) as kept:
        out = network.get_decoder()(**inputs, use_cache=False).last_hidden_state  # noqa: F841  the graph lives
    layer, rest = estimate.activations(config, 2, 128, torch.float32)
    near = 0.25 if families.experts(config) else 0.02
    mask = 4 * 2 * 128 * 128 if families.BY_TYPE[kind].local else 0  # one, whatever the number of layers
    assert kept.bytes == pytest.approx(config.num_hidden_layers * layer + rest + mask, rel=near)
    about = estimate.Training(2, 128, False, element=4)
    zero = estimate.memory(config, {"stage": 3}, 1, about).activations
    working = 3 * 4 * 2 * 128 * counting.width(config)
    assert zero == config.num_hidden_layers * layer + rest + working + mask * 5 / 4


@pytest.mark.parametrize("kind", ["qwen3", "phi3", "glm", "smollm3", "granite", "gemma3_text"])
def test_scores_that_theory_does_not_bound_are_refused(tmp_path, base, kind):
    experiment = family_models.experiment(tmp_path / "x", FIRST[kind], base)
    with pytest.raises(BadInput, match=f"{kind} models normalize, fuse or turn"):
        theory.run(experiment.recipe, "Some text.", theory.Sampling(tokens=8))


def test_attention_is_counted_within_its_window(gemma):
    """Twice the mean number of keys, in one layer of two."""
    width = gemma.config.num_attention_heads * gemma.config.head_dim
    keys = [min(query + 1, 16) for query in range(64)]
    expected = 6 * width * (64 + 2 * sum(keys) / 64)
    found = trainer.flops_per_token(gemma.config, 64) - trainer.flops_per_token(gemma.config, 0)
    assert found == pytest.approx(expected, rel=0.01)
    # The twin: as if both layers attended to everything.
    assert found < 0.8 * 6 * width * 2 * 64


def test_every_family_has_a_model_here():
    assert set(FIRST) == set(families.BY_TYPE) and len(MODELS) > 30
    assert not set(families.BY_TYPE) & set(families.REFUSED)


@pytest.mark.distributed
@pytest.mark.parametrize("third", [0, *(pytest.param(third, marks=pytest.mark.slow) for third in (1, 2))])
def test_two_ranks_train_every_family_in_pieces(tmp_path, base, third):
    """Under ZeRO-3, in one launch.  The losses of the first step are those of one process."""
    recipes, alone = [], {}
    kinds = list(FIRST)[third::3]
    for kind in kinds:
        name = FIRST[kind]
        one = family_models.experiment(tmp_path / kind, name, base)
        trained(one)
        alone[kind] = json.loads((one.run / "train.json").read_text())["history"]
        options = {"deepspeed": str(REPOSITORY / "ds_configs/zero3.json"), "per_device_train_batch_size": 2}
        family_models.experiment(tmp_path / kind, name, base, train=options)
        (tmp_path / kind / "run-train.yaml").rename(tmp_path / kind / f"{kind}.yaml")
        shutil.copytree(tmp_path / kind / "out/run-train", tmp_path / "out" / kind)
        recipes.append(tmp_path / kind / f"{kind}.yaml")
    run([*TORCHRUN, REPOSITORY / "tests/family_ranks.py", tmp_path / "out", *recipes])
    for kind in kinds:
        folder = tmp_path / "out" / kind / "endprompt"
        history = json.loads((folder / "train.json").read_text())["history"]
        assert history[0]["loss"] == pytest.approx(alone[kind][0]["loss"], abs=2e-5), kind
        assert history[1]["loss"] == pytest.approx(alone[kind][1]["loss"], abs=2e-3), kind
        found = logits(reloaded(folder / "model"))
        expected = logits(reloaded(tmp_path / kind / "out/run/endprompt/model"))
        assert (found - expected).abs().max() < 0.05 * expected.std(), kind


def test_the_page_lists_what_is_tried():
    page = (REPOSITORY / "docs/models.md").read_text()
    found = page.partition("<!-- tried -->\n")[2].partition("\n<!-- /tried -->")[0]
    assert found == family_models.table() and len(family_models.MODELS) >= 20
