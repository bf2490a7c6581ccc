"""Install the checkout, editable and without a network, into an environment that sees this Python's packages."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from gpu_files import ROOT


def environment(folder: Path) -> Path:
    """Python of a new environment that also sees the packages of the running Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # Not --system-site-packages: a Python that is itself in an environment would lend its base, not its packages.
    lent = [p for p in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))) if p]
    lines = "\n".join(f"import site; site.addsitedir({p!r})" for p in lent)
    (folder / "lib" / version / "site-packages" / "zz_borrowed.pth").write_text(lines + "\n")
    return python


def main(folder: Path) -> int:
    pip = [sys.executable, "-m", "pip", "--python", str(environment(folder)), "install", "--disable-pip-version-check"]
    offline = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall", "-e", str(ROOT)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run([*pip, *offline], env={**os.environ, "PATH": path}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
