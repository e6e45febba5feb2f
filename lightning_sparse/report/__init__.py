"""The report: one self-contained HTML page on a run, compared with its dense baseline if there is one."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_sparse.compat import checks
from lightning_sparse.compat.extras import extra
from lightning_sparse.monitor import run_file
from lightning_sparse.report.runs import Run, read

__all__ = ["main", "write"]


def write(
    run: str | Path, dense: str | Path | None = None, output: str | Path | None = None, metric: str | None = None
) -> Path:
    """Write the page of a run, finished or not, and return its path.

    The page needs no network: pictures and style are inside, scripts there are none. What a run did not record is
    named as missing.

    Args:
        run: the run's log directory, which holds ``sparsity.json`` of :class:`~lightning_sparse.SparsityMonitor`.
        dense: that of the same training without a method; None: the page says that nothing is compared.
        output: file to write; None: ``report.html`` in the run's directory.
        metric: name of the logged metric to draw; None: an accuracy, else a loss, of validation where there is one.

    Raises:
        FileNotFoundError: a directory has no ``sparsity.json``.
        ValueError: a file is broken, the dense run has a method, no epoch has the metric, or ``output`` is a folder.
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    checks.path("It is a run's log directory, such as runs/NAME/version_0.", run=run)
    if dense is not None:
        checks.path("It is the log directory of the dense run.", dense=dense)
    if output is not None:
        checks.path("It is the file to write.", output=output)
    environment = extra("jinja2", "report").Environment(
        loader=extra("jinja2", "report").PackageLoader("lightning_sparse.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=extra("jinja2", "report").StrictUndefined,
    )
    from lightning_sparse.report.view import refuse, view  # draws, with packages of the extra

    sparse, twin = read(run), None if dense is None else read(dense)
    path = Path(output) if output is not None else sparse.folder / "report.html"
    if path.is_dir():
        raise ValueError(f"output must be a file, got the folder {path}. Give {path / 'report.html'}.")
    with _as_written(sparse, twin):
        refuse(sparse, twin, metric)
    with _as_written(sparse, twin, ValueError):
        page = environment.get_template("page.html").render(view(sparse, twin, metric))
    run_file.write(path, page)
    return path


@contextmanager
def _as_written(run: Run, dense: Run | None, *more: type[Exception]) -> Iterator[None]:
    """Turn what fails within, since a file holds something else than it should, into an error that names the file."""
    kinds: tuple[type[Exception], ...] = (TypeError, LookupError, AttributeError, ArithmeticError, *more)
    try:
        yield
    except kinds as error:
        files = " or ".join(str(one.folder / run_file.FILE) for one in (run, dense) if one is not None)
        raise ValueError(
            f"{files} must be as SparsityMonitor writes it, but holds something else ({type(error).__name__}: {error})."
            " Copy it again from where the run wrote it."
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Write a report from the command line."""
    parser = argparse.ArgumentParser(prog="lightning-sparse report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", metavar="RUN_DIR", help="the run's log directory, which holds sparsity.json")
    parser.add_argument("--dense", metavar="DENSE_RUN_DIR", help="that of the same training without a method")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in RUN_DIR")
    parser.add_argument("--metric", metavar="NAME", help="logged metric to draw (default: an accuracy, else a loss)")
    given = parser.parse_args(args)
    try:
        print(write(given.run, given.dense, given.output, given.metric))
    except FileNotFoundError:  # says all in words
        raise
    except (ValueError, OSError) as error:
        raise SystemExit(f"lightning-sparse report: {error}") from error
