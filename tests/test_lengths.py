"""The window of a scaled base: read as its scaling says, or refused where it cannot be told."""

import json
import shutil

import pytest
from conftest import run_main, tiny_documents, write_jsonl

from endprompt import BadInput
from endprompt.bases import lengths, older_readers
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment


def yarn(factor=4.0, first=256, **more) -> dict:
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": first,
        **more,
    }


def llama3(factor, first) -> dict:
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {**yarn(factor, first), "rope_type": "llama3", **more}


def scaled(folder, base, stated, scaling, **more):
    """The tiny base, whose config.json states a window of ``stated`` tokens and is scaled so."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    told = {key: value for key, value in json.loads(path.read_text()).items() if key != "rope_parameters"}
    told |= {"max_position_embeddings": stated, "rope_theta": 10000.0, "rope_scaling": scaling, **more}
    path.write_text(json.dumps(told))
    return folder


@pytest.fixture
def experiment(recipe_file):
    def make(folder, target, kind, method="short", **model):
        given = {"name_or_path": str(folder), **model}
        path = recipe_file(model=given, lengths={"target": target}, rope={"type": kind})
        return Experiment.of(schema.load(path), method)

    return make


# what -> (window that is stated, scaling, window that is read, target, factor in all)
READ = {
    "Qwen3, whose README adds YaRN alone": (320, yarn(), 1024, 2048, 8.0),
    "Qwen2.5, which states the first window": (256, yarn(), 1024, 2048, 8.0),
    "YaRN that states its window": (1024, yarn(), 1024, 2048, 8.0),
    "YaRN that states more than its factor": (1536, yarn(), 1536, 3072, 8.0),
    "YaRN of a factor that is no binary fraction": (320, yarn(3.2, 320), 1024, 2048, 6.4),
    "Llama-3.1, whose factor is the window's": (512, llama3(8.0, 64), 512, 1024, 16.0),
    "Llama-3.2, whose factor is more than that": (1024, llama3(32.0, 64), 1024, 2048, 64.0),
    "llama3 that states the first window": (64, llama3(8.0, 64), 512, 1024, 16.0),
    "linear": (1024, {"rope_type": "linear", "factor": 4.0}, 1024, 2048, 8.0),
}


@pytest.mark.parametrize("name", READ)
def test_a_scaled_base_reads_what_its_scaling_says(experiment, base, tmp_path, name):
    stated, scaling, window, target, factor = READ[name]
    folder = scaled(tmp_path / "model", base, stated, scaling)
    found = experiment(folder, target, scaling["rope_type"])
    assert found.base.window == window and found.scaling.factor == pytest.approx(factor)
    # The twin: nothing is extended to what the base reads already.
    with pytest.raises(BadInput, match=f"does not exceed the model's own window of {window};"):
        experiment(folder, window, scaling["rope_type"]).base.config  # noqa: B018 (refuses)


def test_init_refuses_the_window_that_yarn_reads_already(base, tmp_path):
    """The case of Qwen3's README, in 1 / 128 of its lengths: 40960 stated, 32768 x 4 read."""
    folder = scaled(tmp_path / "model", base, 320, yarn())
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents(40, 18))
    given = ("init", folder, "--corpus", text, "--out", tmp_path / "my.yaml")
    code, out, error = run_main(*given, "--target", 1024)
    assert (code, out) == (2, "") and "own window of 1024" in error and error.count("\n") == 1
    assert not (tmp_path / "my.yaml").exists()
    code, _, error = run_main(*given, "--target", 2048)
    assert code == 0, error
    found = Experiment.of(schema.load(tmp_path / "my.yaml"), "pose_matched").scaling
    assert found == rope.Yarn(8.0, 256)


def test_what_was_trained_here_reads_its_target(experiment, base, tmp_path):
    """A factor that was rounded up promises more than the rows that were trained."""
    first = experiment(base, 600, "yarn", "lceg")
    assert first.scaling.factor * first.base.window == 768
    config = first.base.config
    rope.apply(config, first.scaling, 600)
    config.endprompt = {"original_length": 256, "target_length": 600}
    folder = shutil.copytree(base, tmp_path / "model")
    config.save_pretrained(folder)
    older_readers.state_rope(folder)
    again = experiment(folder, 1200, "yarn")
    assert again.base.window == 600 and again.scaling.factor == 6.0
    # The twin: of somebody else's file the factor counts.
    told = json.loads((folder / "config.json").read_text())
    del told["endprompt"]
    (folder / "config.json").write_text(json.dumps(told))
    assert experiment(folder, 1200, "yarn").base.window == 768


@pytest.mark.parametrize("key", lengths.WINDOW_KEYS)
def test_two_windows_of_a_scaled_base_are_refused(experiment, recipe_file, base, tmp_path, key):
    """As of vicuna-16k: 4096 in one key and 16384 in another, under linear by 4."""
    linear = {"type": "linear", "factor": 4.0}
    folder = scaled(tmp_path / "model", base, 256, linear, **{key: 1024})
    recipe = recipe_file(
        model={"name_or_path": str(folder)}, lengths={"target": 2048}, rope={"type": "linear"}
    )
    code, out, error = run_main("prepare", recipe, "short", "--out", tmp_path / "out")
    assert (code, out) == (2, "") and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"model: {key} in its config.json is 1024, and max_position_embeddings 256" in error
    assert "set model.original_length" in error
    # The twins: the recipe says which; both say the same; nothing is scaled.
    assert experiment(folder, 2048, "linear", original_length=1024).scaling == rope.Linear(8.0)
    for number, (scaling, value, factor) in enumerate(((linear, 256, 32.0), (None, 1024, 8.0))):
        other = scaled(tmp_path / f"other{number}", base, 256, scaling, **{key: value})
        assert experiment(other, 2048, "linear").scaling == rope.Linear(factor)


def test_a_tokenizer_that_reads_more_than_a_linear_base_states_is_refused(experiment, base, tmp_path, capsys):
    """As of LongLoRA's: 4096 in config.json, 32768 in the tokenizer's, under linear by 8."""
    folder = scaled(tmp_path / "model", base, 256, {"type": "linear", "factor": 4.0})
    told = json.loads((folder / "tokenizer_config.json").read_text())

    def says(value, **more):
        (folder / "tokenizer_config.json").write_text(json.dumps(told | {"model_max_length": value}))
        found = experiment(folder, 2048, "linear", **more).scaling
        return found, capsys.readouterr().err.count("warning: model: its config.json does not say from which")

    with pytest.raises(
        BadInput, match="is 1024, and max_position_embeddings in its config.json 256.*set mod"
    ):
        says(1024)
    # The twins: the recipe says which; the tokenizer agrees; it says nothing of use, which is told.
    assert says(1024, original_length=1024) == (rope.Linear(8.0), 0)
    assert says(256) == (rope.Linear(32.0), 0)
    assert says(int(1e30)) == says(None) == (rope.Linear(32.0), 1)


def test_a_key_that_states_what_yarn_reads_is_no_other_window(experiment, base, tmp_path):
    folder = scaled(tmp_path / "model", base, 320, yarn(), max_seq_len=1024, model_max_length=320)
    assert experiment(folder, 2048, "yarn").scaling == rope.Yarn(8.0, 256)
    wrong = scaled(tmp_path / "wrong", base, 320, yarn(), max_seq_len=256)
    with pytest.raises(BadInput, match="max_seq_len in its config.json is 256.*yarn, factor 4"):
        experiment(wrong, 2048, "yarn").base.config  # noqa: B018 (refuses)


@pytest.mark.parametrize("scaling", [yarn(), llama3(8.0, 256)], ids=lambda one: one["rope_type"])
def test_the_window_before_the_scaling_is_not_the_bases(recipe_file, base, tmp_path, scaling):
    """By it the factor would be multiplied a second time: 16 in place of the 4 that are there."""
    folder, kind = scaled(tmp_path / "model", base, 320, scaling), scaling["rope_type"]
    for given in (256, 64):
        model = {"name_or_path": str(folder), "original_length": given}
        recipe = recipe_file(model=model, lengths={"target": 4096}, rope={"type": kind})
        code, out, error = run_main("prepare", recipe, "short", "--out", tmp_path / "out")
        assert (code, out) == (2, "") and error.count("\n") == 1, error
        assert f"model.original_length {given}: the model's RoPE is scaled by {kind} from 256" in error
    # The twin: a window beyond that is the recipe's to say.
    path = recipe_file(model={**model, "original_length": 512}, lengths={"target": 1024}, rope={"type": kind})
    assert Experiment.of(schema.load(path), "short").scaling.factor == 2 * scaling["factor"]
