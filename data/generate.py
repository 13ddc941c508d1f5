"""A small corpus in SQuAD's format, made up from templates, so that the whole method runs offline in minutes.

Every paragraph tells the same few things about several people, so the answer cannot be found without the
question, nor without the paragraph. People, towns and dogs have made-up names; a name is used in training
or in the development set, never in both.

    python data/generate.py FOLDER                   # FOLDER/train.json, dev.json and vocab.txt, to look at
"""
from __future__ import annotations

import json
import random
import string
import sys
from pathlib import Path

SYLLABLES = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in "lnr"]
ARTICLES = {"train": 20, "dev": 2, "pretrain": 200}             # of 50 paragraphs each
JOBS = ("baker carpenter cook doctor driver farmer gardener judge lawyer miller nurse painter pilot potter "
        "sailor singer tailor teacher waiter weaver").split()
# relation: (kind of answer, statements, questions, questions the other way round); {p} person, {a} answer
RELATIONS = {
    "birth": ("town", ["{p} was born in {a}.", "{p} comes from {a}."],
              ["Where was {p} born?", "Which town does {p} come from?"], ["Who was born in {a}?"]),
    "home": ("town", ["{p} lives in {a}.", "The home of {p} is in {a}."],
             ["Where does {p} live?", "Where is the home of {p}?"], ["Who lives in {a}?"]),
    "job": ("job", ["{p} works as a {a}.", "{p} is a {a} by trade."],
            ["What is the job of {p}?", "What does {p} work as?"], ["Who works as a {a}?"]),
    "dog": ("dog", ["{p} has a dog called {a}.", "The dog of {p} is called {a}."],
            ["What is the dog of {p} called?"], ["Who has a dog called {a}?"]),
    "year": ("year", ["{p} left school in {a}.", "In {a}, {p} left school."],
             ["When did {p} leave school?"], ["Who left school in {a}?"]),
}


def corpus(split: str) -> list[dict]:
    """SQuAD's list of articles. Splits: "train", "dev", "pretrain"; always the same for the same split."""
    rng = random.Random(split)
    names = [a + b for a in SYLLABLES for b in SYLLABLES if a != b]
    random.Random(0).shuffle(names)                   # the same order for all splits, which take different parts
    names = names[len(names) * 4 // 5:] if split == "dev" else names[:len(names) * 4 // 5]
    return [{"title": f"{split} {n}",
             "paragraphs": [paragraph(rng, names, f"{split}-{n}-{m}", cloze=split == "pretrain") for m in range(50)]}
            for n in range(ARTICLES[split])]


def paragraph(rng: random.Random, names: list[str], id_: str, people: int = 4, relations: int = 3,
              questions: int = 6, cloze: bool = False) -> dict:
    """One paragraph about some people, with questions about some of its facts.

    With `cloze` a question is a statement of the paragraph with a blank in it: "Bilder was born in [MASK]."
    """
    fresh = iter(rng.sample(names, 3 * people + people))
    jobs, years = rng.sample(JOBS, people), rng.sample(range(1950, 2020), people)
    persons = [next(fresh).capitalize() for _ in range(people)]
    facts = []                                        # (person, relation, answer)
    for relation in rng.sample(list(RELATIONS), relations):
        for n, person in enumerate(persons):
            kind = RELATIONS[relation][0]
            answer = jobs[n] if kind == "job" else str(years[n]) if kind == "year" else next(fresh).capitalize()
            facts.append((person, relation, answer))
    rng.shuffle(facts)
    context, places = "", []                          # places: where person and answer begin
    for person, relation, answer in facts:
        template = rng.choice(RELATIONS[relation][1])
        sentence = template.format(p=person, a=answer)
        places.append((len(context) + sentence.index(person), len(context) + sentence.index(answer)))
        context += sentence + " "
    qas = []
    for n in sorted(rng.sample(range(len(facts)), questions)):
        person, relation, answer = facts[n]
        kind, statements, forward, backward = RELATIONS[relation]
        if cloze:
            forward, backward = ([t.replace(blank, "[MASK]") for t in statements] for blank in ("{a}", "{p}"))
        if rng.random() < 0.75:
            text, truth, start = rng.choice(forward).format(p=person), answer, places[n][1]
        else:
            text, truth, start = rng.choice(backward).format(a=answer), person, places[n][0]
        qas.append({"id": f"{id_}-{n}", "question": text, "answers": [{"text": truth, "answer_start": start}]})
    return {"context": context.strip(), "qas": qas}


def vocabulary() -> list[str]:
    """WordPiece's vocabulary for the corpus: words, syllables, and single characters for everything else."""
    text = " ".join(t for _, *groups in RELATIONS.values() for group in groups for t in group)
    words = sorted({w for w in text.format(p="", a="").lower().translate(
        str.maketrans(string.punctuation, " " * len(string.punctuation))).split() if len(w) > 1} | set(JOBS))
    pieces = [*SYLLABLES, *string.ascii_lowercase, *string.digits, *(f"{n:02}" for n in range(100))]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *words,
            *pieces, *(f"##{piece}" for piece in pieces)]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        (folder / f"{split}.json").write_text(json.dumps({"version": "1.1", "data": corpus(split)}, indent=1))
    (folder / "vocab.txt").write_text("\n".join(vocabulary()) + "\n")
