"""What a run says on its screen."""
import os
import sys


def say(text: str):
    """Prints `text`. Where nobody reads any more (`| head`), a run goes on in silence: its files are what counts."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
