"""Files on a web server, whole or by ranges of bytes, over a connection that each process keeps."""
import os
import re
import tarfile
import time
from typing import Optional
from urllib.parse import quote, urlsplit

from ..errors import RunFailed, UserError

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import ReadTimeoutError
    from urllib3.util.retry import Retry
except ImportError:  # only --data-path URL needs it
    requests = None

TRIES = 5  # of each request; the waits between them double from a second on
TIMEOUT = 60.0  # seconds without an answer
_sessions = {}  # process number: its Session; a forked process must not write into its parent's connection


def is_url(path: str) -> bool:
    """Whether `path` is an address, of whatever kind, and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


def check_url(url: str):
    """Raises UserError for an address that cannot be one of shards, and where the library for it is missing."""
    try:
        parts = urlsplit(url)
        host, name, _ = parts.hostname, parts.username, parts.port
    except ValueError as error:
        raise UserError("--data-path: {} is no address ({})".format(url, error))
    if parts.scheme.lower() not in ("http", "https"):
        raise UserError("--data-path: of {} only http:// and https:// addresses are read".format(url))
    if not host:
        raise UserError("--data-path: {} names no server".format(url))
    if name is not None:
        raise UserError("--data-path: leave name and password out of the address, which is written to logs and "
                        "checkpoints; they belong into ~/.netrc")
    if parts.query or parts.fragment:
        raise UserError("--data-path: {} is the address of one file; give a folder's, without ? and #".format(url))
    if requests is None:
        raise UserError("--data-path URL needs requests; pip install requests")


def _session():
    if os.getpid() not in _sessions:
        _sessions.clear()
        session = requests.Session()
        retry = Retry(total=TRIES - 1, backoff_factor=0.5, status_forcelist=(429, 500, 502, 503, 504),
                      raise_on_status=False)
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        _sessions[os.getpid()] = session
    return _sessions[os.getpid()]


def _ask(method, url, **headers):
    """The response, with its content as the server has it. Raises RunFailed where none comes."""
    for left in range(TRIES - 1, -1, -1):
        try:
            response = _session().request(method, quote(url, safe="%/:=&?~#+!$,;'@()*[]"), timeout=TIMEOUT,
                                          headers=dict({"Accept-Encoding": "identity"}, **headers))
            promised = response.headers.get("Content-Length", "")
            # old versions of urllib3 do not mind
            if method == "GET" and promised.isdigit() and len(response.content) < int(promised):
                raise requests.exceptions.ChunkedEncodingError("the answer breaks off")
            return response
        except (requests.exceptions.ChunkedEncodingError, requests.exceptions.ConnectionError) as error:
            # Retry leaves alone what happens inside an answer's body
            inside = isinstance(error, requests.exceptions.ChunkedEncodingError) or \
                error.args and isinstance(error.args[0], ReadTimeoutError)
            if not left or not inside:
                raise _unread(url, error)
            time.sleep(0.5 * (TRIES - left))
        except requests.RequestException as error:
            raise _unread(url, error)


def _unread(url, error):
    return RunFailed("--data-path: {} cannot be read ({})".format(url, _reason(error)))


def _reason(error):
    """The innermost of an error's causes, without the objects that it names."""
    cause = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    cause = getattr(cause, "reason", None) or cause
    return str(cause).split("\n")[0].split("): ", 1)[-1][:200]


def read_file(url: str) -> Optional[bytes]:
    """The whole file; None where the server has none. Raises RunFailed for any other answer, and for none."""
    response = _ask("GET", url)
    if response.status_code in (404, 410):
        return None
    if response.status_code != 200:
        raise RunFailed("--data-path: {} cannot be read (the server answers {} {})".format(
            url, response.status_code, response.reason))
    return response.content


def file_size(url: str) -> Optional[int]:
    """Bytes of the file; None where the server has none or does not say. Raises RunFailed where no answer comes."""
    response = _ask("HEAD", url)
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status_code == 200 and length.isdigit() else None


def read_member(url: str, offset: int, size: int, path: str) -> bytes:
    """The file of `size` bytes at `offset` in the archive `url`, which messages call `path`. Its header, just before
    it, has to be that of the file that the index means: another archive can be as long.

    Raises RunFailed: that no server answers, or that it has something else now, is no damage of a picture, and must not
    put another one in its place.
    """
    content = _read_range(url, offset - tarfile.BLOCKSIZE, size + tarfile.BLOCKSIZE)
    try:
        header = tarfile.TarInfo.frombuf(content[:tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        name = os.path.normpath(header.name)
        # longer names, and in some archives others than ASCII's, stand elsewhere
        named = len(name) < 100 and "?" not in name
        same = header.size == size and (not named or os.path.normpath(path).endswith("/" + name))
    except tarfile.HeaderError:
        same = False
    if not same:
        raise RunFailed("--data-path: {} is not at its place on the server; the shard is another one than its index "
                        "was made from; upload both again".format(path))
    return content[tarfile.BLOCKSIZE:]


def _read_range(url, offset, size):
    response = _ask("GET", url, Range="bytes={}-{}".format(offset, offset + size - 1))
    if response.status_code == 200:
        raise RunFailed("--data-path: the server of {} gives no parts of files (ranges of bytes); main.py needs "
                        "one that does".format(url))
    first = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status_code != 206 or len(response.content) != size or first is None or int(first.group(1)) != offset:
        raise RunFailed("--data-path: {} cannot be read from byte {:,} on (the answer is {} {}, {:,} bytes of {:,})"
                        .format(url, offset, response.status_code, response.reason, len(response.content), size))
    return response.content
