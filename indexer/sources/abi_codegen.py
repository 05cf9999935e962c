"""The fast path of the event decoders: Python source made from an event's types, for the common layouts.

The source holds numbers and formats of ours, and argument names as quoted constants: an ABI is input and must not
become code. What it has not checked completely, it hands to the general decoder.
"""

from __future__ import annotations

import re
import struct
from binascii import unhexlify
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

Decode = Callable[[Sequence[str], str], dict[str, Any]]
Unpack = Callable[[bytes], tuple[Any, ...]]

_LAYOUTS = 1024  # layouts kept per event: a bound for the memory that odd logs can take
_TAILS = ("string", "bytes")
_WORD = re.compile(r"(?:u?int|bytes)\d+|bool|address")

_SOURCE = """
def decode(topics, data):
    try:
        {topics}, = topics
        if not (t0 == topic0 and len(data) & 63 == 2 and {prefixes}data[:2] == '0x'{lengths}):
            return general(topics, data)
        raw = unhexlify({joined})
{body}
        return {{{items}}}
    except irregular:
        return general(topics, data)
"""


def compile_decode(
    args: Sequence[str],
    indexed: Sequence[tuple[str, str]],
    plain: Sequence[tuple[str, str]],
    topic0: bytes,
    general: Decode,
) -> Decode:
    """A decoder of the logs of one event, or `general` itself where the types have no fast path.

    `args` are the names in order; `indexed` and `plain` are (name, canonical type) of what stands in topics and in
    data. The decoder gives what `general` would give, and calls it for every log that is not plainly regular.
    """
    if not all(_WORD.fullmatch(type_) or type_ in _TAILS for _, type_ in (*indexed, *plain)):
        return general
    source, fixed = _source(args, indexed, plain)
    scope: dict[str, Any] = {
        "topic0": "0x" + topic0.hex(),
        "general": general,
        "unhexlify": unhexlify,
        "integer": int.from_bytes,
        "unpack": struct.Struct(fixed).unpack_from,
        "layouts": _Layouts(fixed, 32 * len(indexed), 32 * len(plain), sum(t in _TAILS for _, t in plain)),
        "irregular": (ValueError, OverflowError, struct.error),
    }
    exec(compile(source, "<event decoder>", "exec"), scope)  # noqa: S102
    return cast(Decode, scope["decode"])


def _source(
    args: Sequence[str], indexed: Sequence[tuple[str, str]], plain: Sequence[tuple[str, str]]
) -> tuple[str, str]:
    """The source, and the struct format of its words: those of the topics, then those of the data's head."""
    fixed, variables = ">", ""
    checks: list[str] = []
    values: dict[str, str] = {}
    tails = [(i, type_) for i, (_, type_) in enumerate((*indexed, *plain)) if type_ in _TAILS]
    for i, (name, type_) in enumerate((*indexed, *plain)):
        if type_ in _TAILS:
            fixed += "32x"  # an offset; the layout stands for it
            values[name] = f"s{i}.decode()" if type_ == "string" else f"s{i}[:n{i}]"
            continue
        format_, names, check, values[name] = _word(type_, i)
        fixed, variables = fixed + format_, variables + names
        checks += [check] if check else []
    body = _unpacking(variables, [i for i, _ in tails])
    body += [f"if not ({check}): return general(topics, data)" for check in checks]
    for i, type_ in tails:
        body += _tail(type_, i)
    topics = [f"t{i}" for i in range(len(indexed) + 1)]
    source = _SOURCE.format(
        topics=", ".join(topics),
        prefixes="".join(f"{topic}[:2] == " for topic in topics[1:]),
        lengths=f" and {' == '.join(f'len({topic})' for topic in topics[1:])} == 66" if indexed else "",
        joined=" + ".join(f"{text}[2:]" for text in [*topics[1:], "data"]),
        body="\n".join(" " * 8 + line for line in body),
        items=", ".join(f"{name!a}: {values[name]}" for name in args),
    )
    return source, fixed


def _unpacking(variables: str, tails: list[int]) -> list[str]:
    """Lines that unpack the words and the tails: `s` holds a tail's bytes with padding, `w` the word of its length.

    An offset's place in `raw` is that of its argument, as every argument before it takes one word there too.
    """
    if not tails:
        return [f"{variables}= unpack(raw)"] if variables else []
    key = " + ".join(f"raw[{32 * first}:{32 * last + 32}]" for first, last in _runs(tails))
    last = tails[-1]
    parts = "".join(f"w{i}, s{i}, " for i in tails[:-1])
    return [
        f"unpack, start = layouts[{key}]",
        f"{variables}{parts}w{last}, = unpack(raw)",
        f"s{last} = raw[start:]",
    ]


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs (first, last) of neighbours."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs


def _tail(type_: str, i: int) -> list[str]:
    """Lines that check the length and the zero padding of a string or bytes.

    A tail is a whole number of words, so if all behind the value is zeros, its own padding is there and is zeros.
    """
    if type_ == "string":  # one that itself ends in NUL goes the general way
        return [f"s{i} = s{i}.rstrip(b'\\0')", f"if integer(w{i}, 'big') != len(s{i}): return general(topics, data)"]
    return [
        f"n{i} = integer(w{i}, 'big')",
        f"if s{i}.count(0, n{i}) != len(s{i}) - n{i}: return general(topics, data)",  # negative where n is too large
    ]


class _Layouts(dict[bytes, tuple[Unpack, int]]):
    """By the offset words of the tails: how to unpack all but the last tail, and where that one begins.

    Only offsets in canonical order without gaps are taken (what every compiler writes); ValueError for others.
    """

    def __init__(self, fixed: str, base: int, head: int, tails: int) -> None:
        super().__init__()
        self.fixed, self.base, self.head, self.tails = fixed, base, head, tails

    def __missing__(self, key: bytes) -> tuple[Unpack, int]:
        if len(key) != 32 * self.tails:  # the data ends within its head
            raise ValueError("truncated")
        offsets = [int.from_bytes(key[i : i + 32], "big") for i in range(0, len(key), 32)]
        sizes = [after - before for before, after in pairwise(offsets)]
        if offsets[0] != self.head or any(size < 32 or size % 32 for size in sizes):
            raise ValueError("not canonical")
        tails = "".join(f"32s{size - 32}s" for size in sizes)
        layout = (struct.Struct(f"{self.fixed}{tails}32s").unpack_from, self.base + offsets[-1] + 32)
        if len(self) >= _LAYOUTS:
            self.clear()
        self[key] = layout
        return layout


def _word(type_: str, i: int) -> tuple[str, str, str, str]:
    """Of a one-word value `i`: its struct format, the variables that it unpacks to, its check and its expression."""
    base, bits = cast("re.Match[str]", re.fullmatch(r"([a-z]+)(\d*)", type_)).groups()
    size = int(bits or 0) // 8
    if type_ == "address":
        return "12s20s", f"z{i}, v{i}, ", f"z{i} == {bytes(12)!r}", f"'0x' + v{i}.hex()"
    if type_ == "bool":
        return "31sB", f"z{i}, v{i}, ", f"z{i} == {bytes(31)!r} and v{i} < 2", f"v{i} == 1"
    if base == "bytes" and int(bits) < 32:
        return f"{bits}s{32 - int(bits)}s", f"v{i}, z{i}, ", f"z{i} == {bytes(32 - int(bits))!r}", f"v{i}"
    if base == "bytes":
        return "32s", f"v{i}, ", "", f"v{i}"
    if base == "int":
        check = f"-{1 << size * 8 - 1} <= (n{i} := integer(v{i}, 'big', signed=True)) < {1 << size * 8 - 1}"
        return "32s", f"v{i}, ", check, f"n{i}"
    if size == 32:
        return "32s", f"v{i}, ", "", f"integer(v{i}, 'big')"
    code = {8: "Q", 4: "I", 2: "H", 1: "B"}.get(size)
    value = f"v{i}" if code else f"integer(v{i}, 'big')"
    return f"{32 - size}s{code or f'{size}s'}", f"z{i}, v{i}, ", f"z{i} == {bytes(32 - size)!r}", value
