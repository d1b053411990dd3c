"""`endprompt init`: a recipe that fits the machine, for any base that works; what cannot fit is refused."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import family_models
import pytest
import yaml
from conftest import REPOSITORY, run_main, tiny_documents, write_jsonl

from endprompt import RECOMMENDED, BadInput
from endprompt.bases import counting
from endprompt.methods import METHODS
from endprompt.planning import estimate, proposal
from endprompt.planning.shapes import SHAPES
from endprompt.recipe import schema
from endprompt.recipe.experiment import Experiment

A24 = estimate.Machine(1, 24, "4090", 0.4)


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "text.jsonl", tiny_documents(40, 18))


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """Of some 600 thousand tokens."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", tiny_documents(400, 150))


def family(folder, name, base):
    """The folder of a config.json of a family, and of the tiny base's tokenizer; no weights are read."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(family_models.written(name)))
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def init(base, corpus, out, *more, target=512):
    return run_main("init", base, "--target", target, "--corpus", corpus, "--out", out, *more)


def test_what_it_writes_is_a_recipe_that_fits(tmp_path, base, corpus):
    out = tmp_path / "my.yaml"
    code, said, error = init(base, corpus, out)
    assert code == 0, error
    assert f"{out}: written" in said and "memory" in said and "time" in said
    assert f"endprompt prepare {out} pose_matched" in said
    recipe = schema.load(out)
    assert (recipe.lengths.physical, recipe.lengths.target) == (256, 512)
    assert recipe.rope.type is None and recipe.eval.lengths == [256, 512]
    assert 5_000 < recipe.data.tokens < 20_000  # what the corpus holds, not 1e8
    code, resolved, error = run_main("prepare", out, "pose_matched", "--dry-run")
    assert code == 0 and yaml.safe_load(resolved)["train"] == recipe.train, error
    # Every key has its reason beside it where there is one to choose.
    assert out.read_text().count("#") > 10


def test_one_method_is_recommended_everywhere():
    readme = (REPOSITORY / "README.md").read_text()
    assert METHODS[RECOMMENDED].trained
    assert f"| `{RECOMMENDED}` | **start here**" in readme and readme.count("**start here**") == 1
    assert f"bash recipes/run.sh my.yaml {RECOMMENDED} " in readme
    for page in ("docs/guide.md", "recipes/tiny/demo.sh", "recipes/llama3-8b-64k.yaml"):
        assert RECOMMENDED in (REPOSITORY / page).read_text()


@pytest.mark.parametrize("name", family_models.MODELS)
def test_a_recipe_for_every_family_and_scaled_bases_in_their_own_scheme(name, tmp_path, base, corpus):
    out, target = tmp_path / "my.yaml", family_models.MODELS[name].target
    code, said, error = init(family(tmp_path / "base", name, base), corpus, out, target=target)
    assert code == 0, error
    recipe = schema.load(out)
    scaled = family_models.MODELS[name].keys.get("rope_scaling") or {}
    scheme = scaled.get("rope_type", scaled.get("type", "yarn"))
    assert recipe.rope.type == (None if scheme == "yarn" else scheme)  # yarn is the method's own
    found = Experiment.of(recipe, "pose_matched")
    written = "longrope" if found.base.config.model_type == "phi3" else scheme
    assert found.scaling.name == written and found.sharpness > 1
    assert recipe.lengths.physical <= found.base.window


@pytest.mark.parametrize(
    "given, complaint",
    [
        (["--target", 256], "does not exceed the model's own window of 256"),
        (["--target", 0], "--target 0"),
        (["--gpus", 0], "--gpus 0"),
        (["--gpu", "abacus"], "--gpu abacus: its peak is not known"),
        (["--gpu-memory", 0.001], "nothing fits 1 x 0.001 GB"),
        (["--method", "interpolation"], "it trains nothing"),
        (["--method", "nope"], "none named 'nope'"),
        (["--method", "longlora", "--train", "all"], "--train all: longlora trains adapters"),
        (["--tokens", -1], "--tokens -1"),
        (["--tokens", "1.5"], "--tokens 1.5: give a whole number of tokens"),
        (["--tokens", "-1e8"], "--tokens -1e8: give a whole number of tokens"),
        (["--tokens", "1e-3"], "--tokens 1e-3: give a whole number of tokens"),
        (["--tokens", "1e99"], "--tokens 1e99: give a whole number of tokens"),
        (["--tokens", "1e999999999999999999999"], "give a whole number of tokens"),
        (["--tokens", "nan"], "--tokens nan: give a whole number of tokens"),
        (["--tokens", "inf"], "--tokens inf: give a whole number of tokens"),
        (["--tokens", "many"], "--tokens many: give a whole number of tokens"),
        (["--tokens", "٣"], "--tokens ٣: give a whole number of tokens"),
        (["--tokens", ""], "--tokens : give a whole number of tokens"),
        (["--tokens", "0"], "--tokens 0"),
        (["--target", "512.5"], "--target 512.5: give a whole number of tokens"),
        (["--target", "-512"], "--target -512: give a whole number of tokens"),
        (["--target", "1e10"], "--target 10000000000: give the tokens of the window"),
        (["--corpus", "nowhere/x.jsonl"], "there is no file or folder 'nowhere/x.jsonl'"),
    ],
)
def test_what_is_refused_writes_nothing(given, complaint, tmp_path, base, corpus):
    out = tmp_path / "my.yaml"
    code, said, error = init(base, corpus, out, *given)
    assert (code, said) == (2, "") and complaint in error and error.count("\n") == 1, error
    assert not out.exists()


@pytest.mark.parametrize("written", ["3e3", "3.0e3", "3E+3", "3000", "3_000", "3000.0"])
def test_tokens_are_written_as_people_do(written, tmp_path, base, corpus):
    out = tmp_path / "my.yaml"
    code, _, error = init(base, corpus, out, "--tokens", written, target="5.12e2")
    assert code == 0, error
    assert schema.load(out).data.tokens == 3000 and schema.load(out).lengths.target == 512


def test_the_numbers_of_the_guide_are_taken(tmp_path, base, corpus):
    """As its first block of commands has them; the corpus here is too short for its target, and says so."""
    guide = (REPOSITORY / "docs/guide.md").read_text()
    values = dict(re.findall(r"^(TARGET|TOKENS|MEMORY)=(\S+)", guide, re.M))
    assert values["TOKENS"] == "1e8"
    given = ("--tokens", values["TOKENS"], "--gpu-memory", values["MEMORY"])
    out = tmp_path / "my.yaml"
    code, _, error = init(base, corpus, out, *given, target=values["TARGET"])
    assert code == 2 and "less than the 131072 that pose_matched takes at a time" in error
    code, _, error = init(base, corpus, out, *given)
    assert code == 0, error


def test_the_file_is_a_new_recipe(tmp_path, base, corpus):
    there = tmp_path / "my.yaml"
    there.write_text("kept: true\n")
    code, _, error = init(base, corpus, there)
    assert code == 2 and "is there already" in error and there.read_text() == "kept: true\n"
    for name in ("my.txt", ".yaml", "-x.yaml"):
        code, _, error = init(base, corpus, tmp_path / name)
        assert code == 2 and "--out" in error and error.count("\n") == 1 and not (tmp_path / name).exists()


def test_a_corpus_shorter_than_a_row_is_refused(tmp_path, base):
    short = write_jsonl(tmp_path / "short.jsonl", ["a few words"])
    code, _, error = init(base, short, tmp_path / "my.yaml")
    assert code == 2 and "less than the 512 that pose_matched takes at a time" in error
    text = write_jsonl(tmp_path / "text.jsonl", tiny_documents(2, 18))
    code, _, error = init(base, text, tmp_path / "my.yaml", "--method", "pose_matched", target=4096)
    assert code == 2 and "less than the 4096 that pose_matched takes at a time" in error


def test_a_base_that_is_not_there_is_refused(tmp_path, corpus):
    for name, complaint in (("./nowhere", "there is no folder"), ("somebody/model", "cannot be loaded")):
        code, _, error = init(name, corpus, tmp_path / "my.yaml")
        assert code == 2 and complaint in error and error.count("\n") == 1


# -- the choice, for shapes that people have ---------------------------------------------------------------


@pytest.fixture
def search(tmp_path):
    """search(shape, method) of a known model's shape, 8192 -> 65536 on 1e8 tokens."""

    def make(name, method="pose_matched", physical=8192):
        about = counting.configured(SimpleNamespace(**SHAPES[name]))
        asked = proposal.Asked(name, None, 65536, ["a/b"], method, None, "auto", tmp_path / "my.yaml")
        return proposal.Search(proposal._recipe(asked, physical, 10**8, None), method, about), asked

    return make


def test_one_gpu_of_24_gb_trains_a_small_model_whole_and_a_large_one_not(search):
    small, _ = search("Qwen/Qwen3-0.6B")
    way, memory = small.first("auto", A24, 8)
    assert (way.what, way.zero) == ("all", "none") and estimate.fits(memory, A24)
    large, _ = search("meta-llama/Llama-3.2-1B")
    way, memory = large.first("auto", A24, 8)
    assert (way.what, way.zero) == ("lora", "none") and estimate.fits(memory, A24)
    # The widest: twice the rows do not fit, or are more than are asked for.
    assert way.rows == 8 or not estimate.fits(large.memory(replace(way, rows=2 * way.rows), A24), A24)


def test_a_base_is_read_into_4_bits_where_adapters_alone_do_not_fit(search):
    """Qwen3-8B on 24 GB and Llama-3-8B on 16, which 24 would hold."""
    found, _ = search("Qwen/Qwen3-8B")
    lora = found.memory(proposal.Way("lora", "none"), A24)
    way, memory = found.first("auto", A24, 8)
    assert not estimate.fits(lora, A24)
    assert (way.what, way.zero) == ("nf4", "none") and estimate.fits(memory, A24)
    matrices = counting.products(found.about)
    assert lora.weights - memory.weights == pytest.approx((2 - 0.51587) * matrices, rel=1e-4)
    assert found.first("lora", A24, 8) == (way, memory)
    train = proposal.settings(found.recipe, "pose_matched", way, 1)
    assert train["lora"] == {"r": 16, "alpha": 32.0, "quantize": "nf4"} and train["deepspeed"] is None
    assert "quantize" not in proposal.LORA
    other, _ = search("meta-llama/Meta-Llama-3-8B")
    assert [other.first("auto", replace(A24, gpu_memory=size), 1)[0].what for size in (16, 24)] == [
        "nf4",
        "lora",
    ]


def test_what_is_not_read_into_4_bits(search):
    def ways(train="auto", method="pose_matched", **changes):
        found, _ = search("Qwen/Qwen3-8B", method)
        for key, value in changes.items():
            setattr(found, key, value)
        return [one.what for one in found.ways(train, 1)]

    mixture = counting.configured(SimpleNamespace(**family_models.written("Mixtral")))
    found, _ = search("Qwen/Qwen3-8B", "longlora")
    gguf = found.recipe.model_copy(update={"model": found.recipe.model.model_copy(update={"gguf_file": "x"})})
    assert ways().count("nf4") == ways("lora").count("nf4") == ways(method="longlora").count("nf4") == 1
    for none in (ways("all"), ways(about=mixture), ways(recipe=gguf)):
        assert none and "nf4" not in none
    # A method's own adapters stay what they are.
    own = proposal.settings(found.recipe, "longlora", proposal.Way("nf4", "none"), 1)
    assert own["lora"] == {"quantize": "nf4"}


def test_a_recipe_with_4_bits_is_written_and_planned(tmp_path, base, corpus, monkeypatch):
    out = tmp_path / "my.yaml"
    monkeypatch.setattr(
        proposal.Search, "ways", lambda *given: iter([proposal.Way("nf4", "none")]), raising=True
    )
    code, said, error = init(base, corpus, out)
    assert code == 0 and "LoRA on a base in 4 bits, no ZeRO file" in said, error
    assert (
        schema.load(out).train["lora"]["quantize"] == "nf4"
        and "pip install 'endprompt[qlora]'" in out.read_text()
    )
    code, said, error = run_main("plan", out, "pose_matched", "--gpus", 1)
    # No column of a ZeRO file beside its own.
    assert code == 0 and "layers nf4" in said and "zero3" not in said, error


def test_eight_gpus_share_what_one_cannot_hold(search):
    found, _ = search("meta-llama/Meta-Llama-3-8B")
    for size, zero in ((80, "zero2"), (32, "zero3")):
        machine = estimate.Machine(8, size, "A100", 0.4)
        way, memory = found.first("auto", machine, 8)
        assert (way.what, way.zero) == ("all", zero) and estimate.fits(memory, machine)
    train = proposal.settings(found.recipe, "pose_matched", way, 8)
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] * 8 == 64


def test_what_would_fit_does_fit(search):
    found, asked = search("meta-llama/Meta-Llama-3-8B")
    machine = estimate.Machine(1, 8, "4090", 0.4)
    assert found.first("auto", machine, 1) is None
    line = proposal._what_would(found, replace(asked, train="auto"), machine)
    needed = int(line.partition("--gpu-memory ")[2].partition("--gpu-memory ")[2].split(",")[0])
    assert found.first("auto", replace(machine, gpu_memory=needed), 1)
    assert not found.first("auto", replace(machine, gpu_memory=needed - 1), 1)


def test_rows_of_the_target_length_keep_the_tokens_of_a_step(search):
    found, _ = search("Qwen/Qwen3-0.6B", "full_length")
    train = proposal.settings(found.recipe, "full_length", proposal.Way("all", "none"), 1)
    assert train["per_device_train_batch_size"] * train["gradient_accumulation_steps"] == 64
    from endprompt.recipe.batch import batch_shape

    assert batch_shape(found.experiment(proposal.Way("all", "none"), 1)) == (1, 8)


@pytest.mark.parametrize("method", ["full_length", "longlora", "lceg"])
@pytest.mark.parametrize(
    "target, gpus, tokens",
    # the reviewer's; primes; what no near length divides; more GPUs than the corpus has rows for
    [(2049, 1, 300_000), (2053, 1, 500_000), (1009, 1, 200_000), (2048, 32, 60_000)],
)
def test_a_step_longer_than_the_training_is_refused(
    tmp_path, base, long_corpus, method, target, gpus, tokens
):
    out = tmp_path / "my.yaml"
    given = ("--method", method, "--tokens", tokens, "--gpus", gpus)
    code, said, error = init(base, long_corpus, out, *given, target=target)
    assert (code, said) == (2, "") and error.count("\n") == 1 and not out.exists(), error
    assert f"tokens are less than one step of {method} takes, " in error
    assert ("fewer --gpus" in error) == (gpus > 1)
    # The twin: what the line says helps.
    mended = re.search(r"as (\d+)", error)
    assert bool(mended) == (gpus == 1)
    given = ("--method", method, "--tokens", tokens, "--gpus", 1)
    code, said, error = init(base, long_corpus, out, *given, target=mended[1] if mended else target)
    assert code == 0, error
    a_step, whole = map(int, re.search(r"(\d+) tokens a step, (\d+) in all", said).groups())
    assert a_step <= whole


@pytest.mark.parametrize(
    "target, physical", [(2048, 256), (2304, 256), (2100, 210), (1000, 250), (1500, 250)]
)
def test_rows_of_the_target_length_are_counted_by_a_length_that_divides_it(
    tmp_path, base, long_corpus, target, physical
):
    out = tmp_path / "my.yaml"
    code, said, error = init(
        base, long_corpus, out, "--method", "full_length", "--tokens", 300_000, target=target
    )
    assert code == 0, error
    recipe = schema.load(out)
    assert recipe.lengths.physical == physical
    a_step = int(re.search(r"(\d+) tokens a step", said)[1])
    assert a_step % target == 0 and a_step <= 32 * 256  # what short rows would have, by 100 steps or more
    assert "full_length" in said and run_main("prepare", out, "full_length", "--dry-run")[0] == 0


def test_short_rows_on_more_gpus_than_the_corpus_has_rows_for(tmp_path, base, corpus):
    out = tmp_path / "my.yaml"
    code, _, error = init(base, corpus, out, "--gpus", 64, "--tokens", 9000)
    assert code == 2 and "less than one step of pose_matched takes, 16384;" in error and not out.exists()
    assert "fewer --gpus" in error and "divides" not in error
    assert init(base, corpus, out, "--gpus", 16, "--tokens", 9000)[0] == 0


def test_a_corpus_that_cannot_be_read_is_bad_input(tmp_path, recipe_file, tokenizer):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{not json\n")
    recipe = schema.load(recipe_file(data={"corpus": str(broken)}))
    with pytest.raises(BadInput, match="not JSON"):
        proposal.counted(recipe, tokenizer, 10**6)
    assert proposal.counted(schema.load(recipe_file()), tokenizer, 100) == 100
    hub = schema.load(recipe_file(data={"corpus": "somebody/texts"}))
    assert proposal.counted(hub, tokenizer, 10**6) is None
