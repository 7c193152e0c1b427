"""Normalisation, terms and bounded regular expressions."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.route import terms
from dicom_node.route.text import fold, normalise, regex_found, terms_pattern, unsafe_regex, words

ALL_TERMS = [
    *(t for group in terms.WORDS.values() for t in group),
    *terms.WORDS_ELSEWHERE,
    *terms.WORDS_BLANKED,
    *terms.WORDS_EXCLUDED,
    *terms.CONTRAST_WORDS,
    *terms.NO_CONTRAST_WORDS,
    *terms.CONTRAST_BOTH,
    *terms.CONTRAST_BLANKED,
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nieren^Läsion_re.", "nieren lasion re"),
        ("ＫＩＤＮＥＹ", "kidney"),  # full width, as Japanese and Chinese consoles send it
        ("Straße", "strasse"),
        ("BÖBREK ULTRASONU", "bobrek ultrasonu"),
        ("wątroba łódź", "watroba lodz"),
        ("ガド造影", "ガド造影"),  # the voiced mark is part of the letter, no accent
        ("ｶﾞﾄﾞ", "ガド"),
        ("갑상선 초음파", "갑상선 초음파"),
        ("  -- ", ""),
        ("τῆς νεφροῦ", "τησ νεφρου"),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == unicodedata.normalize("NFC", expected)


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once


def test_words_take_protocol_names_apart() -> None:
    assert words("t1_LiverDyn+C") == "t1 liver dyn c"


@pytest.mark.parametrize("term", sorted(set(ALL_TERMS)))
def test_terms_are_written_normalised(term: str) -> None:
    """A term in another form could never match and nobody would notice."""
    assert normalise(term.replace("*", "")) == term.replace("*", "")


@pytest.mark.parametrize(
    ("term", "text", "hit"),
    [
        ("renal*", "adrenal", False),
        ("renal*", "renale", True),
        ("liver", "liver3d", True),
        ("liver", "deliver", False),
        ("*biops*", "leberbiopsie", True),
        ("肾", "ceus肾占位", True),
        ("간", "시간", False),
        ("간", "간 mri", True),
        ("почк*", "надпочки", False),
        ("du rein", "irm du rein gauche", True),
        ("reins", "dubrovnik reinsberg", False),
    ],
)
def test_a_term_is_a_whole_word_or_a_substring(term: str, text: str, hit: bool) -> None:
    assert bool(terms_pattern([term]).search(text)) is hit


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("kidney tumou?r", "US KIDNEY TUMOR"),
        ("Nierenläsion", "NIERENLASION"),  # accent in the pattern only
        ("nierenlasion", "Nieren-Läsion".replace("-", "")),  # accent in the text only
        ("renal mass", "RENAL_MASS"),
        ("肾肿瘤", "双肾肿瘤造影"),
        ("^us", "US abdomen"),
        (r"mass\b", "renal mass."),
    ],
)
def test_a_regex_is_searched_in_the_raw_and_in_the_normalised_text(pattern: str, text: str) -> None:
    assert regex_found(pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+$", "(a|aa)+$", "(?:a{2,})*", "(?P<n>a?)*x", "((a*)b)*", "(a{1,3}){2,30}", "(?=a+)+", r"(a)\1+"),
        *("a*a*a*a*b", "(", "a" * 3000, r"(?P<x>a)(?P=x)"),
    ],
)
def test_patterns_that_could_run_for_ever_are_refused(pattern: str) -> None:
    assert unsafe_regex(pattern)
    assert not regex_found(pattern, "aaaa")


@pytest.mark.parametrize(
    "pattern",
    [
        *("renal mass|kidney tumou?r|肾肿瘤", r"\bmass\b", "(ab)?c", "[(*+]+x", r"\(a\)*", ".*liver.*dyn", "(foo|bar)"),
        *("^US (left|right)? ?kidney", r"[0-9]{1,3} ?mm", "(?i:ccRCC)", "(?#note+)a+", "x{2}", "[]a]+", "(?!no )mass"),
    ],
)
def test_ordinary_patterns_are_accepted(pattern: str) -> None:
    assert unsafe_regex(pattern) == ""


@pytest.mark.parametrize("pattern", ["a*a*a*b", "a+a+b", ".*a.*b.*c", "a*b"])
def test_what_is_accepted_is_quick_on_hostile_text(pattern: str) -> None:
    started = time.process_time()
    assert not regex_found(pattern, "a" * 1_000_000)
    assert time.process_time() - started < 2


@pytest.mark.filterwarnings("ignore:Possible:FutureWarning")
@given(st.text(alphabet="a(|)*+?{},1[]\\^-", max_size=24))
def test_the_check_of_patterns_itself_never_fails(pattern: str) -> None:
    assert isinstance(unsafe_regex(pattern), str)


def test_fold_keeps_accents_but_not_case_or_width() -> None:
    assert fold(" LiVEr  Läsion ") == "liver läsion"
    assert fold("ＵＳ") == "us"
