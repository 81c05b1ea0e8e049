"""Chat templates for Ollama: the Go template writes what the model's own Jinja template writes, and an unknown one is said."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from r1q.models.chat import render_chat
from r1q.models.embedded import EMBEDDED
from r1q.models.tokenizer import Tokenizer
from r1q.ship.chat_formats import recognize
from r1q.ship.facts import ModelFacts
from r1q.ship.modelfile import make_modelfile

BOS, EOS = "<BOS>", "<EOS>"
render_go = cast(
    Callable[[str, Mapping[str, Any]], str],
    runpy.run_path(str(Path(__file__).with_name("go_template.py")))["render_go"],
)
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a \"helper\".<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set head = 'Cutting Knowledge Date: December 2023\n\n' %}"
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\n' + head + system + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
R1_UNOPENED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1]"
    " + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
TALKS = [
    [("user", "Why is 3 > 2?")],
    [("system", "Be {{ brief }}."), ("user", "Why?")],
    [("user", "One"), ("assistant", "Two"), ("user", "Three\n\nfour"), ("assistant", "Five"), ("user", "思考 🤔")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c")],
]


def own_template() -> str:
    template = Tokenizer.open(EMBEDDED).chat_template
    assert template is not None
    return template


TEMPLATES = [
    (own_template(), "DeepSeek-R1", ""),
    (R1_UNOPENED, "DeepSeek-R1", "<think>\n"),
    (CHATML, "ChatML", ""),
    (LLAMA3, "Llama 3", ""),
]


def rendered(template: str, talk: list[tuple[str, str]]) -> str:
    """Return what Jinja makes of a talk."""
    messages = [{"role": role, "content": content} for role, content in talk]
    return render_chat(
        template, {"messages": messages, "add_generation_prompt": True, "bos_token": BOS, "eos_token": EOS}
    )


def go_data(talk: list[tuple[str, str]]) -> dict[str, Any]:
    """Return a talk as Ollama hands it over: the system message by itself too, and a field of every message that may be empty."""
    return {
        "System": next((content for role, content in talk if role == "system"), ""),
        "Messages": [{"Role": role, "Content": content, "Thinking": ""} for role, content in talk],
    }


@pytest.mark.parametrize("talk", TALKS, ids=range(len(TALKS)))
@pytest.mark.parametrize(("template", "name", "forced"), TEMPLATES, ids=["embedded", "r1-unopened", "chatml", "llama3"])
def test_go_writes_what_jinja_writes(template: str, name: str, forced: str, talk: list[tuple[str, str]]) -> None:
    found = recognize(template, bos=BOS, eos=EOS)
    assert found is not None
    assert found.format.name == name
    assert render_go(found.format.go(BOS if found.begins else ""), go_data(talk)) == rendered(template, talk) + forced


@pytest.mark.skipif(shutil.which("go") is None, reason="needs the Go compiler")
def test_go_itself_writes_it_too(tmp_path: Path) -> None:
    """The language's own text/template, all talks in all formats by one program."""
    tasks, expected = [], []
    for template, _, forced in TEMPLATES:
        found = recognize(template, bos=BOS, eos=EOS)
        assert found is not None
        for talk in TALKS:
            tasks.append({"template": found.format.go(BOS if found.begins else ""), "data": go_data(talk)})
            expected.append(rendered(template, talk) + forced)
    thinking = go_data([("user", "q"), ("assistant", "")])
    thinking["Messages"][1]["Thinking"] = "so far"
    tasks.append({"template": tasks[0]["template"], "data": thinking})
    expected.append(f"{BOS}<｜User｜>q<｜Assistant｜><think>\nso far\n</think>\n\n")
    done = subprocess.run(
        ["go", "run", str(Path(__file__).with_name("template.go"))],
        input=json.dumps(tasks).encode(), capture_output=True, check=False, timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == expected


def test_a_beginning_that_is_also_chatmls_own_is_chatml() -> None:
    found = recognize(CHATML, bos="<|im_start|>", eos="<|im_end|>")
    assert found is not None
    assert (found.format.name, found.begins) == ("ChatML", False)


def test_a_thought_that_is_going_on_is_written_out() -> None:
    found = recognize(own_template(), bos=BOS, eos=EOS)
    assert found is not None
    data = {
        "System": "",
        "Messages": [
            {"Role": "user", "Content": "q", "Thinking": ""},
            {"Role": "assistant", "Content": "", "Thinking": "so far"},
        ],
    }
    assert render_go(found.format.go(), data) == "<｜User｜>q<｜Assistant｜><think>\nso far\n</think>\n\n"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}",
        CHATML.replace("'\\n' }}{% endfor", "'\\n\\n' }}{% endfor").replace("<|im_end|>' +", "<|im_end|> ' +"),
        "{{ raise_exception('no') }}",
        "{% for",
        CHATML.replace('You are a "helper".', "{{ '{' }}{ .System }}"),
        CHATML.replace('"helper"', '"""'),
    ],
    ids=["llama2", "one-space-more", "refuses", "malformed", "go-inside", "quotes-inside"],
)
def test_what_is_not_known_is_not_guessed(template: str) -> None:
    assert recognize(template, bos=BOS, eos=EOS) is None


def facts(template: str | None, *, adds_bos: bool = True) -> ModelFacts:
    return ModelFacts(
        temperature=0.6, top_p=0.95, bos=BOS, eos=EOS, adds_bos=adds_bos, template=template, context=4096, cache_bytes=1
    )


def test_an_unknown_template_is_said_and_left_out() -> None:
    made = make_modelfile(facts("{{ messages }}"), "m.gguf", context=2048)
    assert "TEMPLATE" not in made.text
    assert made.format is None
    assert "none of DeepSeek-R1's, ChatML and Llama 3" in made.notes[0]


def test_the_beginning_of_text_is_written_where_nobody_else_does() -> None:
    assert BOS not in make_modelfile(facts(LLAMA3), "m.gguf", context=2048).text
    assert f'TEMPLATE """{BOS}' in make_modelfile(facts(LLAMA3, adds_bos=False), "m.gguf", context=2048).text
    assert BOS not in make_modelfile(facts(CHATML, adds_bos=False), "m.gguf", context=2048).text


def test_a_modelfile_is_what_ollamas_grammar_reads() -> None:
    """Instructions at line beginnings, one value each; a value in three quotes goes on to the next three."""
    text = make_modelfile(facts(own_template()), "m.gguf", context=2048).text
    left, quoted = text.split('TEMPLATE """')
    assert quoted.endswith('"""\n')
    assert quoted.count('"""') == 1
    lines = [line.split(" ", 2) for line in left.splitlines()]
    assert lines[0] == ["FROM", "./m.gguf"]
    settings = [(key, value) for word, key, value in lines[1:] if word == "PARAMETER"]
    assert len(settings) == len(lines) - 1
    assert settings[:3] == [("temperature", "0.6"), ("top_p", "0.95"), ("num_ctx", "2048")]
    assert {key for key, _ in settings[3:]} == {"stop"}
