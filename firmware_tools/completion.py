"""`aiflow completion`: prints the script that a shell needs to complete commands, options and names of files.

The script holds the words themselves, so that a key press starts no Python, which takes seconds on a board.
"""

import argparse
from pathlib import Path

EPILOG = """\
bash:   aiflow completion bash >/usr/share/bash-completion/completions/aiflow
zsh:    aiflow completion zsh >/usr/share/zsh/vendor-completions/_aiflow
fish:   aiflow completion fish >/usr/share/fish/vendor_completions.d/aiflow.fish
Without root, in this shell alone:   eval "$(aiflow completion bash)"
"""
FILES = ("FILE", "DIR")  # metavars of arguments that are paths, and are checked before they become one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def run(args: argparse.Namespace) -> None:
    import shtab

    from firmware_tools.cli import whole_parser

    parser = whole_parser()
    _complete_files(parser, shtab.FILE)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    for action in parser._actions:  # argparse has no public list; shtab reads this one, too
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _complete_files(subparser, files)
        elif action.type is Path or action.metavar in FILES:
            action.complete = files  # type: ignore[attr-defined]
