import json
import sys
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image

from fewstep.config import Config
from fewstep.evaluate import pictures, sets
from fewstep.evaluate.features import Extractor
from fewstep.prompts import BadPrompts
from fewstep.run import read_prompts

# Prompt sets, in the forms they were published in

FILES = {
    "PartiPrompts.tsv": 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\nthe words "go" on a wall\tArts\tComplex\t\n',
    "drawbench.csv": 'Prompts,Category\nA red car.,Colors\n"One cat, two dogs.",Counting\n',
    "coco_30k.csv": "image_id,text\n42,A man.\n73,A dog.\n",
    "uid_caption.csv": "uid,caption\n346904_mscoco_0,A man.\n416478_mscoco_2,A dog.\n",
    "captions_val2014.json": json.dumps({"images": [{"id": 42}], "annotations": [
        {"image_id": 42, "id": 1, "caption": "A man.\n"}, {"image_id": 42, "id": 2, "caption": "A man."},
    ]}),
    "anime.json": json.dumps(["a girl", "a robot"]),
    "evaluation_metadata.jsonl": '{"tag": "counting", "include": [{"class": "bench"}], "prompt": "two benches"}\n\n{"prompt": "a cow"}\n',
    "captions_coco14_test.txt": "\ufeffa bus\r\na dog\r\n\r\na bus\r\n",
    "with_bom.csv": "\ufeffcaption,image_id\nx,7\ny,8\n",
    "breaks.csv": 'caption\na\u2028b\n"c\x0b, d\x85e"\n"two\nlines"\n',  # only a line feed ends a line
    "breaks.tsv": "caption\na\u2028b\n\nc\x1cd\n",
    "breaks.jsonl": '{"prompt": "a\u2028b"}\n{"prompt": "c\x85d"}\n',
    "breaks.txt": "a\u2028b\nc\x0bd\n",
}  # fmt: skip
HELD = {
    "PartiPrompts.tsv": (["bond", 'the words "go" on a wall'], None),
    "drawbench.csv": (["A red car.", "One cat, two dogs."], None),
    "coco_30k.csv": (["A man.", "A dog."], ["42", "73"]),
    "uid_caption.csv": (["A man.", "A dog."], ["346904_mscoco_0", "416478_mscoco_2"]),
    "captions_val2014.json": (["A man.", "A man."], ["42", "42"]),  # a caption that comes again is an entry of its own
    "anime.json": (["a girl", "a robot"], None),
    "evaluation_metadata.jsonl": (["two benches", "a cow"], None),
    "captions_coco14_test.txt": (["a bus", "a dog", "a bus"], None),
    "with_bom.csv": (["x", "y"], ["7", "8"]),
    "breaks.csv": (["a\u2028b", "c\x0b, d\x85e", "two\nlines"], None),
    "breaks.tsv": (["a\u2028b", "c\x1cd"], None),
    "breaks.jsonl": (["a\u2028b", "c\x85d"], None),
    "breaks.txt": (["a\u2028b", "c\x0bd"], None),
}


@pytest.mark.parametrize("name", FILES)
def test_published_files_are_read(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name].encode())
    assert sets.load(str(tmp_path / name)) == (name, *HELD[name])


def test_quotes_of_a_csv_in_a_tsv_are_told(tmp_path, recwarn):
    """As pandas and spreadsheets write them; they stay part of the text, as PartiPrompts has them."""
    held = ['"a sign that says ""hi"""', '"Go" and "stop"', 'a sign "hi"', '"hi"', '""']
    (tmp_path / "a.tsv").write_text("\n".join(["prompt", *held]))
    assert sets.load(str(tmp_path / "a.tsv")).prompts == held
    (told,) = recwarn.list
    assert 'a.tsv: 1 of 5 prompts are quoted as in a csv, the first: "a sign that says ""hi"""; in a tsv quotes are' in str(told.message)


def test_a_folder_of_lists_is_one_set(tmp_path, monkeypatch):
    for style, held in (("photo", ["c"]), ("anime", ["a", "b"])):
        (tmp_path / f"{style}.json").write_text(json.dumps(held))
    monkeypatch.setitem(sets.SETS, "hpsv2", sets.SETS["hpsv2"]._replace(count=3))
    assert sets.load(f"hpsv2={tmp_path}") == ("hpsv2", ["a", "b", "c"], None)


@pytest.mark.parametrize(
    "name, held, words",
    [
        ("a.csv", b"title,author\nx,y\n", "a.csv, entry 1: no text under any of the names prompt, prompts, caption"),
        ("a.csv", b"prompt\n\xff\n", "a.csv: not UTF-8 text (byte 8); save the file as UTF-8"),
        ("a.csv", b"prompt\n", "holds no prompt"),
        ("a.tsv", b"prompt\tx\nfine\t1\n\t2\n", "a.tsv, entry 2: no text under prompt: it is empty"),
        ("a.json", b'[{"captions": ["x", "y"]}]', "entry 1: one text is needed under captions, not list (['x', 'y'])"),
        ("a.json", b'{"prompts": ["x"]}', "this is neither"),
        ("a.json", b"[3]", "not int"),
        ("a.json", b"[", "a.json: Expecting"),
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt"\n', "a.jsonl: line 2"),
        ("a.json", json.dumps(["x" * 10_001]).encode(), "more than 10000"),
        ("a.csv", b"id,text\n1,A dog\n2,A man, sitting, on a chair\n", "a.csv: line 3: has 4 fields, but the header names 2; put a field"),
        ("a.tsv", b"text\tid\nA man\tsitting\t1\n", "a.tsv: line 2: has 3 fields, but the header names 2; a field holds no tab"),
        ("a.csv", b'text\nx\n"A man\nA dog\n', "a.csv: line 3: unexpected end of data; a quoted field ends with a quote"),
        ("a.csv", b'text\n"A "big" man"\n', "a.csv: line 2: ',' expected after"),
        ("a.csv", b"text\nx\n" + b"y" * (2**20 + 1), "a.csv: line 3: field larger than field limit"),
        ("a.json", b"[" * 100_000, "a.json: lists or objects are nested too deeply"),
        ("a.jsonl", b'"x"\n' + b"[" * 100_000, "a.jsonl: line 2: lists or objects are nested too deeply"),
        ("a.json", b'["fine", "\\ud800 man"]', "a.json, entry 2: holds half of a surrogate pair"),
    ],
)
def test_bad_files_are_named(tmp_path, name, held, words):
    (tmp_path / name).write_bytes(held)
    with pytest.raises(BadPrompts) as caught:
        sets.load(str(tmp_path / name))
    assert words in str(caught.value) and name in str(caught.value)


def test_a_set_has_its_published_number_of_prompts(tmp_path):
    (tmp_path / "few.csv").write_text(FILES["drawbench.csv"])
    with pytest.raises(BadPrompts, match=r"few.csv: holds 2 prompts; drawbench has 200"):
        sets.load(f"drawbench={tmp_path / 'few.csv'}")
    with pytest.raises(BadPrompts, match=r"geneval: on no hub; get prompts/evaluation_metadata.jsonl"):
        sets.load("geneval")
    with pytest.raises(BadPrompts, match="none of the sets drawbench, parti"):
        sets.load("drawbnech")


def fake_datasets(monkeypatch, splits):
    """The package `datasets`, as far as it is used, on the given splits."""
    kind = type("Image", (), {})
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda name, revision=None: splits, Image=kind))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, revision=None: SimpleNamespace(sha="c0ffee"))
    return kind()


def test_what_is_neither_a_file_nor_on_the_hub_is_said_to_be_neither(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadPrompts, match=r"data/prompts: no such file or folder; data sets on the hub need the package datasets"):
        sets.load("data/prompts")
    fake_datasets(monkeypatch, {})
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(BadPrompts, match=r"data/prompts: no such file or folder, and it cannot be read from the hub \(OSError: no network"):
        sets.load("data/prompts")


def test_sets_come_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadPrompts, match=r'parti: data sets on the hub need the package datasets: pip install "fewstep\[data\]"'):
        sets.load("parti")
    fake_datasets(monkeypatch, {"train": [{"Prompt": "bond", "Category": "Abstract"}] * 1632})
    assert sets.load("parti") == ("parti", ["bond"] * 1632, None)
    fake_datasets(monkeypatch, {"train": [{"Prompts": "a car"}]})
    with pytest.raises(BadPrompts, match="holds 1 prompts, not 200"):
        sets.load("drawbench")
    asked = []

    def download(repository, file, repo_type):
        asked.append((repository, file, repo_type))
        (tmp_path / file.split("/")[1]).write_text(json.dumps([file] * 800))
        return tmp_path / file.split("/")[1]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert len(sets.load("hpsv2").prompts) == 3200
    assert asked[0] == ("zhwang/HPDv2", "benchmark/anime.json", "dataset")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *a, **k: 1 / 0)
    with pytest.raises(BadPrompts, match=r"cannot be read from zhwang/HPDv2 on the hub .ZeroDivisionError.*give --prompts hpsv2=FILE"):
        sets.load("hpsv2")


class Split(list):
    """Rows of a split, as `datasets` has them; `read` holds the columns that were asked for."""

    features: dict

    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        self.read = names
        return [{name: row[name] for name in names} for row in self]


def test_any_data_set_of_the_hub_with_captions_is_a_set(monkeypatch):
    split = Split([{"Image": 0, "Caption": "a cat", "image_id": 7}, {"Image": 1, "Caption": "a dog", "image_id": 8}])
    fake_datasets(monkeypatch, {"train": split, "test": split})
    found = sets.load("someone/captions@main:test")
    assert found == ("someone/captions@c0ffee:test", ["a cat", "a dog"], ["7", "8"])
    assert split.read == ["Caption", "image_id"]  # its pictures are not
    assert sets.load(found.name) == found
    with pytest.raises(BadPrompts, match="has the splits train, test; name one"):
        sets.load("someone/captions")
    some = Split([{"text": text} for text in ("a cat", "", None, "x" * 10_001, "a\0b", "a dog")])
    fake_datasets(monkeypatch, {"train": some})
    with pytest.warns(UserWarning, match="captions@c0ffee:train: 4 of 6 rows are left out, the first: no text under"):
        assert sets.load("someone/captions").prompts == ["a cat", "a dog"]
    fake_datasets(monkeypatch, {"train": Split([{"title": "x", "n": 1}])})
    with pytest.raises(BadPrompts, match=r"someone/captions@c0ffee:train: no column has any of the names prompt, .*; it has title, n"):
        sets.load("someone/captions")
    for nothing in ("./some/where", "a/b/c", "drawbench/"):
        with pytest.raises(BadPrompts, match=r"no such file, none of the sets .*, and not a data set of the hub"):
            sets.load(nothing)
    for wrong, said in (
        ("DrawBench", r"data set of the hub \(owner/name\); did you mean drawbench\?"),
        ("HPSv2=some.json", r"no such file, and 'HPSv2' is none of the sets .*; did you mean hpsv2=some\.json\?"),
        ("coco=some.txt", r"coco=some\.txt: no such file, and 'coco' is none of the sets .*, coco-10k$"),
    ):
        with pytest.raises(BadPrompts, match=said):
            sets.load(wrong)
    with pytest.raises(BadPrompts, match=r"some/prompts\.txt: cannot be read"):
        sets.load("some/prompts.txt")


def test_a_run_reads_prompts_in_every_form(monkeypatch, tmp_path):
    """A table is not read as a text with a prompt a line; each prompt counts once."""
    (tmp_path / "captions.csv").write_text('image_id,caption\n1,"a cat, sitting"\n2,a dog\n3,a dog\n')
    config = Config(prompts=str(tmp_path / "captions.csv"))
    assert read_prompts(config) == ["a cat, sitting", "a dog"]
    assert config.prompts == str(tmp_path / "captions.csv")
    fake_datasets(monkeypatch, {"train": Split([{"Prompt": "a hat"}])})
    config = Config(prompts="someone/captions")
    assert read_prompts(config) == ["a hat"]
    assert config.prompts == "someone/captions@c0ffee:train"  # what config.yaml keeps


# Real pictures

VERSIONS = {"torch": "1"}
MEANS = Extractor("means", "fd_means", None, False, lambda x: x.mean((2, 3)), 3, "weights", "none")


def image(value, size=(4, 6), mode="RGB"):
    return Image.new(mode, size, value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    image((255, 0, 0)).save(tmp_path / "in" / "b.png")
    image(51, mode="L", size=(9, 3)).save(tmp_path / "in" / "deep" / "a.bmp")
    image((0, 0, 102)).save(tmp_path / "in" / "c.PNG", format="PNG")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    return tmp_path / "in"


def test_a_folders_pictures_are_read_in_order(folder, tmp_path):
    found = pictures.open_pictures(str(folder))
    assert found.n == found.identity["n"] == 3
    options = {"versions": VERSIONS, "batch": 2, "device": "cpu", "progress": False}
    features = pictures.features(found, {"means": MEANS}, tmp_path / "cache", **options)["means"]
    # b, c, deep/a: pictures of two sizes, one of them grey
    torch.testing.assert_close(features[:], torch.tensor([[1.0, 0, 0], [0, 0, 0.4], [0.2, 0.2, 0.2]]))
    image((9, 9, 9)).save(folder / "deep" / "a.bmp")
    assert pictures.open_pictures(str(folder)).identity["sha256"] != found.identity["sha256"]


def test_pictures_that_are_not_read_are_counted(folder):
    before = pictures.open_pictures(str(folder)).n
    for name, kind in (("d.JFIF", "JPEG"), ("e.gif", "GIF"), ("f.GIF", "GIF")):
        image((9, 9, 9)).save(folder / name, format=kind)
    (folder / "deep" / "g.heic").write_bytes(b"no matter")
    with pytest.warns(UserWarning, match=r"in: 3 of 7 pictures \(.gif, .heic\) are not read; save them as .png"):
        assert pictures.open_pictures(str(folder)).n == before + 1 == 4  # notes.txt is no picture


def test_pictures_of_linked_folders_are_read_once_each(folder, tmp_path):
    before = pictures.open_pictures(str(folder)).identity
    (folder / "deep" / "round").symlink_to(folder)
    (folder / "a").symlink_to(folder / "deep")
    assert pictures.open_pictures(str(folder)).identity == before
    (tmp_path / "far").mkdir()
    image((0, 255, 0)).save(tmp_path / "far" / "d.png")
    (folder / "train").symlink_to(tmp_path / "far")
    found = pictures.open_pictures(str(folder))
    assert found.n == found.identity["n"] == 4
    assert [found.get(i).getpixel((0, 0)) for i in range(4)] == [(255, 0, 0), (0, 0, 102), (51, 51, 51), (0, 255, 0)]


def test_features_of_pictures_are_kept_and_shared(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "SHARD", 1)
    found, options = pictures.open_pictures(str(folder)), {"versions": VERSIONS, "batch": 2, "device": "cpu", "progress": False}
    whole = pictures.features(found, {"means": MEANS}, tmp_path / "one", **options)["means"][:]
    asked = []
    counting = MEANS._replace(function=lambda x: asked.append(len(x)) or x.mean((2, 3)))
    for i in (1, 0):
        assert pictures.features(found, {"means": counting}, tmp_path / "two", share=(i, 2), **options) is None
    assert len(asked) == 3
    assert torch.equal(pictures.features(found, {"means": counting}, tmp_path / "two", **options)["means"][:], whole)
    assert len(asked) == 3
    other = {"means": counting, "more": counting._replace(name="more", weights="others")}
    assert set(pictures.features(found, other, tmp_path / "two", **options)) == {"means", "more"}
    assert len(asked) == 6
    pictures.features(found, {"means": counting}, tmp_path / "two", **options | {"versions": {"torch": "2"}})
    assert len(asked) == 9
    for number, told in enumerate(({"config": "another"}, {"resize": "to eight pixels"}), 1):  # which no weight tells
        pictures.features(found, {"means": counting._replace(**told)}, tmp_path / "two", **options)
        assert len(asked) == 9 + 3 * number


@pytest.mark.parametrize("pixels, most", [(2**24, 4), (3 * 24, 3), (1, 1)])
def test_no_more_real_pictures_are_held_than_a_batch(tmp_path, monkeypatch, pixels, most):
    """Nor more than have the pixels that may be held together; what is found does not depend on it."""
    monkeypatch.setattr(pictures, "PIXELS", pixels)
    alive, held = weakref.WeakValueDictionary(), []

    def get(i):
        picture = image((i, 2 * i, 255 - i), size=(4, 6) if i % 3 else (6, 4))
        alive[i] = picture
        held.append(len(alive))
        return picture

    options = {"versions": VERSIONS, "batch": 4, "device": "cpu", "progress": False}
    found = pictures.features(pictures.Pictures({"n": 30}, 30, get), {"means": MEANS}, tmp_path, **options)
    assert max(held) == most and len(held) == 30
    torch.testing.assert_close(found["means"][:], torch.tensor([[i, 2 * i, 255 - i] for i in range(30)]) / 255)


def test_an_extractor_of_another_width_is_named_with_the_pictures():
    flat = MEANS._replace(name="flat", function=lambda x: x.flatten(1), width=72)
    assert pictures.extract([image(0)], flat, batch=2, device="cpu").shape == (1, 72)
    with pytest.raises(ValueError, match=r"extractor 'flat': gave \(1, 81\) for pictures of 3 x 9 .*, and must give \(1, 72\)"):
        pictures.extract([image(0), image(0, size=(9, 3))], flat, batch=2, device="cpu")


def test_pictures_that_cannot_be_had_are_named(folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"in/b.png: too large for Pillow to open .*; scale it down"):
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
        pictures.open_pictures(str(folder)).get(0)
    (folder / "bad.png").write_bytes(b"no picture")
    (tmp_path / "deep").mkdir()
    Image.new("I;16", (8, 6), 1000).save(tmp_path / "deep" / "grey.png")
    with pytest.raises(ValueError, match=r"grey.png: cannot be read as a picture \(it holds grey values of more than 8 bits \(mode I;16\)"):
        pictures.open_pictures(str(tmp_path / "deep")).get(0)
    Image.new("F", (8, 6), 1000).save(tmp_path / "deep" / "depth.tiff")
    with pytest.raises(ValueError, match=r"depth.tiff: cannot be read as a picture \(it holds grey values of more than 8 bits \(mode F\)"):
        pictures.open_pictures(str(tmp_path / "deep")).get(0)
    with pytest.raises(ValueError, match=r"bad.png: cannot be read as a picture"):
        options = {"versions": VERSIONS, "batch": 1, "device": "cpu", "progress": False}
        pictures.features(pictures.open_pictures(str(folder)), {"means": MEANS}, tmp_path / "cache", **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no picture"):
        pictures.open_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no such folder, and not a data set of the hub"):
        pictures.open_pictures("./nowhere/here")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"fewstep\[data\]"):
        pictures.open_pictures("someone/pictures")


def test_pictures_come_from_the_hub(monkeypatch):
    part = Split([{"text": "x", "photo": image((255, 0, 0))}, {"text": "y", "photo": image(0, mode="L")}])
    splits = {"validation": part, "test": part}
    part.features = {"text": object(), "photo": fake_datasets(monkeypatch, splits)}
    found = pictures.open_pictures("someone/pictures@main:test")
    assert found.identity == {"n": 2, "hub": "someone/pictures", "commit": "c0ffee", "split": "test", "column": "photo"}
    assert found.get(1).mode == "RGB" and part.read == ["photo"]
    with pytest.raises(ValueError, match="has the splits validation, test; name one, as someone/pictures:validation"):
        pictures.open_pictures("someone/pictures")
    with pytest.raises(ValueError, match="has no split 'train'"):
        pictures.open_pictures("someone/pictures:train")
    part.features = {"text": object()}
    with pytest.raises(ValueError, match="no column of pictures; it has text"):
        pictures.open_pictures("someone/pictures:test")


def test_a_row_without_a_picture_is_named(monkeypatch):
    part = Split([{"photo": image(0)}, {"photo": None}])
    part.features = {"photo": fake_datasets(monkeypatch, {"train": part})}
    with pytest.raises(
        ValueError, match=r"^someone/pictures, split 'train', row 1: cannot be read as a picture \(there is none: it is null\)$"
    ):
        pictures.open_pictures("someone/pictures").get(1)
