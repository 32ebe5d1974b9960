"""The tested version lines, in one table, and the combinations that were tried once by hand: what evo_vit/compat.py
checks, test/venv.sh installs and the README lists.

`python evo_vit/lines.py LINE` prints a line for the shell, without LINE the names of all; it needs nothing but Python.
"""
import sys
from collections import OrderedDict


class Line(object):
    """A row of the table. torch: what the tests install; on a server PyTorch comes from its vendor. The other versions
    are in pip's words, as in the requirements file. also: (torch, torchvision) that go with the rest as well."""

    def __init__(self, pythons, torch, torchvision, timm, pillow, numpy, requirements, also=()):
        self.pythons = pythons  # accepted interpreters, best first
        self.torch = torch
        self.torchvision = torchvision
        self.timm = timm
        self.pillow = pillow
        self.numpy = numpy
        self.requirements = requirements
        self.also = also

    def beside(self, torch, torchvision):
        """{package: versions} of the line with another PyTorch, all its patch releases, and torchvision."""
        first, second = torch.split(".")[:2]
        return {"torch": "=={}.{}.*".format(first, second), "torchvision": torchvision, "timm": self.timm,
                "pillow": self.pillow, "numpy": self.numpy}

    @property
    def accepted(self):
        """[{package: versions}] of the line, its own PyTorch first."""
        return [self.beside(*pair) for pair in ((self.torch, self.torchvision),) + tuple(self.also)]


LINES = OrderedDict([
    ("1.5", Line("3.7", "1.5.1", "==0.2.2.post3", "==0.4.12", ">=6.2,<7", ">=1.19,<1.22", "1.5_requirements.txt")),
    ("1.8", Line("3.7 3.8", "1.8.1", "==0.9.1", "==0.4.12", ">=8,<9.6", ">=1.19,<1.24", "1.8_requirements.txt")),
    ("2.1", Line("3.8 3.9 3.10 3.11", "2.1.0", "==0.16.0", ">=1.0.20,<1.1", ">=9.1,<12", ">=1.22,<2",
                 "2.1_requirements.txt")),
    ("2.5", Line("3.9 3.10 3.11", "2.5.1", "==0.20.1", ">=1.0.20,<1.1", ">=9.1,<12", ">=1.22,<2",
                 "2.5_requirements.txt")),
    ("2.7", Line("3.10 3.11 3.9", "2.7.1", "==0.22.1", ">=1.0.20,<1.1", ">=9.1,<12", ">=1.22,<2",
                 "2.7_requirements.txt")),
    # 2.14.1 was only tried as BY_HAND's combinations were (2026-11-26)
    ("current", Line("3.11 3.12 3.13 3.10", "2.13.0", "==0.28.0", ">=1.0.31,<1.1", ">=10,<13", ">=1.26,<3",
                     "requirements.txt", also=[("2.14.1", "==0.29.*")])),
])

# Combinations that no test command installs, tried once on a CPU (x86_64, Python 3.11): the models and their gradients
# against the published numbers, the number of graphs they compile into, a training by main.py and the evaluation of a
# published-style checkpoint, all passed. Each: PyTorch, torchvision, the line whose other packages were beside them,
# the day.
BY_HAND = [
    ("2.3.1", "==0.18.1", "2.7", "2026-11-26"),
    ("2.4.1", "==0.19.1", "2.7", "2026-11-26"),
    ("2.6.0", "==0.21.0", "2.7", "2026-11-26"),
    ("2.8.0", "==0.23.0", "2.7", "2026-11-26"),
    ("2.9.1", "==0.24.1", "2.7", "2026-11-26"),
    ("2.10.0", "==0.25.0", "2.7", "2026-11-26"),
    ("2.11.0", "==0.26.0", "2.7", "2026-11-26"),
    ("2.12.0", "==0.27.0", "2.7", "2026-11-26"),
]


def combinations():
    """[{package: versions}] of all that is accepted without a warning, by ascending PyTorch."""
    found = [versions for line in LINES.values() for versions in line.accepted]
    found += [LINES[line].beside(torch, torchvision) for torch, torchvision, line, _ in BY_HAND]
    return sorted(found, key=lambda versions: [int(part) for part in versions["torch"].strip("=.*").split(".")])


def main(name=None):
    if name is None:
        print(" ".join(LINES))
        return 0
    if name not in LINES:
        print("error: --line {}: the lines are {}".format(name, ", ".join(LINES)), file=sys.stderr)
        return 2
    line = LINES[name]
    vendor = "" if name == "current" else "torch=={}".format(line.torch)  # the other files leave PyTorch to its vendor
    print('pythons="{}" torch="{}" requirements={}'.format(line.pythons, vendor, line.requirements))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
