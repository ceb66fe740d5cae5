"""Chat templates that a run names by their place: a key of a ConfigMap, or an object in S3."""

from cgd_stages.contract import CONFIG_MAP, INPUTS, Chat
from cgd_stages.errors import TransientError, UserError
from cgd_stages.runtime.program import Context
from cgd_stages.store.bucket import place

MOST_BYTES = 1 << 20


def read_template(context: Context, chat: Chat, where: str) -> Chat:
    """The chat with the text of its template. `where`: the model's place in the spec.

    Raises UserError when the file is no text or does not exist, TransientError when a ConfigMap is not mounted yet.
    """
    if (uri := chat.template_uri) is None:
        return chat
    hint = f"Correct {where}.chat.template, or the file."
    data = _from_config_map(context, uri) if uri.startswith(CONFIG_MAP) else _from_store(context, uri, hint)
    if len(data) > MOST_BYTES:
        raise UserError(f"the chat template {uri} has more than {MOST_BYTES >> 20} MiB", hint=hint)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {uri} is not UTF-8: {error}", hint=hint) from error
    if "{" not in text:
        raise UserError(f"the file {uri} holds no Jinja template", hint=hint)
    return chat.model_copy(update={"template": text})


def _from_config_map(context: Context, uri: str) -> bytes:
    name = uri.removeprefix(CONFIG_MAP)
    if context.inputs is None:
        raise UserError(f"{uri} is not mounted: {INPUTS} is not set")
    path = place(context.inputs, name)
    if not path.is_file():
        config_map, _, key = name.partition("/")
        hint = f"Apply a ConfigMap {config_map} with the key {key} in the namespace of the run."
        raise TransientError(f"there is no {uri} yet", hint=hint)
    return path.read_bytes()


def _from_store(context: Context, uri: str, hint: str) -> bytes:
    parent, _, name = uri.rpartition("/")
    bucket = context.store.bucket.at(parent)
    size = next((stored.size for stored in bucket.list(name) if stored.key == name), None)
    if size is None:
        raise UserError(f"there is no object {uri}", hint=hint)
    return bucket.beginning(name, MOST_BYTES + 1) if size else b""
