"""What the models of config.yaml have in common. Stands under `config` and its parts."""

from __future__ import annotations

import ipaddress

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One mapping of the file: an unknown key is an error, a value never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)


def is_loopback(host: str) -> bool:
    """True for localhost and the loopback networks; a host name is not resolved (DNS must not open a door)."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
