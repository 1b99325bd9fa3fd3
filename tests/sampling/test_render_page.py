"""The page of a recording in a browser: what it shows, by pointer and by keyboard."""

import pytest

from sampling.render.page import page
from tests.sampling.test_recording import recording

pytestmark = pytest.mark.page


@pytest.fixture
def shown(browser, tmp_path):
    """Opens the page of a recording."""

    def open_page(**header):
        (tmp_path / "run.html").write_text(page(recording(**header)), encoding="utf-8")
        browser.driver.get((tmp_path / "run.html").as_uri())
        return browser

    return open_page


def cells(browser) -> list[str]:
    return [each.get_attribute("textContent") for each in browser.all(".cell")]


def kinds(browser) -> list[str]:
    return [each.get_attribute("class").removeprefix("cell").strip() for each in browser.all(".cell")]


def move(browser, step: int) -> None:
    browser.driver.execute_script(
        "const slider = document.querySelector('input[type=range]'); slider.value = arguments[0];"
        "slider.dispatchEvent(new Event('input'))",
        step,
    )


def test_the_slider_shows_the_canvas_after_each_step(shown):
    browser = shown()
    assert cells(browser) == ["é\\u001b[31m", "", "∎", "·"]
    assert browser.text(".count") == "step 3 of 3 · nfe 3"
    assert kinds(browser) == ["p0", "p3", "special fresh again p4", "unused"]
    move(browser, 1)
    assert kinds(browser) == ["fresh p0", "masked", "fresh p2", "masked"]
    assert cells(browser)[0] == "\ufffd"
    move(browser, 2)
    assert kinds(browser)[2] == "masked again"
    move(browser, 0)
    assert kinds(browser) == ["masked"] * 4


def test_a_token_tells_its_step_when_it_is_pointed_at_or_has_the_focus(shown):
    from selenium.webdriver import Keys

    browser = shown()
    browser.point(browser.all(".cell")[0])
    assert browser.text(".inspector").startswith("é\\u001b[31m")
    assert "step 1 · probability 0.400 · entropy 0.500 nats · position 1 · id 3" in browser.text(".inspector")
    browser.press(Keys.TAB)
    browser.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert "step 3 · probability 1.00 · entropy 0.00 nats · position 3 · id 9 · masked again 1×" in browser.text(
        ".inspector"
    )
    assert "step 3" in browser.driver.switch_to.active_element.get_attribute("aria-label")
    assert browser.text(".count").startswith("step 3")


def test_the_keyboard_plays(shown):
    from selenium.webdriver import Keys

    browser = shown()
    browser.press(Keys.ARROW_LEFT)
    assert browser.text(".count").startswith("step 2 of 3")
    browser.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert browser.text(".count").startswith("step 0 of 3")
    browser.press(" ")
    assert browser.text("button") == "Pause"
    browser.press(" ")
    assert browser.text("button") == "Play"
    browser.press(" ")
    browser.wait(lambda: browser.text(".count").startswith("step 3") and browser.text("button") == "Play")


def test_texts_are_text(shown):
    attack = "</script><img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    browser = shown(prompt=attack, model=attack)
    assert browser.text("h1") == attack
    assert browser.all("img") == []
    assert browser.driver.title == attack
    assert browser.text("details pre") == "é\\u001b[31m"


@pytest.mark.parametrize("width", [360, 1180])
def test_it_fits_the_width_in_dark_and_light(shown, width):
    browser = shown(prompt="W" * 200)
    browser.resize(width, 700)
    colours = []
    for scheme in ("light", "dark"):
        browser.media(prefers_color_scheme=scheme)
        colours.append(browser.one("main").value_of_css_property("background-color"))
    assert len({*colours}) == 2
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= width


def test_numbers_of_steps_can_be_shown(shown):
    browser = shown()
    browser.one(".controls input[type=checkbox]").click()
    assert browser.all(".numbered")
