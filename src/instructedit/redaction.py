"""Takes secrets out of what is logged or printed."""

from __future__ import annotations

import re

_HIDDEN = "***"
#: ``scheme://user:password@host``; a password may hold all but white space and quotes, an @ too.
_USER = re.compile(r"(?<=://)[^\s/@:'\"]*:[^\s'\"/]*@|(?<=://)[^\s/@:'\"]+@")
_KEY = re.compile(r"(?i)([?&;](?:[\w-]*(?:password|passwd|pwd|token|secret|api_?key)[\w-]*)=)[^&\s'\"#]+")


def redacted(text: str) -> str:
    """A text in which what addresses hold of user names, passwords and keys is replaced by ``***``."""
    return _KEY.sub(rf"\1{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))
