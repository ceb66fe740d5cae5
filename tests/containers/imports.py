"""Imports what is named."""

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)
    print("imports", name)
