"""The remote reward: a real server on loopback, and every way in which one may fail. Each fault asserts that it was met."""

import argparse
import asyncio
import http.client
import io
import json
import math
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest
import torch
from forked import ended, free_port, speak_into, start
from PIL import Image

import fewstep
from fewstep import cli, flags
from fewstep.rewards import remote, serve, sources
from fewstep.rewards.base import RewardError
from fewstep.rewards.remote import Remote, encode, read_scores
from fewstep.types import Sample

ROOT = Path(fewstep.__file__).parents[1]
HEALTH = {"protocol": 1, "name": "faulty", "version": "v1", "batch": 4, "workers": 2}
REWARD_FILE = '''
import time

import torch


def redness(images, prompts):
    """(B, 3, H, W) in [0, 1], B prompts -> (B,). Prompts ask for trouble."""
    if "boom" in prompts:
        raise RuntimeError("boom")
    scores = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
    scores[[prompt == "no score" for prompt in prompts]] = torch.nan
    scores[[prompt == "gradients on?" for prompt in prompts]] = float(torch.is_grad_enabled())
    return scores[:-1] if "short" in prompts else scores


def judge(images, prompts):
    return [float(len(prompt)) for prompt in prompts]  # a black box: plain numbers


number = 3
'''


def pictures(n, height=9, width=7, seed=0):
    return torch.randint(0, 256, (n, 3, height, width), generator=torch.Generator().manual_seed(seed)) / 255


def sample_of(images, prompts):
    x0 = images.clone().requires_grad_()
    k = torch.zeros(len(images), dtype=torch.long)
    return Sample(x0, torch.ones(len(images)), {}, prompts, k, k=k, decode=lambda x: x * 1)


# A server that fails as it is told to


class Faulty:
    """Answers with what `faults` says, one for each request to /score, then well. `met` holds what it did."""

    def __init__(self):
        self.faults, self.met, self.health, self.requests = [], [], dict(HEALTH), []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def reply(self, status, body, **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.reply(200, owner.health)

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                count = body.count(b'name="images"')
                owner.requests.append((count, body))
                fault = owner.faults.pop(0) if owner.faults else None
                owner.met.append(fault)
                FAULTS[fault](self, [float(i) for i in range(count)])

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def reward(self, **settings):
        return Remote(self.url, "mine", **({"backoff": 0.01, "timeout": 5.0} | settings)).connect()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def drip(handler, scores):
    """A byte now and then: no single wait is long, all together never end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(200):
        try:
            handler.wfile.write(b" ")
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.05)


def reset(handler, scores):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.close()


def cut(handler, scores):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"scores": [')


def big(handler, scores):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10 * 2**20))
    handler.end_headers()
    try:
        for _ in range(160):
            handler.wfile.write(b" " * 2**16)
    except OSError:
        pass  # the client has hung up


def well(scores):
    return {"scores": scores, "version": "v1"}


FAULTS = {
    None: lambda h, s: h.reply(200, well(s)),
    # these may pass, and are tried again
    "timeout": lambda h, s: time.sleep(1.2),
    "drip": drip,
    "reset": reset,
    "cut": cut,
    "garbage": lambda h, s: h.wfile.write(b"not http at all\r\n\r\n"),
    "408": lambda h, s: h.reply(408, b""),
    "429": lambda h, s: h.reply(429, b"", Retry_After="0"),
    "500": lambda h, s: h.reply(500, b"oh"),
    "503": lambda h, s: h.reply(503, b""),
    # these say nothing of any picture
    "short": lambda h, s: h.reply(200, well(s[:-1])),
    "long": lambda h, s: h.reply(200, well([*s, 0.0])),
    "string": lambda h, s: h.reply(200, well(["0.5", *s[1:]])),
    "bool": lambda h, s: h.reply(200, well([True, *s[1:]])),
    "nested": lambda h, s: h.reply(200, well([[x] for x in s])),
    "number": lambda h, s: h.reply(200, well(1.0)),
    "no scores": lambda h, s: h.reply(200, {"version": "v1"}),
    "huge": lambda h, s: h.reply(200, b'{"version": "v1", "scores": [1' + b"0" * 400 + b", 0, 0, 0]}"),
    "endless digits": lambda h, s: h.reply(200, b'{"version": "v1", "scores": [' + b"1" * 5000 + b"]}"),
    "deep": lambda h, s: h.reply(200, b"[" * 30000),
    "list": lambda h, s: h.reply(200, s),
    "html": lambda h, s: h.reply(200, b"<html>no</html>"),
    "empty": lambda h, s: h.reply(200, b""),
    "latin": lambda h, s: h.reply(200, b'{"scores": "\xe9"}'),
    "10 MB": big,
    # these will not pass
    "404": lambda h, s: h.reply(404, b"nothing here"),
    "400": lambda h, s: h.reply(400, b'{"error": "no"}'),
    "413": lambda h, s: h.reply(413, b""),
    "redirect": lambda h, s: h.reply(307, b"", Location="http://127.0.0.1:1/elsewhere"),
    "moved on": lambda h, s: h.reply(200, {"scores": s, "version": "v2"}),
    "another reward": lambda h, s: h.reply(200, well(s) | {"name": "other"}),
    # one picture has no score
    "null": lambda h, s: h.reply(200, well([None, *s[1:]])),
    "NaN": lambda h, s: h.reply(200, b'{"version": "v1", "scores": [NaN, 1, 2, 3]}'),
    "inf": lambda h, s: h.reply(200, b'{"version": "v1", "scores": [1e999, 1, 2, 3]}'),
}
PASSING = ["timeout", "drip", "reset", "cut", "garbage", "408", "429", "500", "503"]
MALFORMED = ["short", "long", "string", "bool", "nested", "number", "no scores", "huge", "endless digits", "deep", "list", "html", "empty",
             "latin", "10 MB"]  # fmt: skip
FINAL = {"404": "404: 'nothing here'", "400": "refused the request with 400", "413": "413", "redirect": "redirects are not followed",
         "moved on": "was version 'v1' and answers as 'v2'", "another reward": "was name 'faulty' and answers as 'other'"}  # fmt: skip
PARTIAL = ["null", "NaN", "inf"]


@pytest.fixture()
def faulty():
    server = Faulty()
    yield server
    server.close()


# what is promised of a reward that fails -> the fault that stands for it, and how it is met
PROMISED = {
    "timeout": ("timeout", "passing"), "slow": ("drip", "passing"), "429": ("429", "passing"), "500": ("500", "passing"),
    "404": ("404", "final"), "short list": ("short", "malformed"), "long list": ("long", "malformed"), "string": ("string", "malformed"),
    "10 MB body": ("10 MB", "malformed"), "NaN": ("NaN", "partial"),
}  # fmt: skip
# and `refused`, which takes a server that is gone: test_a_server_that_is_gone_masks_everything


def test_every_fault_that_the_page_counts_is_in_the_list():
    lists = {"passing": PASSING, "malformed": MALFORMED, "final": [*FINAL], "partial": PARTIAL}
    injected = [fault for faults in lists.values() for fault in faults]
    assert sorted(injected) == sorted({*FAULTS} - {None})  # each is injected, and met in one way
    assert [name for name, (fault, met) in PROMISED.items() if fault not in lists[met]] == []
    told = re.search(r"Each of (\d+) faults.*?(\d+) may pass.*?, (\d+) are malformed.*?, (\d+) no repetition.*?, (\d+) spoil",
                     (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)  # fmt: skip
    assert [int(count) for count in told.groups()] == [len(injected), *map(len, lists.values())]


@pytest.mark.parametrize("fault", PASSING)
def test_a_passing_fault_is_tried_again_and_then_masked(faulty, fault):
    settings = {"timeout": 0.4} if fault in ("timeout", "drip") else {}
    reward = faulty.reward(**settings)
    faulty.faults = [fault, fault]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reward.ask(pictures(4), ["p"] * 4).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert faulty.met == [fault, fault, None] and sum(reward.faults.values()) == 2
    faulty.met.clear()
    faulty.faults = [fault] * 9
    start = time.monotonic()
    with pytest.warns(UserWarning, match=r"after 3 tries; 4 pictures are masked"):
        scores = reward.ask(pictures(4), ["p"] * 4)
    (kind,) = reward.faults
    assert reward.news() == {"retries": 4.0, f"faults/{kind.replace(' ', '_')}": 5.0} and reward.news() == {}
    assert bool(torch.isnan(scores).all()) and faulty.met == [fault] * 3 and sum(reward.faults.values()) == 5
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_answer_masks_its_own_pictures_and_no_others(faulty, fault):
    reward = faulty.reward()
    reward.workers = 1  # so that the second request is the faulty one
    faulty.faults = [None, fault]
    with pytest.warns(UserWarning, match="4 pictures are masked"):
        scores = reward.ask(pictures(9), ["p"] * 9)
    assert scores[:4].tolist() == [0.0, 1.0, 2.0, 3.0] and bool(torch.isnan(scores[4:8]).all()) and float(scores[8]) == 0.0
    assert faulty.met == [None, fault, None] and sum(reward.faults.values()) == 1


@pytest.mark.parametrize("fault", FINAL)
def test_what_no_repetition_can_mend_fails_at_once(faulty, fault):
    reward = faulty.reward()
    faulty.faults = [fault]
    with pytest.raises(RewardError, match=re.escape(FINAL[fault])) as error:
        reward.ask(pictures(4), ["p"] * 4)
    assert faulty.met == [fault] and "'mine'" in str(error.value) and faulty.url in str(error.value)


def test_servers_differ_by_name_and_version(faulty):
    found = set()
    for name, version in (("a", "v1"), ("b", "v1"), ("a", "v2"), ("a", "v1")):
        faulty.health |= {"name": name, "version": version}
        found.add(faulty.reward().identity)
    assert found == {"a v1", "b v1", "a v2"}


def test_two_functions_of_one_file_are_served_as_two_versions(reward_file):
    versions = [serve.load(f"{reward_file}:{function}", None, "cpu")[1] for function in ("redness", "judge")]
    assert versions == [f"file-{sources.version(str(reward_file))}:{function}" for function in ("redness", "judge")]


@pytest.mark.parametrize("fault", PARTIAL)
def test_a_picture_without_a_finite_score_is_masked_alone(faulty, fault):
    faulty.faults = [fault]
    scores = faulty.reward().ask(pictures(4), ["p"] * 4)
    assert math.isnan(scores[0]) and scores[1:].tolist() == [1.0, 2.0, 3.0] and faulty.met == [fault]


def test_a_server_that_is_gone_masks_everything(faulty):
    reward = faulty.reward()
    faulty.close()
    with pytest.warns(UserWarning, match="connection refused after 3 tries"):
        assert bool(torch.isnan(reward.ask(pictures(3), ["p"] * 3)).all())
    assert reward.faults == {"connection refused": 3}


def test_it_is_a_black_box_reward_that_spoils_no_other(faulty):
    sample = sample_of(pictures(3), ["p"] * 3)
    signal = faulty.reward()(sample)
    assert signal.direction is None and signal.score.tolist() == [0.0, 1.0, 2.0]
    assert sample.image.requires_grad  # a differentiable reward beside it still gets its gradient


def test_a_picture_that_is_not_finite_is_never_sent(faulty):
    images = pictures(3)
    images[1, 0, 0, 0] = math.nan
    scores = faulty.reward().ask(images, ["a", "b", "c"])
    assert scores[0] == 0 and math.isnan(scores[1]) and scores[2] == 1
    assert [count for count, _ in faulty.requests] == [2] and b'["a", "c"]' in faulty.requests[0][1]
    assert bool(torch.isnan(faulty.reward().ask(images[1:2], ["b"])).all()) and len(faulty.requests) == 1


def test_requests_keep_to_the_servers_batch_and_to_the_limit(faulty, monkeypatch):
    reward = faulty.reward()
    reward.ask(pictures(10), ["p"] * 10)
    assert sorted(count for count, _ in faulty.requests) == [2, 4, 4]
    faulty.requests.clear()
    monkeypatch.setattr(remote, "MAX_REQUEST", 2 * 9 * 7 * 3)
    reward.ask(pictures(5), ["p"] * 5)
    assert sorted(count for count, _ in faulty.requests) == [1, 2, 2]


@pytest.mark.parametrize(
    "health, message",
    [
        ({"protocol": 2}, "speaks protocol 2, this fewstep speaks 1"),
        ({"name": ""}, "name must be a printable text"),
        ({"version": "a\x1b[2J"}, "version must be a printable text"),
        ({"version": 3}, "version must be"),
        ({"batch": 0}, "batch must be a whole number from 1 to 1024, is 0"),
        ({"workers": True}, "workers must be"),
        (None, "not a reward's answer"),
        ([], "not a reward's answer"),
    ],
)
def test_a_server_is_asked_who_it_is_before_training(faulty, health, message):
    faulty.health = faulty.health | health if isinstance(health, dict) else {} if health is None else health
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        faulty.reward()
    assert faulty.url in str(error.value)


@pytest.mark.parametrize(
    "url, message",
    [
        ("http://example.org:80", "plain http is for this machine alone"),
        ("http://10.0.0.1", "plain http is for this machine alone"),
        ("http://127.0.0.1.example.org", "plain http"),
        ("https://user:secret@example.org", "no user name"),
        ("https://example.org/?a=b", "no user name, query"),
        ("https://example.org:port", "not an address"),
        ("https://", "an address is https://HOST:PORT"),
        ("http://127.0.0.1:80/a b", "blank"),
    ],
)
def test_addresses_that_pictures_must_not_be_sent_to(url, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Remote(url, "mine")


def test_addresses_that_are_fine():
    for url in ("http://127.0.0.1:1", "http://localhost:1", "http://[::1]:1", "https://example.org:8443/clip", "HTTP://127.0.0.1:1"):
        assert Remote(url + "/", "mine").url == url


def test_pauses_grow_and_a_servers_own_are_bounded(faulty, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    reward = faulty.reward(backoff=1.0, tries=4)
    faulty.faults = ["500"] * 3
    reward.ask(pictures(1), ["p"])
    assert pauses == [1.0, 2.0, 4.0]
    faulty.faults, FAULTS["429"] = ["429"], lambda h, s: h.reply(429, b"", Retry_After="999")
    reward.ask(pictures(1), ["p"])
    assert pauses[3:] == [remote.LONGEST_WAIT]


def test_a_server_that_was_late_when_it_was_asked_who_it_is_has_no_news_of_it(faulty, monkeypatch):
    """What it took to begin is of no update, whose number the news is logged under."""
    request, failing = remote.request, [True]

    def late(*told, **more):
        if failing:
            raise remote.Fault("timed out: 1 s", wait=failing.pop() * 0.0)
        return request(*told, **more)

    monkeypatch.setattr(remote, "request", late)
    reward = faulty.reward()
    assert reward.faults == {"timed out": 1} and reward.news() == {}


def test_a_judge_waits_for_its_server_as_long_as_it_is_told(faulty, monkeypatch):
    request, waited = remote.request, {}

    def watched(how, *told, timeout, **more):
        waited[how] = timeout
        return request(how, *told, timeout=timeout, **more)

    monkeypatch.setattr(remote, "request", watched)
    assert sources.open_judge("mine", faulty.url, timeout=77.0)(pictures(1), ["p"]).tolist() == [0.0]
    assert waited == {"GET": remote.HEALTH_TIMEOUT, "POST": 77.0}


def test_a_server_elsewhere_has_to_show_its_certificate(monkeypatch):
    connection = mock.Mock()
    connection.return_value.connect.side_effect = ConnectionRefusedError
    monkeypatch.setattr(http.client, "HTTPSConnection", connection)
    with pytest.raises(remote.Fault, match="connection refused"):
        remote.request("GET", "https://example.org/health", timeout=1.0)
    context = connection.call_args.kwargs["context"]
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


def test_a_picture_is_sent_as_it_would_be_saved(faulty, monkeypatch):
    """Clipped and rounded; to another machine as a PNG, which takes a part of the bytes."""
    images = torch.tensor([-0.2, 0.499 / 255, 0.501 / 255, 1.2]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    faulty.reward().ask(images, ["p"])
    assert b"\r\n\r\n" + bytes([0, 0, 0, 0, 0, 0, 1, 1, 1, 255, 255, 255]) + b"\r\n" in faulty.requests[0][1]
    monkeypatch.setattr(remote, "is_loopback", lambda host: False)
    faulty.reward().ask(images, ["p"])
    (begin,) = (match.start() for match in re.finditer(b"\x89PNG", faulty.requests[1][1]))
    with Image.open(io.BytesIO(faulty.requests[1][1][begin:])) as picture:
        assert list(picture.convert("L").tobytes()) == [0, 0, 1, 255]


def test_scores_are_read_strictly():
    assert read_scores([1, 2.5], 2) == [1.0, 2.5]
    assert math.isnan(read_scores([None], 1)[0]) and math.isnan(read_scores([math.inf], 1)[0])


# The real server


def answers(url):
    try:
        Remote(url, "probe", tries=1, timeout=5).connect()
    except ValueError:
        return False
    return True


@contextmanager
def served(what, *options):
    """A `fewstep serve-reward` of its own process; yields its address."""
    port = free_port()
    command = [sys.executable, "-m", "fewstep.cli", "serve-reward", str(what), "--port", str(port), "--device", "cpu", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
    try:
        while not answers(url):
            assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextmanager
def served_by_fork(what, *options):
    """As `served`, of a process that has transformers imported."""
    port = free_port()
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 90
    child = start(lambda: cli.main(["serve-reward", str(what), "--port", str(port), "--device", "cpu", *options]))
    try:
        while not answers(url):
            assert os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline
            time.sleep(0.1)
        yield url
    finally:
        os.kill(child, signal.SIGTERM)
        ended(child)


STUCK = """
import pathlib, time

def stuck(images, prompts):
    pathlib.Path(__file__).with_name("begun").touch()
    time.sleep(600)
"""


@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_waits_for_what_is_being_scored_but_not_for_ever(tmp_path, monkeypatch, times):
    """Told to stop, a server answers what it could not score in GRACE seconds, so that it is asked again elsewhere; told twice, it ends."""
    monkeypatch.setitem(serve.SETTINGS, "timeout_graceful_shutdown", 0.3 if times == 1 else 600)
    (tmp_path / "stuck.py").write_text(STUCK)
    port, said = free_port(), tmp_path / "said"

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with said.open("w") as into:
            speak_into(into.fileno(), into.fileno())
            return cli.main(["serve-reward", f"{tmp_path / 'stuck.py'}:stuck", "--port", str(port), "--device", "cpu"])

    child = start(work)
    try:
        while not answers(f"http://127.0.0.1:{port}"):
            time.sleep(0.02)
        body, kind = encode((pictures(1) * 255).byte().permute(0, 2, 3, 1).contiguous(), ["p"], raw=True)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/score", body, {"Content-Type": kind})
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        for number in [signal.SIGTERM] if times == 1 else [signal.SIGINT] * 2:
            os.kill(child, number)
            time.sleep(0.1)
        if times == 1:
            answer = connection.getresponse()
            assert (answer.status, json.loads(answer.read())) == (503, {"error": "the server ends"})
        connection.close()
        assert ended(child) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert "Traceback" not in said.read_text()


def test_a_stop_waits_for_no_model_that_is_being_tried(monkeypatch):
    """A SIGTERM, that is: the process in which it is loaded hears none."""
    child, pool = mock.Mock(), mock.MagicMock()
    pool.return_value.__enter__.return_value.submit.return_value.result.side_effect = KeyboardInterrupt
    monkeypatch.setattr(serve, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(serve.multiprocessing, "active_children", lambda: [child])
    with pytest.raises(KeyboardInterrupt):
        serve.tried(argparse.Namespace(what="mine.py:f"))
    child.terminate.assert_called_once_with()


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "mine.py"
    path.write_text(REWARD_FILE)
    return path


@pytest.fixture(scope="module")
def server(reward_file):
    with served(f"{reward_file}:redness", "--batch", "3") as url:
        yield url


def test_the_server_scores_as_the_function_does_by_either_encoding(server, reward_file, monkeypatch):
    reward, images = Remote(server, "mine").connect(), pictures(8)
    version = f"file-{sources.version(str(reward_file))}:redness"
    assert reward.served == "redness" and reward.version == version and reward.identity == f"redness {version}" and reward.batch == 3
    expected = sources.load_function(f"{reward_file}:redness")(images, ["p"] * 8)
    raw = reward.ask(images, ["p"] * 8)
    torch.testing.assert_close(raw, expected, rtol=0, atol=1e-6)
    monkeypatch.setattr(remote, "is_loopback", lambda host: False)  # what goes to another machine is PNG
    assert encode((images[:1] * 255).round().byte().permute(0, 2, 3, 1).contiguous(), ["p"], raw=False)[0].count(b"\x89PNG") == 1
    assert torch.equal(reward.ask(images, ["p"] * 8), raw)


def test_the_worlds_preference_gives_the_same_bits_behind_a_server():
    from fewstep import world
    from fewstep.rewards.clip import PickScore

    images, prompts = pictures(40, 64, 64), world.prompts("evaluate")[:40]
    here = PickScore.load(world.ASSETS / "preference")
    with served_by_fork("preference", "--scorer", "world") as url:
        reward = Remote(url, "preference").connect()
        there = reward.ask(images, prompts)
    scored = [here.score(some, prompts[at : at + 16]) for at, some in zip((0, 16, 32), images.split(16), strict=True)]
    assert torch.equal(there, torch.cat(scored)) and reward.batch == 16 and float(there.std()) > 0.01
    assert reward.version == f"weights-{sources.version(str(world.ASSETS / 'preference'))}"


def test_the_server_scores_without_gradients(server):
    assert torch.is_grad_enabled()
    assert Remote(server, "mine").connect().ask(pictures(2), ["gradients on?"] * 2).tolist() == [0.0, 0.0]


def test_the_servers_own_faults_mask(server):
    reward = Remote(server, "mine", backoff=0.01).connect()
    scores = reward.ask(pictures(3), ["p", "no score", "p"])
    assert torch.isnan(scores).tolist() == [False, True, False]
    for trouble in ("boom", "short"):  # an exception, and a list that is too short, inside the reward: 500
        with pytest.warns(UserWarning, match="answered 500 after 3 tries; 2 pictures are masked"):
            assert bool(torch.isnan(reward.ask(pictures(2), [trouble, "p"])).all())
    assert reward.faults["answered 500"] == 6
    assert bool(torch.isfinite(reward.ask(pictures(3), ["p"] * 3)).all())  # and it goes on


def test_a_score_that_is_not_finite_is_null():
    """JSON has no other word for it: one infinite score would mask all pictures of its request."""
    assert serve.as_numbers(torch.tensor([0.5, math.inf, -math.inf, math.nan]), 4) == [0.5, None, None, None]
    assert serve.as_numbers([None, 1], 2) == [None, 1.0]


def multipart(*fields):
    parts = [f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + body + b"\r\n" for name, more, body in fields]
    return b"".join([*parts, b"--x--\r\n"])


PNG = '; filename="0"\r\nContent-Type: image/png'
RAW = '; filename="0"\r\nContent-Type: application/octet-stream'


@pytest.mark.parametrize(
    "body, status, words",
    [
        (multipart(("prompts", "", b'["p"]'), ("images", PNG, b"no png")), 400, "not a PNG file"),
        (multipart(("prompts", "", b'["p"]')), 400, "1 prompts for 0 images"),
        (multipart(("prompts", "", b"[]")), 400, "0 prompts for 0 images"),
        (multipart(("prompts", "", b'"p"'), ("images", PNG, b"")), 400, "must be a JSON list of str"),
        (multipart(("prompts", "", b"[1]"), ("images", PNG, b"")), 400, "must be a JSON list of str"),
        (multipart(("prompts", "", b"["), ("images", PNG, b"")), 400, "must be a JSON list"),
        (multipart(("images", PNG, b"")), 400, "prompts: must be a JSON list"),
        (multipart(("prompts", "", b'["p"]'), ("images", "", b"text")), 400, "must be files"),
        (multipart(("prompts", "", b'["p"]'), ("images", RAW, b"123456")), 400, "shape: must be a JSON list"),
        (multipart(("prompts", "", b'["p"]'), ("shape", "", b"[1, 1]"), ("images", RAW, b"123456")), 400, "6 bytes are not H x W x 3"),
        (multipart(("prompts", "", b'["p"]'), ("shape", "", b"[-1, -2]"), ("images", RAW, b"123456")), 400, "are not H x W x 3"),
        (multipart(("prompts", "", b'["p"]'), ("images", '; filename="0"\r\nContent-Type: image/gif', b"")), 415, "must be image/png"),
        (multipart(("prompts", "", b'["p", "p", "p", "p"]'), *[("images", PNG, b"")] * 4), 400, "Maximum number of files is 3"),
        (b"nothing of the kind", 400, ""),
    ],
)  # fmt: skip
def test_the_server_refuses_what_is_not_a_request(server, body, status, words):
    connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=20)
    connection.request("POST", "/score", body, {"Content-Type": "multipart/form-data; boundary=x"})
    answer = connection.getresponse()
    assert answer.status == status and words in json.loads(answer.read())["error"]
    connection.close()


def test_the_server_takes_no_more_than_it_can_hold(server):
    chunked = {"Transfer-Encoding": "chunked"}
    for headers, status in (({"Content-Length": str(serve.MAX_BODY + 1)}, 413), (chunked, 411), ({"Content-Length": "10"} | chunked, 411)):
        connection = http.client.HTTPConnection(server.removeprefix("http://"), timeout=20)
        connection.putrequest("POST", "/score")
        for key, value in headers.items():
            connection.putheader(key, value)
        connection.endheaders()  # and not a byte of it
        assert connection.getresponse().status == status
        connection.close()


def test_who_waits_is_not_decoded_yet_and_who_has_hung_up_is_not_scored(monkeypatch):
    """Three clients of one worker: the first is scored until the other two have been taken in, and the second hangs up meanwhile."""
    decoded, scored, answers, taken = [], [], {}, threading.Barrier(2, timeout=20)
    read_images = serve.read_images
    monkeypatch.setattr(serve, "read_images", lambda *given: decoded.append(1) or read_images(*given))

    def score(images, prompts):
        if not scored:
            taken.wait()
        scored.extend(prompts)
        return [0.5] * len(prompts)

    app = serve.application("mine", "v1", score)

    async def ask(prompt, hangs_up=False):
        body = multipart(("prompts", "", json.dumps([prompt]).encode()), ("shape", "", b"[1, 2]"), ("images", RAW, b"123456"))
        headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str(len(body))}
        messages = [{"type": "http.request", "body": body}, *[{"type": "http.disconnect"}] * hangs_up]

        async def receive():
            return messages.pop(0) if messages else await asyncio.Event().wait()

        async def send(message):
            if message["type"] == "http.response.start":
                answers[prompt] = message["status"]

        raw = [(key.encode(), value.encode()) for key, value in headers.items()]
        await app({"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": raw}, receive, send)

    async def three():
        asked = []
        for prompt, hangs_up in (("a", False), ("b", True), ("c", False)):
            asked.append(asyncio.create_task(ask(prompt, hangs_up)))
            await asyncio.sleep(0.1)
        held = len(decoded)
        await asyncio.to_thread(taken.wait)
        await asyncio.gather(*asked)
        return held

    assert asyncio.run(three()) == 1  # while the first was scored
    assert scored == ["a", "c"] and answers == {"a": 200, "b": 499, "c": 200} and len(decoded) == 2


def test_pictures_of_two_sizes_and_bombs_are_refused(monkeypatch):
    def file(*size):
        held = io.BytesIO()
        Image.new("1", size).save(held, "PNG")
        return held.getvalue(), "image/png"

    assert serve.read_images([file(3, 4)] * 2, None).shape == (2, 3, 4, 3)
    with pytest.raises(serve.Refused, match="same size"):
        serve.read_images([file(3, 4), file(4, 3)], None)
    with pytest.raises(serve.Refused, match=r"images\[0\]: the pictures of a request may have 16777216 pixels in all"):
        serve.read_images([file(5000, 5000)], None)
    monkeypatch.setattr(serve, "MAX_PIXELS", 30)
    assert len(serve.read_images([file(3, 5)] * 2, None)) == 2
    assert len(serve.read_images([(bytes(45), "application/octet-stream")] * 2, "[5, 3]")) == 2
    for third, shape in ((file(3, 5), None), ((bytes(45), "application/octet-stream"), "[5, 3]")):
        with pytest.raises(serve.Refused, match=r"images\[2\]: .* 30 pixels in all: send fewer") as error:
            serve.read_images([third] * 3, shape)
        assert error.value.status == 413


def test_a_picture_too_large_is_not_decoded(monkeypatch):
    held = io.BytesIO()
    Image.new("1", (8, 8)).save(held, "PNG")
    monkeypatch.setattr(serve, "MAX_PIXELS", 100)
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda picture, mode: decoded.append(mode) or picture)
    with pytest.raises(serve.Refused):
        serve.read_images([(held.getvalue(), "image/png")] * 2, None)
    assert decoded == ["RGB"]  # the first alone


def test_several_workers_answer_side_by_side_and_one_that_dies_is_replaced(reward_file, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import ctypes, os, time\n"
        "def pid(images, prompts):\n"
        "    if 'die' in prompts:\n"
        "        ctypes.PyDLL(None).usleep(900_000)\n"  # it keeps the interpreter to itself: nothing in the worker can answer then
        "        os._exit(9)\n"
        "    time.sleep(0.3)\n"
        "    return [float(os.getpid())] * len(prompts)\n"
    )
    with served(f"{slow}:pid", "--workers", "2", "--batch", "1") as url:
        reward = Remote(url, "mine", backoff=0.5, tries=6).connect()
        assert reward.workers == 2
        first = both(reward)
        with pytest.warns(UserWarning, match="1 pictures are masked"):
            assert bool(torch.isnan(Remote(url, "mine", tries=1).connect().ask(pictures(1), ["die"])).all())
        assert len(both(reward) & first) == 1


def both(reward):
    """The processes that answer, asked until there are two."""
    seen, deadline = set(), time.monotonic() + 60
    while len(seen) < 2 and time.monotonic() < deadline:
        seen |= set(reward.ask(pictures(4), ["p"] * 4).tolist())
    assert len(seen) == 2
    return seen


def test_a_worker_that_cannot_load_its_model_ends_the_server(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("import os\nos._exit(5)\n")
    options = argparse.Namespace(what=f"{broken}:score", scorer=None, device="cpu", batch=1, workers=1)
    with serve.claim(free_port()) as held:
        assert serve.supervise(options, held) == 1
    assert "ended with status 5 before its model was loaded" in capsys.readouterr().out


def test_what_several_workers_serve_is_tried_in_a_process_that_ends(tmp_path):
    """Here its model would stay on the GPU, beside theirs."""
    seen = tmp_path / "seen.py"
    seen.write_text(f"import os, pathlib\npathlib.Path({str(tmp_path / 'by')!r}).write_text(str(os.getpid()))\ndef score(*_): ...\n")
    options = argparse.Namespace(what=f"{seen}:score", scorer=None, device="cpu")
    assert serve.tried(options) == ("score", sources.function_version(options.what))
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "by").read_text()), 0)
    seen.write_text("import os\nos._exit(5)\n")
    with pytest.raises(ValueError, match=r"seen.py:score: the process in which its model was tried has ended"):
        serve.tried(options)


def test_a_file_of_ones_own_has_the_numbered_gpu_for_its_current_one(reward_file, monkeypatch):
    """Where it is read, and in the threads that ask it."""
    took = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: took.append((device, threading.current_thread())))
    name, version, score = serve.load(f"{reward_file}:redness", None, "cuda:1")
    assert took == [("cuda:1", threading.current_thread())]
    body = multipart(("prompts", "", b'["a cat"]'), ("shape", "", b"[1, 2]"), ("images", RAW, b"123456"))
    headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str(len(body))}

    async def receive():
        return {"type": "http.request", "body": body}

    async def send(message):
        pass

    raw = [(key.encode(), value.encode()) for key, value in headers.items()]
    ask = {"type": "http", "method": "POST", "path": "/score", "query_string": b"", "headers": raw}
    monkeypatch.setattr(torch.Tensor, "to", lambda images, device: images)
    asyncio.run(serve.application(name, version, score, device="cuda:1")(ask, receive, send))
    assert took[1][0] == "cuda:1" and took[1][1] is not threading.current_thread()
    serve.load(f"{reward_file}:redness", None, "cpu")
    assert len(took) == 2


def test_rewards_of_other_environments_are_called_as_their_packages_want(monkeypatch):
    """Stand-ins with the interface of image-reward 1.5 and hpsv3 1.0, which cannot be installed beside this package."""
    import types

    images = pictures(2)

    class Model:
        def __init__(self, device="cuda"):
            self.device = device

        def score(self, prompt, image):
            assert image.size == (7, 9)
            return len(prompt) + image.getpixel((0, 0))[0] / 255

        def reward(self, image_paths, prompts):
            assert all(picture.size == (7, 9) for picture in image_paths)
            return torch.tensor([[len(prompt), 9.0] for prompt in prompts])

    monkeypatch.setitem(sys.modules, "ImageReward", types.SimpleNamespace(load=lambda name, device: Model(device)))
    monkeypatch.setitem(sys.modules, "hpsv3", types.SimpleNamespace(HPSv3RewardInferencer=Model))
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.5")
    name, version, score = serve.load("image-reward", None, "cpu")
    assert (name, version) == ("image-reward", "image-reward-1.5")
    expected = [2 + float(images[0, 0, 0, 0]), 3 + float(images[1, 0, 0, 0])]
    assert serve.as_numbers(score(images, ["ab", "abc"]), 2) == pytest.approx(expected, abs=1e-6)
    assert serve.as_numbers(serve.load("hps3", None, "cpu")[2](images, ["ab", "abc"]), 2) == [2.0, 3.0]
    (picture,) = serve.to_pil(torch.tensor([-0.2, 0.499 / 255, 0.501 / 255, 1.2]).view(1, 1, 2, 2).expand(1, 3, 2, 2))
    assert list(picture.tobytes()) == [0, 0, 0, 0, 0, 0, 1, 1, 1, 255, 255, 255]  # as it would be saved


def test_the_server_needs_nothing_of_the_rest_of_the_package():
    """In an environment of its own there may be another transformers, and no diffusers."""
    look = "; ".join([
        "import sys", "sys.modules |= dict.fromkeys(('diffusers', 'transformers', 'huggingface_hub', 'filelock'))",
        "from fewstep.cli import main", "from fewstep.rewards import serve", "serve.application('x', 'y', None)",
        "print([m for m in sys.modules if m.startswith('fewstep.')])",
    ])  # fmt: skip
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(json.loads(done.stdout.replace("'", '"'))) == {
        "fewstep.cli",
        "fewstep.device",
        "fewstep.disk",
        "fewstep.errors",
        "fewstep.hub",
        "fewstep.launch",
        "fewstep.rewards",
        "fewstep.rewards.address",
        "fewstep.rewards.files",
        "fewstep.rewards.sources",
        "fewstep.rewards.serve",
    }


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nonsense"], "unknown reward 'nonsense'; known: clip, pickscore"),
        (["hps"], "give the folder that `fewstep convert-reward hps` made"),
        (["nowhere.py:f"], "nowhere.py: no such file"),
        (["FILE:number"], "has no function 'number'"),
        (["FILE:redness", "--port", "0"], "--port: must be 1 .. 65535"),
        (["FILE:redness", "--workers", "65"], "--workers: must be 1 .. 64"),
        (["image-reward"], "image-reward"),
        (["clip", "--scorer", "./nowhere"], "no such folder"),
        (["FILE:redness", "--scorer", "world"], "FILE:redness brings its own model; leave the flag out"),
        (["hps3", "--scorer", "./nowhere"], "--scorer: hps3 brings its own model; leave the flag out"),
        (["FILE:redness", "--device", "cuda"], "--device: there is no cuda here, torch finds 0 CUDA devices"),
        (["preference", "--scorer", "world", "--device", "cuda:1"], "--device: there is no cuda:1 here, torch finds 0 CUDA devices"),
        (["FILE:redness", "--device", "gpu"], "--device: must be cpu, cuda, cuda:N or auto, got 'gpu'"),
        (["nowhere.py:f", "--port", "BUSY"], "--port: 127.0.0.1:BUSY cannot be listened on (Address already in use)"),  # before it loads
        (["LATE:f", "--port", "FREE"], "--port: 127.0.0.1:FREE cannot be listened on (Address already in use)"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(capsys, monkeypatch, tmp_path, faulty, reward_file, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: pytest.fail("it serves"))  # and would for ever
    free = free_port()
    late = tmp_path / "late.py"  # while it loads, another server takes the port
    late.write_text(
        "import socket\nother = socket.socket()\nother.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n"
        f"other.bind(('127.0.0.1', {free}))\nother.listen()\ndef f(images, prompts): ...\n"
    )
    named = {"FILE": str(reward_file), "LATE": str(late), "BUSY": faulty.url.rpartition(":")[2], "FREE": str(free)}

    def told(text):
        return re.sub("|".join(named), lambda found: named[found[0]], text)

    port = [] if "--port" in arguments else ["--port", str(free)]
    assert cli.main(["serve-reward", *map(told, arguments), *port]) == 2
    out, err = capsys.readouterr()
    (line,) = err.strip().splitlines()
    assert told(words) in line and line.startswith("fewstep: error: serve-reward: ") and out == ""


# In a run

SMALL = ["--groups", "2", "--group-size", "2", "--save-every", "1", "--sample-every", "0", "--evaluate", "false", "--lora-rank", "0",
         "--memory.micro-groups", "0", "--memory.checkpointing", "false"]  # fmt: skip


def run(*arguments):
    return cli.main(["distill", *map(str, arguments), *SMALL])


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def trouble(log):
    return {key: value for key, value in log.items() if "/retries" in key or "/faults/" in key}


@pytest.mark.usefixtures("small_grid")
def test_a_run_is_scored_by_a_server_and_remembers_which(faulty, teacher_folder, prompt_file, tmp_path, capsys, monkeypatch):
    import yaml

    out = tmp_path / "out"
    base = ["--teacher", teacher_folder, "--prompts", prompt_file, "--output", out]
    faulty.faults = ["500", None, "null"]
    assert run(*base, "--updates", 2, "--reward.mine", faulty.url) == 0
    assert [trouble(log) for log in metrics(out)] == [{"mine/retries": 1.0, "mine/faults/answered_500": 1.0}, {}]
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["reward"] == {"mine": 1.0} and saved["via"] == {"mine": "policy"} and saved["scorer"] == {"mine": faulty.url}
    assert [log["mine/masked"] for log in metrics(out)] == [0.0, 1.0]
    (kept,) = json.loads((out / "rewards.json").read_text())
    assert kept == {"from_update": 0, "rewards": {"mine": {"source": faulty.url, "served": "faulty", "version": "v1"}}}
    other = Faulty()  # the server has moved, and is another version now
    other.health["version"] = "v2"
    FAULTS["v2"] = FAULTS["moved on"]
    other.faults = ["v2"] * 9
    faulty.faults, posted, request = ["short"], set(), remote.request

    def spy(method, url, **settings):
        if method == "POST":
            posted.add((url, settings["timeout"]))
        return request(method, url, **settings)

    monkeypatch.setattr(remote, "request", spy)
    more = ["--scorer.mine", other.url, "--judge.far", faulty.url, "--remote.timeout", 7]
    try:
        capsys.readouterr()
        with pytest.warns(UserWarning, match="wrong count"):  # a judge's missing scores stop no run
            assert run("--output", out, "--resume", "--updates", 3, *more) == 0
    finally:
        other.close()
        del FAULTS["v2"]
    assert "reward 'mine' is version v2 now; until update 2 it was v1" in capsys.readouterr().out
    assert [entry["from_update"] for entry in json.loads((out / "rewards.json").read_text())] == [0, 2]
    assert trouble(metrics(out)[2]) == {"judge.far/faults/wrong_count": 1.0}
    assert posted == {(f"{other.url}/score", 7.0), (f"{faulty.url}/score", 7.0)}


@pytest.mark.usefixtures("small_grid")
def test_a_run_stops_when_too_much_cannot_be_scored(faulty, teacher_folder, prompt_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remote, "BACKOFF", 0.01)
    out = tmp_path / "out"
    faulty.faults = [None, "short"]
    arguments = ["--teacher", teacher_folder, "--prompts", prompt_file, "--output", out, "--updates", 3, "--reward.mine", faulty.url]
    with pytest.warns(UserWarning, match="wrong count: 3 scores for 4 pictures; 4 pictures are masked"):
        assert run(*arguments) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "'mine' could not score 4 of 4 samples at update 1 (weights.max_masked)" in line and "--resume" in line
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    assert run("--output", out, "--resume", "--updates", 3) == 0  # the server is well again


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--reward.mine", "http://127.0.0.1:1"], "scorer.mine: http://127.0.0.1:1: no reward answers there (connection refused, 3 tries)"),
        (["--reward.mine", "http://example.org"], "plain http is for this machine alone"),
        (["--reward.mine", "URL", "--via.mine", "pathwise"], "via.mine: pathwise needs a gradient"),
        (["--reward.mine", "URL", "--remote.timeout", "0"], "remote.timeout: must be positive and at most a day (86400), got 0.0"),
        (["--reward.mine", "URL", "--steps", "1"], "a one-step student has no stochastic step"),
        (["--reward.mine", "URL", "--weights.mode", "sum"], "policy is for fixed and adaptive weights"),
        (["--reward.image-reward", "1"], "start `fewstep serve-reward image-reward` there and give --scorer.image-reward http://"),
        (["--reward.mine", "1", "--scorer", '{"mine": "a.py:f"}'], "--scorer: scorer.mine names code, a.py:f"),
        (["--reward.hps3", "1"], "start `fewstep serve-reward hps3` there and give --scorer.hps3 http://127.0.0.1:PORT"),
        (["--reward.hps", "1"], "`fewstep convert-reward hps` made of the published weights, --scorer.hps FOLDER"),
    ],
)
def test_a_server_that_cannot_serve_is_known_before_training(faulty, monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    assert run(*(a.replace("URL", faulty.url) for a in arguments), "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line and not (tmp_path / "out").exists()


def test_scores_alone_are_enough_where_they_only_scale(faulty):
    """weights.mode advantage follows no reward's gradient, so a server's reward needs no policy gradient there, even in one step."""
    config = flags.parse_config(["--reward.mine", faulty.url, "--weights.mode", "advantage", "--steps", "1"])
    assert config.via == {}


# Code of the user's own


@pytest.mark.usefixtures("small_grid")
def test_a_function_in_a_file_is_a_reward_by_the_users_own_flag(reward_file, teacher_folder, prompt_file, tmp_path, capsys):
    import yaml

    out = tmp_path / "out"
    base = ["--teacher", teacher_folder, "--prompts", prompt_file, "--output", out]
    assert run(*base, "--updates", 1, "--reward.mine", f"{reward_file}:redness", "--reward.other", "0.5", "--via.other", "policy",
               "--scorer.other", f"{reward_file}:judge") == 0  # fmt: skip
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["reward"] == {"mine": 1.0, "other": 0.5} and saved["scorer"] == {}  # no file names code
    assert json.loads((out / "rewards.json").read_text())[0]["rewards"]["mine"]["version"] == sources.version(str(reward_file))
    assert "mine/cosine" in metrics(out)[0] and "other/score" in metrics(out)[0]
    capsys.readouterr()
    assert run("--output", out, "--resume", "--updates", 2) == 2  # and a run that goes on runs none by itself
    assert "A run that goes on does not bring its code along: give it again" in capsys.readouterr().err
    again = ["--scorer.mine", f"{reward_file}:redness", "--scorer.other", f"{reward_file}:judge"]
    assert run("--output", out, "--resume", "--updates", 2, *again) == 0
    assert flags.saved_config(out).reward == {"mine": 1.0, "other": 0.5}  # `fewstep evaluate` reads it without running anything
    # what the flag is short for
    assert flags.parse_config(["--reward.mine=a.py:f"]) == flags.parse_config(["--reward.mine", "1", "--scorer.mine", "a.py:f"])


def test_a_file_is_run_once_for_all_its_functions(tmp_path):
    file, elsewhere = tmp_path / "mine.py", tmp_path / "folder"
    file.write_text("import pickle\nclass Own: pass\nHELD = []\ndef f(): return pickle.loads(pickle.dumps(Own()))\ndef g(): return HELD\n")
    elsewhere.mkdir()
    f, g = (sources.load_function(f"{path}:{name}") for path, name in ((file, "f"), (elsewhere / ".." / "mine.py", "g")))
    assert g() is f.__globals__["HELD"] and isinstance(f(), f.__globals__["Own"])
    assert sources.load_function(f"{file}:f") is f
    file.write_text(file.read_text() + "1 / 0")  # another file by now
    for _ in range(2):  # of one that fails nothing is kept
        with pytest.raises(ValueError, match="running it raised ZeroDivisionError"):
            sources.load_function(f"{file}:f")
    file.write_text("def f(): pass\nraise KeyboardInterrupt")  # as Ctrl-C while it reads a model
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sources.load_function(f"{file}:f")


@pytest.mark.parametrize("value", ["mine.py", "mine.py:", "mine.py:a.b"])
def test_a_file_without_its_function_is_said(capsys, value):
    assert run("--reward.mine", value) == run(f"--reward.mine={value}") == 2
    assert f"--reward.mine: {value} names no function in a file; give path/to/file.py:function" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        "reward: {mine: 1}\nscorer: {mine: 'CODE'}",
        "scorer:\n  mine: CODE\nreward:\n  mine: 1",
        "reward: {mine: 'CODE'}",
        "reward: {mine: 1}\nscorer.mine: CODE",
        'reward: {mine: 1}\nscorer: \'{"mine": "CODE"}\'',
        "reward: {mine: 1}\nscorer: &a {mine: CODE}",
        "reward: {clip: 1}\njudge: {mine: 'CODE'}",
        'reward: {clip: 1}\njudge: \'{"mine": "CODE"}\'',
    ],
)
@pytest.mark.parametrize(
    "flags", [[], ["--scorer.mine", "other.py:f"], ["--judge.mine", "other.py:f"]], ids=["alone", "beside-a-flag", "beside-a-judge"]
)
def test_a_recipe_runs_no_code(tmp_path, capsys, recipe, flags):
    mark = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(mark)!r}, 'w')\ndef f(images, prompts): return images.mean((1, 2, 3))\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.replace("CODE", f"{tmp_path / 'evil.py'}:f"))
    for arguments in ([*flags, str(path)], [str(path), *flags]):
        assert cli.main(["distill", *arguments, "--output", str(tmp_path / "out")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert "recipe.yaml" in line or "other.py" in line, line
        assert "mine" in line and not mark.exists()


def test_an_edited_config_of_a_run_runs_no_code(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("reward: {mine: 1}\nscorer: {mine: 'evil.py:f'}")
    assert run("--output", out, "--resume") == 2
    line = capsys.readouterr().err.strip()
    assert (
        f"{out / 'config.yaml'}: scorer.mine names code, evil.py:f; a file runs no code here" in line and "--scorer.mine evil.py:f" in line
    )


@pytest.mark.parametrize(
    "content, value, words",
    [
        (None, "FILE:f", "no such file"),
        ("1 / 0", "FILE:f", "running it raised ZeroDivisionError: division by zero"),
        ("exit()", "FILE:f", "running it raised SystemExit"),
        ("x = 3", "FILE:f", "has no function 'f'"),
        ("f = 3", "FILE:f", "has no function 'f'"),
    ],
)
def test_a_file_that_has_no_such_reward_is_named(tmp_path, capsys, content, value, words):
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)
    assert run("--reward.mine", value.replace("FILE", str(path)), "--output", tmp_path / "out") == 2
    line = capsys.readouterr().err.strip()
    assert f"scorer.mine: {path}: {words}" in line and not (tmp_path / "out").exists()


def test_a_function_without_gradient_says_what_to_do(reward_file, teacher_folder, prompt_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--teacher", teacher_folder, "--prompts", prompt_file, "--output", out, "--updates", 1]
    assert run(*arguments, "--reward.mine", f"{reward_file}:judge") == 1
    assert "'mine' is not differentiable (it gave no direction): use --via.mine policy" in capsys.readouterr().err


@pytest.mark.usefixtures("small_grid")
def test_python_takes_the_same_three_kinds(faulty, reward_file, teacher_folder, prompt_file, tmp_path):
    small = {"groups": 2, "group_size": 2, "updates": 1, "save_every": 1, "sample_every": 0, "evaluate": False, "lora_rank": 0,
             "memory": {"micro_groups": 0, "checkpointing": False}}  # fmt: skip
    rewards = {"far": faulty.url, "near": (f"{reward_file}:redness", 0.5), "own": lambda images, prompts: images.mean((1, 2, 3))}
    out = fewstep.distill(str(teacher_folder), str(prompt_file), rewards=rewards, output=str(tmp_path / "out"), **small)
    told = json.loads((out / "rewards.json").read_text())[0]["rewards"]
    assert told["far"]["version"] == "v1" and told["near"]["source"].endswith("mine.py:redness")
    assert told["own"] == {"source": "a function of the caller's own"}
    assert [metrics(out)[0][f"{name}/weight"] for name in rewards] == [1.0, 0.5, 1.0]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_a_server_takes_as_many_open_files_as_it_may():
    """Requests that wait hold their pictures in files: a Mac gives a process 256 of them, and 30 clients had taken those."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = serve.OPEN_FILES if before[1] == resource.RLIM_INFINITY else min(before[1], serve.OPEN_FILES)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted - 1, before[1]))
        serve.allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (wanted, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
