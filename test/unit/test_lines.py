"""The version lines read one another's checkpoints, and say what does not fit together."""
import os
import subprocess
import sys

import commands
import numpy as np
import pytest

from evo_vit import compat


def python_of(line):
    """The interpreter of a line's test environment, which is made where it is missing."""
    venv = ".venv-test-" + line
    subprocess.run(["bash", "-euc", ". test/venv.sh; make_venv {} {} test/unit/requirements.txt".format(venv, line)],
                   cwd=commands.ROOT, check=True, timeout=1800)
    return os.path.join(commands.ROOT, venv, "bin", "python")


@pytest.mark.slow
def test_a_checkpoint_of_every_line_gives_the_same_logits_on_every_line(tmp_path):
    pythons = {line: python_of(line) for line in compat.LINES}
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
    assert len(differences) == 9 and max(differences.values()) < 1e-6, differences


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


@pytest.mark.slow
@pytest.mark.parametrize("line, vendor", [("1.5", "1.5.0.post5"), ("1.8", "1.8.1+ascend.rc2")])
def test_installing_a_lines_requirements_and_the_models_leaves_the_vendors_torch(line, vendor, tmp_path):
    subprocess.run([python_of(line), "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], check=True,
                          stdout=subprocess.PIPE, universal_newlines=True).stdout.strip()
    info = os.path.join(site, "torch-{}.dist-info".format(vendor))
    os.mkdir(info)
    for name, text in (("METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: {}\n".format(vendor)),
                       ("INSTALLER", "pip\n"), ("RECORD", "")):
        with open(os.path.join(info, name), "w") as f:
            f.write(text)
    for what in (["-r", os.path.join(commands.ROOT, line + "_requirements.txt")],
                 [commands.copy_package(tmp_path / "source")]):
        subprocess.run([python, "-m", "pip", "install", "--quiet"] + what, check=True, timeout=900)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=freeze"], check=True, stdout=subprocess.PIPE,
                            universal_newlines=True).stdout.lower()
    assert "torch=={}\n".format(vendor) in listed and "timm==0.4.12\n" in listed and "evo-levit" in listed
