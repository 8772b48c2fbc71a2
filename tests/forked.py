"""Processes of their own without importing everything again, which takes longer than what is tested."""

import os
import socket
import sys
import traceback

import torch

from fewstep import cli


def start(work):
    """Number of a child process that runs `work`: it ends with what that returns, or 8 after an exception, never in the test run."""
    child = os.fork()
    if child:
        return child
    status = 8
    try:
        torch.set_num_threads(torch.get_num_threads())  # makes its pool anew, before threads of the work race to do so and find none
        status = work() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def ended(child):
    """Exit code of a child process, waited for; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work):
    """Exit code of `work` in a child process."""
    return ended(start(work))


def speak_into(out, err):
    """What this process prints, and what it complains of, goes into two open files from here on."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    # not those of pytest, which holds what is written back
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115 (they end with the process)


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(*arguments, before=lambda: None):
    """(exit code, what it printed) of a command line in a child process, after `before` there."""
    read, write = os.pipe()

    def work():
        speak_into(write, write)
        before()
        return cli.main(list(arguments))

    child = start(work)
    os.close(write)
    with open(read) as printed:
        output = printed.read()
    return ended(child), output
