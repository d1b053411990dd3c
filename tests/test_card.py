"""The model card: what hubs read of it, what a command renews, and what it leaves alone."""

import json
import re
import shutil

import family_models
import pytest
from conftest import REPOSITORY, run_main
from huggingface_hub import ModelCard
from networks import saved
from transformers import AutoConfig

from endprompt.bases import families
from endprompt.evaluation import question
from endprompt.positions import rope
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment
from endprompt.runs import card

TRAINED = {"rows": 64, "tokens": 4096, "steps": 8, "commit": "0123abc"}


@pytest.fixture
def experiment(recipe_file, base, tmp_path):
    def make(method="endprompt", folder=base, **model):
        recipe = schema.load(recipe_file(model={"name_or_path": str(folder), **model}))
        found = Experiment.of(recipe, method, tmp_path / "runs")
        (found.run / "model").mkdir(parents=True, exist_ok=True)
        return found

    return make


def written(experiment, config=None) -> str:
    """The card of a model with ``config``."""
    folder = experiment.run / "model"
    told = config or {
        "model_type": "llama",
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        "endprompt": {"sharpened": 1.5},
    }
    (folder / "config.json").write_text(json.dumps(told))
    card.write(experiment, folder, TRAINED)
    return (folder / card.NAME).read_text()


def test_a_card_is_one_that_hubs_read_and_is_the_same_each_time(experiment, tmp_path):
    made = experiment()
    text = written(made)
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["long-context", "endprompt"] or "endprompt" in data["tags"]
    assert "base_model" not in data and "license" not in data  # a folder is no id; it states no licence
    assert written(made) == text
    for said in (
        "# base, 512 tokens",
        "256 tokens of the base, 512 now",
        "64 of 64 tokens, 4096 in all",
        "commit `0123abc`",
        "type `linear`, factor 2, rope_theta 10000",
        "multiplied by 1.5000, which is in the queries' weights",
        "`vllm serve FOLDER --max-model-len 512`; where that is left out, it derives 1024",
        "None yet.",
    ):
        assert said in text, said
    assert str(tmp_path) not in text and str(REPOSITORY) not in text


STATED = {
    "a name": ("---\nlicense: apache-2.0\n---\n# Base\n", {"license": "apache-2.0"}),
    "its own": (
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\n---\n",
        {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
    ),
    "none": ("# Base\n", {}),
    "no YAML": ("---\nlicense: [\n---\n", {}),
    "no mapping": ("---\n- license\n---\n", {}),
    "no text": ("---\nlicense: {a: 1}\n---\n", {}),
    "no UTF-8": (b"\xff\xfe", {}),
}


@pytest.mark.parametrize("name", STATED)
def test_the_licence_is_what_the_base_states(experiment, base, tmp_path, name):
    content, wanted = STATED[name]
    folder = shutil.copytree(base, tmp_path / "stating")
    (folder / "README.md").write_bytes(content if isinstance(content, bytes) else content.encode())
    data = ModelCard(written(experiment(folder=folder))).data.to_dict()
    assert {key: data[key] for key in data if key.startswith("license")} == wanted


def test_a_licence_in_the_config_counts_too(experiment, base, tmp_path):
    folder = saved(tmp_path / "stating", base)
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "license": "mit"}))
    assert ModelCard(written(experiment(folder=folder))).data.license == "mit"


def test_scores_are_renewed_and_all_else_stays(experiment):
    made = experiment()
    text = written(made)
    path = made.run / "model" / card.NAME
    path.write_text(text.replace("# base, 512 tokens", "# Mine"))
    rows = [("passkey", 512, 87.5, 80.0, 93.25, 100), ("perplexity", 512, 3.25, 3.1, 3.4, 9)]
    assert card.renew(made.run / "model", [*rows, ("mmlu", None, 25.0, 24.0, 26.0, 14042)])
    after = path.read_text()
    assert "| passkey | 512 | 87.50 % | 80.00 to 93.25 | 100 |" in after
    assert "| perplexity | 512 | 3.250 | 3.100 to 3.400 | 9 |" in after
    assert "| mmlu | - | 25.00 % | 24.00 to 26.00 | 14042 |" in after
    assert "# Mine" in after and "None yet." not in after
    card.renew(made.run / "model", rows[:1])
    assert "mmlu" not in path.read_text() and path.read_text().count("passkey") == 1
    # Without scores the rest is made again, and the table stays.
    card.renew(made.run / "model")
    assert "| passkey | 512 |" in path.read_text()


def test_a_card_of_someone_elses_is_left_alone(experiment):
    made = experiment()
    text = written(made)
    path = made.run / "model" / card.NAME
    for own in (
        "# All mine\n",
        text.replace("<!-- /scores -->", ""),
        text + "<!-- form -->\n<!-- /form -->\n",
    ):
        path.write_text(own)
        assert not card.renew(made.run / "model", [("passkey", 512, 1.0, 0.0, 2.0, 4)])
        assert path.read_text() == own
    path.unlink()
    assert not card.renew(made.run / "model", []) and not path.exists()


def test_attention_by_position_and_yarn_are_told_as_they_are(experiment):
    config = {
        "model_type": "ministral3",
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4},
        "endprompt": {"sharpened_beyond": 64, "beta": 0.2404},
    }
    text = written(experiment(), config)
    assert "1 + 0.2404 ln(1 + floor(p / 64))" in text and "version 4 does not know this type" in text
    assert "where that is left out, it derives 512" in text and "convert_hf_to_gguf.py" in text
    linear = {**config, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}}
    assert "reads this type under YaRN alone" in card.loading(linear)


@pytest.mark.parametrize("name", family_models.MODELS)
def test_the_rope_of_every_family_is_told_as_it_is(experiment, base, tmp_path, name):
    """From the config.json that an extended model is saved with; some families nest it by kind of layer."""
    kind = family_models.MODELS[name].rope or "linear"
    config = AutoConfig.for_model(**family_models.written(name))
    scaling = rope.extended(rope.Asked(kind), rope.own_scheme(config), 1024, 4096)
    rope.apply(config, families.written_scheme(config, scaling, 1024), 4096)
    config.save_pretrained(tmp_path / "config")
    told = json.loads((tmp_path / "config/config.json").read_text())
    text = written(experiment(), told)
    said = rope.parameters(config)
    line = next(line for line in text.splitlines() if line.startswith("- RoPE: "))
    assert line.startswith(f"- RoPE: type `{said['rope_type']}`, ") and ", ." not in text
    for key in ("factor", "rope_theta", "original_max_position_embeddings"):
        assert (key in said) == (f"{key} " in line)
        assert key not in said or f"{key} {said[key]:g}" in line
    local = told["rope_parameters"].get("sliding_attention")
    other = "RoPE of the layers with a sliding window, the base's: type `default`, rope_theta"
    assert (local is not None) == (other in text)
    assert local is None or f"rope_theta {local['rope_theta']:g}." in text.partition(other[:-10])[2]
    # vLLM multiplies the window under linear scaling, but of Gemma-3.
    multiplied = said["rope_type"] == "linear" and "gemma" not in told["model_type"]
    window = int(4096 * said["factor"]) if multiplied else 4096
    assert f"where that is left out, it derives {window}" in text
    assert ("which nobody trained" in text) == multiplied


@pytest.mark.parametrize("type_, derived", [("olmo3", 4096), ("gemma3_text", 512)])
def test_the_window_of_a_nested_linear_scaling(type_, derived):
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    nested = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    config = {"model_type": type_, "max_position_embeddings": 512, "rope_parameters": nested}
    assert f"where that is left out, it derives {derived}" in card.loading(config)
    longrope = {**full, "rope_type": "longrope"}
    told = card.loading({**config, "rope_parameters": {**nested, "full_attention": longrope}})
    assert "drops longrope's factors" in told


def test_a_rope_without_numbers_is_told_without_a_gap():
    for parameters in ({"rope_type": "default"}, {}, None):
        assert card.form({"rope_parameters": parameters}).startswith("- RoPE: type `default`.\n")


def test_a_renewed_card_makes_no_score_stale(experiment, tmp_path):
    made = experiment()
    written(made)
    folder = made.run / "model"
    before = question.fingerprint(folder)
    card.renew(folder, [("passkey", 512, 1.0, 0.0, 2.0, 4)])
    assert question.fingerprint(folder) == before
    (folder / "config.json").write_text("{}")  # the twin
    assert question.fingerprint(folder) != before


def test_evaluate_puts_the_scores_into_the_card_and_scores_nothing_twice(two_ranks, train_recipe, tmp_path):
    run = shutil.copytree(two_ranks, tmp_path / "small/endprompt")
    command = ("evaluate", train_recipe, "endprompt", "--out", tmp_path, "--set", "eval.tasks=[passkey]")
    before = (run / "model" / card.NAME).read_text()
    assert ModelCard(before).data.tags and "None yet." in before
    code, out, error = run_main(*command)
    assert code == 0, error
    first = (run / "model" / card.NAME).read_text()
    results = {path: path.read_bytes() for path in (run / "eval").rglob("*.json")}
    assert len(results) == 2
    for path, content in results.items():
        scores = json.loads(content)["scores"]
        row = f"| passkey | {scores['length']} | {scores['score']:.2f} % |"
        assert row in first, (path, first)
    code, again, error = run_main(*command)
    assert (code, again) == (0, out) and "scoring again" not in error
    assert {path: path.read_bytes() for path in results} == results
    assert (run / "model" / card.NAME).read_text() == first
    # Another model's scores are not this one's.
    assert run_main(*command, "--model", run / "model", "--only", "passkey:256")[0] == 0
    assert (run / "model" / card.NAME).read_text() == first


def test_the_card_says_what_the_page_of_engines_says():
    config = {
        "max_position_embeddings": 512,
        "model_type": "llama",
        "rope_parameters": {"rope_type": "default"},
    }
    page = (REPOSITORY / "docs/engines.md").read_text()
    commands = re.findall(r"`([^`]+)`", card.loading(config).replace("512", "L"))
    assert len(commands) >= 6 and [command for command in commands if f"`{command}`" not in page] == []


def test_every_score_has_its_unit():
    scores = [(task, 512, 1.5, 1.25, 1.75, 8) for task in ("passkey", "perplexity", "far_gain")]
    rows = card.table(scores).splitlines()[2:]
    assert [row.split("|")[3].strip() for row in rows] == ["1.50 %", "1.500", "1.5000 nats"]
