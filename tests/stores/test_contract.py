"""The promises of `Store` and `Source`, which every store keeps: one class of tests, run on each of
them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import memory_store
import pytest
from hub_server import HubServer
from s3_server import S3Server

from merge_cli.errors import ChangedError, InputError
from merge_cli.stores import store as stores
from merge_cli.stores.store import Entry, Source, Stat, Store, join, open_store, read_bytes, read_file

FILES = {
    "a/config.json": b"{}",
    "a/empty": b"",
    "a/weights.bin": bytes(range(256)) * 4096,
    "a/deep/er/file": b"deep",
    "b.txt": b"text",
}


class Place:
    """A store with `FILES` in the folder `root`; `change` puts other bytes into a file."""

    def __init__(self, root: str, change: Callable[[str, bytes], object]) -> None:
        self.root = root
        self.change = change
        self.store: Store = open_store(root)

    def at(self, name: str) -> str:
        return join(self.root, name)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    for name, content in FILES.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return Place(str(tmp_path / "root"), lambda name, content: (tmp_path / "root" / name).write_bytes(content))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setitem(stores.STORES, "memory", "memory_store")
    for name, content in FILES.items():
        monkeypatch.setitem(memory_store.FILES, f"memory://root/{name}", content)
    yield Place("memory://root", lambda name, content: memory_store.FILES.update({f"memory://root/{name}": content}))


@pytest.fixture
def hub(hub_server: HubServer) -> Place:
    files = {**FILES, "a/weights.safetensors": FILES["a/weights.bin"]}
    hub_server.commit("org/model", "main", files)

    def change(name: str, content: bytes) -> None:
        hub_server.commit("org/model", "main", {**files, name: content})
        open_store("hf://").expand("hf://org/model")

    return Place("hf://org/model@main", change)


@pytest.fixture
def s3(s3_server: S3Server) -> Place:
    s3_server.objects |= {f"bucket/root/{name}": content for name, content in FILES.items()}

    def change(name: str, content: bytes) -> None:
        s3_server.objects[f"bucket/root/{name}"] = content
        open_store("s3://").expand("s3://bucket")

    return Place("s3://bucket/root", change)


@pytest.fixture(params=["local", "memory", "hub", "s3"])
def place(request: pytest.FixtureRequest) -> Place:
    found: Place = request.getfixturevalue(request.param)
    return found


class TestStore:
    def test_lists_names_in_order_with_their_kinds(self, place: Place) -> None:
        assert list(place.store.list(place.root)) == [Entry("a", "folder"), Entry("b.txt", "file")]
        names = [("config.json", "file"), ("deep", "folder"), ("empty", "file"), ("weights.bin", "file")]
        assert [entry for entry in place.store.list(place.at("a")) if entry.name != "weights.safetensors"] == names

    def test_what_is_missing_cannot_be_listed_or_opened_and_has_no_facts(self, place: Place) -> None:
        for name in ("c", "a/c", "a/config", "b.txt/c", "a/conf*", "a/config.json2"):
            assert place.store.stat(place.at(name)) is None
            with pytest.raises(InputError):
                place.store.list(place.at(name))
            with pytest.raises(InputError):
                place.store.open(place.at(name))

    def test_facts(self, place: Place) -> None:
        for name, content in FILES.items():
            status = place.store.stat(place.at(name))
            assert status is not None and status[:2] == ("file", len(content))
        for name in ("a", "a/deep"):
            status = place.store.stat(place.at(name))
            assert isinstance(status, Stat) and status.kind == "folder"

    def test_a_folder_is_not_opened(self, place: Place) -> None:
        with pytest.raises(InputError):
            place.store.open(place.at("a"))

    def test_resolved_paths_mean_the_same_and_resolve_to_themselves(self, place: Place) -> None:
        real = place.store.resolve(place.at("a/config.json"))
        assert place.store.resolve(real) == real
        assert read_file(real, 100) == b"{}"

    def test_what_is_inside_is_inside(self, place: Place) -> None:
        for name in FILES:
            place.store.check_inside(place.root, place.at(name))

    def test_small_files_are_read_whole_and_large_ones_refused(self, place: Place) -> None:
        assert {name: read_file(place.at(name), 1 << 20) for name in FILES} == FILES
        with pytest.raises(InputError, match="too large"):
            read_file(place.at("b.txt"), 3)


class TestSource:
    @pytest.fixture
    def source(self, place: Place) -> Iterator[Source]:
        with closing(place.store.open(place.at("a/weights.bin"))) as source:
            yield source

    def test_path_size_and_version(self, place: Place, source: Source) -> None:
        assert source.path == place.at("a/weights.bin")
        assert source.num_bytes == 1 << 20
        with closing(place.store.open(source.path)) as again:
            assert again.version == source.version != ""

    @pytest.mark.parametrize(("begin", "size"), [(0, 1), (0, 1 << 20), (1, 1000), (4095, 70_000), ((1 << 20) - 1, 1), (77, 0)])
    def test_reads_exactly_the_bytes_asked_for(self, begin: int, size: int, source: Source) -> None:
        around = bytearray(b"\xaa" * (size + 2))
        source.read_into(begin, memoryview(around)[1:-1])
        assert around == b"\xaa" + FILES["a/weights.bin"][begin : begin + size] + b"\xaa"

    def test_a_read_past_the_end_says_so(self, source: Source) -> None:
        for begin, size in (((1 << 20) - 10, 11), (1 << 20, 1), (1 << 30, 1)):
            with pytest.raises(ChangedError) as error:
                read_bytes(source, begin, size)
            assert source.path in str(error.value) and error.value.offset is not None

    def test_a_closed_source_can_be_read_again(self, source: Source) -> None:
        for _ in range(2):
            source.close()
            assert read_bytes(source, 10, 3) == b"\x0a\x0b\x0c"

    def test_many_threads_read_one_source(self, source: Source) -> None:
        def read(i: int) -> bool:
            return read_bytes(source, i * 1009, 5000) == FILES["a/weights.bin"][i * 1009 : i * 1009 + 5000]

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, range(200)))

    @pytest.mark.parametrize("content", [b"\xff" * (1 << 20), b"short", b"\xff" * (1 << 21)])
    def test_another_content_is_another_version_and_is_not_read(self, content: bytes, place: Place, source: Source) -> None:
        read_bytes(source, 0, 10)
        source.close()
        place.change("a/weights.bin", content)
        try:
            assert read_bytes(source, 0, 10) == FILES["a/weights.bin"][:10]  # where the store still has the old version
        except ChangedError as error:
            assert source.path in str(error)
        with closing(place.store.open(source.path)) as now:
            assert (now.version, now.num_bytes) != (source.version, source.num_bytes)
            assert read_bytes(now, 0, 5) == content[:5]


def test_an_unknown_scheme_is_named() -> None:
    with pytest.raises(InputError, match=r"does not read nowhere://"):
        open_store("nowhere://bucket/run")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run/./a/", "run/a"),
        ("/", "/"),
        (".", "."),
        ("hf://org/name@main/", "hf://org/name@main"),
        ("a://../b", "a://../b"),
        (Path("x/y"), "x/y"),
    ],
)
def test_paths_as_they_are_typed(typed: str | Path, meant: str) -> None:
    assert stores.as_path(typed) == meant


@pytest.mark.parametrize(("folder", "joined"), [("/", "/x"), (".", "x"), ("a/b", "a/b/x"), ("hf://o/n@r", "hf://o/n@r/x")])
def test_names_are_joined(folder: str, joined: str) -> None:
    assert join(folder, "x") == joined
    assert (stores.name_of(joined), stores.folder_of(joined)) == ("x", folder)
