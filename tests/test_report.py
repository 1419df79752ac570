"""The page is whole by itself, says what the run found, and is a page that anyone can read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_curve

from cnnjax import cli, metrics, report
from cnnjax.config import AugmentConfig, Config, DataConfig, ModelConfig, TrainConfig
from cnnjax.errors import InputError
from cnnjax.machine import devices
from cnnjax.report import plots
from cnnjax.run.workdir import Workdir
from cnnjax.train import fit


@pytest.fixture(scope="module")
def run(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run on a tree whose name would break a page that does not escape."""
    folder = tmp_path_factory.mktemp("reported")
    root = folder / "films <b>&"
    shutil.copytree(tree, root)
    bad = root / "train" / "NORMAL" / "<i>bad.jpeg"
    bad.write_bytes(b"nothing")
    config = Config(
        workdir=folder / "run",
        data=DataConfig(root=str(root), size=20, cache=folder / "cache"),
        model=ModelConfig("resnet", width=4, stages=2),
        augment=AugmentConfig(0, 0.1, True),
        train=TrainConfig(epochs=3, batch=16),
    )
    fit(config)
    return folder / "run"


class Page(HTMLParser):
    """Collects what the tests ask of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += data


def written(run: Path, **asked: object) -> tuple[str, Page]:
    path = report.write(run, devices.make_mesh(Config().device), **asked)  # type: ignore[arg-type]
    text = path.read_text("utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def text(run: Path) -> str:
    """The run's page as it is."""
    return written(run)[0]


def test_the_page_is_whole_and_readable(text: str) -> None:
    page = Page(text)
    assert len(text) < 5 * 2**20
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "<script" not in text
    assert "@import" not in text
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 7
    for tag, attributes in page.tags:
        if tag == "img":
            assert attributes["alt"]
            assert str(attributes["src"]).startswith("data:image/jpeg;base64,")
        if tag == "figure":
            assert attributes["aria-label"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert names.count("img") >= 2 * (report.SAMPLES * 2 + report.AUGMENTED)
    assert ("html", {"lang": "en"}) in page.tags
    assert names.count("h1") == names.count("main") == 1


def test_what_is_missing_or_damaged_is_named(run: Path, tmp_path: Path) -> None:
    workdir = Workdir(shutil.copytree(run, tmp_path / "run"))
    whole = workdir.validation.read_text()
    workdir.validation.unlink()
    with pytest.raises(InputError, match=r"validation\.csv cannot be read \(No such file"):
        written(workdir.root)
    for damaged in (whole.replace("logit_best", "logit"), whole.rsplit(",", 2)[0]):
        workdir.validation.write_text(damaged)
        with pytest.raises(InputError, match=r"validation\.csv lacks some of image, label,"):
            written(workdir.root)
    workdir.validation.write_text(whole.splitlines()[0])
    with pytest.raises(InputError, match=r"validation\.csv holds no images"):
        written(workdir.root)
    workdir.validation.write_text(whole + "a,b,c,d,e\n")
    with pytest.raises(InputError, match=r"validation\.csv is damaged \(invalid literal"):
        written(workdir.root)


def test_names_of_any_bytes_are_read(run: Path, tmp_path: Path) -> None:
    workdir = Workdir(shutil.copytree(run, tmp_path / "run"))
    for path in (workdir.split, workdir.validation):
        path.write_bytes(path.read_bytes().replace(b"person", b"p\xebrson"))  # Latin-1
    names = workdir.read_validation().names
    assert any(b"p\xebrson" in os.fsencode(name) for name in names)
    before = Workdir(run)
    asked = [name.replace("person", os.fsdecode(b"p\xebrson")) for name in trained(before)]
    assert workdir.trained_on(asked) == len(asked) > 0


def trained(workdir: Workdir) -> list[str]:
    lines = workdir.split.read_text().splitlines()
    return [line.partition(",")[0] for line in lines if line.endswith("train")]


def test_patients_on_both_sides_are_told(run: Path, text: str, tmp_path: Path) -> None:
    """As the folders of --data.validation official may have them."""
    sides = "Number of images; according to the patient IDs, {} in both parts"
    assert sides.format("no patient is") in Page(text).text
    shutil.copytree(run, tmp_path / "run")
    split = Workdir(tmp_path / "run").split
    held_out = next(s for s in split.read_text().splitlines() if s.endswith("validation"))
    with split.open("a") as file:
        file.write(f"again-{held_out.replace('validation', 'train')}\n")
    assert sides.format("1 patient is") in written(tmp_path / "run")[1].text


def test_the_page_says_what_the_run_found(run: Path, text: str) -> None:
    page = Page(text)
    summary = json.loads((run / "summary.json").read_text())
    assert f"AUC {summary['best']['auc']['value']:.3f}" in re.sub(r"\s+", " ", page.text)
    assert "films <b>&" in page.text  # escaped, or it would be a tag
    assert "<i>bad.jpeg: neither JPEG nor PNG nor DICOM" in page.text
    assert "not a medical device" in page.text
    assert "--train.learning-rate" in page.text


@pytest.mark.slow
def test_another_split_is_judged(run: Path, tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    command = ["report", "--run", str(run), "--data", str(tree), "--out", str(out)]
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    assert "the test split of" in out.read_text()
    assert "32 images of 16 patients" in re.sub(r"\s+", " ", Page(out.read_text()).text)
    assert "it was trained on" not in out.read_text()
    with pytest.raises(SystemExit):
        cli.main([*command, "--split", "train"])
    assert "images have the names of images it was trained on" in out.read_text()
    before = (run / "report.html").exists() and (run / "report.html").read_bytes()
    with pytest.raises(SystemExit) as ended:
        cli.main([*command[:-2], "--split", "val"])
    assert ended.value.code == 0
    assert "the val split of" in (run / "report-val.html").read_text()
    assert ((run / "report.html").exists() and (run / "report.html").read_bytes()) == before


def test_files_that_cannot_be_judged_are_counted(
    run: Path, text: str, tree: Path, tmp_path: Path
) -> None:
    shutil.copytree(tree / "test", tmp_path / "films" / "test")
    for path in (tmp_path / "films").rglob("*.jpeg"):
        with Image.open(path) as image:
            image.resize((32, 24)).save(path)
    (tmp_path / "films" / "test" / "NORMAL" / "bad.jpeg").write_bytes(b"nothing")
    judged, page = written(run, data=str(tmp_path / "films"), out=tmp_path / "page.html")
    assert "1 files cannot be decoded and are left out" in page.text
    assert "for orientation; this run, on the test split of" in judged
    pictures = re.findall(r'alt="Radiograph [^"]+" width="(\d+)" height="(\d+)"', judged)
    assert set(pictures) == {("160", "120")}  # of the image's aspect ratio
    assert "for orientation; this run, on the held-out images" in text


def test_a_split_of_nothing_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run), "--split", "test"])
    assert ended.value.code == 2
    assert "error: --split test needs --data" in capsys.readouterr().err


def test_without_the_images_it_says_so(run: Path, tmp_path: Path) -> None:
    gone = tmp_path / "run"
    shutil.copytree(run, gone)
    config = json.loads((gone / "config.json").read_text())
    config["data"]["root"] = str(tmp_path / "moved-away")
    (gone / "config.json").write_text(json.dumps(config))
    _, page = written(gone)
    assert "none are shown" in page.text
    assert "img" not in [tag for tag, _ in page.tags]


def test_precision_at_a_recall_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(40) < 10).astype(int)
    logits = (rng.standard_normal(40) + labels).round(1)
    precision, recall, _ = precision_recall_curve(labels, logits)
    reached = np.unique(recall[recall > 0])
    expected = [precision[recall == r].max() for r in reached]
    found = plots.precision_at(reached, logits, labels, np.ones(40))
    np.testing.assert_allclose(found, expected)
    apart = plots.precision_at(reached, labels * 2.0 - 1, labels, np.ones(40))
    np.testing.assert_array_equal(apart, 1)


def test_curves_of_very_few_positives_are_drawn() -> None:
    """A bootstrap draw may have none of them."""
    logits, labels = np.linspace(-1, 1, 12), np.arange(12) >= 10
    patients = [str(i) for i in range(12)]
    found = metrics.evaluate(logits, labels.astype(int), patients)
    for draw in (plots.roc, plots.precision_recall):
        assert draw(logits, labels, patients, found).startswith("<svg")


def test_a_run_that_has_not_ended_has_no_report(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(InputError, match="is not finished; give its training command again"):
        written(tmp_path / "run")


@pytest.fixture(scope="module")
def other(run: Path) -> Path:
    """A run on the same images with another learning rate and more epochs."""
    config = Workdir(run).read_config()
    train = replace(config.train, learning_rate=1e-2, epochs=6)
    fit(replace(config, workdir=run.parent / "other", train=train))
    return run.parent / "other"


def test_runs_are_set_side_by_side(run: Path, other: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "both.html"
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", str(run), str(other), "--out", str(out)])
    assert ended.value.code == 0
    text = out.read_text("utf-8")
    page = Page(text)
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert [tag for tag, _ in page.tags].count("svg") == 3
    words = re.sub(r"\s+", " ", page.text)
    assert "All runs were evaluated on the same" in words
    for folder in (run, other):
        found = json.loads((folder / "summary.json").read_text())["best"]["auc"]["value"]
        assert f"{folder.name} {found:.3f}" in words
    assert "--train.learning-rate 0.001 0.01" in words
    first, second = (
        metrics.auc(judged.logits, judged.labels) or 0
        for judged in (Workdir(folder).read_validation() for folder in (run, other))
    )
    assert f"Difference from {run.name}" in words
    assert f"{other.name} {second - first:+.4f}" in words
    assert "--seed" not in words.partition("Differences in settings")[2]


def test_differences_are_of_the_same_image_whatever_the_order(
    run: Path, other: Path, tmp_path: Path
) -> None:
    turned = tmp_path / "_turned $_$"  # of a name that matplotlib would leave out, and typeset
    shutil.copytree(other, turned)
    header, *lines = (other / "validation.csv").read_text().splitlines(keepends=True)
    (turned / "validation.csv").write_text("".join([header, *lines[::-1]]))
    text = report.compare([run, other, turned], tmp_path / "all.html").read_text("utf-8")
    page = Page(text)
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == 3
    assert all(turned.name in plot for plot in plots)
    words = re.sub(r"\s+", " ", page.text).partition("Difference from")[2]
    rows = [
        re.search(rf"{re.escape(folder.name)} ((?:[+-]\d\.\d+ (?:to )?){{4,12}})", words)
        for folder in (other, turned)
    ]
    assert rows[0] is not None
    assert rows[1] is not None
    assert " to " in rows[0][1]  # no interval where all draws agree
    assert rows[0][1] == rows[1][1]


def test_runs_on_other_images_are_not_called_comparable(run: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(run, fewer)
    lines = (fewer / "validation.csv").read_text().splitlines(keepends=True)
    (fewer / "validation.csv").write_text("".join(lines[:-2]))
    summary = json.loads((fewer / "summary.json").read_text())
    (fewer / "summary.json").write_text(json.dumps(summary | {"notes": ["look <here>"]}))
    page = Page(report.compare([run, fewer], tmp_path / "both.html").read_text("utf-8"))
    assert "fewer: look <here>" in page.text
    assert "The runs were evaluated on different held-out images" in page.text
    assert "Difference from" not in page.text
    data = json.loads((fewer / "data.json").read_text())
    data["classes"].reverse()
    (fewer / "data.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="the runs have different classes"):
        report.compare([run, fewer], tmp_path / "both.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "report needs the workdir of a run"),
        (["RUN", "nowhere"], "nowhere is not a run"),
        (["RUN", "RUN", "--data", "x"], "--data needs one run"),
        (["RUN"] * 9, "9 runs are too many for one page; give at most 8"),
    ],
)
def test_what_cannot_be_reported_is_said_in_one_sentence(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *(str(run) if a == "RUN" else a for a in arguments)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


_ASK = """<script>
addEventListener("load", () => {
  const asked = performance.getEntriesByType("resource").filter(e => !e.name.startsWith("data:"));
  Object.assign(document.body.dataset, {
    pictures: document.images.length,
    broken: [...document.images].filter(image => !image.naturalWidth).length,
    requests: asked.length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  });
});
</script></body>"""

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [500, 800, 1400])
def test_a_browser_shows_the_page(text: str, tmp_path: Path, width: int) -> None:
    """Every picture, without a request, a console message, or a page wider than its window."""
    assert BROWSER is not None
    asking = tmp_path / "asking.html"
    asking.write_text(text.replace("</body>", _ASK), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={width},900", "--virtual-time-budget=5000", asking.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "CONSOLE" not in done.stderr
    found = dict(re.findall(r'data-(\w+)="(-?\d+)"', done.stdout))
    assert int(found["pictures"]) >= 2 * (report.SAMPLES * 2 + report.AUGMENTED)
    assert (found["broken"], found["requests"], found["overflow"]) == ("0", "0", "0")
