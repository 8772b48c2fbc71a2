"""A reward behind HTTP: pictures go out as PNG or raw bytes, scores come back as JSON. What cannot be scored is masked, never 0.

GET URL/health answers {"protocol": 1, "name", "version", "batch", "workers"}; POST URL/score takes multipart/form-data with `prompts`
(a JSON list of B texts) and B files `images` (image/png, or application/octet-stream of H x W x 3 bytes with a field `shape`, a JSON
list of both) and answers {"scores": B numbers or null, "version"}, with "name" if it likes. `fewstep serve-reward` is such a server.
"""

from __future__ import annotations

import http.client
import io
import json
import math
import secrets
import socket
import ssl
import threading
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import RewardError
from fewstep.rewards.address import TIMEOUT, check_url, is_loopback
from fewstep.rewards.base import PixelReward

PROTOCOL = 1
TRIES = 3
BACKOFF = 1.0  # seconds before the second try; twice as long before each further one
LONGEST_WAIT = 30.0  # seconds, whatever a server asks for
HEALTH_TIMEOUT = 10.0
MAX_REQUEST = 32 * 2**20  # bytes of pictures in one request; one picture may be larger
MAX_REPLY = 64 * 2**10  # bytes, and as many again for every thousand pictures
PASSING = {408, 429}  # of the 4xx: the server may answer later


class Fault(Exception):
    """A try that failed and may be repeated. wait: seconds that the server asks for."""

    def __init__(self, what: str, *, wait: float | None = None):
        super().__init__(what)
        self.wait = wait


class Malformed(Exception):
    """An answer that says nothing of any picture; asking again would bring the same."""


class Remote(PixelReward):
    """The scores of a server, black-box: no direction, so it is for the policy gradient.

    A request that fails (connection, timeout, 408, 429, 5xx) is tried `tries` times; then its pictures are masked (NaN), as are those
    of a malformed answer, and those that the server has no finite score for. Any other 4xx, a redirect, and a server whose name or
    version is no longer the one that `connect` found raise RewardError. `faults` counts what went wrong, by kind; `news` tells what is
    new in it; a warning tells what was masked.
    """

    def __init__(self, url: str, name: str, *, timeout: float = TIMEOUT, tries: int = TRIES, backoff: float = BACKOFF):
        super().__init__(self.ask, name)
        self.url = check_url(url)
        self.timeout, self.tries, self.backoff = timeout, tries, backoff
        self.served, self.version = "", ""
        self.batch, self.workers = 16, 1
        self.faults: Counter[str] = Counter()
        self.untold: Counter[str] = Counter()
        self.unanswered = 0  # pictures that no request brought an answer for; one that was answered with null is not among them
        self.lock = threading.Lock()

    @property
    def identity(self) -> str:
        """What tells the scores of two servers apart, once connected: the name and the version that the server states."""
        return f"{self.served} {self.version}"

    def connect(self) -> Remote:
        """Ask the server who it is. Raises ValueError when it cannot be reached or is not one of ours."""
        try:
            status, _, body = self.repeated(lambda: request("GET", f"{self.url}/health", timeout=min(self.timeout, HEALTH_TIMEOUT)))
        except Fault as fault:
            raise ValueError(f"{self.url}: no reward answers there ({fault}, {self.tries} tries)") from fault
        except Malformed as error:
            raise ValueError(f"{self.url}/health: {error}") from error
        if status != 200:
            raise ValueError(f"{self.url}/health answered {status}; start one with `fewstep serve-reward NAME`")
        try:
            told = read_json(body)
            protocol, self.served, self.version = told["protocol"], told["name"], told["version"]
            self.batch, self.workers = told.get("batch", 16), told.get("workers", 1)
        except (Malformed, KeyError) as error:
            raise ValueError(f"{self.url}/health: not a reward's answer ({error!r}): {excerpt(body)}") from error
        if protocol != PROTOCOL:
            raise ValueError(f"{self.url}: speaks protocol {protocol!r}, this fewstep speaks {PROTOCOL}; bring both to one version")
        for key, value in (("name", self.served), ("version", self.version)):
            if not (isinstance(value, str) and 0 < len(value) <= 200 and value.isprintable()):
                raise ValueError(f"{self.url}/health: {key} must be a printable text of 1 to 200 characters")
        for key, value in (("batch", self.batch), ("workers", self.workers)):
            if type(value) is not int or not 1 <= value <= 1024:
                raise ValueError(f"{self.url}/health: {key} must be a whole number from 1 to 1024, is {value!r}")
        self.news()  # what it took to connect is of no update
        return self

    def news(self) -> dict[str, float]:
        """What went wrong since this was last asked: tries that were repeated (`retries`), failures by kind (`faults/KIND`); no zeros."""
        with self.lock:
            new, self.untold = self.untold, Counter()
        return {key: float(count) for key, count in new.items()}

    def ask(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores of images (B, 3, H, W) in [0, 1], as the 8-bit pictures they would be saved as; NaN where there is none."""
        rows = torch.isfinite(images).flatten(1).all(1).nonzero()[:, 0].cpu()  # a picture with a NaN is not sent, and so masked
        pixels = (images.detach()[rows].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().cpu()
        size = max(1, min(self.batch, MAX_REQUEST // images[0].numel()))
        pieces = list(zip(pixels.split(size), rows.split(size), strict=True)) if len(rows) else []
        scores = torch.full((len(images),), math.nan)
        with ThreadPoolExecutor(self.workers) as pool:
            answers = pool.map(lambda piece: self.ask_once(piece[0], [prompts[i] for i in piece[1].tolist()]), pieces)
            for (_, row), answer in zip(pieces, answers, strict=True):
                scores[row] = torch.tensor(answer)
        return scores.to(images.device)

    def ask_once(self, pixels: Tensor, prompts: list[str]) -> list[float]:
        """Scores of one request's pictures (B, H, W, 3) uint8, NaN where there is none. Raises RewardError."""
        body, kind = encode(pixels, prompts, raw=is_loopback(urlsplit(self.url).hostname or ""))
        limit = MAX_REPLY * (1 + len(prompts) // 1000)
        try:
            return self.repeated(lambda: self.read(*self.post(body, kind, limit), len(prompts)))
        except (Fault, Malformed) as error:
            tried = f" after {self.tries} tries" if isinstance(error, Fault) else ""
            with self.lock:
                self.unanswered += len(prompts)
            warnings.warn(f"reward {self.name!r}: {self.url}: {error}{tried}; {len(prompts)} pictures are masked", stacklevel=2)
            return [math.nan] * len(prompts)

    def repeated(self, attempt: Any) -> Any:
        """What `attempt()` returns, tried again after each Fault, with growing pauses; raises the last one."""
        for n in range(self.tries):
            try:
                return attempt()
            except (Fault, Malformed) as error:
                kind, last = str(error).partition(":")[0], isinstance(error, Malformed) or n == self.tries - 1
                with self.lock:
                    self.faults[kind] += 1
                    self.untold[f"faults/{kind.replace(' ', '_')}"] += 1
                    self.untold.update([] if last else ["retries"])
                if last:
                    raise
                time.sleep(min(LONGEST_WAIT, self.backoff * 2**n if error.wait is None else error.wait))
        raise AssertionError("at least one try")

    def post(self, body: bytes, kind: str, limit: int) -> tuple[int, str, bytes]:
        return request("POST", f"{self.url}/score", body=body, kind=kind, timeout=self.timeout, limit=limit)

    def read(self, status: int, where: str, body: bytes, count: int) -> list[float]:
        """The scores in an answer. Raises Fault, Malformed, or RewardError for what no repetition can mend."""
        if 300 <= status < 400:
            raise RewardError(
                f"reward {self.name!r}: {self.url} answered {status}, a redirect to {where[:200]!r}; redirects are not followed"
            )
        if 400 <= status < 500 and status not in PASSING:
            raise RewardError(f"reward {self.name!r}: {self.url} refused the request with {status}: {excerpt(body)}")
        if status != 200:
            raise Fault(f"answered {status}", wait=seconds(where))
        told = read_json(body)
        for key, stated, was in (("version", told.get("version"), self.version), ("name", told.get("name", self.served), self.served)):
            if stated != was:
                raise RewardError(
                    f"reward {self.name!r}: {self.url} was {key} {was!r} and answers as {str(stated)[:200]!r}; "
                    "scores of two rewards are not mixed"
                )
        return read_scores(told.get("scores"), count)


def server_of(function: Any) -> Remote | None:
    """The server that a reward or a judge is, or that its function belongs to; None where there is no server."""
    holder = getattr(function, "__self__", function)
    return holder if isinstance(holder, Remote) else None


def request(method: str, url: str, *, body: bytes | None = None, kind: str | None = None, timeout: float, limit: int = MAX_REPLY,
            ) -> tuple[int, str, bytes]:  # fmt: skip
    """(status, Location or Retry-After, body) of one request. Raises Fault, also when it takes longer than `timeout` in all,
    Malformed when the answer is longer than `limit` bytes. Redirects are not followed and proxies not used."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    if parts.scheme.lower() == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout)
    late, line = threading.Event(), None

    def hang_up() -> None:  # a server that sends a byte now and then never runs into the socket's own time limit
        late.set()
        open_line = line or connection.sock  # the connection lets go of its socket when the answer begins
        if open_line is not None:
            with suppress(OSError):
                open_line.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(timeout, hang_up)
    watch.daemon = True
    watch.start()
    try:
        connection.connect()
        line = connection.sock
        if late.is_set():
            raise TimeoutError
        headers = {"Connection": "close", "Accept": "application/json"} | ({"Content-Type": kind} if kind else {})
        connection.request(method, parts.path, body=body, headers=headers)
        response = connection.getresponse()
        held = response.read(limit + 1)
        if late.is_set():
            raise TimeoutError
        where = response.headers.get("Location") or response.headers.get("Retry-After") or ""
        if len(held) > limit:
            raise Malformed(f"answer too long: more than {limit} bytes")
        if response.length:  # of the bytes that were promised
            raise Fault(f"connection failed: cut off {response.length} bytes before the end of the answer")
        return response.status, where, held
    except TimeoutError as error:
        raise Fault(f"timed out: {timeout:g} s") from error
    except ConnectionRefusedError as error:
        raise Fault("connection refused") from error
    except (OSError, http.client.HTTPException) as error:
        if late.is_set():
            raise Fault(f"timed out: {timeout:g} s") from error
        raise Fault(f"connection failed: {type(error).__name__}: {error}") from error
    finally:
        watch.cancel()
        connection.close()


def encode(pixels: Tensor, prompts: Sequence[str], *, raw: bool) -> tuple[bytes, str]:
    """(body, content type) of a request; pixels (B, H, W, 3) uint8."""
    mark = secrets.token_hex(16)
    texts = [("prompts", json.dumps(list(prompts)))] + ([("shape", json.dumps(list(pixels.shape[1:3])))] if raw else [])
    kind = "application/octet-stream" if raw else "image/png"
    parts = [f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{text}\r\n'.encode() for key, text in texts]
    for i, picture in enumerate(pixels):
        head = f'--{mark}\r\nContent-Disposition: form-data; name="images"; filename="{i}"\r\nContent-Type: {kind}\r\n\r\n'
        parts += [head.encode(), picture.numpy().tobytes() if raw else png(picture), b"\r\n"]
    return b"".join([*parts, f"--{mark}--\r\n".encode()]), f"multipart/form-data; boundary={mark}"


def png(picture: Tensor) -> bytes:
    """(H, W, 3) uint8 as a PNG file."""
    held = io.BytesIO()
    Image.fromarray(picture.numpy()).save(held, "PNG", compress_level=1)
    return held.getvalue()


def read_json(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {excerpt(body)}") from error
    if not isinstance(told, dict):
        raise Malformed(f"not a JSON object: {excerpt(body)}")
    return told


def read_scores(scores: Any, count: int) -> list[float]:
    """`count` floats; null, NaN and inf become NaN. Raises Malformed for any other list, as nobody knows which score is whose."""
    if not isinstance(scores, list):
        raise Malformed(f"no list of scores: {type(scores).__name__}")
    if len(scores) != count:
        raise Malformed(f"wrong count: {len(scores)} scores for {count} pictures")
    odd = next((score for score in scores if not (score is None or type(score) in (int, float))), None)
    if odd is not None:
        raise Malformed(f"not a number: {str(odd)[:60]!r} among the scores")
    try:
        values = [math.nan if score is None else float(score) for score in scores]
    except OverflowError as error:
        raise Malformed("not a number: an integer too large") from error
    return [value if math.isfinite(value) else math.nan for value in values]


def seconds(text: str) -> float | None:
    """Retry-After in seconds; None when it is a date or nothing."""
    return float(text) if text.isdecimal() and len(text) < 6 else None


def excerpt(body: bytes) -> str:
    """The beginning of an answer, safe to print."""
    return repr(body[:200].decode("utf-8", "replace"))
