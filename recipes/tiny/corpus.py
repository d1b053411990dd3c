"""Writes the synthetic English corpus of the embedded default: documents whose facts come back.

Every document is a stream of plain sentences about people, places and things.  Between them it states facts
with random values ("The door code of Mara is 40817.") and states each of them again later, so a reader who
looks back predicts the second statement and nobody else can.  Most facts recur within a chapter (some 170
tokens), others chapters later, at log-uniform
distances: rows of 256 tokens and rows of 2048 tokens of the same text both contain recurrences.

    python recipes/tiny/corpus.py                                      # the text that the demo trains on
    python recipes/tiny/corpus.py --documents 4 --seed 2 --out recipes/tiny/heldout.jsonl.gz
"""

import argparse
import gzip
import json
import math
import random
from pathlib import Path

NAMES = """Mara Tobin Ilse Jonas Petra Edwin Nora Silas Greta Oskar Lena Hugo Amara Felix Rosa Anton Clara
Victor Dina Emil Frieda Gustav Hanna Igor Judith Karl Lotte Milo Nadia Otto""".split()
PLACES = """harbour market village forest library station garden mill bridge chapel tower valley river
school kitchen cellar island meadow workshop theatre""".split()
THINGS = """lamp letter basket ladder violin coat clock map barrel candle blanket mirror rope hammer bell
bottle box kettle saddle umbrella""".split()
ADJECTIVES = """old blue heavy small bright broken quiet green wooden narrow yellow cold golden empty long
round soft new dark simple""".split()
VERBS = """carried found sold lost hid repaired painted wanted bought counted brought moved""".split()
WEATHER = """rain snow wind fog sun frost thunder mist""".split()
TIMES = """morning evening night winter summer autumn spring afternoon""".split()
SECRETS = [
    "pass key",
    "door code",
    "room number",
    "ticket number",
    "house number",
    "secret number",
    "year",
    "price",
]

# The filler, the needle and the question of the passkey test are made of these words too, and the end prompts
# EP_1 and EP_3: a base of this size cannot be asked to read words it never met.
COMMON = """The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.
There is an important info hidden inside a lot of irrelevant text. Find it and memorize them.
I will quiz you about the important information there. Please pay attention here.
This is the end of text, please pay attention here. This is the end of the day. The end. End. \
What is the key?""".split("\n")


def plain_sentence(rng: random.Random) -> str:
    name, other = rng.sample(NAMES, 2)
    thing, place, adjective, verb = (
        rng.choice(THINGS),
        rng.choice(PLACES),
        rng.choice(ADJECTIVES),
        rng.choice(VERBS),
    )
    time, weather = rng.choice(TIMES), rng.choice(WEATHER)
    return rng.choice(
        [
            f"{name} {verb} the {adjective} {thing} near the {place}.",
            f"In the {time} {name} went to the {place} with {other}.",
            f"The {adjective} {thing} of {name} was in the {place}.",
            f"There was {weather} in the {place} that {time}.",
            f"{name} and {other} {verb} a {thing} and a {adjective} {rng.choice(THINGS)}.",
            f"Nobody in the {place} remembered the {weather} of that {time}.",
            f'"Where is the {thing}?" asked {name}. "It is in the {place}," said {other}.',
            f"After the {weather}, the {place} was {adjective} and {rng.choice(ADJECTIVES)}.",
            f"The way from the {place} to the {rng.choice(PLACES)} is {adjective}.",
            f"{name} told {other} about the {adjective} {place}.",
            rng.choice(COMMON),
        ]
    )


def new_fact(rng: random.Random, taken: set):
    """A function that words one fact anew at every call; the value is the same each time, its key is new to
    ``taken``.
    """
    kind = rng.random()
    value = "".join(rng.choices("0123456789", k=5))
    secret, name = rng.choice(SECRETS), rng.choice(NAMES)
    if kind < 0.45 and secret not in taken:
        taken.add(secret)
        wordings = [
            f"The {secret} is {value}.",
            f"The {secret} is {value}. Remember it. {value} is the {secret}.",
            f"What is the {secret}? The {secret} is {value}.",
            f"The {secret} is {value}. Remember it.",
        ]
    elif kind < 0.8 and (secret, name) not in taken:
        taken.add((secret, name))
        wordings = [
            f"The {secret} of {name} is {value}.",
            f"What is the {secret} of {name}? The {secret} of {name} is {value}.",
            f"Remember it: the {secret} of {name} is {value}.",
        ]
    else:
        saying = " ".join(
            rng.choice(ADJECTIVES + THINGS + PLACES + WEATHER) for _ in range(rng.randint(4, 9))
        )
        wordings = [f"The song of {name} is: {saying}.", f"{name} sang again: {saying}."]
    return lambda: rng.choice(wordings)


def document(
    rng: random.Random,
    sentences: int,
    facts_per_sentence: float = 0.16,
    framed: bool = False,
    taken: set | None = None,
) -> str:
    """One document of about ``sentences`` sentences, of which every fact appears at least twice; ``framed``
    by one more fact that opens it and closes it, so that the whole length is bridged.  Keys in ``taken`` are
    not used, and those used are added.
    """
    slots: list[list[str]] = [[plain_sentence(rng)] for _ in range(sentences)]
    taken = set() if taken is None else taken
    for _ in range(max(1, round(sentences * facts_per_sentence))):
        fact, place = new_fact(rng, taken), rng.randrange(sentences)
        slots[place].append(fact())
        for _ in range(rng.choice([1, 1, 2, 3])):
            place += max(1, round(math.exp(rng.uniform(0, math.log(max(2, sentences))))))
            if place >= sentences:
                place = rng.randrange(sentences)
            slots[place].append(fact())
    if framed:
        fact = new_fact(rng, taken)
        slots[0].insert(0, fact())
        slots[-1].append(fact())
    return " ".join(sentence for slot in slots for sentence in slot)


def story(rng: random.Random, chapters: int) -> str:
    """One long document: chapters that are documents of their own, about 170 tokens each, and facts that
    bridge chapters.
    """
    named: set = set()
    parts: list[list[str]] = []
    for _ in range(chapters):
        taken = set(
            named
        )  # a name's key is used once in a story; "the pass key" may be another one in each chapter
        parts.append(
            [
                document(
                    rng,
                    rng.randint(4, 12),
                    rng.choice([0.16, 0.3, 0.6]),
                    framed=rng.random() < 0.4,
                    taken=taken,
                )
            ]
        )
        named |= {key for key in taken if isinstance(key, tuple)}
    taken = named | set(SECRETS)
    for place in range(chapters - 1):
        fact = new_fact(rng, taken)
        parts[place].append(fact())
        for _ in range(rng.choice([1, 2])):
            later = place + round(math.exp(rng.uniform(0, math.log(chapters))))
            parts[min(later, chapters - 1)].append(fact())
    return " ".join(sentence for part in parts for sentence in part)


def write(path: Path, documents: int, chapters: int, seed: int) -> None:
    rng = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime=0 and no file name: the same arguments give the same bytes.
    with path.open("wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
        for index in range(documents):
            row = {"id": f"tiny-{seed}-{index:04d}", "text": story(rng, chapters)}
            packed.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=130)
    parser.add_argument("--chapters", type=int, default=24, help="in a document, about 170 tokens each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "corpus.jsonl.gz")
    arguments = parser.parse_args()
    write(arguments.out, arguments.documents, arguments.chapters, arguments.seed)
