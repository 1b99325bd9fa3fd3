"""A headless Chromium for tests of pages, marked `page`."""

import shutil
from collections.abc import Callable, Iterator

import pytest

ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--window-size=1180,900")
SECONDS = 60  # to wait for the page, on a machine that is busy


class Browser:
    """Chromium by selenium; elements are found by CSS selectors."""

    def __init__(self, driver):
        self.driver = driver

    def wait(self, condition: Callable[[], object]) -> object:
        """Wait until a condition holds; return its value."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        ignored = [StaleElementReferenceException]
        return WebDriverWait(self.driver, SECONDS, 0.05, ignored).until(lambda _: condition())

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        """Wait for an element that is shown."""
        return self.wait(lambda: next((each for each in self.all(selector) if each.is_displayed()), None))

    def text(self, selector: str) -> str:
        """Text of the first element, also if it is not shown; "" without one."""
        return "".join(each.get_attribute("textContent") for each in self.all(selector)[:1])

    def press(self, *keys: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def point(self, element) -> None:
        """Move the pointer to an element."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).move_to_element(element).perform()

    def media(self, **features: str) -> None:
        """Set media features, such as prefers_color_scheme."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": named})

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def errors(self) -> list[str]:
        """Messages of the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install selenium")
    paths = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in paths:
        pytest.skip("needs Chromium: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ARGUMENTS:
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield Browser(driver)
    driver.quit()


@pytest.fixture
def browser(chromium) -> Iterator[Browser]:
    """The browser with an empty page. A test fails if the console has errors at its end."""
    chromium.errors()
    yield chromium
    errors = chromium.errors()
    chromium.driver.get("about:blank")
    chromium.media(prefers_color_scheme="light")
    chromium.resize(1180, 900)
    assert not errors, str(errors)
