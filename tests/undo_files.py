"""Undo files as bytes: of one repair, and read back."""

from __future__ import annotations

from dataclasses import replace

from instarfs.repair.journal import (
    BODY_AT,
    Record,
    State,
    StateWord,
    decode_record,
    decode_word,
    encode_front,
    encode_record,
)


def stack_of(*records: Record, state: State = State.APPLYING) -> list[StateWord]:
    """The words of an undo file that holds *records*, from empty on, the last in *state*."""
    words = [StateWord()]
    for record in records:
        below = replace(words[-1], state=State.APPLIED) if words[1:] else words[0]
        length = sum(map(len, encode_record(record, below)))
        words.append(StateWord(state, len(words), below.end, below.end + length))
    return words


def encoded(*records: Record, state: State = State.APPLYING) -> bytes:
    """An undo file that holds *records*, the first at the bottom; *state*: of the last."""
    words = stack_of(*records, state=state)
    whole = [encode_front(words[-1])]
    for record, word in zip(records, words, strict=False):
        below = replace(word, state=State.APPLIED) if word.depth else word
        whole += map(bytes, encode_record(record, below))
    return b"".join(whole)


def decode(raw: bytes, name: str = "it") -> tuple[Record | None, StateWord]:
    """The record on top, and the word. Raises `UndoFileDamaged`."""
    status = decode_word(raw[:BODY_AT], len(raw), name)
    if not status.depth:
        return None, status
    return decode_record(lambda at, length: raw[at : at + length], status, name)[0], status
