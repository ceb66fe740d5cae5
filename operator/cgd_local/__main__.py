"""The demo: a whole CGDRun on one machine, with everything that a cluster would provide.

    python -m cgd_local [demo] [--manifest FILE] [--file CONFIGMAP/KEY=PATH ...] [--model FOLDER ...]
    python -m cgd_local up          # only what a cluster provides; it stays up, as after a demo
    python -m cgd_local down        # ends it

Real: the operator process, kubectl, vLLM, DeepSpeed, the S3 server, the language model. Stand-ins: the API server, the
controllers and the node of this package. `--kubeconfig` names an API server to use instead, which must have no nodes of
its own; $KUBECONFIG is not read. The folder's S3 keeps its data: the next demo resumes the run.
"""

import argparse
import asyncio
import signal
import sys
from pathlib import Path

from cgd_cli.terminal import Terminal
from cgd_cli.view import shell
from cgd_local.background import FAILED, STOP_SECONDS, down, hold, holder, short, up
from cgd_local.demo import Given, demo
from cgd_local.kubectl import DemoError
from cgd_stages.text.printable import printable

QUICKSTART = Path("examples/quickstart.yaml")
FOLDER = Path(".demo")
STOPPED = 128 + signal.SIGINT

console = Terminal()


def main() -> None:
    options = _options().parse_args()
    folder = options.folder.resolve()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background commands ignore SIGINT
    folder.mkdir(parents=True, exist_ok=True)
    given = Given(options.manifest, folder, tuple(options.file), tuple(options.model), options.kubeconfig)
    try:
        match options.command:
            case "hold":
                asyncio.run(hold(folder, options.kubeconfig))
            case "up":
                sys.exit(asyncio.run(_up(given)))
            case "down":
                sys.exit(asyncio.run(_down(folder)))
            case _:
                sys.exit(asyncio.run(_demo(given)))
    except (DemoError, OSError, RuntimeError) as error:  # the last two: S3 or a folder
        sys.exit(printable(f"{FAILED}{error}", lines=options.command != "hold"))
    except KeyboardInterrupt:
        sys.exit(STOPPED)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cgd_local", description=(__doc__ or "").partition("\n")[0])
    commands = ("demo", "up", "down", "hold")
    parser.add_argument("command", nargs="?", choices=commands, default="demo", help="hold: what up starts")
    parser.add_argument("--manifest", type=Path, default=QUICKSTART)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="state: S3 data, logs, kubeconfig, reports")
    parser.add_argument("--kubeconfig", type=Path, help="an API server without nodes, to use instead of our own")
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        metavar="CONFIGMAP/KEY=PATH",
        help="put a file into a ConfigMap before the run is applied (repeatable)",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="store a model beside the demo's own, as s3://cgd/models/<name of the folder> (repeatable)",
    )
    return parser


async def _demo(given: Given) -> int:
    """Ctrl-C and SIGTERM end what this demo has started, and leave what was up before. A second one ends it at once."""
    found, work = holder(given.folder) is not None, asyncio.create_task(demo(given))
    loop = asyncio.get_running_loop()

    def stop() -> None:
        console.print()
        loop.add_signal_handler(signal.SIGINT, sys.exit, STOPPED)
        goes_on = f"To go on: {again()}"
        if found:
            console.print(f"The cluster and the run go on; `make down` ends them. {goes_on}", soft_wrap=True)
        else:
            limit = f"{STOP_SECONDS:g} seconds at most"
            console.print(f"Ending the run's pods, the cluster and S3: {limit}; what is stored stays.")
            console.print(goes_on, soft_wrap=True)
        work.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if not found:
            await down(given.folder)
        return STOPPED


def again() -> str:
    """What the user has typed."""
    given = sys.argv[1:]
    return shell(short(Path(sys.executable)), "-m", "cgd_local", *given) if given else "make demo"


async def _up(given: Given) -> int:
    provided = await up(given.folder, given.kubeconfig)
    console.print()
    console.print(f"export KUBECONFIG={shell(str(provided.kubeconfig))}", soft_wrap=True)
    console.print("Apply manifests with kubectl; `make down` ends it.")
    return 0


async def _down(folder: Path) -> int:
    if holder(folder) is None:
        console.print(f"nothing is up in {short(folder)}")
        return 0
    console.print(f"Ending the pods, the cluster and S3: {STOP_SECONDS:g} seconds at most; what is stored stays.")
    await down(folder)
    return 0


if __name__ == "__main__":
    main()
