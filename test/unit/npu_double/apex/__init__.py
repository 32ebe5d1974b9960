"""Stands in for Ascend's apex in tests: apex.amp and apex.optimizers by their documented contract, calls recorded."""
from . import amp, optimizers  # noqa: F401
