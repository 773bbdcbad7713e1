"""A tracker that wants an account is refused before anything starts, where this machine has none for it."""

import importlib.util
from types import SimpleNamespace

import pytest

from graft.errors import SettingsError
from graft.pretrain import VERB
from graft.train.account import no_account

KEPT = "machine api.wandb.ai\n  login user\n  password secret\n"


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    for name in ("API_KEY", "IDENTITY_TOKEN_FILE", "MODE", "BASE_URL", "CONFIG_DIR", "DIR"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_settings_with_it_are_refused_and_say_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace())
    raw = {"data": "d", "size": "1M"}
    with pytest.raises(SettingsError, match=r"needs an account at api\.wandb\.ai: .*set WANDB_MODE=offline"):
        VERB.parse({**raw, "track": ["tensorboard", "wandb"]})
    assert VERB.parse({**raw, "track": ["tensorboard"]}).track == ["tensorboard"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert VERB.parse({**raw, "track": ["wandb"]}).track == ["wandb"]


@pytest.mark.parametrize("said", [{"WANDB_API_KEY": "k"}, {"WANDB_MODE": "disabled"}, {"NETRC": "here"}])
def test_what_the_environment_says_is_enough(tmp_path, monkeypatch, said):
    (tmp_path / "here").write_text(KEPT)
    assert no_account()
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert no_account() is None


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".netrc", KEPT),
        ("_netrc", KEPT),
        (".netrc", "a damaged file"),
        ("wandb/settings", "[default]\nmode = offline\n"),
        (".config/wandb/settings", "[default]\nmode = offline\n"),
    ],
)
def test_so_is_what_the_login_wrote(tmp_path, file, content):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(content)
    (tmp_path / file).chmod(0o600)
    assert no_account() is None


def test_an_account_elsewhere_is_none_here(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text(KEPT)
    monkeypatch.setenv("WANDB_BASE_URL", "https://own.example.org:8080")
    assert "needs an account at own.example.org" in str(no_account())
