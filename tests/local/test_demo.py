"""Which API server the demo uses."""

from pathlib import Path

import pytest

from cgd_local.__main__ import given_kubeconfig


def test_the_kubeconfig_of_an_earlier_demo_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / ".demo/../.demo/cluster/kubeconfig"))
    assert given_kubeconfig(tmp_path / ".demo") is None
    monkeypatch.delenv("KUBECONFIG")
    assert given_kubeconfig(tmp_path / ".demo") is None


def test_another_kubeconfig_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    assert given_kubeconfig(tmp_path / ".demo") == tmp_path / "kubeconfig"
