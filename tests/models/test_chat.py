"""Chat templates: rendered as transformers renders them, and never at the price of the process.

The hostile ones are each a way to reach Python or to make much from little; every one must end in an `InputError` within seconds and
without much memory. They were collected by trying to break the sandbox, not from a list.
"""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from r1q.core.errors import InputError
from r1q.models.chat import MAX_TEMPLATE, render_chat
from r1q.models.tokenizer import Tokenizer

MakeModel = Callable[..., Path]
USER = [{"role": "user", "content": "Is <b> 1 < 2 & «so»?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    *USER,
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "user", "content": "Why?"},
]
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"city": "<Köln>", "n": [1, 2.5, None, True]}}}
]

TEMPLATES = {
    "trimmed blocks": "  {% for m in messages %}\n{{ m.role }}: {{ m['content'] | trim }}\n  {% endfor %}\n{{ eos_token }}",
    "thinking is cut off": "{% for m in messages %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}|{% endfor %}",
    "namespace and break": (
        "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{% set ns.last = m %}{% endfor %}{{ ns.n }}{{ ns.last.content }}"
    ),
    "tools as JSON": "{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}",
    "macro and loop": (
        "{% macro line(m, i) -%}{{ i }}{{ m.role | upper }}{{ caller() if caller else '' }}{%- endmacro %}"
        "{% for m in messages[1:] %}{{ line(m, loop.index0) }}{{ ', ' if not loop.last else '.' }}{{ loop.revindex }}{% endfor %}"
    ),
    "ranges, filters, formats": (
        "{% for i in range(messages | length - 1, -1, -1) %}{{ messages[i].role[:2] ~ i }}{% endfor %}"
        "{{ messages | map(attribute='role') | unique | join('+') }}{{ 'a-b-c'.replace('-', '=') }}{{ '{}:{:>4}'.format('x', 7) }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'a\nb' | indent(2) }}{{ 7 % 3 }}{{ 2 ** 5 }}"
        "{{ dict(a=1, b=[1, 'x']) }}{{ {'k': (1, 2)}.items() | list }}{{ '=' * 12 }}{{ [0] * 2 }}{{ ['a', 'b'] | join(', ') }}"
    ),
    "generation marks": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "set block and recursion": (
        "{% set head %}<{{ bos_token }}>{% endset %}{{ head }}"
        "{% for x in [[1, [2, 3]], [4]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}"
    ),
    "undefined is empty": "{{ nothing }}{{ messages[0].missing }}{% for x in nothing %}{% endfor %}{{ nothing | default('none') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    for messages in (USER, TALK):
        (theirs,), _ = render_jinja_template(
            [messages], tools=TOOLS, chat_template=TEMPLATES[name], add_generation_prompt=True, **variables
        )
        given = {"messages": messages, "tools": TOOLS, "add_generation_prompt": True, **variables}
        assert render_chat(TEMPLATES[name], given) == theirs
    assert theirs


REACHING = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class printed": "{{ (1, 2).__class__ }}",
    "by subscript": "{{ ''['__class__'] }}",
    "by filter": "{{ messages | attr('__class__') }}",
    "by map": "{{ [''] | map(attribute='__class__') | list }}",
    "by format": "{{ '{0.__class__}'.format('') }}",
    "by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "globals of a function": "{{ range.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "private name in a namespace": "{{ namespace(__class__=1) }}",
    "private name set": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "changing what was given": "{{ messages.append(1) }}",
    "reading a file": "{% include '/etc/passwd' %}",
    "importing a file": "{% import '/etc/passwd' as x %}{{ x }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
}
GROWING = {
    "a range too long": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% set z = a %}{% endfor %}{% endfor %}",
    "nested ranges writing": "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxx{% endfor %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s[0] }}",
    "doubling by +": "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s[0] }}",
    "doubling by blocks": (
        "{% set n = namespace(s='a') %}{% for i in range(60) %}{% set x %}{{ n.s }}{{ n.s }}{% endset %}{% set n.s = x %}{% endfor %}"
    ),
    "lists in lists": "{% set n = namespace(s=['a']) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}",
    "tuples compared": (
        "{% set n = namespace(s=0, t=0) %}{% for i in range(60) %}{% set n.s = (n.s, n.s) %}{% set n.t = (n.t, n.t) %}{% endfor %}"
        "{{ n.s == n.t }}"
    ),
    "dicts in dicts": "{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = dict(a=n.s, b=n.s) %}{% endfor %}{{ n.s }}",
    "namespaces in namespaces": (
        "{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = namespace(a=n.s, b=n.s) %}{% endfor %}{{ n.s }}"
    ),
    "a namespace in itself": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "text times": "{{ 'a' * 10**10 }}",
    "times text": "{{ 10**10 * 'a' }}",
    "list times": "{{ [1] * 10**10 }}",
    "powers": "{{ 9**(9**9) }}",
    "squares": "{% set n = namespace(s=9) %}{% for i in range(60) %}{% set n.s = n.s * n.s %}{% endfor %}{{ n.s }}",
    "% width": "{{ '%10000000000d' % 1 }}",
    "format width": "{{ '{:10000000000}'.format(1) }}",
    "format width given": "{{ '{:{}}'.format(1, 10**10) }}",
    "format many times": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "ljust by subscript": "{{ 'a'['ljust'](10**10) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "indent": "{{ '\n' * 100000 | indent('a' * 100000) }}",
    "join of characters": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join by filter": "{{ ('b' * 100000) | join('a' * 100000) }}",
    "replace nothing": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace by filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "round by map": "{{ [1.5] | map('round', 10**9, 'floor') | list }}",
    "JSON indent": "{{ [1, 2] | tojson(indent=10**8) }}",
    "JSON separators": "{{ range(99999) | list | tojson(separators=('a' * 99999, '')) }}",
    "lists of lists of ranges": "{{ range(99999) | list | batch(1) | list | tojson }}" * 100,
    "macros calling themselves twice": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "macros without end": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a loop calling itself": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "date widths": "{{ strftime_now('%99999999d') }}",
    "long numbers": "{{ 1" + "0" * 5000 + " }}",
    "deep parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a large template": " " * (MAX_TEMPLATE + 1),
}


@pytest.mark.parametrize("name", [*REACHING, *GROWING])
def test_a_hostile_template_is_refused_with_little_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1q.models.chat._WORK", 1 << 18)  # tracing memory makes everything slow
    template = {**REACHING, **GROWING}[name]
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            render_chat(template, {"messages": TALK})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(refused.value)
    assert peak < 64 << 20


@pytest.mark.parametrize("name", ["nested ranges", "lists in lists", "macros calling themselves twice"])
def test_the_whole_budget_is_spent_in_seconds(name: str) -> None:
    begin = time.process_time()
    with pytest.raises(InputError, match="more work than a chat template may"):
        render_chat(GROWING[name], {"messages": TALK})
    assert time.process_time() - begin < 10


def test_output_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1q.models.chat.MAX_OUTPUT", 1000)
    assert len(render_chat("{{ 'a' * 999 }}", {"messages": USER})) == 999
    with pytest.raises(InputError, match="writes more than 1000"):
        render_chat("{{ 'a' * 1001 }}", {"messages": USER})


def test_long_conversations_are_work_that_is_allowed() -> None:
    talk = [{"role": "user", "content": "word " * 20000}] * 50
    template = "{% for m in messages %}{{ m['content'] | trim ~ eos_token }}{% endfor %}"
    assert len(render_chat(template, {"messages": talk, "eos_token": "#"})) == 50 * 100_000


def test_what_the_template_refuses_is_said_in_its_words() -> None:
    with pytest.raises(InputError, match="cannot render this conversation: roles must alternate"):
        render_chat("{{ raise_exception('roles must alternate') }}", {"messages": USER})
    with pytest.raises(InputError, match=r"malformed: .*endfor"):
        render_chat("{% for x in messages %}", {"messages": USER})


def test_the_date_is_an_argument() -> None:
    assert render_chat("{{ strftime_now('%d %b %Y') }}", {}, now=datetime(2025, 1, 20)) == "20 Jan 2025"
    assert str(datetime.now().astimezone().year) in render_chat("{{ strftime_now('%Y') }}", {})


def test_only_plain_values_reach_a_template() -> None:
    with pytest.raises(ValueError, match="a PurePosixPath in a conversation"):
        render_chat("{{ messages }}", {"messages": [{"role": "user", "content": PurePosixPath()}]})


def test_a_tokenizer_renders_with_its_special_tokens(make_model: MakeModel) -> None:
    tokenizer = Tokenizer.open(make_model("qwen2"))
    text = tokenizer.render_chat(USER)
    assert text == "<｜begin▁of▁sentence｜><|user|>Is <b> 1 < 2 & «so»?<｜end▁of▁sentence｜><|assistant|><think>\n"
    assert tokenizer.encode(text, add_special=False)[0] == tokenizer.bos_id
    assert not tokenizer.render_chat(USER, add_generation_prompt=False).endswith("<think>\n")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "from jinja"}, "from jinja"),
        ({"chat_template.json": json.dumps({"chat_template": "from json"})}, "from json"),
        ({}, "from config"),
    ],
    ids=["chat_template.jinja", "chat_template.json", "tokenizer_config.json"],
)
def test_the_template_is_found_where_it_may_be(make_model: MakeModel, files: dict[str, str], expected: str) -> None:
    folder = make_model()
    _change(folder / "tokenizer_config.json", chat_template="from config")
    for name, text in files.items():
        (folder / name).write_text(text)
    assert Tokenizer.open(folder).render_chat([]) == expected


def test_of_several_named_templates_the_default_is_taken(make_model: MakeModel) -> None:
    folder = make_model()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    _change(folder / "tokenizer_config.json", chat_template=named)
    assert Tokenizer.open(folder).render_chat([]) == "plain"


def test_without_a_template_a_chat_is_refused(make_model: MakeModel) -> None:
    folder = make_model()
    _change(folder / "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.open(folder)
    assert tokenizer.chat_template is None
    with pytest.raises(InputError, match="no chat template; give the prompt as plain text"):
        tokenizer.render_chat(USER)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_template_of_the_wrong_kind_is_refused(make_model: MakeModel, name: str) -> None:
    folder = make_model()
    if name.endswith(".jinja"):
        (folder / name).write_bytes(b"\xff\xfe")
    else:
        _change(folder / name, chat_template=7)
    with pytest.raises(InputError, match=r"not UTF-8 text|not text"):
        Tokenizer.open(folder)


def _change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
