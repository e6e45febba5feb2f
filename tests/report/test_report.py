import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from helpers import SETTINGS, fit
from processes import PATIENCE, TESTS
from report_records import record, save

from lightning_sparse import SparsityMonitor, cli, report
from lightning_sparse.report import charts
from lightning_sparse.report.charts import STYLES, mask
from lightning_sparse.report.figures import settled

DEEP = {f"layer{index}.conv.weight": [8 + index, 4, 3, 3] for index in range(15)}


class Texts(HTMLParser):
    """The page's visible text, its tags and their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen, self.tags, self.hidden = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag == "style"

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        if not self.hidden:
            self.seen.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.seen).split())


@pytest.fixture
def run(tmp_path):
    folder = save(tmp_path / "sparse", record())
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    return folder


@pytest.fixture
def dense(tmp_path):
    return save(tmp_path / "dense", record(method=None))


def text(path: Path) -> str:
    return Texts(path.read_text(encoding="utf-8")).text


def test_the_headline_compares_with_the_dense_twin(run, dense):
    page = text(report.write(run, dense))
    assert "val_acc 96.70 % 96.20 % −0.50 points" in page
    assert "time of a step measured 1.9 ms 2.1 ms × 1.11" in page
    assert "peak memory measured 490 MiB 500 MiB × 1.02" in page
    density = record()["epochs"][-1]["density"]
    assert f"inference FLOPs per example theoretical 5.44 k {5440 * density:.3g} × {density:.3g}" in page


def test_without_a_dense_run_nothing_is_compared(run):
    page = text(report.write(run))
    assert "No dense run was given, so nothing measured is compared here" in page
    assert "points" not in page
    assert "No dense run was given, so time and memory have no bar." in page


@pytest.mark.parametrize("name", ["DFBST", "STR", "RigL"])
def test_what_the_monitor_writes_is_read(name, tmp_path):
    fit([SETTINGS[name](), SparsityMonitor()], default_root_dir=tmp_path, max_epochs=1)
    page = text(report.write(tmp_path))
    assert f"{name} on Lit finished" in page
    assert ("Thresholds at the end" in page) is (name != "RigL")
    missing = page.partition("Missing in this run")[2]
    assert missing.startswith(" an accuracy or a loss")
    for part in ("FLOPs", "step times", "peak memory", "masks", "versions", "hardware"):
        assert part not in missing


def test_the_page_lies_in_the_run_or_where_it_is_asked_for(run, tmp_path):
    assert report.write(run) == run / "report.html"
    assert report.write(run, output=tmp_path / "new" / "page.html").is_file()


def test_the_same_files_give_the_same_page(run, dense):
    pages = [report.write(run, dense).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]


def test_the_page_asks_for_nothing_from_outside_and_runs_no_scripts(run, dense):
    page = report.write(run, dense).read_text()
    tags = Texts(page).tags
    assert not any(tag == "script" for tag, _ in tags)
    addresses = [value for _, attrs in tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"@import|url\((?!#)", page)


def test_every_picture_says_in_words_what_it_shows(run, dense):
    tags = Texts(report.write(run, dense).read_text()).tags
    charts = [attrs for tag, attrs in tags if tag == "svg" and attrs.get("role") == "img"]
    pictures = [attrs for tag, attrs in tags if tag == "img"]
    assert len(charts) == 6  # densities, metric, metric against density, and thresholds of three layers
    assert len(pictures) == 3
    assert all(attrs["aria-label"] for attrs in charts)
    assert pictures[0]["alt"].startswith("Mask of net.fc1.weight, 30 neurons by 64 inputs: ")
    assert "7 of 30 neurons empty, 14 of 64 inputs empty" in pictures[0]["alt"]


def test_a_record_of_an_earlier_version_has_a_page_without_what_it_lacks(tmp_path):
    earlier = record()
    for layer in earlier["layers"]:
        del layer["neurons"], layer["inputs"]
    page = report.write(save(tmp_path / "run", earlier)).read_text(encoding="utf-8")
    assert "30 neurons by 64 inputs" in page
    assert "neurons empty" not in page


def test_no_id_stands_twice(run, dense):
    ids = [attrs["id"] for _, attrs in Texts(report.write(run, dense).read_text()).tags if "id" in attrs]
    assert ids
    assert len(ids) == len(set(ids))


def test_text_from_the_files_is_escaped(run):
    contents = record()
    contents["method"]["arguments"] = {"<script>alert(1)</script>": '"<img src=x onerror=alert(2)>'}
    contents["epochs"][-1]["metrics"]["</td><script>"] = 1.0
    (save(run, contents) / "config.yaml").write_text("model: <script>alert(3)</script>\n")
    page = report.write(run, metric="</td><script>").read_text()
    assert not any(tag == "script" or "onerror" in attrs for tag, attrs in Texts(page).tags)
    assert "model: &lt;script&gt;alert(3)&lt;/script&gt;" in page


@pytest.mark.parametrize("status", ["running", "interrupted", "failed", "unheard of"])
def test_a_run_that_did_not_finish_says_so(run, status):
    page = text(report.write(save(run, {**record(), "status": status})))
    words = {
        "running": "the training had not ended",
        "interrupted": "The training was interrupted",
        "failed": "The training stopped with an error",
        "unheard of": "'unheard of', which this version does not know",
    }
    assert words[status] in page
    assert "Last update of its file: 2026-11-21 08:02 UTC" in page


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path):
    head = {"format": 1, "status": "failed", "epochs": [], "masks": {}}
    page = text(report.write(save(tmp_path, head)))
    assert "epochs: none was completed" in page
    for part in ("the seed", "versions", "hardware", "config.yaml"):
        assert part in page.partition("Missing in this run")[2]


def test_what_was_not_recorded_is_named(run):
    contents = record()
    contents["masks"] = {}
    for epoch in contents["epochs"]:
        epoch.update(metrics={}, inference_flops=None, training_flops=None, step_time_s=None, peak_memory_bytes=None)
    page = text(report.write(save(run, contents))).partition("Missing in this run")[2]
    for part in (
        "an accuracy or a loss",
        "FLOPs of inference",
        "FLOPs of training",
        "step times",
        "peak memory",
        "pictures of the masks",
    ):
        assert part in page


def test_a_whole_record_misses_nothing(run):
    assert "Missing in this run" not in text(report.write(run))


def test_differences_between_the_twins_are_named(run, dense):
    assert "the two runs differ" not in text(report.write(run, dense))
    contents = {**record(epochs=5, method=None), "seed": 1, "status": "interrupted"}
    contents["hardware"] = {**contents["hardware"], "threads": 2}
    page = text(report.write(run, save(dense, contents)))
    for part in ("seed: 0 (dense: 1)", "hardware, threads: 1 (dense: 2)", "epochs: 8 (dense: 5)", "is interrupted"):
        assert part in page


def test_a_dense_run_alone_has_a_page(dense):
    page = text(report.write(dense))
    assert "Dense training on LeNet300" in page
    assert "No dense run was given, so nothing" not in page


def test_of_many_layers_the_densest_and_the_sparsest_are_named(run):
    page = text(report.write(save(run, record(shapes=DEEP))))
    assert "The three densest and three sparsest of 15 layers are named" in page
    assert "3 more masks" in page


def test_metrics_of_a_test_come_from_the_csv(run):
    (run / "metrics.csv").write_text("epoch,val_acc,test_acc\n0,0.5,\n1,,0.875\n")
    assert "test_acc 87.50 %" in text(report.write(run))


def test_a_metric_can_be_chosen(run):
    assert "train_loss against density" in text(report.write(run, metric="train_loss"))
    with pytest.raises(ValueError, match=r"one that the run logged \(train_loss, val_acc\), got 'loss'"):
        report.write(run, metric="loss")


def test_a_directory_without_the_file_gets_the_remedy(run, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"these have: .*sparse\. Name one"):
        report.write(tmp_path)
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match="Train with the callback SparsityMonitor"):
        report.write(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        report.write(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"format": 2}', "must have format 1, got 2"),
        ('{"format": 1}', "must have status, epochs"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, message):
    (tmp_path / "sparsity.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        report.write(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": [{"epoch": 0}]},
        {"epochs": [{"epoch": "first", "layers": {}}]},
        {"epochs": [{"epoch": 0, "layers": {}, "metrics": ["val_acc"]}]},
        {"epochs": {"0": {}}},
        {"epochs": ["first"]},
        {"layers": [{"name": "net.fc1.weight"}]},
        {"layers": {"net.fc1.weight": 0.5}},
        {"method": "RigL"},
        {"masks": {"net.fc1.weight": {**record()["masks"]["net.fc1.weight"], "density": "high"}}},
        {"module": 3},
    ],
    ids=str,
)
def test_a_file_that_is_broken_within_is_refused_by_its_path(tmp_path, change):
    folder = save(tmp_path / "run", {**record(epochs=1), **change})
    with pytest.raises(ValueError, match=r"run/sparsity\.json must (have|be as SparsityMonitor writes it).* again"):
        report.write(folder)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", b"\xd8\x00"), ("metrics.csv", b"test_acc\n\xd8"), ("metrics.csv", b"test_acc\nhigh\n")],
)
def test_a_broken_file_beside_it_is_refused_by_its_path(run, name, content):
    (run / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name} is not (text|a table of numbers) .* Remove it: the page does not need it"
    ):
        report.write(run)


def test_a_number_too_large_for_a_computer_is_not_known(tmp_path):
    whole = record(epochs=1)
    whole["epochs"][0]["step_time_s"] = 10**400
    assert "measured step times" in text(report.write(save(tmp_path / "run", whole)))


def test_a_page_is_not_written_over_a_folder(run, tmp_path):
    (tmp_path / "pages").mkdir()
    with pytest.raises(SystemExit, match=r"report: output must be a file, got the folder .*pages\. Give .*report"):
        cli.main(["report", str(run), "--output", str(tmp_path / "pages")])


def test_a_twin_with_a_method_is_refused(run, dense):
    with pytest.raises(ValueError, match="dense must be a run without a method, got one with DFBST"):
        report.write(dense, run)


def test_the_command_writes_the_page_and_names_it(run, dense, tmp_path, capsys):
    page = tmp_path / "page.html"
    cli.main(["report", str(run), "--dense", str(dense), "--output", str(page)])
    assert capsys.readouterr().out.strip() == str(page)
    assert page.is_file()
    with pytest.raises(SystemExit, match=r"lightning-sparse: .*has no sparsity\.json"):
        cli.main(["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="lightning-sparse report: dense must be"):
        cli.main(["report", str(dense), "--dense", str(run)])


@pytest.mark.parametrize("package", ["jinja2", "matplotlib.figure"])
def test_a_missing_package_names_the_extra(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r": pip install 'lightning-sparse\[report\]'"):
        report.write(run)


def test_a_mask_is_a_picture_of_its_cells():
    import base64
    import io

    from PIL import Image

    source, top = mask([[0.0, 0.5], [0.25, 0.0], [0.5, 0.0]])
    picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("L")
    assert top == 0.5
    assert picture.size == (2, 3)
    assert [picture.getpixel((x, y)) for y in range(3) for x in range(2)] == [0, 255, 128, 0, 255, 0]


@pytest.mark.parametrize(
    ("low", "high"), [(1e-12, 1), (1e-6, 1), (1e-5, 1), (0.02, 1), (0.05, 0.2), (0.09, 0.11), (0.0301, 0.0302)]
)
def test_labels_of_a_logarithmic_axis_do_not_meet(low, high):
    figure, (axes,) = charts.panels()
    axes.plot((low, high), (0, 1))
    charts._scale(axes, "x", percent=True, log=True)
    figure.draw_without_rendering()
    start, end = axes.get_xlim()
    labels = [tick.label1 for tick in axes.xaxis.get_major_ticks() if start <= tick.get_loc() <= end]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    assert len(boxes) > 1
    assert all(left.x1 + 4 < right.x0 for left, right in pairwise(boxes))


def test_early_epochs_do_not_squeeze_the_rest():
    assert settled([[0.9] * 20]) == (None, "")
    limits, words = settled([[0.1, 0.5, *[0.9] * 17, 1.0]])
    assert limits == (0.89, 1.01)
    assert "first 2 epochs" in words


# ---------------------------------------------------------------------- in a browser


def look(page: Path, *options: str) -> dict:
    """Open a page in Chromium; return what the browser saw."""
    command = [sys.executable, str(TESTS / "browser_script.py"), str(page), str(page.with_suffix(".png")), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    missing = re.search(r"ModuleNotFoundError: No module named 'PySide6.*|ImportError: lib.*", done.stderr)
    if missing:
        pytest.skip(f"Chromium of PySide6-WebEngine does not start: {missing[0]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("options", [["--width", "1200"], ["--width", "375", "--dark"]], ids=["desktop", "phone, dark"])
def test_a_browser_shows_the_page_without_errors_or_overflow(run, dense, options):
    page = report.write(save(run, {**record(shapes=DEEP), "status": "interrupted"}), dense)
    seen = look(page, *options)
    assert seen["title"] == "DFBST on LeNet300"
    assert seen["messages"] == []
    assert seen["requests"] == [page.as_uri()]
    assert seen["width"] == int(options[1])
    assert seen["scroll_width"] <= seen["width"]
    assert seen["outside"] == []
    assert len(seen["charts"]) == 3 + len(DEEP)
    assert min(seen["charts"][:3]) > 250
    assert all(seen["pictures"])
    dark = "--dark" in options
    assert seen["dark"] is dark
    assert seen["background"] == ("rgb(16, 21, 27)" if dark else "rgb(246, 247, 249)")
    blue = "rgb(90, 180, 240)" if dark else "rgb(0, 114, 178)"  # of STYLES[0], by the style sheet
    assert STYLES[0].variable == "--blue"
    assert blue in seen["colours"]
    assert page.with_suffix(".png").stat().st_size > 10_000
