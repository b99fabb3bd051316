"""``kdpo export``: a file of edits as a PEFT adapter, or the whole edited model."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Writes a file of edits as what others load: a LoRA adapter for PEFT (adapter_config.json and adapter_model.safetensors),
or the whole model with the edits.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to write, of which edits."""
    parser.add_argument("edits", type=Path, metavar="EDITS", help="a file of edits")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="write an adapter: a folder that is not there, or is empty")
    parser.add_argument("--merge", type=Path, metavar="DIR", help="write the whole model: likewise")
    parser.add_argument(
        "--rank", type=int, metavar="R", help="of the adapter (default: the smallest that loses at most 1e-4 of the change)"
    )
    parser.add_argument("--model", metavar="NAME", help="the unedited model (default: the folder that the edits were made on)")
    parser.add_argument(
        "--cast", action="store_true", help="make edits of a float32 model on its copy in bfloat16 or float16, with --merge"
    )


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Write it, and say what is lost."""
    if not options.lora and not options.merge:
        parser.error("name what to write: --lora DIR, --merge DIR or both")
    if options.rank is not None and not options.lora:
        parser.error("--rank is of an adapter, which needs --lora")
    if options.cast and options.lora:
        parser.error("--cast is for --merge; an adapter of float32 edits fits the model's copies as it is")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from ..edits import read_header
    from ..edits.adapter import adapter_of, lost_edits, save_merged
    from ..edits.base import load_base, says

    model, tok = load_base(options.edits, as_loaded(options.model), options.cast)
    if options.lora:
        adapter = adapter_of(model, options.edits, options.rank)
        lost, never = lost_edits(model, tok, options.edits, adapter)
        adapter.save(options.lora, str(model.config.name_or_path))
        size = (options.lora / "adapter_model.safetensors").stat().st_size
        print(f"{options.lora}: rank {adapter.rank}, {size / 1e6:.2f} MB, {adapter.error:.2e} of the change is lost")
        for what, requests in (("is lost", lost), ("is not said by the edited model either", never)):
            for request in requests:
                print(f"  {what}: {request['prompt']!r} → {request['target_new']!r}")
    if options.merge:
        save_merged(model, tok, options.edits, options.merge, options.cast)
        print(f"{options.merge}: the whole model, {str(model.dtype).removeprefix('torch.')}")
        for request in read_header(options.edits)["requests"]:
            if not says(model, tok, request):
                print(f"  is not said: {request['prompt']!r} → {request['target_new']!r}")
    return 0


def as_loaded(name: str | None) -> str | None:
    """A model's name as ``from_pretrained`` takes it: of one that comes as a package or a GGUF file, its folder.

    Raises:
        ModelError: there is no such file, or it cannot be read.
    """
    from ..models.packed import is_packed, model_folder

    return str(model_folder(name)) if name and is_packed(name) else name
