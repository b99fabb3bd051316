"""``kdpo SUBCOMMAND``, and ``python run_kdpo.py`` with or without one."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

SUBCOMMANDS = {
    "compare": "methods × edits → tables and a report; also what is done where no subcommand is named",
    "edit": "one edit by hand, shown before and after",
    "apply": "a list of edits, each kept only where a condition holds after it",
    "export": "a file of edits as a PEFT adapter, or as the whole edited model",
    "edits": "what a file of edits holds; one edit taken out of it",
    "sweep": "methods × models × data × seeds × orders, from one YAML",
    "report": "runs side by side, as one page",
    "tune": "settings for methods, chosen on development edits, with the same number of trials for each",
    "statistics": "the second moments that KDPO+C, ROME and MEMIT go by, from a text",
    "benchmark": "what an edit costs",
    "build-world": "the world that comes with the package, made again",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, or what a subcommand says; 2 where something given is wrong, 130 where Ctrl-C stopped it, 1 where
        nobody reads its output any more.
    """
    # What the package warns of reaches the console, also while EasyEdit's output goes into the run's folder.
    log = logging.getLogger("kdpo_easyedit")
    if not log.handlers:
        log.addHandler(logging.StreamHandler(sys.__stderr__))
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments.pop(0) if arguments[:1] and arguments[0] in SUBCOMMANDS else "compare"
    if name != "benchmark":  # which measures what torch does by itself
        # Threads that spin while they wait stall one another as soon as anything else runs on the machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    subcommand = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    program = Path(sys.argv[0]).name
    parser = argparse.ArgumentParser(
        prog=f"{program} {name}" if name != "compare" else program,
        description=subcommand.DESCRIPTION,
        epilog=(_SUBCOMMANDS_HELP + subcommand.EXAMPLES) if name == "compare" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommand.add_arguments(parser)
    options = parser.parse_args(arguments)
    if getattr(options, "easyedit_dir", None):
        os.environ["EASYEDIT_HOME"] = options.easyedit_dir
    try:
        status: int = subcommand.run(options, parser)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whatever reads the output, as head does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1  # as rich has it
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if type(error).__module__.partition(".")[0] == "kdpo_easyedit" or isinstance(error, ImportError):
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.filename is not None:
            print(f"{program}: {error.filename}: {error.strerror}", file=sys.stderr)
            return 2
        raise


_SUBCOMMANDS_HELP = "subcommands, each with --help:\n" + "".join(f"  {name:<12}{what}\n" for name, what in SUBCOMMANDS.items())
_SUBCOMMANDS_HELP += "\n"
