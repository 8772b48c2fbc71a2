"""What Windows and macOS answer otherwise than Linux, given by the calls themselves, and what fewstep makes of it."""

import ast
import contextlib
import errno
import importlib
import io
import json
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path, PurePath, PureWindowsPath
from unittest import mock

import pytest
import torch
from forked import ended, free_port, start
from PIL import Image
from safetensors.torch import save_file
from small_run import SEVERAL, trainer_of

import fewstep
from fewstep import checkpoint, cli, composition, disk, export, flags, folder, launch, models, needs, run
from fewstep.compare.command import workers
from fewstep.config import Config
from fewstep.device import resolve_device
from fewstep.errors import UserError
from fewstep.evaluate import sets
from fewstep.evaluate.command import evaluation_device, measure_student
from fewstep.evaluate.pictures import open_pictures
from fewstep.ranks import Ranks
from fewstep.rewards import files, serve, sources
from fewstep.rewards.convert import convert

ROOT = Path(fewstep.__file__).parent


class Windows(types.ModuleType):
    """`os` to a module that asks it where it runs; all else is as it is here."""

    name = "nt"

    def __getattr__(self, name):
        return getattr(os, name)


def refused(*_, **__):
    raise PermissionError(13, "The process cannot access the file because it is being used by another process")


# Files


@pytest.fixture
def strict_sync(monkeypatch):
    """Windows opens no folder, and syncs no file that is open for reading alone."""
    fcntl, opened, synced = pytest.importorskip("fcntl"), os.open, os.fsync

    def fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        synced(handle)

    def open_one(path, mode, *rest, **told):
        if told.get("dir_fd") is None and Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return opened(path, mode, *rest, **told)

    monkeypatch.setattr(disk, "os", Windows("os"))
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_one)


def test_a_checkpoint_is_saved_where_no_folder_can_be_opened(strict_sync, monkeypatch, tmp_path):
    checkpoint.save(tmp_path, 1, {"a": torch.ones(2)})
    monkeypatch.undo()  # which removes folders here by opening them
    assert torch.equal(checkpoint.load(tmp_path / "step-00000001")["a"], torch.ones(2))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO, errno.EBADF])  # of SMB and VirtualBox, of SMB under WSL, of others
def test_what_a_disk_says_of_a_folders_entries_ends_no_run(number, monkeypatch, tmp_path):
    synced = os.fsync

    def fsync(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode) or refuse_all:
            raise OSError(number, os.strerror(number))
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    refuse_all = False
    assert checkpoint.load(checkpoint.save(tmp_path, 1, {"a": 1})) == {"a": 1}
    disk.replace_text(tmp_path / "a", "whole")
    refuse_all = True
    with pytest.raises(OSError, match="could not write checkpoint"):
        checkpoint.save(tmp_path, 2, {"a": 2})


@pytest.fixture
def mixed(tmp_path):
    """(a folder with weights, a list of prompts and pictures; what is read of it)."""
    vae = tmp_path / "pipeline" / "vae"
    (vae / "deep").mkdir(parents=True)
    save_file({"a": torch.ones(2, dtype=torch.bfloat16)}, vae / "x.safetensors")
    (vae / "a.json").write_text('["a cat"]')
    (vae / "B.json").write_text('["a dog"]')
    for number, name in enumerate(["a.png", "B.png", "deep/c.png"]):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(vae / name)

    def read():
        models_say = models.stored_dtype(vae.parent), models.weights_in(vae.parent), models.holds_lora(mock.Mock(name_or_path=str(vae)))
        files.check_safetensors(vae)
        return models_say, sources.version(str(vae)), open_pictures(str(vae)).identity, sets.load(str(vae)).prompts

    return vae, read


def test_what_a_mac_lays_beside_files_is_none_of_them(mixed):
    folder, read = mixed
    before = read()
    (folder / ".Trashes").mkdir()
    for path in [path for path in folder.rglob("*.*") if path.is_file()]:
        (path.parent / f"._{path.name}").write_bytes(b"\0\5\x16\7" + bytes(78))
    shutil.copy(folder / "a.png", folder / ".Trashes" / "gone.png")
    assert read() == before and before[0][0] is torch.bfloat16 and before[2]["n"] == 3


def test_files_have_one_order_on_every_system(mixed, monkeypatch):
    """Paths of Windows compare without regard to case."""
    monkeypatch.setattr(PurePath, "__lt__", lambda *_: pytest.fail("in the system's own order"))
    assert mixed[1]()[-1] == ["a dog", "a cat"]


def test_a_folder_in_which_finder_has_looked_is_empty(tmp_path):
    (tmp_path / ".DS_Store").touch()
    export.check_folder(tmp_path)
    (tmp_path / "a").touch()
    with pytest.raises(export.CannotExport, match="is not empty"):
        export.check_folder(tmp_path)


def test_a_picture_that_a_viewer_holds_stays_until_it_is_drawn_anew(monkeypatch, tmp_path):
    for name in ("README.md", "evaluation.json", "curves.png"):
        (tmp_path / name).touch()
    unlink = os.unlink
    monkeypatch.setattr(os, "unlink", lambda path: refused() if Path(path).suffix == ".png" else unlink(path))
    run.remove_results(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_who_could_not_be_renamed_is_told_by_the_name_that_was_to_be(monkeypatch, capsys):
    def ended(arguments):
        raise PermissionError(errno.EACCES, "Permission denied", "out/.curves.png.57.abcd", None, "out/curves.png")

    monkeypatch.setattr(cli, "distill_command", ended)
    assert cli.main(["distill"]) == 1
    assert capsys.readouterr().err.strip() == "fewstep: error: out/curves.png: Permission denied."


def test_a_rename_waits_for_whoever_reads(monkeypatch, tmp_path):
    """As a virus scanner does what was just written: `os.replace` fails meanwhile, of a file and of a folder."""
    pauses, replace = [], os.replace
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setattr(os, "replace", lambda *names: replace(*names) if len(pauses) % 3 == 2 else refused())
    disk.replace_text(tmp_path / "a", "whole")
    assert (tmp_path / "a").read_text() == "whole" and len(pauses) == 2
    pauses.append(0)
    assert checkpoint.save(tmp_path, 1, {"a": 1}).is_dir() and len(pauses) == 5
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        disk.replace_text(tmp_path / "a", "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "step-00000001"]


def test_a_text_is_on_the_disk_before_its_name_is(monkeypatch, tmp_path):
    """Or a machine that loses its power keeps the name of an empty file, beside checkpoints that are whole."""
    fcntl = pytest.importorskip("fcntl")
    seen, synced, replace = [], os.fsync, os.replace

    def fsync(handle):
        seen.append("file" if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_RDWR else "folder")
        synced(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: seen.append("name") or replace(*names))
    disk.replace_text(tmp_path / "a", "whole")
    assert seen == ["file", "name", "folder"]


def test_a_folder_whose_copy_finds_no_room_is_named(tmp_path):
    """What copies folders goes on after a file that fails, and tells of all of them in one error without a number."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()

    def full(*names):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="could not be written to") as told, disk.naming(tmp_path):
        shutil.copytree(tmp_path / "a", tmp_path / "c", copy_function=full)
    assert told.value.errno == errno.ENOSPC and told.value.filename == str(tmp_path)


def test_what_a_killed_process_left_half_written_goes_after_a_day(tmp_path):
    left, of_another, names = disk.beside(tmp_path / "a.png"), disk.beside(tmp_path / "a.png"), (".DS_Store", "a.png.12.0123abcd", "a.png")
    for path in (left, of_another, *(tmp_path / name for name in names)):
        path.touch()
        if path != of_another:
            os.utime(path, (0, 0))
    disk.clear(tmp_path)
    disk.clear(tmp_path / "not there")
    assert {path.name for path in tmp_path.iterdir()} == {of_another.name, *names}


@pytest.mark.skipif(os.name == "nt", reason="it has no such modes")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_what_safetensors_writes_has_the_mode_of_any_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        disk.replace(tmp_path / "a", lambda path: save_file({"a": torch.ones(2)}, path))
        disk.replace_text(tmp_path / "b", "text")
        folder = checkpoint.save(tmp_path / "checkpoints", 1, {"a": torch.ones(2)})
    finally:
        os.umask(before)
    made = [tmp_path / "a", tmp_path / "b", *folder.iterdir()]
    assert {path.name: path.stat().st_mode & 0o777 for path in made} == {path.name: 0o666 & ~umask for path in made}
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "checkpoints"} and len(made) == 5


def test_a_disk_that_lets_no_mode_be_set_takes_weights(tmp_path, monkeypatch):
    def refused(self, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(disk.Path, "chmod", refused)
    disk.replace(tmp_path / "a", lambda path: save_file({"a": torch.ones(2)}, path))
    assert (tmp_path / "a").is_file()


def test_a_mode_that_is_the_usual_one_is_left_alone(monkeypatch, tmp_path):
    """Some disks let none be set."""
    monkeypatch.setattr(os, "chmod", refused)
    disk.replace_text(tmp_path / "a", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_checkpoint_that_another_process_reads_goes_with_a_later_save(monkeypatch, tmp_path):
    with monkeypatch.context() as held, pytest.warns(UserWarning, match="step-00000001: not needed any more, and cannot be removed yet"):
        held.setattr("shutil.rmtree", refused)
        for step in (1, 2, 3):
            checkpoint.save(tmp_path, step, {"step": step})
    assert len(checkpoint.checkpoints(tmp_path)) == 3
    checkpoint.save(tmp_path, 4, {})
    assert [folder.name for folder in checkpoint.checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]


def in_use(folder):
    """Whether a file in the folder is mapped: Windows neither removes nor replaces one that is, and its room on a disk is not free here."""
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not say what is mapped")
    return str(folder) in maps.read_text()


@pytest.mark.parametrize("options", [SEVERAL, ("--reward.discriminator", "0.5")])
def test_a_trainer_keeps_nothing_of_the_checkpoint_that_it_goes_on_from(options, tmp_path):
    trainer = trainer_of(options)
    for _ in range(3):
        trainer.step()
    trainer.save(tmp_path)
    _, state = checkpoint.newest(tmp_path / "checkpoints")
    assert in_use(tmp_path)
    again = trainer_of(options)
    again.load_state(state)
    del state
    assert not in_use(tmp_path)
    assert again.step().keys() == trainer.step().keys()


@pytest.mark.usefixtures("small_grid")
def test_a_run_lets_go_of_its_checkpoint_before_it_goes_on(teacher_folder, prompt_file, tmp_path, monkeypatch):
    out, seen = tmp_path / "out", []
    small = ["--groups", "2", "--group-size", "2", "--sample-every", "0", "--lora-rank", "0", "--output", str(out)]
    assert cli.main(["distill", "--teacher", str(teacher_folder), "--prompts", str(prompt_file), *small, "--updates", "1"]) == 0
    monkeypatch.setattr(run, "train", lambda *_: seen.append(in_use(out)))
    cli.main(["distill", "--output", str(out), "--resume", "--updates", "2"])
    assert seen == [False]


def test_a_lock_is_let_go_of_where_no_open_file_is_unlinked(monkeypatch, tmp_path):
    with monkeypatch.context() as held, disk.alone("output", tmp_path):
        held.setattr(os, "unlink", refused)
    with disk.alone("output", tmp_path):
        pass


def test_a_folder_that_takes_no_file_is_told_of_at_once(monkeypatch, tmp_path):
    """tempfile takes a refusal of Windows for a name that is there, and tries 2^31 others."""
    monkeypatch.setattr(tempfile, "_os", Windows("os"))
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"--output: cannot write to .* being used"):
        disk.check_writable("--output", tmp_path)


def test_a_conversion_has_let_go_of_what_it_clears_away(monkeypatch, tmp_path):
    from fewstep.rewards.aesthetic import LAYERS

    state = {f"layers.{n}.{kind}": torch.ones(2) for n in LAYERS for kind in ("weight", "bias")}
    opened = lambda command, **_: save_file(state, command[-1]) or subprocess.CompletedProcess(command, 0, "", "")  # noqa: E731
    monkeypatch.setattr("fewstep.rewards.convert.subprocess.run", opened)
    (tmp_path / "head.pth").touch()
    (tmp_path / "clip").mkdir()
    cleanup, seen = tempfile.TemporaryDirectory.cleanup, []
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda folder: seen.append(in_use(folder.name)) or cleanup(folder))
    monkeypatch.setattr("fewstep.rewards.aesthetic.check_head", lambda state: state)
    convert("aesthetic", tmp_path / "head.pth", tmp_path / "made", clip=str(tmp_path / "clip"))
    assert seen == [False] and json.loads((tmp_path / "made" / "reward.json").read_text()) == {"clip": str(tmp_path / "clip")}


# Text


def untold(path):
    """Lines of a file of code that open a text without its encoding: Windows would take that of a code page."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [part.value for part in [*node.args, *(told.value for told in node.keywords)] if isinstance(part, ast.Constant)]
        texts = {"open": any(mode in ("r", "w", "a", "x") for mode in modes), "read_text": True, "write_text": True}
        if texts.get(name) and not any(told.arg == "encoding" for told in node.keywords):
            yield node.lineno


def test_every_text_is_opened_by_its_encoding():
    assert {str(path): lines for path in ROOT.rglob("*.py") if (lines := [*untold(path)])} == {}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_the_console_has_no_character_for_is_printed_all_the_same(rank):
    """Into a file or a pipe on Windows, and by a process whose words go nowhere; the C locale has even less."""
    whole = "from fewstep.launch import *\nwith anything_prints(), first_alone_prints():\n    print('FID to data \\u2193', end='')"
    poor = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252", "RANK": rank}
    done = subprocess.run([sys.executable, "-c", whole], env=os.environ | poor, capture_output=True, cwd=ROOT.parent)
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout == (b"" if rank == "1" else b"FID to data ?")


def test_every_command_prints_what_it_has(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    monkeypatch.setattr(cli, "models_command", lambda arguments: print("± → ↑") or 0)
    assert cli.main(["models"]) == 0 and console.errors == "strict"
    console.flush()
    assert console.buffer.getvalue().strip() == "± ? ?".encode("cp1252")


def test_a_notebook_prints_as_it_does(monkeypatch):
    notebook = io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    with launch.anything_prints():
        print("↓")
    assert notebook.getvalue() == "↓\n"


def of_this_process():
    libraries = [importlib.import_module(f"{name}.utils.logging") for name in ("diffusers", "transformers")]
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"), torch.get_rng_state().tolist(), list(warnings.filters), warnings.showwarning, dict(os.environ),
        logging.getLogger("torchao").level, [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries],
    )  # fmt: skip


CALLS = {
    "distill": (lambda: fewstep.distill(), "fewstep.run.distill"),
    "load": (lambda: fewstep.load("student"), "fewstep.models.stock_pipeline"),
    "a command": (lambda: cli.main(["models"]), "fewstep.cli.models_command"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ZeroDivisionError])
def test_a_call_has_settings_of_its_own_and_leaves_the_callers(monkeypatch, call, error):
    from diffusers.utils import logging as of_diffusers

    found, (asked, inside) = [], CALLS[call]

    def work(*arguments):
        models.quiet_libraries()
        launch.set_variable("OMP_NUM_THREADS", "7")
        found.append((*of_this_process()[:5], of_diffusers.get_verbosity(), os.environ["TOKENIZERS_PARALLELISM"]))
        torch.manual_seed(3)
        if error:
            raise error
        return 0

    monkeypatch.setattr(inside, work)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    verbosity = of_diffusers.get_verbosity()
    of_diffusers.set_verbosity_info()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.random.fork_rng([]):
            before = of_this_process()
            with contextlib.suppress(KeyboardInterrupt, ZeroDivisionError):
                asked()
            assert of_this_process() == before
    finally:
        torch.set_default_dtype(torch.float32)
        of_diffusers.set_verbosity(verbosity)
    assert found == [(torch.float32, torch.device("cpu"), True, False, False, logging.ERROR, "false")]


@pytest.mark.parametrize("how, same", [((), False), (("-u",), True)], ids=["stdout", "both, unbuffered"])
def test_a_command_goes_on_where_nobody_reads_what_it_prints(tmp_path, how, same):
    """As after a `tee` that the Ctrl-C ends which is to save a run: rich would end the process in silence."""
    whole = (
        "import pathlib, sys\nfrom rich.progress import track\nfrom fewstep import cli\n"
        "def command(arguments):\n    for i in track(range(3)):\n        print('update', i, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n    print('saved')\n    return 130\n"
        "cli.models_command = command\nsys.exit(cli.main(['models']))"
    )
    read, write = os.pipe()
    os.close(read)
    err = write if same else subprocess.PIPE
    done = subprocess.run([sys.executable, *how, "-c", whole], stdout=write, stderr=err, cwd=ROOT.parent, text=True)
    os.close(write)
    assert done.returncode == 130 and (tmp_path / "saved").exists()
    if not same:
        said = done.stderr.splitlines()
        assert said[0].startswith("fewstep: nobody reads what is printed any more") and "saved" in said and len(said) < 10, said


def test_what_a_library_logs_later_is_in_no_other_file(tmp_path, monkeypatch):
    """It holds on to the stream that stood there when it was imported, and the caller may have closed the file under that one since."""
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setattr(sys, "stderr", log)
        with launch.anything_prints():
            held = sys.stderr
        assert sys.stderr is log
    with (tmp_path / "mine.csv").open("w"):
        print("late", file=held, flush=True)
    assert ((tmp_path / "mine.csv").read_text(), (tmp_path / "log").read_text()) == ("", "late\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_under_what_is_printed_hides_no_error(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(KeyError), launch.anything_prints():
            print("a line")
            raise KeyError
        assert sys.stdout is full


# Names


class WindowsPath(PureWindowsPath):
    def is_dir(self):
        return False


def test_a_students_hub_id_is_one_where_paths_have_backslashes():
    assert flags.is_student_folder(WindowsPath("owner/name@main")) is False
    with pytest.raises(UserError, match="no such folder, and not a hub id"):
        flags.is_student_folder(WindowsPath(r"C:\students\name"))


def test_a_run_in_capitals_is_the_same_on_a_mac(monkeypatch, tmp_path):
    """Its disk takes OUT for out, and `Path.resolve` leaves the letters as they are: here two names of one folder, not resolved."""
    (tmp_path / "out" / "export" / "diffusers").mkdir(parents=True)
    (tmp_path / "OUT").symlink_to(tmp_path / "out")
    monkeypatch.setattr(Path, "resolve", Path.absolute)
    output = ["--output", str(tmp_path / "out"), "--overwrite"]
    for teacher in ("OUT", "OUT/export", "OUT/export/diffusers"):
        with pytest.raises(UserError, match=r"overwrite: teacher is .* among what --overwrite deletes"):
            folder.check_spared(flags.parse_config([*output, "--teacher", str(tmp_path / teacher)]))
    with pytest.raises(UserError, match=r"init: .*out is the output folder itself"):
        folder.check_output(flags.parse_config([*output, "--init", str(tmp_path / "OUT")]))
    (tmp_path / "OUT" / "mine").mkdir()
    folder.check_spared(flags.parse_config([*output, "--teacher", str(tmp_path / "OUT" / "mine")]))


def test_paths_of_windows_come_through_the_flags():
    told = {"output": r"C:\x\new", "teacher": r"\\server\share\tsd", "prompts": r"C:\p\Nt.txt", "discriminator.latents": r"D:\pics"}
    told |= {"scorer.clip": r"C:\models\clip", "scorer.mine": r"C:\a b\mine.py:f", "judge.own": r"C:\x\judge.py:f"}
    weights = ["--reward.clip=1", "--reward.mine=1", "--reward.discriminator=1"]
    config = flags.parse_config([*weights, *(f"--{name}={value}" for name, value in told.items())])
    assert told.items() <= flags.as_values(vars(config) | {"discriminator": vars(config.discriminator)}).items()


# The machine and its processes


def test_a_machine_without_sysconf_tells_its_memory(monkeypatch):
    told = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.delattr(os, "sysconf")
    assert needs.capacity("cpu") == (told, "this machine's memory")


@pytest.fixture
def judge(tmp_path):
    path = tmp_path / "judge.py"
    path.write_text("def score(images, prompts): ...\n")
    return f"{path}:score"


def test_a_server_is_given_its_socket_itself(monkeypatch, judge):
    """By the number of one uvicorn makes a Unix socket, of which Windows' Python has none."""
    served, port = [], free_port()
    monkeypatch.setattr("uvicorn.Server.run", lambda server, sockets=None: served.extend(sockets or [None]))
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: pytest.fail("by its number"))
    assert cli.main(["serve-reward", judge, "--port", str(port), "--device", "cpu"]) == 0
    assert [held.family for held in served] == [socket.AF_INET]


def test_ctrl_c_ends_a_server_without_complaint(monkeypatch, judge):
    def stopped(server, sockets):
        raise KeyboardInterrupt

    monkeypatch.setattr("uvicorn.Server.run", stopped)
    assert cli.main(["serve-reward", judge, "--port", str(free_port()), "--device", "cpu"]) == 0


def test_a_server_on_windows_is_one_process(monkeypatch, capsys, judge):
    monkeypatch.setattr(serve, "os", Windows("os"))
    assert cli.main(["serve-reward", judge, "--workers", "2"]) == 2
    assert "--workers: on Windows a server is one process" in capsys.readouterr().err


def test_a_pool_is_no_larger_than_windows_allows(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with workers(62) as pool:
        assert pool._max_workers == 61


def test_a_port_is_shared_with_nobody(monkeypatch):
    """Windows' SO_REUSEADDR is what SO_REUSEPORT is elsewhere; its other option forbids just that."""
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)  # one that can be seen here
    with serve.claim(free_port()) as held:
        assert held.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and not held.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)


def test_processes_on_a_mac_meet_on_its_cpu(tmp_path):
    """Unasked, torch's processes speak of what lies on the machine's accelerator alone, and a run takes the CPU where that is a Mac's."""
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def of(rank):
        def work():
            os.environ.update(meeting, RANK=str(rank))
            torch._C._get_accelerator = lambda *_: torch.device("mps")
            ranks = Ranks.join()
            (tmp_path / str(rank)).write_text(json.dumps(ranks.all_gather_object(rank)))
            ranks.leave()

        return work

    assert [ended(child) for child in [start(of(rank)) for rank in range(2)]] == [0, 0]
    assert [json.loads((tmp_path / str(rank)).read_text()) for rank in range(2)] == [[0, 1], [0, 1]]


def test_gpus_without_nccl_are_told_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="NCCL, and this torch has none"):
        Ranks.join()


def test_each_process_has_a_gpu_of_its_own_or_is_told_that_there_is_none(monkeypatch):
    """Also to the pictures of an evaluation, whose judges may call .cuda(); on --device cpu none is looked for."""
    taken = []
    for name, what in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}.items():
        monkeypatch.setattr(torch.cuda, name, what)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluation_device() == "cuda:1" and taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("torch.distributed.is_nccl_available", lambda: True)
    for asked in (evaluation_device, Ranks.join):
        with pytest.raises(UserError, match="process 2 of this machine has no GPU of its own, torch finds 2: start at most 2 on a machine"):
            asked()
    monkeypatch.setattr("torch.distributed.rendezvous", mock.Mock(side_effect=ConnectionError))
    with pytest.raises(ConnectionError):
        Ranks.join("cpu")


def test_a_student_is_measured_on_the_device_that_is_told(tmp_path, monkeypatch):
    """A run's own: another GPU may be full, or somebody else's."""
    asked = []
    monkeypatch.setattr("fewstep.evaluate.evaluation.evaluate", lambda student, **told: asked.append(told["device"]))
    monkeypatch.setattr("fewstep.evaluate.command.evaluation_device", lambda: pytest.fail("looked for a GPU"))
    measure_student("student", None, None, output=tmp_path / "report.json", device="cuda:1")
    assert asked == ["cuda:1"]


def test_a_device_is_one_of_those_that_torch_finds(monkeypatch):
    for count, there, not_there in ((2, ["cpu", "cuda", "cuda:1"], ["cuda:2"]), (0, ["cpu"], ["cuda", "cuda:0"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert resolve_device("device", "auto") == ("cuda" if count else "cpu")
        assert [resolve_device("device", text) for text in there] == there
        for text in not_there:
            with pytest.raises(ValueError, match=f"device: there is no {text} here, torch finds {count} CUDA devices"):
                resolve_device("device", text)
    with pytest.raises(ValueError, match="auto, got 'mps'; Apple's GPUs are not supported, use cpu"):
        resolve_device("device", "mps")


def test_a_run_on_one_of_several_gpus_is_there_with_all_that_it_calls(monkeypatch):
    """As with a reward's bare .cuda()."""
    taken = []
    for name, what in {"is_available": lambda: True, "device_count": lambda: 2, "set_device": taken.append}.items():
        monkeypatch.setattr(torch.cuda, name, what)
    monkeypatch.setattr("fewstep.models.load", mock.Mock(side_effect=ConnectionError))
    with pytest.raises(ConnectionError):
        composition.build(Config(device="cuda:1", precision="fp32"), ["a cat"], "teacher")
    assert taken == ["cuda:1"]


def test_processes_of_one_number_on_two_machines_write_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 57)

    def while_another(temporary):
        temporary.write_text("first")
        disk.replace_text(tmp_path / "a", "other")

    disk.replace(tmp_path / "a", while_another)
    assert (tmp_path / "a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "abilities, precision",
    [
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "fp32"),  # one whose AMX is hidden by what runs it
        ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel Xeon"}, "bf16"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16"),
        ({"avx512_bf16": True}, "bf16"),  # of older torch, which tells no name
        ({"avx2": True, "cpu_name": "Intel Xeon"}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_bf16_is_taken_where_it_is_the_faster(monkeypatch, abilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    found = composition.resolve_hardware(Config(device="cpu"))
    assert (found.precision, found.memory.frozen) == (precision, "fp32")  # there is no memory to save
    asked = {"fp32": "bf16", "bf16": "fp32"}[precision]
    assert composition.resolve_hardware(Config(device="cpu", precision=asked)).precision == asked
