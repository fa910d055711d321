"""Removal of secrets from text that is logged or printed."""

from __future__ import annotations

import re

_HIDDEN = "***"
#: ``scheme://user:password@host``; a password may hold anything but white space, quotes and ://, even an @ or a /.
#: Digits up to a / are a port.
_USER = re.compile(r"(?<=://)[^\s/@:'\"]*:(?!\d+/)(?:(?!://)[^\s'\"])*@|(?<=://)[^\s/@:'\"]+@")
_KEY = re.compile(r"(?i)([?&;](?:[\w-]*(?:password|passwd|pwd|token|secret|api_?key)[\w-]*)=)[^&\s'\"#]+")


def redacted(text: str) -> str:
    """Replaces the user names, passwords and keys in a text's addresses by ``***``."""
    return _KEY.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
