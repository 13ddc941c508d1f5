"""Download SQuAD and a Hugging Face checkpoint into data/.

    python data/download.py                       # SQuAD v1.1 and bert-base-uncased
    python data/download.py --version 2.0 --model bert-large-uncased

Every file is checked before it gets its name, so that none is there in part. Files that are there
already stay as they are.
"""
import argparse
import shutil
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
from model import read_json, read_safetensors, whole_file  # noqa: E402

CHECKPOINT = "config.json vocab.txt tokenizer_config.json tokenizer.json model.safetensors".split()


def fetch(url: str, path: Path):
    """Download one file: whole and readable, or not at all. Raises OSError, ValueError."""
    if path.exists():
        return
    with urlopen(url, timeout=60) as response, whole_file(path) as file:
        size = int(response.headers.get("Content-Length", -1))
        with tqdm.wrapattr(file, "write", size, desc=path.name, disable=None) as stream:
            shutil.copyfileobj(response, stream)
        if size not in (-1, file.tell()):
            raise ValueError(f"{file.tell()} of {size} bytes came")
        file.flush()
        if path.suffix == ".json":
            read_json(file.name)
        elif path.suffix == ".safetensors":
            read_safetensors(file.name)
    print(path)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--version", default="1.1", choices=("1.1", "2.0"), help="SQuAD's version")
    add("--model", default="bert-base-uncased", help="a checkpoint of the BERT family")
    add("--folder", type=Path, default=DATA, help="where to put the files")
    add("--squad-url", default="https://rajpurkar.github.io/SQuAD-explorer/dataset", help="SQuAD")
    add("--model-url", default="https://huggingface.co", help="checkpoints")
    args = parser.parse_args(argv)
    folder = args.folder / args.model.rpartition("/")[2]
    files = [(f"{args.squad_url}/{name}", args.folder / name)
             for name in (f"train-v{args.version}.json", f"dev-v{args.version}.json")]
    files += [(f"{args.model_url}/{args.model}/resolve/main/{name}", folder / name)
              for name in CHECKPOINT]
    for url, path in files:
        try:
            fetch(url, path)
        except (OSError, ValueError, HTTPException) as error:
            if getattr(error, "code", None) != 404 or not path.name.startswith("tokenizer"):
                print(f"download.py: {url}: {error}; try again", file=sys.stderr)
                sys.exit(2)


if __name__ == "__main__":
    main()
