"""What pyproject.toml cannot say: a wheel has the folders `configs` and `launch` inside, as `jaxlm/shipped`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDERS = ("configs", "launch")


class BuildWithFolders(build_py):
    """Copies the folders; an editable installation finds them in the checkout."""

    def run(self):
        super().run()
        for folder in () if self.editable_mode else FOLDERS:
            shutil.copytree(folder, Path(self.build_lib) / "jaxlm" / "shipped" / folder, dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithFolders})
