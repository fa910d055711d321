"""Access to one raw record of a dataset, with errors that say where it comes from."""

from __future__ import annotations

from collections.abc import Mapping

from instructedit.errors import UserError
from instructedit.records import is_text


class Raw:
    """A JSON object that knows its place in a source, so that error messages name file, record and field.

    A field that is null counts as missing: the hub fills absent fields that way.

    Args:
        data: The object.
        source: The file or the hub id that it comes from, as error messages should name it.
        number: Its place in the source, counted from 0.
        path: The field of the record that holds this object, if it is not the record itself.
    """

    def __init__(self, data: Mapping[str, object], source: str, number: int, path: str = "") -> None:
        self.data = data
        self.source = source
        self.number = number
        self.path = path

    def error(self, problem: str) -> UserError:
        """Makes an error that names the source and the record with the problem, unless `problem` does so already."""
        place = f"{self.source}, record {self.number}: "
        return UserError(problem if problem.startswith(place) else place + problem)

    def has(self, field: str) -> bool:
        """True if the field is there and not null."""
        return self.data.get(field) is not None

    def text(self, field: str) -> str:
        """Returns the field's text, without surrounding white space.

        Raises:
            UserError: If the field is missing, not text, or blank.
        """
        text = self._text(self._value(field), field)
        if not text:
            raise self.error(f"field {self._full(field)!r} is empty")
        return text

    def optional_text(self, field: str) -> str | None:
        """Returns the field's text like `text`, but None if the field is missing or blank."""
        return (self._text(self.data[field], field) or None) if self.has(field) else None

    def texts(self, field: str) -> list[str]:
        """Returns the field's list of texts, each stripped of white space; blank ones stay, for the reader to count."""
        return [self._text(x, f"{field}[{i}]") for i, x in enumerate(self._list(self._value(field), field))]

    def answers(self, field: str) -> list[list[str]]:
        """Returns alternative answers, each with its aliases, from any of the three shapes that datasets use.

        A text is one answer; in a list, a text is an answer without aliases and a list is an answer's aliases.
        Blank texts and empty lists stay, for the reader to count.
        """
        value = self._value(field)
        if isinstance(value, str):
            return [[self._text(value, field)]]
        found = []
        for i, entry in enumerate(self._list(value, field, "text or a list")):
            at = f"{field}[{i}]"
            aliases = entry if isinstance(entry, list) else [entry]
            found.append([self._text(x, f"{at}[{j}]" if entry is aliases else at) for j, x in enumerate(aliases)])
        return found

    def child(self, field: str) -> Raw:
        """Returns the object in the field."""
        return self._object(self._value(field), field)

    def objects(self, field: str) -> list[Raw]:
        """Returns the field's list of objects."""
        return [self._object(x, f"{field}[{i}]") for i, x in enumerate(self._list(self._value(field), field))]

    def groups(self, field: str) -> dict[str, list[Raw]]:
        """Returns lists of objects by name, such as a record's probes by group; empty if the field is missing."""
        if not self.has(field):
            return {}
        inner = self.child(field)
        return {name: inner.objects(name) for name in inner.data if inner.has(name)}

    def _full(self, field: str) -> str:
        return f"{self.path}.{field}" if self.path else field

    def _value(self, field: str) -> object:
        if not self.has(field):
            raise self.error(f"field {self._full(field)!r} is missing")
        return self.data[field]

    def _expected(self, what: str, value: object, field: str) -> UserError:
        return self.error(f"field {self._full(field)!r}: expected {what}, got {type(value).__name__}")

    def _text(self, value: object, field: str) -> str:
        if not isinstance(value, str):
            raise self._expected("text", value, field)
        if not is_text(value):
            raise self.error(f"field {self._full(field)!r} holds half a surrogate pair, which is no text")
        return value.strip()

    def _list(self, value: object, field: str, what: str = "a list") -> list[object]:
        if not isinstance(value, list):
            raise self._expected(what, value, field)
        return value

    def _object(self, value: object, field: str) -> Raw:
        if not isinstance(value, dict):
            raise self._expected("an object", value, field)
        return Raw(value, self.source, self.number, self._full(field))
