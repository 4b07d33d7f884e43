"""The page at GET /: its policy, and a person's way through it in headless Chromium, with keys
alone and on a phone's screen."""

import base64
import hashlib
import re
import shutil
import time

import pytest

from tests.ranks import PATIENCE_S
from tests.servers import pretending

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module")
def server():
    with pretending("slow") as one:
        yield one


@pytest.fixture
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="drives a browser; in llama_tp[clients]: make test-clients"
    )
    if not CHROMIUM:
        pytest.skip("no chromium here (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        with playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as one:
            yield one


def opened(browser, server, **options):
    """A tab with the page, and what it complains about."""
    tab = browser.new_context(**options).new_page()
    complaints = []
    tab.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type in ("error", "warning") else None
        ),
    )
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(server.url)
    return tab, complaints


def until(tab, expression: str) -> None:
    """Waits for it to be true. Playwright's own wait is an eval in the page, which the page's
    policy forbids."""
    deadline = time.monotonic() + PATIENCE_S
    while not tab.evaluate(expression):
        assert time.monotonic() < deadline, tab.inner_text("body")
        time.sleep(0.05)


def test_the_policy_lets_exactly_the_page_s_own_script_and_style_run(server):
    status, headers, body = server.get("/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inner = re.search(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)[1]
        assert (
            f"{directive} 'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"
            in policy
        )
    assert (
        "default-src 'none'" in policy
        and "frame-ancestors 'none'" in policy
        and "unsafe" not in policy
    )
    assert not re.search(rb"https?://|//[a-z]+\.[a-z]|\son\w+=|\sstyle=", body), (
        "nothing from elsewhere, nothing inline"
    )


def test_sampling_is_left_to_the_server_unless_somebody_chooses(server):
    fields = dict(re.findall(r'<input id="(\w+)"([^>]*)>', server.get("/")[2].decode()))
    for name in ("temperature", "top_p", "top_k", "repetition_penalty"):
        assert "value=" not in fields[name], name


def test_without_the_page_there_is_none():
    with pretending("live", with_page=False) as server:
        assert server.get("/")[0] == 404


def test_a_conversation_with_keys_alone(browser, server):
    tab, complaints = opened(browser, server)
    until(tab, "document.getElementById('name').textContent === 'fake'")
    until(tab, "document.getElementById('temperature').placeholder === '1'")  # the server's own
    tab.keyboard.type("hello")  # the field has the focus from the start
    tab.keyboard.press("Enter")
    until(tab, "document.querySelectorAll('article').length === 2")
    until(tab, "/1 running, 0 waiting, KV/.test(document.getElementById('live').textContent)")
    until(
        tab,
        r"/\d+ tokens, [\d.]+ tokens\/s/.test(document.querySelector('article.assistant "
        r"small').textContent)",
    )
    tab.keyboard.press("Escape")
    until(tab, "/stopped/.test(document.querySelector('article.assistant small').textContent)")
    assert re.fullmatch("[a-z]+", tab.inner_text("article.assistant span"))
    assert tab.is_enabled("#send") and tab.is_disabled("#stop")
    until(tab, "/0 running, 0 waiting/.test(document.getElementById('live').textContent)")
    for _ in range(3):  # backwards, past the conversation, to the settings
        tab.keyboard.press("Shift+Tab")
        if tab.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    tab.keyboard.press("Enter")
    tab.fill("#max_tokens", "3")
    tab.fill("#text", "again")
    tab.press("#text", "Enter")
    until(
        tab,
        "/3 tokens.*by the limit/.test(document.querySelectorAll('article.assistant "
        "small')[1]?.textContent)",
    )
    tab.click("#clear")
    assert tab.locator("article").count() == 0 and complaints == []


def test_what_a_model_writes_is_text_and_an_error_is_said(browser, server):
    tab, complaints = opened(browser, server)
    tab.fill("#text", "<img src=x onerror=alert(1)><b>bold</b>")
    tab.press("#text", "Enter")
    tab.wait_for_selector("article.user")
    assert tab.locator("article img, article b").count() == 0 and "<b>bold</b>" in tab.inner_text(
        "article.user"
    )
    tab.click("#stop")
    tab.click("#clear")
    tab.evaluate("document.getElementById('temperature').value = '-1'")
    tab.fill("#text", "x")
    tab.press("#text", "Enter")
    until(
        tab,
        "/temperature must be/.test(document.querySelector('article.assistant "
        ".error')?.textContent)",
    )


def test_several_turns_fit_and_an_error_is_seen_whole(browser):
    """Answers of at most a quarter of the context, unless their reader wants others; the demo's has
    512 tokens."""
    with pretending("live") as server:
        tab, complaints = opened(browser, server, viewport={"width": 800, "height": 400})

        def ask(text: str, ends: str) -> None:
            n = tab.locator("article.assistant").count()
            tab.fill("#text", text)
            tab.press("#text", "Enter")
            until(
                tab,
                f"/{ends}/.test(document.querySelectorAll('article.assistant "
                f"small')[{n}]?.textContent)",
            )
            until(tab, "!document.getElementById('send').disabled")

        ask("one", "128 tokens.*by the limit")  # at once, before the page has looked around
        ask("two", "128 tokens.*by the limit")
        tab.evaluate("document.getElementById('max_tokens').value = ''")  # as many as fit
        ask("three", r"\d+ tokens.*by the limit")
        assert complaints == []
        ask("four", "the prompt is too long.*Clear")
        error, talk = (
            tab.locator("article.assistant .error").bounding_box(),
            tab.locator("main").bounding_box(),
        )
        assert (
            talk["y"] <= error["y"] and error["y"] + error["height"] <= talk["y"] + talk["height"]
        )
        assert tab.input_value("#text") == "four"  # to be sent again, after Clear
        tab.click("#clear")
        ask("four", "by the limit")


def test_a_reply_that_breaks_off_or_is_no_json_is_an_error(browser):
    """A server that is killed in mid-answer, and a proxy's page in the place of a reply."""
    with pretending("slow") as server:
        tab, _ = opened(browser, server)
        tab.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"),
        )
        tab.fill("#text", "x")
        tab.press("#text", "Enter")
        until(
            tab, "/HTTP 502/.test(document.querySelector('article.assistant .error')?.textContent)"
        )
        whole = 'data: {"choices": [{"delta": {"content": "so far"}, "finish_reason": null}]}\n\n'
        tab.unroute("**/v1/chat/completions")
        tab.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=whole, content_type="text/event-stream"),
        )
        tab.press("#text", "Enter")
        until(
            tab,
            "/broke off/.test(document.querySelectorAll('article.assistant "
            "small')[1]?.textContent)",
        )
        assert tab.locator("article.assistant span").nth(1).inner_text() == "so far"


def test_it_fits_a_phone(browser, server, tmp_path):
    tab, _ = opened(browser, server, viewport={"width": 360, "height": 640}, device_scale_factor=2)
    tab.fill("#text", "hello")
    tab.press("#text", "Enter")
    until(tab, r"/\d+ tokens/.test(document.querySelector('article.assistant small')?.textContent)")
    assert tab.evaluate("document.documentElement.scrollWidth <= 360")
    assert tab.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    for name in ("#text", "#send", "#stop"):
        box = tab.locator(name).bounding_box()
        assert (
            box["x"] >= 0
            and box["x"] + box["width"] <= 360
            and box["y"] + box["height"] <= 640
            and box["height"] >= 40
        )
    tab.screenshot(path=tmp_path / "phone.png")
    assert (tmp_path / "phone.png").stat().st_size > 5000
