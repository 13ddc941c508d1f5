"""How data/tiny-bert was made: a BERT of random weights learns to fill blanks in generated text.

    python data/pretrain.py data/tiny-bert           # some ten minutes on two cores

The question is a statement with a blank, "Bilder was born in _.", and the answer stands in the
paragraph (as in Ram et al., Few-Shot Question Answering by Pretraining Span Selection, 2021, arXiv
2101.00438). No question of the training set and no name of the development set is among them.
"""
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402
from data import generate, squad  # noqa: E402
from model import BertConfig, BertForQuestionAnswering  # noqa: E402

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = generate.vocabulary()
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1))
    questions = squad.questions_of(generate.corpus("pretrain"), "generated corpus")
    windows = squad.make_windows(questions, squad.load_tokenizer(folder), 384, 128)
    args = Namespace(lr=1e-3, score_lr=0.0, batch_size=32, seed=0)
    with open(folder / "log.jsonl", "w", buffering=1) as log:
        train.fit(model, windows, 0, args, 4, "pretrain", log)
    model.half().save_pretrained(folder)              # half precision: 2 MB
