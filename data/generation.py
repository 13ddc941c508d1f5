"""Task generation: write a question for a given answer; score it by BLEU and ROUGE-L.

One idea: source and target stand in one window, and a mask hides the later words of the target.

    [CLS] answer [SEP] context around the answer      the source, type 0: every token sees it all
    [SEP] q1 q2 .. qn                                 the target, type 1: predicts q1 q2 .. qn [SEP]

Sources: Dong et al., UniLM, 2019 (arXiv 1905.03197), sections 2.3 and 3.4; Papineni et al., BLEU,
2002 (ACL P02-1040); Lin, ROUGE, 2004 (ACL W04-1013), section 3.
"""
import math
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import torch

from data import squad_json
from data.run import note
from data.squad_json import targets_agree  # noqa: F401 (task.targets_agree)
from data.text import Window, run_model
from model import BertForGeneration

MODEL = BertForGeneration
HEADLINE = "rouge_l"                         # the score that counts
SUFFIX = "json"                              # of the files it reads
KEEPS_LOGITS = False                         # a row is as long as the vocabulary: too much
LONGEST = 32                                 # tokens of a question


def read(path, train=False, columns=None):
    """The questions that have an answer; all need its span. Raises ValueError or OSError."""
    questions = squad_json.read(path, True, columns)
    answered = [question for question in questions if question.span]
    if len(answered) < len(questions):
        note(f"{path}: {len(questions) - len(answered)} questions have no answer; left out")
    if not answered:
        raise ValueError(f"{path}: no question has an answer; is it the right file?")
    return answered


def example(text, path):
    """An answer that stands in a text file, for `--ask`. Raises ValueError or OSError."""
    return squad_json.example(text, path, answers=[text])         # its question isn't known yet


def prepare_model(model, questions):
    """There is nothing that the model must know about its data."""


def make_windows(questions, tokenizer, config):
    """A window for every question; its context is cut around the answer. Raises ValueError."""
    cls, sep = map(tokenizer.token_to_id, ("[CLS]", "[SEP]"))
    length = config.reading.max_length
    # A window is [CLS] answer [SEP] left answer right [SEP] question, with as much of the context
    # to the left as to the right of the answer. The answer stands in it twice, so these are
    # 3 + LONGEST + 2 * (tokens of the answer + tokens to one side of it).
    half = (length - LONGEST - 3) // 2                         # the answer and one side
    if half < 1:
        raise ValueError(f"--max-length {length} has no room beside a question of "
                         f"{LONGEST} tokens; raise it")
    windows = []
    for question in questions:
        begin, end = question.span
        context = question.context
        texts = [question.text, context[begin:end], context[:begin], context[end:]]
        codes = tokenizer.encode_batch(texts, add_special_tokens=False)
        words, answer, before, behind = (code.ids for code in codes)
        words = words[:LONGEST]
        answer = answer[:half]
        side = half - len(answer)
        source = [cls, *answer, sep, *before[max(0, len(before) - side):], *answer, *behind[:side]]
        ids = torch.tensor([*source, sep, *words])
        windows.append(Window(question.id, ids, len(source), torch.tensor([*words, sep])))
    return windows


def predict(model, tokenizer, questions):
    """A question for every answer, by id; each next word is the likeliest (see `write`)."""
    sep = tokenizer.token_to_id("[SEP]")
    sources = []
    for window in make_windows(questions, tokenizer, model.config):
        sources.append(replace(window, ids=window.ids[:window.first]))
    predictions = {}
    for i, tokens in run_model(model, sources, call=partial(write, model, sep)):
        tokens = [*tokens.tolist(), sep]
        predictions[sources[i].id] = tokenizer.decode(tokens[:tokens.index(sep)])
    return predictions


def write(model, sep, input_ids, attention_mask, token_type_ids):
    """A target for each source (B, T), greedily: (B, n); what follows a [SEP] doesn't count.

    The first token of a target is a [SEP] of its own, as in training. The keys and values of all
    earlier tokens are kept, so that a step computes one token only.
    """
    kv_caches = [[] for _ in model.layers]
    model.encode(input_ids, attention_mask[:, None, None].bool(), token_type_ids,
                 kv_caches=kv_caches)
    ones = torch.ones_like(input_ids[:, :1])                                             # (B, 1)
    tokens = [sep * ones]
    ended = ones == 0                                                 # (B, 1), False at first
    while len(tokens) <= LONGEST and not ended.all():
        position = attention_mask.sum(1, keepdim=True)         # (B, 1): padding takes no position
        attention_mask = torch.cat([attention_mask, ones], 1)
        visible = attention_mask[:, None, None].bool()                             # (B, 1, 1, T)
        x = model.encode(tokens[-1], visible, ones, position, kv_caches)                 # (B, 1, C)
        tokens.append(model.vocabulary(x, model.embeddings.word.weight).argmax(-1))
        ended |= tokens[-1] == sep
    return torch.cat(tokens[1:], 1)


# -------------------------------------------------------------------------------- BLEU and ROUGE-L


def score(predictions, questions):
    """BLEU-4 of all questions together and the mean of ROUGE-L, in percent."""
    pairs = [(predictions.get(question.id, ""), question.text) for question in questions]
    words = split(pairs, r"\w+")
    words_and_marks = split(pairs, r"\w+|[^\w\s]")
    overlap = sum(rouge_l(*pair) for pair in words)
    return {"bleu": 100 * bleu(words_and_marks), "rouge_l": 100 * overlap / len(pairs)}


def split(pairs, pattern):
    return [[re.findall(pattern, text.lower()) for text in pair] for pair in pairs]


def bleu(pairs):
    """BLEU-4 of a corpus, one reference each, not smoothed:

    min(1, e^(1 - r / c)) * (p_1 p_2 p_3 p_4)^(1/4), r and c the words of all references and
    candidates, p_n the share of the candidates' n-grams that their references have, too.
    """
    logs = []
    for n in range(1, 5):
        common = sum((grams(c, n) & grams(r, n)).total() for c, r in pairs)
        total = sum(grams(c, n).total() for c, _ in pairs)
        if common == 0:
            return 0.0
        logs.append(math.log(common / total))
    c, r = (sum(map(len, texts)) for texts in zip(*pairs))
    return math.exp(min(0, 1 - r / c) + sum(logs) / 4)


def grams(words, n):
    return Counter(zip(*(words[i:] for i in range(n))))


def rouge_l(candidate, reference):
    """F1 of the longest common subsequence: 2 * LCS / (m + n)."""
    row = [0] * (len(reference) + 1)     # row[j]: LCS of the words so far and of reference[:j]
    for word in candidate:
        above = row[:]
        for j, other in enumerate(reference):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    return 2 * row[-1] / max(1, len(candidate) + len(reference))
