"""Whether a text answers with a target, in any script."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

import regex


def answers(text: str, target: str) -> bool:
    """Whether a text begins with the target.

    Both are put into Unicode's NFKC and case-folded, so that composed and decomposed, full-width and plain letters are alike
    (but 10⁵ is not 105), and taken apart into units; the text must begin with the target's, and the last of them must end
    there. A unit is a word with its combining marks; a number with its sign, decimals and thousands ("1,000" and "1 000" are
    "1000"); a run of symbols that carry meaning ("++", "€", "%", "°"; "#", "&" and "@" beside a letter or digit); and where
    scripts write without spaces (Han, Hiragana, Thai, Lao, Khmer, Burmese) a letter with its marks. Initials with full stops
    are one word ("U.S." is "US", "J. R. R." is "J.R.R."), and "No. 5" is a number's sign and a number. All other punctuation is
    no unit, so that "New-York City!" begins with "new york". The last unit ends before a space, the end, another script, and
    punctuation that parts words (a comma, a bracket, a dash, a full stop before a capital). It does not end where a symbol, or
    one hyphen, apostrophe, slash, colon of a time or full stop inside a word or number, joins it to what follows: "Paris-born"
    is not "Paris", "O'Brien" not "O", "Alice's" not "Alice", "C#" neither "C" nor "C++", "km/h" not "km", "19.87" not "19",
    "1914–18" not "1914". A number is another one before a currency, a percentage or a word of magnitude: neither "5 %" nor
    "5 million" begins with "5", but "5 km" does. A Korean word may end in a particle. Articles count.
    """
    said, wanted = _units(text), _units(target)
    if not wanted:
        return text.strip().startswith(target.strip())
    n = len(wanted)
    if len(said) < n or [unit.text for unit in said[: n - 1]] != [unit.text for unit in wanted[:-1]]:
        return False
    last, end = said[n - 1], wanted[-1]
    if last.text != end.text:
        return bool(last.text.startswith(end.text) and _KOREAN_PARTICLE.fullmatch(last.text, len(end.text)))
    changed = n < len(said) and last.is_number and said[n].changes_numbers
    return not (last.joined or changed)


def exact(text: str, target: str) -> bool:
    """Whether a text is the target and nothing else: the same units, as :func:`answers` takes them."""
    said, wanted = ([unit.text for unit in _units(words)] for words in (text, target))
    return said == wanted if said or wanted else text.strip() == target.strip()


@dataclass(frozen=True)
class _Unit:
    text: str
    joined: bool  # to the next unit

    @property
    def is_number(self) -> bool:
        return self.text[-1].isdigit()

    @property
    def changes_numbers(self) -> bool:
        """Whether a number before it is another one."""
        return _CHANGES_NUMBERS.match(self.text) is not None


# "ー" lengthens a vowel in Hiragana too, and Thai and Lao have vowels behind their consonant that Unicode counts as letters.
_UNSPACED = r"[\p{L}&&[\p{Script=Han}\p{Script=Hiragana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]]"
_BEHIND = r"[\p{M}ー\u0e30\u0e32\u0e33\u0e45\u0e46\u0eb0\u0eb2\u0eb3\u0ebd\u0ec6]"
#: A letter, mark or digit of a word that is written with spaces around it.
WORD = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{_UNSPACED}--[\p{{Script=Katakana}}ー]]"
_UNIT = regex.compile(
    rf"""
    (?P<number>(?:(?<![\p{{L}}\p{{M}}\p{{N}})])-)?(?>\d{{1,3}}(?:[ ]\d{{3}})+(?![\d.,]*\d)|\d+(?:[.,]\d+)*)(?!{WORD}))
    |(?P<unspaced>{_UNSPACED}{_BEHIND}*|[\p{{Script=Katakana}}ー]+\p{{M}}*)
    |(?P<word>{WORD}+)
    |(?P<symbols>[\p{{Sc}}%‰°№±×÷√∞≈≠≤≥+]+|(?<=[\p{{L}}\p{{M}}\p{{N}}])[#&@^]+|[#&@^]+(?=[\p{{L}}\p{{N}}])|[<>=~]+(?=\d))
    """,
    regex.VERBOSE | regex.V1,
)
_CHANGES_NUMBERS = regex.compile(
    r"[\p{Sc}%‰°]|[十百千万萬億亿兆만억]|(?:hundred|thousand|million|billion|trillion|milliard|dozen|lakh|crore|percent|[mbt]n$)"
    r"|mill(?:ones|iarden|ionen|ions|ón)$|тысяч|миллион|миллиард"
)
#: What a Korean word may end in.
KOREAN_PARTICLE = (
    "(?:은|는|이|가|을|를|의|와|과|도|만|이나|나|이며|며|이고|고|이다|다|입니다|이에요|예요|이었다|였다|이었습니다|였습니다"
    "|(?:에서|에게|에|으로|로|까지|부터|이라고|라고)(?:는|도|만|의)?)"
)
_KOREAN_PARTICLE = regex.compile(KOREAN_PARTICLE)
# Not numbers' own: those are in their units.
_JOINING = regex.compile(r"[-–'/_·⁄\u05f3\u05f4]")
_UNITS_OF_MEASURE = r"(?:[kcmn]m|[km]g|[kmg]?hz|[kmgt]b|[kmg]w|mph|kph|ft|lbs?|ha|ml|min|[mbt]n)"


def _units(text: str) -> list[_Unit]:
    text = _prepared(text)
    matches = list(_UNIT.finditer(text))
    return [_Unit(_folded(match), _joined(text, match, after)) for match, after in zip(matches, [*matches[1:], None])]


def _prepared(text: str) -> str:
    text = regex.sub(r"[²³¹⁰⁴-⁹]+", r"^\g<0>", text)
    text = regex.sub(r"\p{Cf}", "", unicodedata.normalize("NFKC", text))
    text = text.translate(_ALIKE)
    # Initials: J. R. R. → JRR, the next word apart from them.
    text = regex.sub(r"(?<![\p{L}\p{N}])(?:\p{L}\.\s?){2,}", _without_stops, text)
    text = regex.sub(r"(?i)(?<![\p{L}\p{N}])no\.?\s*(?=\d)", "№ ", text)
    text = regex.sub(r"(?<=\s)&(?=\s)", "and", text)
    return regex.sub(rf"(?i)(?<=\d)(?={_UNITS_OF_MEASURE}(?![\p{{L}}\p{{N}}]))", " ", text)


_ALIKE = str.maketrans({"−": "-", "‐": "-", "‑": "-", "’": "'", "ʼ": "'", "‘": "'"})


def _without_stops(initials: regex.Match[str]) -> str:
    letters = regex.sub(r"[.\s]", "", initials.group())
    return letters + " " * initials.group()[-1].isspace()


def _folded(unit: regex.Match[str]) -> str:
    if unit.lastgroup == "number":
        number = "".join(str(unicodedata.decimal(char)) if char.isdecimal() else char for char in unit.group())
        grouped = regex.fullmatch(r"-?\d{1,3}(?:([, ])\d{3})(?:\1\d{3})*(?:\.\d+)?", number)
        return regex.sub(r"[, ]", "", number) if grouped else number
    return unicodedata.normalize("NFKC", unit.group().casefold())


def _joined(text: str, unit: regex.Match[str], after: regex.Match[str] | None) -> bool:
    """Whether a unit does not end before the next."""
    if after is None:
        return False
    gap, before, first = text[unit.end() : after.start()], text[unit.end() - 1], text[after.start()]
    if gap == "":
        return "unspaced" not in (unit.lastgroup, after.lastgroup)
    if gap == ".":
        return first.islower() or (before.isdigit() and first.isdigit())
    if gap in (":", ","):
        return before.isdigit() and first.isdigit()
    return _JOINING.fullmatch(gap) is not None and after.lastgroup != "symbols"
