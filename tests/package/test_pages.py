"""Facts that README and docs state: links, figures of tables, names, pictures."""

import csv
import re
import statistics
import subprocess
import sys

import pytest
from support.optional import optional
from support.pages import PAGES, environment, figure_script
from support.paths import ROOT

from epsa_fused.models import FIGURES

README = PAGES["README.md"]
RESULTS = ROOT / "benchmarks" / "results"
MACHINE = "intel-xeon-2.5ghz"
OPPONENTS = ("published eager", "published compiled", "rewrite eager", "rewrite compiled")


def results(name: str, **wanted: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if wanted.items() <= row.items()]


def by_shape(level: str, mode: str, layout: str) -> dict[str, dict[str, dict[str, str]]]:
    """Shape -> contender -> row, as the tables write shapes."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    wanted = {"level": level, "mode": mode, "layout": layout, "dtype": "float32"}
    for row in results(f"{MACHINE}-{level}", **wanted):
        shape = f"({row['n']}, {row['planes']}, {row['size']})"
        found.setdefault(shape, {})[row["contender"]] = row
    return found


def over_best(case: dict[str, dict[str, str]]) -> float:
    return min(float(case[name]["over_fused"]) for name in OPPONENTS if name in case)


# ---- README ----


def test_readme_is_short_and_names_what_a_newcomer_needs():
    assert len(README.splitlines()) <= 150
    for needed in ("make demo", "make test", "CONTRIBUTING.md", "csrc/README.md", "CITATION.cff"):
        assert needed in README, needed
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"docs/{page.name}" in README, page.name


def test_readme_gives_the_ranges_of_the_results():
    """The ratios of its first table."""
    attention = [over_best(c) for c in by_shape("attention", "forward", "contiguous").values()]
    layouts = ("contiguous", "channels_last")
    module = [over_best(c) for x in layouts for c in by_shape("module", "forward", x).values()]
    module_row = f"each module that is {min(module):.1f} to {max(module):.1f} times as fast"
    assert module_row in README
    assert f"{min(attention):.1f} to {max(attention):.1f} times as fast as the best" in README


# ---- links and names ----


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)|(?:src|srcset)=\"([^\":]+)\"", text)
        for link in filter(None, (a or b for a, b in links)):
            # pages that the site makes of files of the root
            made = link in ("contributing.md", "changelog.md")
            assert made or (ROOT / page).parent.joinpath(link).exists(), f"{page}: {link}"


def test_named_files_exist():
    folders = "csrc|tests|benchmarks|epsa_fused|examples|docs"
    for page, text in PAGES.items():
        for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
            made = name in ("epsa_fused/_ops.so",)  # by the build
            assert made or (ROOT / name).exists(), f"{page}: {name}"


def test_anchors_exist():
    """Headings that links name, by the rule that GitHub and the site share for plain headings."""
    for page, text in PAGES.items():
        for link, anchor in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", text):
            target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in names or "gh-" in anchor, f"{page}: {link}#{anchor}"


def test_make_knows_its_targets():
    """Those that the pages name."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(PAGES.values())
    named = set(re.findall(r"(?:`|^)make\s+([\w-]+)", text, re.MULTILINE))
    assert {"demo", "test", "bench", "docs", "cuda-check"} <= named <= targets


def test_the_api_reference_has_every_public_name():
    import epsa_fused.train

    api = "".join(text for page, text in PAGES.items() if page.startswith("docs/api/"))
    documented = {name.split(".")[-1] for name in re.findall(r"^::: (\S+)$", api, re.MULTILINE)}
    public = {*epsa_fused.__all__, *epsa_fused.train.__all__} - {"convolution", "__version__"}
    public |= {"spc_conv", "fpn_backbone", "foreground_only", "FixedBatchNorm2d"}
    assert public <= documented, public - documented


# ---- tables ----


def assert_row(page: str, row: str) -> None:
    assert row in PAGES[f"docs/{page}.md"], row


def test_the_models_table_gives_the_asserted_figures():
    """test_models.py asserts the sizes against the networks."""
    for name, figures in FIGURES.items():
        assert_row(
            "use",
            f"| `{name}` | {figures.parameters / 1e6:.2f} / {figures.published_parameters:.2f} "
            f"| {figures.multiply_adds / 1e9:.2f} / {figures.published_multiply_adds:.2f} "
            f"| {figures.published_top1:.2f} / {figures.published_top5:.2f} |",
        )


def test_the_detectors_table_gives_the_asserted_figures():
    """test_detection.py asserts them against the detectors."""
    from models.test_detection import FIGURES

    for detector in ("FasterRCNN", "MaskRCNN", "RetinaNet"):
        small, large = (f for (name, _), f in FIGURES.items() if name == detector)
        assert_row(
            "detection",
            f"| {detector.replace('RCNN', ' R-CNN')} | {small[0] / 1e6:.2f} / {small[1]:.2f} "
            f"| {large[0] / 1e6:.2f} / {large[1]:.2f} |",
        )


def test_the_accuracy_table_gives_the_committed_results():
    """benchmarks/accuracy.py wrote both."""
    rows = results("accuracy-digits")
    assert len(rows) == 15
    for network in ("SE", "PSA, reference", "PSA, fused"):
        own = [row for row in rows if row["network"] == network]
        top1 = [100 * float(row["top1"]) for row in own]
        speed = statistics.median(float(row["images_per_s"]) for row in own)
        assert_row(
            "training",
            f"| {network} | {int(own[0]['parameters']):,} | {statistics.mean(top1):.2f} ± "
            f"{statistics.stdev(top1):.2f} | {min(top1):.2f} | {speed:,.0f} |",
        )


@pytest.mark.parametrize("mode", ("forward", "backward"))
def test_the_attention_tables_give_the_committed_results(mode):
    last = by_shape("attention", mode, "channels_last")
    for shape, case in by_shape("attention", mode, "contiguous").items():
        published, rewrite, fused = (
            float(case[name]["median_us"])
            for name in ("published eager", "rewrite compiled", "fused")
        )
        assert_row(
            "benchmarks",
            f"| {shape} | {published:,.0f} | {rewrite:,.0f} | **{fused:,.0f}** "
            f"| {float(case['published eager']['over_fused']):.1f}x | **{over_best(case):.1f}x** "
            f"| {float(case['fused']['over_copy']):.1f} | {over_best(last[shape]):.1f}x |",
        )


@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_the_module_table_gives_the_committed_results(layout):
    def columns(case: dict[str, dict[str, str]]) -> str:
        medians = {name: float(row["median_us"]) / 1000 for name, row in case.items()}
        times = [min(medians[name] for name in OPPONENTS if name in case), medians["fused"]]
        return f"| {times[0]:.1f} | **{times[1]:.1f}** | **{over_best(case):.1f}x** |"

    train = by_shape("module", "train", layout)
    for shape, case in by_shape("module", "forward", layout).items():
        prepacked = float(case["fused prepacked"]["median_us"]) / 1000
        row = f"| {shape} | {layout} {columns(case)} {prepacked:.1f} {columns(train[shape])}"
        assert_row("benchmarks", row)


def test_the_network_table_gives_the_committed_results():
    columns = ("published eager", "published compiled", "rewrite compiled", "fused")
    for title, name, mode, n in (
        ("forward, batch 1", "network", "forward", "1"),
        ("forward, batch 8", "network", "forward", "8"),
        ("training step, batch 8", "network-train", "train", "8"),
    ):
        rows = results(f"{MACHINE}-{name}", level="network", mode=mode, n=n)
        case = {row["contender"]: float(row["median_us"]) / 1000 for row in rows}
        best = min(case[opponent] for opponent in OPPONENTS)
        times = " | ".join(f"{case[column]:,.0f}" for column in columns)
        assert_row("benchmarks", f"| {title} | {times} | **{case['fused compiled']:,.0f}** ")
        assert_row("benchmarks", f"| **{best / case['fused compiled']:.1f}x** |")


def test_the_serving_page_gives_the_committed_results():
    """Else `python benchmarks/serving.py --table FILE` prints the tables again."""
    import serving_results

    page = PAGES["docs/serving.md"]
    speeds = []  # of each machine
    for name in ("intel-xeon-amx-serving", "intel-xeon-avx512-serving"):
        rows = serving_results.read(RESULTS / f"{name}.csv")
        for table in serving_results.tables(rows).split("\n\n"):
            assert table in page, f"{name}.csv gives other figures:\n{table}"
        speeds.append([row for row in rows if row["part"] == "speed"])
    speed, without_amx = speeds
    spreads, others = (
        [100 * float(row["iqr_ms"]) / float(row["median_ms"]) for row in rows] for rows in speeds
    )
    text = " ".join(page.split())
    assert f"spreads were {min(spreads):.0f} to {max(spreads):.0f}% of a median" in text
    assert f"Spreads were up to {max(others):.0f}% of a median here" in text
    errors = [100 * float(row["error"]) for row in speed if row["dtype"] == "bfloat16"]
    assert f"error was {min(errors):.1f} to {max(errors):.1f}% of the largest logit" in text
    assert "ONNX Runtime was slower than OpenVINO everywhere" in text
    for medians in map(medians_of, speeds):
        for (name, *case), median in medians.items():
            assert name != "ONNX Runtime" or median > medians[("OpenVINO", *case)], case
    assert "slower than float32 there, by `optimize_for_inference` and by OpenVINO" in text
    medians = medians_of(without_amx)
    for (name, dtype, *case), median in medians.items():
        if dtype == "bfloat16" and name in (serving_results.OURS, "OpenVINO"):
            assert median > medians[(name, "float32", *case)], (name, case)


def medians_of(speed):
    key = ("contender", "dtype", "batch", "threads")
    return {tuple(row[name] for name in key): float(row["median_ms"]) for row in speed}


# ---- pictures ----


def test_the_pictures_show_the_committed_results():
    """Else `python docs/figures/benchmarks.py` draws them again."""
    script = figure_script("benchmarks")
    for name in script.SOURCES:
        for theme in ("light", "dark"):
            picture = (ROOT / "docs" / "figures" / f"{name}-{theme}.svg").read_text()
            assert script.digest(name) in picture, f"{name}-{theme}.svg is out of date"


@pytest.mark.parametrize("script", ("attention", "benchmarks"))
def test_the_scripts_draw_every_picture(script, tmp_path):
    optional("matplotlib")
    folder = ROOT / "docs" / "figures"
    command = [sys.executable, folder / f"{script}.py", tmp_path]
    subprocess.run(command, check=True, env=environment(), timeout=600)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn and drawn <= {path.name for path in folder.glob("*.svg")}
    text = "\n".join(PAGES.values())
    assert all(f"figures/{name}" in text for name in drawn)
