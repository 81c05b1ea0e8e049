"""Conversations keep their reasoning, whatever a chat template does with it; the expected texts are written out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pytest

from r1q.calibration.conversations import render_conversation, split_thoughts
from r1q.core.errors import InputError
from r1q.models.chat import render_chat
from r1q.models.tiny_r1_files import CHAT_TEMPLATE

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
# As Qwen3's does: thoughts are shown after the last question only, and the last answer always gets a pair of tags.
QWEN3_STYLE = """
{%- set ns = namespace(last=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
  {%- set content = message.content -%}{%- set thoughts = '' -%}
  {%- if message.reasoning_content is string -%}{%- set thoughts = message.reasoning_content -%}
  {%- elif '</think>' in content -%}
    {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
    {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
  {%- endif -%}
  {%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
    {{- '<|im_start|>assistant\n<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') + '<|im_end|>\n' -}}
  {%- else -%}
    {{- '<|im_start|>assistant\n' + content + '<|im_end|>\n' -}}
  {%- endif -%}
{%- else -%}
  {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
TALK = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "Two.", "reasoning_content": "One and one.\n"},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "<think>\nTwo, and one.\n</think>\n\nThree."},
]


class Model:
    """A chat template as the tokenizer of a model renders it."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, now: datetime | None = None
    ) -> str:
        given = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template or "", {**given, "bos_token": BOS, "eos_token": EOS}, now)


def test_the_stock_template_of_r1_drops_thoughts_and_we_put_them_back() -> None:
    model = Model(CHAT_TEMPLATE)
    assert "Two, and one." not in model.render_chat(TALK, add_generation_prompt=False)
    assert render_conversation(model, TALK) == (
        f"{BOS}<｜User｜>1 + 1?<｜Assistant｜><think>\nOne and one.\n</think>\n\nTwo.{EOS}"
        f"<｜User｜>And one?<｜Assistant｜><think>\nTwo, and one.\n</think>\n\nThree.{EOS}"
    )


def test_a_template_that_shows_the_last_thoughts_shows_all_and_none_twice() -> None:
    model = Model(QWEN3_STYLE)
    assert "One and one." not in model.render_chat(TALK, add_generation_prompt=False)
    assert render_conversation(model, TALK) == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nOne and one.\n</think>\n\nTwo.<|im_end|>\n"
        "<|im_start|>user\nAnd one?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nTwo, and one.\n</think>\n\nThree.<|im_end|>\n"
    )


@pytest.mark.parametrize("tags", ["", "<think>\n", "</think>", "<think>\n\n</think>\n\n"])
def test_tags_that_a_template_writes_itself_are_filled(tags: str) -> None:
    written = tags.replace("\n", "\\n")
    model = Model(
        "{% for m in messages %}[{{ m.role }}]{{ '"
        + written
        + "' if m.role == 'assistant' }}{{ m.content }}{% endfor %}"
    )
    assert render_conversation(model, TALK[:2]) == "[user]1 + 1?[assistant]<think>\nOne and one.\n</think>\n\nTwo."


def test_without_a_template_turns_are_joined_by_blank_lines() -> None:
    expected = "1 + 1?\n\n<think>\nOne and one.\n</think>\n\nTwo."
    assert render_conversation(Model(None), [{"role": "system", "content": None}, *TALK[:2]]) == expected


def test_an_answer_without_thoughts_is_the_templates_own() -> None:
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello.", "reasoning_content": ""}]
    for template in (CHAT_TEMPLATE, QWEN3_STYLE):
        model = Model(template)
        assert render_conversation(model, plain) == model.render_chat(plain, add_generation_prompt=False)


def test_thoughts_given_twice_are_one_and_two_different_are_refused() -> None:
    def turn(given: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": "<think>\na\n</think>\nb", "reasoning_content": given}]

    assert render_conversation(Model(None), turn("a")) == "<think>\na\n</think>\n\nb"
    with pytest.raises(InputError, match="message 0 holds two different reasonings"):
        render_conversation(Model(None), turn("c"))


def test_a_date_in_a_template_is_always_the_same() -> None:
    assert render_conversation(Model("{{ strftime_now('%d %B %Y') }}"), TALK[:1]) == "20 January 2025"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content }}{{ m.reasoning_content }}{% endfor %}",
        "{% for m in messages %}{{ m.reasoning_content }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}",
    ],
    ids=["left out", "twice", "thoughts after the answer", "thoughts twice"],
)
def test_a_template_that_does_not_show_a_turn_once_is_refused(template: str) -> None:
    with pytest.raises(InputError, match="does not write message 1 once"):
        render_conversation(Model(template), TALK)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "not a list"),
        ("text", "not a list"),
        (["text"], "message 0 has no role"),
        ([{"content": "x"}], "message 0 has no role"),
        ([*TALK, {"role": "user", "content": 3}], "content of message 4 is not text"),
        ([{"role": "assistant", "content": "x", "reasoning_content": []}], "reasoning_content of message 0"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        render_conversation(Model(CHAT_TEMPLATE), messages)


def test_content_is_split_at_the_first_closing_tag() -> None:
    assert split_thoughts("<think>\na\n</think>\n\nb </think> c") == ("a", "b </think> c")
    assert split_thoughts("a</think>b") == ("a", "b")
    assert split_thoughts("<think>\nnever closed") == ("", "<think>\nnever closed")
    assert split_thoughts("<think>\n\n</think>\n\nb") == ("", "b")
