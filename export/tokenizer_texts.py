"""The texts on which two tokenizers are compared: every kind of character that pre-tokenizers treat apart, in many orders.

Fixed: the same texts on every machine, so that a proof can be repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

SEED = 20250120  # the day DeepSeek-R1 came out; any other number would do
_TEXTS = 1500
_PIECES: tuple[tuple[str, ...], ...] = (
    # words
    ("the", "Quantization", "reasoning", "I", "HELLO", "camelCaseWord", "iPhone", "snake_case_name", "don",
     "re", "a"),
    # contractions
    ("'s", "'S", "'t", "'T", "'re", "'RE", "'Re", "'ve", "'VE", "'m", "'M", "'ll", "'LL", "'d", "'D", "'x",
     "’s", "''s"),
    # numbers
    ("0", "7", "42", "123", "1234", "31415926535", "1000000000000000", "3.14", "1,000.50", "2025-01-20", "0x1F",
     "1e-5", "½", "²³"),
    # spaces
    (" ", "  ", "   ", "       ", "                 ", "\u00a0", "\u3000", "\u2003", " \u00a0 "),
    # line ends
    ("\n", "\n\n", "\n\n\n\n", "\r\n", "\r\n\r\n", "\r", "\t", "\t\t\t", " \n", "\n ", "  \n  ", "\t\n\t",
     "\n\t ", " \t "),
    # marks
    ("!", "?!", "...", "…", "--", "—", "()", "[](", "{}", "\"'", "'''", "`", "```", "@#$%^&*", "//", "\\", "<",
     ">>", "|", "~", "_", "__"),
    # Chinese, Japanese, Korean
    ("你好", "世界", "量化模型", "推理，很重要。", "「引用」", "中文English混合123", "ひらがな", "カタカナ",
     "日本語のテキスト", "한국어", "안녕하세요"),
    # other scripts
    ("Привет", "нещо на Български", "Ελληνικά", "עברית", "العربية", "١٢٣٤", "हिन\u094dदी", "नमस\u094dते", "ไทย",
     "កាន់តែ", "தமிழ\u0bcd", "ქართული", "Հայերեն"),
    # composed and combining
    ("é", "e\u0301", "naïve", "n\u0303", "Ångström", "A\u030a", "ﬁ", "ǅ", "ß", "İ", "ı", "Việt Nam",
     "q\u0307\u0323", "\u0301"),
    # emoji
    ("🚀", "😶\u200d🌫️", "👨\u200d👩\u200d👧\u200d👦", "👍🏽", "🇩🇪", "✅", "❤️", "🦙🦙", "\u200d", "1️⃣",
     "🏴\u200d☠️"),
    # mathematics
    ("∑", "∫", "√2", "≤", "≠", "α+β", "x²", "→", "⇒", "ℝ", "€", "£", "₹", "°", "±", "×", "÷", "∀x∈S",
     "\\frac{a}{b}", "$x^2$"),
    # code
    ("def f(x):", "return x**2", "    if x == 0:", "for(int i=0;i<n;++i)", "x+=1;", "#include <stdio.h>",
     "std::vector<int>", "=>", "!=", "&&", "</div>"),
    # addresses
    ("http://example.org/a?b=1&c=%20", "user@example.org", "C:\\dir\\file.txt", "v1.2.3-rc4", "#tag", "@name",
     "50%", "$9.99", "a/b", "and/or"),
    # invisible
    ("\u200b", "\ufeff", "\u2028", "\u0085", "\x0b", "\x0c", "\x7f", "\x01", "\u2060", "\ue000", "\U000e0001",
     "\u00ad"),
)  # fmt: skip


def proof_texts(special: Sequence[str] = ()) -> list[str]:
    """Return the texts: every piece alone and between others, seeded mixtures, and the spelling of `special` tokens in context."""
    chance = random.Random(SEED)
    pieces = [piece for group in _PIECES for piece in group]
    texts = [
        text for piece in pieces for text in (piece, f" {piece}", f"a{piece}", f"{piece} a", f"{piece}1", f"{piece}\n")
    ]
    for _ in range(_TEXTS):
        groups = [chance.choice(_PIECES) for _ in range(chance.randint(2, 14))]
        joints = ["", "", " ", chance.choice(["\n", "  ", " \n", "\t"])]
        texts.append("".join(chance.choice(group) + chance.choice(joints) for group in groups))
    for length in range(1, 21):
        texts += ["9" * length, "x" + " " * length + "y", " " * length, "\n" * length + "z", "-" * length]
    for token in special[:64]:
        texts += [token, f"a{token}b", f"{token}{token}", f"Hi {token}\nthere", f"{token[:-1]}", f"{token[1:]} {token}"]
    return texts
