"""A corpus in SQuAD's format, made up from templates, to run the whole method offline in minutes.

Every paragraph tells the same few things about several people, so the answer can be found neither
without the question nor without the paragraph. No person (first and last name), town or dog of the
development set occurs in training.

    python data/generate.py dev > dev.json           # to look at
"""
import json
import random
import re
import string
import sys

ARTICLES = {"train": 40, "dev": 4, "pretrain": 250}          # of 50 paragraphs each
SYLLABLES = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in "lnr"]
FIRST = ("Adam Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Nora Oscar Paul "
         "Rose Sam Vera").split()
LAST = ("Archer Bishop Carter Dyer Fisher Glover Hunter Knight Mason Page Parker Piper Porter "
        "Shepherd Slater Smith Taylor Turner Walker Wright").split()
JOBS = ("baker carpenter cook doctor driver farmer gardener judge lawyer miller nurse painter "
        "pilot potter sailor singer tailor teacher waiter weaver").split()
YEARS = [str(year) for year in range(1950, 2020)]
# relation: statements about a person {p}, and questions that the answer {a} is to
RELATIONS = {
    "birth": (["{p} was born in {a}.", "{p} comes from {a}."],
              ["Where was {p} born?", "Which town does {p} come from?"]),
    "home": (["{p} lives in {a}.", "The home of {p} is in {a}."],
             ["Where does {p} live?", "Where is the home of {p}?"]),
    "dog": (["{p} has a dog called {a}.", "The dog of {p} is called {a}."],
            ["What is the dog of {p} called?"]),
    "job": (["{p} works as a {a}.", "{p} is a {a} by trade."],
            ["What is the job of {p}?", "What does {p} work as?"]),
    "school": (["{p} left school in {a}.", "In {a}, {p} left school."],
               ["When did {p} leave school?", "In which year did {p} leave school?"]),
}


def corpus(split: str) -> list[dict]:
    """SQuAD's list of articles for "train", "dev" or "pretrain": the same at every call."""
    rng = random.Random(split)
    people = [f"{first} {last}" for first in FIRST for last in LAST]
    names = [(a + b).capitalize() for a in SYLLABLES for b in SYLLABLES if a != b]
    for group in (people, names):                            # the same parts for every split
        random.Random(0).shuffle(group)
        cut = len(group) * 4 // 5
        group[:] = group[cut:] if split == "dev" else group[:cut]
    return [{"title": f"{split} {a}", "paragraphs": [
        paragraph(rng, people, names, f"{split}-{a}-{p}", split == "pretrain") for p in range(50)]}
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
        statements, questions = RELATIONS[relation]
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


def vocabulary() -> list[str]:
    """WordPiece's vocabulary: the templates' words, syllables, single characters for the rest."""
    words = {*re.findall("[a-z]{2,}", str([FIRST, LAST, JOBS, *RELATIONS.values()]).lower())}
    pieces = [*SYLLABLES, *string.ascii_lowercase, *string.digits, *(f"{n:02}" for n in range(100))]
    return [*dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation,
                            *sorted(words), *pieces, *(f"##{piece}" for piece in pieces)])]


if __name__ == "__main__":
    print(json.dumps({"version": "1.1", "data": corpus(*sys.argv[1:] or ["dev"])}, indent=1))
