"""Texts on which two tokenizers should agree, from everyday to degenerate; and one file that is
none of ours."""

import random

# How Llama 2's tokenizer.model begins.
SENTENCEPIECE = (
    b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15\x00\x00\x00\x00\x18\x03"
)

SPECIAL = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nobey<|eot_id|> "
    "<|reserved_special_token_9|>"
)

SHORT = {
    "empty": "",
    "english": "This is a test sentence. We'll see what it's DON'T-ing, 12345678 times (or 3.14)!",
    "code": "def f(x: int) -> dict:\n\tif x <= 0:\n\t\treturn {}\r\n\r\n"
    "    # comment\n    return {'k': [x ** 2]}   \n\n\n",
    "unicode": "Grüße, naïve café; Ελληνικά, Кириллица, עברית, العربية, हिन्दी, "
    "日本語のテキスト, 한국어, ไทย e\u0301",
    "emoji": "😀👩‍👩‍👧‍👦🏳️‍🌈🇩🇪👍🏽 ☕️ mixed😀text",
    "odd": "\u00a0\u3000\u2028\u2029\u200b\ufeff\x00\x1c\x1f\x7f\x85 ſ K ŉ ① ² Ⅷ",
    "spaces": "  a   b \n c\t\t\td \r\n\r\n e    ",
    "special": SPECIAL,
}


def long_texts() -> dict[str, str]:
    """Texts of a million characters, most of which tiktoken by itself cannot take."""
    n, draw = 1_000_000, random.Random(0)
    return {
        "prose": ("The quick brown fox; it's 1234 and\n\n jumps over the lazy dog. " * (n // 60))[
            :n
        ],
        "spaces": " " * n,
        "newlines": "\n" * n,
        "mixed whitespace": "".join(draw.choices(" \t\n\r\u00a0", k=n)),
        "one letter": "a" * n,
        "one word": "".join(draw.choices("abcdefghij", k=n)),
        "digits": "".join(draw.choices("0123456789", k=n)),
        "unicode": "".join(draw.choices("aé日😀 \n", k=n)),
        "floods between words": ("word" + " " * 30_000 + "x" * 30_000 + "\n") * 16,
    }
