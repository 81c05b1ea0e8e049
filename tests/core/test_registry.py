"""The registry's four failures, its laziness and third parties' entry points, with real modules and a real dist-info on the path."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1q.core.errors import MissingError, UsageError
from r1q.core.registry import Entry, Registry


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a folder on sys.path in which a test writes modules."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def offer(folder: Path, package: str, lines: str) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[r1q.test_things]\n{lines}\n")


def test_a_name_is_imported_when_asked_and_not_before(packages: Path) -> None:
    (packages / "lazy_thing.py").write_text("VALUE = 7\n")
    registry: Registry[int] = Registry("thing", {"lazy": Entry(target="lazy_thing:VALUE")})
    assert registry.names() == ("lazy",)
    assert "lazy_thing" not in sys.modules
    assert registry.load("lazy") == 7
    assert "lazy_thing" in sys.modules


def test_unknown_name_offers_the_near_ones() -> None:
    registry: Registry[int] = Registry("runtime", {"llama-cpp": Entry(target="a:b"), "echo": Entry(target="a:b")})
    with pytest.raises(
        UsageError, match=r"no runtime named 'llama_cpp'; did you mean llama-cpp\? \(known: echo, llama-cpp\)"
    ):
        registry.load("llama_cpp")


def test_absent_library_names_the_extra() -> None:
    registry: Registry[int] = Registry("thing", {"x": Entry(target="os:path", needs="absent_lib", extra="with-x")})
    with pytest.raises(MissingError, match=r"thing 'x' needs absent_lib: pip install 'r1q\[with-x\]'"):
        registry.load("x")


def test_a_library_that_the_target_prepares_for_is_looked_for_and_not_imported(packages: Path) -> None:
    (packages / "touchy_lib.py").write_text("VALUE = 1\n")
    (packages / "touchy_adapter.py").write_text(
        "import sys; BEFORE = 'touchy_lib' in sys.modules; import touchy_lib; VALUE = BEFORE\n"
    )
    entry = Entry(target="touchy_adapter:VALUE", needs="touchy_lib", extra="touchy", prepares=True)
    assert Registry("thing", {"x": entry}).load("x") is False
    absent = Entry(target="touchy_adapter:VALUE", needs="absent_lib", extra="touchy", prepares=True)
    with pytest.raises(MissingError, match=r"thing 'x' needs absent_lib: pip install 'r1q\[touchy\]'"):
        Registry("thing", {"x": absent}).load("x")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import something_it_lacks", "No module named 'something_it_lacks'"),
        ("raise RuntimeError('libfoo.so.3 not found')", "libfoo.so.3 not found"),
        ("raise OSError('wrong ELF class')", "wrong ELF class"),
    ],
)
def test_installed_library_that_does_not_load_says_why(packages: Path, body: str, reason: str) -> None:
    (packages / "broken_lib.py").write_text(body + "\n")
    registry: Registry[int] = Registry("thing", {"x": Entry(target="os:path", needs="broken_lib", extra="x")})
    with pytest.raises(MissingError, match=f"broken_lib is installed but does not load: {reason}"):
        registry.load("x")


def test_broken_import_inside_our_own_module_is_raised_untouched(packages: Path) -> None:
    (packages / "our_adapter.py").write_text("import typo_of_ours\n")
    registry: Registry[int] = Registry("thing", {"x": Entry(target="our_adapter:X", needs="json", extra="x")})
    with pytest.raises(ModuleNotFoundError, match="typo_of_ours"):
        registry.load("x")


def test_installed_packages_widen_the_table(packages: Path) -> None:
    (packages / "third_party.py").write_text("THING = 'theirs'\n")
    offer(packages, "somebody", "theirs = third_party:THING")
    registry: Registry[str] = Registry("thing", {"ours": Entry(target="os:sep")}, group="r1q.test_things")
    assert registry.names() == ("ours", "theirs")
    assert registry.entry("theirs").about == "from somebody"
    assert registry.load("theirs") == "theirs"


def test_third_party_module_that_fails_names_its_package(packages: Path) -> None:
    (packages / "third_broken.py").write_text("import what_it_forgot_to_declare\n")
    offer(packages, "somebody", "theirs = third_broken:THING")
    registry: Registry[str] = Registry("thing", {}, group="r1q.test_things")
    with pytest.raises(MissingError, match=r"thing 'theirs' of package somebody does not load: .*what_it_forgot"):
        registry.load("theirs")


def test_one_name_offered_twice_is_refused_and_the_rest_still_load(packages: Path) -> None:
    offer(packages, "somebody", "sep = os:linesep")
    registry: Registry[str] = Registry(
        "thing", {"sep": Entry(target="os:sep"), "cur": Entry(target="os:curdir")}, group="r1q.test_things"
    )
    with pytest.raises(UsageError, match="thing 'sep' is offered by r1q and somebody"):
        registry.load("sep")
    assert registry.load("cur") == "."


@pytest.mark.parametrize("target", ["no_colon", ":name", "module:"])
def test_malformed_target_is_our_mistake(target: str) -> None:
    with pytest.raises(ValueError, match="is not 'module:object'"):
        Entry(target=target)
