"""Puts configs/ and the experiments' grids beside the package's files in a wheel; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
SHIPPED = ("configs/**/*.yaml", "experiments/*/*.yaml", "experiments/*/paper.csv")


class BuildWithConfigs(build_py):
    """Builds the package with a copy of the shipped files; an editable install reads them where they stand."""

    def run(self) -> None:
        """Builds."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "instructedit" / "_shared"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier build: a config may have gone since
        for file in (file for pattern in SHIPPED for file in HERE.glob(pattern)):
            copy = target / file.relative_to(HERE)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


setup(cmdclass={"build_py": BuildWithConfigs})
