"""prepare begins with a probe of the store: fourteen requests, two of them in races. One for each store is enough."""

import os

import pytest

from cgd_stages.store.bucket import Bucket

_known: dict[tuple[str | None, ...], str] = {}
"""What the probe of a store has said, by its endpoint, its bucket and the keys. A probe that fails is no answer."""


@pytest.fixture(autouse=True)
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first prepare of a worker probes the session's store; test_run.py, in the room of the store, has the probe's
    own tests."""
    probe = Bucket.probe

    def once(self: Bucket) -> str:
        keys = (os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY"))
        store = (self.storage.endpoint, self._bucket, *keys)
        if store not in _known:
            _known[store] = probe(self)
        return _known[store]

    monkeypatch.setattr(Bucket, "probe", once)
