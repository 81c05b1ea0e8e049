"""Go's text/template as far as the parcels' templates use it, written from the language's documentation."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|\$?\.?[\w.$]+|[()]|:=|,|\$)')


def render_go(template: str, data: Mapping[str, Any]) -> str:
    """Return `template` executed with `data`, whose fields are found by name."""
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.S)
    tree, rest = _block(iter(parts), ())
    assert rest == "", f"{{{{ {rest} }}}} closes nothing"
    return "".join(_run(tree, {"$": data, ".": data}))


def _block(parts: Iterator[str], closers: tuple[str, ...]) -> tuple[list[Any], str]:
    """Return the nodes up to one of `closers`, and that closer's words."""
    nodes: list[Any] = []
    for part in parts:
        if not part.startswith("{{"):
            nodes.append(part)
            continue
        words = part[2:-2].strip()
        first = words.split(" ")[0]
        if first in closers:
            return nodes, words
        if first in ("if", "range"):
            nodes.append(_branch(parts, words))
        else:
            nodes.append((words,))
    return nodes, ""


def _branch(parts: Iterator[str], words: str) -> tuple[Any, ...]:
    body, closer = _block(parts, ("else", "end"))
    if closer.startswith("else if "):
        return words, body, [_branch(parts, closer.removeprefix("else "))]
    other = _block(parts, ("end",))[0] if closer == "else" else []
    assert closer in ("else", "end"), "a branch is not closed"
    return words, body, other


def _run(nodes: list[Any], scope: dict[str, Any]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif len(node) == 1:
            name, sign, words = node[0].partition(" := ")
            value = _value(words if sign else node[0], scope)
            if sign:
                scope[name] = value
            else:
                yield str(value)
        elif node[0].startswith("range "):
            name, _, words = node[0].removeprefix("range ").partition(" := ")
            index = name.split(",")[0].strip()
            for number, item in enumerate(_value(words, scope)):
                yield from _run(node[1], {**scope, ".": item, index: number})
        else:
            yield from _run(node[1] if _value(node[0].removeprefix("if "), scope) else node[2], dict(scope))


def _value(words: str, scope: Mapping[str, Any]) -> Any:
    tokens = _TOKEN.findall(words)
    assert "".join(tokens) == re.sub(r'\s+(?=(?:[^"]*"[^"]*")*[^"]*$)', "", words), words
    value, rest = _call(tokens, scope)
    assert not rest, words
    return value


def _call(tokens: list[str], scope: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """Return the value of a function with its arguments, or of a lone term, and the tokens after it."""
    functions = {"eq", "ne", "and", "not", "len", "slice"}
    if tokens[0] not in functions:
        return _term(tokens, scope)
    name, rest, given = tokens[0], tokens[1:], []
    while rest and rest[0] != ")":
        value, rest = _term(rest, scope)
        given.append(value)
    match name:
        case "eq":
            return given[0] == given[1], rest
        case "ne":
            return given[0] != given[1], rest
        case "and":
            return next((value for value in given if not value), given[-1]), rest
        case "not":
            return not given[0], rest
        case "len":
            return len(given[0]), rest
        case _:
            return given[0][given[1] :], rest


def _term(tokens: list[str], scope: Mapping[str, Any]) -> tuple[Any, list[str]]:
    token, rest = tokens[0], tokens[1:]
    if token == "(":
        value, rest = _call(rest, scope)
        assert rest[0] == ")"
        return value, rest[1:]
    if token.startswith('"'):
        return json.loads(token), rest
    if token.isdigit():
        return int(token), rest
    if token.startswith("$."):
        return scope["$"][token[2:]], rest
    if token.startswith("."):
        return scope["."][token[1:]], rest
    return scope[token], rest
