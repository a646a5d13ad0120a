"""Makes filters of tables of system calls, and has the kernel obey them: seccomp(2).

What is in the tables does not matter here: see `instarfs.daemon.calls`. A filter is a program of
classic BPF that the kernel runs over the number, the architecture and the arguments of every call.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from instarfs.daemon.calls import ANY_BIT, EXPECTED, Call, Only
from instarfs.image.linux import install_filter

# linux/seccomp.h. Of answers that several filters give, the kernel takes the least.
ALLOW, ERRNO, KILL = 0x7FFF_0000, 0x0005_0000, 0x8000_0000
_FLAG_LOG = 2

# struct seccomp_data: the call's number, the architecture; six arguments, their lower halves first.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16
# linux/bpf_common.h
LOAD, AND, IF_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x06


@dataclass(frozen=True, slots=True)
class Machine:
    """``architecture``: AUDIT_ARCH_* of linux/audit.h; ``seccomp``: that call's number."""

    name: str
    architecture: int
    seccomp: int


MACHINES = {
    it.name: it
    for it in (Machine("x86_64", 0xC000_003E, 317), Machine("aarch64", 0xC000_00B7, 277))
}

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, value; a jump is relative to the next instruction."""

Program = list[Instruction]


def deny_all_but(calls: Sequence[Call]) -> None:
    """From now on a call of this thread that is not in *calls* fails, with EPERM.

    The kernel is asked to log that (audit(7)), but for what is `EXPECTED`. One made as a program
    for another architecture makes it ends the process: the numbers mean something else there.
    Raises OSError where the numbers of this machine are not known, or the kernel filters nothing.
    """
    machine = this_machine()
    quiet, strict = programs(calls, machine)
    # What the second lets pass the first refuses, unlogged: never the second without the first.
    _install(quiet, machine, 0)
    try:
        _install(strict, machine, _FLAG_LOG)
    except OSError as error:
        if error.errno != errno.EINVAL:  # before Linux 4.14
            raise
        _install(strict, machine, 0)


def programs(calls: Sequence[Call], machine: Machine) -> tuple[Program, Program]:
    """Two filters that together allow *calls* alone, to be installed in that order."""
    expected = [call for call, _ in EXPECTED]
    answers = [(call, ERRNO | code) for call, code in EXPECTED]
    quiet = compile_filter(answers, machine, otherwise=ALLOW)
    allowed = [(call, ALLOW) for call in (*calls, *expected)]
    return quiet, compile_filter(allowed, machine, otherwise=ERRNO | errno.EPERM)


def compile_filter(
    answers: Iterable[tuple[Call, int]], machine: Machine, *, otherwise: int
) -> Program:
    """A program that answers each call as it says there, and all others with *otherwise*.

    Of a call that is there more than once, each is tried.
    """
    # Where a number is that of another architecture, or x32's (it has a bit more), none is equal.
    program = [
        (LOAD, 0, 0, ARCHITECTURE),
        (IF_EQUAL, 1, 0, machine.architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
    ]
    for call, answer in answers:
        number = call.number_on(machine.name)
        if number is not None:
            block = _block(call.only, answer)
            program += [(IF_EQUAL, 0, len(block), number), *block]
    return [*program, (RETURN, 0, 0, otherwise)]


def _block(conditions: Sequence[Only], answer: int) -> Program:
    """Give *answer* where all conditions hold; else leave at the end, as it was entered."""
    block: Program = [(RETURN, 0, 0, answer)]
    for only in reversed(conditions):
        looked_at: Program = [(LOAD, 0, 0, ARGUMENTS + 8 * only.argument)]
        if only.mask != ANY_BIT:
            looked_at.append((AND, 0, 0, only.mask))
        *others, last = only.values
        for left, value in zip(range(len(others), 0, -1), others, strict=True):
            looked_at.append((IF_EQUAL, left, 0, value))
        looked_at.append((IF_EQUAL, 0, len(block), last))
        block = looked_at + block
    return [*block, (LOAD, 0, 0, NUMBER)] if conditions else block


def this_machine() -> Machine:
    """What runs this process. Raises OSError where its numbers are not known."""
    name = os.uname().machine
    if name not in MACHINES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"it is not known how on {name}")
    return MACHINES[name]


def _install(program: Program, machine: Machine, flags: int) -> None:
    instructions = b"".join(struct.pack("=HBBI", *each) for each in program)
    install_filter(machine.seccomp, instructions, flags)
