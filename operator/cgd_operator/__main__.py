"""Starts the operator: `python -m cgd_operator`; `process` has its options and environment.

The kernel ignores SIGTERM for process 1 of a container while it has no handler. The imports of the operator take
seconds, so a handler is set before them; `process` replaces it by a handler that ends what has begun.
"""

import os
import signal


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # whatever an import would make of an exception
    from cgd_operator import process

    process.main()


if __name__ == "__main__":
    main()
