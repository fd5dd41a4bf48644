"""The pages of topd inspect and topd report in a real browser, from a file."""

import shutil

import pytest
from small_logs import records

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
from selenium.webdriver.support.ui import Select, WebDriverWait

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
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-sync",
                     "disable-dev-shm-usage", "disable-background-networking",
                     "disable-component-update", "no-first-run",
                     f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{argument}")
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


def assert_fits_and_turns_dark(driver: WebDriver, text: str) -> None:
    """Nothing overflows on a phone, and text is readable in both schemes."""
    for scheme in ("light", "dark"):
        show(driver, width=360, scheme=scheme)
        # Not innerWidth: a phone zooms out until it holds what overflows.
        wide, paper, ink, fill = driver.execute_script(
            "const text = getComputedStyle(document.querySelector("
            "arguments[0])); return [document.documentElement.scrollWidth, "
            "getComputedStyle(document.body).backgroundColor, text.color, "
            "text.fill]",
            text,
        )
        assert wide <= 360
        assert (_brightness(paper) < 60) == (scheme == "dark")
        ink = fill if "svg" in text else ink
        assert abs(_brightness(ink) - _brightness(paper)) > 120


def _brightness(color: str) -> float:
    numbers = color.partition("(")[2].rstrip(")").split(",")
    return sum(map(float, numbers[:3])) / 3


# The page of trajectories


def candidate(student, teacher, *, divergent, distance):
    truth = "fork" if divergent else "surface"
    return {
        "distance": distance, "divergent": divergent, "student": student,
        "teacher": teacher, "window_truth": truth,
        "plan": [[1 / len(teacher)] * len(teacher)] * len(student),
    }  # fmt: skip


def trajectory(problem, texts, candidates, *, right, truth):
    """A row; candidates at their positions, the loss grows by 0.25 a token."""
    return {
        "problem": problem, "reference": "work #### 10", "right": right,
        "cut": False,
        "tokens": [
            {"text": text, "loss": 0.25 * at, "truth": truth[at],
             "candidate": candidates.get(at)}
            for at, text in enumerate(texts)
        ],
    }  # fmt: skip


ROWS = [
    trajectory(
        "2+2*4?", ["= ", "16", "\n", "</script><!--", "<end>"],
        {1: candidate(["16", "\n"], ["2", "+", "8"], divergent=True,
                      distance=0.875),
         3: candidate(["</script><!--"], ["<b>né</b>"], divergent=False,
                      distance=0.125)},
        right=False, truth=["surface", "fork", "after", "after", "after"],
    ),
    trajectory(
        "3+7?", ["so ", "10"],
        {0: candidate(["so ", "10"], ["= ", "10"], divergent=False,
                      distance=0.5)},
        right=True, truth=["surface"] * 2,
    ),
    trajectory("1+9?", ["10"], {}, right=True, truth=["surface"]),
]  # fmt: skip


@pytest.fixture
def trajectories(browser, tmp_path):
    """The browser with the page of three trajectories."""
    path = tmp_path / "inspect.html"
    write_page(ROWS, {"title": "Three", "facts": {"run": "a & b"}}, path)
    browser.get(path.as_uri())
    return browser


def assert_shows(driver: WebDriver, row: int, at: int) -> None:
    """The detail is that candidate's, and there is no other."""
    (detail,) = all_of(driver, ".detail")
    want = ROWS[row]["tokens"][at]["candidate"]
    sides = [
        p.get_property("textContent").replace("⏎\n", "\n")
        for p in detail.find_elements(By.CSS_SELECTOR, ".sides p")
    ]
    assert sides == ["".join(want["student"]), "".join(want["teacher"])]
    kind = "divergent" if want["divergent"] else "false alarm"
    facts = detail.find_element(By.TAG_NAME, "p").text
    assert facts.startswith(f"token {at}, loss {0.25 * at:.3f} nats")
    assert f"{kind}, distance {want['distance']:.3f}" in facts
    cells = detail.find_elements(By.TAG_NAME, "td")
    assert len(cells) == len(want["student"]) * len(want["teacher"])
    assert want["teacher"][0] in cells[0].get_attribute("title")


def tip_of(driver: WebDriver, token) -> str:
    return driver.execute_script(
        "return getComputedStyle(arguments[0], '::after').content", token
    )


def test_click_keyboard_and_pointer_show_candidates(trajectories):
    tokens = all_of(trajectories, "button.t")
    assert len(tokens) == 3
    for token, at in zip(tokens, (1, 3), strict=False):
        token.click()
        assert_shows(trajectories, 0, at)
    tokens[1].click()
    assert not all_of(trajectories, ".detail")
    tokens[2].click()
    assert_shows(trajectories, 1, 0)
    tokens[2].click()
    keys = ActionChains(trajectories).key_down(Keys.SHIFT)
    keys.send_keys(Keys.TAB * 2).key_up(Keys.SHIFT).send_keys(Keys.ENTER)
    keys.perform()
    assert_shows(trajectories, 0, 1)
    assert tokens[0].get_attribute("aria-expanded") == "true"
    (focused,) = all_of(trajectories, ":focus")
    assert "distance 0.875" in tip_of(trajectories, focused)
    token = all_of(trajectories, "article .t")[4]
    assert tip_of(trajectories, token) == "none"
    ActionChains(trajectories).move_to_element(token).perform()
    tip = tip_of(trajectories, token)
    assert "token 4, loss 1.000 nats" in tip and "after the fork" in tip


def test_the_loss_is_the_color_of_a_token(trajectories):
    shares = [
        float(color.rstrip(")").split(",")[3])
        for t in all_of(trajectories, "article .t")[1:5]
        for color in [t.value_of_css_property("background-color")]
    ]
    assert shares == pytest.approx([0.1875, 0.375, 0.5625, 0.75], abs=0.01)


def test_search_and_filters_on_a_desk_then_a_phone(trajectories):
    def shown():
        return [a.text[:4] for a in all_of(trajectories, "article")]

    search = trajectories.find_element(By.CSS_SELECTOR, "[type=search]")
    choose = Select(trajectories.find_element(By.ID, "filter"))
    search.send_keys("right")
    assert shown() == ["3+7?", "1+9?"]
    (count,) = all_of(trajectories, "output")
    assert count.text == "2 of 3"
    choose.select_by_value("alarm")
    assert shown() == ["3+7?"]
    search.clear()
    search.send_keys(Keys.SPACE, Keys.BACKSPACE)
    for value, count in (("all", 3), ("alarm", 2), ("wrong", 1), ("right", 2),
                         ("divergent", 1), ("fork", 1), ("missed", 0),
                         ("cut", 0)):  # fmt: skip
        choose.select_by_value(value)
        assert len(shown()) == count, value
    choose.select_by_value("all")
    all_of(trajectories, "button.t")[0].click()
    assert_fits_and_turns_dark(trajectories, ".detail")


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


def test_curves_tell_their_values_and_hide_on_a_click(run_page):
    page = run_page(records())
    chart = figure(page, "Right answers")
    area = chart.find_element(By.CSS_SELECTOR, ".nsewdrag")
    ActionChains(page).move_to_element_with_offset(
        area, area.size["width"] // 2 - 20, 0
    ).perform()
    WebDriverWait(page, 5).until(
        lambda _: chart.find_elements(By.CSS_SELECTOR, ".hoverlayer .legend")
    )
    tip = chart.find_element(By.CSS_SELECTOR, ".hoverlayer").text
    assert tip.startswith("step 40")
    assert "validation : 0.7 (0.600 to 0.800)" in tip
    assert "test : 0.8 (0.700 to 0.900)" in tip
    points = "path.point"
    assert len(chart.find_elements(By.CSS_SELECTOR, points)) == 12
    chart.find_element(By.CSS_SELECTOR, ".legendtoggle").click()
    WebDriverWait(page, 5).until(
        lambda _: len(chart.find_elements(By.CSS_SELECTOR, points)) == 1
    )


def test_smoothing_and_a_log_scale_redraw_the_curves(run_page):
    page = run_page(records())
    chart = figure(page, "Loss")

    def lines():
        return [
            line.get_attribute("d")
            for line in chart.find_elements(By.CSS_SELECTOR, "path.js-line")
        ]

    plain = lines()
    Select(page.find_element(By.ID, "smooth")).select_by_value("10")
    raw, smooth = lines()
    assert [raw] == plain != [smooth]
    page.find_element(By.ID, "log").click()
    assert smooth not in lines()
    ticks = chart.find_elements(By.CSS_SELECTOR, ".ytick")
    assert {"0.1", "1"} <= {t.text for t in ticks}
    # A chart below the fold fills its card once that is open.
    all_of(page, "summary")[0].click()
    drawn = figure(page, "skipped").find_element(By.TAG_NAME, "svg")
    WebDriverWait(page, 5).until(lambda _: 250 < drawn.size["width"] < 400)


def test_texts_and_settings_by_choice_and_by_search(run_page):
    page = run_page(records())
    (learned, *_) = all_of(page, "#problems article")
    answers = learned.find_elements(By.CSS_SELECTOR, ".answer")
    assert len(answers) == 11
    assert answers[0].text == "step 0 ✗ wrong cut off\nlearned at 0"
    # Nothing of a completion became a part of the page.
    assert not page.find_elements(By.CSS_SELECTOR, "main img")
    (shown,) = all_of(page, "#written article")
    assert "= 40 </script>" in shown.text and "cut off" in shown.text
    Select(page.find_element(By.ID, "step")).select_by_value("10")
    (shown,) = all_of(page, "#written article")
    assert "= 10 </script>" in shown.text and "cut off" not in shown.text
    form = page.find_element(By.CSS_SELECTOR, "[data-list=written]")
    form.find_element(By.CSS_SELECTOR, "[type=search]").send_keys("= 2")
    assert form.find_element(By.TAG_NAME, "output").text == "1 of 4"
    form = page.find_element(By.CSS_SELECTOR, "[data-list=values]")
    assert len(all_of(page, "#values tbody tr")) == 5  # not the defaults
    form.find_element(By.CSS_SELECTOR, "[type=search]").send_keys("window")
    (row,) = all_of(page, "#values tbody tr")
    assert row.text == "objective topd(window=20) topd"


def test_two_runs_on_a_phone_in_the_dark(run_page):
    page = run_page(records("a" * 60), records("b", steps=20))
    assert len(all_of(page, "#problems .answer b")) > 20
    assert_fits_and_turns_dark(page, "svg .xtick text")
