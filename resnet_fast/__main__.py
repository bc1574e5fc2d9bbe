"""The command line: ``resnet-fast``, or ``python -m resnet_fast``.

Exit status: 0 done; 1 the numbers are wrong (``bench``, ``verify``: not torch's); 2 the command line, or
what it names, is wrong; 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import ClassVar, NoReturn

import resnet_fast

from .commands import COMMANDS, CommandError, did_you_mean

__all__ = ["main"]

_EXAMPLES = """\
examples:
  resnet-fast info                                 what is installed, and which kernels can run here
  resnet-fast bench                                ResNet-50: equality, then speed against torch's eager and compile
  resnet-fast bench --model timm:resnet34 --batch 1,8 --dtype bfloat16
  resnet-fast models                               which models are fused, and what of them is left
  resnet-fast bench --model mypkg.nets:make --images photos/ --mode training
  resnet-fast verify                               errors of every layer beside torch's own, hard inputs, loss curves
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with a suggestion for a mistyped sub-command or option."""

    options: ClassVar[dict[str, list[str]]] = {}  #: Of each sub-command.
    typed: Sequence[str] = ()  #: The command line.

    def error(self, message: str) -> NoReturn:
        if "invalid choice: " in message:
            typed = message.partition("invalid choice: ")[2].partition(" ")[0].strip("'")
            message += did_you_mean(typed, COMMANDS)
        if message.startswith("unrecognized arguments: "):
            typed = message.partition(": ")[2].partition(" ")[0].partition("=")[0]
            command = next((word for word in self.typed if word in self.options), "")
            message += did_you_mean(typed, self.options.get(command, ()))
        super().error(message)


def parser() -> _Parser:
    """The whole command line; each module of ``resnet_fast.commands`` adds its own part."""
    top = _Parser(
        prog="resnet-fast",
        description="Fused convolution + batch norm + ReLU (+ residual) for ResNets in PyTorch.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"resnet_fast {resnet_fast.__version__}")
    commands = top.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        module = importlib.import_module(f"resnet_fast.commands.{name}")
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.DESCRIPTION,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
        top.options[name] = list(sub._option_string_actions)
        sub.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. ``argv`` without the program's name; None: the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        top = parser()
        top.typed = arguments
        args = top.parse_args(arguments)
        args.argv = arguments
        return int(args.run(args))
    except SystemExit as exit_:  # argparse: --help, --version, a usage error
        return exit_.code if isinstance(exit_.code, int) else 2
    except CommandError as error:
        print(f"resnet-fast: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("resnet-fast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `resnet-fast info | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
