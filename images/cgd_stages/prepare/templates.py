"""Chat templates that a run names by their place: a key of a ConfigMap, or an object in S3."""

from cgd_stages.contract import CONFIG_MAP, Chat
from cgd_stages.errors import UserError
from cgd_stages.prepare.sources import mounted
from cgd_stages.runtime.program import Context

MOST_BYTES = 1 << 20


def read_template(context: Context, chat: Chat, where: str) -> Chat:
    """The chat with the text of its template. `where`: the model's place in the spec.

    Raises UserError when the file is no text or does not exist, TransientError when a ConfigMap is not mounted yet.
    """
    if (uri := chat.template_uri) is None:
        return chat
    hint = f"Correct {where}.chat.template, or the file."
    data = mounted(context, uri).read_bytes() if uri.startswith(CONFIG_MAP) else _from_store(context, uri, hint)
    if len(data) > MOST_BYTES:
        raise UserError(f"the chat template {uri} has more than {MOST_BYTES >> 20} MiB", hint=hint)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {uri} is not UTF-8: {error}", hint=hint) from error
    if "{" not in text:
        raise UserError(f"the file {uri} holds no Jinja template", hint=hint)
    return chat.model_copy(update={"template": text})


def _from_store(context: Context, uri: str, hint: str) -> bytes:
    parent, _, name = uri.rpartition("/")
    bucket = context.store.bucket.at(parent)
    size = next((stored.size for stored in bucket.list(name) if stored.key == name), None)
    if size is None:
        raise UserError(f"there is no object {uri}", hint=hint)
    return bucket.beginning(name, MOST_BYTES + 1) if size else b""
