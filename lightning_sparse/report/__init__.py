"""The report: one self-contained HTML page on a run, beside its dense twin where there is one."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_sparse.compat.extras import extra
from lightning_sparse.monitor import run_file
from lightning_sparse.report.runs import read

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
        ValueError: a file is broken, the dense run has a method, or no epoch has the metric.
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    environment = extra("jinja2", "report").Environment(
        loader=extra("jinja2", "report").PackageLoader("lightning_sparse.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=extra("jinja2", "report").StrictUndefined,
    )
    from lightning_sparse.report.view import view  # draws, with packages of the extra

    sparse = read(run)
    values = view(sparse, None if dense is None else read(dense), metric)
    path = Path(output) if output is not None else sparse.folder / "report.html"
    run_file.write(path, environment.get_template("page.html").render(values))
    return path


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
    except ValueError as error:
        raise SystemExit(f"lightning-sparse report: {error}") from error
