"""A held folder: whatever happens to its name, and whatever links are in it, nothing else is
touched.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from merge_cli.errors import OutputError
from merge_cli.system.held import GROWING, HeldFolder, escaped, is_of_dead, own_name
from merge_cli.system.process import start_time


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldFolder]:
    (tmp_path / "folder").mkdir()
    folder = HeldFolder(tmp_path / "folder")
    folder.hold()
    folder.make_folder(GROWING)
    folder.make_folder("part")
    yield folder
    folder.release()


def replace(folder: Path) -> None:
    """Another folder gets the name."""
    folder.rename(folder.with_name("away"))
    for part in ("part", GROWING):
        (folder / part).mkdir(parents=True)


def test_names_are_those_of_the_folder_that_is_held(held: HeldFolder) -> None:
    held.write_file("part/deep/file", b"1")
    assert held.is_same() and held.files("part").keys() == {"deep/file"}
    replace(held.path)
    assert not held.is_same()
    held.write_file("part/deep/more", b"2")
    held.rename("part/deep/file", "part/moved")
    assert held.files("part").keys() == {"deep/more", "moved"}
    held.remove("part")
    assert {path.name for path in held.path.rglob("*")} == {"part", GROWING} and not held.exists("part")


def test_a_folder_that_was_removed_gets_no_files(held: HeldFolder) -> None:
    (held.path / GROWING).rmdir()
    (held.path / "part").rmdir()
    held.path.rmdir()
    with pytest.raises(OutputError, match="No such file"):
        held.write_file("part/file", b"")
    with pytest.raises(FileNotFoundError):
        held.make_folder("part")


def test_links_below_are_not_followed(held: HeldFolder, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text("precious")
    (held.path / "part" / "link").symlink_to(victim)
    (held.path / "part" / "file").symlink_to(victim / "file")
    for name in ("part/link/file", "part/link/new"):
        with pytest.raises(OutputError, match="did not make it"):
            held.write_file(name, b"")
        with pytest.raises(OutputError, match="did not make it"):
            held.remove(name)
    with pytest.raises(OutputError, match="did not make it"):
        held.open("part/file", os.O_WRONLY | os.O_TRUNC)
    assert held.sha256("part/file") == ""
    held.write_file("part/file", b"replaces the link")
    held.remove("part")
    assert {path.name: path.read_text() for path in victim.iterdir()} == {"file": "precious"}


def test_only_a_name_of_a_process_of_this_host_that_is_gone_is_of_a_dead_one() -> None:
    name = own_name("a/b.safetensors").removeprefix(f"{GROWING}/")
    assert name.startswith("a%2Fb.safetensors.") and not is_of_dead(name)
    me = f".{os.getpid()}.{start_time(os.getpid())}."
    assert is_of_dead(name.replace(me, f".{os.getpid()}.1.")) and is_of_dead(name.replace(me, f".{2**22 + 1}.7."))
    host = name.split(me)[0].rpartition(".")[2]
    assert not is_of_dead(name.replace(f".{host}.", ".elsewhere.").replace(me, f".{os.getpid()}.1."))
    assert not is_of_dead("model.safetensors.partial") and not is_of_dead("x")


def test_names_of_files_that_grow_are_short(held: HeldFolder) -> None:
    held.write_file("part/" + "ü" * 120, b"")
    assert len(os.fsencode(own_name("ü" * 120))) < 255


def test_the_names_of_records_are_short_and_differ_where_the_names_of_files_do() -> None:
    long = "x" * 243 + ".safetensors"
    names = ["a/b", "a%2Fb", "a%252Fb", "a_b", "A/B", long, "y" + long[1:], long[:-1], "\u20ac" * 80, "\u20ac" * 81, "\udcff/" * 90]
    names += [f"{name}@{place}" for name in names for place in ("0-100", "100-200")] + ["m@0-100.safetensors", "m.safetensors"]
    found = [escaped(name) for name in names]
    assert len(set(found)) == len(names)
    assert all("/" not in name and len(os.fsencode(name)) <= 160 + len("@100-200") for name in found)
    assert escaped("model-00001-of-00002.safetensors") == "model-00001-of-00002.safetensors"
    assert escaped(f"{long}@0-100") == f"{escaped(long)}@0-100"


@pytest.mark.parametrize(("number", "answer"), [(errno.ENOENT, True), (errno.EXDEV, False), (errno.EPERM, True), (errno.EIO, None)])
def test_whether_names_can_be_moved_is_asked_without_a_file(
    number: int, answer: bool | None, held: HeldFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPERM is of a filesystem that cannot rename at all, which is found out when that is needed."""
    assert held.is_on_same_mount(held)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "rename", refuse)
    if answer is None:
        with pytest.raises(OSError, match="Input/output"):
            held.is_on_same_mount(held)
    else:
        assert held.is_on_same_mount(held) is answer


def test_a_folder_is_removed_with_links_in_it_and_nothing_behind_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dear = tmp_path / "dear"
    (dear / "kept").mkdir(parents=True)
    top = tmp_path / "top"
    (top / "gone" / "deep").mkdir(parents=True)
    (top / "gone" / "deep" / "file").write_text("")
    (top / "gone" / "link").symlink_to(dear)
    folder = HeldFolder(top)
    folder.hold()
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *place, **options: real(*place, **options))  # a wrapper, as monitors install it
    folder.remove("gone")
    folder.release()
    assert list(top.iterdir()) == [] and (dear / "kept").is_dir()


@pytest.mark.parametrize("name", ["../other", "part/../../other", "/other", "part//other"])
def test_no_name_leads_out_of_the_folder(name: str, held: HeldFolder) -> None:
    other = held.path.parent / "other"
    other.mkdir()
    for act in (held.remove, held.stat, lambda name: held.write_file(name, b"")):
        with pytest.raises(OutputError):
            act(name)
    assert other.is_dir()


def test_a_host_is_told_from_another_whose_long_name_begins_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    for number in range(2):
        monkeypatch.setattr(
            "socket.gethostname", lambda number=number: f"cluster-of-nodes-for-averaging-checkpoints-worker-{number}"
        )
        names.append(own_name("x"))
    assert not is_of_dead(names[0].replace(f".{os.getpid()}.", ".1."))
    assert is_of_dead(names[1].replace(f".{start_time(os.getpid())}.", ".1."))
