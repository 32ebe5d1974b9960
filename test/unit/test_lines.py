"""The version lines read one another's checkpoints, and say what does not fit together."""
import os
import re
import subprocess
import sys

import commands
import numpy as np
import pytest

from evo_vit import compat
from evo_vit.lines import BY_HAND, LINES


def python_of(line):
    """The interpreter of a line's test environment, which is made where it is missing."""
    venv = ".venv-test-" + line
    subprocess.run(["bash", "-euc", ". test/venv.sh; make_venv {} {} test/unit/requirements.txt".format(venv, line)],
                   cwd=commands.ROOT, check=True, timeout=1800)
    return os.path.join(commands.ROOT, venv, "bin", "python")


@pytest.mark.slow
def test_a_checkpoint_of_every_line_gives_the_same_logits_on_every_line(tmp_path):
    pythons = {line: python_of(line) for line in LINES}
    for line, python in pythons.items():
        code, out, err = commands.helper("line_checkpoint", "write", tmp_path / line, launch=[python])
        assert code == 0, out + err
    differences = {}
    for writer in pythons:
        logits = {}
        for reader, python in pythons.items():
            out = str(tmp_path / "{}-{}.txt".format(writer, reader))
            code, printed, err = commands.helper("line_checkpoint", "read", tmp_path / writer, out, launch=[python])
            assert code == 0, printed + err
            logits[reader] = np.loadtxt(out)
        assert np.abs(logits[writer]).max() > 0.2
        for reader in pythons:
            differences[writer, reader] = np.abs(logits[reader] - logits[writer]).max()
    print("\n" + "\n".join("written {} read {}: {:.1e}".format(*pair, difference)
                           for pair, difference in differences.items()))
    assert len(differences) == len(pythons) ** 2 and max(differences.values()) < 1e-6, differences


def test_the_installed_line_is_a_tested_one():
    assert compat.untested_notice() is None


@pytest.mark.parametrize("package, module, version, sentence", [
    ("torch", "torch", "1.4.0", "error: torch 1.4.0 is too old; install 'torch>=1.5'"),
    ("timm", "timm", "0.3.2", "error: timm 0.3.2 is too old; install 'timm>=0.4.12'"),
])
def test_a_combination_that_cannot_work_ends_in_one_sentence(package, module, version, sentence, tmp_path):
    """A package that says it is too old is refused by main.py before anything else is imported."""
    attribute = "__{}__".format("version")
    (tmp_path / "sitecustomize.py").write_text(
        "import {0}\n{0}.{2} = '{1}'\n".format(module, version, attribute) if package == "torch" else
        "import importlib.abc, sys, importlib.machinery\n"
        "class Old(importlib.machinery.SourceFileLoader):\n"
        "    def exec_module(self, module):\n"
        "        module.{} = '{}'\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'timm':\n"
        "            return importlib.machinery.ModuleSpec('timm', Old('timm', ''))\n"
        "sys.meta_path.insert(0, Finder())\n".format(attribute, version))
    env = dict(os.environ, PYTHONPATH=str(tmp_path))
    result = subprocess.run([sys.executable, commands.MAIN, "--help"], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", sentence + "\n")


def test_an_untested_combination_is_named_with_the_tested_ones(monkeypatch):
    monkeypatch.setattr(compat, "versions", lambda: {"torch": "1.13.1", "torchvision": "0.14.1", "timm": "0.9.16"})
    notice = compat.untested_notice()
    assert notice.startswith("torch 1.13.1, torchvision 0.14.1 and timm 0.9.16 are no tested combination")
    assert notice.count("\n") == 0 and "torch==1.5.*" in notice and "torch==2.13.*" in notice


@pytest.mark.parametrize("torch_version, torchvision", [
    ("2.1.0.post17", "0.16.0"), ("2.5.1+ascend", "0.20.1+cpu"), ("2.7.1.post2", "0.22.1"), ("2.13.1", "0.28.0"),
    ("2.14.0", "0.29.1"), ("2.14.1+cu130", "0.29.0")])
def test_a_tested_combination_is_not_warned_of(torch_version, torchvision, monkeypatch):
    monkeypatch.setattr(compat, "versions", lambda: {"torch": torch_version, "torchvision": torchvision,
                                                     "timm": "1.0.31"})
    assert compat.untested_notice() is None


def test_torchvision_of_another_pytorch_is_warned_of(monkeypatch):
    monkeypatch.setattr(compat, "versions", lambda: {"torch": "2.14.0", "torchvision": "0.28.0", "timm": "1.0.31"})
    assert "are no tested combination" in compat.untested_notice()


def test_the_readmes_list_the_lines_and_what_was_run_by_hand():
    """The columns that both languages share, of each line in order, and each combination with its day."""
    for name in ("README.md", "README.zh.md"):
        with open(os.path.join(commands.ROOT, name), encoding="utf-8") as f:
            rows = [[cell.strip() for cell in row.strip().strip("|").split("|")] for row in f if row.startswith("| ")]
        rows = {row[0].split()[0]: row for row in rows if row[-1].startswith("`pip install ")}
        assert list(rows) == list(LINES), name
        for line, (_, pythons, torch, torchvision, timm, install) in rows.items():
            entry = LINES[line]
            ours = sorted(tuple(map(int, version.split("."))) for version in entry.pythons.split())
            named = [tuple(map(int, version.split("."))) for version in re.findall(r"\d\.\d+", pythons)]
            assert (named[0], named[-1]) == (ours[0], ours[-1]), (name, line)
            pairs = [(entry.torch, entry.torchvision)] + list(entry.also)
            assert re.findall(r"\d\.\d+", torch) == [pair[0].rsplit(".", 1)[0] for pair in pairs], (name, line)
            assert all(pair[1].strip("=*").rstrip(".") in torchvision for pair in pairs), (name, line)
            assert timm.rstrip("x") in entry.timm.replace(">", "").replace("=", "").replace("<", ""), (name, line)
            assert entry.requirements in install, (name, line)
    for name in ("docs/ascend.md", "docs/ascend.zh.md"):
        with open(os.path.join(commands.ROOT, name), encoding="utf-8") as f:
            text = f.read()
        for torch, _, _, day in BY_HAND:
            assert re.search(r"\b{}\b".format(re.escape(torch)), text) and day in text, (name, torch)


def newest_python(line):
    """The newest interpreter that the line accepts."""
    newest = max(LINES[line].pythons.split(), key=lambda version: [int(part) for part in version.split(".")])
    return subprocess.run(["bash", "-euc", ". test/venv.sh; pythons={}; find_python {}".format(newest, line)],
                          cwd=commands.ROOT, check=True, stdout=subprocess.PIPE, universal_newlines=True).stdout.strip()


def site_packages(python):
    return subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True,
                          stdout=subprocess.PIPE, universal_newlines=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("line, vendor, newest", [
    ("1.5", "1.5.0.post5", False), ("1.8", "1.8.1+ascend.rc2", False), ("2.1", "2.1.0.post17", False),
    ("2.1", "2.1.0.post17", True), ("2.5", "2.5.1+ascend", False), ("2.5", "2.5.1+ascend", True),
    ("2.7", "2.7.1.post2", False), ("2.7", "2.7.1.post2", True)])
def test_installing_a_lines_requirements_and_the_models_leaves_the_vendors_torch(line, vendor, newest, tmp_path):
    """And, on the lines whose file is to be installed without what it needs itself, nothing else is missing then; with
    the tests' interpreter, which takes older releases, and with the newest."""
    python = newest_python(line) if newest else python_of(line)
    subprocess.run([python, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    python = str(tmp_path / "venv" / "bin" / "python")
    info = os.path.join(site_packages(python), "torch-{}.dist-info".format(vendor))
    os.mkdir(info)
    for name, text in (("METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: {}\n".format(vendor)),
                       ("INSTALLER", "pip\n"), ("RECORD", "")):
        with open(os.path.join(info, name), "w") as f:
            f.write(text)
    alone = [] if line in ("1.5", "1.8") else ["--no-deps"]
    for what in (alone + ["-r", os.path.join(commands.ROOT, LINES[line].requirements)],
                 alone + [commands.copy_package(tmp_path / "source")]):
        subprocess.run([python, "-m", "pip", "install", "--quiet"] + what, check=True, timeout=900)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, stdout=subprocess.PIPE,
                            universal_newlines=True).stdout.lower()
    assert "torch=={}\n".format(vendor) in listed and "evo-levit" in listed
    assert re.search("^timm==" + ("0[.]4[.]12$" if not alone else "1[.]0[.]"), listed, re.M)
    if alone:
        # torchvision asks for exactly its PyTorch, which the vendor's stands for
        check = subprocess.run([python, "-m", "pip", "check"], stdout=subprocess.PIPE, universal_newlines=True).stdout
        wrong = [text for text in check.splitlines() if text != "No broken requirements found."
                 and not re.match("torchvision .* has requirement torch==", text)]
        assert wrong == []
    if alone and not newest:
        # and all that the project imports beside PyTorch can be imported, torch itself lent by the line
        with open(os.path.join(site_packages(python), "lent.pth"), "w") as f:
            f.write(site_packages(python_of(line)) + "\n")
        script = ("import sys; ours = sys.argv[1]; import numpy, PIL, safetensors, tqdm, sklearn.datasets, matplotlib, "
                  "evo_vit, timm, torchvision; bad = [m.__file__ for m in (numpy, PIL, safetensors, tqdm, sklearn, "
                  "matplotlib, timm, torchvision) if not m.__file__.startswith(ours)]; assert not bad, bad")
        subprocess.run([python, "-c", script, site_packages(python)], check=True, timeout=300, cwd=str(tmp_path))


# Pillow before 7 was never built for it; pip compiles it where a compiler and libjpeg's headers are installed
COMPILED_ON_AARCH64 = {"1.5": ["pillow"]}


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("line", list(LINES))
def test_a_lines_requirements_have_wheels_for_linux_on_aarch64(line, tmp_path):
    kept = []
    for name in (LINES[line].requirements,) + (("dependencies.txt",) if line in ("2.1", "2.5", "2.7") else ()):
        with open(os.path.join(commands.ROOT, name)) as f:
            kept += [text for text in f if not text.startswith(("#", "-r"))
                     and re.match("[a-z-]+", text).group() not in COMPILED_ON_AARCH64.get(line, [])]
    (tmp_path / "requirements.txt").write_text("".join(kept))
    platforms = ["--platform=manylinux{}_aarch64".format(tag) for tag in ("2014", "_2_17", "_2_26", "_2_27", "_2_28")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-deps", "--only-binary=:all:", "--target",
         str(tmp_path / "none"), "--python-version", LINES[line].pythons.split()[0], "-r",
         str(tmp_path / "requirements.txt")] + platforms, check=True, timeout=900)
