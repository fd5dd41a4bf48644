"""The pages of topd inspect and topd report in a real browser, from a file."""

import shutil

import pytest

from topd_jax.analysis.inspection import write_page

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
