"""The shipped generate program, with the constants of time and size scaled down: minutes become a second.

    CGD_TASK='{...}' python -m chaos.pod

Nothing of its logic is touched, and nothing that a pod's environment could set.
"""

from functools import partial

from cgd_stages.engines import openai
from cgd_stages.engines.openai_server import Patience
from cgd_stages.store import bucket, part_writer

FLUSH_SECONDS = 1.0
FLUSH_ROWS = 16

if __name__ == "__main__":
    part_writer.FLUSH_SECONDS, part_writer.FLUSH_ROWS, part_writer.RETRY_SECONDS = FLUSH_SECONDS, FLUSH_ROWS, 0.5
    bucket.ATTEMPTS, bucket.CONNECT_SECONDS, bucket.READ_SECONDS = 2, 2.0, 1.5
    bucket.AWAY_SECONDS, bucket.LONGEST_PAUSE = 45.0, 1.0
    quick = Patience(timeout=10.0, tries=4, first_pause=0.1, longest_pause=0.5)
    openai.EndpointEngine = partial(openai.EndpointEngine, patience=quick)  # type: ignore[assignment,misc]

    from cgd_stages.generate import __main__ as generate
    from cgd_stages.runtime import program

    program.run(generate.main)
