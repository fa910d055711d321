"""Coverage-guided fuzzing of whatever reads files of strangers: libFuzzer, by Atheris, which `make fuzz` installs.

    python -m tests.fuzz.guided --count 1000000

Each target has a process of its own. What reaches lines that nothing before it reached is kept and changed further, so
that ten thousand files get deeper than as many made blindly. A file that brings about anything but records or one line
is kept in the folder ``--found``, and the status is 1.
"""

from __future__ import annotations

import argparse
import copy
import gc
import gzip
import inspect
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.fuzz.targets import FIELDS, TARGETS, outcome, saved, seeds

#: Longer files are cut, and what takes longer than so many seconds is a find.
LONGEST, SECONDS, MEGABYTES = 4096, 20, 6000
#: Modules in which a new line counts.
LINES_OF = ("instructedit", "json")


LEAVES = (None, True, 0, -1, 1 << 70, 1e999, "", "x", "{0}", "[/b]", "../../x", "\ud800", [], {}, [[]], "a" * 3000)


def _nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value, itself not among them."""
    pairs = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    return [(value, key) for key, _ in pairs] + [node for _, inner in pairs for node in _nodes(inner)]


def changed_json(content: bytes, rng: random.Random) -> bytes | None:
    """The file with a value in it replaced, left out, doubled, renamed or swapped; None where it is no JSON."""
    try:
        root = [json.loads(content)]
        (container, key), (other, its) = rng.choices(_nodes(root), k=2)
        how = rng.randrange(5)
        if how == 0:
            container[key] = copy.deepcopy(rng.choice(LEAVES))
        elif how == 1 and container is not root:
            del container[key]
        elif how == 2:
            container[key] = [container[key], copy.deepcopy(container[key])]
        elif how == 3 and isinstance(container, dict):
            container[rng.choice(FIELDS)] = container.pop(key)
        else:
            container[key] = copy.deepcopy(other[its])
        return json.dumps(root[0]).encode()
    except (ValueError, RecursionError):  # no JSON, or deeper than anybody reads
        return None


def fuzz(name: str, count: int, folder: Path) -> None:
    """Gives the target so many files; ends the process, with status 0 if nothing was found.

    Args:
        name: Of the target.
        count: Of the files.
        folder: Where it works; ``found/`` under it gets the file that ended it.
    """
    import atheris

    warnings.simplefilter("ignore")
    corpus, work, found = folder / "corpus", folder / "work", folder / "found"
    for each in (corpus, work, found):
        each.mkdir(parents=True)
    saved(work)
    file, read = TARGETS[name]
    for number, content in enumerate(seeds(name, work)):
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        (corpus / str(number)).write_bytes(content)
    words = folder / "words"
    words.write_text("".join(f'"{word}"\n' for word in FIELDS))
    place = work / file
    done = {"inputs": 0, "read": 0}

    def one(content: bytes) -> None:
        place.write_bytes(gzip.compress(content, 1) if place.suffix == ".gz" else content)
        done["inputs"] += 1
        done["read"] += outcome(read, place) == "read"
        if done["inputs"] % 1000 == 0 or done["inputs"] == count:
            (folder / "done").write_text(json.dumps(done))

    def mutate(content: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        new = changed_json(content, rng) if rng.random() < 0.5 else None
        return atheris.Mutate(content, longest) if new is None else new[:longest]

    options = [
        f"-runs={count}", "-seed=1", f"-max_len={LONGEST}", f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}",
        f"-dict={words}", f"-artifact_prefix={found}/", "-print_final_stats=1", "-verbosity=0",
    ]  # fmt: skip
    ours = [
        each for each in gc.get_objects() if inspect.isfunction(each) and (each.__module__ or "").startswith(LINES_OF)
    ]
    for function in ours:
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def in_process(name: str, count: int, folder: Path) -> tuple[int, dict[str, int], float]:
    """(Status, what was done, seconds) of a process that fuzzes it."""
    folder.mkdir(parents=True)
    options = ["--target", name, "--count", str(count), "--found", str(folder)]
    command = [sys.executable, "-m", "tests.fuzz.guided", *options]
    began = time.monotonic()
    with (folder / "log").open("w") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    done = json.loads((folder / "done").read_text()) if (folder / "done").is_file() else {"inputs": 0, "read": 0}
    return status, done, time.monotonic() - began


def main(count: int, folder: Path, at_once: int) -> int:
    """Fuzzes every target with its share of the inputs; prints a line for each; gives the number of finds."""
    share = -(-count // len(TARGETS))
    began, bad, inputs = time.monotonic(), 0, 0
    with ThreadPoolExecutor(at_once) as pool:
        places = {name: folder / name.replace(" ", "-") for name in TARGETS}
        jobs = [pool.submit(in_process, name, share, place) for name, place in places.items()]
        for (name, place), job in zip(places.items(), jobs, strict=True):
            status, done, seconds = job.result()
            kept = len(list((place / "corpus").iterdir())) if (place / "corpus").is_dir() else 0
            refused = done["inputs"] - done["read"]
            line = f"{name:20} {done['inputs']:8} files, {done['read']:7} read, {refused:8} refused"
            print(f"{line}, {kept:5} of new paths kept, {seconds:5.0f} s", flush=True)
            if status:
                bad += 1
                print(f"{name:20} FOUND, status {status}: {place / 'found'}, {place / 'log'}", flush=True)
            inputs += done["inputs"]
    print(f"{inputs} files in {time.monotonic() - began:.0f} s: {bad or 'nothing'} found", flush=True)
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000, help="of the files, shared among the targets")
    parser.add_argument("--at-once", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--target", choices=TARGETS, help="in this process, that one alone")
    parser.add_argument("--found", type=Path, help="an empty folder for what is found; else one under the system's")
    given = parser.parse_args()
    given.found = given.found or Path(tempfile.mkdtemp(prefix="fuzz-"))
    if given.target:
        fuzz(given.target, given.count, given.found)
    sys.exit(bool(main(given.count, given.found, given.at_once)))
