"""What all commands of `cgd` share: the application, the words of their options, the cluster, a file to write."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cgd_cli.errors import Wrong
from cgd_cli.terminal import Terminal

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
console = Terminal()

Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Default: that of the kubeconfig's context.")]


def save(file: Path, content: bytes) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise Wrong(f"{file} cannot be written: {error.strerror}") from error
    console.print(f"{file}: {len(content):,} bytes")


def ask(namespace: str | None, question: Any) -> Any:
    import asyncio
    from collections.abc import Coroutine

    from cgd_cli.remote import Remote

    async def asked() -> Any:
        async with await Remote.connect(namespace) as remote:
            answer = question(remote)
            return await answer if isinstance(answer, Coroutine) else answer

    return asyncio.run(asked())
