"""Text as routing compares it: normalisation, term matching, and bounds on regular expressions. Pure functions.

Descriptions come in any language, any spelling and from any peer, so both sides are brought to one form, and every
search is bounded. Decoding by Specific Character Set (PS3.5 6.1) is done before: here all text is `str`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

MAX_TEXT = 1024
"""Characters of one value that are looked at. The longest text value of PS3.5 that describes a study, LO, has 64."""
MAX_WORDS = 256
"""The same for the words of the evidence table, of which there are hundreds."""
_TEXT_BY_REPEATS = (MAX_TEXT, MAX_TEXT, 256, 128)
"""The same for a pattern with so many unbounded repeats: its time is a polynomial of that degree, plus one."""
MAX_REPEATS = len(_TEXT_BY_REPEATS) - 1
"""Unbounded repeats (`*`, `+`, `{n,}`, or a bound above 16) that one pattern may have."""
MAX_PATTERN = 2048

_ALPHABETIC = r"a-z\u0370-\u03ff\u0400-\u04ff"
"""Scripts written with spaces: Latin (normalised), Greek, Cyrillic. CJK is not: its terms match as substrings."""
_HANGUL = r"\uac00-\ud7a3"
_LETTERS_WITHOUT_DECOMPOSITION = str.maketrans(
    {"ı": "i", "ł": "l", "ø": "o", "đ": "d", "æ": "ae", "œ": "oe", "ð": "d", "þ": "th"}
)


def strip_diacritics(text: str) -> str:
    """Drop accents, keep everything else. Only U+0300..U+036F: the marks of kana are part of the letter."""
    decomposed = unicodedata.normalize("NFD", text)
    return unicodedata.normalize("NFC", "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f"))


def fold(text: str) -> str:
    """For "equal, case-folded": NFKC, case-folded, white space collapsed. Accents and punctuation stay."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalise(text: str) -> str:
    """NFKC, case-folded, no accents, punctuation collapsed to one space: `Nieren^Läsion_re.` -> `nieren lasion re`."""
    folded = unicodedata.normalize("NFKC", text[:MAX_TEXT]).casefold()
    plain = strip_diacritics(folded).translate(_LETTERS_WITHOUT_DECOMPOSITION)
    return " ".join("".join(c if c.isalnum() else " " for c in plain).split())


def words(text: str) -> str:
    """As `normalise`, with `LiverDyn` taken apart: protocol names are often written in one word."""
    return normalise(re.sub(r"(?<=[a-zà-öø-ÿ])(?=[A-ZÀ-ÖØ-Þ])", " ", text[:MAX_WORDS]))


def term_pattern(term: str) -> str:
    """A term of `terms.py` as a regular expression over normalised text.

    A term in an alphabetic script stands for a whole word, `*` for any further letters: "renal" is not in "adrenal",
    "niere*" is in "nierensonographie". Digits are no letters: "liver" is in "liver3d". A term in Chinese or Japanese
    is a substring; so is a Korean one of two or more syllables.
    """
    body = re.escape(term).replace(r"\*", f"[{_ALPHABETIC}]*").replace(r"\ ", " ")
    if re.search(f"[{_ALPHABETIC}]", term):
        return f"(?<![{_ALPHABETIC}]){body}(?![{_ALPHABETIC}])"
    if re.fullmatch(f"[{_HANGUL}]", term):
        return f"(?<![{_HANGUL}]){body}(?![{_HANGUL}])"
    return body


def terms_pattern(terms: Iterable[str]) -> re.Pattern[str]:
    """One pattern for many terms; the longest is tried first, so the match that is shown is the most specific."""
    ordered = sorted(set(terms), key=lambda t: (-len(t), t))
    return re.compile("|".join(map(term_pattern, ordered)))


def unsafe_regex(pattern: str) -> str:
    """Why this pattern is refused, or "" when it is not.

    Python's engine backtracks and cannot be interrupted, and the text comes from the network. Time exponential in the
    text needs a repeated group that holds a repeat or alternatives, `(a+)*`, `(a|aa)+`: refused. What remains is
    polynomial, and bounded by `MAX_REPEATS` and the length of the text.
    """
    if len(pattern) > MAX_PATTERN:
        return f"longer than {MAX_PATTERN} characters"
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        return f"not a regular expression ({e})"
    if "(?P=" in pattern or re.search(r"\\[1-9]", pattern):
        return "back-references take exponential time on hostile text"
    repeats, nested = _repeats(pattern)
    if nested:
        return "a repeated group holds a repeat or alternatives, which takes exponential time on hostile text"
    if repeats > MAX_REPEATS:
        return f"more than {MAX_REPEATS} unbounded repeats (*, +)"
    return ""


_TOKEN = re.compile(
    r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\((?:\?(?:P<\w+>|P=\w+\)|#[^)]*\)|[a-zA-Z-]+[:)]|<?[=!]|:|>))?|"
    r"\{\d*,?\d*\}|[*+?|)]|.",
    re.DOTALL,
)


def _repeats(pattern: str) -> tuple[int, bool]:
    """How many unbounded repeats, and whether one of them is around a group that itself repeats or branches."""
    unbounded, nested = 0, False
    open_groups: list[bool] = [False]  # per open group: does it hold a repeat or alternatives?
    last_is_complex = False  # does the item just read hold one?
    for part in _TOKEN.findall(pattern):
        if part.startswith("(") and not part.endswith(")"):
            open_groups.append(False)
        elif part == ")" and len(open_groups) > 1:
            last_is_complex = open_groups.pop()
            open_groups[-1] |= last_is_complex
        elif part == "|":
            open_groups[-1] = True
        elif part in ("*", "+", "?") or re.fullmatch(r"\{\d*,\d*\}|\{\d+\}", part):
            if part in ("*", "+") or part.endswith(",}") or _bound(part) > 16:
                unbounded += 1
                nested |= last_is_complex
            elif part != "?":
                nested |= last_is_complex  # {2,50} of a complex group is as bad as *
            open_groups[-1] = True
        else:
            last_is_complex = False
    return unbounded, nested


def _bound(token: str) -> int:
    return max((int(n) for n in re.findall(r"\d+", token)), default=0)


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> tuple[tuple[re.Pattern[str], ...], int]:
    """The pattern as written and without accents, and how much text it may see. () for a refused one."""
    if unsafe_regex(pattern):
        return (), 0
    limit = _TEXT_BY_REPEATS[_repeats(pattern)[0]]
    written = unicodedata.normalize("NFC", pattern)
    return tuple(re.compile(p, re.IGNORECASE) for p in dict.fromkeys((written, strip_diacritics(written)))), limit


def regex_found(pattern: str, text: str) -> bool:
    """Search in the text as sent and in its normalised form: a pattern may rely on either. Case never matters."""
    patterns, limit = _compiled(pattern)
    forms = dict.fromkeys((unicodedata.normalize("NFC", text[:limit]), normalise(text)[:limit]))
    return any(p.search(form) for p in patterns for form in forms)
