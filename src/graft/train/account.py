"""Whether Weights & Biases knows whom it works for, as far as this machine tells: without a network. Light."""

from __future__ import annotations

import configparser
import netrc
import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse


def no_account() -> str | None:
    """Why a training cannot be told to W&B; None where it can be, or where only W&B itself can tell."""
    said = _settings()
    mode = os.environ.get("WANDB_MODE") or said.get("mode", "online")
    named = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if mode in ("offline", "disabled", "dryrun") or named or said.get("api_key"):
        return None
    host = urlparse(os.environ.get("WANDB_BASE_URL") or said.get("base_url", "https://api.wandb.ai")).hostname or ""
    if _known(host):
        return None
    return (
        f"the tracker wandb needs an account at {host}: expected WANDB_API_KEY or what `wandb login` writes, found "
        "neither; to keep all on this machine set WANDB_MODE=offline"
    )


def _settings() -> dict[str, str]:
    """What W&B's own settings say, of the user and of the folder worked in."""
    own = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    here = Path(os.environ.get("WANDB_DIR") or ".") / "wandb" / "settings"
    read = configparser.ConfigParser(interpolation=None, strict=False)
    with suppress(configparser.Error, OSError, UnicodeDecodeError):
        read.read([own, here])
    return dict(read["default"]) if "default" in read else {}


def _known(host: str) -> bool:
    """Whether `.netrc` has a password for the host, or cannot be read."""
    named = os.environ.get("NETRC")
    places = [Path(named).expanduser()] if named else [Path("~/.netrc").expanduser(), Path("~/_netrc").expanduser()]
    try:
        return any(netrc.netrc(place).authenticators(host) for place in places if place.is_file())
    except (netrc.NetrcParseError, OSError):
        return True
