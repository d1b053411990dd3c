"""Sharpened attention: the number, the scores of the saved model, what stays as it was, and a run that ends
with it.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import run_main
from hypothesis import given
from hypothesis import strategies as st
from networks import saved, short_everywhere
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training import prepared, run, train, weights

from endprompt import Failure
from endprompt.bases import model, sharpen
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment


def test_factor():
    """2^13 to 2^16: 16 / 13.  2^8 to 2^11: 11 / 8."""
    assert sharpen.factor(1.0, 8192, 65536) == pytest.approx(16 / 13)
    assert sharpen.factor(0.5, 256, 2048) == pytest.approx(1.375**0.5)
    assert sharpen.factor(0.0, 8192, 65536) == sharpen.factor(0.0, 1, 65536) == 1.0


@given(st.integers(2, 10**6), st.integers(2, 10**6))
def test_a_score_keeps_its_weight_among_more_keys(original, target):
    """A score as heavy as C scores of 0 together is, times the factor, as heavy as L of them."""
    short, long = sorted((original + 1, target + 1))
    t = sharpen.factor(1.0, short, long)
    assert long == pytest.approx(short**t, rel=1e-6)


@given(st.floats(0, 4), st.integers(2, 2**20), st.floats(1.001, 1000), st.floats(1.001, 1000))
def test_factor_grows_with_length(power, original, first, second):
    near, far = sorted((first, second))
    found = [sharpen.factor(power, original, original * times) for times in (1, near, far)]
    assert found[0] == 1.0 and found == sorted(found)


def test_scores_of_the_saved_model_are_multiplied(base, tmp_path):
    """In the first layer, whose input is the same, the log-probabilities of attention are those before times
    t, but for their normalizer.
    """
    from transformers import AutoModelForCausalLM

    folder, ids = shutil.copytree(base, tmp_path / "model"), torch.arange(3, 40)[None]

    def attention():
        network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        return network(ids, output_attentions=True).attentions[0].double()

    before = attention()
    sharpen.sharpen(folder, 1.5)
    torch.testing.assert_close(attention(), (1.5 * before.log()).softmax(-1), atol=1e-5, rtol=1e-4)


def spoken(folder):
    """{name: tensor} of all files of the model in ``folder``."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "model_type, queries", [("llama", ["weight"]), ("mistral", ["weight"]), ("qwen2", ["weight", "bias"])]
)
def test_only_queries_change_whatever_the_files(base, tmp_path, model_type, queries, dtype):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(saved(tmp_path / "whole", base, model_type), dtype=dtype)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    network.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    folder = tmp_path / "parts"
    assert len(list(folder.glob("*.safetensors"))) > 3
    before, told = spoken(folder), json.loads((folder / "config.json").read_text())
    sharpen.sharpen(folder, 1.25)
    after = spoken(folder)
    assert before.keys() == after.keys()
    changed = {f"model.layers.{layer}.self_attn.q_proj.{kind}" for layer in range(2) for kind in queries}
    for name in before:
        assert torch.equal(
            after[name], (before[name].float() * 1.25).to(dtype) if name in changed else before[name]
        ), name
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    assert json.loads((folder / "config.json").read_text()) == {**told, "endprompt": {"sharpened": 1.25}}


@pytest.mark.parametrize("left", [0, 1])
def test_a_model_without_a_query_projection_a_layer_is_refused(base, tmp_path, left):
    folder = saved(tmp_path / "model", base)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2 - left):
        tensors[f"model.layers.{layer}.self_attn.qkv_proj.weight"] = tensors.pop(
            f"model.layers.{layer}.self_attn.q_proj.weight"
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=f"has {left} query projections in 2 layers"):
        sharpen.sharpen(folder, 1.2)


def test_recipe_and_method_say_how_much(recipe_file):
    """The base's window is 256 and the target 512: 9 / 8."""

    def found(method, *overrides):
        return Experiment.of(schema.load(recipe_file(), overrides), method).sharpness

    assert found("pose") == 1.0
    assert found("pose_sharp") == pytest.approx(9 / 8)
    assert found("pose_sharp", "rope.sharpen=0") == 1.0
    assert found("full_length", "rope.sharpen=0.5") == pytest.approx((9 / 8) ** 0.5)


# A base whose weights are sharpened already


def noted(folder, **note):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **({"endprompt": note} if note else {})}))
    return folder


def scores(folder):
    """Logarithms of the first layer's attention, each row counted from its first key: the differences of the
    scores, in float64."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    found = network(torch.arange(3, 40)[None], output_attentions=True).attentions[0].double().log()
    return (found - found[..., :1]).tril()


@pytest.mark.parametrize(
    "start, target, noted_from, missing, twice",
    [
        (256, 2048, {"original_length": 256}, 1, 11 / 8),  # all of it is there
        (
            256,
            4096,
            {"original_length": 256},
            12 / 11,
            12 / 8,
        ),  # ln 4096 / ln 256 = 12 / 8 in all, of which 11 / 8 is there
        (
            2048,
            4096,
            {"original_length": 256},
            12 / 11,
            12 / 11,
        ),  # a window that was extended: its own factor is what is missing
        (
            4096,
            8192,
            {"original_length": 4096, "sharpened_from": 256},
            13 / 11,
            13 / 12,
        ),  # a run between that did not sharpen
        (256, 2048, {}, 1, 11 / 8),  # from where is not known: from the base's own window
        (256, 512, {"original_length": 256}, 1, 9 / 8),  # more is there than is wished
    ],
)
def test_a_sharpened_base_gets_what_is_missing(
    recipe_file, base, tmp_path, start, target, noted_from, missing, twice
):
    """Its scores are in the end those of the plain base times the whole factor, however many runs it took.
    twice: the factor that a base without the note gets, on top of what is there."""
    plain, done = shutil.copytree(base, tmp_path / "plain"), shutil.copytree(base, tmp_path / "done")
    noted(done, **noted_from)
    sharpen.sharpen(done, 11 / 8)
    for folder in (plain, done):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": start}))
    recipe = schema.load(recipe_file(model={"name_or_path": str(done)}, lengths={"target": target}))
    t = Experiment.of(recipe, "pose_sharp").sharpness
    assert t == pytest.approx(missing, rel=1e-12)
    assert Experiment.of(recipe, "pose").sharpness == 1.0  # what is there stays
    power = Experiment.of(recipe, "pose_sharp").method.power(recipe.rope.sharpen)
    bare = SimpleNamespace(max_position_embeddings=start)
    assert sharpen.missing(power, bare, start, target) == pytest.approx(twice)
    before = scores(plain)
    sharpen.sharpen(done, t)
    torch.testing.assert_close(scores(done), 11 / 8 * missing * before, atol=1e-4, rtol=1e-4)
    assert json.loads((done / "config.json").read_text())["endprompt"]["sharpened"] == pytest.approx(
        11 / 8 * missing
    )


@pytest.mark.parametrize(
    "note",
    [
        {"sharpened": "1.4"},
        {"sharpened": -1.0, "original_length": 256},
        {"sharpened": 0},
        {"sharpened": 1.4, "original_length": "256"},
        {"sharpened": True},
        {"sharpened": 1.4, "sharpened_from": 0},
    ],
)
def test_a_note_that_says_nothing_is_refused(recipe_file, base, tmp_path, note):
    folder = noted(shutil.copytree(base, tmp_path / "model"), **note)
    code, out, err = run_main(
        "prepare", recipe_file(model={"name_or_path": str(folder)}), "pose", "--out", tmp_path / "out"
    )
    assert (
        code == 2
        and not out
        and err.count("\n") == 1
        and f"endprompt.{'original_length' if '256' in note.values() else 'sharpened'}" in err
        and not (tmp_path / "out").exists()
    )


def test_a_staged_base_is_sharpened_from_its_first_window(recipe_file, base, tmp_path):
    """Its first training was on short rows: its attention is as sharp as 64 tokens taught it to be."""
    folder = noted(
        shutil.copytree(base, tmp_path / "model"), method="pose", original_length=64, target_length=256
    )
    recipe = schema.load(recipe_file(model={"name_or_path": str(folder)}))
    assert Experiment.of(recipe, "pose_sharp").sharpness == pytest.approx(9 / 6)
    assert sharpen.inherited(model.load_config(recipe)) == {}


@pytest.mark.parametrize("value", ["-0.1", "4.5", "true", "much", ".inf"])
def test_unusable_shares_are_refused(recipe_file, tmp_path, value):
    code, out, err = run_main(
        "prepare", recipe_file(), "pose", "--out", tmp_path / "out", "--set", f"rope.sharpen={value}"
    )
    assert code == 2 and not out and err.count("\n") == 1 and "rope.sharpen" in err


@pytest.mark.distributed
@pytest.mark.parametrize(
    "ranks, options, there",
    [
        (2, (), 1.0),
        pytest.param(1, ("--set", "train.lora={r: 4, alpha: 8}"), 1.0, marks=pytest.mark.slow),
        pytest.param(1, (), 1.5, marks=pytest.mark.slow),
    ],
    ids=["two ranks", "lora", "sharpened base"],
)
def test_a_run_ends_with_sharpened_attention_and_is_else_the_same(
    train_recipe, base, tmp_path, ranks, options, there
):
    """1.5 is more than the 1.25 that is asked for, so nothing is added.  The base states its window wherever
    it can; model/ states the target."""
    odd = shutil.copytree(base, tmp_path / "base")
    if there != 1:
        noted(odd, method="pose_sharp", original_length=256, sharpened=there)
    short_everywhere(odd, 256)
    trained = {}
    for method in ("pose", "pose_sharp"):
        folder = prepared(train_recipe, method, tmp_path)
        run(
            train(
                train_recipe,
                method,
                tmp_path,
                "--set",
                "train.max_steps=2",
                "--set",
                "rope.type=yarn",
                "--set",
                f"model.name_or_path={odd}",
                *options,
                ranks=ranks,
            )
        )
        trained[method] = weights(folder)
        assert set(model.stated_lengths(folder / "model").values()) == {1024}
        checkpoint = next((folder / "checkpoints").glob("checkpoint-*"))
        assert set(model.stated_lengths(checkpoint).values()) == {1024, None}  # it has no tokenizer
    saved_config = json.loads((folder / "model/config.json").read_text())
    assert saved_config["rope_theta"] == 10000.0 and saved_config["rope_scaling"]["rope_type"] == "yarn"
    assert saved_config["use_cache"] is True  # as the base says; the Trainer switches it off
    told = saved_config["endprompt"]
    t = sharpen.factor(1.0, 256, 1024) if there == 1 else 1.0
    assert told["method"] == "pose_sharp" and told["sharpened"] == pytest.approx(t * there)
    for name, tensor in trained["pose"].items():
        assert torch.equal(trained["pose_sharp"][name], tensor * t if "q_proj" in name else tensor), name


@pytest.mark.parametrize("name", ["base", "interpolation"])
def test_what_is_not_trained_is_scored_as_sharp_as_asked(recipe_file, base, tmp_path, name):
    """As if it were saved and sharpened; 1 in the recipe is ln L / ln C."""
    from endprompt.evaluation import scored_model

    ids = torch.arange(3, 40)[None]

    def scored(*overrides):
        experiment = Experiment.of(schema.load(recipe_file(), overrides), name, tmp_path)
        network, _, identity = scored_model.load(experiment, None)
        return network, identity["sharpened"]

    plain, t = scored()
    assert t == 1.0
    folder = tmp_path / "model"
    plain.save_pretrained(folder)
    checked = schema.load(recipe_file())
    wanted = sharpen.factor(1.0, model.load_config(checked).max_position_embeddings, checked.lengths.target)
    sharpen.sharpen(folder, wanted)
    on_disk = type(plain).from_pretrained(folder)
    network, t = scored("rope.sharpen=1.0")
    assert t == wanted > 1 and torch.equal(network(ids).logits, on_disk(ids).logits)
    # The twin: unsharpened, the logits are others.
    assert not torch.equal(network(ids).logits, plain(ids).logits)
    assert scored("rope.sharpen=0.0")[1] == 1.0


def test_a_model_whose_queries_are_not_found_is_not_sharpened_in_part(base):
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base)
    network.model.layers[1].self_attn.q_proj = torch.nn.Identity()
    with pytest.raises(Failure, match="query projections in"):
        sharpen.sharpen_network(network, 1.5)
