"""``kdpo edit`` without a prompt: it asks, edit after edit, and lets one undo, redo and save."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from ..bench.by_hand import Session, goes_by_subject
from ..bench.datasets import DatasetError
from ..easyedit.host import HostError
from ..edits import EditsError
from ..method.asking import ContextError
from ..method.kdpo import EditFailed
from ..report.by_hand import print_side_by_side

if TYPE_CHECKING:
    from ..bench.datasets import Request

with contextlib.suppress(ImportError):  # arrow keys and a history, where the system has them
    import readline  # noqa: F401

_HELP = """\
A prompt begins an edit; these do something else:
  undo         take the last edit back
  redo         make it again
  list         the edits that the model has
  save FILE    keep them as a file
  quit         (or Ctrl-D)
"""


def interact(session: Session, context: str, save_edits: Path | None, console: Console) -> None:
    """Ask for edits and make them, until one quits.

    Args:
        session: with the model.
        context: how prompts are put to it, one of :data:`kdpo_easyedit.method.asking.CONTEXTS`.
        save_edits: where ``save`` keeps the edits, when it names no file.
        console: to print to.
    """
    console.print(_HELP)
    while True:
        try:
            line = input("prompt> ").strip()
        except EOFError:
            console.print()
            line = "quit"
        except KeyboardInterrupt:  # what was typed so far is dropped
            console.print()
            continue
        word, _, rest = line.partition(" ")
        try:
            match word, rest.strip():
                case "", _:
                    pass
                case "undo", "":
                    _tell("undone", session.undo(), console)
                case "redo", "":
                    _tell("made again", session.redo(), console)
                case "list", "":
                    for number, request in enumerate(session.made, 1):
                        console.print(f"{number:4}  {_shown(request)}")
                    console.print(f"{len(session.made)} edits" + ("" if session.saved else ", not saved"))
                case "save", file:
                    _save(session, Path(file).expanduser() if file else save_edits, console)
                case "quit", "":
                    if session.saved or _is_sure(session):
                        return
                case _:
                    _edit(session, line, context, console)
        except (DatasetError, HostError, EditsError, ContextError, EditFailed, OSError, ValueError) as error:
            console.print(f"{error}", style="red")
        except (KeyboardInterrupt, EOFError):
            console.print("\nstopped; list shows the edits that the model has")


def _edit(session: Session, prompt: str, context: str, console: Console) -> None:
    console.print(f"  {session.said(prompt, context) or '(nothing)'}", style="dim")
    record = {"prompt": prompt, "context": context}
    questions = [("target_new", "new answer> ")]
    if goes_by_subject(session.method):
        questions.append(("subject", "subject, as it is in the prompt> "))
    questions += [("rephrase_prompt", "the same in other words (or nothing)> ")]
    questions += [("locality_prompt", "a prompt that should stay as it is (or nothing)> ")]
    for field, question in questions:
        if answer := input(question).strip():
            record[field] = answer
        elif field == "target_new":
            console.print("no edit without a new answer")
            return
    before, after = session.edit(record)
    print_side_by_side(before, after, console)


def _save(session: Session, file: Path | None, console: Console) -> None:
    if file is None:
        console.print("name a file: save FILE")
        return
    session.save(file)
    console.print(f"{len(session.made)} edits are in {file}")


def _is_sure(session: Session) -> bool:
    try:
        answer = input(f"{len(session.made)} edits are not saved; quit all the same? (yes or no)> ")
    except EOFError:
        return True
    return answer.strip().lower() in ("y", "yes")


def _tell(what: str, request: Request | None, console: Console) -> None:
    console.print(f"{what}: {_shown(request)}" if request else f"nothing is to be {what}")


def _shown(request: Request) -> str:
    return f"{request['prompt']!r} → {request['target_new']!r}"
