"""Prints version;include;lib;cuda of the installed torch without importing it (an import costs seconds). Exit 1: no torch."""

import importlib.util
import pathlib
import re
import sys

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(1)
root = pathlib.Path(spec.origin).parent
text = (root / "version.py").read_text(encoding="utf-8")
version = re.search(r"__version__\s*=\s*['\"]([0-9.]+)", text)
cuda = re.search(r"^cuda[^=]*=\s*['\"]([0-9.]+)", text, re.MULTILINE)
if version is None or not (root / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
    sys.exit(1)
print(";".join([version.group(1), str(root / "include"), str(root / "lib"), cuda.group(1) if cuda else ""]))
