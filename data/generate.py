"""A corpus in SQuAD's format, made up from templates, to run the whole method offline in minutes.

Every paragraph tells the same few things about several people, so the answer can be found neither
without the question nor without the paragraph. People, towns and dogs have made-up names; those of
the development set occur nowhere in training.

    python data/generate.py FOLDER           # writes train.json and dev.json, to look at
"""
from __future__ import annotations

import json
import random
import re
import string
import sys
from pathlib import Path

ARTICLES = {"train": 40, "dev": 4, "pretrain": 320}          # of 50 paragraphs each
SYLLABLES = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in "lnr"]
JOBS = ("baker carpenter cook doctor driver farmer gardener judge lawyer miller nurse painter "
        "pilot potter sailor singer tailor teacher waiter weaver").split()
YEARS = [str(year) for year in range(1950, 2020)]
# relation: statements, questions for the answer {a}, questions for the person {p}
RELATIONS = {
    "birth": (["{p} was born in {a}.", "{p} comes from {a}."],
              ["Where was {p} born?", "Which town does {p} come from?"], ["Who was born in {a}?"]),
    "home": (["{p} lives in {a}.", "The home of {p} is in {a}."],
             ["Where does {p} live?", "Where is the home of {p}?"], ["Who lives in {a}?"]),
    "dog": (["{p} has a dog called {a}.", "The dog of {p} is called {a}."],
            ["What is the dog of {p} called?"], ["Who has a dog called {a}?"]),
    "job": (["{p} works as a {a}.", "{p} is a {a} by trade."],
            ["What is the job of {p}?", "What does {p} work as?"], ["Who works as a {a}?"]),
    "school": (["{p} left school in {a}.", "In {a}, {p} left school."],
               ["When did {p} leave school?"], ["Who left school in {a}?"]),
}


def corpus(split: str) -> list[dict]:
    """SQuAD's list of articles for "train", "dev" or "pretrain": the same at every call."""
    rng = random.Random(split)
    names = [(a + b).capitalize() for a in SYLLABLES for b in SYLLABLES if a != b]
    random.Random(0).shuffle(names)                          # the same order for every split
    cut = len(names) * 4 // 5
    names = names[cut:] if split == "dev" else names[:cut]
    return [{"title": f"{split} {a}", "paragraphs": [
        paragraph(rng, names, f"{split}-{a}-{p}", cloze=split == "pretrain") for p in range(50)]}
        for a in range(ARTICLES[split])]


def paragraph(rng: random.Random, names: list[str], id_: str, cloze: bool) -> dict:
    """One, two or three facts of the same kinds about each of three people; up to four questions.

    With `cloze`, a question is a statement with a blank in it: "Bilder was born in _."
    """
    fresh, facts = rng.sample(names, 12), []
    people = [fresh.pop() for _ in range(3)]
    for relation in rng.sample(list(RELATIONS), rng.randint(1, 3)):
        closed = {"job": JOBS, "school": YEARS}.get(relation)
        answers = rng.sample(closed, 3) if closed else [fresh.pop() for _ in people]
        facts += zip(people, answers, [relation] * 3)
    rng.shuffle(facts)
    asked = rng.sample(facts, min(4, len(facts)))
    context, qas = "", []
    for person, answer, relation in facts:
        statements, *questions = RELATIONS[relation]
        if cloze:
            questions = ([s.replace(gap, "_") for s in statements] for gap in ("{a}", "{p}"))
        forward, backward = questions
        truth, templates = (answer, forward) if rng.random() < 0.75 else (person, backward)
        sentence = rng.choice(statements).format(p=person, a=answer)
        if (person, answer, relation) in asked:
            qas.append({"id": f"{id_}-{len(qas)}",
                        "question": rng.choice(templates).format(p=person, a=answer),
                        "answers": [{"text": truth,
                                     "answer_start": len(context) + sentence.index(truth)}]})
        context += sentence + " "
    return {"context": context.strip(), "qas": qas}


def vocabulary() -> list[str]:
    """WordPiece's vocabulary: the templates' words, syllables, single characters for the rest."""
    words = sorted({*re.findall("[a-z]{2,}", str([*RELATIONS.values()]).lower()), *JOBS})
    pieces = [*SYLLABLES, *string.ascii_lowercase, *string.digits, *(f"{n:02}" for n in range(100))]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation,
            *words, *pieces, *(f"##{piece}" for piece in pieces)]


if __name__ == "__main__":
    for split in ("train", "dev"):
        path = Path(sys.argv[1]) / f"{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"version": "1.1", "data": corpus(split)}, indent=1))
