"""Makes the edits of real facts, asks the model again for all that they claim, or keeps those that another model knows: see the
package's documentation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from ... import files
from ...models.packed import ModelError, is_packed, model_folder
from . import FILES, FOLDER, MODEL, check, keep, load_known, make, write

SIZES = {"development": 150, "reported": 330}
#: The unrelated text before a rephrasing may well change what the model says; nothing is claimed of it.
CLAIMED = ("edit", "new answer", "locality", "portability")
#: Processors round differently, and near ties fall either way.
ENOUGH = 0.97


def main() -> int:
    """The command. Returns its exit status: 1 where the model no longer says what the files claim."""
    parser = argparse.ArgumentParser(prog="python -m kdpo_easyedit.bench.facts", description=__doc__)
    parser.add_argument("command", choices=("make", "check", "keep"))
    parser.add_argument("--model", default=MODEL, help="a known name, a .gguf, or a folder (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=FOLDER, help="where the two files are, or are to be (default: the package's own)"
    )
    args = parser.parse_args()
    if args.folder == FOLDER and (args.command == "keep" or (args.command == "make" and args.model != MODEL)):
        parser.error(f"the package's own edits are of {MODEL}; name a folder for those of {args.model} with --folder")
    paths = {split: args.folder / file.name for split, file in FILES.items()}

    try:
        folder = model_folder(args.model) if is_packed(args.model) else args.model
    except ModelError as error:
        parser.error(str(error))
    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).to(args.device).eval()

    def ask(prompts: Iterable[str]) -> dict[str, str]:
        with tqdm(desc="prompts", unit="") as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return write(model, tok, prompts, progress=progress)

    if args.command != "check":
        args.folder.mkdir(parents=True, exist_ok=True)
        if args.command == "make":
            made = make(*load_known(), ask, SIZES)
        else:
            made = {split: keep(json.loads(file.read_text(encoding="utf-8")), ask) for split, file in FILES.items()}
        for split, records in made.items():
            with files.whole(paths[split]) as path:
                path.write_text(json.dumps(records, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
            print(f"{paths[split]}: {len(records)} edits")
        return 0
    good = True
    for path in paths.values():
        for kind, (said, total) in check(json.loads(path.read_text(encoding="utf-8")), ask).items():
            if total:  # of a model that knows little, a file may have no question of a kind
                print(f"{path.name}: {kind}: {said} of {total} ({said / total:.1%})")
                good &= kind not in CLAIMED or said >= ENOUGH * total
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
