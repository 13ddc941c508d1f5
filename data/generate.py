"""A corpus in SQuAD's format, made up from templates, to run the whole method offline in minutes.

Every paragraph tells the same few things about several people, so the answer can be found neither
without the question nor without the paragraph. No person (first and last name), town or dog of the
development set occurs in training.

    python data/generate.py dev > dev.json           # to look at
"""
import argparse
import json
import random
from pathlib import Path

ARTICLES = {"train": 40, "dev": 4, "pretrain": 250}          # of 50 paragraphs each
SYLLABLES = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in "lnr"]
YEARS = [str(year) for year in range(1950, 2020)]
# Names, jobs and relations: statements about a person {p}, questions that the answer {a} is to.
TEMPLATES = json.loads((Path(__file__).parent / "templates.json").read_text(encoding="utf-8"))
FIRST, LAST, JOBS, RELATIONS = TEMPLATES.values()


def corpus(split: str) -> list[dict]:
    """SQuAD's list of articles for "train", "dev" or "pretrain": the same at every call."""
    rng = random.Random(split)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    names = [(a + b).capitalize() for a in SYLLABLES for b in SYLLABLES if a != b]
    for group in (people, names):                            # the same parts for every split
        random.Random(0).shuffle(group)
        cut = len(group) * 4 // 5
        group[:] = group[cut:] if split == "dev" else group[:cut]
    return [{"title": f"{split} {a}", "paragraphs": [paragraph(
        rng, people, names, f"{split}-{a}-{p}", split == "pretrain") for p in range(50)]}
            for a in range(ARTICLES[split])]


def paragraph(rng: random.Random, people: list[str], names: list[str], id_: str,
              pretrain: bool) -> dict:
    """One or two facts of the same kinds about each of three people, and up to four questions.

    With `pretrain`, the questions are statements with a blank, "Anna Page was born in _.", and
    "Who is Anna?": to find a name again is what a model must learn before all else.
    """
    people = [rng.choice([person for person in people if person.startswith(first)])
              for first in rng.sample(FIRST, 3)]
    fresh, facts = rng.sample(names, 6), []
    for relation in rng.sample(list(RELATIONS), rng.randint(1, 2)):
        closed = {"job": JOBS, "school": YEARS}.get(relation)
        answers = rng.sample(closed, 3) if closed else [fresh.pop() for _ in people]
        facts += zip(people, answers, [relation] * 3)
    rng.shuffle(facts)
    asked = rng.sample(facts, min(4, len(facts)))
    context, qas = "", []
    for person, answer, relation in facts:
        statements, questions = RELATIONS[relation].values()
        sentence = rng.choice(statements).format(p=person, a=answer)
        if (person, answer, relation) in asked:
            question = rng.choice(statements if pretrain else questions).format(p=person, a="_")
            qas.append({"id": f"{id_}-{len(qas)}", "question": question, "answers": [
                {"text": answer, "answer_start": len(context) + sentence.index(answer)}]})
        context += sentence + " "
    for person in people * pretrain:
        qas.append({"id": f"{id_}-{len(qas)}", "question": f"Who is {person.split()[0]}?",
                    "answers": [{"text": person, "answer_start": context.index(person)}]})
    return {"context": context.strip(), "qas": qas}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("split", nargs="?", default="dev", choices=ARTICLES)
    print(json.dumps({"version": "1.1", "data": corpus(parser.parse_args().split)}, indent=1))
