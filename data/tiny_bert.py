"""How data/tiny-bert was made: a BERT of random weights learns to find names and to fill blanks.

    python data/tiny_bert.py start                           # random weights, vocabulary, questions
    python train.py --model start --train start/pretrain.json --dev start/pretrain-dev.json \\
        --dense-epochs 3 --epochs 0 --batch-size 32 --lr 1e-3 --out made
    python data/tiny_bert.py data/tiny-bert --half made/dense

A question is a statement with a blank, "Anna Page was born in _.", or "Who is Anna?"; the answer
stands in the paragraph (span selection, as in Ram et al., Few-Shot Question Answering by
Pretraining Span Selection, 2021, arXiv 2101.00438). No question of the training set and no name of
the development set is among them. Positions start as sines (Vaswani et al., 2017, section 3.5).
"""
from __future__ import annotations

import argparse
import re
import string
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import corpus  # noqa: E402
from data.text import copy_tokenizer  # noqa: E402
from model import BertConfig, BertForQuestionAnswering, save_json  # noqa: E402


def vocabulary() -> list[str]:
    """WordPiece's vocabulary: the templates' words, syllables, single characters for the rest."""
    texts = [corpus.FIRST, corpus.LAST, corpus.JOBS]
    texts += [list(relation.values()) for relation in corpus.RELATIONS.values()]
    words = sorted(set(re.findall("[a-z]{2,}", str(texts).lower())))
    pieces = [*corpus.SYLLABLES, *string.ascii_lowercase, *string.digits]
    pieces += [f"{n:02}" for n in range(100)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.punctuation, *words, *pieces]
    tokens += [f"##{piece}" for piece in pieces]
    return list(dict.fromkeys(tokens))


def start(folder: Path):
    """Write random weights, the vocabulary, and the questions to learn from."""
    words = vocabulary()
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.1,
    }
    model = BertForQuestionAnswering(BertConfig(**sizes))
    speeds = 10_000 ** (torch.arange(64) / 64)
    angle = torch.arange(512)[:, None] / speeds
    waves = torch.stack([angle.sin(), angle.cos()], -1)
    model.embeddings.position.weight.data = waves.flatten(1) / 7                  # (positions, C)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    questions = corpus.squad("pretrain")
    save_json(folder / "pretrain.json", questions)
    save_json(folder / "pretrain-dev.json", {**questions, "data": questions["data"][:2]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="to write")
    parser.add_argument("--half", metavar="FOLDER", help="a trained model: write it in float16")
    args = parser.parse_args()
    if args.half:
        BertForQuestionAnswering.from_pretrained(args.half).half().save_pretrained(args.folder)
        copy_tokenizer(args.half, args.folder)
    else:
        start(args.folder)
