"""One run of one of NVIDIA's generator scripts, as ``python -m endprompt.evaluation.ruler_worker JOB.json``;
`ruler.generate` starts it.

The script runs as it is in the package, after what is unsafe, slow or endless around it has been replaced:
the tokenizer (no remote code, the Rust tokenizer alone), NLTK's data (no downloader), repeated sentence
splitting, and the loops that a length too short for the task never leaves.  None of this changes a byte of
the samples.  The job: {"script", "argv", "definition" (a tokenizer.json), "encode_special_tokens",
"nltk_data" (folder or null), "samples" (the file the script writes), "tokens_to_generate", "counts" and
"failure" (files written here), "patience"}.
"""

import bisect
import functools
import hashlib
import itertools
import json
import os
import random
import runpy
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

TOO_SHORT, UNUSABLE = 3, 4  # exit codes whose reason stands in the job's "failure" file
# Where a sample does not fit, a script takes 10 words (cwe), 10 documents (qa) or 25 sentences (niah) away
# and draws again.  cwe has the longest way down, 817 steps with all its 8,165 words.
ATTEMPTS = 2000


def fail(job: dict, code: int, reason: str) -> None:
    """Ends the process at once: the scripts catch every exception, SystemExit too."""
    Path(job["failure"]).write_text(reason, encoding="utf-8")
    os._exit(code)


class Progress:
    """Ends the worker where a sample takes too many attempts, where nothing at all moves, or where the parent
    is gone.
    """

    def __init__(self, job: dict):
        self._job, self._parent = job, os.getppid()
        self._attempts: int | None = (
            None  # at the sample in hand; None while the script searches for the size of its haystack
        )
        self._stamp = time.process_time()
        threading.Thread(target=self._watch, daemon=True).start()

    def alive(self) -> None:
        self._stamp = time.process_time()

    def attempt(self) -> None:
        self.alive()
        if self._attempts is not None:
            self._attempts += 1
            if self._attempts > ATTEMPTS:
                fail(self._job, TOO_SHORT, f"{ATTEMPTS} attempts at a sample, and none fits")

    def bar(self, iterable: Iterable, *_, **__) -> Iterator:
        """In place of tqdm, which the scripts use for their samples only."""
        for item in iterable:
            self.alive()
            self._attempts = 0
            yield item
        self._attempts = None

    def _watch(self) -> None:
        # Processor time: on a busy machine the clock says nothing about the script.
        while os.getppid() == self._parent:
            if time.process_time() - self._stamp > self._job["patience"]:
                fail(self._job, TOO_SHORT, f"no progress in {self._job['patience']} s of processor time")
            time.sleep(0.5)
        os._exit(1)


class Counter:
    """The package's tokenizer object, of whose tokens the scripts use the number alone."""

    def __init__(self, definition: str, encode_special_tokens: bool, progress: Progress):
        from endprompt.rows.tokenizing import Encoder

        self._encode, self._progress = (
            Encoder(Path(definition).read_text(encoding="utf-8"), False, encode_special_tokens),
            progress,
        )
        self._known: dict[
            bytes, int
        ] = {}  # fwe counts a text three times, and the finished samples are counted once more

    def count(self, text: str) -> int:
        """Tokens of ``text`` without special ones, as many as
        ``len(transformers_tokenizer.tokenize(text))``.
        """
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if key not in self._known:
            self._known[key] = len(self._encode([text])[0])
        self._progress.alive()
        return self._known[key]

    def text_to_tokens(self, text: str) -> range:
        count = self.count(text)
        self._progress.attempt()
        return range(count)


class Pairs(Sequence):
    """sorted({f"{first}-{second}" for first in firsts for second in seconds}) without its millions of texts;
    niah.py spends ten seconds and a gigabyte on them.

    All texts of one first word stand together, in the order of the second words, unless another first word
    begins with the same word and a hyphen: those few are put together and sorted as they are.
    """

    def __init__(self, firsts: Iterable[str], seconds: Iterable[str]):
        self._seconds = sorted(set(seconds))
        self._groups: list[tuple[str, list[str] | None]] = []  # (first word, None) or ("", texts)
        beginning, texts = None, None
        for first in sorted(set(firsts), key=lambda word: f"{word}-"):
            if beginning is not None and f"{first}-".startswith(beginning):
                if texts is None:
                    texts = {f"{beginning}{second}" for second in self._seconds}
                texts |= {f"{first}-{second}" for second in self._seconds}
                self._groups[-1] = "", sorted(texts)
            else:
                self._groups.append((first, None))
                beginning, texts = f"{first}-", None
        self._ends = list(
            itertools.accumulate(len(self._seconds if texts is None else texts) for _, texts in self._groups)
        )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> str:  # no slices: samples are drawn by number
        group = bisect.bisect_right(self._ends, index)
        first, texts = self._groups[group]
        within = index - (self._ends[group - 1] if group else 0)
        return f"{first}-{self._seconds[within]}" if texts is None else texts[within]


def lazy_words() -> dict[str, Callable]:
    """Globals with which niah.py's ``words = [adjective-noun ...]; words = sorted(list(set(words)))`` becomes
    `Pairs`: it is given no adjectives, and its ``sorted`` makes the pairs of what is then an empty list; all
    it sorts otherwise has at least one item.
    """
    import wonderwords

    read = wonderwords.random_word._get_words_from_text_file
    pairs = Pairs(read("adjectivelist.txt"), read("nounlist.txt"))
    wonderwords.random_word._get_words_from_text_file = lambda name: (
        [] if name == "adjectivelist.txt" else read(name)
    )
    return {"sorted": lambda items, **options: sorted(items, **options) or pairs}


def counted_failures(function: Callable, progress: Progress) -> Callable:
    """``function``, every ValueError of which counts as an attempt: a haystack of fewer sentences than
    needles never reaches the tokenizer.
    """

    @functools.wraps(function)
    def call(*arguments, **options):
        try:
            return function(*arguments, **options)
        except ValueError:
            progress.attempt()
            raise

    return call


def prepare_sentences(job: dict, progress: Progress) -> None:
    """NLTK's sentence splitter with data that is there, each text split once; ends the worker if there is no
    data.
    """
    import nltk.tokenize

    if job["nltk_data"]:
        nltk.data.path.insert(0, job["nltk_data"])
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        fail(
            job,
            UNUSABLE,
            "NLTK's sentence data punkt_tab is not on this machine; install it with `pip install --no-deps"
            " llama-index-core`, or name a folder that holds it in NLTK_DATA",
        )
    split = functools.lru_cache(maxsize=2)(nltk.tokenize.sent_tokenize)

    def sent_tokenize(text: str) -> list[str]:
        if not text:  # the script would go on, with needles and nothing to hide them in
            fail(job, TOO_SHORT, "its smallest haystack, 500 words, does not fit")
        sentences = split(text)
        progress.alive()
        return sentences

    nltk.tokenize.sent_tokenize = sent_tokenize


def run(job: dict) -> None:
    """Runs the job's script and writes the samples' recounted lengths, tokens to generate included, to the
    job's "counts" file.
    """
    import tqdm

    progress = Progress(job)
    counter = Counter(job["definition"], job["encode_special_tokens"], progress)
    module = types.ModuleType("tokenizer")
    vars(module)["select_tokenizer"] = lambda tokenizer_type, tokenizer_path: counter
    sys.modules["tokenizer"] = sys.modules["long_context_eval.data.tokenizer"] = module
    tqdm.tqdm = progress.bar
    random.sample = counted_failures(random.sample, progress)
    if "essay" in job["argv"]:
        prepare_sentences(job, progress)
    replaced = lazy_words() if Path(job["script"]).name == "niah.py" else {}
    sys.argv = [job["script"], *job["argv"]]
    sys.path.insert(0, str(Path(job["script"]).parent))  # where `python script.py` would look first
    runpy.run_path(job["script"], replaced, run_name="__main__")
    with open(job["samples"], encoding="utf-8") as file:
        counts = [counter.count(json.loads(line)["input"]) + job["tokens_to_generate"] for line in file]
    Path(job["counts"]).write_text(json.dumps(counts), encoding="utf-8")


if __name__ == "__main__":
    run(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
