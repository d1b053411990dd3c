"""LongBench's scores as the official eval.py and metrics.py compute them, and the libraries they depend on.

The official scores need ``rouge`` 1.0.1, ``fuzzywuzzy`` 0.18.0 without python-Levenshtein, and ``jieba``:
others of these names give other numbers without a word (docs/footguns.md, 17).  Each is therefore known by
its version and by what it computes before anything is scored.
"""

import difflib
import functools
import importlib
import importlib.metadata
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

from endprompt import BadInput


@dataclass(frozen=True)
class Task:
    """What the official scripts fix for one data set."""

    category: str
    metric: str
    new_tokens: int
    samples: int  # rows of the published data
    template: str  # SHA-256 of the official template
    first_line: bool = False  # only the answer's first line is scored
    chat: bool = True  # False: the original never puts a chat template around these
    chinese: bool = False


_PASSAGES = (  # hotpotqa, 2wikimqa and musique share theirs
    "9ec4ae308865bd0c62af20b3dc7b12b31f2b447f55684bd88c1aa40f2f636deb"
)
TASKS = {
    "narrativeqa": Task(
        "single_doc_qa", "qa_f1", 128, 200, "aada7ed24b06abace5b0045ac3bcfe06fc831a6cf434f0ecfd99fb7b3d299e1c"
    ),
    "qasper": Task(
        "single_doc_qa", "qa_f1", 128, 200, "0fbdd123fe7f83d6d6a9c583ca28cb29d68e523bf8fec01a0cf2dcd11037775d"
    ),
    "multifieldqa_en": Task(
        "single_doc_qa", "qa_f1", 64, 150, "20b4666a2de8a1f701bdb6c4e015fa9f8758d64b361d841f7766df6c9ceba770"
    ),
    "hotpotqa": Task("multi_doc_qa", "qa_f1", 32, 200, _PASSAGES),
    "2wikimqa": Task("multi_doc_qa", "qa_f1", 32, 200, _PASSAGES),
    "musique": Task("multi_doc_qa", "qa_f1", 32, 200, _PASSAGES),
    "gov_report": Task(
        "summarization", "rouge", 512, 200, "91c25d585b189ced91c9280efcb4ecb5dcff9548cd4e3bfae66c68025b569e95"
    ),
    "qmsum": Task(
        "summarization", "rouge", 512, 200, "dca23b678fe0183bbd9555b57947022aed1b85739da5ad7e1b4708dd0c71c409"
    ),
    "multi_news": Task(
        "summarization", "rouge", 512, 200, "2af3f28c40b902e6535d4910510d51653613c49de9b2fc287c5958395061101d"
    ),
    "trec": Task(
        "few_shot",
        "classification",
        64,
        200,
        "0eff8bebdba99d91e9d7d91b6ab39455ac74648bea92c9255c9f68c62175b2db",
        first_line=True,
        chat=False,
    ),
    "triviaqa": Task(
        "few_shot",
        "qa_f1",
        32,
        200,
        "00a802e6377e72fca39b169cf6c28893bedf23ba7286b03ecd15867c3e27a7c4",
        first_line=True,
        chat=False,
    ),
    "samsum": Task(
        "few_shot",
        "rouge",
        128,
        200,
        "a68d884234907eefcaa0eacf7b2997f60fa46603988dceae6a44f9b49f045b3f",
        first_line=True,
        chat=False,
    ),
    "passage_count": Task(
        "synthetic", "count", 32, 200, "986550b6c61009c629a4535766d94b7b51e2b2b9e1ed169e4ecb54417466e964"
    ),
    "passage_retrieval_en": Task(
        "synthetic", "retrieval", 32, 200, "39b96b7fa52bdd2aa2bde34ea199158505201b9a0a2c3ce94e80249293f60431"
    ),
    "lcc": Task(
        "code",
        "code_sim",
        64,
        500,
        "6a1f24cf0bb83cd90f1fca8f0dd24801626c2aaea29db834ddc83b950e71190e",
        chat=False,
    ),
    "repobench-p": Task(
        "code",
        "code_sim",
        64,
        500,
        "ee9ec182ea5ffeb70a7140d55baea97264a8612d88226d323afa90859c36240c",
        chat=False,
    ),
    "multifieldqa_zh": Task(
        "single_doc_qa",
        "qa_f1_zh",
        64,
        200,
        "344b3a4e557cd5470c661b3d6b374339717e1257a6c01f628d22322d4a554b94",
        chinese=True,
    ),
    "dureader": Task(
        "multi_doc_qa",
        "rouge_zh",
        128,
        200,
        "ae53329f51b17908e08b8c6bf366987282b8b38c0ee35275ebd7b79e9b30eff2",
        chinese=True,
    ),
    "vcsum": Task(
        "summarization",
        "rouge_zh",
        512,
        200,
        "3e5d8241bc9b512eb4929c1ba80882a44f50b446bc2b1d9d79eff030dd10dc27",
        chinese=True,
    ),
    "lsht": Task(
        "few_shot",
        "classification",
        64,
        200,
        "f3edabdf7fae53d6cadfa7a10f3574d114302161c46dacecd5d30763204bbbf3",
        first_line=True,
        chat=False,
        chinese=True,
    ),
    "passage_retrieval_zh": Task(
        "synthetic",
        "retrieval_zh",
        32,
        200,
        "c1e2346e245eb365bc33a1503cde2e473948a2aad51c3e4c72893e61ab074d60",
        chinese=True,
    ),
}
ENGLISH = tuple(name for name, task in TASKS.items() if not task.chinese)  # 14 English and 2 of code
CHINESE = tuple(name for name, task in TASKS.items() if task.chinese)
CATEGORIES = {
    category: tuple(name for name in ENGLISH if TASKS[name].category == category)
    for category in dict.fromkeys(TASKS[name].category for name in ENGLISH)
}


def get(task: str) -> Task:
    """The facts of ``task``.  Raises BadInput on a name that LongBench does not have."""
    if task not in TASKS:
        near = difflib.get_close_matches(task, TASKS, 1)
        raise BadInput(
            f"LongBench has no task {task!r}{f'; did you mean {near[0]}?' if near else ''}; it has"
            f" {', '.join(TASKS)}"
        )
    return TASKS[task]


# The scorers' libraries

PINS = {"rouge": "1.0.1", "fuzzywuzzy": "0.18.0", "jieba": "0.42.1"}
NEEDS = {
    "rouge": ("rouge",),
    "rouge_zh": ("rouge", "jieba"),
    "qa_f1_zh": ("jieba",),
    "code_sim": ("fuzzywuzzy",),
}


def _is_rouge(module: ModuleType) -> bool:
    """Words are counted once a text and sentences end at full stops: 7/9 with rouge 1.0.1, 3/7 with what
    rouge-chinese puts in its place.
    """
    texts = (
        "the cat sat on the mat. the cat saw a dog. a dog ran",
        "a dog saw the cat. the cat ran to the mat. the dog sat",
    )
    found = module.Rouge(metrics=["rouge-l"]).get_scores([texts[0]], [texts[1]], avg=True)["rouge-l"]["f"]
    return abs(found - 2 * (7 / 9) ** 2 / (14 / 9 + 1e-8)) < 1e-13


def _is_fuzzywuzzy(module: ModuleType) -> bool:
    """The ratio is difflib's: 7 for this pair; python-Levenshtein gives 30."""
    return (
        module.fuzz.SequenceMatcher is difflib.SequenceMatcher
        and module.fuzz.ratio("return result", "count += value") == 7
    )


def _is_jieba(module: ModuleType) -> bool:
    """Its own dictionary, and its hidden Markov model for words that are not in it."""
    return list(module.cut("他来到了网易杭研大厦", cut_all=False)) == [
        "他",
        "来到",
        "了",
        "网易",
        "杭研",
        "大厦",
    ]


_PROBES = {
    "rouge": (
        _is_rouge,
        (
            "rouge-chinese installs another module under this name: pip uninstall -y rouge-chinese, then "
            "pip install --force-reinstall --no-deps rouge==1.0.1"
        ),
    ),
    "fuzzywuzzy": (
        _is_fuzzywuzzy,
        (
            "python-Levenshtein replaces difflib in it: pip uninstall -y python-Levenshtein Levenshtein, and"
            " start again"
        ),
    ),
    "jieba": (
        _is_jieba,
        (
            "its dictionary was changed: pip install --force-reinstall --no-deps jieba==0.42.1, and load no"
            " user dictionary"
        ),
    ),
}


@functools.cache
def library(name: str) -> ModuleType:
    """A scorer's library, known by its version and by what it computes.

    Raises BadInput, with how to mend it, if it is missing, of another version, or does not behave like the
    one that gives the official scores.
    """
    wanted = PINS[name]
    install = f"pip install {name}=={wanted}"
    try:
        version = importlib.metadata.version(name)
        with (
            warnings.catch_warnings()
        ):  # fuzzywuzzy asks for the package that would change the score; jieba has invalid escapes
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
            if name == "fuzzywuzzy":
                importlib.import_module("fuzzywuzzy.fuzz")
    except ImportError as error:  # PackageNotFoundError is one
        raise BadInput(
            f"LongBench's scores need {name} {wanted}, which is not installed ({error}): {install}"
        ) from None
    if version != wanted:
        raise BadInput(f"LongBench's scores need {name} {wanted}; {version} is installed: {install}")
    probe, mend = _PROBES[name]
    if name == "jieba":
        module.setLogLevel("WARNING")  # else it tells stderr that it reads its dictionary
    try:
        right = probe(module)
    except Exception:  # another module of that name may raise anything
        right = False
    if not right:
        raise BadInput(
            f"{name} {wanted} is installed, but {getattr(module, '__file__', name)} computes other scores:"
            f" {mend}"
        )
    return module


def check_environment(*tasks: str) -> None:
    """Raises BadInput if a library that scores ``tasks`` (all English and code tasks if none is named) is
    missing or not the right one.
    """
    for task in tasks or ENGLISH:
        for name in NEEDS.get(get(task).metric, ()):
            library(name)


# Scorers: (prediction, reference, classes) -> a number from 0 to 1

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_FULL_WIDTH = (
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
)
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_PUNCTUATION = _NO_ASCII_PUNCTUATION | {
    code: None for first, last in _FULL_WIDTH for code in range(first, last + 1)
}


def _f1(said: list[str], right: list[str]) -> float:
    same = (Counter(said) & Counter(right)).total()
    if not same:
        return 0.0
    precision, recall = same / len(said), same / len(right)
    return 2 * precision * recall / (precision + recall)


def _english_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_ASCII_PUNCTUATION)).split()


def _chinese_words(text: str) -> list[str]:
    words = (
        "".join(word.lower().translate(_NO_PUNCTUATION).split())
        for word in library("jieba").cut(text, cut_all=False)
    )
    return [word for word in words if word]


def _qa_f1(prediction: str, answer: str, _) -> float:
    return _f1(_english_words(prediction), _english_words(answer))


def _qa_f1_zh(prediction: str, answer: str, _) -> float:
    return _f1(_chinese_words(prediction), _chinese_words(answer))


def _rouge(prediction: str, answer: str, _) -> float:
    """F of ROUGE-L.  0 where the library raises, as the original has it: an empty text, or a sentence too
    long for its recursion.
    """
    try:
        return (
            library("rouge")
            .Rouge(metrics=["rouge-l"])
            .get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
        )
    except (ValueError, RecursionError):
        return 0.0


def _rouge_zh(prediction: str, answer: str, _) -> float:
    cut = library("jieba").cut
    return _rouge(" ".join(cut(prediction, cut_all=False)), " ".join(cut(answer, cut_all=False)), None)


def _share_of_numbers(prediction: str, number: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def _count(prediction: str, answer: str, _) -> float:
    return _share_of_numbers(prediction, answer)


def _retrieval(prediction: str, answer: str, _, pattern: str = r"Paragraph (\d+)") -> float:
    found = re.search(pattern, answer)
    if not found:
        raise BadInput(
            f"a reference of passage retrieval names no paragraph ({pattern}): {answer!r}; is this file of"
            " another task?"
        )
    return _share_of_numbers(prediction, found[1])


def _retrieval_zh(prediction: str, answer: str, _) -> float:
    return _retrieval(prediction, answer, _, r"段落(\d+)")


def _code_sim(prediction: str, answer: str, _) -> float:
    """Likeness of the reference to the first line that is neither a fence nor has a comment sign in it."""
    lines = prediction.lstrip("\n").split("\n")
    return (
        library("fuzzywuzzy").fuzz.ratio(
            next((line for line in lines if not re.search("`|#|//", line)), ""), answer
        )
        / 100
    )


def _classification(prediction: str, answer: str, classes: list[str] | None) -> float:
    """1 / (class names found) if the right one is among them.  A found name that is a part of the right one
    does not count against it, unless it stands just behind another such name in the list: the original
    removes from the list that it walks through, and so skips one.
    """
    found = [name for name in classes or () if name in prediction]
    position = 0
    while position < len(found):
        if found[position] in answer and found[position] != answer:
            found.remove(found[position])
        position += 1
    return 1 / len(found) if answer in found else 0.0


METRICS: dict[str, Callable[[str, str, list[str] | None], float]] = {
    "qa_f1": _qa_f1,
    "qa_f1_zh": _qa_f1_zh,
    "rouge": _rouge,
    "rouge_zh": _rouge_zh,
    "classification": _classification,
    "count": _count,
    "retrieval": _retrieval,
    "retrieval_zh": _retrieval_zh,
    "code_sim": _code_sim,
}


def _check_rows(
    task: str, predictions: list[str], answers: list[list[str]], classes: list[str] | None
) -> None:
    if len(predictions) != len(answers) or not predictions:
        raise BadInput(
            f"{task}: {len(predictions)} predictions and {len(answers)} lists of references; give one list"
            " for each prediction, and at least one"
        )
    for number, (prediction, references) in enumerate(zip(predictions, answers, strict=True), 1):
        if not isinstance(prediction, str):
            raise BadInput(f"{task}: prediction {number} is {type(prediction).__name__}, not text")
        if not isinstance(references, list | tuple) or not all(
            isinstance(reference, str) for reference in references
        ):
            raise BadInput(f"{task}: the references of prediction {number} are no list of texts")
    if get(task).metric == "classification" and not (
        classes and all(isinstance(name, str) for name in classes)
    ):
        raise BadInput(
            f"{task}: all_classes is missing or no list of names; the official prediction files and data have"
            " it in every row"
        )


def _shares(
    task: str, predictions: list[str], answers: list[list[str]], classes: list[str] | None
) -> list[float]:
    about, shares = get(task), []
    metric = METRICS[about.metric]
    for prediction, references in zip(predictions, answers, strict=True):
        if about.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        shares.append(max((metric(prediction, reference, classes) for reference in references), default=0.0))
    return shares


def shares(
    task: str, predictions: list[str], answers: list[list[str]], all_classes: list[str] | None = None
) -> list[float]:
    """Each prediction's score from 0 to 1: the best over its references, and 0 if it has none.

    rouge recurses once a word, so what is too long for it depends on how deep the caller stands; a thread
    starts with an empty stack, like the official script.  Raises BadInput on lists that do not match, and on
    libraries that would give another score.
    """
    check_environment(task)
    _check_rows(task, predictions, answers, all_classes)
    if "rouge" not in NEEDS.get(get(task).metric, ()):
        return _shares(task, predictions, answers, all_classes)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_shares, task, predictions, answers, all_classes).result()


def score(
    task: str, predictions: list[str], answers: list[list[str]], all_classes: list[str] | None = None
) -> list[float]:
    """Each prediction's score in percent.  ``answers`` holds a list of references for each; ``all_classes``
    is what trec and lsht choose from.
    """
    return [100 * share for share in shares(task, predictions, answers, all_classes)]


def number(
    task: str, predictions: list[str], answers: list[list[str]], all_classes: list[str] | None = None
) -> float:
    """What the official eval.py prints for the task: the mean in percent, rounded to two decimals."""
    total = 0.0
    for share in shares(task, predictions, answers, all_classes):
        total += share  # not sum(), which rounds less from Python 3.12 on
    return round(100 * total / len(predictions), 2)


def categories(scores: Mapping[str, float]) -> dict[str, float | None]:
    """{category: mean of its tasks} for the six English categories, ``mean_16_tasks`` and
    ``mean_of_categories``; None where a task is missing.

    ``scores`` is {task: percent}; Chinese tasks in it are left alone.  The official script prints no average.
    ``mean_16_tasks`` weighs the categories by their tasks (3, 3, 3, 3, 2, 2) and is EndPrompt's "Avg. Score";
    ``mean_of_categories`` weighs them alike.
    """
    for task in scores:
        get(task)

    def mean(values: list[float | None]) -> float | None:
        there = [value for value in values if value is not None]
        return sum(there) / len(there) if len(there) == len(values) else None

    means = {category: mean([scores.get(task) for task in tasks]) for category, tasks in CATEGORIES.items()}
    return {
        **means,
        "mean_16_tasks": mean([scores.get(task) for task in ENGLISH]),
        "mean_of_categories": mean(list(means.values())),
    }
