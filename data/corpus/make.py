"""How the generated corpus beside this file was made; a run reads the files, not this script.

    python data/corpus/make.py            # writes train.json, dev.json, train.tsv, dev.tsv anew
    python data/corpus/make.py pretrain.json     # what data/tiny-bert learnt from: tiny_bert.py

Every paragraph is made up from templates and tells the same few things about several people, so
the answer can be found neither without the question nor without the paragraph. No person (first
and last name), town or dog of the development set occurs in training. The tables ask whether a
sentence answers a question, as GLUE's QNLI does.
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


def save_squad(path, split):
    """SQuAD's JSON, a line for each paragraph."""
    articles = []
    for article in squad(split)["data"]:
        paragraphs = ",\n".join(map(json.dumps, article["paragraphs"]))
        articles.append(f'{{"title": "{article["title"]}", "paragraphs": [\n{paragraphs}]}}')
    path.write_text('{"version": "1.1", "data": [\n' + ",\n".join(articles) + "]}\n")


def save_table(path, split):
    """Questions and sentences in turn: one that doesn't answer the question, and one that does."""
    lines = ["question\tsentence\tlabel"]
    for article in squad(split)["data"]:
        for paragraph in article["paragraphs"]:
            sentences = paragraph["context"].split(". ")
            for entry in paragraph["qas"]:
                label = ("yes", "no")[len(lines) % 2]
                answers = [entry["answers"][0]["text"] in sentence for sentence in sentences]
                sentence = sentences[answers.index(label == "yes")]
                lines.append(f"{entry['question']}\t{sentence}\t{label}")
    path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:]:
        save_squad(Path(sys.argv[1]), "pretrain")
    else:
        for split in ("train", "dev"):
            here = Path(__file__).parent
            save_squad(here / f"{split}.json", split)
            save_table(here / f"{split}.tsv", split)
