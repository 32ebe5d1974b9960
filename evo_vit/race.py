"""By which way a CPU computes the models' linear maps the fastest: measured once, and kept from run to run.

On some processors the library behind PyTorch's float32 matrix products uses older instructions than the one behind its
convolutions; on others, or with one thread, it is the other way round.
"""
import json
import os
import platform
import time
import zlib
from typing import Dict, NamedTuple

import torch
from torch import nn

from .compat import TORCH

VARIABLE = "EVO_VIT_LINEAR"  # names the way, without a measurement
WAYS = ("matmul", "convolution")
_ROWS, _IN, _OUT = 3136, 256, 512  # 16 images of 14 x 14 tokens, on their way into an MLP
_TRIES = 8
# So much faster a convolution has to be: it writes two rearrangements more, and its backward pass gains less (where the
# two were equal forwards, a training step took 1.33 times as long). Beside other work the rates are within a sixth.
_MARGIN = 1.3

if os.environ.get(VARIABLE, "") not in ("",) + WAYS:
    raise ImportError("{}={}: set it to {}".format(VARIABLE, os.environ[VARIABLE], " or ".join(WAYS)))

# --- torch before 2.4 cannot be asked whether a CPU computes under autocast (ops.linear)
HAS_BOTH = TORCH >= (2, 4) and torch.backends.mkldnn.is_available()

_found = {}  # what was measured in this process: {threads: Choice}


class Choice(NamedTuple):
    """The way that is taken, and the rate of each where it was measured, in GFLOP/s."""
    way: str
    rates: Dict[str, float] = {}

    def __str__(self):
        if not self.rates:
            return "by {} ({})".format(self.way, VARIABLE if HAS_BOTH else "this PyTorch has no other way")
        others = ", ".join("{} {:.0f}".format(way, self.rates[way]) for way in WAYS if way != self.way)
        return "by {} ({:.0f} GFLOP/s; {})".format(self.way, self.rates[self.way], others)


def matmul(x, weight, bias=None):
    """torch.nn.functional.linear, (..., C_in) -> (..., C_out)."""
    return nn.functional.linear(x, weight, bias)


def convolution(x, weight, bias=None):
    """The same as a 1x1 convolution, channels last."""
    rows = x.reshape(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)  # (1, C_in, rows, 1)
    y = nn.functional.conv2d(rows, weight[:, :, None, None], bias)
    return y.permute(0, 2, 3, 1).reshape(x.shape[:-1] + weight.shape[:1])


def choose_linear() -> Choice:
    """The Choice for float32 on this CPU with as many threads as PyTorch has now."""
    if not HAS_BOTH:
        return Choice("matmul")
    if os.environ.get(VARIABLE):
        return Choice(os.environ[VARIABLE])
    threads = torch.get_num_threads()
    if threads not in _found:
        rates = _kept(threads) or _race(threads)
        fast = rates["convolution"] > _MARGIN * rates["matmul"]
        _found[threads] = Choice("convolution" if fast else "matmul", rates)
    return _found[threads]


@torch.no_grad()
def _race(threads):
    """{way: GFLOP/s}; each has its turn _TRIES times after a first one, and the best of them counts."""
    x, weight = (torch.ones(size, dtype=torch.float32, device="cpu") for size in ((_ROWS, _IN), (_OUT, _IN)))
    if type(x) is not torch.Tensor:  # a stand-in that computes nothing
        return {way: 1.0 for way in WAYS}
    seconds = {way: float("inf") for way in WAYS}
    for _ in range(_TRIES + 1):
        for way, function in zip(WAYS, (matmul, convolution)):
            begin = time.perf_counter()
            function(x, weight)
            seconds[way] = min(seconds[way], time.perf_counter() - begin)
    rates = {way: 2e-9 * _ROWS * _IN * _OUT / taken for way, taken in seconds.items()}
    return _keep(threads, rates)


def processor() -> str:
    """What processor this is: "AMD EPYC, family 25, model 1", or as much as is known."""
    try:
        with open("/proc/cpuinfo") as f:
            about = dict(reversed([[word.strip() for word in line.split(":", 1)] for line in f if ":" in line]))
        return "{model name}, family {cpu family}, model {model}".format(**about)
    except (OSError, KeyError):  # another system, or another make
        return platform.processor() or platform.machine()


def _file(threads):
    key = "{}, {} threads, torch {}".format(processor(), threads, torch.__version__)
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser(os.path.join("~", ".cache"))
    return os.path.join(folder, "evo_vit", "linear-{:08x}.json".format(zlib.crc32(key.encode())))


def _kept(threads):
    """The rates that a process has kept, None where none has."""
    try:
        with open(_file(threads)) as f:
            rates = json.load(f)
        return {way: float(rates[way]) for way in WAYS}
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _keep(threads, rates):
    """Keeps `rates` and returns them, or what another process has kept meanwhile: all runs on a machine go the same
    way, bit for bit. Where nothing can be kept, each process measures."""
    path = _file(threads)
    partial = "{}.{}".format(path, os.getpid())
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(partial, "w") as f:
            json.dump(dict(rates, machine=processor(), threads=threads, torch=torch.__version__), f, indent=1)
        try:
            os.link(partial, path)  # fails where there is one
        except FileExistsError:
            if _kept(threads) is None:  # damaged
                os.replace(partial, path)
        if os.path.exists(partial):
            os.remove(partial)
    except OSError:
        return rates
    return _kept(threads) or rates
