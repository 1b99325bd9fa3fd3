"""The page in a browser. PLAYGROUND_PICTURES=DIR also writes playground_light.png and playground_dark.png there.

PLAYGROUND_MODEL names a checkpoint for the pictures; without it a model with random weights is drawn.
"""

import os
import re
import socket
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from diffllm import load_model, new_model
from diffllm.tokenizer import load_tokenizer
from launch import recording
from launch.playground.config import PlaygroundConfig
from launch.playground.fields import FIELDS, from_text, to_text
from launch.playground.runs import Playground
from launch.settings import read_own_settings
from sampling import SamplingConfig
from tests.conftest import small_shape
from trainer.config import Config

pytestmark = pytest.mark.page
STEPS = 8
SLOW = 0.15  # seconds of a forward, so that drafts are seen
PICTURES = os.environ.get("PLAYGROUND_PICTURES")


class Server:
    """A page that is served, and the number of forwards of its model."""

    def __init__(self, model, tokenizer, name="tiny <b>", **changes):
        from launch.playground.page import Page, serve_page

        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        config = Config(sampling=SamplingConfig(**{"max_new_tokens": 16, "steps": STEPS, "temperature": 1.0} | changes))
        config.model.path = name
        self.forwards, self.slow, forward = 0, SLOW, model.hidden
        self.go = Event()  # forwards wait for it
        self.go.set()

        def slow(*given, **named):
            self.forwards += 1
            time.sleep(self.slow)
            assert self.go.wait(120)
            return forward(*given, **named)

        model.hidden = slow
        few = replace(config.sampling, steps=2)
        self.playground = Playground(model, tokenizer, config, waiting=1)
        self.page = Page(self.playground, ["few"], {"few": few}.__getitem__)
        self.blocks = serve_page(self.page, "127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def server(tokenizer):
    pytest.importorskip("gradio", reason="needs gradio: pip install 'diffllm[page]'")
    asked, look_up = set(), socket.getaddrinfo

    def watched(host, *given, **named):
        asked.add(host)
        return look_up(host, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", watched)
        server = Server(new_model(small_shape(), tokenizer).eval(), tokenizer)
        server.asked = asked
        yield server
        server.blocks.close()


@pytest.fixture
def page(server, browser):
    """Opens the page, with a query."""
    server.slow = SLOW

    def open_page(query: str = ""):
        browser.driver.get(server.url + query)
        browser.wait(lambda: browser.one("#run").is_enabled())
        return browser

    return open_page


def write(browser, name: str, text: str) -> None:
    """Replace the text of a box."""
    from selenium.webdriver import Keys

    box = browser.one(f"#{name} textarea, #{name} input")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, *text.replace("\n", Keys.SHIFT + Keys.ENTER + Keys.NULL))


def run(browser, finished: int = 1) -> None:
    """Press Run, and wait for the end of so many samplings."""
    browser.one("#run").click()
    browser.wait(lambda: len(browser.all(".export")) == finished)


def drafts(browser, until) -> list[str]:
    """Different texts of the first canvas until a condition holds."""
    seen = []
    while not until():
        text = browser.text(".canvas")
        if text and text not in seen:
            seen.append(text)
        time.sleep(0.03)
    return seen


def test_a_prompt_is_answered_step_by_step(page, server):
    browser = page()
    write(browser, "prompt", "Solve 3x+5=20")
    browser.one("#run").click()
    assert len(drafts(browser, lambda: browser.all(".export"))) >= 3
    facts = [each.text for each in browser.all(".facts span")]
    assert facts[:3] == ["16 tokens", f"nfe {STEPS}", "2.00 tokens a forward"]
    assert float(facts[3].removesuffix(" tokens/s")) > 0
    assert browser.text(".count") == f"step {STEPS} of {STEPS} · nfe {STEPS}"
    assert len(browser.all(".cell")) == 16
    assert browser.all(".masked.cell") == []


def test_the_slider_goes_back_and_tokens_tell_their_step(page):
    from selenium.webdriver import Keys

    browser = page()
    write(browser, "prompt", "Hi")
    run(browser)
    browser.one("#result input[type=range]").send_keys(Keys.HOME)
    assert browser.text(".count").startswith("step 0 of")
    assert len(browser.all(".masked.cell")) == 16
    browser.one("#result input[type=range]").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    fresh = browser.all(".fresh.cell")
    assert len(fresh) == 2
    browser.point(fresh[0])
    assert re.search(r"step 2 · probability [\d.e-]+ · entropy [\d.]+ nats", browser.text(".inspector"))


def test_two_settings_side_by_side(page):
    browser = page()
    write(browser, "prompt", "Hi")
    write(browser, "compare", "sampling=few remask=0.2 steps=4")
    run(browser, 2)
    counts = [each.text for each in browser.all(".count")]
    assert counts == [f"step {STEPS} of {STEPS} · nfe {STEPS}", "step 4 of 4 · nfe 4"]
    left, right = (each.rect for each in browser.all("section.run"))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    assert [each.text for each in browser.all("#result h3")] == ["these settings", "sampling=few remask=0.2 steps=4"]
    assert len(browser.all(".legend")) == 1
    browser.resize(380, 900)
    browser.wait(lambda: len({each.rect["x"] for each in browser.all("section.run")}) == 1)
    assert browser.driver.execute_script("return document.documentElement.scrollWidth") <= 380


def stopped_by(server, end) -> None:
    """No forward is taken after the one that runs when `end` is called."""
    started = server.forwards
    while server.forwards < started + 2:
        time.sleep(0.01)
    end()
    with server.playground.sampling:  # the sampler has left
        last = server.forwards
    assert last < started + STEPS
    time.sleep(4 * SLOW)
    assert server.forwards == last


def test_stop_ends_the_sampling(page, server):
    browser = page()
    write(browser, "prompt", "Hi")
    browser.one("#run").click()
    server.slow = 1.0
    stopped_by(server, lambda: browser.one("#stop").click())
    assert browser.wait(lambda: browser.text(".message")) == "stopped"
    server.slow = SLOW
    browser.wait(lambda: browser.one("#run").is_enabled())
    run(browser)
    assert browser.text(".message") == ""


def test_a_draft_that_comes_late_does_not_undo_stop(page, server):
    """Of a long run many are on their way."""
    browser = page("?max_new_tokens=800&steps=800")
    server.slow = 0.005
    write(browser, "prompt", "Hi")
    for _ in range(3):
        browser.one("#run").click()
        browser.wait(lambda: re.fullmatch(r"step \d{2,} · nfe \d+", browser.text(".count")))  # of an unknown number
        browser.one("#stop").click()
        browser.wait(lambda: browser.text(".message") == "stopped")
        with server.playground.sampling:  # the sampler has left
            time.sleep(1)
        assert browser.text(".message") == "stopped"
        assert browser.one("#run").is_enabled()
        assert not browser.one("#stop").is_enabled()
        step = re.match(r"step (\d+) ", browser.text(".count"))[1]
        assert browser.text("section .facts") == f"stopped at step {step}"


def test_a_closed_tab_ends_the_sampling(page, server):
    browser = page()
    write(browser, "prompt", "Hi")
    browser.one("#run").click()
    server.slow = 1.0
    stopped_by(server, lambda: browser.driver.get("about:blank"))
    browser.errors()  # gradio reports its connections that end


def test_a_run_is_exported_as_one_file(page, tmp_path):
    browser = page()
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    write(browser, "prompt", "Hi <b>there</b>")
    run(browser)
    text = browser.text(".text pre")
    browser.one(".export").click()
    file = tmp_path / "sampling.html"
    browser.wait(file.exists)
    browser.driver.get(file.as_uri())
    assert browser.text("h1") == "Hi <b>there</b>"
    assert browser.text(".count") == f"step {STEPS} of {STEPS} · nfe {STEPS}"
    assert browser.text("details pre") == text


ATTACK = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>\x1b[31m\u202e</title>"


def shown(browser, selector: str, text: str) -> bool:
    """Whether the attack is text there, with its control characters escaped, and has done nothing."""
    assert browser.all("img, #result b:not(.turn b, .inspector b), #result script, .diffusion h1 *") == []
    assert browser.driver.title != "owned"
    return text.replace("\x1b", r"\u001b").replace("\u202e", r"\u202e") in browser.text(selector)


@pytest.mark.parametrize("mode", ["prompt", "chat", "template"])
def test_html_of_users_and_the_model_is_text(page, monkeypatch, mode, tmp_path):
    monkeypatch.setattr(recording.Pieces, "decode", lambda self, tokens: ATTACK)
    texts = {"prompt": ATTACK, "system": ATTACK, "template": f"{ATTACK}<|mask:2|>", "compare": "stop='<b>x</b>'"}
    browser = page("?" + urlencode(texts | {"mode": mode}))
    browser.driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    run(browser, 2)
    assert shown(browser, ".cell", ATTACK)
    assert mode != "chat" or shown(browser, ".turn", ATTACK)
    assert mode != "template" or shown(browser, ".text pre", ATTACK)
    assert browser.all("#result h3")[1].text == "stop='<b>x</b>'"
    assert browser.text("h1 + p") == "tiny <b>"
    browser.one(".export").click()
    file = tmp_path / "sampling.html"
    browser.wait(file.exists)
    browser.driver.get(file.as_uri())
    assert shown(browser, "h1", ATTACK)
    assert shown(browser, ".cell", ATTACK)


def test_a_chat_goes_on_until_it_is_forgotten(page):
    browser = page("?mode=chat")
    browser.one("#forget")
    for number in (1, 2):
        write(browser, "prompt", f"question {number}")
        browser.wait(lambda: browser.one("#run").is_enabled())
        browser.one("#run").click()
        browser.wait(lambda number=number: len(browser.all(".turn")) == 2 * number - 1 and browser.all(".export"))
    assert [each.text for each in browser.all(".turn b")] == ["user", "assistant", "user"]
    browser.one("#forget").click()
    browser.wait(lambda: not browser.all(".turn"))


def test_a_chat_that_is_forgotten_while_it_is_answered_does_not_come_back(page, server):
    browser = page("?mode=chat&max_new_tokens=800&steps=800")
    server.slow = 0.005
    write(browser, "prompt", "Hi")
    browser.one("#run").click()
    browser.wait(lambda: browser.all(".fresh.cell"))
    browser.one("#forget").click()
    browser.wait(lambda: not browser.all(".turn"))
    with server.playground.sampling:  # the sampler has left
        time.sleep(1)
    assert browser.all(".turn, .run") == []
    assert browser.one("#run").is_enabled()


def test_another_mode_clears_the_result(page):
    browser = page("?mode=chat")
    browser.one("#forget")
    write(browser, "prompt", "Hi")
    run(browser)
    browser.one("input[type=radio][value=template]").click()
    browser.wait(lambda: not browser.all(".run, .turn"))
    assert browser.one("#template textarea").get_property("value").count("<|mask:") == 3


def test_exports_of_earlier_runs_are_given_up(page):
    browser = page()
    write(browser, "prompt", "Hi")
    browser.driver.execute_script(
        "window.held = new Set(); const { createObjectURL, revokeObjectURL } = URL;"
        "URL.createObjectURL = (blob) => { const url = createObjectURL.call(URL, blob); held.add(url); return url; };"
        "URL.revokeObjectURL = (url) => { held.delete(url); revokeObjectURL.call(URL, url); };"
    )
    for _ in range(2):
        run(browser)
        browser.wait(lambda: browser.driver.execute_script("return held.size") == 1)
        [held] = browser.driver.execute_script("return [...held]")
        assert browser.one(".export").get_attribute("href") == held
        browser.driver.execute_script("document.querySelector('.export').remove()")


def test_a_link_holds_all_settings(page, server):
    browser = page()
    write(browser, "prompt", "a&b=c é")
    write(browser, "sampling_steps", "3")
    write(browser, "compare", "steps=2")
    run(browser, 2)
    link = browser.one(".link a").get_attribute("href")
    browser = page(link.removeprefix(server.url))
    browser.wait(lambda: browser.one("#prompt textarea").get_property("value") == "a&b=c é")
    assert browser.one("#sampling_steps textarea, #sampling_steps input").get_property("value") == "3"
    run(browser, 2)
    assert [each.text for each in browser.all(".count")] == ["step 3 of 3 · nfe 3", "step 2 of 2 · nfe 2"]
    query = dict(parse_qsl(urlsplit(link).query, keep_blank_values=True))
    config = replace(server.playground.config.sampling, steps=3)
    assert {name: from_text(name, query[name]) for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}


def test_a_preset_sets_the_controls(page):
    browser = page()
    browser.one("#preset input").click()
    browser.one("[role=option][aria-label=few]").click()
    browser.wait(lambda: browser.one("#sampling_steps textarea, #sampling_steps input").get_property("value") == "2")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prompt", " ", "error: the prompt "),
        ("sampling_steps", "0", "error: sampling.steps=0: "),
        ("sampling_steps", "<i>x</i>", "error: sampling.steps=<i>x</i>: "),
        ("sampling_steps", "5000", "error: sampling.steps=5000: "),
        ("sampling_max_new_tokens", "5000", " sampling.max_new_tokens=5000 "),
        ("compare", "stepps=2", "error: stepps: "),
        ("compare", "sampling=<i>", "'<i>'"),
    ],
)
def test_a_mistake_is_shown_and_the_page_lives_on(page, name, text, message):
    browser = page()
    write(browser, "prompt", "Hi")
    write(browser, name, text)
    browser.one("#run").click()
    browser.wait(lambda: message in browser.text(".message"))
    assert browser.all("#result i:not(.legend i)") == []
    write(browser, name, {"prompt": "Hi", "sampling_steps": "2", "sampling_max_new_tokens": "4", "compare": ""}[name])
    run(browser)


@pytest.mark.parametrize(
    ("query", "given"),
    [
        ("steps=many&mode=shout", "steps=many"),
        ("alg=<i>x</i>", "alg=<i>x</i>"),
        ("stop=%5Cud800", r"stop=['\\ud800']"),
        ("temperature=nan&system=%00%ED%A0%80", "temperature=nan"),
    ],
)
def test_a_link_with_a_mistake(page, query, given):
    browser = page(f"?{query}&prompt=Hi")
    assert browser.wait(lambda: browser.text(".message")).startswith(f"error: sampling.{given}: ")
    run(browser)


@pytest.mark.parametrize(
    ("name", "value", "given"),
    [
        ("alg", ["entropy"], "['entropy']"),
        ("temperature", "NaN", "nan"),
        ("max_new_tokens", 1.7, "1.7"),
        ("seed", None, ""),
        ("stop", "\\ud800", r"['\\ud800']"),
    ],
)
def test_a_client_that_sends_other_values(server, capsys, name, value, given):
    values = [value if each == name else to_text(each, getattr(server.page.config, each)) for each in FIELDS]
    *_, (result, *_) = server.page.run([], "prompt", "Hi", "", "", "", *values)
    assert result.value["message"].startswith(f"error: sampling.{name}={given}: ")
    assert capsys.readouterr().err == ""


def test_one_run_at_a_time_and_others_wait(page, server):
    browser = page()
    write(browser, "prompt", "Hi")
    server.go.clear()
    browser.one("#run").click()
    browser.wait(server.playground.sampling.locked)
    first = browser.driver.current_window_handle
    for text in ("waiting for 1 other", "error: 1 other"):
        browser.driver.switch_to.new_window("tab")
        page()
        write(browser, "prompt", "Hi")
        browser.one("#run").click()
        browser.wait(lambda text=text: text in browser.text("#result"))
    for handle in browser.driver.window_handles:
        if handle != first:
            browser.driver.switch_to.window(handle)
            browser.driver.close()
    browser.driver.switch_to.window(first)
    server.go.set()
    browser.wait(lambda: browser.all(".export"))


def test_no_file_is_served_and_none_is_taken(server):
    import httpx  # of gradio

    with httpx.Client(base_url=server.url) as client:
        for path in ("/etc/passwd", __file__, str(Path(__file__).parents[3] / "README.md")):
            assert client.get(f"gradio_api/file={path}").status_code in (403, 404)
        for path, field in (("upload", "files"), ("process_recording", "file")):
            for content in (b"", b"1", b"content"):
                assert client.post(f"gradio_api/{path}", files={field: ("a.txt", content)}).status_code == 403


def test_neither_server_nor_browser_asks_another_host(page, server):
    browser = page()
    write(browser, "prompt", "Hi")
    run(browser)
    assert {*map(str, server.asked)} <= {"127.0.0.1", "localhost", "None"}
    asked = browser.driver.execute_script("return performance.getEntriesByType('resource').map((each) => each.name)")
    assert len(asked) > 3
    assert [each for each in asked if not each.startswith((server.url, "data:", "blob:"))] == []


@pytest.mark.skipif(not PICTURES, reason="writes pictures: give PLAYGROUND_PICTURES=DIR")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(browser, server, scheme):
    path = os.environ.get("PLAYGROUND_MODEL")
    if path:
        model, tokenizer = load_model(path).eval(), load_tokenizer(path)
        _, documented, _ = read_own_settings("launch.playground", PlaygroundConfig, [f"model.path={path}"])
        server = Server(model, tokenizer, "/".join(Path(path).parts[-3:]), **asdict(documented.sampling))
    server.slow = 0
    browser.media(prefers_color_scheme=scheme)
    browser.resize(1120, 900)
    browser.driver.get(server.url)
    browser.wait(lambda: browser.one("#run").is_enabled())
    write(browser, "prompt", "Solve 6x-9=33")
    write(browser, "compare", "steps=6")
    run(browser, 2)
    for number in (11, 4):
        browser.driver.execute_script(
            "const slider = document.querySelectorAll('#result input[type=range]')[arguments[0]];"
            "slider.value = arguments[1]; slider.dispatchEvent(new Event('input'))",
            int(number == 4),
            number,
        )
    browser.driver.execute_script("scrollTo(0, 0); document.activeElement.blur()")
    time.sleep(0.5)
    file = Path(PICTURES) / f"playground_{scheme}.png"
    assert browser.driver.save_screenshot(str(file))
    assert file.stat().st_size < 150_000
