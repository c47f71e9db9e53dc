"""Says in one sentence what a build on this machine lacks, before anything long is installed. Runs on any Python 3."""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig


def missing():
    """The first thing that is missing, as a sentence; None when the extension can be built."""
    version = "%d.%d" % sys.version_info[:2]
    if sys.version_info < (3, 10):
        return "%s is Python %s: install Python 3.10 or later, and name it: make PYTHON=python3.11" % (sys.executable, version)
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        return "Python's venv module is missing: install it (Debian, Ubuntu: apt-get install python3-venv)"
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    if not os.path.exists(header):
        return (
            "Python's headers are missing (no %s): install them (Debian, Ubuntu: apt-get install python3-dev; Fedora: python3-devel)"
            % header
        )
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        return "there is no C++ compiler (%s not found): install g++ (Debian, Ubuntu: apt-get install g++), or set CXX" % compiler[0]
    probe = subprocess.run(
        compiler + ["-std=c++20", "-fsyntax-only", "-x", "c++", "-"],
        input=b"#include <bit>\n#include <span>\nint main() { return std::popcount(0u); }\n",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    if probe.returncode != 0:
        return "%s does not compile C++20: install g++ 11 or later (or clang 14 or later), or set CXX" % compiler[0]
    return None


if __name__ == "__main__":
    sentence = missing()
    if sentence:
        sys.exit("fastconv: " + sentence)
