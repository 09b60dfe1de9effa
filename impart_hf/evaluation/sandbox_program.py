"""Runs one program, in a process that `sandbox_launcher.py` has confined. Its text is given to `python -c`.

The first argument is a file descriptor of the program: a secret in its first line, its text in the others. To the
second goes a line feed when the program is about to start, then the secret if it ran to its end, or else its error.
"""

import os
import sys


def main(source: int, result: int) -> None:
    """Read the program, run it as HF evaluate's code_eval does, and answer."""
    with os.fdopen(source, "rb") as file:
        secret, _, program = file.read().partition(b"\n")
    nowhere = os.open(os.devnull, os.O_WRONLY)  # from which reading is an error, as in code_eval
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
    write, leave, process, this = os.write, os._exit, os.getpid, os.getpid()  # the program may replace os's
    write(result, b"\n")
    try:
        exec(program.decode("utf-8", "surrogatepass"), {})
    except BaseException as error:
        answer, status = f"{type(error).__name__}: {error}"[:500].encode("utf-8", "replace"), 1
    else:
        answer, status = secret, 0
    if process() == this:
        write(result, answer)
    leave(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
