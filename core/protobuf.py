"""Protobuf's wire format, read by a schema with every length checked: what the schema does not name is refused, not skipped.

A message is a run of fields, each a varint tag (number · 8 + wire type) and a value: a varint, 4 or 8 bytes, or a length and so many
bytes (protobuf.dev, "Encoding"). Other readers forgive much: fields they do not know, a single field given twice (the last one
wins, or messages are merged), numbers cut to their width. Two readers of one file must not see two models, so all of that is
refused here. A schema is a finite tree: nesting is as deep as the tables say, whatever the file says.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from r1q.core.errors import InputError

Kind = Literal["int", "int32", "float", "text", "bytes", "ints", "floats", "doubles", "message", "skip", "refuse"]
MAX_FIELDS = 1 << 21  # of one file, each packed number counts: bounds the time and the memory of a hostile file
MAX_TEXT_BYTES = 1 << 16
_VARINT, _EIGHT, _SIZED, _FOUR = 0, 1, 2, 5
_WIRES: Mapping[Kind, tuple[int, ...]] = {
    "int": (_VARINT,),
    "int32": (_VARINT,),
    "float": (_FOUR,),
    "text": (_SIZED,),
    "bytes": (_SIZED,),
    "ints": (_VARINT, _SIZED),
    "floats": (_FOUR, _SIZED),
    "doubles": (_EIGHT, _SIZED),
    "message": (_SIZED,),
    "skip": (_SIZED,),
}
_MEND = "download or export it again"


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message: its key in what is returned, how it is spelled, whether it may occur often.

    `ints`, `floats` and `doubles` are numbers packed or one by one: a list of int, and little-endian bytes. `refuse` fields stop the
    reading with `reason`; `skip` ones are length-checked and forgotten.
    """

    key: str
    kind: Kind
    many: bool = False
    schema: Mapping[int, Field] | None = None
    reason: str = ""


Schema = Mapping[int, Field]


class WireReader:
    """Reads messages of one file's bytes."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, memoryview(data)
        self._fields_left = MAX_FIELDS

    def fail(self, what: str, at: int) -> NoReturn:
        """Raise `InputError` for a defect at byte `at`."""
        raise InputError(f"{self.path}: {what} (at byte {at}); {_MEND}")

    def read(self, schema: Schema, start: int, stop: int, what: str) -> dict[str, Any]:
        """Return the fields of the message in bytes [start, stop) by key; fields that may occur often are lists.

        Absent fields are absent keys. Raises `InputError` for bytes that are no such message.
        """
        found: dict[str, Any] = {}
        at = start
        while at < stop:
            here = at
            tag, at = self._varint(at, stop, what)
            number, wire = tag >> 3, tag & 7
            field = schema.get(number)
            if field is None:
                self.fail(f"{what} has a field {number}, which this reader does not know", here)
            if field.kind == "refuse":
                self.fail(f"{what} has {field.reason}", here)
            if wire not in _WIRES[field.kind]:
                self.fail(f"{field.key} of {what} has the wire type {wire}", here)
            if field.key in found and not field.many:
                self.fail(f"{what} has two fields {field.key}", here)
            at = self._value(field, wire, at, stop, what, found)
        return found

    def _value(self, field: Field, wire: int, at: int, stop: int, what: str, found: dict[str, Any]) -> int:
        """Read one value at byte `at` into `found` and return where it ends."""
        if wire == _VARINT:
            value, end = self._varint(at, stop, what)
            self._add(field, found, _signed(value), end)
            return end
        end = at + {_EIGHT: 8, _FOUR: 4}.get(wire, 0)
        if wire == _SIZED:
            length, at = self._varint(at, stop, what)
            end = at + length
        if end > stop:
            self.fail(f"{field.key} of {what} ends beyond it", at)
        if field.kind == "ints":
            numbers = found.setdefault(field.key, [])
            while at < end:
                number, at = self._varint(at, end, what)
                numbers.append(_signed(number))
        elif field.kind in ("floats", "doubles"):
            width = 4 if field.kind == "floats" else 8
            if (end - at) % width:
                self.fail(f"{field.key} of {what} is no whole number of values", at)
            found.setdefault(field.key, bytearray()).extend(self.data[at:end])
        elif field.kind == "message":
            assert field.schema is not None
            self._add(field, found, self.read(field.schema, at, end, f"{field.key} of {what}"), end)
        elif field.kind != "skip":
            self._add(field, found, self._plain(field, at, end, what), end)
        return end

    def _plain(self, field: Field, at: int, end: int, what: str) -> object:
        if field.kind == "float":
            return struct.unpack("<f", self.data[at:end])[0]
        if field.kind == "bytes":
            return self.data[at:end]
        if end - at > MAX_TEXT_BYTES:
            self.fail(f"{field.key} of {what} has {end - at} bytes; {MAX_TEXT_BYTES} is the most", at)
        try:
            return str(self.data[at:end], "utf-8")
        except UnicodeDecodeError:
            self.fail(f"{field.key} of {what} is not UTF-8", at)

    def _add(self, field: Field, found: dict[str, Any], value: object, at: int) -> None:
        if field.kind == "int32" and isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
            self.fail(f"{field.key} {value} does not fit its 32 bits", at)
        if field.many:
            found.setdefault(field.key, []).append(value)
        else:
            found[field.key] = value

    def _varint(self, at: int, stop: int, what: str) -> tuple[int, int]:
        """Return an unsigned number of at most 64 bits and where it ends."""
        self._fields_left -= 1
        if self._fields_left < 0:
            self.fail(f"more than {MAX_FIELDS} fields and numbers", at)
        data = self.data
        if at < stop and data[at] < 128:
            return data[at], at + 1
        value = shift = 0
        for place in range(at, min(at + 10, stop)):
            byte = data[place]
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    self.fail(f"a number of more than 64 bits in {what}", at)
                return value, place + 1
            shift += 7
        self.fail(f"{what} ends inside a number" if stop - at < 10 else f"a number without an end in {what}", at)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
