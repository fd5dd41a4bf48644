"""The pages of topd inspect and topd report in a real browser, from a file."""

import shutil

import pytest
from small_logs import answer, metrics, records

from topd_jax.experiments.run_page import RunRecords
from topd_jax.experiments.run_page import write_page as run_page_of
from topd_jax.experiments.token_map import write_page

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"
    ),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """One headless browser with an empty profile."""
    options = Options()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
        "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # Selenium's own search for a driver would ask the network.
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser, desk-wide and light; its console must stay empty."""
    show(chromium, width=1200, scheme="light")
    chromium.get_log("browser")
    yield chromium
    assert chromium.get_log("browser") == []


def show(driver: WebDriver, width: int, scheme: str) -> None:
    """Emulates a screen's width in pixels and a colour scheme."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1,
         "mobile": width < 600},
    )  # fmt: skip
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )


def all_of(driver: WebDriver, selector: str) -> list:
    """The elements of a selector that are shown."""
    found = driver.find_elements(By.CSS_SELECTOR, selector)
    return [e for e in found if e.is_displayed()]


def text_of(driver: WebDriver, selector: str) -> str:
    return driver.find_element(By.CSS_SELECTOR, selector).text


def assert_fits_and_turns_dark(driver: WebDriver) -> None:
    """Nothing overflows on a phone, and both schemes are readable."""
    papers = {}
    for scheme in ("light", "dark"):
        show(driver, width=360, scheme=scheme)
        # Not innerWidth: a phone zooms out until it holds what overflows.
        wide = driver.execute_script(
            "return document.documentElement.scrollWidth"
        )
        assert wide <= 360
        papers[scheme] = [
            _brightness(
                driver.execute_script(
                    f"return getComputedStyle(document.body).{name}"
                )
            )
            for name in ("backgroundColor", "color")
        ]
    assert papers["light"][0] > 200 > 80 > papers["light"][1]
    assert papers["dark"][0] < 60 < 180 < papers["dark"][1]


def _brightness(colour: str) -> float:
    numbers = colour.partition("(")[2].rstrip(")").split(",")
    return sum(map(float, numbers[:3])) / 3


# The page of trajectories


def candidate(at, student, teacher, *, divergent, distance):
    share = round(1 / len(teacher), 3)
    return {
        "at": at, "distance": distance, "divergent": divergent,
        "student": student, "teacher": teacher,
        "plan": [[share] * len(teacher)] * len(student),
        "truth": "fork" if divergent else "surface",
        "window_truth": "fork" if divergent else "surface",
    }  # fmt: skip


def trajectory(problem, tokens, candidates, *, right, truth):
    return {
        "problem": problem, "reference": "work #### 10", "right": right,
        "cut": False, "tokens": tokens,
        "loss": [round(0.25 * i, 3) for i in range(len(tokens))],
        "truth": truth, "candidates": candidates,
    }  # fmt: skip


ROWS = [
    trajectory(
        "2+2*4?", ["= ", "16", "\n", "</script><!--", "<end>"],
        [candidate(1, ["16", "\n"], ["2", "+", "8"], divergent=True,
                   distance=0.875),
         candidate(3, ["</script><!--"], ["<b>né</b>"], divergent=False,
                   distance=0.125)],
        right=False, truth=["surface", "fork", "after", "after", "after"],
    ),
    trajectory(
        "3+7?", ["so ", "10"],
        [candidate(0, ["so ", "10"], ["= ", "10"], divergent=False,
                   distance=0.5)],
        right=True, truth=["surface"] * 2,
    ),
    trajectory("1+9?", ["10"], [], right=True, truth=["surface"]),
]  # fmt: skip


@pytest.fixture
def trajectories(browser, tmp_path):
    """The browser with the page of three trajectories."""
    path = tmp_path / "inspect.html"
    write_page(ROWS, {"title": "Three", "facts": {"run": "a & b"}}, path)
    browser.get(path.as_uri())
    return browser


def assert_shows(driver: WebDriver, row: int, slot: int) -> None:
    """The detail is that candidate's, and there is no other."""
    (detail,) = all_of(driver, ".detail")
    want = ROWS[row]["candidates"][slot]
    sides = [
        p.get_property("textContent").replace("⏎\n", "\n")
        for p in detail.find_elements(By.CSS_SELECTOR, ".sides p")
    ]
    assert sides == ["".join(want["student"]), "".join(want["teacher"])]
    names = [d.text for d in detail.find_elements(By.TAG_NAME, "dt")]
    values = [d.text for d in detail.find_elements(By.TAG_NAME, "dd")]
    facts = dict(zip(names, values, strict=True))
    assert facts["loss"] == f"{ROWS[row]['loss'][want['at']]:.3f} nats"
    assert facts["distance"] == f"{want['distance']:.3f}"
    kind = "divergent" if want["divergent"] else "false alarm"
    assert facts["class"] == kind
    cells = detail.find_elements(By.TAG_NAME, "td")
    assert len(cells) == len(want["student"]) * len(want["teacher"])
    assert want["teacher"][0] in cells[0].get_attribute("title")


def test_a_click_shows_that_candidate_and_another_click_hides_it(trajectories):
    tokens = all_of(trajectories, "button.t")
    assert len(tokens) == 3
    for place, (row, slot) in enumerate([(0, 0), (0, 1)]):
        tokens[place].click()
        assert_shows(trajectories, row, slot)
    assert tokens[1].get_attribute("aria-expanded") == "true"
    tokens[1].click()
    assert not all_of(trajectories, ".detail")
    tokens[2].click()
    assert_shows(trajectories, 1, 0)


def test_the_keyboard_does_what_a_click_does(trajectories):
    keys = ActionChains(trajectories)
    keys.send_keys(Keys.TAB * 3).send_keys(Keys.ENTER).perform()
    assert_shows(trajectories, 0, 0)  # past the search and the filter
    keys.send_keys(Keys.TAB).perform()
    assert "distance 0.125" in text_of(trajectories, "#tip")
    keys.send_keys(Keys.SPACE).perform()
    assert_shows(trajectories, 0, 1)


def test_hovering_tells_a_tokens_loss(trajectories):
    token = all_of(trajectories, "article .t")[2]
    ActionChains(trajectories).move_to_element(token).perform()
    tip = text_of(trajectories, "#tip")
    assert "token 2, loss 0.500 nats" in tip and "after the fork" in tip


def test_search_and_filters_leave_what_was_asked_for(trajectories):
    def shown():
        return [a.text.split("\n")[0] for a in all_of(trajectories, "article")]

    search = trajectories.find_element(By.ID, "search")
    choose = Select(trajectories.find_element(By.ID, "filter"))
    assert len(shown()) == 3
    search.send_keys("10")
    assert [s[:4] for s in shown()] == ["3+7?", "1+9?"]
    assert text_of(trajectories, "#count") == "2 of 3"
    choose.select_by_value("alarm")
    assert [s[:4] for s in shown()] == ["3+7?"]
    search.clear()
    search.send_keys(Keys.SPACE, Keys.BACKSPACE)
    assert len(shown()) == 2
    for value, count in (("wrong", 1), ("right", 2), ("divergent", 1),
                         ("fork", 1), ("missed", 0), ("cut", 0)):  # fmt: skip
        choose.select_by_value(value)
        assert len(shown()) == count, value


def test_trajectories_on_a_phone_in_the_dark(trajectories):
    all_of(trajectories, "button.t")[0].click()
    assert_fits_and_turns_dark(trajectories)


# The page of a run


@pytest.fixture
def run_page(browser, tmp_path):
    """(runs) -> the browser with their page."""

    def opened(*runs) -> WebDriver:
        path = tmp_path / "report.html"
        run_page_of(runs, path)
        browser.get(path.as_uri())
        return browser

    return opened


def figure(driver: WebDriver, title: str):
    (found,) = [
        f
        for f in driver.find_elements(By.TAG_NAME, "figure")
        if f.find_element(By.TAG_NAME, "h3").text.startswith(title)
    ]
    return found


def test_a_click_shows_every_answer_to_that_problem(run_page):
    page = run_page(records())
    articles = all_of(page, "#problems article")
    assert [a.find_element(By.CSS_SELECTOR, ".problem").text
            for a in articles][:2] == ["learned", "lost"]  # fmt: skip

    def answers(article):
        return [
            (a.find_element(By.TAG_NAME, "small").text,
             a.find_element(By.TAG_NAME, "b").text,
             a.find_element(By.CSS_SELECTOR, ".completion").text)
            for a in article.find_elements(By.CSS_SELECTOR, ".answer")
        ]  # fmt: skip

    few = answers(articles[0])
    assert len(few) == 6
    assert few[0] == ("step 0", "✗ wrong", "learned at 0")
    assert few[-1] == ("step 40", "✓ right", "learned at 40")
    button = articles[0].find_element(By.CSS_SELECTOR, "button.more")
    assert button.text == "Show all 11"
    button.click()
    assert [a[0] for a in answers(articles[0])] == [
        f"step {s}" for s in range(0, 41, 4)
    ]
    assert len(answers(articles[1])) == 6  # of the others nothing is opened
    button.click()
    assert answers(articles[0]) == few
    # Nothing of a completion became a part of the page.
    assert not page.find_elements(By.CSS_SELECTOR, "main img")


def test_problems_are_chosen_by_their_course(run_page):
    page = run_page(records())
    choose = Select(page.find_element(By.ID, "course"))
    for value, names in (
        ("learned", ["learned"]), ("lost", ["lost"]),
        ("wrong", ["lost", "</script>"]), ("never", ["</script>"]),
        ("all", ["learned", "lost", "</script>", "2+8?"]),
    ):  # fmt: skip
        choose.select_by_value(value)
        shown = [e.text[:9] for e in all_of(page, "#problems .problem")]
        assert shown == names, value
        assert text_of(page, "#counted") == f"{len(names)} of 4"


def test_curves_tell_their_values_and_hide_on_a_click(run_page):
    page = run_page(records())
    chart = figure(page, "Right answers")
    svg = chart.find_element(By.TAG_NAME, "svg")
    width = svg.size["width"]
    ActionChains(page).move_to_element_with_offset(
        svg, int(width * 0.47), 0
    ).perform()
    tip = text_of(page, "#tip")
    assert tip.startswith("step 40")
    assert "test: 0.800 (0.700 to 0.900)" in tip
    assert "validation: 0.700" in tip
    drawn = "g circle.validation"
    assert len(chart.find_elements(By.CSS_SELECTOR, drawn)) == 11
    legend = chart.find_elements(By.CSS_SELECTOR, "figcaption button")
    assert [b.text.split()[-1] for b in legend] == ["validation", "test"]
    legend[0].click()
    assert legend[0].get_attribute("aria-pressed") == "false"
    assert not chart.find_elements(By.CSS_SELECTOR, drawn)
    legend[0].click()
    assert len(chart.find_elements(By.CSS_SELECTOR, drawn)) == 11


def test_the_keyboard_reads_a_curve(run_page):
    page = run_page(records())
    svg = figure(page, "Loss").find_element(By.TAG_NAME, "svg")
    page.execute_script("arguments[0].focus()", svg)
    keys = ActionChains(page)
    keys.send_keys(Keys.HOME).send_keys(Keys.ARROW_RIGHT).perform()
    assert text_of(page, "#tip") == "step 2\ntraining: 1"
    keys.send_keys(Keys.END).perform()
    assert text_of(page, "#tip") == "step 40\ntraining: 0.050"
    keys.send_keys(Keys.ESCAPE).perform()
    assert not all_of(page, "#tip")


def test_smoothing_and_a_log_scale_redraw_the_curves(run_page):
    page = run_page(records())
    chart = figure(page, "Loss")

    def line():
        return chart.find_element(
            By.CSS_SELECTOR, "path.training:not(.raw)"
        ).get_attribute("d")

    plain = line()
    Select(page.find_element(By.ID, "smooth")).select_by_value("10")
    smooth = line()
    page.find_element(By.ID, "log").click()
    assert len({plain, smooth, line()}) == 3
    ticks = [t.text for t in chart.find_elements(By.TAG_NAME, "text")]
    assert {"0.1", "1"} <= set(ticks)


def test_training_completions_by_step_and_by_search(run_page):
    page = run_page(records())
    assert text_of(page, "#at") == "step 40"
    (shown,) = all_of(page, "#written article")
    assert "= 40 </script>" in shown.text and "cut off" in shown.text
    page.find_element(By.ID, "step").send_keys(Keys.HOME)
    (shown,) = all_of(page, "#written article")
    assert "= 10 </script>" in shown.text and "cut off" not in shown.text
    page.find_element(By.ID, "find").send_keys("= 2")
    assert text_of(page, "#found") == "1 of 4, of all steps"
    settings = page.find_element(By.ID, "which")
    settings.send_keys("learning")
    rows = [r.text for r in all_of(page, "#changed tbody tr")]
    assert rows == ["optimizer.learning_rate 0.001 0.0003"]


def test_runs_without_answers_or_anything_else(run_page):
    bare = [answer(0, "one", None), answer(4, "one", None)]
    page = run_page(records(problems=bare, metrics=metrics(1)))
    assert len(all_of(page, "#problems .answer")) == 2
    assert not all_of(page, "#choosing")
    page = run_page(RunRecords("nothing"))
    assert "Nothing is logged yet." in text_of(page, "#charts")
    assert text_of(page, "#counted") == "None yet."
    assert_fits_and_turns_dark(page)


def test_two_runs_on_a_phone_in_the_dark(run_page):
    page = run_page(records("a" * 60), records("b", steps=20))
    assert len(all_of(page, "#problems .answer b")) > 20
    assert_fits_and_turns_dark(page)
