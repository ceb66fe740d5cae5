"""Starts the operator: `python -m cgd_operator`; `process` has its options and environment.

Process 1 of a container has no default for SIGTERM: without a handler it is ignored. The imports of an operator take
seconds, so this one is there before them; it gives way to one that ends what has been begun.
"""

import os
import signal


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # whatever an import would make of an exception
    from cgd_operator import process

    process.main()


if __name__ == "__main__":
    main()
