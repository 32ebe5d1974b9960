"""What the commands have in common: one sentence for a mistake, for a missing package, for packages that do not fit."""
import argparse
import importlib
import sys

try:
    from evo_vit import compat  # registers the models; before anything that imports torchvision
except ImportError as error:  # packages that do not fit together
    print("error: {}".format(error), file=sys.stderr)
    sys.exit(2)

from .checkpoint import SaveFailed
from .errors import UserError


class Parser(argparse.ArgumentParser):
    """One sentence on standard error and exit code 2 for a wrong flag."""

    def error(self, message):
        print("error: {}; {} --help lists the flags".format(message, self.prog), file=sys.stderr)
        sys.exit(2)


def positive(text):
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("{} is not a positive whole number".format(text))
    return int(text)


def need(what, *packages):
    """Raises UserError with the one pip command unless the `packages`, as pip and Python name them, can be imported."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        raise UserError("{} needs {}; pip install {}".format(what, " and ".join(packages), " ".join(packages)))


def need_compiler(what):
    """Raises UserError where this PyTorch cannot do what `compat.compile_module` asks for."""
    if not compat.can_compile():
        raise UserError("{} needs PyTorch 2.2 or newer".format(what))


def run(tool, args):
    """tool(args), with a user's mistake as one sentence and exit code 2, and a file that cannot be written as 1."""
    try:
        tool(args)
    except UserError as error:
        print("error: {}".format(error), file=sys.stderr)
        sys.exit(2)
    except SaveFailed as error:
        print("error: {}".format(error), file=sys.stderr)
        sys.exit(1)
