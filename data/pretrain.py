"""How data/tiny-bert was made: a BERT of random weights learns to find names and fill blanks.

    python data/pretrain.py data/tiny-bert           # some ten minutes on two cores

A question is a statement with a blank, "Anna Page was born in _.", or "Who is Anna?"; the answer
stands in the paragraph (span selection, as in Ram et al., Few-Shot Question Answering by
Pretraining Span Selection, 2021, arXiv 2101.00438). No question of the training set and no name
of the development set is among them. Positions start as sines (Vaswani et al., section 3.5).
"""
import io
import sys
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
    args = train.parse_args(["--lr", "1e-3", "--batch-size", "32"])
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig(
        vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=512, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.1))
    angle = torch.arange(512)[:, None] / 10_000 ** (torch.arange(64) / 64)
    waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)             # (positions, C)
    model.embeddings.position.weight.data = waves / 7
    questions = squad.questions_of(generate.corpus("pretrain"), "generated corpus")
    windows = squad.make_windows(questions, squad.load_tokenizer(folder), 384, 128)
    train.fit(model.to(train.DEVICE), windows, 0, args, 3, "pretrain", io.StringIO())
    model.half().save_pretrained(folder)              # half precision: 2 MB
