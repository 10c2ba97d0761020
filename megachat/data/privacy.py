"""Masks what leads to a person: addresses and numbers, told from all other numbers by their own rules.

FineWeb (Penedo et al., 2024, https://arxiv.org/abs/2406.17557) masks e-mail and public IP addresses; here are
telephone numbers, Chinese identity numbers and bank cards too. Masking too much destroys text: so whatever
has a check digit must have a right one, and what looks like a version, a date, a hash or code stays. In code
itself more stays: `W@x.grad` is a product there, and eleven digits are a number without a +86 before them.

Each pattern begins with one class of characters and repeats at most so and so often: then Python's `re` skips
quickly to where it may match, and no text, however hostile, takes it more than linear time.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from datetime import date

from megachat.config import Config

_LOCAL = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._%+-"
_address = re.compile(
    r"@((?:[A-Za-z0-9][A-Za-z0-9-]{0,62}\.){1,8}(?:[A-Za-z]{2,18}|xn--[A-Za-z0-9-]{2,59}))"
    r"(?![A-Za-z0-9_(=\[-]|\.[A-Za-z0-9_])"
)
_COMMON = re.compile("com|org|net|edu|gov|mil|int|info|biz|io|ai|dev|app|me|name|[a-z]{2}")
"""Top-level domains that no attribute in code is called."""
_RESERVED = ("example", "test", "invalid", "localhost", "local", "internal")
"""Top-level domains that nobody has (RFC 2606 and 6761)."""

# The lookbehinds stand behind the first character, which leaves that to be skipped to. Each says that a
# number does not go on to the left; only ASCII counts, for a Chinese word may touch a number.
_digits = re.compile(r"[0-9](?:[ .()（）-]{0,2}[0-9]){9}")
_ipv4 = re.compile(r"[0-9](?<![0-9A-Za-z_.+-].)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?![0-9A-Za-z_]|\.[0-9A-Za-z_])")
_ipv6 = re.compile(
    r"[23](?<![0-9A-Za-z_:.-].)[0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?:[0-9A-Fa-f]|(?<=::))"
    r"(?![0-9A-Za-z_]|:[0-9A-Za-z_:])"
)
_port = re.compile(r":[0-9]{2,5}(?![0-9])|/[0-9]{1,2}(?![0-9])")
_NETWORK = (
    "ip",
    "address",
    "host",
    "server",
    "dns",
    "ping",
    "gateway",
    "//",
    "地址",
    "服务器",
    "主机",
    "网关",
)
_VERSION = {
    "v",
    "ver",
    "version",
    "release",
    "section",
    "chapter",
    "rfc",
    "oid",
    "build",
    "firmware",
    "update",
}
_VERSION_SIGNS = ("=", "~", "^", "/", "版", "版本", "第", "节", "章", "§")

_identity = re.compile(
    r"[1-8](?<![0-9A-Za-z_./+-].)[0-9]{5}[ -]?(?:18|19|20)[0-9]{6}[ -]?[0-9]{3}[0-9Xx](?![0-9A-Za-z_])"
)
_PROVINCES = {
    *range(11, 16), *range(21, 24), *range(31, 38), *range(41, 47), *range(50, 55), *range(61, 66),
    71, 81, 82, 83,
}  # fmt: skip
_card = re.compile(
    r"[2-6](?<![0-9A-Za-z_./+-].)(?:[0-9]{3}(?:[ -]?[0-9]{4}){3}(?:[ -]?[0-9]{1,3})?"
    r"|(?<=3)[47][0-9]{2}[ -]?[0-9]{6}[ -]?[0-9]{5})(?![0-9A-Za-z_])"
)
_issuer = re.compile(r"4|5[1-5]|2(?:22[1-9]|2[3-9]|[3-6]|7[01]|720)|3[47]|35|6(?:011|4[4-9]|5|2)")
_mobile = re.compile(
    r"1(?:3[0-9]|4[5-9]|5[0-35-9]|6[2567]|7[0-8]|8[0-9]|9[0-35-9])(?:-?[0-9]{8}|[ -][0-9]{4}[ -][0-9]{4})"
    r"(?![0-9A-Za-z_])"
)
_prefix = re.compile(r"(?:\+|00|(?<![0-9A-Za-z_.]))86[ -]?$|[(（]\+?86[)）][ -]?$")
_phone = re.compile(
    r"[+(（0-9](?<![0-9A-Za-z_./)）*#+-].)(?:"
    r"(?<=\+)[1-9](?:[ .()-]{0,2}[0-9]){9,13}"  # international: +44 20 7946 0958
    r"|(?<!=.)(?:"  # tel=+44... is one, x=415-555-2671 may be arithmetic
    r"(?<=\()[2-9][0-9]{2}\)[ -]?[2-9][0-9]{2}[ .-][0-9]{4}"  # North America: (415) 555-2671
    r"|(?<=1)-[2-9][0-9]{2}-[2-9][0-9]{2}-[0-9]{4}"  # 1-415-555-2671
    r"|(?<=[2-9])[0-9]{2}(?:-[2-9][0-9]{2}-|\.[2-9][0-9]{2}\.)[0-9]{4}"  # 415-555-2671
    # Chinese landlines: (010) 62345678, 0571-88157777, 010-62345678-801, 010-62345678/62345679
    r"|(?:(?<=[(（])0(?:10|2[0-9]|[3-9][0-9]{2})[)）][ -]?|(?<=0)(?:10|2[0-9]|[3-9][0-9]{2})[- ])"
    r"[2-8][0-9]{6,7}(?:[-转][0-9]{1,5})?(?:[/、][2-8][0-9]{6,7}){0,4}"
    r"|(?<=4)00-[0-9]{3,4}-[0-9]{3,4}"  # 400-810-8888
    r"))(?![0-9A-Za-z_]|[.:-][0-9])"
)

_wide = re.compile("[０-９]")
_NARROW = str.maketrans("０１２３４５６７８９＋－＠Ｘｘ", "0123456789+-@Xx")
"""Full-width signs as the patterns know them, one for one."""


class Privacy(Config):
    """What takes the place of each kind; null leaves it as it is."""

    email: str | None
    """E-mail addresses, but for those of the reserved example domains."""
    identity: str | None
    """Chinese identity numbers: 18 digits with a real province, a real date and the right check digit."""
    card: str | None
    """Bank cards: 15 or 16 digits of a known issuer, 19 at most of UnionPay, and a right Luhn digit."""
    mobile: str | None
    """Chinese mobile numbers, in a range that is in use; in code only after +86."""
    phone: str | None
    """Other telephone numbers, written as such: with a + or with separators."""
    ip: str | None
    """Public IPv4 and IPv6 addresses; private, reserved and documentation ones lead to nobody."""

    def apply(self, text: str, language: str = "") -> tuple[str, dict[str, int]]:
        """The text, and how many of each kind were masked; kinds that did not occur are left out."""
        code = language == "code"
        counts: dict[str, int] = {}
        # Those with a check digit first: a part of their digits could be taken for another kind.
        kinds: list[tuple[str, str | None, re.Pattern[str], Callable[[re.Match[str]], int | None]]] = [
            ("identity", self.identity, _identity, _identity_start),
            ("card", self.card, _card, _card_start),
            ("mobile", self.mobile, _mobile, _prefixed_start if code else _mobile_start),
            ("phone", self.phone, _phone, re.Match.start),
            ("email", self.email, _address, _email_in_code if code else _email_start),
            ("ip", self.ip, _ipv4, _ipv4_start),
            ("ip", self.ip, _ipv6, _ipv6_start),
        ]
        wanted = [self.identity, self.card, self.mobile, self.phone] != [None] * 4
        wide = not text.isascii() and _wide.search(text) is not None
        numbers = wanted and _digits.search(text.translate(_NARROW) if wide else text) is not None
        for kind, placeholder, pattern, start in kinds:
            if placeholder is not None and (numbers or kind in ("email", "ip")):
                seen = text.translate(_NARROW) if wide else text
                text = _masked(text, seen, kind, placeholder, pattern, start, counts)
        return text, counts


def _masked(
    text: str,
    seen: str,
    kind: str,
    placeholder: str,
    pattern: re.Pattern[str],
    start: Callable[[re.Match[str]], int | None],
    counts: dict[str, int],
) -> str:
    """The text with the matches in `seen` replaced for which `start` finds where they begin."""
    parts, done = [], 0
    for found in pattern.finditer(seen):
        begin = start(found)
        if begin is not None and begin >= done:
            parts += [text[done:begin], placeholder]
            done = found.end()
            counts[kind] = counts.get(kind, 0) + 1
    return "".join([*parts, text[done:]]) if parts else text


def _before(found: re.Match[str], size: int) -> str:
    return found.string[max(0, found.start() - size) : found.start()]


def _email_start(found: re.Match[str]) -> int | None:
    """Where the local part begins before the @, if that is one."""
    text, at, end = found.string, found.start(), found.end()
    before = text[max(0, at - 64) : at]
    local = before[len(before.rstrip(_LOCAL)) :].lstrip(".%+-")
    if not local or local.endswith("."):  # @app.route
        return None
    labels = found[1].lower().split(".")
    if labels[-1] in _RESERVED or labels[-2:] in (["example", "com"], ["example", "net"], ["example", "org"]):
        return None
    if len(local) == 1 and not _COMMON.fullmatch(labels[-1]):  # W@x.grad, in a text about code
        return None
    start = at - len(local)
    after = text[end : end + 2]
    # git@github.com:user/repository and https://user@host/ are places, not persons.
    place = after[:1] == ":" and (after[1:].isalnum() or after[1:] in ("~", "/"))
    return None if place or text[max(0, start - 2) : start] == "//" else start


def _email_in_code(found: re.Match[str]) -> int | None:
    """The same where @ is most often a product."""
    labels = found[1].split(".")
    return _email_start(found) if _COMMON.fullmatch(labels[-1]) and labels[0] not in ("self", "cls") else None


def _identity_start(found: re.Match[str]) -> int | None:
    number = _unbroken(found[0]).upper()
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999: 2^(17-i) modulo 11
    check = "10X98765432"[
        sum(int(digit) * weight for digit, weight in zip(number, weights, strict=False)) % 11
    ]
    if check != number[17] or int(number[:2]) not in _PROVINCES:
        return None
    try:
        date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return None
    return found.start()


def _card_start(found: re.Match[str]) -> int | None:
    number = _unbroken(found[0])
    digits = [int(digit) for digit in number]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    right = (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0 and len({*digits}) > 1
    # Only UnionPay's have more than 16 digits.
    long = len(number) > 16 and number[:2] != "62"
    return found.start() if right and not long and _issuer.match(number) else None


def _mobile_start(found: re.Match[str]) -> int | None:
    if (start := _prefixed_start(found)) is not None:
        return start
    before = _before(found, 1)
    joined = before.isascii() and (before.isalnum() or before in ("_", *"._-/+*=#"))
    # An amount; or a size in bytes, as 2^34 is: of real numbers one in 65,536 is such a multiple.
    round_number = found[0].endswith("000000") or int(_unbroken(found[0])) % 65_536 == 0
    return None if (before and joined) or round_number else found.start()


def _prefixed_start(found: re.Match[str]) -> int | None:
    """Where the +86 before a mobile number begins, if there is one."""
    prefix = _prefix.search(_before(found, 8))
    return found.start() - len(prefix[0]) if prefix else None


def _unbroken(number: str) -> str:
    return number.replace(" ", "").replace("-", "")


def _ipv4_start(found: re.Match[str]) -> int | None:
    before = _before(found, 24).rstrip(" ").lower()
    if before.endswith(_VERSION_SIGNS) and not before.endswith("//"):
        return None
    before = before.rstrip(" .:")
    if before[len(before.rstrip(_LOCAL)) :] in _VERSION or not _public(found[0]):
        return None
    # 3.11.7.1 is an address as well as a version: so few digits need a word that says so.
    known = len(found[0]) > 9 or any(word in before for word in _NETWORK)
    return found.start() if known or _port.match(found.string, found.end()) else None


def _ipv6_start(found: re.Match[str]) -> int | None:
    return found.start() if _public(found[0]) else None


@functools.lru_cache(maxsize=4096)
def _public(address: str) -> bool:
    try:
        known = ipaddress.ip_address(address)
    except ValueError:
        return False
    return known.is_global and not known.is_multicast
