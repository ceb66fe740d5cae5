"""Files that a manifest names by their place: a key of a ConfigMap, or an object in S3."""

from pathlib import Path

from cgd_stages.contract import CONFIG_MAP, INPUTS
from cgd_stages.errors import TransientError, UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import place

MOST_BYTES = 1 << 20
"""Of a text."""


def mounted(context: Context, uri: str) -> Path:
    """The file of `configmap://name/key`. Raises TransientError when it is not mounted yet."""
    name = uri.removeprefix(CONFIG_MAP)
    if context.inputs is None:
        raise UserError(f"{uri} is not mounted: {INPUTS} is not set")
    path = place(context.inputs, name)
    if not path.is_file():
        config_map, _, key = name.partition("/")
        hint = f"Apply a ConfigMap {config_map} with the key {key} in the namespace of the run."
        raise TransientError(f"there is no {uri} yet", hint=hint)
    return path


def read_text(context: Context, uri: str, what: str, hint: str) -> str:
    """The text at `configmap://name/key` or `s3://bucket/key`. `what` it is and the `hint` are for messages.

    Raises UserError when it does not exist or is no text, TransientError when a ConfigMap is not mounted yet.
    """
    if uri.startswith(CONFIG_MAP):
        data = mounted(context, uri).read_bytes()
    else:
        parent, _, name = uri.rpartition("/")
        bucket = context.store.bucket.at(parent)
        size = next((stored.size for stored in bucket.list(name) if stored.key == name), None)
        if size is None:
            raise UserError(f"there is no object {uri}", hint=hint)
        data = bucket.beginning(name, MOST_BYTES + 1) if size else b""
    if len(data) > MOST_BYTES:
        raise UserError(f"{what} {uri} has more than {MOST_BYTES >> 20} MiB", hint=hint)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {uri} is not UTF-8: {error}", hint=hint) from error
