"""Files on a web server, whole or by ranges of bytes, over a connection that each process keeps."""
import os
from urllib.parse import quote

from ..errors import RunFailed, UserError

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry
except ImportError:  # only --data-path URL needs it
    requests = None

TRIES = 5  # of each request; the waits between them double from a second on
TIMEOUT = 60.0  # seconds without an answer
_sessions = {}  # process number: its Session; a forked process must not write into its parent's connection


def is_url(path: str) -> bool:
    """Whether `path` names a file or folder on a web server."""
    return path.startswith(("http://", "https://"))


def need_requests():
    """Raises UserError where the library is missing."""
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
    try:
        return _session().request(method, quote(url, safe="%/:=&?~#+!$,;'@()*[]"), timeout=TIMEOUT,
                                  headers=dict({"Accept-Encoding": "identity"}, **headers))
    except requests.RequestException as error:
        reason = str(error).split("\n")[0][:200]
        raise RunFailed("--data-path: {} cannot be read ({}: {})".format(url, type(error).__name__, reason))


def read_file(url: str) -> bytes:
    """The whole file; None where the server has none. Raises RunFailed for any other answer, and for none."""
    response = _ask("GET", url)
    if response.status_code in (404, 410):
        return None
    if response.status_code != 200:
        raise RunFailed("--data-path: {} cannot be read (the server answers {} {})".format(
            url, response.status_code, response.reason))
    return response.content


def file_size(url: str) -> int:
    """Bytes of the file; None where the server has none or does not say. Raises RunFailed where no answer comes."""
    response = _ask("HEAD", url)
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status_code == 200 and length.isdigit() else None


def read_range(url: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file from `offset` on. Raises RunFailed: that no server answers is no damage of a picture,
    and must not put another one in its place."""
    response = _ask("GET", url, Range="bytes={}-{}".format(offset, offset + size - 1))
    if response.status_code == 200:
        raise RunFailed("--data-path: the server of {} gives no parts of files (ranges of bytes); main.py needs "
                        "one that does".format(url))
    if response.status_code != 206 or len(response.content) != size:
        raise RunFailed("--data-path: {} cannot be read from byte {:,} on (the answer is {} {}, {:,} bytes of {:,})"
                        .format(url, offset, response.status_code, response.reason, len(response.content), size))
    return response.content
