"""A Python of its own, with a hash seed of its own and nothing of fewstep imported, which imports diffusers once for all that it runs."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

# Each line it reads is a job, which a fork of it does: (number, program, arguments, environment, folder to be in, file for what is
# printed). It answers with the number and the exit code.
INTERPRETER = """
import json, os, sys, traceback
import diffusers, torch, transformers
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

torch.set_num_threads(1)
for line in sys.stdin:
    job, program, arguments, environment, folder, printed = json.loads(line)
    child = os.fork()
    if not child:
        status = 1
        try:
            for stream, path, mode in ((0, os.devnull, os.O_RDONLY), (1, printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
                os.dup2(os.open(path, mode), stream)
            os.dup2(1, 2)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            sys.argv = ["-c", *arguments]
            exec(program, {"__name__": "__main__"})
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(job, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


JOBS = itertools.count()


@functools.cache
def interpreter(imported=()):
    """Ends with this process, which closes what it reads. imported: pairs of its environment, for what libraries read once."""
    told = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": os.environ | dict(imported)}
    return subprocess.Popen([sys.executable, "-c", INTERPRETER], **told)


def start(program, *arguments, printed, environment=(), imported=()):
    """A job, to wait for with `ended`: the lines of `program` run there as with `python -c`, beside what is done here; `printed` takes what
    they print."""
    job, there = next(JOBS), interpreter(imported)
    told = [job, program, arguments, os.environ | dict(imported) | dict(environment), str(Path.cwd()), str(printed)]
    print(json.dumps(told), file=there.stdin, flush=True)
    return job, there


def ended(started):
    """Exit code of a job, waited for."""
    job, there = started
    for answer in there.stdout:
        number, code = map(int, answer.split())
        if number == job:  # one before it may have been given up
            return code
    raise AssertionError("the interpreter has ended")


def run(program, *arguments, printed):
    """What the lines of `program` print there. Raises AssertionError with it when they fail."""
    code = ended(start(program, *arguments, printed=printed))
    assert code == 0, printed.read_text()[-3000:]
    return printed.read_text()
