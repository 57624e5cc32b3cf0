"""One image under the policy of the run: rejected, taken as it is, or written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from linerate.shards.inspect_image import (
    NOT_BASELINE,
    ORIENTED,
    STRIPPED,
    Buffer,
    JpegHeader,
    RejectedError,
    check_decode,
    check_header,
    check_size,
)
from linerate.shards.options import ImagePolicy
from linerate.shards.segments import strip_metadata

# What --baseline has something to say to, besides the coding.
_MAY_BECOME_JPEG = ("not a JPEG", "unsupported coding")
_NO_LIMIT = 1 << 62


class Taken(NamedTuple):
    """An image that goes into the shard."""

    header: JpegHeader
    """Of what is stored; its flags also say what was done."""
    jpeg: bytes | None
    """What is stored; None: the bytes as they came."""


Judge = Callable[[Buffer], Taken]
"""Raises RejectedError for what the policy refuses."""


def make_judge(policy: ImagePolicy) -> Judge:
    """The policy as a function of an image's bytes; the same bytes always get the same answer."""
    last_word = _last_word(policy)
    decode = policy.check == "decode"
    plain = not policy.rewrites and not policy.strip_exif
    max_pixels, min_side = policy.max_pixels, policy.min_side

    def judge_header(data: Buffer) -> Taken:
        return Taken(check_header(data, max_pixels=max_pixels, min_side=min_side), None)

    def judge(data: Buffer) -> Taken:
        if not plain:
            taken = _change(data, policy)
            if last_word:
                last_word(data if taken.jpeg is None else taken.jpeg)
            return taken
        header = check_header(data, max_pixels=max_pixels, min_side=min_side)
        if decode:
            check_decode(data, header)
        if last_word:
            last_word(data)
        return Taken(header, None)

    return judge_header if plain and not decode and not last_word else judge


def _change(data: Buffer, policy: ImagePolicy) -> Taken:
    from linerate.shards.reencode import rewrite_jpeg, rewrite_other  # not before something is changed

    try:
        header = check_header(data, max_pixels=policy.max_pixels)
    except RejectedError as why:
        if not policy.baseline or why.reason not in _MAY_BECOME_JPEG:
            raise
        return _rewritten(*rewrite_other(data, why, policy))
    check_size(header.height, header.width, max_pixels=policy.max_pixels, min_side=policy.min_side)
    if _must_be_rewritten(header, policy):
        return _rewritten(*rewrite_jpeg(data, header, policy))
    if policy.check == "decode":
        check_decode(data, header)
    if policy.strip_exif and (stripped := strip_metadata(data)) != data:
        return _rewritten(stripped, STRIPPED)
    return Taken(header, None)


def _must_be_rewritten(header: JpegHeader, policy: ImagePolicy) -> bool:
    if policy.resize is not None and min(header.height, header.width) > policy.resize:
        return True
    return policy.baseline and bool(header.flags & (NOT_BASELINE | ORIENTED))


def _rewritten(jpeg: bytes, done: int) -> Taken:
    header = check_header(jpeg, max_pixels=_NO_LIMIT)
    return Taken(header._replace(flags=header.flags | done), jpeg)


def _last_word(policy: ImagePolicy) -> Callable[[Buffer], None] | None:
    """A check by the decoder that trains, where the policy wants it."""
    if policy.check != "dali":
        return None
    from linerate.shards.dali_check import process_judge

    return process_judge().check
