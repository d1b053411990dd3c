"""The method's neighbours: where the rows of each stand, and how each goes through all commands."""

import json
import shutil
import sys
from itertools import repeat

import numpy as np
import pytest
import torch
import training
from conftest import REPOSITORY, run_main
from hypothesis import given
from hypothesis import strategies as st
from networks import configuration, network
from test_positions import Letters
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt import BadInput, methods
from endprompt.methods import cream, e2llm, longrecipe, randpos
from endprompt.methods.base import Setting
from endprompt.planning import memory
from endprompt.positions import plans, rope, schemes
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.rows.stream import Cursor

SIZES = st.integers(1, 400).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, n + 6000)))
SEEDS = st.integers(0, 2**32)


def setting(name: str, n: int, L: int, packing: str = "cut", tokenizer=None, **options) -> Setting:
    return Setting(name, methods.get(name).Options(**options), n, L, packing, 7, tokenizer or Letters())


def built(name: str, n: int, L: int, text: np.ndarray, count: int = 1, **options) -> list[dict]:
    """The first rows of a method from a corpus whose every document is ``text``."""
    rows = methods.get(name).rows(setting(name, n, L, **options))
    cursor = Cursor(repeat(("d", text)), 0, 0)
    return [rows(number, cursor) for number in range(count)]


# -- randpos -------------------------------------------------------------------------------------------------


@given(SIZES, SEEDS)
def test_random_positions_are_a_subset(sizes, seed):
    n, L = sizes
    found = randpos.subset(n, L, np.random.default_rng(seed))
    plans.check(found, L)
    assert len(found) == n


def test_every_subset_is_as_likely():
    rng = np.random.default_rng(0)
    drawn = [tuple(randpos.subset(2, 4, rng)) for _ in range(6000)]
    times = [drawn.count((i, j)) for i in range(4) for j in range(i + 1, 4)]
    assert sum(times) == 6000 and max(abs(count - 1000) for count in times) < 150  # 5 standard deviations


# -- cream ---------------------------------------------------------------------------------------------------


@given(SIZES, SEEDS, st.floats(0.01, 50))
def test_cream_keeps_its_order(sizes, seed, sigma):
    n, L = sizes
    k, end = cream.chunks(n, L, sigma, np.random.default_rng(seed))
    found = cream.placed(n, k, end, L)
    plans.check(found, L)
    assert (
        len(found) == n
        and k <= n // 3
        and found[k : n - k].tolist() == [*range(end - n + 2 * k + 1, end + 1)]
    )
    assert found[:k].tolist() == [*range(k)] and found[n - k :].tolist() == [*range(L - k, L)]


def test_cream_draws_as_its_authors_do():
    """C = 4096, s = 8: head and tail of 1365 or 32 tokens, and a factor around 1 + s."""
    C, L, rng = 4096, 32768, np.random.default_rng(0)
    drawn = [cream.chunks(C, L, 3.0, rng) for _ in range(2000)]
    assert {k for k, _ in drawn} == {1365, 32}
    assert 900 < sum(k == 32 for k, _ in drawn) < 1100
    factors = {}
    for k, end in drawn:
        # The factors whose range of ends holds it, halved: an end of a short head and tail tells its factor.
        if k == 32:
            holding = [f for f in range(2, 17) if int(k + (C - 65) * f / 2) <= end <= int(f / 2 * C) - k - 1]
            assert holding
            factors[holding[0]] = factors.get(holding[0], 0) + 1
    middle = sum(factors.get(f, 0) for f in range(6, 13))
    assert middle > 0.6 * sum(factors.values())  # within one standard deviation and a half of 9


def test_a_wide_sigma_reaches_the_ends():
    rng = np.random.default_rng(0)
    ends = {sigma: [cream.chunks(300, 2400, sigma, rng)[1] for _ in range(2000)] for sigma in (0.5, 50.0)}
    assert np.std(ends[50.0]) > 2 * np.std(ends[0.5])


def test_cream_takes_matching_text():
    text = np.arange(2000, dtype=np.int32) % 1000
    options = {"packing": "document", "cream_text": "matching"}
    for row in built("cream", 96, 1024, text, 50, **options):
        at = row["position_ids"]
        assert row["input_ids"].tolist() == text[at].tolist()  # the document fills the target
    for row in built("cream", 96, 1024, text[:400], 50, **options):
        ids, at = row["input_ids"], row["position_ids"]
        tail = int((at[1:] - at[:-1] > 1).any()) and len(plans.segments(at)[-1:])
        assert (np.diff(ids) > 0).all() and ids[0] == 0 and ids[-1] == 399 and tail <= 1
    for row in built("cream", 96, 1024, text[:40], 5, **options):
        assert row["input_ids"].tolist() == text[:40].tolist() and row["position_ids"][-1] == 1023
    plain = built("cream", 96, 1024, text, 2)
    assert [row["input_ids"].tolist() for row in plain] == [[*range(96)], [*range(96, 192)]]


# -- longrecipe ----------------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 3000), SEEDS)
def test_gaps_stand_at_ends_of_sentences(ends, more, seed):
    ends = np.array(ends)
    L = len(ends) + more
    found = longrecipe.spaced(ends, L, np.random.default_rng(seed))
    plans.check(found, L)
    jumps = np.flatnonzero(np.diff(found) > 1)
    together = plans.chunk_lengths(len(ends), 2, np.random.default_rng(seed))[0]
    assert found[0] == 0
    # The first tokens are kept together, wherever that ends.
    assert all(ends[jump] or jump + 1 < (len(ends) + 1) // 2 + 1 for jump in jumps)
    assert sum(not ends[jump] for jump in jumps) <= 1 and together >= 1


def test_gaps_are_spread_over_the_target():
    """Of sentences of 10 tokens in rows of 200, the last one's place is near L on average, and gaps are
    alike."""
    ends = (np.arange(200) + 1) % 10 == 0
    rng = np.random.default_rng(0)
    found = np.stack([longrecipe.spaced(ends, 1600, rng) for _ in range(3000)])
    assert found.max() == 1599
    # n sentences among 1400 + n places: the mean of the j-th skip is 1400 j / (n + 1), counted from 1.
    skips = (found - np.arange(200))[:, 110::10].mean(axis=0)
    expected = 1400 * np.arange(12, 21) / 21
    assert np.abs(skips - expected).max() < 25


def test_which_tokens_end_a_sentence(tokenizer):
    found = set(longrecipe.endings(tokenizer, ".!?\n").tolist())
    assert tokenizer.eos_token_id in found
    ids = tokenizer("The grass is green. What is the key?", add_special_tokens=False)["input_ids"]
    ended = [tokenizer.decode([number]).strip() for number in ids if number in found]
    assert ended == [".", "?"]
    question = set(longrecipe.endings(tokenizer, "?").tolist())
    assert question < found and tokenizer(".", add_special_tokens=False)["input_ids"][-1] not in question


def test_a_tokenizer_without_sentences_is_refused():
    with pytest.raises(BadInput, match=r"method_options.sentence_marks: no token .* ends in any of '#'"):
        built("longrecipe", 8, 64, np.ones(8, np.int32), sentence_marks="#")
    row = built("longrecipe", 8, 64, np.array([1, 1, 1, 1, 1, 2, 1, 1], np.int32))[0]
    assert [part[0] for part in plans.segments(row["position_ids"])][1:] == [row["position_ids"][6]]


# -- e2llm ---------------------------------------------------------------------------------------------------


@given(SIZES, SEEDS)
def test_rows_of_one_scale(sizes, seed):
    n, L = sizes
    found = e2llm.strided(n, L / n, L, np.random.default_rng(seed))
    plans.check(found, L)
    strides = set(np.diff(found).tolist())
    assert len(strides) <= 1 and max(strides, default=1) <= L / n


def test_scales_and_offsets_are_drawn():
    rng = np.random.default_rng(0)
    found = [e2llm.strided(64, 8.0, 512, rng) for _ in range(4000)]
    strides = np.array([row[1] - row[0] for row in found])
    # g uniform in [1, 8]: stride k where 8 / (k + 1) < g <= 8 / k.
    for k in range(1, 8):
        assert abs((strides == k).mean() - (8 / k - 8 / (k + 1)) / 7) < 0.04
    starts = np.array([row[0] for row, stride in zip(found, strides, strict=True) if stride == 1])
    assert starts.min() < 5 and starts.max() > 512 - 64 - 5


def test_a_stride_is_a_scale():
    """The angles of a row of stride k under a factor of s are those of contiguous positions under s / k."""
    s, k = rope.Linear(8.0), 4
    positions = 12 + k * np.arange(64)
    angles = positions[:, None] * s.inv_freq(10000.0, 16)
    expected = (positions[0] / k + np.arange(64))[:, None] * rope.Linear(8.0 / k).inv_freq(10000.0, 16)
    assert np.allclose(angles, expected, rtol=1e-12)


# -- drope ---------------------------------------------------------------------------------------------------


def test_drope_turns_nothing():
    scheme = methods.get("drope").scaling(rope.Asked(None), rope.Default(), 256, 2048)
    assert np.abs(131072 * scheme.inv_freq(500000.0, 128)).max() < 2e-4


@pytest.mark.parametrize(
    "asked, own, said",
    [
        (rope.Asked("yarn"), rope.Default(), "rope: drope trains without positions"),
        (rope.Asked(None, theta=1e6), rope.Default(), "rope: drope trains without positions"),
        (rope.Asked(None), rope.Llama3(8.0, 8192), "scaled by llama3 already"),
    ],
)
def test_drope_takes_no_scaling(asked, own, said):
    with pytest.raises(BadInput, match=said):
        methods.get("drope").scaling(asked, own, 256, 2048)


# -- longrope2 -----------------------------------------------------------------------------------------------


def mixed(**given):
    return methods.get("longrope2").scaling(rope.Asked(None, **given), rope.Default(), 64, 512)


def test_two_sets_of_frequencies():
    """YaRN's beyond the window, or those that are given; the base's within."""
    theta, dims = 500000.0, 8
    assert np.array_equal(mixed().inv_freq(theta, dims), rope.Yarn(8.0, 64).inv_freq(theta, dims))
    given = mixed(long_factor=(1.0, 2.0, 4.0, 8.0))
    assert np.allclose(given.inv_freq(theta, dims) * [1, 2, 4, 8], schemes.plain(theta, dims))
    assert np.array_equal(given.built_inv_freq(theta, dims), schemes.plain(theta, dims))
    saved = given.hf_parameters(theta, dims)
    assert saved["short_factor"] == [1.0] * 4 and np.allclose(saved["long_factor"], [1, 2, 4, 8])
    assert saved["attention_factor"] == 1.0


@pytest.mark.parametrize(
    "asked, own, said",
    [
        (rope.Asked("yarn"), rope.Default(), "rope: longrope2 is read as longrope"),
        (rope.Asked(None, theta=1e6), rope.Default(), "rope: longrope2 is read as longrope"),
        (rope.Asked(None), rope.Yarn(2.0, 64), "scaled by yarn already"),
    ],
)
def test_longrope2_takes_no_other_scaling(asked, own, said):
    with pytest.raises(BadInput, match=said):
        methods.get("longrope2").scaling(asked, own, 64, 512)


def test_a_row_has_the_frequencies_of_its_positions():
    """In one batch: bit for bit what each row gets alone, which for a short one is what the base computes."""
    config, method = configuration(), methods.get("longrope2")
    rope.apply(config, mixed(), 512)
    model, base = network(config), network(configuration())
    base.load_state_dict(model.state_dict())
    ids = torch.randint(3, 96, (2, 64), generator=torch.Generator().manual_seed(0))
    short = torch.arange(64)
    far = torch.cat([short[:30], short[30:] + 400])
    both = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def logits(rows, positions, of=model):
        found = of(**{key: value[rows] for key, value in both.items()}, position_ids=positions)
        return found.logits

    alone = [logits([0], short[None]), logits([1], far[None])]
    before = model.model.rotary_emb.forward
    with torch.no_grad(), method.attention(model, method.Options(), 64):
        together = logits([0, 1], torch.stack([short, far]))
        assert torch.equal(together[1], logits([1], far[None])[0])
        assert torch.equal(together[0], logits([0], short[None])[0])
    assert model.model.rotary_emb.forward == before
    torch.testing.assert_close(together[:1], alone[0])
    torch.testing.assert_close(together[1:], alone[1])
    torch.testing.assert_close(together[:1], logits([0], short[None], base))
    # The twin: without the method a batch has one set, and the short row another's.
    assert not torch.allclose(logits([0, 1], torch.stack([short, far]))[0], together[0], atol=1e-3)


def test_half_of_the_rows_are_short():
    found = built("longrope2", 64, 512, np.arange(64, dtype=np.int32), 400)
    short = sum(len(plans.segments(row["position_ids"])) == 1 for row in found)
    assert 160 < short < 240
    few = built("longrope2", 64, 512, np.arange(64, dtype=np.int32), 400, short_share=0.1)
    assert sum(len(plans.segments(row["position_ids"])) == 1 for row in few) < 80


# -- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, key, value, telling",
    [
        ("cream", "cream_sigma", "0", "greater than 0"),
        ("cream", "cream_sigma", "wide", "number"),
        ("cream", "cream_text", "later", "matching"),
        ("cream", "cream_text", "matching", "set data.packing=document"),
        ("longrecipe", "sentence_marks", "''", "at least 1"),
        ("perturbed", "kl_weight", "0", "greater than 0"),
        ("perturbed", "kl_target", "both", "clean"),
        ("self_distil", "kl_weight", "-1", "greater than 0"),
        ("longrope2", "short_share", "1", "less than 1"),
        ("longrecipe", "sentence_marks", "'. )'", "may follow a mark"),
    ],
)
def test_option(recipe_file, tmp_path, method, key, value, telling):
    given = ("--set", f"method_options.{key}={value}")
    code, out, error = run_main("prepare", recipe_file(), method, "--out", tmp_path / "o", *given)
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert f"method_options.{key}" in error and telling in error
    assert not (tmp_path / "o").exists()


# -- all commands --------------------------------------------------------------------------------------------

RECIPE = REPOSITORY / "recipes/tiny.yaml"
NAMES = "randpos cream longrecipe e2llm drope perturbed self_distil longrope2".split()
SETTINGS = {
    "data.tokens": 64 * 256,
    "train.deepspeed": None,
    "train.max_steps": 3,
    "train.logging_steps": 1,
    "eval.tasks": ["passkey"],
    "eval.lengths": [256],
    "eval.samples": 2,
    "eval.depths": 2,
}
# One process, which loads its libraries once; the commands end theirs.
SCRIPT = """
import sys
from pathlib import Path
from endprompt.recipe import experiment
from endprompt.training import run
recipe, out, names, *settings = sys.argv[1:]
for name in names.split():
    run.train(experiment.resolve(recipe, settings, name, Path(out)))
"""


def settings_of(**more) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in (SETTINGS | more).items()]


def command(name: str, method: str, out, *options, **more):
    chosen = [part for setting in settings_of(**more) for part in ("--set", setting)]
    code, told, error = run_main(name, RECIPE, method, "--out", out, *chosen, *options)
    assert code == 0, error
    return told


# Of those that draw positions only, of those with a divergence, and of those with a step after training.
KINDS = ("cream", "perturbed", "drope", "longrope2")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """All of them, prepared and trained for three steps."""
    folder = tmp_path_factory.mktemp("neighbours")
    for name in NAMES:
        told = command("prepare", name, folder, "--workers", 1)
        assert "64 rows, 16384 tokens" in told
    training.run([sys.executable, "-c", SCRIPT, RECIPE, folder, " ".join(NAMES), *settings_of()])
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "method", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_every_command(out, method):
    run = out / "tiny" / method
    assert "64 rows, 16384 tokens; all checksums hold" in command("inspect", method, out)
    assert f"coverage of {method}: 64 prepared rows" in command("inspect", method, out, "--coverage")
    history = json.loads((run / "train.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(np.isfinite(entry["loss"]) for entry in history)
    config = json.loads((run / "model/config.json").read_text())
    assert config["endprompt"]["method"] == method and config["max_position_embeddings"] == 2048
    assert "passkey" in command("evaluate", method, out)
    assert json.loads((run / "eval/passkey/256.json").read_text())["scores"]["samples"] == 2
    assert "GFLOP a token" in command("plan", method, out)


def test_what_is_saved_is_said(out):
    """The scheme and the average, in config.json and on the card."""
    config = {name: json.loads((out / "tiny" / name / "model/config.json").read_text()) for name in NAMES}
    assert config["drope"]["rope_parameters"]["factor"] == 1e9
    assert config["cream"]["rope_parameters"] == config["randpos"]["rope_parameters"]
    assert config["longrecipe"]["rope_parameters"]["rope_theta"] > 10000 * 8
    assert config["longrecipe"]["endprompt"]["base_share"] == 0.5
    card = (out / "tiny/longrecipe/model/README.md").read_text()
    assert "50.0% of what was trained, 50.0% of the base's" in card
    assert "base_share" not in config["cream"]["endprompt"]
    assert "averaged" not in (out / "tiny/cream/model/README.md").read_text()


def test_divergences_are_in_the_loss(out):
    """Beside the cross entropy, which is logged apart."""
    for name in NAMES:
        history = json.loads((out / "tiny" / name / "train.json").read_text())["history"]
        for entry in history:
            more = entry["loss"] - entry["text_loss"]
            assert more > 0.01 if name in ("perturbed", "self_distil") else abs(more) < 1e-3, name


def losses_under(out, folder, names: str, **more) -> dict[str, list[float]]:
    """Of runs on the prepared shards, with other settings."""
    for name in names.split():
        shutil.copytree(out / "tiny" / name / "shards", folder / "tiny" / name / "shards")
    training.run([sys.executable, "-c", SCRIPT, RECIPE, folder, names, *settings_of(**more)])
    told = {name: json.loads((folder / "tiny" / name / "train.json").read_text()) for name in names.split()}
    return {name: [entry["loss"] for entry in one["history"]] for name, one in told.items()}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_divergences_under_zero3(out, tmp_path):
    """Two passes through partitioned layers before one backward pass, and adapters off in between."""
    zero = {"train.deepspeed": str(REPOSITORY / "ds_configs/zero3.json")}
    found = losses_under(out, tmp_path / "zero", "perturbed self_distil", **zero)
    for name, losses in found.items():
        history = json.loads((out / "tiny" / name / "train.json").read_text())["history"]
        assert losses == pytest.approx([entry["loss"] for entry in history], rel=1e-4), name
    adapters = {"train.lora": {"r": 4}, "train.learning_rate": 0.01}
    alone = losses_under(out, tmp_path / "lora", "self_distil", **adapters)["self_distil"]
    assert alone == pytest.approx(
        losses_under(out, tmp_path / "both", "self_distil", **adapters, **zero)["self_distil"], rel=1e-4
    )
    assert alone[0] == pytest.approx(found["self_distil"][0], rel=1e-4)  # adapters begin at nothing
    assert alone[2] != pytest.approx(found["self_distil"][2], rel=1e-4)


OTHERS = [
    (name, kind)
    for name, method in methods.METHODS.items()
    for kind in ("theta", "yarn")
    if method.trained and name not in ("drope", "longrope2")  # which have their own
]


@pytest.mark.parametrize("method, kind", OTHERS)
def test_every_method_under_theta_and_yarn(recipe_file, base, method, kind):
    """From the recipe's key to the frequencies of the built model."""
    recipe = schema.load(recipe_file(), [f"rope.type={kind}"])
    experiment = Experiment.of(recipe, method)
    config = AutoConfig.from_pretrained(base)
    theta = config.rope_parameters["rope_theta"]
    rope.apply(config, experiment.scaling, 512)
    rope.verify(LlamaRotaryEmbedding(config), config, experiment.scaling, theta)
    assert experiment.scaling.name == kind and experiment.scaling.factor == 2.0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_method_trains_under_theta_and_yarn(tmp_path):
    """A step of each."""
    for name in {name for name, _ in OTHERS}:
        for kind in ("theta", "yarn"):
            command("prepare", name, tmp_path / kind, "--workers", 1)
    more = {"train.max_steps": 1}
    for kind in ("theta", "yarn"):
        names = " ".join({name for name, _ in OTHERS})
        given = settings_of(**more, **{"rope.type": kind})
        training.run([sys.executable, "-c", SCRIPT, RECIPE, tmp_path / kind, names, *given])
    for name, kind in OTHERS:
        config = json.loads((tmp_path / kind / "tiny" / name / "model/config.json").read_text())
        parameters = config["rope_parameters"]
        assert parameters["rope_type"] == {"theta": "default", "yarn": "yarn"}[kind], name
        assert (parameters["rope_theta"] > 10000) == (kind == "theta"), name


def test_work_is_counted(out):
    lines = [command("plan", name, out).splitlines() for name in ("cream", "perturbed", "self_distil")]
    flops = [next(float(line.split()[0]) for line in told if "GFLOP a token" in line) for told in lines]
    assert flops[1] == flops[2] >= flops[0]


def test_a_teacher_is_counted():
    """Whole, on every GPU; none where the model without its adapters is the teacher."""
    experiment = Experiment.of(schema.load(RECIPE), "self_distil")
    about = experiment.base.config
    plain = memory.memory(about, {"stage": 3}, 8, memory.Training(1, 256, True))
    beside = memory.memory(about, {"stage": 3}, 8, memory.Training(1, 256, True, base_beside=True))
    assert beside.weights - plain.weights == 2 * memory.parameter_count(about)
    assert (
        memory.training_memory(experiment, about, 8).weights
        > memory.training_memory(experiment.with_method("cream"), about, 8).weights
    )
    adapted = Experiment.of(schema.load(RECIPE, ["train.lora={r: 4}"]), "self_distil")
    assert memory.training_memory(adapted, about, 8) == memory.training_memory(
        adapted.with_method("cream"), about, 8
    )
