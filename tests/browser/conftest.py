"""One headless Chromium for all tests of this folder, and the reports that they open."""

import os
import shutil

import debian
import pytest
from playwright.sync_api import sync_playwright
from test_analysis_synthetic import ROOT, SyntheticCampaign

from kdclimb.__main__ import main

NAMES = ("chromium", "chromium-browser", "google-chrome")
READY = "html[data-ready]"


def install() -> str:
    """The path of Chromium, from Debian's package if it isn't there. Where that can't be, the tests fail and say so."""
    if found := next(filter(None, map(shutil.which, NAMES)), None):
        return found
    if os.getuid() != 0 or not shutil.which("apt-get"):
        pytest.fail("the report's tests need Chromium: apt install chromium, then start them again")
    debian.install("chromium")
    return shutil.which("chromium")


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        # As root Chromium has no sandbox; it opens our own files alone.
        browser = playwright.chromium.launch(executable_path=install(), chromium_sandbox=os.getuid() != 0)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pages(browser):
    """The pages that were opened, and what went wrong in them: opening one takes seconds, so tests share them."""
    opened, troubles = {}, []
    yield opened, troubles
    for page in opened.values():
        page.context.close()


@pytest.fixture
def visit(browser, pages):
    """visit(file, width, scheme, script) -> the page, ready, as it is when it is opened; at the test's end it must have
    met no error, and asked for nothing but its own file.
    """
    opened, troubles = pages
    troubles.clear()

    def visit(file, width=1200, scheme="light", script=True):
        key = (file, width, scheme, script)
        if key not in opened:
            opened[key] = _open(browser, troubles, *key)
        elif script:
            _reset(opened[key])
        return opened[key]

    yield visit
    assert troubles == []


def _open(browser, troubles, file, width, scheme, script):
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=script
    )
    page = context.new_page()
    page.set_default_timeout(20_000)

    def asked(request):
        if request.url.split("#")[0] != file.as_uri() and not request.url.startswith(("data:", "blob:")):
            troubles.append(f"request: {request.url}")

    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(f"error: {error}"))
    page.on("request", asked)
    page.goto(file.as_uri())
    if script and page.locator("#data").count():
        page.wait_for_selector(READY, state="attached")
    return page


def _reset(page):
    page.evaluate("location.hash = '#report'")
    page.wait_for_selector("#report", state="visible")
    for name in ("Show all", "Choose none"):
        for button in page.get_by_role("button", name=name).all():
            button.click()
    for name, value in (("x", "step"), ("y", "val_loss")):
        for radio in page.locator(f'input[name="{name}"][value="{value}"]').all():
            radio.check(force=True)


@pytest.fixture(scope="session")
def campaign(tmp_path_factory):
    """A whole campaign by made-up numbers, in which KD pays, with the profile that one may ask for."""
    campaign = SyntheticCampaign(tmp_path_factory.mktemp("whole"))
    campaign.baseline()
    campaign.teachers()
    campaign.students()
    campaign.profile()
    campaign.conclude()
    return campaign


@pytest.fixture(scope="session")
def over_budget(tmp_path_factory):
    """One in which no teacher met the budget."""
    campaign = SyntheticCampaign(tmp_path_factory.mktemp("over"))
    campaign.edit = lambda run: {"step_ms": 50.0} if run.arm == "probe" else {}
    campaign.run_all()
    return campaign


@pytest.fixture(scope="session")
def empty(tmp_path_factory):
    """The page of a campaign of which nothing has run."""
    folder = tmp_path_factory.mktemp("empty")
    assert main(["report", "--results", str(folder)]) == 0
    return folder / "default/so_far/report/index.html"


@pytest.fixture(scope="session")
def record(tmp_path_factory):
    """The page of the campaign in docs/records/seed155."""
    folder = tmp_path_factory.mktemp("record") / "seed155"
    shutil.copytree(ROOT / "docs/records/seed155", folder)
    assert main(["report", "--results", str(folder), "--configfile", str(folder / "config.yaml")]) == 0
    return folder / "seed155/so_far/report/index.html"


@pytest.fixture(scope="session")
def seed(tmp_path_factory):
    """The page of the seed's published numbers."""
    folder = tmp_path_factory.mktemp("seed")
    assert main(["reread", str(ROOT / "examples/seed"), "--out", str(folder)]) == 0
    return folder / "index.html"
