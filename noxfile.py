"""Supported versions: ``nox`` runs the fast part of the tests with each of them (``pip install nox``).

Each session makes an environment of its own with one torch, one Lightning and the first Python of ``PYTHONS`` that this
machine has. ``nox -s oldest`` and ``nox -s newest`` are the ends; ``nox -s "minors(torch='2.10')"`` is one in between.
"""

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
#: the last four minor versions of torch; the next release moves the window
MINORS = ["2.12", "2.13", "2.14", "2.15"]
#: what the fast part needs beside torch and Lightning
TESTING = ["hypothesis", "pytest", "pytest-timeout"]
#: compiled kernels and files of masks; all other packages that tests name are missed and skipped
EXTRAS = ".[fast,masks]"
#: small networks and few steps: several minutes
FAST = ["tests/rules", "tests/weights", "tests/layers", "tests/trainer", "tests/families", "tests/methods"]


def run(session: nox.Session, *pins: str) -> None:
    """Install this package with the pins, and run the fast part of the tests."""
    session.install(*pins, EXTRAS, *TESTING)
    session.run("python", "-c", "import lightning, torch; print(torch.__version__, lightning.__version__)")
    tests = session.posargs or FAST
    session.run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, env={"OMP_NUM_THREADS": "1"})


@nox.session
def oldest(session: nox.Session) -> None:
    """The minima that ``pyproject.toml`` promises."""
    run(session, "torch==2.4.*", "lightning==2.5.0", "numpy<2.3")


@nox.session
def newest(session: nox.Session) -> None:
    """The newest that the package index has."""
    run(session, "--upgrade", "torch", "lightning")


@nox.session
@nox.parametrize("torch", MINORS)
def minors(session: nox.Session, torch: str) -> None:
    """One minor version of torch with the newest Lightning."""
    run(session, f"torch=={torch}.*", "lightning")


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """Each Python with the newest torch and Lightning."""
    run(session, "torch", "lightning")
