"""Conditions on disk: what finds them again, and what makes them anew."""

import errno
import json
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import fresh
import pytest
import torch
from pipelines.parts import clip_tokenizer
from safetensors.torch import load_file, save_file

from fewstep import models
from fewstep.disk import naming
from fewstep.errors import NumericalError
from fewstep.evaluate import store
from fewstep.models import embeddings

ENCODE = "import sys; from fewstep import models; models.load(sys.argv[1]).encode(['a cat', 'a dog'])"


@pytest.fixture
def encoded(monkeypatch):
    """The prompts that a text encoder has read since."""
    prompts = []
    for name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        module, kind = models.FAMILIES[name]
        kind = getattr(__import__(module, fromlist=[kind]), kind)
        encode_one = kind.encode_one
        monkeypatch.setattr(
            kind, "encode_one", lambda self, prompt, encode_one=encode_one: prompts.append(prompt) or encode_one(self, prompt)
        )
    return prompts


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def copied(teachers, tmp_path, name="StableDiffusionPipeline"):
    return shutil.copytree(teachers / name, tmp_path / "teacher")


def test_the_same_bytes_are_encoded_once_wherever_they_lie(teachers, tmp_path, encoded, monkeypatch):
    folder = copied(teachers, tmp_path)
    before = models.load(str(folder)).encode(["a cat"])
    shutil.move(folder, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "moved", "moved", teachers / "StableDiffusionPipeline"):
        torch.testing.assert_close(models.load(str(source)).encode(["a cat"]), before, rtol=0, atol=0)
    assert encoded == ["a cat"]


def test_what_another_process_encoded_is_found(teachers, encoded, tmp_path):
    source = str(teachers / "StableDiffusionPipeline")
    fresh.run(ENCODE, source, printed=tmp_path / "printed")
    models.load(source).encode(["a cat", "a dog", "a hat"])
    assert encoded == ["a hat"]


def test_other_weights_and_settings_of_the_encoder_are_another_encoder(teachers, tmp_path, encoded):
    folder = copied(teachers, tmp_path)
    models.load(str(folder)).encode(["a cat"])
    settings = folder / "text_encoder" / "config.json"
    held = [(path, load_file(path)) for path in settings.parent.glob("*.safetensors")]
    weights, state, key = next((*each, key) for each in held for key in each[1] if key.endswith("final_layer_norm.weight"))
    save_file(state | {key: state[key] + 1}, weights, {"format": "pt"})
    models.load(str(folder)).encode(["a cat"])
    assert encoded == ["a cat"] * 2
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"layer_norm_eps": 0.1}))
    models.load(str(folder)).encode(["a cat"])
    assert encoded == ["a cat"] * 3


def test_another_limit_of_a_tokenizer_and_another_version_of_what_encodes_are_another_encoder(teachers, tmp_path, encoded, monkeypatch):
    folder = copied(teachers, tmp_path)
    models.load(str(folder)).encode(["a cat"])
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 6}))
    models.load(str(folder)).encode(["a cat"])
    assert encoded == ["a cat"] * 2
    for package in ("fewstep", "diffusers", "transformers"):
        monkeypatch.setattr(embeddings, "version", lambda name, package=package: "0" if name == package else version(name))
        models.load(str(folder)).encode(["a cat"])
    assert encoded == ["a cat"] * 5


@pytest.mark.parametrize(
    "setting",
    [{"padding_side": "left"}, {"pad_token": "<|startoftext|>"}, {"chat_template": "{{ messages }}"}, {"model_max_length": 6}],
    ids=str,
)
def test_what_else_a_tokenizer_does_is_another_encoder(setting):
    tokenizer = clip_tokenizer()
    before = embeddings.fingerprint([tokenizer])
    assert embeddings.fingerprint([clip_tokenizer()]) == before
    for name, value in setting.items():
        setattr(tokenizer, name, value)
    assert embeddings.fingerprint([tokenizer]) != before


def test_two_families_never_share_conditions(teachers):
    """As of FLUX.2 [klein] and Z-Image, which have one text encoder and read it in two ways."""
    backbone = models.load(str(teachers / "StableDiffusionPipeline"))
    other = type("Other", (type(backbone),), {})(backbone.pipe, backbone.source)
    assert other.embeddings.path("a cat") != backbone.embeddings.path("a cat")


def test_a_damaged_file_is_made_anew_and_named(teachers, encoded):
    backbone = models.load(str(teachers / "StableDiffusionPipeline"))
    before = backbone.encode(["a cat"])
    path = backbone.embeddings.path("a cat")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.warns(UserWarning, match=f"{path.name}: cannot be read"):
        again = backbone.encode(["a cat"])
    assert encoded == ["a cat"] * 2 and all(torch.equal(again[key], before[key]) for key in before)
    backbone.encode(["a cat"])
    assert len(encoded) == 2  # whole again


def test_conditions_that_are_not_finite_are_neither_kept_nor_read(tmp_path):
    value = torch.tensor([[1.0, float("nan")]])
    kept = embeddings.Embeddings(lambda prompt: {"e": value, "mask": torch.ones(1, 2, dtype=torch.long)}, lambda: [], tmp_path)
    with pytest.raises(NumericalError, match=r"^the conditions of the prompt 'a cat' hold NaN or inf, and are not kept. .* text encoder$"):
        kept["a cat"]
    assert not list(kept.folder.iterdir())
    save_file({"e": value}, kept.path("a cat"))  # as an earlier version did
    value = torch.ones(1, 2)
    with pytest.warns(UserWarning, match="holds NaN or inf; encoding its prompt again"):
        assert torch.equal(kept["a cat"]["e"], value)
    assert bool(torch.isfinite(load_file(kept.path("a cat"))["e"]).all())


def test_the_empty_prompt_of_sdxl_is_kept_apart_by_what_it_stands_for(teachers, tmp_path):
    folder = copied(teachers, tmp_path, "StableDiffusionXLPipeline")
    index = folder / "model_index.json"
    largest = []
    for zeros in (True, False):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"force_zeros_for_empty_prompt": zeros}))
        largest.append(models.load(str(folder)).encode([""])["prompt_embeds"].abs().max())
    assert largest[0] == 0 < largest[1]


def test_a_negative_prompt_is_encoded_beside_the_others_and_kept_apart_where_it_is_another_thing(teachers):
    for name, apart in (("StableDiffusionXLPipeline", False), ("SanaPipeline", True)):
        backbone, asked = models.load(str(teachers / name)), []
        prompt, negative = (backbone.embeddings.path(each) for each in ("blurry", backbone.as_negative("blurry")))
        assert (prompt != negative) == apart
        backbone.device, backbone.embeddings = torch.device("meta"), SimpleNamespace(missing=asked.extend)
        backbone.prepare(["a cat"], negative_prompt="blurry")
        backbone.prepare(["a cat"])
        assert asked == ["a cat", "", backbone.as_negative("blurry"), "a cat", ""]


@pytest.fixture
def small_files():
    """No file may grow past 1000 bytes."""
    resource = pytest.importorskip("resource")  # of Unix alone
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_named_and_left_clean(small_files, tmp_path):
    """safetensors raises an error of its own, which names no file."""
    kept = embeddings.Embeddings(lambda prompt: {"e": torch.zeros(1, 1000)}, lambda: [], tmp_path)
    for write in (lambda: kept["a cat"], lambda: store.write(kept.folder / "part.safetensors", {"x": torch.zeros(1000)})):
        with pytest.raises(OSError, match="could not be written to: File too large") as caught:
            write()
        assert caught.value.filename == str(kept.folder) and caught.value.errno == errno.EFBIG
        assert not list(kept.folder.iterdir())
        assert "XDG_CACHE_HOME" not in str(caught.value)
    kept = embeddings.Embeddings(kept.encode, kept.parts)
    with pytest.raises(OSError, match="File too large; XDG_CACHE_HOME moves what is kept there to another disk"):
        kept["a cat"]
    with pytest.raises(ZeroDivisionError), naming(tmp_path):  # anything else is what it is
        _ = 1 / 0


def test_a_disk_that_will_not_hold_all_conditions_is_named_before_it_is_full(monkeypatch, tmp_path, capsys):
    kept = embeddings.Embeddings(lambda prompt: {"e": torch.zeros(1, 1000)}, lambda: [], tmp_path)
    one, prompts = 4072, [f"number {i}" for i in range(100)]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=67 * one))
    with pytest.raises(
        OSError, match=r"the conditions of 68 more prompts take 0\.0 GiB, and 0\.0 GiB are free: set XDG_CACHE_HOME"
    ) as caught:
        kept.fill(prompts)
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(kept.folder))
    assert len(kept.missing(prompts)) == 68
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=36 * one))
    with pytest.raises(OSError, match="the conditions of 72 more prompts"):
        kept.fill(kept.missing(prompts), sharers=2)
    kept.fill(kept.missing(prompts))
    assert not kept.missing(prompts) and kept.path("number 7").stat().st_size == one
    assert kept.missing(["another", "number 7", "another"]) == ["another"]  # it is encoded once
    assert "conditions of prompts" in capsys.readouterr().out
