"""`fewstep serve-reward NAME`: one reward behind HTTP on this machine, for an environment or a GPU of its own.

Needs starlette, uvicorn and python-multipart, and of fewstep no more than this folder: the rewards that keep an environment of
their own are imported only where they are served. The protocol is described in remote.py.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from fewstep.device import resolve_device, take
from fewstep.rewards import REWARDS, sources

PROTOCOL = 1
OPEN_FILES = 10_240  # macOS lets no process have more
HOST = "127.0.0.1"  # another machine reaches it through a tunnel or a TLS proxy
MAX_BODY = 64 * 2**20  # bytes
MAX_PIXELS = 4096 * 4096  # of all pictures of a request
GRACE = 10.0  # seconds that workers have to end what they are at

Score = Callable[[Any, list[str]], Any]  # images (B, 3, H, W) in [0, 1] as a torch tensor, B prompts -> B numbers


# -- what is served ----------------------------------------------------------------------------------------------------


def load(what: str, scorer: str | None, device: str) -> tuple[str, str, Score]:
    """(name, version, function) of a named reward or of path/to/file.py:function. Raises ValueError or ImportError."""
    if scorer is not None and (sources.is_code(what) or what in OWN):
        raise ValueError(f"--scorer: {what} brings its own model; leave the flag out")
    take(device)
    if sources.is_code(what):
        return what.rpartition(":")[2], sources.function_version(what), sources.load_function(what)
    if what not in REWARDS:
        raise ValueError(f"unknown reward {what!r}; known: {', '.join(REWARDS)}, or path/to/file.py:function")
    if what in OWN:
        package, make = OWN[what]
        from importlib.metadata import version

        return what, f"{package}-{version(package)}", make(device)
    source = sources.locate(what, scorer, flag="--scorer")
    built = sources.build(what, source, device=device)
    return what, sources.weights_version(source), built.score


def image_reward(device: str) -> Score:
    import ImageReward

    model = ImageReward.load("ImageReward-v1.0", device=device)
    return lambda images, prompts: [model.score(prompt, picture) for prompt, picture in zip(prompts, to_pil(images), strict=True)]


def hps3(device: str) -> Score:
    from hpsv3 import HPSv3RewardInferencer

    model = HPSv3RewardInferencer(device=device)
    # it gives mean and spread of the score of each picture
    return lambda images, prompts: [float(row[0]) for row in model.reward(prompts=prompts, image_paths=to_pil(images))]


OWN = {"image-reward": ("image-reward", image_reward), "hps3": ("hpsv3", hps3)}


def to_pil(images: Any) -> list[Any]:
    """(B, 3, H, W) in [0, 1] as PIL pictures, for scorers that want those."""
    from PIL import Image

    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


# -- the application ---------------------------------------------------------------------------------------------------


class Refused(Exception):
    """A request that is not as it must be; answered with its status and message."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def application(name: str, version: str, score: Score, *, batch: int = 16, workers: int = 1, device: str = "cpu") -> Any:
    """The ASGI application. One request, of at most `batch` pictures, is decoded and scored at a time in each worker, without gradients.

    The others wait in the order in which they came, in starlette's temporary files; one whose client has hung up by then is not scored.
    """
    import torch
    from python_multipart.exceptions import FormParserError  # which starlette passes on as it is before 1.7
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    one_at_a_time = asyncio.Lock()

    def scored(images: Any, prompts: list[str]) -> list[float | None]:
        take(device)  # of this thread alone, so here, as are gradients
        with torch.inference_mode():
            return as_numbers(score(images.to(device), prompts), len(prompts))

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"protocol": PROTOCOL, "name": name, "version": version, "batch": batch, "workers": workers})

    async def answer(request: Request) -> JSONResponse:
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or "transfer-encoding" in request.headers:  # which says how long a body is where there are both
            raise Refused("the request must state its Content-Length, without a Transfer-Encoding", 411)
        if int(length) > MAX_BODY:
            raise Refused(f"the request is longer than {MAX_BODY} bytes: send fewer pictures at a time", 413)
        async with request.form(max_files=batch, max_fields=8) as form:
            uploads = form.getlist("images")
            if any(isinstance(upload, str) for upload in uploads):
                raise Refused("images: must be files")
            prompts = read_list(form.get("prompts"), "prompts", str)
            if len(prompts) != len(uploads) or not uploads:
                raise Refused(f"{len(prompts)} prompts for {len(uploads)} images")
            try:
                async with one_at_a_time:
                    if await request.is_disconnected():  # it waited too long, and has sent its pictures again by now
                        raise Refused("the client has hung up", 499)
                    held = [(await upload.read(), upload.content_type) for upload in uploads]  # type: ignore[union-attr]
                    images = await run_in_threadpool(read_images, held, form.get("shape"))
                    try:
                        scores = await run_in_threadpool(scored, images, prompts)
                    except Exception as error:
                        traceback.print_exc()
                        return JSONResponse({"error": f"{type(error).__name__}: {error}"[:500], "version": version}, status_code=500)
            except asyncio.CancelledError as error:  # by uvicorn alone, once GRACE is over
                raise Refused("the server ends", 503) from error
        return JSONResponse({"scores": scores, "name": name, "version": version})

    async def refuse(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, status_code=error.status_code)
        return JSONResponse({"error": str(error)}, status_code=error.status if isinstance(error, Refused) else 400)

    routes = [Route("/health", health), Route("/score", answer, methods=["POST"])]
    return Starlette(routes=routes, exception_handlers=dict.fromkeys((Refused, HTTPException, FormParserError), refuse))


def allow_open_files() -> None:
    """As many as the system gives this process for the asking: every request that waits holds its large pictures in files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def read_list(text: Any, what: str, kind: type) -> list[Any]:
    """A JSON list of one kind. Raises Refused."""
    try:
        held = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise Refused(f"{what}: must be a JSON list") from error
    if not isinstance(held, list) or not all(type(value) is kind for value in held):
        raise Refused(f"{what}: must be a JSON list of {kind.__name__}")
    return held


def read_images(held: Sequence[tuple[bytes, str | None]], shape: Any) -> Any:
    """(B, 3, H, W) in [0, 1] from the files of a request. Raises Refused."""
    import numpy as np
    import torch

    pictures, room = [], MAX_PIXELS
    for i, (content, kind) in enumerate(held):
        if kind == "image/png":
            pictures.append(np.asarray(read_png(content, i, room)))
        elif kind == "application/octet-stream":
            size = read_list(shape, "shape", int)
            if len(size) != 2 or min(size) < 1 or len(content) != size[0] * size[1] * 3:
                raise Refused(f"images[{i}]: {len(content)} bytes are not H x W x 3 for the shape {size}")
            check_room(size[0] * size[1], i, room)
            pictures.append(np.frombuffer(content, np.uint8).reshape(*size, 3))
        else:
            raise Refused(f"images[{i}]: must be image/png or application/octet-stream, is {kind!r}", 415)
        room -= pictures[-1].shape[0] * pictures[-1].shape[1]
    if len({picture.shape for picture in pictures}) > 1:
        raise Refused("images: all of one request must have the same size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def check_room(pixels: int, i: int, room: int) -> None:
    """Raises Refused for a picture that does not fit into what the ones before it left of MAX_PIXELS."""
    if pixels > room:
        raise Refused(f"images[{i}]: the pictures of a request may have {MAX_PIXELS} pixels in all: send fewer at a time", 413)


def read_png(content: bytes, i: int, room: int) -> Any:
    """A picture of at most `room` pixels; a larger one is refused before it is decoded."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(content), formats=["PNG"])
        check_room(picture.width * picture.height, i, room)
        return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused(f"images[{i}]: not a PNG file ({type(error).__name__})") from error


def as_numbers(scores: Any, count: int) -> list[float | None]:
    """What a reward returned, as JSON holds it: null where it is not finite. Raises ValueError unless it is one number a picture."""
    listed = scores.tolist() if hasattr(scores, "tolist") else list(scores)
    if len(listed) != count:
        raise ValueError(f"the reward returned {len(listed)} scores for {count} pictures")
    values = [None if value is None else float(value) for value in listed]
    return [value if value is not None and math.isfinite(value) else None for value in values]


# -- the command -------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


def claim(port: int) -> socket.socket:
    """A socket bound to a port of this machine that nothing listens on; it does not listen yet. Raises ValueError."""
    held = socket.socket()
    # what is left of a server that has just ended is no obstacle; Windows' SO_REUSEADDR would share the port with one that lives
    held.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR), 1)
    held.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # an answer's body does not wait for the receipt of its head
    try:
        held.bind((HOST, port))
    except OSError as error:
        held.close()
        raise busy(port, error) from error
    return held


def busy(port: int, error: OSError) -> ValueError:
    return ValueError(f"--port: {HOST}:{port} cannot be listened on ({error.strerror}); end what listens there, or choose another port")


SETTINGS: dict[str, Any] = {  # of uvicorn; with its lifespan, which nothing here uses, a second Ctrl+C ends in a traceback
    "log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off", "timeout_graceful_shutdown": GRACE
}  # fmt: skip


def end_with_parent() -> None:
    """Let this process end when the one that started it is gone: one that was killed outright cannot tell its workers, and they would train
    on, or keep the port and the memory."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def built(options: argparse.Namespace) -> tuple[str, str]:
    """(name, version) of what is served, once its model was there."""
    end_with_parent()
    return load(options.what, options.scorer, options.device)[:2]


def tried(options: argparse.Namespace) -> tuple[str, str]:
    """As `built`, in a process of its own that ends: here the model would stay in the GPU's memory beside those of the workers.

    Raises what `load` does, and ValueError where the process ends before.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(built, options).result()
        except BrokenProcessPool as error:
            raise ValueError(f"{options.what}: the process in which its model was tried has ended before that was loaded") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # which may load for minutes: it hears a terminal's Ctrl+C, and no SIGTERM
                process.terminate()
            raise


def work(options: argparse.Namespace, held: socket.socket, ready: Any) -> None:
    """What one of several workers does, in a process of its own: load the model, set `ready`, serve until it is told to end."""
    import uvicorn

    end_with_parent()
    name, version, score = load(options.what, options.scorer, options.device)
    served = application(name, version, score, batch=options.batch, workers=options.workers, device=options.device)
    ready.set()
    uvicorn.Server(uvicorn.Config(served, **SETTINGS)).run(sockets=[held])


def supervise(options: argparse.Namespace, held: socket.socket) -> int:
    """Keeps `options.workers` workers at one socket until SIGTERM or Ctrl+C; returns the exit status.

    Whether a worker lives is asked of the operating system, not of the worker: one whose model keeps the interpreter busy
    is not taken for a dead one, and one that died while it did is replaced at once. One that ends before its model is
    loaded would end so again: then all end.
    """
    context = multiprocessing.get_context("spawn")

    def started() -> tuple[Any, Any]:
        ready = context.Event()
        process = context.Process(target=work, args=(options, held, ready))
        process.start()
        return process, ready

    def told(number: int, frame: Any) -> None:
        raise SystemExit(0)

    before = signal.signal(signal.SIGTERM, told)
    workers: list[tuple[Any, Any]] = []
    try:
        while True:
            workers += [started() for _ in range(options.workers - len(workers))]
            wait([process.sentinel for process, _ in workers])
            for process, ready in [worker for worker in workers if not worker[0].is_alive()]:
                ended = f"worker {process.pid} ended with status {process.exitcode}"
                if not ready.is_set():
                    print(f"{ended} before its model was loaded; the server ends", flush=True)
                    return 1
                print(f"{ended}; another takes its place", flush=True)
                workers.remove((process, ready))
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is being done
        for process, _ in workers:
            process.terminate()
        patience = time.monotonic() + GRACE
        for process, _ in workers:
            process.join(max(0.0, patience - time.monotonic()))
            process.kill()  # one that keeps the interpreter busy does not hear the first
            process.join()
        signal.signal(signal.SIGTERM, before)


def command(arguments: list[str]) -> int:
    """`fewstep serve-reward`. Raises ValueError for what it cannot serve."""
    parser = Parser(prog="fewstep serve-reward", description="Serve one reward on this machine.", allow_abbrev=False)
    parser.add_argument("what", metavar="NAME", help=f"{', '.join(REWARDS)}, or path/to/file.py:function")
    parser.add_argument("--scorer", default=None, help="folder or hub id of its model, or world (default: as `fewstep rewards` says)")
    parser.add_argument("--port", type=int, default=8765, help="port on 127.0.0.1 (default 8765)")
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes, each with the whole model; of several, one that dies is replaced (default 1: the server itself, which then ends)",
    )
    parser.add_argument("--batch", type=int, default=16, help="pictures that the model sees at once, and in one request (default 16)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto")
    options = parser.parse_args(arguments)
    for key, low, high in (("port", 1, 65535), ("workers", 1, 64), ("batch", 1, 1024)):
        if not low <= getattr(options, key) <= high:
            raise ValueError(f"--{key}: must be {low} .. {high}, got {getattr(options, key)}")
    if options.workers > 1 and os.name == "nt":  # whose event loop takes a socket that no other process has
        raise ValueError("--workers: on Windows a server is one process; start several, each with a --port of its own")
    try:
        import python_multipart  # noqa: F401
        import starlette  # noqa: F401
        import torch  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f'the server needs {error.name}: pip install "fewstep[serve]"') from error
    options.device = resolve_device("--device", options.device)
    allow_open_files()
    with claim(options.port) as held:  # before the model is loaded, which may take minutes
        try:
            if options.workers > 1:
                name, version = tried(options)
            else:
                name, version, score = load(options.what, options.scorer, options.device)
        except (ImportError, OSError) as error:
            raise ValueError(f"{options.what}: cannot be built here ({type(error).__name__}: {error})") from error
        try:
            held.listen()
        except OSError as error:  # another server, started beside this one, was first
            raise busy(options.port, error) from error
        print(f"{name} ({version}) on http://{HOST}:{options.port}, {options.workers} worker(s) on {options.device}", flush=True)
        if options.workers == 1:
            served = application(name, version, score, batch=options.batch, device=options.device)
            with suppress(KeyboardInterrupt):  # uvicorn has ended by it, and raises it again
                uvicorn.Server(uvicorn.Config(served, **SETTINGS)).run(sockets=[held])
            return 0
        return supervise(options, held)
