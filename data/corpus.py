"""A small corpus in SQuAD's format, made up from templates, to run the whole method offline.

Every paragraph tells the same few things about several people, so the answer can be found neither
without the question nor without the paragraph. No person (first and last name), town or dog of the
development set occurs in training.

    python data/corpus.py dev > dev.json           # to look at; or train, or pretrain
"""
import json
import random
import sys
from itertools import permutations, product
from pathlib import Path

ARTICLES = {"train": 40, "dev": 4, "pretrain": 250}          # of 50 paragraphs each
SYLLABLES = ["".join(letters) for letters in product("bdfgklmnprstvz", "aeiou", "lnr")]
# Names, jobs and relations: statements about a person {p}, questions that the answer {a} is to.
TEMPLATES = json.loads(Path(__file__).with_name("templates.json").read_text(encoding="utf-8"))
FIRST, LAST, JOBS, RELATIONS = TEMPLATES.values()
ANSWERS = {"job": JOBS, "school": [str(year) for year in range(1950, 2020)]}      # else: names


def squad(split="dev"):
    """SQuAD's JSON for "train", "dev" or "pretrain": the same at every call."""
    rng = random.Random(split)
    people, names = names_of(split)
    articles = []
    for a in range(ARTICLES[split]):
        paragraphs = []
        for p in range(50):
            facts = invent(rng, people, names)
            paragraphs.append(write(rng, facts, f"{split}-{a}-{p}", split == "pretrain"))
        articles.append({"title": f"{split} {a}", "paragraphs": paragraphs})
    return {"version": "1.1", "data": articles}


def names_of(split):
    """The people, and the names of towns and dogs: a fifth is kept for the development set."""
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    names = ["".join(pair).capitalize() for pair in permutations(SYLLABLES, 2)]
    for group in (people, names):
        random.Random(0).shuffle(group)
        cut = len(group) * 4 // 5
        group[:] = group[cut:] if split == "dev" else group[:cut]
    return people, names


def invent(rng, people, names):
    """One or two facts of the same kinds about each of three people: (person, answer, relation)."""
    persons = []
    for first in rng.sample(FIRST, 3):
        persons.append(rng.choice([person for person in people if person.startswith(first)]))
    fresh = rng.sample(names, 6)
    facts = []
    relations = rng.sample(list(RELATIONS), rng.randint(1, 2))
    for relation in relations:
        if relation in ANSWERS:
            answers = rng.sample(ANSWERS[relation], 3)
        else:
            answers = [fresh.pop() for _ in persons]
        facts += zip(persons, answers, [relation] * 3)
    rng.shuffle(facts)
    return facts


def write(rng, facts, id_, pretrain):
    """A paragraph with a sentence a fact, and questions about up to four of them.

    With `pretrain`, the questions are statements with a blank, "Anna Page was born in _.", and
    "Who is Anna?": to find a name again is what a model must learn before all else.
    """
    asked = rng.sample(facts, min(4, len(facts)))
    context = ""
    found = []                                            # question, answer and where it stands
    for fact in facts:
        person, answer, relation = fact
        statements, questions = RELATIONS[relation].values()
        context += rng.choice(statements).format(p=person, a=answer) + " "
        if fact in asked:
            form = rng.choice(statements if pretrain else questions)
            found.append((form.format(p=person, a="_"), answer, context.rindex(answer)))
    if pretrain:
        for person in dict.fromkeys(person for person, _, _ in facts):
            found.append((f"Who is {person.split()[0]}?", person, context.index(person)))
    qas = []
    for number, (question, answer, start) in enumerate(found):
        answers = [{"text": answer, "answer_start": start}]
        qas.append({"id": f"{id_}-{number}", "question": question, "answers": answers})
    return {"context": context.strip(), "qas": qas}


if __name__ == "__main__":
    print(json.dumps(squad(*sys.argv[1:]), indent=1))
