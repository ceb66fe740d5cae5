"""Fails where a file of the venv was installed by two packages with different contents: one of them is broken, though
no check of dependencies says so."""

from collections import defaultdict
from importlib.metadata import distributions

owners = defaultdict(dict)
for package in distributions():
    for file in package.files or ():
        if file.hash and ".dist-info" not in str(file):
            owners[str(file)][package.name] = file.hash.value
torn = {file: sorted(by) for file, by in owners.items() if len(set(by.values())) > 1}
for file, names in sorted(torn.items()):
    print(file, "is of", *names)
if torn:
    raise SystemExit("packages have overwritten each other's files")
print("no file is of two packages")
