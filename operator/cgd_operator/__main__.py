"""Starts the operator: `python -m cgd_operator`; `process` has its options and environment.

The kernel ignores SIGTERM for process 1 of a container while it has no handler. The imports of the operator take
seconds, so a handler is set before them; `process` replaces it by a handler that ends what has begun.

The package `kubernetes` imports its client for threads as well, with requests and websocket: 18 MB and 0.3 s of
processor, of which nothing is used. So the package is put into place without its own imports. `kubernetes.aio` and
what Kopf asks for are found in it as before.
"""

import os
import signal
import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # whatever an import would make of an exception
    if package := find_spec("kubernetes"):
        sys.modules[package.name] = module_from_spec(package)
    from cgd_operator import process

    process.main()


if __name__ == "__main__":
    main()
