"""Confines a process of its own, and runs one untrusted program in it. `sandbox.py` starts this file as a script.

It stands alone: nothing of impart_hf is imported, because nothing of it is visible where the program runs. It takes
one argument, JSON with the keys of `sandbox.py`'s `_settings`, and holds three file descriptors: standard input, whose
end says that the program must end; `source`, the program; and `result`, where `sandbox_program.py` answers.

The first process waits. The second, which is the first of its own process namespace if there are namespaces, gives up
what it does not need and becomes `python sandbox_program.py`.
"""

import ctypes
import json
import os
import platform
import resource
import select
import signal
import sys
from typing import Any

# <linux/sched.h>, <linux/mount.h>, <linux/prctl.h>, <linux/seccomp.h>, <linux/bpf_common.h>
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_THREAD = 0x10000000, 0x20000000, 0x40000000, 0x10000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 0x1000, 0x4000, 0x40000, 2
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 22, 24, 38
SECCOMP_MODE_FILTER, SECCOMP_KILL, SECCOMP_ERRNO, SECCOMP_ALLOW = 2, 0x80000000, 0x50000, 0x7FFF0000
BPF_LOAD, BPF_JUMP_EQUAL, BPF_JUMP_AT_LEAST, BPF_JUMP_ANY_BIT, BPF_RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
EPERM, ENOSYS = 1, 38

# Calls that make processes, reach other processes or the network, leave memory behind, or widen the kernel that is in
# reach (<asm/unistd.h>)
PROCESSORS: dict[str, dict[str, Any]] = {
    "x86_64": {
        "audit": 0xC000003E,
        "clone": 56,
        "denied": {
            "socket": 41, "fork": 57, "vfork": 58, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129,
            "rt_tgsigqueueinfo": 297, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "unshare": 272,
            "setns": 308, "mount": 165, "add_key": 248, "request_key": 249, "keyctl": 250, "perf_event_open": 298,
            "bpf": 321, "userfaultfd": 323, "pidfd_send_signal": 424, "io_uring_setup": 425, "shmget": 29, "semget": 64,
            "msgget": 68, "mq_open": 240,
        },
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "clone": 220,
        "denied": {
            "socket": 198, "kill": 129, "tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240,
            "ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "unshare": 97, "setns": 268, "mount": 40,
            "add_key": 217, "request_key": 218, "keyctl": 219, "perf_event_open": 241, "bpf": 280, "userfaultfd": 282,
            "pidfd_send_signal": 424, "io_uring_setup": 425, "shmget": 194, "semget": 190, "msgget": 186,
            "mq_open": 180,
        },
    },
}  # fmt: skip
CLONE3 = 435  # on every processor

VISIBLE = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class Instruction(ctypes.Structure):
    """struct sock_filter."""

    _fields_ = [("code", ctypes.c_uint16), ("if_true", ctypes.c_uint8), ("if_false", ctypes.c_uint8)]
    _fields_ += [("value", ctypes.c_uint32)]


class Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(Instruction))]


class MountAttributes(ctypes.Structure):
    """struct mount_attr."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: Any) -> None:
    """Call a function of the C library that returns -1 for an error.

    Raises:
        OSError: with the function's name.
    """
    if getattr(libc, name)(*arguments) == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def enter_namespaces() -> None:
    """Move to namespaces without network; the next child is the first process of its own namespace."""
    user, group = os.geteuid(), os.getegid()
    call("unshare", CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS)
    # Without this, an unprivileged process may not map its group.
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)


def mount(source: str, target: str, kind: str | None = None, flags: int = 0, data: str | None = None) -> None:
    """mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    call("mount", *encoded[:3], ctypes.c_ulong(flags), encoded[3])


def change_root(folder: str, prefixes: list[str], disk_bytes: int) -> None:
    """Make a root of which only `/program` can be written: Python and the system's libraries, no user's files.

    Args:
        folder: an empty folder, on which the root is mounted.
        prefixes: absolute paths of the Python installation.
        disk_bytes: size of `/program`, which lies in memory.
    """
    mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,nr_inodes=4096,mode=0755")
    shown: list[str] = []
    for path in sorted({*VISIBLE, *prefixes}, key=len):
        if not os.path.exists(path) or any(path.startswith(other + "/") for other in shown):
            continue
        copy = folder + path
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        if os.path.islink(path) and path not in prefixes:
            os.symlink(os.path.realpath(path), copy)
            continue
        shown.append(path)
        bind(path, copy)
    os.mkdir(folder + "/program")
    os.mkdir(folder + "/dev")
    for path in DEVICES:
        open(folder + path, "w").close()
    attributes = MountAttributes(set=MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    arguments = (AT_FDCWD, os.fsencode(folder), AT_RECURSIVE, ctypes.byref(attributes), size)
    call("syscall", ctypes.c_long(SYS_MOUNT_SETATTR), *arguments)
    for path in DEVICES:
        mount(path, folder + path, flags=MS_BIND)
    options = f"size={disk_bytes},nr_inodes=4096,mode=0700"
    mount("tmpfs", folder + "/program", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.chdir(folder)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/program")


def bind(path: str, copy: str) -> None:
    """Show a file or folder at a second place."""
    if os.path.isdir(path):
        os.makedirs(copy, exist_ok=True)
    else:
        open(copy, "w").close()
    mount(path, copy, flags=MS_BIND | MS_REC)


def drop_privileges() -> None:
    """Give up every capability at the next exec, for good."""
    for capability in range(64):
        # An unprivileged user may not do it, and has no capability to lose.
        if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == -1:
            break
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def limit_resources(limits: dict[str, int]) -> None:
    """Set hard limits: of this process, as it cannot make others."""
    for name, value in {**limits, "CORE": 0}.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def deny_calls(processor: dict[str, Any]) -> None:
    """Let the kernel refuse the calls of `PROCESSORS` from here on; threads stay possible."""
    number, architecture, first_argument = 0, 4, 16  # offsets in struct seccomp_data
    filters = [
        (BPF_LOAD, 0, 0, architecture),
        (BPF_JUMP_EQUAL, 1, 0, processor["audit"]),
        (BPF_RETURN, 0, 0, SECCOMP_KILL),
        (BPF_LOAD, 0, 0, number),
        (BPF_JUMP_AT_LEAST, 0, 1, 0x40000000),  # x86-64's second table of calls
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | ENOSYS),
        (BPF_JUMP_EQUAL, 0, 1, CLONE3),  # its flags lie in memory, where a filter cannot look; libraries then use clone
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | ENOSYS),
    ]
    for denied in processor["denied"].values():
        filters += [(BPF_JUMP_EQUAL, 0, 1, denied), (BPF_RETURN, 0, 0, SECCOMP_ERRNO | EPERM)]
    filters += [
        (BPF_JUMP_EQUAL, 0, 3, processor["clone"]),
        (BPF_LOAD, 0, 0, first_argument),
        (BPF_JUMP_ANY_BIT, 1, 0, CLONE_THREAD),
        (BPF_RETURN, 0, 0, SECCOMP_ERRNO | EPERM),
        (BPF_RETURN, 0, 0, SECCOMP_ALLOW),
    ]
    instructions = (Instruction * len(filters))(*(Instruction(*line) for line in filters))
    program = Program(len(filters), instructions)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0)


def become_program(settings: dict[str, Any]) -> None:
    """Confine this process, and run `sandbox_program.py` in it; returns only by an error."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if settings["isolated"]:
        change_root(os.getcwd(), settings["prefixes"], settings["disk_bytes"])
    os.setsid()
    drop_privileges()
    limit_resources(settings["limits"])
    deny_calls(PROCESSORS[platform.machine()])
    # One thread in numpy, and the same order of sets and dicts' hashes in each run: a program has one verdict.
    environment = dict.fromkeys(("HOME", "TMPDIR", "PWD"), os.getcwd())
    environment |= {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **settings["libraries"]}
    # Not -I, which would ignore the seed: the environment has nothing else for Python, and -s leaves out the user's own
    # packages.
    python = settings["python"]
    arguments = [python, "-sB", "-c", settings["harness"], str(settings["source"]), str(settings["result"])]
    for descriptor in (settings["source"], settings["result"]):
        os.set_inheritable(descriptor, True)
    os.execve(python, arguments, environment)


def wait(child: int) -> int:
    """Wait for the program's end, or end it when standard input ends; return what a shell would as its status."""
    ended = os.pidfd_open(child)
    readable, _, _ = select.select([0, ended], [], [])
    if ended not in readable:
        os.kill(child, signal.SIGKILL)  # also ends every other process of its namespace
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if code >= 0 else 128 - code


def main() -> None:
    """Read the settings, and run the program in a child."""
    settings = json.loads(sys.argv[1])
    try:
        if settings["isolated"]:
            enter_namespaces()
        child = os.fork()
        if child == 0:
            become_program(settings)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr, flush=True)
        os._exit(1)
    for descriptor in (settings["source"], settings["result"]):
        os.close(descriptor)
    sys.exit(wait(child))


if __name__ == "__main__":
    main()
