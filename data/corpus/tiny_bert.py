"""How data/tiny-bert was made: a BERT of random weights learns to find names and to fill blanks.

    python data/corpus/tiny_bert.py start                    # random weights, vocabulary
    python data/corpus/make.py pretrain.json
    python train.py --model start --train pretrain.json --dev data/corpus/dev.json \\
        --dense-epochs 3 --epochs 0 --batch-size 32 --lr 1e-3 --out made

and `from_pretrained("made/dense").half().save_pretrained("data/tiny-bert")`.

A question is a statement with a blank, "Anna Page was born in _.", or "Who is Anna?"; the answer
stands in the paragraph (span selection, as in Ram et al., Few-Shot Question Answering by
Pretraining Span Selection, 2021, arXiv 2101.00438). No question of the training set and no name of
the development set is among them. Positions start as sines (Vaswani et al., 2017, section 3.5).
The vocabulary is the templates' words, syllables, and single characters for the rest.
"""
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "data/tiny-bert"
sys.path.insert(0, str(ROOT))
from data.text import copy_tokenizer  # noqa: E402
from model import BertForQuestionAnswering  # noqa: E402

if __name__ == "__main__":
    folder = sys.argv[1]                                       # for random weights and vocabulary
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertForQuestionAnswering.from_pretrained(SHIPPED).config)
    angle = torch.arange(512)[:, None] / 10_000 ** (torch.arange(64) / 64)
    waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)                # (positions, C)
    model.embeddings.position.weight.data = waves / 7
    model.save_pretrained(folder)
    copy_tokenizer(SHIPPED, folder)
