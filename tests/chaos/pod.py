"""The shipped generate program, with the constants of time and size scaled down: minutes become a second.

    CGD_TASK='{...}' python -m chaos.pod

Nothing of its logic is touched, and nothing that a pod's environment could set.
"""

from functools import partial

from cgd_stages import endpoint, ledger, storage

FLUSH_SECONDS = 1.0
FLUSH_ROWS = 16

if __name__ == "__main__":
    ledger.FLUSH_SECONDS, ledger.FLUSH_ROWS, ledger.RETRY_SECONDS = FLUSH_SECONDS, FLUSH_ROWS, 0.5
    storage.ATTEMPTS, storage.CONNECT_SECONDS, storage.READ_SECONDS = 2, 2.0, 1.5
    storage.AWAY_SECONDS, storage.LONGEST_PAUSE = 45.0, 1.0
    quick = endpoint.Patience(timeout=10.0, tries=4, first_pause=0.1, longest_pause=0.5)
    endpoint.EndpointEngine = partial(endpoint.EndpointEngine, patience=quick)  # type: ignore[assignment,misc]

    from cgd_stages import generate, program

    program.run(generate.main)
