"""What went wrong, in words for the person at the terminal."""

HINTS = {
    0: "Is the server of the kubeconfig's context the right one, and does it run?",
    401: "Log in to the cluster again: it does not know the kubeconfig's user.",
    403: "The cluster's administrators can allow it.",
}
"""What the user can do, by the code of the API server's answer; 0: no answer came."""


class Wrong(Exception):
    """The user must change something; the message says what."""


def in_words(error: Exception) -> str | None:
    """What happened and, on a line of its own, what to do; None if only a bug of ours can raise this error."""
    if isinstance(error, Wrong):
        return str(error)
    # Imported here, because an error of theirs has loaded them already and `cgd --help` needs none.
    from cgd_operator.api.spec import InvalidRun
    from cgd_operator.kube.kinds import ApiError
    from cgd_stages.errors import StageError

    match error:
        case ApiError():
            hint = HINTS.get(error.status, "")
        case StageError():
            hint = error.hint
        case InvalidRun():
            hint = ""
        case OSError() if error.filename:
            return f"{error.filename}: {error.strerror}"
        case _:
            return None
    return f"{error}\n{hint}" if hint else str(error)
