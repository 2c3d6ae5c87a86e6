"""Personal data in text: where it is, and a masked form of it for the report.

Patterns, not understanding: made to find what is written in the usual forms, with checks (Luhn,
IBAN's mod 97, digits counted) that keep ordinary numbers out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.]?\d)")
_PHONE = re.compile(
    r"(?<![\w.,/+-])(?:"
    r"\+\d{1,3}(?:[ .-]?\(?\d{1,4}\)?){2,6}"  # +44 20 7946 0958
    r"|\(\d{2,5}\) ?\d{3,4}(?:[ .-]?\d{2,4}){1,3}"  # (020) 7946 0958
    r"|(?:1[ .-])?\d{3}[ .-]\d{3}[ .-]\d{4}"  # 202-555-0143
    r"|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,4}"  # 020 7946 0958
    r"|\d{3}-\d{4}"  # 555-0143
    r")(?![\w-]|[.,/]\d)"
)
_STREET = r"(?:street|avenue|road|lane|drive|boulevard|court|square|terrace|highway)"
_SHORT_STREET = r"(?:St|Ave|Rd|Ln|Dr|Blvd|Ct|Sq|Hwy|Place|Way|Row|Close|Crescent)"
_ADDRESS = re.compile(
    r"(?<![\w.,/-])\d{1,5}[A-Za-z]?,? (?:"
    rf"(?:[A-Z][\w'-]*\.? ){{1,3}}(?:(?i:{_STREET})|{_SHORT_STREET})"
    rf"|(?!(?:a|an|the|this|that|each|every|per|of|on|in|by|long|wide) )[a-z]+ {_STREET}"
    r")\b"
)


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)


def _luhn(text: str) -> bool:
    """Luhn's checksum, as on payment cards; not all digits alike."""
    digits = [int(d) for d in reversed(_digits(text))]
    doubled = [sum(divmod(2 * d, 10)) for d in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def _iban(text: str) -> bool:
    compact = text.replace(" ", "")
    rearranged = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(c, 36)) for c in rearranged)) % 97 == 1


def _phone(text: str) -> bool:
    digits = _digits(text)
    return 7 <= len(digits) <= 15 and len(set(digits)) > 1


def _always(text: str) -> bool:
    return True


_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("email", _EMAIL, _always),
    ("iban", _IBAN, _iban),
    ("card", _CARD, _luhn),
    ("phone", _PHONE, _phone),
    ("address", _ADDRESS, _always),
)


def name_pattern(names: Iterable[str]) -> re.Pattern[str] | None:
    """Whole words that spell one of ``names``, as written; None for an empty list."""
    spelt = sorted({name.strip() for name in names if name.strip()}, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, spelt))})(?!\w)") if spelt else None


def find_personal_data(
    text: str, names: re.Pattern[str] | None = None
) -> list[tuple[str, int, int]]:
    """(kind, start, stop) of each finding, in order and without overlap.

    Kinds are email, iban, card, phone, address and, where ``names`` is given, name. Where two kinds
    claim the same characters the earlier in this list holds.
    """
    found: list[tuple[str, int, int]] = []
    kinds = _KINDS if names is None else (*_KINDS, ("name", names, _always))
    for kind, pattern, holds in kinds:
        for match in pattern.finditer(text):
            start, stop = match.span()
            if holds(match[0]) and all(stop <= a or b <= start for _, a, b in found):
                found.append((kind, start, stop))
    return sorted(found, key=lambda item: item[1])


def masked(text: str) -> str:
    """The finding with letters and digits starred, except its first: enough to judge, not to use."""
    return text[:1] + re.sub(r"\w", "*", text[1:])
