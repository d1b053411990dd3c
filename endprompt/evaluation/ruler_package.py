"""NVIDIA's package of RULER and what it draws from: found, checked against the wheel's own checksums, and
read; nothing of it is run here.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

from endprompt import BadInput, storage
from endprompt.recipe import task_names

PACKAGE, VERSION = "nvidia-long-context-eval", "26.3"
GENERATION = (  # since 2025 the generator searches by halving, and makes other samples
    f"2024, linear search, {PACKAGE} {VERSION}"
)
CHECKSUMS = {  # SHA-256, as the wheel has them
    "synthetic.yaml": "916888bcffdaa49dcc0d0c65539ac60d6341075148d59c05e43ee9f35a32130c",
    "data/synthetic/constants.py": "67d300f43db354362afa00c531a44b2bc3d07e491c082ee628c56f42726982d0",
    "data/synthetic/niah.py": "523dad82ae9bcc39071955259d36f6bea8dd416366f45efc792ab2ce57a6a593",
    "data/synthetic/variable_tracking.py": "7702a5616cbd24a85f5145a2f9f94f0c65c3b6570c83e960e0b095f70efb5338",
    "data/synthetic/common_words_extraction.py": (
        "51bb975b372a70996766b57451b97cd75a48ca10401b43abb54604286a782da9"
    ),
    "data/synthetic/freq_words_extraction.py": (
        "88529791be57f36360fe5e2f9000841f592cf5cb9d58381a868b75f2b9174e04"
    ),
    "data/synthetic/qa.py": "fa5ab6765a282e0f4b208faa2b787aaffdbca5ba337f2dc55fe8ca0e22c6278c",
    "data/synthetic/json/PaulGrahamEssays.json": (
        "8d8494303fb8b444e4ca159160ff60926765d4a1d7cb97ba456305190214e8d0"
    ),
    "data/synthetic/json/squad.json": "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    "data/synthetic/json/hotpotqa.json": "4e9ecb5c8d3b719f624d66b60f8d56bf227f03914f5f0753d6fa1b359d7104ea",
    "eval/synthetic/constants.py": "a7041631f24a17defd433f07b65340bec0ff27c9d20ecb852f44cfe1d386c59f",
}
SCORING = (
    "synthetic.yaml",
    "data/synthetic/constants.py",
    "eval/synthetic/constants.py",
)  # the few of them that scoring needs
WORD_LISTS = ("nounlist.txt", "adjectivelist.txt", "verblist.txt")
# SHA-256 over the three lists' own.  2.2.0 draws the keys and words of the samples that were published in
# 2024; 3.0 took four nouns out, which moves every draw.
WORDS = {
    "a4f760729bef833cb51dcee82e3c7204527529bdb465d9c16c26c5adc1eeab51": "2.2.0",
    "1c988c61c58b78a2150c17a973ff46d484f03e0395d8a1014711b0eabcd32c90": "3.0.1",
}


def _installed(package: str, wanted: str | None = None) -> str:
    """The installed version of ``package``.  Raises BadInput if it is not installed, or not ``wanted``."""
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise BadInput(
            f"RULER needs the package {package}; install it with `pip install"
            f" {package}{f'=={wanted}' if wanted else ''}`"
        ) from None
    if wanted not in (None, found):
        raise BadInput(
            f"{package} is installed in version {found}, but RULER's samples and scores are those of"
            f" {wanted}; `pip install {package}=={wanted}`"
        )
    return found


def _folder(module: str) -> Path:
    """Where the package ``module`` lies; it is not imported."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.submodule_search_locations  # whoever asks made sure that it is there
    return Path(spec.submodule_search_locations[0])


@functools.cache
def package(files: tuple[str, ...] | None = None) -> Path:
    """The folder of NVIDIA's package.  Raises BadInput if it is missing, of another version, or one of
    ``files`` (None: of all) is not the wheel's.
    """
    _installed(PACKAGE, VERSION)
    folder = _folder("long_context_eval")
    for name, expected in CHECKSUMS.items():
        if files is not None and name not in files:
            continue
        found = storage.sha256(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise BadInput(
                f"{PACKAGE}: {name} is not the wheel's (sha256 {found[:12]}, expected {expected[:12]}); "
                f"`pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`"
            )
    return folder


@functools.cache
def words() -> str:
    """SHA-256 of wonderwords' lists, from which keys and words are drawn.  Raises BadInput if they are no
    known ones.
    """
    version, folder = _installed("wonderwords"), _folder("wonderwords") / "assets"
    found = hashlib.sha256(
        "".join(storage.sha256(folder / name) for name in WORD_LISTS if (folder / name).is_file()).encode()
    ).hexdigest()
    if found not in WORDS:
        raise BadInput(
            f"wonderwords {version}: its word lists (sha256 {found[:12]}) are no known ones, and the samples"
            f" depend on them; `pip install wonderwords=={next(iter(WORDS.values()))}`"
        )
    return found


@functools.cache
def sentences() -> tuple[str | None, str]:
    """(folder for NLTK's search path or None, what identifies the English sentence data): llama-index-core's,
    else what NLTK finds itself.
    """
    wanted = "nltk_cache/tokenizers/punkt_tab/english/"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        files = [
            Path(file.locate())
            for file in importlib.metadata.files("llama-index-core") or ()
            if wanted in file.as_posix()
        ]
        if files and all(path.is_file() for path in files):
            return (
                str(files[0].parents[3]),
                hashlib.sha256(
                    "".join(f"{path.name} {storage.sha256(path)}\n" for path in sorted(files)).encode()
                ).hexdigest(),
            )
    return None, f"of NLTK {_installed('nltk')}"


@functools.cache
def settings() -> dict[str, dict]:
    """The package's task table: name -> {"task", "args", "tokens_to_generate", "template", "answer_prefix"},
    as prepare.py puts it together.
    """
    import yaml

    folder = package(SCORING)
    from long_context_eval.data.synthetic.constants import TASKS as kinds

    table = yaml.safe_load((folder / "synthetic.yaml").read_text(encoding="utf-8"))
    return {name: {**table[name], **kinds[table[name]["task"]]} for name in task_names.RULER}


def about(task: str) -> dict:
    """A task's entry in ``settings``.  Raises BadInput if there is no such task."""
    if task not in task_names.RULER:
        raise BadInput(f"RULER has no task {task}; it has {', '.join(task_names.RULER)}")
    return settings()[task]


def tokens_to_generate(task: str) -> int:
    """How many tokens an answer may have; a sample's length counts them in."""
    return about(task)["tokens_to_generate"]


def generator() -> dict:
    """What, beside tokenizer and arguments, the samples depend on; results carry it."""
    package()
    return {
        "generation": GENERATION,
        "words": words(),
        "sentences": sentences()[1],
        "python": "{}.{}".format(*sys.version_info),
        "versions": {
            name: _installed(name)
            for name in (PACKAGE, "wonderwords", "nltk", "numpy", "scipy", "tokenizers")
        },
    }
