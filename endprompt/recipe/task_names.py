"""The benchmarks a recipe may name under ``eval.tasks``, and what is fixed about them."""

RULER = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
LONGBENCH = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
LONGBENCH_ZH = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
# The harness' own tasks: (few-shot examples, metric as the harness names it).  The paper's Table 5 names no
# variant of GSM8K's metric; strict-match is the one the harness lists first.
SHORT_TEXT = {
    "mmlu": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "humaneval": (0, "pass@1,create_test"),
}

# Those whose data hold no more examples than these.
MOST_SHOTS = {"mmlu": 5, "humaneval": 0}

# Ours, scored a haystack or a text at a time, through a cache of what prompts share.
DISTANCE, NAMED_KEYS, FAR_GAIN = PIECEWISE = ("distance", "named_keys", "far_gain")

GROUPS = {
    "ruler": tuple(f"ruler_{task}" for task in RULER),
    "longbench": tuple(f"longbench_{task}" for task in LONGBENCH),
    "longbench_zh": tuple(f"longbench_{task}" for task in LONGBENCH_ZH),
    "short_text": tuple(SHORT_TEXT),
}
ALONE = ("passkey", "multikey", "perplexity", *PIECEWISE)  # in no group
TASKS = (*ALONE, *(task for group in GROUPS.values() for task in group))


def short_text(task: str, shots: int | None) -> tuple[int, str]:
    """(examples before a question, metric) of one of SHORT_TEXT; shots: None, or another number than its
    own."""
    few_shots, metric = SHORT_TEXT[task]
    return few_shots if shots is None else shots, metric


def expand(names: list[str]) -> list[str]:
    """``names`` with each group replaced by its tasks, each once, in order.  Raises ValueError naming what is
    not known.
    """
    found = [task for name in names for task in GROUPS.get(name, (name,))]
    if unknown := [name for name in found if name not in TASKS]:
        raise ValueError(
            f"there is no task {unknown[0]!r}; use {', '.join(ALONE)}, the groups"
            f" {', '.join(GROUPS)}, or one of their tasks, such as ruler_vt, longbench_qasper, mmlu"
        )
    return list(dict.fromkeys(found))
