"""What the tests share: the tiny base, small recipes, and the command line called in this process."""

import contextlib
import importlib.util
import io
import json
import os
import random
from pathlib import Path

# Before anything imports transformers or torch: no test reaches for the network.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A process a core: threads of one would wait for cores that another one has.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import yaml
from hypothesis import settings

settings.register_profile(
    "tests", deadline=None, derandomize=True
)  # the machine is shared: time says nothing about the code
settings.load_profile("tests")

REPOSITORY = Path(__file__).resolve().parents[1]


def tiny_documents(count: int, sentences: int, seed: int = 5) -> list[str]:
    """Documents as recipes/tiny/corpus.py writes them, about 11 tokens a sentence."""
    spec = importlib.util.spec_from_file_location("tiny_corpus", REPOSITORY / "recipes/tiny/corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(seed)
    return [module.document(rng, sentences) for _ in range(count)]


def with_symbols(texts: list[str]) -> str:
    """``texts`` as one, with a run that has no spaces after every 30th word, as a hash or an address."""
    words = " ".join(texts).split(" ")
    return " ".join(f"{word} {'xqz' * 20}" if at % 30 == 29 else word for at, word in enumerate(words))


def write_jsonl(path: Path, texts: list, column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def run_main(*args) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line, in this process; not for a ``train`` that succeeds,
    which ends the process.
    """
    from endprompt import cli

    out, err, environment = io.StringIO(), io.StringIO(), dict(os.environ)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main([str(argument) for argument in args])
    except SystemExit as error:
        code = error.code or 0
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="session")
def base() -> Path:
    """The model folder of the embedded default."""
    return Path(REPOSITORY / "recipes/tiny/base")


@pytest.fixture(scope="session")
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def tiny_text() -> list[str]:
    """48 documents of about 220 tokens."""
    return tiny_documents(48, 18)


@pytest.fixture
def recipe_file(tmp_path, base, tiny_text):
    """recipe_file(name="small", data={"tokens": 2000}, rope=...) -> path of a recipe with lengths 64 -> 512
    and a few thousand tokens.

    Keywords are sections whose keys replace or extend those here; ``data={"corpus": ...}`` names another
    corpus.
    """

    def write(name: str = "small", **sections) -> Path:
        corpus = tmp_path / "corpus.jsonl"
        if not corpus.exists():
            write_jsonl(corpus, tiny_text)
        tree = {
            "model": {"name_or_path": str(base)},
            "lengths": {"physical": 64, "target": 512},
            "data": {
                "corpus": str(corpus),
                "tokens": 4096,
                "end_prompts": ["EP_1"],
                "prompt_loss_weight": 0.1,
            },
            "train": {
                "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                "per_device_train_batch_size": 8,
                "learning_rate": 3e-4,
                "gradient_checkpointing": False,
            },
            "eval": {"tasks": ["passkey"], "lengths": [64, 128], "samples": 4, "depths": 2},
        }
        for section, values in sections.items():
            tree[section] = {**tree.get(section, {}), **values}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def train_recipe(tmp_path_factory, base) -> Path:
    """64 rows of 40 to 128 tokens (a document a row: padded batches), 8 steps of 8 rows, a checkpoint every 2
    steps.
    """
    folder = tmp_path_factory.mktemp("train")
    # Documents of different lengths, so that ranks and micro-batches carry unequal weights.
    texts = [text for sentences in (2, 4, 6, 9) for text in tiny_documents(16, sentences, seed=sentences)]
    path = folder / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name_or_path": str(base)},
                "lengths": {"physical": 128, "target": 1024},
                "data": {
                    "corpus": str(write_jsonl(folder / "corpus.jsonl", texts)),
                    "tokens": 64 * 128,
                    "packing": "document",
                    "prompt_loss_weight": 0.5,
                },
                "train": {
                    "deepspeed": str(REPOSITORY / "ds_configs/zero3.json"),
                    "per_device_train_batch_size": 2,
                    "gradient_accumulation_steps": 2,
                    "learning_rate": 1e-3,
                    "warmup_steps": 2,
                    "logging_steps": 1,
                    "save_steps": 2,
                    "save_total_limit": 10,
                },
                "eval": {"lengths": [256, 512], "samples": 4, "depths": 2},
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def two_ranks(train_recipe, tmp_path_factory) -> Path:
    """The folder of an undisturbed run of it on two ranks."""
    import training

    out = tmp_path_factory.mktemp("two")
    folder = training.prepared(train_recipe, "endprompt", out)
    training.run(training.train(train_recipe, "endprompt", out, ranks=2))
    return folder
