"""Files that are written whole or not at all."""
import json
import os
import shutil
from typing import Callable

from ..errors import SaveFailed


def write_whole(path: str, write: Callable):
    """`write(file)` beside `path`, flushed to disk, then renamed there. Raises SaveFailed, with nothing left behind."""
    partial = path + ".partial"
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if os.path.exists(partial):
            os.remove(partial)
        folder, reason = os.path.dirname(os.path.abspath(path)), error.strerror or error
        if os.path.isdir(folder):
            reason = "{}; {:,} MiB left on its disk".format(reason, shutil.disk_usage(folder).free >> 20)
        raise SaveFailed("{} could not be written ({}); what was saved before it is whole".format(path, reason))


def write_text(path: str, text: str):
    """`text` as the file `path`, whole or not at all; what UTF-8 cannot write is escaped. Raises SaveFailed."""
    write_whole(path, lambda f: f.write(text.encode("utf-8", "backslashreplace")))


def write_json(path: str, values: dict, **options):
    """`values` as the JSON file `path`, whole or not at all. Raises SaveFailed."""
    write_text(path, json.dumps(values, indent=1, **options) + "\n")
