"""`linerate`: dispatch only. Every command's module is imported when it is called, so help is instant."""

import importlib
import os
import sys
from pathlib import Path

# command -> (module, function, one line of help). A function takes the rest of argv, returns the exit code.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "shard": ("linerate.shards.cli", "main", "pack images into WebDataset tars; verify, inspect, preview"),
    "views": ("linerate.pipeline.cli", "main", "draw the two views of any sample, as training sees them"),
    "train": ("linerate.train.cli", "main_train", "pretrain an encoder with MoCo"),
    "sweep": ("linerate.train.sweep_cli", "main", "run an ablation of the paper, its figures beside ours"),
    "tune": ("linerate.bench.tune_cli", "main", "find the fastest switches of a recipe on this machine"),
    "eval": ("linerate.train.cli", "main_eval", "judge an encoder: knn, linear, finetune, detect"),
    "export": (
        "linerate.train.weights_cli",
        "main_export",
        "write the encoder for torchvision, timm, detectron2, ...",
    ),
    "import": ("linerate.train.weights_cli", "main_import", "make a run of an official MoCo checkpoint"),
    "features": ("linerate.train.evaluate.features_cli", "main", "write the embeddings of a set of shards"),
    "neighbours": (
        "linerate.train.evaluate.neighbours_cli",
        "main",
        "a page of images with their nearest ones",
    ),
    "bench": ("linerate.bench.cli", "main", "measure throughput; compare two records"),
    "anchors": ("linerate.train.anchors_cli", "main", "the published numbers, and which were run here"),
    "demo": (
        "linerate.bench.demo",
        "main",
        "the whole way in minutes: images, shards, views, MoCo, kNN, report",
    ),
}

# What is true of a command after Ctrl-C; of the others, that the same command starts anew.
INTERRUPTED = {
    "shard pack": "the same command continues where it stopped",
    "demo": "the same command continues where it stopped",
    "eval detect": "the same command continues from its last checkpoint, if there is one",
    "train": "the same command with --resume continues from the last checkpoint, if there is one",
    "eval linear": "the same command continues where it stopped",
    "eval finetune": "the same command continues where it stopped",
    "sweep": "the same command continues where it stopped",
    "bench run": "records that are in --out already stay there; the same command measures anew",
}


def print_help() -> None:
    from rich.console import Console
    from rich.table import Table

    from linerate import __version__

    console = Console()
    console.print(f"[bold]linerate[/] {__version__}: MoCo pretraining at the speed of the hardware\n")
    console.print("usage: linerate COMMAND [ARGS]    `linerate COMMAND --help` for one command\n")
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, (_, _, line) in COMMANDS.items():
        table.add_row(f"[bold cyan]{name}[/]", line)
    console.print(table)
    console.print("\nEvery command takes --json (machine-readable output on stdout). Exit codes: 0 done,")
    console.print("1 done but something failed a check, 2 cannot work as asked, 130 interrupted.")


def fail(message: str) -> int:
    """Print one line on stderr; the exit code of an error that the user can mend."""
    say(f"linerate: error: {' '.join(message.split())}")
    return 2


def say(line: str) -> None:
    """Print the line on stderr, unless another of torchrun's ranks on this machine has printed the same."""
    if is_first_to_say(line):
        print(line, file=sys.stderr)


def is_first_to_say(line: str) -> bool:
    """Whether no other of torchrun's ranks on this machine has said so; a rank may repeat itself.

    Eight ranks meet one error eight times; what one of them meets alone is its own to say. They leave a mark
    in the folder that torchrun makes for each start of its ranks, so none waits for another.
    """
    import hashlib

    own_folder = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parent
    rank = os.environ.get("LOCAL_RANK")
    if own_folder.name != rank:
        return True
    mark = own_folder.parent / f"linerate-{hashlib.sha256(line.encode()).hexdigest()[:16]}"
    try:
        # A link has its content from its beginning: nobody reads a mark that is half written.
        mark.symlink_to(rank)
    except FileExistsError:
        return str(mark.readlink()) == rank
    except OSError:
        return True
    return True


def let_threads_sleep() -> None:
    """Have OpenMP's threads sleep while they wait, unless the user chose; before torch is imported.

    They spin otherwise. With another process on one of two cores a step of the recipe `demo` then took 7.4 s
    instead of 0.5 s: a thread spins away the time slice that the one it waits for needs.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def after_interrupt(argv: list[str]) -> str:
    """What the user of `linerate ARGV` may count on after Ctrl-C."""
    for name, line in INTERRUPTED.items():
        if argv[: len(name.split())] == name.split():
            return line
    return "the same command starts anew"


def run_command(argv: list[str]) -> int:
    from linerate.shards.errors import UserError

    module, function, _ = COMMANDS[argv[0]]
    try:
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    except UserError as error:
        if os.environ.get("LINERATE_TRACEBACK"):
            raise
        return fail(str(error))
    except BrokenPipeError:
        # The reader of our stdout went away (`| head`): not an error, but nothing may be flushed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if os.environ.get("LINERATE_TRACEBACK"):
            raise
        return fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt:
        say(f"linerate: interrupted; {after_interrupt(argv)}")
        return 130


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print_help()
        return 0
    if argv[0] == "--version":
        from linerate import __version__

        print(f"linerate {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(COMMANDS)}"
        return fail(f"there is no command `{argv[0]}`; {hint}")
    let_threads_sleep()
    return run_command(argv)


if __name__ == "__main__":
    sys.exit(main())
