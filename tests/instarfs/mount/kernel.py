"""What stands in for the kernel where `Operations` are driven without one."""

from typing import cast

from pyfuse3 import RequestContext, SetattrFields


class Caller:
    """Stands in for a RequestContext, whose fields only pyfuse3 can set."""

    def __init__(self, uid: int = 1000, pid: int = 0) -> None:
        self.uid = uid
        self.pid = pid


def caller(uid: int = 1000, pid: int = 0) -> RequestContext:
    return cast("RequestContext", Caller(uid, pid))


class Fields:
    """Stands in for SetattrFields, whose fields only pyfuse3 can set."""

    update_size = update_mode = update_uid = update_gid = False

    def __init__(self, *names: str) -> None:
        for name in names:
            setattr(self, name, True)


def fields(*names: str) -> SetattrFields:
    return cast("SetattrFields", Fields(*names))
