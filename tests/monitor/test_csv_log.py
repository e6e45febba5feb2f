"""The CSV log with one row an epoch."""

import csv
from pathlib import Path

from helpers import fit

from lightning_sparse import RigL, SparsityMonitor
from lightning_sparse.monitor.csv_log import EpochCSVLogger


def rows(logger):
    return list(csv.DictReader(Path(logger.log_dir, "metrics.csv").open()))


def test_what_an_epoch_logs_is_one_row(tmp_path):
    logger = EpochCSVLogger(tmp_path)
    fit([SparsityMonitor(), RigL(0.8)], logger=logger, max_epochs=3)
    logged = rows(logger)
    assert [row["epoch"] for row in logged] == ["0", "1", "2"]
    assert all(row["sparsity/model"] and row["flops/training"] for row in logged)


def test_no_value_is_lost_and_the_file_is_whole_after_each_save(tmp_path):
    logger = EpochCSVLogger(tmp_path)
    for epoch in range(2):
        for step in (5, 10):
            logger.log_metrics({"epoch": epoch, "loss": step}, step)
            logger.save()
            assert rows(logger)[-1]["loss"] == str(step)
        logger.log_metrics({"epoch": epoch, "a_long_name": 1234567.0}, 11)
        logger.save()
        logger.log_metrics({"epoch": epoch, "acc": 0.5}, 12)
        logger.save()
    found = [(row["epoch"], row["step"], row["loss"], row["a_long_name"], row["acc"]) for row in rows(logger)]
    assert found == [
        (epoch, *rest) for epoch in "01" for rest in (("5", "5", "", ""), ("12", "10", "1234567.0", "0.5"))
    ]
    logger.finalize("success")
    assert len(rows(logger)) == 4
