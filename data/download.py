"""Download SQuAD or a task of GLUE, and a Hugging Face checkpoint, into data/.

    python data/download.py                       # SQuAD v1.1 and bert-base-uncased
    python data/download.py --version 2.0 --model bert-large-uncased
    python data/download.py --glue SST-2          # data/SST-2/train.tsv and dev.tsv

One idea: a file gets its name when it is whole. What is there is not downloaded again. A model's
folder has the last part of the model's name. If another model lies there, remove its folder first.
"""
import argparse
import shutil
import socket
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlretrieve

from tqdm import tqdm

DATA = Path(__file__).resolve().parent
CHECKPOINT = ("config.json", "tokenizer_config.json", "tokenizer.json", "vocab.txt",
              "model.safetensors")
SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
HUB = "https://huggingface.co"


def fetch(url, path, optional=False):
    """Download one file: whole, or not at all. One that is optional may be absent there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.partial")
    try:
        with tqdm(desc=path.name, unit="B", unit_scale=True, disable=None) as bar:
            urlretrieve(url, part, lambda number, size, total: bar.update(size))
        if path.suffix == ".zip":
            shutil.unpack_archive(part, DATA, "zip")
        part.replace(path)
    except (OSError, HTTPException) as error:
        if not optional or getattr(error, "code", 0) != 404:
            print(f"download.py: {url}: {error}; try again", file=sys.stderr)
            sys.exit(2)
    finally:
        part.unlink(missing_ok=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--version", default="1.1", choices=("1.1", "2.0"), help="SQuAD's (default: 1.1)")
    add("--glue", choices=("SST-2", "QQP-clean", "MNLI"), help="instead of SQuAD")
    add("--model", default="bert-base-uncased", help="default: bert-base-uncased")
    args = parser.parse_args(argv)
    socket.setdefaulttimeout(60)
    url = f"{HUB}/{args.model}/resolve/main"
    folder = DATA / Path(args.model).name
    for name in CHECKPOINT:
        fetch(f"{url}/{name}", folder / name, optional=name != "config.json")
    if not (folder / "model.safetensors").exists():
        fetch(f"{url}/pytorch_model.bin", folder / "pytorch_model.bin")
    if args.glue:
        path = DATA / f"{args.glue}.zip"
        fetch(f"{GLUE}/{path.name}", path)
        return
    for split in ("train", "dev"):
        name = f"{split}-v{args.version}.json"
        fetch(f"{SQUAD}/{name}", DATA / name)


if __name__ == "__main__":
    main()
