"""Checkpoints: nothing saved is lost, nothing damaged is loaded."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forked import forked

from fewstep import checkpoint

TREE = {
    "a": torch.arange(5.0),
    "nested": {"list": [torch.ones(2, dtype=torch.int64), 3, None, "x"]},
    "state": {0: {"step": torch.tensor(1.0)}},
    "f": 0.1,
}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_round_trip_keeps_every_value_and_integer_keys(tmp_path):
    folder = checkpoint.save(tmp_path, 7, TREE)
    assert folder.name == "step-00000007" and equal(checkpoint.load(folder), TREE)


def test_optimizer_state_survives(tmp_path):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1)
    p.sum().backward()
    optimizer.step()
    again = torch.optim.AdamW([p], lr=0.3)
    again.load_state_dict(checkpoint.load(checkpoint.save(tmp_path, 1, optimizer.state_dict())))
    assert equal(again.state_dict()["state"], optimizer.state_dict()["state"])
    assert again.param_groups[0]["lr"] == 0.1


def test_no_pickle_is_written(tmp_path):
    folder = checkpoint.save(tmp_path, 1, TREE)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "state.json", "state.safetensors"]
    with pytest.raises(TypeError, match="cannot save object"):
        checkpoint.save(tmp_path, 2, {"x": object()})


def test_old_ones_are_pruned_and_the_newest_valid_one_is_found(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "step-00000003" / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        folder, state = checkpoint.newest(tmp_path)
    assert folder.name == "step-00000002" and state == {"step": 2}
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(checkpoint.DamagedCheckpoint, match="no checkpoint can be read"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nothing") is None


@pytest.mark.filterwarnings("ignore:passed over")
def test_a_copy_beside_the_checkpoints_is_none_and_stays(tmp_path):
    """Letters come after digits: a copy was the newest for ever, and what was saved after it the first to go."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step})
    copies = [shutil.copytree(tmp_path / "step-00000002", tmp_path / name) for name in ("step-best", "step-final", "step-00000002-good")]
    checkpoint.save(tmp_path, 4, {"step": 4})
    with pytest.warns(UserWarning, match="step-best: a checkpoint is named step- and eight digits; keep a copy in another folder"):
        assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000004", {"step": 4})
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    assert all(copy.is_dir() for copy in copies)
    for folder in checkpoint.checkpoints(tmp_path):
        shutil.rmtree(folder)
    with pytest.warns(UserWarning), pytest.raises(checkpoint.DamagedCheckpoint, match=r"no checkpoint can be read:\n.*step-00000002-good"):
        checkpoint.newest(tmp_path)


def test_what_is_saved_after_an_earlier_checkpoint_is_kept_beside_later_ones(tmp_path):
    """As where a run goes on from before those that are damaged; nor does a number with a digit more come first."""
    for step in (7, 8, 9, 5, 6):
        checkpoint.save(tmp_path, step, {"step": step}, keep=3)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["5", "6", "7", "8", "9"]
    for step in (99_999_999, 100_000_000):
        checkpoint.save(tmp_path, step, {"step": step}, keep=1)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["step-100000000"]
    assert checkpoint.newest(tmp_path)[1] == {"step": 100_000_000}


def test_every_truncation_and_bit_flips_are_refused(tmp_path):
    folder = checkpoint.save(tmp_path, 1, {"x": torch.arange(4.0)})
    generator = torch.Generator().manual_seed(0)
    tried = flips = 0
    for name in (*checkpoint.FILES, "manifest.json"):
        path = folder / name
        data = path.read_bytes()
        for size in range(len(data)):
            path.write_bytes(data[:size])
            with pytest.raises(checkpoint.DamagedCheckpoint):
                checkpoint.load(folder)
            tried += 1
        path.write_bytes(data)
        if name == "manifest.json":
            continue  # a flipped space in the manifest changes nothing
        for _ in range(500):
            place, bit = (int(torch.randint(high, (1,), generator=generator)) for high in (len(data), 8))
            path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
            with pytest.raises(checkpoint.DamagedCheckpoint):
                checkpoint.load(folder)
            flips += 1
        path.write_bytes(data)
    assert flips == 1000 and tried > 300 and torch.equal(checkpoint.load(folder)["x"], torch.arange(4.0))


@pytest.mark.filterwarnings("ignore:.*the earlier one is back")
@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_at_any_point_of_a_save_leaves_the_old_or_the_new(tmp_path, step):
    """The process dies before its n-th call into the file system, for every n, at a new step or the same one saved again; whatever it
    left is gone after the next save.
    """

    def save(root, fatal):
        """In a child: a first save, then one that ends at its `fatal`-th call; returns its status."""
        calls = 0

        def deadly(function):
            def wrapped(*arguments, **named):
                nonlocal calls
                calls += 1
                if calls == fatal:
                    os._exit(9)
                return function(*arguments, **named)

            return wrapped

        def work():
            checkpoint.save(root, 1, {"x": torch.zeros(3)}, keep=1)
            points = [(checkpoint, name) for name in ("save_file", "sync", "digest", "rename")]
            for owner, name in [*points, (checkpoint.shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir")]:
                setattr(owner, name, deadly(getattr(owner, name)))
            checkpoint.save(root, step, {"x": torch.ones(3)}, keep=1)

        return forked(work)

    seen, left, fatal, status = [], set(), 0, None
    while status != 0:
        fatal += 1
        root = tmp_path / f"at{fatal}"
        status = save(root, fatal)
        assert status in (0, 9)
        left |= {path.name.split("-")[0] for path in root.iterdir()}
        _, state = checkpoint.newest(root)
        seen.append(float(state["x"][0]))
        checkpoint.save(root, 3, {"x": torch.ones(3)}, keep=2)
        kept = [path.name for path in checkpoint.checkpoints(root)]
        assert sorted(path.name for path in root.iterdir()) == kept and len(kept) == 2 and kept[-1] == "step-00000003"
        assert equal(checkpoint.load(root / kept[0]), state)
    assert fatal > 12 and seen == sorted(seen) and set(seen) == {0.0, 1.0}  # at one point the new one takes the place of the old
    assert left == {"step", ".writing", *([".stale"] if step == 1 else [])}


def test_what_earlier_kills_left_is_cleared_and_what_they_moved_aside_put_back(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": 1})
    checkpoint.save(tmp_path, 2, {"x": 2}).rename(tmp_path / ".stale-00000002")
    (tmp_path / ".writing-00000002").mkdir()
    (tmp_path / ".writing-00000003").touch()
    assert checkpoint.newest(tmp_path) == (tmp_path / ".stale-00000002", {"x": 2})
    with pytest.warns(UserWarning, match=r"step-00000002: the save .* was killed; the earlier one is back"):
        checkpoint.clear(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000001", "step-00000002"]
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-00000002", {"x": 2})


def test_a_stale_one_replaces_a_damaged_one_and_never_a_whole_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": "old"}).rename(tmp_path / ".stale-00000001")
    checkpoint.save(tmp_path / "new", 1, {"x": "new"}).rename(tmp_path / "step-00000001")
    shutil.copytree(tmp_path, tmp_path / "damaged")
    (tmp_path / "damaged" / "step-00000001" / "state.json").write_text("{}")
    checkpoint.clear(tmp_path)
    assert checkpoint.load(tmp_path / "step-00000001") == {"x": "new"} and not list(tmp_path.glob(".stale*"))
    with pytest.warns(UserWarning, match="is back"):
        checkpoint.clear(tmp_path / "damaged")
    assert checkpoint.load(tmp_path / "damaged" / "step-00000001") == {"x": "old"}


@pytest.mark.parametrize(
    "tree, size",
    [({"x": torch.zeros(1_000_000)}, 4_000_000), ({"x": torch.zeros(3), "text": "a" * 200_000}, 12)],
    ids=["tensors", "json"],
)
def test_a_full_disk_is_named_with_path_and_bytes_and_leaves_what_was_saved(tmp_path, tree, size):
    """No file may grow past 100 kB: the system refuses the write itself, as a full disk does."""
    resource = pytest.importorskip("resource")  # of Unix alone
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)})

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        for step in (1, 2):
            with pytest.raises(OSError, match=rf"checkpoint of {size} bytes: File too large: .*step-0000000{step}") as caught:
                checkpoint.save(tmp_path, step, tree)
            assert caught.value.errno == errno.EFBIG

    assert forked(work) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert equal(checkpoint.load(tmp_path / "step-00000001"), {"x": torch.zeros(3)})


def test_a_folder_that_cannot_be_made_is_named_with_the_bytes(tmp_path):
    """A file stands in the folder's place: that stops root too, whom no permission does."""
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match=r"checkpoint of 12 bytes: .*checkpoints/step-00000002"):
        checkpoint.save(tmp_path / "checkpoints", 2, {"x": torch.zeros(3)})


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder_is_named_with_the_bytes(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)})
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OSError, match=r"checkpoint of 12 bytes: Permission denied: .*step-00000002"):
            checkpoint.save(tmp_path, 2, {"x": torch.zeros(3)})
    finally:
        tmp_path.chmod(0o700)
    assert checkpoint.newest(tmp_path)[0].name == "step-00000001"


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Where the power fails, what was never synced is lost, whatever its name: files first, then their folder, and its new name last."""
    synced, fsync, rename = [], os.fsync, checkpoint.rename

    def watched(handle):
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    def named(path, target):
        assert {path.stat().st_ino, *(file.stat().st_ino for file in path.iterdir())} <= {*synced}
        rename(path, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr(checkpoint, "rename", named)
    checkpoint.save(tmp_path, 1, TREE)
    assert synced == [tmp_path.stat().st_ino]


def test_a_rename_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, {"x": torch.zeros(3)})
    rename = checkpoint.rename

    def refused(path, target):
        if path.name.startswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        rename(path, target)

    monkeypatch.setattr(checkpoint, "rename", refused)
    with pytest.raises(OSError, match="12 bytes: Input/output error"):
        checkpoint.save(tmp_path, 1, {"x": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert equal(checkpoint.load(tmp_path / "step-00000001"), {"x": torch.zeros(3)})


def test_a_gpu_without_a_saved_random_state_keeps_its_own_and_says_so(monkeypatch):
    """A run that began on a CPU goes on there."""
    cpu, gpu, given = torch.device("cpu"), torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given.append((state, device)))
    state = checkpoint.rng_state(cpu)
    drawn = torch.rand(3)
    with pytest.warns(UserWarning, match="no random state of cuda:0, as one saved on a CPU"):
        checkpoint.set_rng_state(state, gpu)
    assert not given and torch.equal(torch.rand(3), drawn)
    checkpoint.set_rng_state(state | {"device": torch.ones(1)}, gpu)
    with pytest.warns(UserWarning, match="of a run on a GPU, which goes on on the CPU"):
        checkpoint.set_rng_state(state | {"device": torch.ones(1)}, cpu)
    assert given == [(torch.ones(1), gpu)]


def test_manifest_is_json(tmp_path):
    manifest = json.loads((checkpoint.save(tmp_path, 1, TREE) / "manifest.json").read_text())
    assert manifest["step"] == 1 and set(manifest["files"]) == set(checkpoint.FILES)
