"""What all commands have in common: the parser, one sentence for a mistake, and one way to end (errors.py)."""
import argparse
import importlib
import math
import os
import sys
import time

LAUNCHER = os.getppid()  # before the imports, which take seconds, and in which a launcher can end

for _stream in (sys.stdout, sys.stderr):
    if hasattr(_stream, "reconfigure"):
        _stream.reconfigure(errors="backslashreplace")  # file and class names need not be UTF-8



def _say_interrupted(kind, error, traceback):
    """Ends a command that Ctrl-C has reached outside of `run`, mostly in its imports, as `run` does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    print("Interrupted", file=sys.stderr, flush=True)
    os._exit(130)  # Python itself would end with another code


sys.excepthook = _say_interrupted

try:
    import evo_vit  # noqa: F401  (registers the models; before anything that imports torchvision)
except ImportError as error:  # packages that do not fit together
    print("error: {}".format(error), file=sys.stderr)
    sys.exit(2)

from .errors import Ending, UserError  # noqa: E402
from .machine.compiling import can_compile  # noqa: E402
from .machine.processes import close_processes, complain, environment_rank, lost  # noqa: E402


class Parser(argparse.ArgumentParser):
    """One sentence on standard error and exit code 2 for a wrong flag. `--help` shows each flag's default unless its
    text says what happens without it."""

    def __init__(self, **options):
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        print("error: {}; {} --help lists the flags".format(message, self.prog), file=sys.stderr)
        sys.exit(2)


class _Formatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        text = action.help or ""
        if isinstance(action, argparse._StoreTrueAction) and "(default" not in text:
            return text + " (default: {})".format("on" if action.default else "off")
        shown = action.default not in (None, "", [], argparse.SUPPRESS) and not isinstance(action.default, bool)
        return text + " (default: %(default)s)" if shown and "(default" not in text else text


class _RawFormatter(_Formatter, argparse.RawDescriptionHelpFormatter):
    """For a description whose lines stay as they are."""


RAW_DESCRIPTION = {"formatter_class": _RawFormatter}


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("{} is not a positive whole number".format(text))
    return int(text)


def count(text: str) -> int:
    """A whole number from 0 up, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("{} is not a whole number from 0 up".format(text))
    return int(text)


def _number(text, fits, what):
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError("invalid float value: {!r}".format(text))
    if not math.isfinite(value) or not fits(value):
        raise argparse.ArgumentTypeError("{} is not {}".format(text, what))
    return value


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    return _number(text, lambda value: 0 <= value <= 1, "a share from 0 to 1")


def share_below_1(text: str) -> float:
    """A number from 0 to less than 1, for argparse."""
    return _number(text, lambda value: 0 <= value < 1, "a share from 0 to less than 1")


def at_least_0(text: str) -> float:
    """A number from 0 up, for argparse."""
    return _number(text, lambda value: value >= 0, "a number from 0 up")


def above_0(text: str) -> float:
    """A number above 0, for argparse."""
    return _number(text, lambda value: value > 0, "a number above 0")


def seed(text: str) -> int:
    """A seed that every generator takes, for argparse: a whole number of 32 bits."""
    if not text.isdecimal() or int(text) >= 2 ** 32:
        raise argparse.ArgumentTypeError("{} is not a whole number from 0 to 4294967295".format(text))
    return int(text)


def path(text: str) -> str:
    """A path, for argparse: a leading ~ is the user's home folder also where the shell has not replaced it."""
    return os.path.expanduser(text)


def need(what: str, *packages: str):
    """Raises UserError with the one pip command unless the `packages`, as pip and Python name them, can be imported."""
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError:
        raise UserError("{} needs {}; pip install {}".format(what, " and ".join(packages), " ".join(packages)))


def need_compiler(what: str):
    """Raises UserError where this PyTorch cannot compile the models."""
    if not can_compile():
        raise UserError("{} needs PyTorch 2.1 or newer".format(what))


LOST = "another process of the run does not answer; it has ended, is cut off, or was late by --dist-timeout; its own " \
    "messages say why"


def run(command, args, failing=""):
    """command(args); returns what it returns. An Ending becomes one sentence, after `failing` where the run failed, and
    its exit code."""
    try:
        return command(args)
    except UserError as error:
        _say_error("error: {}".format(error))
        sys.exit(error.exit_code)
    except Ending as ending:
        # of what a data loader's worker raised, the last line is the sentence; before it stands its traceback
        sentence = str(ending).strip().split("\n")[-1]
        if ending.exit_code:
            _say_error("error: {}{}".format(failing, sentence), ending.on_every_process)
        elif _is_first():
            print(sentence, flush=True)
        sys.exit(ending.exit_code)
    except RuntimeError as error:
        if not lost(error):
            raise
        _say_error("error: {}{} ({})".format(failing, LOST, str(error).strip().split("\n")[0][:200]))
        sys.exit(1)
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:  # training itself stops by way of Signals
        if _is_first():
            print("Interrupted", file=sys.stderr)
        sys.exit(130)
    finally:
        close_processes()  # after the sentence: the others fail as soon as this one leaves


def _is_first():
    return environment_rank() == 0


def _say_error(text, on_every_process=False):
    """Prints `text` on standard error. As a rule all processes of a run meet the same error, and the launcher ends with
    the first of them, most launchers with all others; so another one speaks only if both are still there ten seconds
    later."""
    if not _is_first() and not on_every_process:
        time.sleep(10)
        if os.getppid() != LAUNCHER:
            return
        complain(text)
        return
    print(text, file=sys.stderr, flush=True)
