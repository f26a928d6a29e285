"""The report in a browser: opened from disk, switched, filtered, read on a phone, without a script, on paper."""

import pytest
from test_analysis_synthetic import read_rows

LOSS = '[data-chart="val_loss_steps"]'
METRICS = ("step", "tokens", "train_time_ms", "time_with_teacher_ms")


def report(campaign):
    return campaign.path("report/index.html")


def drawn(page, chart=LOSS):
    """The chart, once it has been drawn."""
    page.locator(chart).scroll_into_view_if_needed()
    page.wait_for_selector(f"{chart}.drawn .main-svg", state="attached")
    return page.locator(chart)


def lines(page, chart=LOSS):
    """[{name, x, y, runs}] of what a chart draws."""
    drawn(page, chart)
    cells = "({name, x, y, customdata: runs = []}) => ({name, x: [...x], y: [...y], runs: [...runs]})"
    return page.locator(chart).evaluate(f"gd => gd.data.map({cells})")


def point_of(page, chart, trace, number):
    """Where on the screen a chart has its point."""
    script = """(gd, [trace, number]) => {
        const {xaxis, yaxis} = gd._fullLayout, box = gd.getBoundingClientRect(), {x, y} = gd.data[trace];
        return [box.left + xaxis._offset + xaxis.d2p(x[number]), box.top + yaxis._offset + yaxis.d2p(y[number])];
    }"""
    page.locator(chart).evaluate("gd => gd.scrollIntoView({block: 'center', behavior: 'instant'})")
    return page.locator(chart).evaluate(script, [trace, number])


def cells_of(campaign, run_id, column, table="curves"):
    rows = read_rows(campaign.path(f"tables/{table}.csv"))
    return [float(f"{float(r[column]):.6g}") for r in rows if r["run_id"] == run_id and r["step"] != "0"]


def no_sideways_scroll(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_every_chart_is_drawn(campaign, visit):
    page = visit(report(campaign))
    names = page.locator("#report [data-chart]").evaluate_all("all => all.map(e => e.dataset.chart)")
    assert len(names) == 13
    for name in set(names) - {"val_loss_time"}:  # the switch has it; for paper it stays as it is
        assert lines(page, f'[data-chart="{name}"]'), name


def test_a_run_that_arms_share_is_drawn_once(campaign, visit):
    page = visit(report(campaign))
    shared = [row["run_id"] for row in read_rows(campaign.path("tables/runs.csv")) if row["label"] == "LR1"]
    drawn_ce = [line for line in lines(page, '[data-chart="kd_alive"]') if line["name"] == "CE"]
    assert [line["runs"][0] for line in drawn_ce] == shared and drawn_ce[0]["x"] == [25, 50, 75]


def test_the_top_is_the_verdict_with_four_numbers_of_the_csv(campaign, visit):
    page = visit(report(campaign))
    said = " ".join(page.locator(".sentence").inner_text().split())
    assert said.rstrip(".") in campaign.json("verdict.json")["sentence"]
    rows = {row["figure"]: row for row in read_rows(campaign.path("tables/headline.csv"))}
    shown = {link.get_attribute("data-cell"): link for link in page.locator(".tiles a").all()}
    assert list(shown) == ["steps_saved", "tokens_saved", "time_saved_ms", "time_saved_with_teacher_ms"]
    for figure, link in shown.items():
        words = link.inner_text().replace("+", "").replace(",", "").replace(" ms", "")
        assert float(words) == float(rows[figure]["value"])
        assert (report(campaign).parent / link.get_attribute("href")).is_file()


def test_the_top_says_why(campaign, visit):
    answers = [item.inner_text() for item in visit(report(campaign)).locator(".answers li").all()]
    questions = (
        "Pays in steps",
        "Pays by complete horizons",
        "Pays in time, teacher counted",
        "Teaches from the first validation on",
        "Sooner than its controls",
        "Better than its controls in time, teacher counted",
    )
    assert answers == [f"{question}: ✓ yes" for question in questions]


def test_what_to_try_next_is_the_table_of_advice(campaign, visit):
    page = visit(report(campaign))
    said = [" ".join(item.inner_text().split()) for item in page.locator(".advice li").all()]
    rows = read_rows(campaign.path("tables/advice.csv"))
    assert len(said) == len(rows) > 0
    for words, row in zip(said, rows, strict=True):
        assert words.startswith(f"{row['what']}: {row['why']}") and row["keys"] in words and row["source"] in words


def test_every_section_of_numbers_links_to_its_tables_and_run_folders(campaign, visit):
    page = visit(report(campaign), script=False)
    sections = page.locator("#report section:not(#how-to-read-this)")
    hrefs = "[...part.querySelectorAll('a[href]')].map(a => a.getAttribute('href')).filter(href => href[0] !== '#')"
    for name, links in sections.evaluate_all(f"all => all.map(part => [part.id, {hrefs}])"):
        assert any(link.endswith((".csv", ".json")) for link in links), name
        assert name == "what-to-try-next" or any("/runs/" in link for link in links), name
        missing = [link for link in links if not (report(campaign).parent / link).exists()]
        assert not missing, (name, missing)


def test_the_horizon_curve_has_its_interval_as_a_band(campaign, visit):
    page = visit(report(campaign))
    chart = '[data-chart="horizon_curve"]'
    drawn(page, chart)
    bands = page.locator(chart).evaluate("gd => gd.data.filter(t => t.fill === 'toself').map(t => [...t.y])")
    rows = [row for row in read_rows(campaign.path("tables/horizon_curve.csv")) if row["low"] and row["arm"] == "ce"]
    assert len(bands) == 2
    assert bands[0] == [float(f"{float(row['high']):.6g}") for row in rows] + [
        float(f"{float(row['low']):.6g}") for row in reversed(rows)
    ]


def test_one_switch_changes_what_losses_are_drawn_over(campaign, visit):
    page = visit(report(campaign))
    drawn(page)
    for loss, table in (("val_loss", "curves"), ("train_loss", "traces")):
        page.locator(f'input[name="y"][value="{loss}"]').check(force=True)
        for metric in METRICS:
            page.locator(f'input[name="x"][value="{metric}"]').check(force=True)
            kd = next(line for line in lines(page) if line["name"] == "KD")
            assert kd["x"] == cells_of(campaign, kd["runs"][0], metric, table), metric
            assert kd["y"] == cells_of(campaign, kd["runs"][0], loss, table)


def test_the_horizon_can_be_chosen(campaign, visit):
    page = visit(report(campaign))
    drawn(page)
    page.locator('select[name="horizon"]').select_option("75")
    assert {max(line["x"]) for line in lines(page) if line["name"] in ("CE", "KD")} == {75}
    page.locator('select[name="horizon"]').select_option("300")


def test_the_switch_works_by_keyboard(campaign, visit):
    page = visit(report(campaign))
    drawn(page)
    page.locator('input[name="x"][value="step"]').focus()
    page.keyboard.press("ArrowRight")
    kd = next(line for line in lines(page) if line["name"] == "KD")
    assert kd["x"] == cells_of(campaign, kd["runs"][0], "tokens")


def test_hover_shows_the_run_and_the_cell_and_a_click_filters(campaign, visit):
    page = visit(report(campaign))
    number = next(i for i, line in enumerate(lines(page)) if line["name"] == "KD")
    run_id = lines(page)[number]["runs"][0]
    page.mouse.move(*point_of(page, LOSS, number, 3))
    label = page.locator(f"{LOSS} .hoverlayer .hovertext").first
    label.wait_for()
    loss = cells_of(campaign, run_id, "val_loss")[3]
    assert f"val_loss {loss:g}" in label.text_content() and "step 100" in label.text_content()
    page.mouse.click(*point_of(page, LOSS, number, 3))
    page.wait_for_selector("#chosen:not([hidden])")
    clicked = page.locator("#chosen a").get_attribute("href").removeprefix("#run=")
    rows = page.locator("#steps-and-time-to-the-target tr[data-run]")
    assert {r.get_attribute("data-run") for r in rows.all() if r.is_visible()} == {clicked}
    page.get_by_role("button", name="Show all").click()
    assert all(row.is_visible() for row in rows.all())


def test_targets_phases_and_the_stop_are_marked(campaign, visit):
    page = visit(report(campaign))
    drawn(page)
    words = page.locator(LOSS).evaluate("gd => gd.layout.annotations.map(a => a.text)")
    assert {"target 4.5000", "fixed target 4.8000", "A", "B", "C"} <= set(words)
    stops = [line for line in lines(page) if line["name"] == "KD stops"]
    assert [line["x"] for line in stops] == [[50]] * 3


def test_a_rejected_teacher_is_grey_and_says_why(campaign, visit):
    chart = '[data-chart="teachers"]'
    page = visit(report(campaign))
    drawn(page, chart)
    (lost,) = page.locator(chart).evaluate("gd => gd.data.filter(t => t.name.startsWith('rejected on its projection'))")
    assert "over the budget of 300.0 ms" in lost["hovertemplate"][0] and lost["marker"]["color"] == "#6a717d"


@pytest.mark.parametrize("width", [1200, 390])
def test_names_of_teachers_that_are_near_each_other_lie_apart(record, visit, width):
    page, chart = visit(record, width=width), '[data-chart="teachers"]'
    drawn(page, chart)
    names = page.locator(f"{chart} .textpoint text").all()
    assert {"L3-H6-D128-395-B131072-LR1.0"} <= {name.text_content() for name in names}  # the selected one
    boxes = [name.bounding_box() for name in names]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a["x"] >= b["x"] + b["width"] or b["x"] >= a["x"] + a["width"]
            assert apart or a["y"] >= b["y"] + b["height"] or b["y"] >= a["y"] + a["height"]


def test_a_runs_page_has_its_config_difference_curves_files_and_command(campaign, visit):
    page = visit(report(campaign))
    kd = next(row for row in read_rows(campaign.path("tables/runs.csv")) if row["arm"] == "kd")
    page.locator(f'#runs a[href="#run={kd["run_id"]}"]').click()
    page.wait_for_selector("#runs-page:not([hidden])")
    text = page.locator("#runs-page").inner_text()
    for words in ("schedule.lr_boost.mult", "kd.temperature", "steps.csv", kd["code_hash"]):
        assert words in text, words
    assert "schedule.horizon" not in text  # the same as the base's
    page.wait_for_function("document.querySelectorAll('#runs-page .drawn .main-svg').length >= 4")
    for link in page.locator("#runs-page .files a").all():
        assert (report(campaign).parent / link.get_attribute("href")).exists()
    page.get_by_role("link", name="← the report").click()
    page.wait_for_selector("#report:not([hidden])")


def test_two_runs_are_chosen_and_stand_side_by_side(campaign, visit):
    page = visit(report(campaign))
    boxes = page.locator("[data-choose]")
    ids = [boxes.nth(i).get_attribute("data-choose") for i in (0, 1)]
    for i in (0, 1):
        boxes.nth(i).check()
    page.get_by_role("link", name="Side by side").click()
    page.wait_for_selector("#runs-page:not([hidden])")
    text = page.locator("#runs-page").inner_text()
    assert all(run_id in text for run_id in ids) and "seed" in text
    assert page.locator("#runs-page tbody tr", has_text="seed").count() >= 1


def test_runs_are_found_by_words(campaign, visit):
    page = visit(report(campaign))
    page.locator("#find").fill("smoothing SEED")
    rows = [row for row in page.locator("#runs tbody tr").all() if row.is_visible()]
    assert len(rows) == 3 and all("label smoothing" in row.inner_text() for row in rows)
    page.locator("#find").fill("")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scroll(campaign, visit, scheme):
    page = visit(report(campaign), width=390, scheme=scheme)
    drawn(page)
    assert no_sideways_scroll(page)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(20, 23, 27)"}[scheme]
    run_id = page.locator("#runs [data-choose]").first.get_attribute("data-choose")
    page.evaluate("id => { location.hash = `run=${id}`; }", run_id)
    page.wait_for_selector("#runs-page .drawn .main-svg")
    assert no_sideways_scroll(page)


def test_a_chart_keeps_its_height_when_the_window_changes(campaign, visit):
    page = visit(report(campaign))
    before = drawn(page).bounding_box()
    page.set_viewport_size({"width": 800, "height": 900})
    page.wait_for_function(f"document.querySelector('{LOSS} .main-svg').getBoundingClientRect().width < 800")
    after = page.locator(f"{LOSS} .main-svg").first.bounding_box()
    page.set_viewport_size({"width": 1200, "height": 900})
    assert after["height"] == before["height"] > 400


def test_without_a_script_words_tables_and_figures_are_there(campaign, visit):
    page = visit(report(campaign), script=False)
    assert page.locator(".sentence").is_visible() and page.locator("#ledger details").is_visible()
    assert page.locator("#report .plot > svg").count() == 13
    assert not page.locator("fieldset.switch").first.is_visible()


def test_it_can_be_printed_light_from_a_dark_screen(campaign, visit):
    page = visit(report(campaign), width=390, scheme="dark")
    drawn(page)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 900})  # A4 without its margins
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    charts = "getComputedStyle(document.querySelector('[data-chart=\"val_loss_steps\"] .legendtext')).fill"
    assert page.evaluate(charts) == "rgb(0, 0, 0)"
    assert not page.locator("#contents").is_visible() and page.locator(".sentence").is_visible()
    assert page.locator("[data-chart].drawn .main-svg").count() >= 12 and no_sideways_scroll(page)
    assert page.pdf(format="A4").startswith(b"%PDF")
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 390, "height": 900})
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(charts) == "rgb(228, 231, 235)"


def test_the_keyboard_reaches_everything(campaign, visit):
    page = visit(report(campaign))
    page.locator(".skip").focus()
    assert page.locator(".skip").bounding_box()["x"] >= 0
    page.locator("#runs tbody a.run").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#runs-page:not([hidden])")
    assert page.evaluate("document.activeElement.closest('#runs-page') !== null")  # and Tab goes on from there
    page.keyboard.press("Enter")
    page.wait_for_selector("#report:not([hidden])")
    assert page.evaluate("document.activeElement.closest('#runs tbody') !== null")  # where the reader was
    page.locator("#runs [data-choose]").first.focus()
    page.keyboard.press("Space")
    assert page.locator("#chosen").inner_text().startswith("1 of 2 runs chosen")
    unreachable = page.locator(".scroll").evaluate_all("all => all.filter(e => e.tabIndex < 0).length")
    assert unreachable == 0  # tables that are wider than the page are scrolled by the arrow keys


def test_figures_and_controls_have_names(campaign, visit):
    page = visit(report(campaign), script=False)
    alts = page.locator("[data-chart]").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert all(any(sign.isdigit() for sign in alt) for alt in alts), alts  # a finding has a figure in it
    nameless = "input:not([aria-label]):not(label input), a:not([aria-label]):empty, button:empty"
    assert page.locator(nameless).count() == 0


def test_where_nothing_met_the_budget_it_says_so(over_budget, visit):
    page = visit(report(over_budget))
    assert "KD was not tried" in page.locator(".sentence").inner_text() and page.locator(".answers").count() == 0
    assert "Add cheaper teachers" in page.locator(".advice").inner_text()
    assert lines(page) and "none" not in page.locator("#kd-screen").inner_text()
    assert page.locator("#kd-screen").inner_text().count("nothing was screened") == 1


def test_an_empty_campaign_says_what_is_missing(empty, visit):
    page = visit(empty)
    assert "0 of 18 runs known so far have ended" in page.locator(".sofar").inner_text()
    missing = page.locator("#not-there-yet tbody tr", has_text="Teacher budget").inner_text()
    assert "the CE baseline" in missing and "budget.json" in missing
    assert "no run has ended yet" in page.locator("#runs").inner_text() and no_sideways_scroll(page)


def test_the_seeds_numbers_open_with_charts(seed, visit):
    page = visit(seed, width=390)
    assert page.locator("#claims tbody tr").count() > 3 and no_sideways_scroll(page)
    for column, chart in (("val_delta", "claims"), ("time_ratio", "claim_times")):
        (points,) = lines(page, f'[data-chart="{chart}"]')
        rows = [row for row in read_rows(seed.parent / "claims.csv") if row[column]]
        assert points["x"] == [float(f"{float(row[column]):.6g}") for row in rows] and len(rows) > 3
    ends = [row for row in read_rows(seed.parent / "ends.csv") if row["run_id"]]
    curve = lines(page, '[data-chart="horizon_curve"]')
    assert sorted(y for line in curve for y, run in zip(line["y"], line["runs"])) == sorted(
        float(row["final_val"]) for row in ends
    )
    assert lines(page, '[data-chart="teachers"]')
    alts = page.locator("[data-chart]").evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert len(alts) == 4 and all(any(sign.isdigit() for sign in alt) for alt in alts), alts
