"""Text from files: nothing of it acts on a terminal, and nothing of it is hidden."""

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from r1q.core.untrusted import printable


def test_escape_sequences_are_shown_and_not_obeyed() -> None:
    assert printable("\x1b[2J\x1b]0;title\x07x") == "␛[2J␛]0;title␇x"
    assert printable("a\x7f\x9bb\ud800") == "a␡\ufffdb\ufffd"
    assert printable("safe\u202egnp.exe") == "safe\ufffdgnp.exe"
    assert printable("a\r\nb\n\tc", lines=True) == "a\nb\n\tc"
    assert printable("over\rwritten", lines=True) == "over␍written"
    assert printable("a\n\n b\u2028c") == "a b c"


@given(st.text(st.characters(), max_size=80), st.booleans())
def test_whatever_comes_in_what_goes_out_can_be_printed(text: str, lines: bool) -> None:
    shown = printable(text, lines=lines)
    io.TextIOWrapper(io.BytesIO(), encoding="utf-8").write(shown)
    controls = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs")}
    assert controls <= ({"\n", "\t"} if lines else set())
    assert printable(shown, lines=lines) == shown


def test_ordinary_text_is_untouched() -> None:
    text = "<｜User｜> naïve 日本語 👩‍🔬 {% if x %}"
    assert printable(text) == text
