"""Run one command and see to it that nothing of it outlives us.

A tool of TPU-MLIR is a Python script that starts a shell that starts the compiler: killing the script
leaves the compiler running. So the command gets its own process group, and this launcher (standard library
only, started with ``python -I -S``) kills that group as soon as its standard input closes, which also
happens when the program that started it is killed with SIGKILL.

usage: launcher.py RESULT_FD COMMAND [ARGUMENT...]     writes "<exit status> <peak RSS in KiB>" to RESULT_FD
"""

import contextlib
import os
import signal
import sys
import threading

#: From linux/personality.h.
ADDR_NO_RANDOMIZE = 0x0040000


def fix_addresses() -> None:
    """Load this process and its children at the same addresses every time.

    TPU-MLIR writes a byte of padding it never set into the description of nets with a dynamic part
    (penalty_sample_head): a piece of some address. With fixed addresses equal builds give equal files. A
    system that does not allow it (some containers) loses that and nothing else.
    """
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)


def main() -> int:
    result = int(sys.argv[1])
    command = sys.argv[2:]
    # The tool must not hold the result pipe open: whoever reads it waits for its end.
    os.set_inheritable(result, False)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        fix_addresses()
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        try:
            os.execvpe(command[0], command, os.environ)
        except OSError as error:
            os.write(2, f"cannot start {command[0]}: {error.strerror}\n".encode())
            os._exit(127)

    # Both sides set the group, so that it exists whoever runs first.
    with contextlib.suppress(OSError):
        os.setpgid(child, child)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    _, status, usage = os.wait4(child, 0)
    os.write(result, f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
