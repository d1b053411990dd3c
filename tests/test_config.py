"""The recipe: what YAML may say, overrides, paths, the resolved copy, and the files that come with the
repository.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import REPOSITORY, run_main

from endprompt import BadInput, methods
from endprompt.recipe import former_keys, settings_file
from endprompt.recipe import schema as config
from endprompt.recipe.experiment import Experiment

RECIPES = sorted(
    path for path in (REPOSITORY / "recipes").glob("*.yaml") if path.name != "sft.yaml"
)  # that one is TRL's, see test_sft.py
ZERO_FILES = sorted((REPOSITORY / "ds_configs").glob("*.json"))


def name(path):
    return path.name


@pytest.mark.parametrize(
    "text, value",
    [
        ("1.0e9", 1e9),
        ("2e-5", 2e-5),
        ("2.0e-5", 2e-5),
        ("1E3", 1000.0),
        ("+1e+3", 1000.0),
        ("-2.5e-3", -0.0025),
        (".5e1", 5.0),
        ("1_000e3", 1e6),
        ("0.1", 0.1),
        ("12", 12),
        ("1e", "1e"),
        ("e5", "e5"),
        ("2e-5x", "2e-5x"),
        ("'2e-5'", "2e-5"),
        ("", None),
        ("null", None),
        ("[1e3, a]", [1000.0, "a"]),
    ],
)
def test_yaml_values(text, value):
    read = settings_file.parse(text, "here")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    "text, telling",
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 1", "line 3: the key 'b' is given twice"),
        ("a: {b: 1, b: 2}", "'b' is given twice"),
        ("[{a: 1, a: 2}]", "'a' is given twice"),
        ("a: 1\n'a': 2", "'a' is given twice"),
        ("1: a", "line 1: the key 1 is not text"),
        ("a: [1", "not valid YAML at line 1"),
        ("a: 1\n\tb: 2", "not valid YAML at line 2"),
    ],
)
def test_yaml_errors(text, telling):
    with pytest.raises(BadInput, match="^here: ") as caught:
        settings_file.parse(text, "here")
    assert telling in str(caught.value)


def test_duplicate_key_in_a_recipe(recipe_file):
    path = recipe_file()
    path.write_text(path.read_text() + "rope: {type: linear}\nrope: {type: null}\n")
    with pytest.raises(BadInput, match="'rope' is given twice"):
        config.load(path)


def test_numbers_reach_their_types(recipe_file):
    path = recipe_file()
    path.write_text(
        path.read_text()
        .replace("tokens: 4096", "tokens: 1.0e9")
        .replace("prompt_loss_weight: 0.1", "prompt_loss_weight: 1")
        .replace("learning_rate: 0.0003", "learning_rate: 2e-5")
    )
    recipe = config.load(path)
    assert recipe.data.tokens == 10**9 and type(recipe.data.tokens) is int
    weight = Experiment.of(recipe, "endprompt").options.prompt_loss_weight
    assert weight == 1.0 and type(weight) is float
    assert recipe.train["learning_rate"] == 2e-5


def test_overrides(recipe_file):
    recipe = config.load(
        recipe_file(),
        [
            "lengths.target=1024",
            "data.end_prompts=[EP_2, 'So it ends.']",
            "data.tokens=2e3",
            "train.weight_decay=1e-2",
            "rope.type=linear",
            "train.gradient_checkpointing_kwargs.use_reentrant=false",
            "train.lr_scheduler_type=cosine",
            "model.revision='1'",
            "data.seed=7",
            "lengths.target = 2048",
        ],
    )
    assert recipe.lengths.target == 2048
    assert Experiment.of(recipe, "endprompt").options.end_prompts == ["EP_2", "So it ends."]
    assert recipe.data.tokens == 2000
    assert recipe.data.seed == 7
    assert recipe.rope.type == "linear"
    assert recipe.model.revision == "1"
    assert recipe.train["weight_decay"] == 0.01
    assert recipe.train["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    assert recipe.lengths.physical == 64


def test_an_override_takes_text_with_equals_signs(recipe_file):
    for section in ("method_options", "data"):
        recipe = config.load(recipe_file(), [f"{section}.end_prompts=['a = b']"])
        assert Experiment.of(recipe, "endprompt").options.end_prompts == ["a = b"]


@pytest.mark.parametrize("path", RECIPES, ids=name)
@pytest.mark.parametrize("method", methods.METHODS)
def test_resolved_copy_is_the_same_recipe(path, method, tmp_path, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    changed = ["train.lr_scheduler_type=cosine", "data.tokens=1e6"]
    # Steps of whole rows, for methods whose rows are as long as the target.
    changed.append("train.gradient_accumulation_steps=192")
    given = [f"--set={one}" for one in changed]
    code, out, err = run_main("prepare", path, method, *given, "--dry-run", "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert not (tmp_path / "out").exists()
    copy = tmp_path / "copy.yaml"
    copy.write_text(out)
    original = Experiment.of(config.load(path, changed), method)
    again = Experiment.of(config.load(copy), method)
    assert again.recipe.name == original.recipe.name == path.stem
    own = {"method_options"}  # compared below: the copy has those of its method alone, all of them
    assert again.recipe.model_dump(exclude=own) == original.recipe.model_dump(exclude=own)
    assert again.options == original.options and again.dump() == out
    assert yaml.safe_load(out)["method_options"] == (
        {method: original.options.model_dump(mode="json")} if original.options.model_dump() else {}
    )
    assert yaml.safe_load(out)["method"] == method
    assert yaml.safe_load(out)["data"]["tokens"] == 1000000


def test_every_recipe_is_checked():
    assert {"tiny.yaml", "smollm2-135m-64k.yaml"} <= {path.name for path in RECIPES}
    assert {"zero2.json", "zero3.json", "zero3_offload.json"} <= {path.name for path in ZERO_FILES}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_recipes_load_from_anywhere(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from_elsewhere = config.load(path).train["deepspeed"]
    monkeypatch.chdir(path.parent)
    recipe = config.load(path.name)
    if path.stem.endswith(("-lora", "-qlora", "-cpu")):  # of one device, which shares nothing
        assert from_elsewhere is recipe.train["deepspeed"] is None
        return
    assert Path(from_elsewhere) == Path(recipe.train["deepspeed"]) in ZERO_FILES
    if path.stem == "tiny":
        assert recipe.path(recipe.model.name_or_path).samefile(REPOSITORY / "recipes/tiny/base")
        assert recipe.path(recipe.data.corpus).samefile(REPOSITORY / "recipes/tiny/corpus.jsonl.gz")


def test_paths_are_sought_here_then_beside_the_recipe_then_above(recipe_file, tmp_path, monkeypatch):
    folder, elsewhere = tmp_path / "recipes", tmp_path / "elsewhere"
    folder.mkdir(), elsewhere.mkdir()
    recipe = config.load(recipe_file().rename(folder / "r.yaml"))
    monkeypatch.chdir(elsewhere)
    assert recipe.path("some.txt") is None
    for place in (tmp_path, folder, elsewhere):
        (place / "some.txt").touch()
        assert recipe.path("some.txt").samefile(place / "some.txt")
    assert recipe.path(str(tmp_path / "some.txt")) == tmp_path / "some.txt"
    monkeypatch.setenv("HOME", str(folder))
    assert recipe.path("~/some.txt") == folder / "some.txt"


@pytest.mark.parametrize(
    "plain", ["small", "Llama-3.1_8B", "a b", "zürich", "x" * 200, "r=8,alpha=16", "tiny.v2"]
)
def test_plain_names_of_recipes(recipe_file, tmp_path, plain):
    path = recipe_file().rename(tmp_path / f"{plain}.yaml")
    assert config.load(path).name == plain
    copy = tmp_path / "recipe.yaml"
    copy.write_text(Experiment.of(config.load(path), "endprompt").dump())
    assert config.load(copy).name == plain


def test_defaults_are_what_a_recipe_without_them_has(recipe_file):
    path = recipe_file()
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": "x"},
                "lengths": {"physical": 64, "target": 512},
                "data": {"corpus": "x", "tokens": 64},
            }
        )
    )
    recipe = config.load(path).model_dump(mode="json")
    assert all(
        recipe[key.partition(".")[0]][key.partition(".")[2]] == value
        for key, value in config.defaults().items()
    )
    assert config.defaults()["model.trust_remote_code"] is False


@pytest.mark.parametrize("value", ["no/such", "a" * 5000, "~nobody-of-this-name/x", "\0"])
def test_a_path_that_cannot_be_is_none(value, recipe_file):
    assert config.load(recipe_file()).path(value) is None


@pytest.mark.parametrize("path", ZERO_FILES, ids=name)
def test_zero_files(path, tmp_path):
    """transformers fills every "auto", and what results passes DeepSpeed's own schema."""
    from deepspeed.runtime import constants
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    filled = HfTrainerDeepSpeedConfig(str(path))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=8, learning_rate=2e-5
    )
    filled.trainer_config_process(arguments)
    filled.trainer_config_finalize(
        arguments, SimpleNamespace(config=SimpleNamespace(hidden_size=4096)), num_training_steps=10
    )
    options = filled.config
    assert "auto" not in json.dumps(options)
    # DeepSpeed refuses unknown keys inside its sections, but not beside them.
    assert set(options) <= {value for value in vars(constants).values() if isinstance(value, str)} | {
        "zero_optimization"
    }
    schema = DeepSpeedConfig(options)
    assert schema.zero_config.stage == (2 if path.stem == "zero2" else 3)
    assert schema.train_batch_size == 8
    assert (schema.zero_config.offload_optimizer is not None) == ("offload" in path.stem)


def test_zero_file_in_the_recipe_itself(recipe_file):
    options = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
    assert config.load(recipe_file(train={"deepspeed": options})).train["deepspeed"] == options
    assert config.load(recipe_file(train={"deepspeed": None})).train["deepspeed"] is None


# -- options of methods --------------------------------------------------------------------------------------


def resolved(path, method, *settings):
    """(exit code, the resolved options of the method, stderr) of a dry run."""
    given = [part for setting in settings for part in ("--set", setting)]
    code, out, err = run_main("prepare", path, method, *given, "--dry-run")
    return code, yaml.safe_load(out)["method_options"].get(method) if code == 0 else out, err


def test_an_option_by_its_name_and_under_its_methods(recipe_file):
    path = recipe_file()
    for key in ("pose_chunks", "pose.pose_chunks"):
        assert resolved(path, "pose", f"method_options.{key}=3") == (
            0,
            {"pose_chunks": 3, "pose_text": "contiguous"},
            "",
        )
    # The nearer name goes first, and other methods' stay with them.
    options = ["method_options.pose_chunks=3", "method_options.pose.pose_chunks=4"]
    assert resolved(path, "pose", *options)[1]["pose_chunks"] == 4
    assert resolved(path, "pose_sharp", *options)[1]["pose_chunks"] == 3
    assert resolved(path, "short", "method_options.pose.pose_chunks=4") == (0, None, "")


LACKING = [name for name, one in methods.METHODS.items() if "pose_chunks" not in one.Options.model_fields]


@pytest.mark.parametrize("method", LACKING)
def test_an_option_is_refused_for_a_method_that_lacks_it(recipe_file, method):
    path, known = recipe_file(), ", ".join(methods.get(method).Options.model_fields) or "none"
    for key in ("pose_chunks", f"{method}.pose_chunks"):
        code, out, err = resolved(path, method, f"method_options.{key}=3")
        where = "method_options.pose_chunks" if key == "pose_chunks" else f"method_options.{key}"
        assert (code, out) == (2, "") and err == (
            f"endprompt: {where}: {method} has no such option (it has: {known}); remove it\n"
        )


@pytest.mark.parametrize("method", methods.METHODS)
def test_former_keys_are_options_of_the_methods_that_have_them(recipe_file, method):
    """In the file and in --set, for all methods at once; they mean what the new ones do."""
    values = {
        "end_prompts": ["EP_3"],
        "prompt_loss_weight": 0.3,
        "pose_chunks": 3,
        "pose_text": "later_span",
        "recall_share": 0.3,
        "recall_cue": 3,
        "recall_tokens": 9,
        "match_pieces": 8,
        "match_tokens": 7,
        "s2_group_size": 16,
    }
    former = {key: f"{section}.{key}" for section, keys in former_keys.FORMER.items() for key in keys}
    assert set(former) == set(values)
    inside = {section: {key: values[key] for key in keys} for section, keys in former_keys.FORMER.items()}
    inside["data"]["packing"] = "document"
    outside = [f"{former[key]}={json.dumps(value)}" for key, value in values.items()]
    own = {key: value for key, value in values.items() if key in methods.get(method).Options.model_fields}
    today = [f"method_options.{key}={json.dumps(value)}" for key, value in own.items()]
    plain = "data.packing=document"
    wanted = (0, {**methods.get(method).Options().model_dump(mode="json"), **own} or None, "")
    assert resolved(recipe_file("file", **inside), method) == wanted
    assert resolved(recipe_file("set"), method, plain, *outside) == wanted
    assert resolved(recipe_file("new"), method, plain, *today) == wanted
    # A new name goes before a former one.
    if "pose_chunks" in own:
        both = {"data": {"pose_chunks": 3}, "method_options": {"pose_chunks": 4}}
        assert resolved(recipe_file("both", **both), method)[1]["pose_chunks"] == 4


SPELLINGS = ["data.pose_chunks", "method_options.pose_chunks", "method_options.pose.pose_chunks"]


@pytest.mark.parametrize("inside", SPELLINGS)
@pytest.mark.parametrize("outside", SPELLINGS)
def test_set_outweighs_a_file_that_spells_an_option_in_another_way(recipe_file, inside, outside):
    """As a resolved recipe does, which names the method."""
    section, *names = inside.split(".")
    value = {names[-1]: 3} if len(names) == 1 else {names[0]: {names[1]: 3}}
    path = recipe_file(**{section: value})
    assert resolved(path, "pose")[1]["pose_chunks"] == 3
    assert resolved(path, "pose", f"{outside}=5")[1]["pose_chunks"] == 5
    # Of two settings the last counts.
    assert resolved(path, "pose", f"{inside}=4", f"{outside}=5")[1]["pose_chunks"] == 5


def test_set_leaves_other_options_and_other_methods_alone(recipe_file):
    own = {"pose": {"pose_chunks": 3, "pose_text": "later_span"}, "pose_sharp": {"pose_chunks": 4}}
    path = recipe_file(method_options=own, data={"packing": "document"})
    assert resolved(path, "pose", "data.pose_chunks=5")[1] == {"pose_chunks": 5, "pose_text": "later_span"}
    named = resolved(path, "pose_sharp", "method_options.pose.pose_chunks=5")
    assert named[1] == {"pose_chunks": 4, "pose_text": "contiguous"}


def test_other_methods_leave_options_by_their_bare_names_behind(recipe_file):
    recipe = config.load(
        recipe_file(),
        ["method_options.match_tokens=3", "method_options.pose.pose_chunks=4", "data.prompt_loss_weight=0.3"],
    )
    experiment = Experiment.of(recipe, "pose_matched")
    assert experiment.options.match_tokens == 3
    assert experiment.with_method("pose").options.pose_chunks == 4
    assert experiment.with_method("endprompt").options.prompt_loss_weight == 0.3
