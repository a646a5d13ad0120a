"""instarfs.daemon.seccomp: its programs are run here as the kernel would, and judged by the tables.

What the kernel makes of them is in test_calls.py, from inside.
"""

import errno
import itertools
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from instarfs.daemon.calls import ANY_BIT, EXPECTED, Call, Only, of_broker, of_daemon
from instarfs.daemon.seccomp import (
    ALLOW,
    AND,
    ARCHITECTURE,
    ARGUMENTS,
    ERRNO,
    IF_EQUAL,
    KILL,
    LOAD,
    MACHINES,
    NUMBER,
    RETURN,
    Machine,
    Program,
    compile_filter,
    programs,
)

PID = 4711
TABLES = {
    "daemon": of_daemon(PID),
    "broker": of_broker(PID, read_only=False),
    "reading broker": of_broker(PID, read_only=True),
}
EPERM = ERRNO | errno.EPERM
X32 = 0x4000_0000
"""What numbers of that ABI have besides, the architecture being that of x86-64."""

MOST_INSTRUCTIONS = 4096
"""BPF_MAXINSNS of linux/bpf_common.h."""

every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
every_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)

Arguments = tuple[int, ...]


def run(program: Program, architecture: int, number: int, arguments: Arguments) -> int:
    """What *program* answers to a call: a machine of its own, as small as the language."""
    data = {NUMBER: number, ARCHITECTURE: architecture}
    for position, argument in enumerate(arguments):
        data[ARGUMENTS + 8 * position] = argument & ANY_BIT
        data[ARGUMENTS + 8 * position + 4] = argument >> 32
    at, held = 0, 0
    while True:
        code, if_true, if_false, value = program[at]
        at += 1
        if code == RETURN:
            return value
        if code == LOAD:
            held = data[value]
        elif code == AND:
            held &= value
        else:
            assert code == IF_EQUAL
            at += if_true if held == value else if_false


def answer(filters: Sequence[Program], machine: Machine, number: int, arguments: Arguments) -> int:
    """Of all, as the kernel takes it: a kill before an errno before leave."""
    return min(
        (run(it, machine.architecture, number, arguments) for it in filters),
        key=lambda it: (it != KILL, it),
    )


def meant(call: Call, machine: Machine, number: int, arguments: Arguments) -> bool:
    return call.number_on(machine.name) == number and all(
        (arguments[only.argument] & only.mask) in only.values for only in call.only
    )


def model(table: Sequence[Call], machine: Machine, number: int, arguments: Arguments) -> int:
    """What the table says, read in the plainest way."""
    arguments = tuple(argument & ANY_BIT for argument in arguments)
    for call, code in EXPECTED:
        if meant(call, machine, number, arguments):
            return ERRNO | code
    if any(meant(call, machine, number, arguments) for call in table):
        return ALLOW
    return EPERM


def around(only: Only) -> set[int]:
    """Values of an argument near those that are meant: each, and each with a bit changed."""
    near = {0, ANY_BIT, 1 << 32, only.mask, ANY_BIT ^ only.mask, *only.values}
    for value in only.values:
        near |= {value ^ (1 << bit) for bit in range(33)}
        near |= {value | 1 << 32, (value | ~only.mask) & ANY_BIT, value + 1}
    return near


def arguments_for(table: Sequence[Call], machine: Machine, number: int) -> Iterator[Arguments]:
    """Some that are meant, and such as differ from these in one; and any."""
    others = random.Random(number)
    conditions = [
        call.only
        for call in (*table, *(call for call, _ in EXPECTED))
        if call.number_on(machine.name) == number and call.only
    ]
    yield tuple(others.getrandbits(64) for _ in range(6))
    yield (0,) * 6
    for only in conditions:
        good = [each.values for each in only]
        for values in itertools.product(*good):
            base = [others.getrandbits(64) for _ in range(6)]
            for each, value in zip(only, values, strict=True):
                base[each.argument] = (base[each.argument] & ANY_BIT & ~each.mask) | value
            yield tuple(base)
            for each in only:
                for near in around(each):
                    yield (*base[: each.argument], near, *base[each.argument + 1 :])


@every_machine
@every_table
def test_every_call_is_answered_as_the_table_says(table: Sequence[Call], machine: Machine) -> None:
    answers, filters = set(), programs(table, machine)
    known = [call.number_on(machine.name) or 0 for call in table]
    for number in [*range(500), *(X32 | it for it in known), ANY_BIT]:
        for arguments in arguments_for(table, machine, number):
            said = answer(filters, machine, number, arguments)
            assert said == model(table, machine, number, arguments), (number, arguments)
            answers.add(said)
    assert answers == {ALLOW, EPERM, ERRNO | errno.ENOSYS}


@every_machine
@every_table
def test_a_call_made_as_on_another_machine_ends_the_process(
    table: Sequence[Call], machine: Machine
) -> None:
    i386, arm = 0x4000_0003, 0x4000_0028
    others = {it.architecture for it in MACHINES.values()} - {machine.architecture}
    for architecture in {i386, arm, 0, ANY_BIT, *others}:
        for program in programs(table, machine):
            for number in range(600):
                assert run(program, architecture, number, (0,) * 6) == KILL


@every_machine
@every_table
def test_the_kernel_accepts_the_programs(table: Sequence[Call], machine: Machine) -> None:
    for program in programs(table, machine):
        assert len(program) <= MOST_INSTRUCTIONS
        assert program[-1][0] == RETURN
        for at, (code, if_true, if_false, value) in enumerate(program):
            assert 0 <= value <= ANY_BIT
            assert max(if_true, if_false) < 256
            assert at + 1 + max(if_true, if_false) < len(program) or code == RETURN


def test_of_a_call_that_is_there_twice_each_is_tried() -> None:
    calls = [
        Call("ioctl", 16, 29, (Only(1, (7,)), Only(2, (0,), 0xF))),
        Call("ioctl", 16, 29, (Only(1, (9,)),)),
    ]
    machine = MACHINES["x86_64"]
    program = compile_filter([(call, ALLOW) for call in calls], machine, otherwise=EPERM)
    allowed = {
        (request, flags)
        for request in range(12)
        for flags in range(32)
        if run(program, machine.architecture, 16, (0, request, flags, 0, 0, 0)) == ALLOW
    }
    assert allowed == {(7, 0), (7, 16), *((9, flags) for flags in range(32))}


# ---- the tables ----

HEADERS = {
    "x86_64": (
        Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        re.compile(r"^#define __NR_(\w+)\s+(\d+)", re.MULTILINE),
    ),
    "aarch64": (
        Path("/usr/include/asm-generic/unistd.h"),
        re.compile(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)", re.MULTILINE),
    ),
}
GENERIC_NAMES = {"newfstatat": "fstatat"}
"""What asm-generic/unistd.h calls otherwise, of those that have two sizes."""


@every_machine
def test_numbers_are_those_of_the_kernels_headers(machine: Machine) -> None:
    path, pattern = HEADERS[machine.name]
    if not path.exists():
        pytest.skip(f"{path} is not there")
    numbers = {name: int(number) for name, number in pattern.findall(path.read_text())}
    generic = GENERIC_NAMES if machine.name == "aarch64" else {}
    tables = [*itertools.chain(*TABLES.values()), *(call for call, _ in EXPECTED)]
    for call in tables:
        assert numbers.get(generic.get(call.name, call.name)) == call.number_on(machine.name), call
    assert numbers["seccomp"] == machine.seccomp


@every_table
def test_no_call_is_allowed_by_two_lines(table: Sequence[Call]) -> None:
    """Where one of two lines of a name sets no condition, those of the other say nothing."""
    for one, other in itertools.combinations(table, 2):
        assert one.name != other.name or exclude_each_other(one, other), one.name


def exclude_each_other(one: Call, other: Call) -> bool:
    """Whether there is an argument that cannot be what both say."""
    return any(
        (its.argument, its.mask) == (others.argument, others.mask)
        and not set(its.values) & set(others.values)
        for its, others in itertools.product(one.only, other.only)
    )
